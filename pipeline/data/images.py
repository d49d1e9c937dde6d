"""Converts decoded images to the stored encoding: a resized JPEG, or a matrix of patches."""

from typing import Literal

import cv2
import numpy as np
import simplejpeg

from pipeline.data.codecs import Picture
from pipeline.data.patches import patchify
from pipeline.data.scratch import scratch

Fit = Literal["crop", "squash"]


def shrink(pixels_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes with area averaging (no aliasing) for shrinking and bicubic interpolation for enlarging. The result is valid
    until this thread resizes the next image."""
    smaller = width <= pixels_HWC.shape[1] and height <= pixels_HWC.shape[0]
    resized = scratch("shrink", (height, width, *pixels_HWC.shape[2:]))
    return cv2.resize(
        pixels_HWC, (width, height), resized, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    )


def as_jpeg(picture: Picture, data: bytes, size: int, quality: int, lossless: bool = True) -> tuple[bytes, np.ndarray]:
    """The bytes to store for encoding `jpeg`, and their pixels before compression.

    The shorter side becomes `size`. A smaller image is stored unchanged if it is intact; with `lossless`, images in
    lossless formats (palette, BMP, GIF) are stored as PNG."""
    pixels = picture.pixels
    height, width = pixels.shape[:2]
    if min(height, width) > size:
        scale = size / min(height, width)
        pixels = shrink(pixels, max(size, round(width * scale)), max(size, round(height * scale)))
    elif picture.intact:
        return data, pixels
    elif lossless and picture.lossless:
        return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes(), pixels
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420"), pixels


def as_patches(picture: Picture, size: int, patch_size: int, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """The (N, P*P*3) matrix to store for encoding `patches`, and its pixels.

    `crop` resizes the shorter side to `size` and takes the centre, `squash` resizes both sides to `size`.
    """
    pixels = picture.pixels
    height, width = pixels.shape[:2]
    if fit == "crop" and height != width:
        scale = size / min(height, width)
        pixels = shrink(pixels, max(size, round(width * scale)), max(size, round(height * scale)))
        top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        pixels = np.ascontiguousarray(pixels[top : top + size, left : left + size])
    elif (height, width) != (size, size):
        pixels = shrink(pixels, size, size)
    return patchify(pixels, patch_size), pixels
