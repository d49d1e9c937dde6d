"""Crops, resizes and augments decoded images, as the recipes of the paper do.

Images are uint8, height x width x RGB. OpenCV releases Python's interpreter lock, so threads scale. The resize filter
is bilinear with half-pixel centres and no antialiasing, as in the paper's code and in big_vision's inception crop;
`filter="area"` averages pixels when an image shrinks and is bilinear when it grows.

Random numbers are arguments: `augment_image` takes a vector of uniform draws and is otherwise a pure function.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from pipeline.data.loading.augment import Augment
from pipeline.data.loading.rand_augment import rand_augment
from pipeline.data.scratch import scratch


def augment_image(
    augment: Augment, image_HWC: np.ndarray, u: Sequence[float], out: np.ndarray, train: bool = True
) -> None:
    """Writes the augmented image to `out`, uint8 (size, size, 3), contiguous. u: `augment.draws` numbers in [0, 1).

    With train=False there is no flip and no RandAugment.
    """
    flip = train and augment.flip and u[4] < 0.5
    target = scratch("flip", out.shape) if flip else out
    _crop(augment, image_HWC, u, target)
    if flip:
        cv2.flip(target, 1, dst=out)
    if train:
        for layer in range(augment.randaug_layers):
            rand_augment(out, u[5 + 4 * layer : 9 + 4 * layer], augment.randaug_magnitude)


def _crop(augment: Augment, image: np.ndarray, u: Sequence[float], out: np.ndarray) -> None:
    height, width = image.shape[:2]
    if augment.crop == "inception":
        top, left, h, w = inception_box(height, width, augment.area, augment.aspect, u)
        _resize(augment, image[top : top + h, left : left + w], out)
    elif augment.crop == "squash":
        _resize(augment, image, out)
    else:
        image = _resized(augment, image)
        height, width = image.shape[:2]
        # whole pixels, uniform over positions; the centre is that of big_vision's central_crop
        v = u[2:4] if augment.crop == "random" else None
        top = int(v[0] * (height - augment.size + 1)) if v is not None else (height - augment.size) // 2
        left = int(v[1] * (width - augment.size + 1)) if v is not None else (width - augment.size) // 2
        np.copyto(out, image[top : top + augment.size, left : left + augment.size])


def _resized(augment: Augment, image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    if augment.squash and augment.resize:
        shape = (augment.resize, augment.resize)
    else:
        side = augment.resize or max(short, augment.size)
        if side == short:
            return image
        if long > 16 * short:  # a very long image: resize only its middle, to limit memory
            cut = (long - 16 * short) // 2
            image = image[cut : long - cut] if height > width else image[:, cut : long - cut]
            height, width = image.shape[:2]
        shape = (max(side, round(height * side / short)), max(side, round(width * side / short)))
    out = scratch("resize", (*shape, 3))
    _resize(augment, image, out)
    return out


def _resize(augment: Augment, image: np.ndarray, out: np.ndarray) -> None:
    height, width = out.shape[:2]
    if image.shape == out.shape:
        np.copyto(out, image)
        return
    shrinks = augment.filter == "area" and image.shape[0] >= height and image.shape[1] >= width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cv2.resize(image, (width, height), dst=out, interpolation=interpolation)


def inception_box(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], u: Sequence[float]
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) inside an image, from four uniform draws, without rejection.

    The distribution is that of TensorFlow's sample_distorted_bounding_box without boxes, which the paper's code used: a
    uniform aspect ratio, then a uniform height between those of the smallest and the largest area that fit, then a
    uniform position.
    """
    ratio = aspect[0] + u[0] * (aspect[1] - aspect[0])
    low = round(math.sqrt(area[0] * height * width / ratio))
    high = min(round(math.sqrt(area[1] * height * width / ratio)), height, int((width + 0.5) / ratio))
    h = max(1, min(low, high) + int(u[1] * (max(high - low, 0) + 1)))
    w = max(1, min(round(h * ratio), width))
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
