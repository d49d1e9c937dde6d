"""RandAugment (arXiv 1909.13719): the sixteen operations of big_vision on uint8 pixels, in place."""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from pipeline.data.scratch import scratch

GREY = 128  # fill value of geometric operations and cutout


def rand_augment(image: np.ndarray, u: Sequence[float], magnitude: float) -> None:
    """One operation of RandAugment (arXiv 1909.13719), in place: u[0] selects the operation, u[1] its sign, u[2:4] a
    position.

    The sixteen operations and their scales are big_vision's; their definitions are Pillow's (for example, Contrast
    blends with the mean grey level). Magnitude 10 is full scale. big_vision allows up to 20, where some scales reverse
    or exceed their range; this code does the same.
    """
    operation = OPERATIONS[int(u[0] * len(OPERATIONS))]
    operation(image, magnitude / 10, -1.0 if u[1] < 0.5 else 1.0, u[2:4])


def _lookup(image: np.ndarray, table: np.ndarray) -> None:
    """Maps every pixel through a table of 256 entries, or through one table per channel: (256, 3)."""
    cv2.LUT(image, np.ascontiguousarray(table.reshape(1, 256, -1), dtype=np.uint8), dst=image)


_LEVELS = np.arange(256)


def _auto_contrast(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    tables = []
    for channel in cv2.split(image):
        low, high, *_ = cv2.minMaxLoc(channel)
        tables.append(_LEVELS if high <= low else ((_LEVELS - low) * (255 / (high - low))).clip(0, 255))
    _lookup(image, np.stack(tables, axis=1))


def _equalize(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        before = np.cumsum(counts) - counts
        tables.append(_LEVELS if step == 0 else ((before + step // 2) // step).clip(0, 255))
    _lookup(image, np.stack(tables, axis=1))


def _invert(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    cv2.bitwise_not(image, dst=image)


def _posterize(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    keep = min(8, int(level * 4))
    _lookup(image, _LEVELS >> (8 - keep) << (8 - keep))


def _solarize(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _lookup(image, np.where(int(level * 256) > _LEVELS, _LEVELS, 255 - _LEVELS))


def _solarize_add(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _lookup(image, np.where(_LEVELS < 128, (_LEVELS + int(level * 110)).clip(0, 255), _LEVELS))


def _blend(image: np.ndarray, other: np.ndarray, level: float) -> None:
    """other + factor * (image - other): factor 0 is `other`, 1 the image, above 1 exaggerates."""
    factor = 1.8 * level + 0.1
    cv2.addWeighted(image, factor, other, 1 - factor, 0, dst=image)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _color(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _blend(image, cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), level)


def _contrast(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    mean, factor = round(cv2.mean(_grey(image))[0]), 1.8 * level + 0.1
    _lookup(image, (mean + factor * (_LEVELS - mean)).clip(0, 255))


def _brightness(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _lookup(image, ((1.8 * level + 0.1) * _LEVELS).clip(0, 255))


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _sharpness(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    for edge in (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]):  # border pixels have no complete neighbourhood
        smooth[edge] = image[edge]
    _blend(image, smooth, level)


def _affine(image: np.ndarray, inverse: np.ndarray) -> None:
    """Nearest-neighbour warp; `inverse` (2, 3) maps output to input coordinates, with pixel centres at k + 1/2."""
    matrix = np.array(inverse, np.float64)
    matrix[:, 2] += matrix[:, :2].sum(axis=1) * 0.5 - 0.5  # OpenCV has pixel centres at k
    height, width = image.shape[:2]
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    source = scratch("warp", image.shape)
    np.copyto(source, image)
    cv2.warpAffine(source, matrix, (width, height), dst=image, flags=flags, borderValue=(GREY, GREY, GREY))


def _rotate(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    angle = math.radians(30 * level * sign)
    cos, sin = math.cos(angle), math.sin(angle)
    y, x = image.shape[0] / 2, image.shape[1] / 2
    _affine(image, np.array([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]]))


def _shear_x(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _affine(image, np.array([[1, 0.3 * level * sign, 0], [0, 1, 0]]))


def _shear_y(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _affine(image, np.array([[1, 0, 0], [0.3 * level * sign, 1, 0]]))


def _translate_x(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _affine(image, np.array([[1, 0, 100 * level * sign], [0, 1, 0]]))


def _translate_y(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    _affine(image, np.array([[1, 0, 0], [0, 1, 100 * level * sign]]))


def _cutout(image: np.ndarray, level: float, sign: float, at: Sequence[float]) -> None:
    half, y, x = int(level * 40), int(at[0] * image.shape[0]), int(at[1] * image.shape[1])
    image[max(0, y - half) : y + half, max(0, x - half) : x + half] = GREY


Operation = Callable[[np.ndarray, float, float, Sequence[float]], None]
OPERATIONS: tuple[Operation, ...] = (
    *(_auto_contrast, _equalize, _invert, _rotate, _posterize, _solarize, _color, _contrast),
    *(_brightness, _sharpness, _shear_x, _shear_y, _translate_x, _translate_y, _cutout, _solarize_add),
)  # the order must not change, or a seed would give other images
