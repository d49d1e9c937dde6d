"""Hashes of an image: a hash of its pixels, and perceptual hashes of its views.

Two images are equal if their decoded pixels have the same hash. Two images may be near duplicates if they have similar
views. The views of an image are the whole image and squares around SIFT keypoints (Lowe, "Distinctive image features
from scale-invariant keypoints", 2004). The squares move with the content when an image is cropped, resized or mirrored,
so two versions of a photograph have similar views wherever they overlap.

The hash of a view has 128 bits: the signs of the lowest frequencies, without the constant one, of the discrete cosine
transform of the view in grey at 32x32. In a mirrored view the bits of odd horizontal frequencies are inverted."""

import hashlib
import io
import itertools
import math
from typing import Any, NamedTuple

import cv2
import numpy as np

SIDE, BITS, BANDS = 32, 128, 8
LOW = 16  # the bits come from the lowest 16x16 frequencies
SHORT_SIDE, MAX_ASPECT = 96, 4  # image size for the keypoint detector
SQUARES = 32  # maximum number of squares per image; the strongest keypoints come first
MIN_SQUARE, MAX_SQUARE = 0.24, 0.9  # side of a square, as a fraction of the shorter side of the image
SAME = 0.1  # keypoints of similar size within this fraction of half the side share one square
SQUARE_OF_KEYPOINT = 10.0  # side of the square, in diameters of the keypoint
FLAT, FLAT_SQUARE = (
    2.0,
    4.0,
)  # minimum standard deviation (of 255) of an image, and of a square, to be hashed
# Frequencies in ascending order (by diagonals of the transform), without the constant one.
_V, _U = np.divmod(np.arange(LOW * LOW), LOW)
_ORDER = np.lexsort((_U, _U + _V))[1 : BITS + 1]
_ODD = _U[_ORDER] % 2 == 1
MIRROR = np.packbits(_ODD).view(np.uint64)
"""The bits that differ between a view and its mirror image: (2,) uint64."""
_COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5)).astype(np.float32)
# Similar views agree in some of their eight bands of 16 bits. The whole image, the only view that every resize
# preserves, is joined on every pair of bands; a square is joined on two pairs, since an image has many squares.
WHOLE_KEYS = list(itertools.combinations(range(BANDS), 2))
SQUARE_KEYS = [(0, 1), (2, 3)]

keypoints: Any = cv2.SIFT_create  # type: ignore[attr-defined]  # missing in OpenCV's type stubs

ROW = np.dtype([("key", "u8"), ("exact", "u8"), ("split", "i4")])
"""One hashed row of a dataset. `split` is the index of the split in the plan."""
VIEW = np.dtype([("image", "i4"), ("bits", "u8", 2), ("box", "f2", 4), ("whole", "?")])
"""One view. `image` is the row; `box` is (left, top, width, height) as fractions of the image's width and height."""


class Hashes(NamedTuple):
    """The hashes of one image: 64 bits for its pixels, and its views (dtype VIEW); a uniform image has no views."""

    exact: int
    views: np.ndarray


def hash_image(pixels_HWC: np.ndarray, views: bool = True) -> Hashes:
    """The hashes of an upright RGB image. views: whether to compute the views as well as the pixel hash."""
    pixels = np.ascontiguousarray(pixels_HWC)
    exact = hashlib.sha256(pixels.data)
    exact.update(repr(pixels.shape).encode())
    value = int.from_bytes(exact.digest()[:8], "little")
    return Hashes(value, find_views(pixels) if views else np.empty(0, VIEW))


def find_views(pixels_HWC: np.ndarray) -> np.ndarray:
    """The views of an RGB image: the whole image, then squares around its keypoints. A uniform image has no views."""
    height, width = pixels_HWC.shape[:2]
    size = min(160, width), min(160, height)
    small = cv2.cvtColor(cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    whole = cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    if float(whole.std()) < FLAT:
        return np.empty(0, VIEW)
    squares, boxes = _squares(_grey(pixels_HWC))
    views = np.zeros(1 + len(squares), VIEW)
    views["bits"] = _bits(np.stack([whole.astype(np.float32), *squares]))
    views["box"] = [(0, 0, 1, 1), *boxes]
    views["whole"][0] = True
    return views


def _grey(pixels_HWC: np.ndarray) -> np.ndarray:
    """The image in grey, with a shorter side of SHORT_SIDE and a longer side of at most MAX_ASPECT * SHORT_SIDE."""
    height, width = pixels_HWC.shape[:2]
    scale = min(SHORT_SIDE / min(height, width), SHORT_SIDE * MAX_ASPECT / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)


def _squares(grey: np.ndarray) -> tuple[list[np.ndarray], list[tuple[float, float, float, float]]]:
    """(squares of SIDE x SIDE, boxes) around the strongest keypoints, without near-identical squares."""
    height, width = grey.shape
    points = keypoints(0, 3, 0.01, 10, 1.6, True).detect(grey)
    if not points:
        return [], []
    table = np.array([(-p.response, *p.pt, p.size * SQUARE_OF_KEYPOINT / 2) for p in points])
    _, x, y, r = table[np.lexsort(table.T[::-1])].T
    least, most = (part * min(height, width) / 2 for part in (MIN_SQUARE, MAX_SQUARE))
    good = (r >= least) & (r <= most) & (x >= r) & (y >= r) & (x + r <= width) & (y + r <= height)
    x, y, r = x[good], y[good], r[good]
    levels = [grey, cv2.pyrDown(grey)]
    squares: list[np.ndarray] = []
    chosen: list[int] = []
    for i in range(len(x)):
        if chosen:
            near = np.hypot(x[chosen] - x[i], y[chosen] - y[i]) < SAME * r[i]
            if (near & (np.abs(np.log(r[chosen] / r[i])) < 0.15)).any():
                continue
        level = int(r[i] > SIDE * 0.75)  # larger squares come from the image at half size, to reduce aliasing
        step = 2 * r[i] / SIDE / 2**level
        left, top = ((c - r[i]) / 2**level + 0.5 * step for c in (x[i], y[i]))
        square = cv2.warpAffine(
            levels[level],
            np.array([[step, 0, left], [0, step, top]]),
            (SIDE, SIDE),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        if float(square.std()) < FLAT_SQUARE:
            continue
        chosen.append(i)
        squares.append(square.astype(np.float32))
        if len(chosen) == SQUARES:
            break
    boxes = [
        ((x[i] - r[i] + 0.5) / width, (y[i] - r[i] + 0.5) / height, 2 * r[i] / width, 2 * r[i] / height) for i in chosen
    ]
    return squares, boxes


def _bits(squares: np.ndarray) -> np.ndarray:
    """The hashes of grey squares: (n, SIDE, SIDE) -> (n, 2) uint64."""
    low = _COSINES @ squares @ _COSINES.T
    signs = low.reshape(len(squares), -1)[:, _ORDER] > 0
    return np.ascontiguousarray(np.packbits(signs, axis=1)).view(np.uint64)


def join_keys(views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions in `views`, uint64 keys). Similar views, mirrored or not, are likely to have a key in common."""
    bands = np.ascontiguousarray(views["bits"]).view(np.uint16).reshape(-1, BANDS).astype(np.uint64)
    mirror = MIRROR.view(np.uint16).astype(np.uint64)
    places, keys = [], []
    for whole, pairs in ((True, WHOLE_KEYS), (False, SQUARE_KEYS)):
        which = np.flatnonzero(views["whole"] == whole)
        for i, j in pairs:
            # a view and its mirror image have the same two keys, of which the smaller is used
            plain = bands[which, i] | bands[which, j] << np.uint64(16)
            mirrored = (bands[which, i] ^ mirror[i]) | (bands[which, j] ^ mirror[j]) << np.uint64(16)
            kind = np.uint64((1 + i * BANDS + j + 64 * whole) << 32)
            places.append(which)
            # distribute over all 64 bits, so that buckets by remainder have equal sizes
            keys.append((np.minimum(plain, mirrored) | kind) * np.uint64(0x9E3779B97F4A7C15))
    return np.concatenate(places), np.concatenate(keys)


def compare_bits(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of different bits, whether mirroring one of the two reduces it), over
    the last axis of two uint64 words."""
    plain, mirrored = hamming(a, b), hamming(a ^ MIRROR, b)
    return np.minimum(plain, mirrored), mirrored < plain


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamming distance over the last axis of two uint64 words."""
    return np.bitwise_count(a ^ b).sum(-1).astype(np.int64)


def alignment(first: np.ndarray, second: np.ndarray, mirrored: bool) -> np.ndarray:
    """The affine map (2x3) from the unit square of the second image to that of the first that aligns two boxes.

    With `mirrored`, the first image is flipped from left to right before.
    """
    left, top, width, height = (float(v) for v in first)
    if mirrored:
        left = 1 - left - width
    x, y = width / float(second[2]), height / float(second[3])
    return np.array([[x, 0, left - float(second[0]) * x], [0, y, top - float(second[1]) * y]], np.float64)


def scale_of(map_23: np.ndarray) -> float:
    """The scale of an affine map: the square root of its determinant."""
    return math.sqrt(abs(map_23[0, 0] * map_23[1, 1] - map_23[0, 1] * map_23[1, 0]))


def pack_hashes(rows: np.ndarray, views: np.ndarray) -> bytes:
    """Serialises rows (dtype ROW) and their views (VIEW)."""
    sink = io.BytesIO()
    np.save(sink, rows)
    np.save(sink, views)
    return sink.getvalue()


def unpack_hashes(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(rows, views) from the output of `pack_hashes`."""
    source = io.BytesIO(data)
    return np.load(source), np.load(source)
