"""Hashes of one image: of its pixels, and of how it looks.

Two images are the same when their decoded pixels hash to the same value, and nearly the same when few of 128 bits differ: the
signs of the 128 lowest frequencies (without the constant one) of the discrete cosine transform of the image, in grey, squashed
to 32x32 by area averaging. Everything is compared at 32x32, so a CIFAR or SVHN image is compared at its own resolution. The
bits of a mirrored image are known: those of odd horizontal frequency are inverted.
"""

import hashlib
from typing import NamedTuple

import cv2
import numpy as np

SIDE, BITS, BANDS = 32, 128, 8
_CORNERS = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5)]
_THIRDS, _QUARTERS = (0.0, 1 / 3, 2 / 3, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)
# Crops hashed beside the whole image, which is view 0: (part of each side, position as a part of the rest: y, x)
CROPS = [(0.95, y, x) for y, x in _CORNERS] + [(0.9, y, x) for y in _THIRDS for x in _THIRDS]
CROPS += [(0.8, y, x) for y in _QUARTERS for x in _QUARTERS]
VIEWS = 1 + len(CROPS)
# Frequencies by rising order (diagonals of the transform), without the constant one.
_V, _U = np.divmod(np.arange(SIDE * SIDE), SIDE)
_ORDER = np.lexsort((_U, _U + _V))[1 : BITS + 1]
MIRROR = np.packbits(_U[_ORDER] % 2 == 1).view(np.uint64)
"""The bits that differ between an image and its mirror image: (2,) uint64."""
FLAT = 2.0  # standard deviation (of 255) below which an image has no structure to compare: only exact copies match

ROW = np.dtype([("key", "u8"), ("exact", "u8"), ("bits", "u8", 2), ("flat", "?"), ("split", "i4")])
"""One hashed row of a dataset. `split` is a position in the plan's splits; `flat` rows take no part in near matching."""


class Hashes(NamedTuple):
    """Of one image: 64 bits of its pixels, and (views, 2) uint64 of its look, which means nothing when it is `flat`."""

    exact: int
    bits: np.ndarray
    flat: bool


def hash_image(pixels_HWC: np.ndarray, crops: bool = False) -> Hashes:
    """The hashes of an upright RGB image; with `crops`, of its CROPS too (views 1 and later)."""
    pixels = np.ascontiguousarray(pixels_HWC)
    exact = hashlib.sha256(pixels.data)
    exact.update(repr(pixels.shape).encode())
    height, width = min(160, pixels.shape[0]), min(160, pixels.shape[1])
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    boxes = [(0, 0, height, width)]
    if crops:
        for side, y, x in CROPS:
            h, w = max(1, round(height * side)), max(1, round(width * side))
            boxes.append((round(y * (height - h)), round(x * (width - w)), h, w))
    bits = np.empty((len(boxes), BITS), bool)
    flat = False
    for i, (y, x, h, w) in enumerate(boxes):
        square = cv2.resize(grey[y : y + h, x : x + w], (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        if i == 0:
            flat = float(square.std()) < FLAT
        bits[i] = cv2.dct(square).ravel()[_ORDER] > 0
    value = int.from_bytes(exact.digest()[:8], "little")
    return Hashes(value, np.packbits(bits, axis=1).view(np.uint64), flat)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits that differ, over the last axis of two uint64."""
    return np.bitwise_count(a ^ b).sum(-1).astype(np.int64)
