"""Generates test images and image files."""

import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """A smooth image, which JPEG hardly changes: uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def photo(height: int = 120, width: int = 160, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges and noise: uint8 (H, W, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 60)
    return np.clip(image.astype(int) + generator.integers(-6, 7, image.shape), 0, 255).astype(np.uint8)


def textured(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """A picture with structure at every scale, as in photographs (amplitude falls with frequency): uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.normal(0, 1, (n, n + 1, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        * (40 / n**0.5)
        for n in (2, 4, 8, 16, 32, 64)
    ]
    return np.clip(128 + sum(layers), 0, 255).astype(np.uint8)


def crop(pixels: np.ndarray, side: float = 0.9, y: float = 0.5, x: float = 0.5) -> np.ndarray:
    """A crop with `side` of both sides, at a relative position in the remaining space."""
    height, width = (round(side * n) for n in pixels.shape[:2])
    top, left = round(y * (pixels.shape[0] - height)), round(x * (pixels.shape[1] - width))
    return pixels[top : top + height, left : left + width]


def tinted(
    generator: np.random.Generator, height: int, width: int, channel: int, *, noise: int = 90, tint: int = 150
) -> np.ndarray:
    """Noise below `noise` with one channel brighter by `tint`, which a tiny model learns within steps: uint8 (H, W, 3)."""
    pixels = generator.integers(0, noise, (height, width, 3), dtype=np.uint8)
    pixels[:, :, channel] += np.uint8(tint)
    return pixels


def jpeg(seed: int = 0, height: int = 40, width: int = 60, quality: int = 95) -> bytes:
    """`picture` as a JPEG file, colours at full resolution."""
    return simplejpeg.encode_jpeg(picture(height, width, seed), quality, "RGB", "444")


def encoded(image: np.ndarray | Image.Image, format: str, **options) -> bytes:
    """An image file of a format that Pillow writes."""
    sink = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(sink, format, **options)
    return sink.getvalue()
