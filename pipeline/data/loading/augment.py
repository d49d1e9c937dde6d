"""Decoded images -> the uint8 pixels that a model trains on: the augmentations of the paper's recipes.

Everything is uint8, height x width x RGB, and runs outside Python's interpreter lock (OpenCV), so threads scale.
One filter everywhere: bilinear with half-pixel centres and no antialiasing, what the paper's code and big_vision's inception
crop use; `filter="area"` averages where an image shrinks and stays bilinear where it grows.

Randomness comes in as numbers: `Augment.apply` takes a vector of uniform draws and is otherwise a pure function.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from pipeline.data.scratch import scratch
from pipeline.errors import UserError, nearest

GREY = 128  # what geometric operations and cutout fill with

# ---------------------------------------------------------------- the recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """How one image becomes `size` x `size` x 3. The same object serves training and evaluation.

    crop  inception   a box of `area` of the image and `aspect` width/height, resized to `size` (the paper, B.1)
          random      a `size` box anywhere, after `resize`
          center      the central `size` box, after `resize`
          squash      the whole image resized to `size`, aspect ratio lost (the paper's test preprocessing)
    resize      for random and center: the shorter side first becomes this many pixels; with squash=True both sides do.
                None leaves an image as it is, but one smaller than `size` grows until its shorter side fits.
    flip        left-right with probability one half
    randaug_*   RandAugment: so many operations per image, at this magnitude (10 is big_vision's full scale)
    mixup       p of Beta(p, p); the loader blends pairs, 0 is off
    """

    size: int = 224
    """Side of the output, in pixels."""
    crop: Literal["inception", "random", "center", "squash"] = "inception"
    """How a square is cut from the image: inception (a random box, resized), random, center, or squash (the whole
    image, aspect ratio lost)."""
    resize: int | None = None
    """Shorter side, in pixels, before a random or center crop. None: the image's own size."""
    squash: bool = False
    """Let --resize set both sides, so that the aspect ratio is lost."""
    area: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest share of the image's area, 0 to 1, of an inception crop."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of an inception crop."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    randaug_layers: int = 0
    """RandAugment: number of operations per image. 0: off."""
    randaug_magnitude: int = 0
    """RandAugment: strength of the operations, 0 to 30; 10 is big_vision's full scale."""
    mixup: float = 0.0
    """Mixup: parameter p of Beta(p, p), from which the blend of two images is drawn. 0: off."""
    filter: Literal["linear", "area"] = "linear"
    """Resize filter: bilinear without antialiasing (the paper), or area averaging where an image shrinks."""

    def __post_init__(self) -> None:
        crops = ("inception", "random", "center", "squash")
        if self.crop not in crops:
            raise UserError(f"crop {self.crop!r} is not one of {', '.join(crops)}{nearest(self.crop, crops)}")
        if self.filter not in ("linear", "area"):
            raise UserError(f"filter {self.filter!r} is not linear or area")
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise UserError(f"size {self.size} must be at least 1 and resize {self.resize} at least size")
        if self.squash and (self.resize is None or self.crop not in ("random", "center")):
            raise UserError("squash=True goes with resize and crop random or center; crop=squash needs neither")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(f"area {self.area} must lie in (0, 1] and aspect {self.aspect} above 0, both (low, high)")
        if not 0 <= self.randaug_magnitude <= 30 or self.randaug_layers < 0 or self.mixup < 0:
            raise UserError("randaug_layers and mixup must be at least 0, randaug_magnitude in 0..30")

    @property
    def deterministic(self) -> bool:
        return self.crop in ("center", "squash")

    @property
    def draws(self) -> int:
        """Uniform numbers that `apply` needs per image."""
        return 5 + 4 * self.randaug_layers

    def apply(self, image_HWC: np.ndarray, u: Sequence[float], out: np.ndarray, train: bool = True) -> None:
        """Writes the augmented image into `out`, uint8 (size, size, 3), contiguous. `u`: `draws` numbers in [0, 1).

        With train=False there is no flip and no RandAugment.
        """
        flip = train and self.flip and u[4] < 0.5
        target = scratch("flip", out.shape) if flip else out
        self._crop(image_HWC, u, target)
        if flip:
            cv2.flip(target, 1, dst=out)
        if train:
            for layer in range(self.randaug_layers):
                rand_augment(out, u[5 + 4 * layer : 9 + 4 * layer], self.randaug_magnitude)

    def _crop(self, image: np.ndarray, u: Sequence[float], out: np.ndarray) -> None:
        height, width = image.shape[:2]
        if self.crop == "inception":
            top, left, h, w = inception_box(height, width, self.area, self.aspect, u)
            self._resize(image[top : top + h, left : left + w], out)
        elif self.crop == "squash":
            self._resize(image, out)
        else:
            image = self._resized(image)
            height, width = image.shape[:2]
            # whole pixels, every corner equally likely; the centre as big_vision's central_crop has it
            v = u[2:4] if self.crop == "random" else None
            top = int(v[0] * (height - self.size + 1)) if v is not None else (height - self.size) // 2
            left = int(v[1] * (width - self.size + 1)) if v is not None else (width - self.size) // 2
            np.copyto(out, image[top : top + self.size, left : left + self.size])

    def _resized(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        short, long = min(height, width), max(height, width)
        if self.squash and self.resize:
            shape = (self.resize, self.resize)
        else:
            side = self.resize or max(short, self.size)
            if side == short:
                return image
            if long > 16 * short:  # a sliver: only its middle, or the resized image would not fit in memory
                cut = (long - 16 * short) // 2
                image = image[cut : long - cut] if height > width else image[:, cut : long - cut]
                height, width = image.shape[:2]
            shape = (max(side, round(height * side / short)), max(side, round(width * side / short)))
        out = scratch("resize", (*shape, 3))
        self._resize(image, out)
        return out

    def _resize(self, image: np.ndarray, out: np.ndarray) -> None:
        height, width = out.shape[:2]
        if image.shape == out.shape:
            np.copyto(out, image)
            return
        shrinks = self.filter == "area" and image.shape[0] >= height and image.shape[1] >= width
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        cv2.resize(image, (width, height), dst=out, interpolation=interpolation)


def inception_box(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], u: Sequence[float]
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) inside an image; four uniform draws, never a second try.

    The distribution of TensorFlow's sample_distorted_bounding_box without boxes, which the paper's code used: aspect uniform,
    then height uniform between those of the smallest and the largest area (as far as the image holds it), then the corner uniform.
    """
    ratio = aspect[0] + u[0] * (aspect[1] - aspect[0])
    low = round(math.sqrt(area[0] * height * width / ratio))
    high = min(round(math.sqrt(area[1] * height * width / ratio)), height, int((width + 0.5) / ratio))
    h = max(1, min(low, high) + int(u[1] * (max(high - low, 0) + 1)))
    w = max(1, min(round(h * ratio), width))
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w


# ---------------------------------------------------------------- RandAugment


def rand_augment(image: np.ndarray, u: Sequence[float], magnitude: float) -> None:
    """One operation of RandAugment (arXiv 1909.13719), in place: u[0] chooses it, u[1] its direction, u[2:4] a place.

    The sixteen operations and their scales are big_vision's; the meaning of each is Pillow's (in particular, Contrast blends
    with the mean grey level). Magnitude 10 is full scale; big_vision goes to 20, where some scales run backwards or past
    their range exactly as they do there.
    """
    operation = OPERATIONS[int(u[0] * len(OPERATIONS))]
    operation(image, magnitude / 10, -1.0 if u[1] < 0.5 else 1.0, u[2:4])


def _lookup(image: np.ndarray, table: np.ndarray) -> None:
    """Maps every pixel through a table of 256, or one per channel: (256, 3)."""
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
    for edge in (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]):  # a border pixel has no full neighbourhood
        smooth[edge] = image[edge]
    _blend(image, smooth, level)


def _affine(image: np.ndarray, inverse: np.ndarray) -> None:
    """Nearest-neighbour warp; `inverse` (2, 3) takes output coordinates to input ones, pixel centres at k + 1/2."""
    matrix = np.array(inverse, np.float64)
    matrix[:, 2] += matrix[:, :2].sum(axis=1) * 0.5 - 0.5  # to OpenCV's centres at k
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
)  # the order is part of what a seed means
