"""Verification of candidate pairs: whether two images with similar hashes show the same photograph.

A hash of 128 bits does not distinguish copies from photographs with a similar pose (aeroplanes from the side,
motorbikes on white), so a match of hashes is only a candidate. The pixels decide: two small copies are aligned (crop,
mirror image, shift, slight rotation) and compared block by block, in luma and in colour. Copies agree everywhere;
photographs with the same pose agree in outline and differ in detail."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np

from pipeline.data.codecs import decode_stored
from pipeline.data.duplicates.hashes import alignment, keypoints, scale_of

SIDE, COARSE, MAX_SIDE = 32, 64, 128  # sides of the images that are compared: smallest, first alignment, largest
ADDED_SIDE = 256  # largest side at which content of only one image is searched for, such as the writing in a form
COPY, COPY_QUALITY = 256, 85
"""Shorter side and JPEG quality of the small copies: MAX_SIDE pixels of a crop of 80% have all their colours (4:2:0)."""
STEPS, FINE_STEPS = 60, 20  # maximum iterations of the alignment
BLOCKS, FINE_BLOCKS = 4, 8  # blocks per side, for images up to COARSE and larger ones
STRUCTURE = 3.0  # minimum standard deviation (on a scale of 255) of a block with fine structure
MIN_STRUCTURE = {BLOCKS: 0.8, FINE_BLOCKS: 0.4}  # minimum fraction of blocks with structure
MIN_MATCHES = 6
GIVE_UP = 0.6  # pairs with a lower correlation at COARSE are rejected without a finer comparison
# Limits for the same photograph; docs/decontamination.md says how they were chosen.
MIN_OVERLAP, MIN_CORRELATION, MIN_BLOCK_CORRELATION, MAX_CHROMA_DIFFERENCE = 0.7, 0.85, 0.6, 14.0
SPOT, MAX_DIFFERENCE = 5, 28.0  # over SPOT x SPOT pixels
MAX_COLOUR_DIFFERENCE, MAX_NATIVE_COLOUR_DIFFERENCE = 28.0, 40.0  # JPEG halves the resolution of chroma
PATCH, MAX_PATCH_DIFFERENCE = 15 / 128, 7.5  # fraction of the side; differences in light or shape
AREA, AREA_BLUR, MIN_NOISE, MAX_ADDED = 7, 0.7, 6.0, 1.1  # over AREA x AREA pixels, blurred by that many pixels


class Agreement(NamedTuple):
    """Agreement of two aligned images at `side` x `side`.

    overlap: fraction of the second image inside the first. detail: correlation of the fine structure. worst: the
    correlation of single blocks, at the lowest sixteenth. structure: fraction of blocks with fine structure.
    Differences are on a scale of 255. difference: the largest difference of luma over SPOT x SPOT pixels, after tones
    are matched. colour_difference: the same for red, green and blue. patch_difference: the same for luma over patches,
    without clipped pixels. colour: mean difference of chroma. added: contrast that only one image has, relative to the
    contrast that both have, where it is largest. native: whether one of the images has no more pixels than are compared."""

    side: int
    overlap: float = 0.0
    detail: float = 0.0
    worst: float = 0.0
    structure: float = 0.0
    difference: float = 255.0
    colour_difference: float = 255.0
    patch_difference: float = 255.0
    colour: float = 255.0
    added: float = 0.0
    native: bool = False

    @property
    def same(self) -> bool:
        """Whether the two show the same photograph."""
        return self.similar and self.added <= MAX_ADDED

    @property
    def similar(self) -> bool:
        """Whether they agree at a side of MAX_SIDE, where small writing is grey."""
        return (
            self.overlap >= MIN_OVERLAP
            and self.detail >= MIN_CORRELATION
            and self.worst >= MIN_BLOCK_CORRELATION
            and self.difference <= MAX_DIFFERENCE
            and self.colour_difference <= (MAX_NATIVE_COLOUR_DIFFERENCE if self.native else MAX_COLOUR_DIFFERENCE)
            and self.patch_difference <= MAX_PATCH_DIFFERENCE
            and self.colour <= MAX_CHROMA_DIFFERENCE
        )


def small_copy(pixels_HWC: np.ndarray) -> bytes:
    """A small copy of an image for verification and the contact sheet: a JPEG with a shorter side of at most COPY, or a
    PNG if the shorter side is below 64."""
    height, width = pixels_HWC.shape[:2]
    scale = min(1.0, COPY / min(height, width), 4 * COPY / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA)[:, :, ::-1]
    if min(size) < 64:
        return cv2.imencode(".png", small)[1].tobytes()
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, COPY_QUALITY])[1].tobytes()


WHOLE = np.array([0, 0, 1, 1], np.float16)


def compare_views(
    mine: bytes, other: bytes, box: np.ndarray = WHOLE, other_box: np.ndarray = WHOLE, mirrored: bool = False
) -> Agreement:
    """Compares two small copies, starting from the alignment of the views `box` and `other_box`. mirrored: whether one
    of the two is a mirror image."""
    first, second = decode_stored(other).copy(), decode_stored(mine).copy()
    if mirrored:
        first = np.ascontiguousarray(first[:, ::-1])
    start = alignment(other_box, box, mirrored)
    if scale_of(start) > 1:  # `first` must have the wider view
        first, second, start = second, first, cv2.invertAffineTransform(start)
    return compare_pictures(first, second, start)


def compare_unaligned(mine: bytes, other: bytes) -> Agreement:
    """Compares two small copies without a known alignment. Tries the identity and the alignment of their keypoints,
    mirrored and not, and returns the best agreement."""
    first, second = decode_stored(other).copy(), decode_stored(mine).copy()
    best = Agreement(0)
    for mirrored in (False, True):
        flipped = np.ascontiguousarray(first[:, ::-1]) if mirrored else first
        for start in (match_keypoints(flipped, second), np.array(np.eye(2, 3))):
            if start is None:
                continue
            wider = scale_of(start) <= 1  # whether `flipped` has the wider view
            pair = (flipped, second, start) if wider else (second, flipped, cv2.invertAffineTransform(start))
            agreement = compare_pictures(*pair)
            best = max(best, agreement, key=lambda a: (a.same, a.detail))
            if best.same:
                return best
    return best


def match_keypoints(first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """The affine map from the unit square of `second` to that of `first` that aligns their SIFT keypoints (RANSAC:
    Fischler and Bolles, 1981); None with fewer than MIN_MATCHES inliers."""
    sift = keypoints(400)
    (points, one), (other_points, other) = (
        sift.detectAndCompute(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), None) for p in (second, first)
    )
    if one is None or other is None or len(one) < MIN_MATCHES or len(other) < 2:
        return None
    nearest = cv2.BFMatcher().knnMatch(one, other, k=2)
    good = [pair[0] for pair in nearest if len(pair) == 2 and pair[0].distance < 0.8 * pair[1].distance]
    if len(good) < MIN_MATCHES:
        return None
    size, other_size = (np.array(p.shape[1::-1], np.float64) for p in (second, first))
    here = (np.array([points[m.queryIdx].pt for m in good]) + 0.5) / size
    there = (np.array([other_points[m.trainIdx].pt for m in good]) + 0.5) / other_size
    cv2.setRNGSeed(0)  # RANSAC is random; a fixed seed makes the result reproducible
    found, inliers = cv2.estimateAffine2D(here, there, method=cv2.RANSAC, ransacReprojThreshold=0.02)
    if found is None or inliers.sum() < MIN_MATCHES or not 0.2 < scale_of(found) < 5:
        return None
    return found


def compare_pictures(first: np.ndarray, second: np.ndarray, start: np.ndarray | None = None) -> Agreement:
    """Aligns `second` to `first` (RGB uint8, any size) and compares them.

    start: initial 2x3 affine map from the unit square of `second` to that of `first`; None: identity.
    """
    warp = np.array(np.eye(2, 3) if start is None else start, np.float64)
    # the resolution that both images have in the area they share
    shared = int(min(*second.shape[:2], max(scale_of(warp), 0.1) * min(first.shape[:2]) + 1))
    side = max(SIDE, min(MAX_SIDE, shared))
    for step in (min(COARSE, side), side) if side > COARSE else (side,):
        begin = warp
        found = _align(first, second, warp, step)
        warp = warp if found is None else found
        agreement = _compare(first, second, warp, step)
        if found is not None and agreement.detail < MIN_CORRELATION:  # the alignment may have diverged
            unmoved = _compare(first, second, begin, step)
            if unmoved.detail > agreement.detail:
                warp, agreement = begin, unmoved
        if agreement.detail < GIVE_UP:
            return agreement
    if agreement.structure < MIN_STRUCTURE[_blocks(side)]:
        # too little structure for an alignment: a few edges on a plain background fit many other images
        warp = np.array(np.eye(2, 3))
        agreement = _compare(first, second, warp, side)
    agreement = agreement._replace(native=shared <= MAX_SIDE)
    if agreement.similar and side > COARSE:
        side = min(ADDED_SIDE, shared)
        added = _added(first, second, warp, side)
        if added > MAX_ADDED and (found := _align(first, second, warp, side)) is not None:
            added = min(added, _added(first, second, found, side))
        agreement = agreement._replace(added=added)
    return agreement


def _align(first: np.ndarray, second: np.ndarray, start: np.ndarray, side: int) -> np.ndarray | None:
    """The affine map near `start`, between unit squares, that aligns the two best; None if the search diverges."""
    a, b, larger = _at_side(first, second, start, side)
    grey_a, grey_b = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (a, b))
    warp: Any = _to_pixels(start, side, larger).astype(np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, STEPS if side <= COARSE else FINE_STEPS, 1e-5)
    try:
        everywhere = np.full((larger, larger), 255, np.uint8)
        _, warp = cv2.findTransformECC(grey_b, grey_a, warp, cv2.MOTION_AFFINE, stop, everywhere, 3)
    except cv2.error:
        return None
    return _to_unit(warp.astype(np.float64), side, larger)


def _at_side(first: np.ndarray, second: np.ndarray, warp: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(first, second, side of first): `second` is resized to `side`, `first` so
    that the shared area has the same scale."""
    larger = max(side, min(round(side / max(scale_of(warp), 0.1)), max(side, *first.shape[:2])))
    a = cv2.resize(first, (larger, larger), interpolation=cv2.INTER_AREA).astype(np.float32)
    b = cv2.resize(second, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    return a, b, larger


def _aligned(first: np.ndarray, second: np.ndarray, warp: np.ndarray, side: int) -> tuple[np.ndarray, ...]:
    """(`first` as `second` shows it, `second`, where both are), all `side` x `side`."""
    a, b, larger = _at_side(first, second, warp, side)
    pixel_map = _to_pixels(warp, side, larger)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(a, pixel_map, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.ones((larger, larger), np.float32), pixel_map, (side, side), flags=flags) > 0.99
    return moved, b, inside


def _compare(first: np.ndarray, second: np.ndarray, warp: np.ndarray, side: int) -> Agreement:
    aligned, b, inside = _aligned(first, second, warp, side)
    overlap = float(inside.mean())
    if overlap < 0.3:
        return Agreement(side, overlap)
    detail, worst, structure = _structure(aligned, b, inside)
    chroma = _chroma(aligned), _chroma(b)
    grey = min(float(np.abs(c).mean()) for c in chroma) < 1.0  # a grey version of a colour image is a copy
    colour = 0.0 if grey else float(np.abs(chroma[0] - chroma[1])[inside].mean())
    return Agreement(side, overlap, detail, worst, structure, *_differences(aligned, b, inside, grey), colour)


def _blocks(side: int) -> int:
    return BLOCKS if side <= COARSE else FINE_BLOCKS


def _to_pixels(unit_map: np.ndarray, side: int, larger: int) -> np.ndarray:
    """Converts a map between unit squares to a map from pixel centres at `side` to pixel centres at `larger`."""
    linear = unit_map[:, :2] * larger / side
    shift = unit_map[:, 2] * larger + linear.sum(1) * 0.5 - 0.5
    return np.concatenate([linear, shift[:, None]], axis=1)


def _to_unit(pixel_map: np.ndarray, side: int, larger: int) -> np.ndarray:
    """The inverse of _to_pixels."""
    linear = pixel_map[:, :2] * side / larger
    shift = (pixel_map[:, 2] + 0.5 - pixel_map[:, :2].sum(1) * 0.5) / larger
    return np.concatenate([linear, shift[:, None]], axis=1)


def _structure(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> tuple[float, float, float]:
    grey = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (a, b)]
    fine = [g - cv2.GaussianBlur(g, (0, 0), 2.5) for g in grey]
    use = inside
    for channels in ((a, b), grey):  # clipped pixels have no structure, and pixels with a clipped channel less
        low, high = np.minimum(*channels), np.maximum(*channels)
        clipped: Any = ((low < 5) | (high > 250)).reshape(*inside.shape, -1).any(axis=2)
        intact = inside & ~cv2.dilate(clipped.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        if intact.sum() >= 0.15 * intact.size:
            use = intact
            break
    detail = _correlation(fine[0][use], fine[1][use])
    edges = np.linspace(0, len(a), _blocks(len(a)) + 1).astype(int)
    blocks, places = [], 0
    for top, bottom in itertools.pairwise(edges):
        for left, right in itertools.pairwise(edges):
            part = use[top:bottom, left:right]
            if part.mean() < 0.5:
                continue
            places += 1
            p, q = (f[top:bottom, left:right][part] for f in fine)
            if max(p.std(), q.std()) > STRUCTURE:
                blocks.append(_correlation(p, q))
    worst = sorted(blocks)[min(len(blocks) // 16, len(blocks) - 1)] if blocks else detail
    return detail, worst, len(blocks) / max(1, places)


def _correlation(p: np.ndarray, q: np.ndarray) -> float:
    p, q = p - p.mean(), q - q.mean()
    scale = float(np.sqrt((p * p).sum() * (q * q).sum()))
    return float((p * q).sum()) / scale if scale > 0 else 0.0


def _differences(a: np.ndarray, b: np.ndarray, inside: np.ndarray, grey: bool) -> tuple[float, float, float]:
    """The largest differences, on a scale of 255, after the tones of one image are matched to the other: luma over
    spots, colour over spots, luma over patches.

    The tone curve of a channel is a polynomial of degree two, clipped to 0..255. The better of the two directions
    counts, because values that are clipped in one image cannot be predicted from it. The curve is that of luma, or, if luma
    differs too much, one for each channel: where brightening has clipped one channel, luma does not follow its curve.
    """
    clipped = ((np.minimum(a, b) < 5) | (np.maximum(a, b) > 248)).any(axis=2)
    use = inside & ~cv2.dilate(clipped.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    side = max(SPOT, round(PATCH * len(a)) | 1)

    def largest(differences: list[np.ndarray]) -> tuple[float, float]:
        patches = min(_largest_mean(d * use, side) for d in differences)
        return min(_largest_mean(d, SPOT) for d in differences), patches

    one, other = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY)[:, :, None] for p in (a, b))
    luma = [_unexplained(*pair, inside, ~clipped)[:, :, 0] for pair in ((one, other), (other, one))]
    spots, patches = largest(luma)
    if spots > MAX_DIFFERENCE and (grey or not clipped.any()):
        return spots, 255.0, 255.0
    colours = [] if grey else [_unexplained(*pair, inside) for pair in ((a, b), (b, a))]
    if colours and (spots > MAX_DIFFERENCE or patches > MAX_PATCH_DIFFERENCE):
        by_channel = largest([cv2.cvtColor(d, cv2.COLOR_RGB2GRAY) for d in colours])
        spots, patches = min(spots, by_channel[0]), min(patches, by_channel[1])
    return spots, min((_largest_mean(d, SPOT) for d in colours), default=spots), patches


def _added(first: np.ndarray, second: np.ndarray, warp: np.ndarray, side: int) -> float:
    """The largest contrast (standard deviation over AREA x AREA pixels) that only one image has after tones are
    matched, relative to the contrast that both have there plus noise. The first way to match tones that gives at most
    MAX_ADDED counts, otherwise the best.

    Other writing in the same form or a scratch on the same part has more contrast than what is there in the other image.
    A blur makes images of slightly different sharpness alike."""
    a, b, inside = _aligned(first, second, warp, side)
    inside = cv2.erode(inside.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    if not inside.any():
        return 0.0
    clipped = ((np.minimum(a, b) < 5) | (np.maximum(a, b) > 248)).any(axis=2)
    a, b = (cv2.GaussianBlur(p, (0, 0), AREA_BLUR) for p in (a, b))
    one, other = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (a, b))
    shared = np.minimum(_contrast(one, inside), _contrast(other, inside))

    def largest(difference: np.ndarray) -> float:
        contrast = _contrast(difference, inside)
        noise = max(MIN_NOISE, 3 * float(np.median(contrast[inside])))
        return float((contrast / (shared + noise)).max())

    def differences() -> Iterator[np.ndarray]:
        for x, y in ((one, other), (other, one)):
            yield _unexplained(x[:, :, None], y[:, :, None], inside, ~clipped)[:, :, 0]
        if clipped.any():  # where one channel is clipped, luma does not follow its tone curve
            for x, y in ((a, b), (b, a)):
                yield cv2.cvtColor(_unexplained(x, y, inside), cv2.COLOR_RGB2GRAY)

    added = math.inf
    for difference in differences():
        added = min(added, largest(difference))
        if added <= MAX_ADDED:
            break
    return added


def _contrast(grey: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Standard deviation of the pixels `inside`, over AREA x AREA pixels; zero where fewer than half of them are inside."""
    used = inside.astype(np.float32)
    part, mean, square = (cv2.blur(values, (AREA, AREA)) for values in (used, grey * used, grey * grey * used))
    part = np.maximum(part, 1e-6)
    return np.sqrt(np.maximum(square / part - (mean / part) ** 2, 0)) * (part > 0.5)


def _unexplained(
    source: np.ndarray, target: np.ndarray, inside: np.ndarray, intact: np.ndarray | bool = True
) -> np.ndarray:
    """`target` minus its prediction from `source` by a fitted tone curve per channel; zero outside `inside`.

    The curve is fitted to `intact` pixels that are clipped in neither image, if there are enough."""
    different = np.zeros(target.shape, np.float32)
    for channel in range(source.shape[2]):
        x, y = source[:, :, channel], target[:, :, channel]
        for use in (inside & intact & _unclipped(x, y), inside & (y > 5) & (y < 250), inside):
            if use.sum() >= 0.1 * use.size:
                break
        terms, values = _powers(x[use]), y[use].astype(np.float64)
        weights = np.ones(len(values))
        for _ in range(2):  # the second fit gives less weight to pixels that differ in the first
            weighted = terms.T * weights
            curve = np.linalg.solve(weighted @ terms + 1e-3 * np.eye(3), weighted @ values)
            weights = 1 / (1 + ((terms @ curve - values) / 10) ** 2)
        predicted = np.clip(_powers(x) @ curve, 0, 255)
        different[:, :, channel] = np.where(inside, y - predicted, 0)
    return different


def _unclipped(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.minimum(x, y) > 5) & (np.maximum(x, y) < 250)


def _largest_mean(values: np.ndarray, side: int) -> float:
    """The largest absolute mean over side x side pixels."""
    return float(np.abs(cv2.blur(values, (side, side), borderType=cv2.BORDER_REFLECT)).max())


def _powers(grey: np.ndarray) -> np.ndarray:
    """1, v and v squared, where v is the grey value, centred and scaled."""
    v = grey.astype(np.float64) / 128 - 1
    return np.stack([np.ones_like(v), v, v * v], axis=-1)


def _chroma(picture: np.ndarray) -> np.ndarray:
    values = np.clip(picture, 0, 255).astype(np.uint8)
    return cv2.cvtColor(values, cv2.COLOR_RGB2YCrCb)[:, :, 1:].astype(np.float32) - 128
