"""The second look: whether two pictures that hash alike show the same photograph.

A hash of 128 bits cannot tell photographs that are posed alike (aeroplanes side-on, motorbikes on white) from copies, so a match
of hashes only proposes a pair. Here its pixels decide: the two small pictures are aligned (crop, mirror, shift, a slight
rotation), and then compared in detail, block by block, and in colour. A copy agrees everywhere; two photographs of one pose
agree in outline and differ in detail.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

from pipeline.data.codecs import decode_stored
from pipeline.data.duplicates.hashes import CROPS

SIDE = 64  # pictures are compared at 64x64, or at 32x32 when either is smaller than 64
BLOCKS = 4  # blocks to a side
STEPS = 60  # of the alignment, at most
# Chosen on half of the photographs of docs/decontamination.md, and measured on the other half: the least correlation of detail,
# and that in the worst block but one. Pictures of 32x32 have less detail to differ in.
LEAST_DETAIL = {SIDE: 0.75, SIDE // 2: 0.8}
LEAST_WORST = {SIDE: 0.45, SIDE // 2: 0.5}
LEAST_OVERLAP, MOST_COLOUR = 0.6, 14.0


class Agreement(NamedTuple):
    """How far two aligned pictures agree, compared at `side` x `side`.

    overlap: part of the second picture that lies in the first. detail: correlation of the fine structure. worst: the same in
    the block that agrees least but one. colour: mean difference of chroma, of 255.
    """

    side: int
    overlap: float
    detail: float
    worst: float
    colour: float

    @property
    def same(self) -> bool:
        """Whether the two show the same photograph."""
        return (
            self.overlap >= LEAST_OVERLAP
            and self.detail >= LEAST_DETAIL[self.side]
            and self.worst >= LEAST_WORST[self.side]
            and self.colour <= MOST_COLOUR
        )


def small_copy(pixels_HWC: np.ndarray) -> bytes:
    """What is kept of an image for the second look and the contact sheet: a JPEG with the shorter side at 96 at most, or a
    PNG when it is smaller than 64."""
    height, width = pixels_HWC.shape[:2]
    scale = min(1.0, 96 / min(height, width), 384 / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA)[:, :, ::-1]
    if min(size) < 64:
        return cv2.imencode(".png", small)[1].tobytes()
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def compare_views(mine: bytes, other: bytes, view: int = 0, other_view: int = 0, mirrored: bool = False) -> Agreement:
    """Compares two small copies of which `view` of one looked like `other_view` of the other, mirrored or not.

    View 0 is the whole image, as in `hashes.hash_image`; one of the two views is 0.
    """
    first, second = decode_stored(other).copy(), decode_stored(mine).copy()
    if mirrored:
        first = np.ascontiguousarray(first[:, ::-1])
    if view:
        return compare_pictures(second, first, _start(view, False))
    return compare_pictures(first, second, _start(other_view, mirrored))


def _start(view: int, mirrored: bool) -> np.ndarray | None:
    """The map from the unit square to the box of a view, where the alignment begins."""
    if not view:
        return None
    side, y, x = CROPS[view - 1]
    x = 1 - x if mirrored else x
    return np.array([[side, 0, x * (1 - side)], [0, side, y * (1 - side)]], np.float32)


def compare_pictures(first: np.ndarray, second: np.ndarray, start: np.ndarray | None = None) -> Agreement:
    """Aligns `second` to `first` (RGB uint8, any size) and compares them.

    start: 2x3 affine map from the unit square of `second` to that of `first`, where the alignment begins; None: the same place.
    """
    side = SIDE if min(*first.shape[:2], *second.shape[:2]) >= SIDE else SIDE // 2
    a, b = (cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) for p in (first, second))
    warp: Any = np.array(np.eye(2, 3) if start is None else start, np.float32)
    warp[:, 2] = warp[:, 2] * side + (warp[:, :2].sum(1) - 1) * 0.5  # from the unit square to pixel centres
    grey_a, grey_b = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (a, b))
    everywhere = np.full((side, side), 255, np.uint8)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, STEPS, 1e-5)
    try:
        # `warp` maps places of b to places of a
        _, warp = cv2.findTransformECC(grey_b, grey_a, warp, cv2.MOTION_AFFINE, stop, everywhere, 3)
    except cv2.error:  # the search for an alignment diverges
        return Agreement(side, 0.0, 0.0, 0.0, 255.0)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    aligned: Any = cv2.warpAffine(a, warp, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.ones((side, side), np.float32), warp, (side, side), flags=flags) > 0.99
    overlap = float(inside.mean())
    if overlap < 0.3:
        return Agreement(side, overlap, 0.0, 0.0, 255.0)
    detail, worst = _structure(aligned, b, inside)
    return Agreement(side, overlap, detail, worst, _colour(aligned, b, inside))


def _structure(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    grey = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (a, b)]
    fine = [g - cv2.GaussianBlur(g, (0, 0), 2.5) for g in grey]
    clipped = (grey[0] > 250) | (grey[1] > 250) | (grey[0] < 5) | (grey[1] < 5)  # brightened pictures lose these places
    use = inside & ~cv2.dilate(clipped.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    if use.sum() < 0.15 * use.size:
        use = inside
    detail = _correlation(fine[0][use], fine[1][use])
    step = len(a) // BLOCKS
    blocks = []
    for y in range(0, len(a), step):
        for x in range(0, len(a), step):
            part = use[y : y + step, x : x + step]
            if part.mean() < 0.5:
                continue
            p, q = (f[y : y + step, x : x + step][part] for f in fine)
            if max(p.std(), q.std()) > 3.0:  # of 255: less is noise
                blocks.append(_correlation(p, q))
    return detail, sorted(blocks)[min(1, len(blocks) - 1)] if blocks else detail


def _correlation(p: np.ndarray, q: np.ndarray) -> float:
    p, q = p - p.mean(), q - q.mean()
    scale = float(np.sqrt((p * p).sum() * (q * q).sum()))
    return float((p * q).sum()) / scale if scale > 0 else 0.0


def _colour(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> float:
    """Mean difference of chroma; 0 when one of the two is grey."""
    chroma = [
        cv2.cvtColor(np.clip(p, 0, 255).astype(np.uint8), cv2.COLOR_RGB2YCrCb)[:, :, 1:].astype(np.float32)
        for p in (a, b)
    ]
    if min(float(np.abs(c - 128).mean()) for c in chroma) < 1.0:
        return 0.0
    return float(np.abs(chroma[0] - chroma[1])[inside].mean())
