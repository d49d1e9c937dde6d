"""One image file -> checked RGB pixels -> the form it is stored in. Every way in which a file can be bad has a reason.

`decode` is stricter than a loader has to be, because what it lets through is stored for good: a JPEG must reach its end
marker, and every pixel is decoded even when the file is then kept as it is.
"""

import io
import re
import struct
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.data.loading.augment import scratch
from pipeline.data.loading.patches import patchify

Image.init()
# EPS and WMF run an interpreter over the file's contents; the video and science containers only ever raise.
FORMATS = sorted(set(Image.OPEN) - {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"})

# First bytes of common formats: what begins like an image and does not open is damaged, the rest never was one.
MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"\0\0\0\x0cjP")
PNG = b"\x89PNG\r\n\x1a\n"
MAX_ASPECT = 100  # a sliver is no photograph, and resizing its shorter side would make gigabytes
ORIENTATION = 0x0112  # EXIF tag

Fit = Literal["crop", "squash"]


class Refused(Exception):
    """An input that cannot become a row. `reason` is one of a small fixed set, to be counted; `detail` is free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Picture(NamedTuple):
    """A decoded image: `pixels` uint8 RGB (H, W, 3), upright, valid until this thread decodes the next. `intact` says that
    the file itself shows the same pixels to any reader (JPEG or PNG, grey or RGB, no rotation), so it may be stored."""

    pixels: np.ndarray
    intact: bool


def is_image_data(data: bytes) -> bool:
    """Whether a file begins as the common image formats do."""
    return data.startswith(MAGIC)


def decode(data: bytes, max_pixels: int) -> Picture:
    """Decodes an image file of any format that Pillow reads, first frame of an animation.

    Palettes, greyscale and CMYK are converted; 16-bit grey keeps its upper 8 bits; alpha is laid over white; EXIF
    orientation is applied. Raises Refused: empty, not an image, truncated, corrupt, too many pixels, unsupported pixels.
    """
    if not data:
        raise Refused("empty")
    if data[:2] == b"\xff\xd8":
        try:
            return _decode_jpeg(data, max_pixels)
        except ValueError:
            pass  # an unusual but legal JPEG (odd subsampling, 12 bits), or not one: Pillow says which
    if data.startswith(PNG) and b"IEND\xaeB`\x82" not in data:  # Pillow stops at the last pixel
        raise Refused("truncated", "no end marker") if len(data) > len(PNG) else Refused("corrupt", "only a signature")
    return _decode_any(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> Picture:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return _decode_any(data, max_pixels)  # Pillow knows Adobe's inverted inks
    buffer = scratch("prepare", (height, width, 3))
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    except ValueError as error:
        message = str(error)
        # libjpeg fills what is missing with grey and only warns: without an end marker the file is cut short.
        if "Premature end of JPEG file" in message:
            raise Refused("truncated", message) from error
        if "extraneous bytes" not in message:  # stray bytes between markers lose nothing; every other warning does
            raise Refused("corrupt", message) from error
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=False)
    orientation = 1
    if b"Exif\0\0" in data or b"tiff:Orientation" in data:  # anywhere before the image: profiles may come first
        orientation = _orientation(data)
    return Picture(_upright(pixels, orientation), orientation == 1)


def _orientation(data: bytes) -> int:
    try:
        return _orientation_of(Image.open(io.BytesIO(data), formats=["JPEG", "MPO"]))
    except Exception:  # Pillow's parser on a damaged tag block: a picture without orientation
        return 1


def _orientation_of(image: Image.Image) -> int:
    """1 (upright) where the EXIF block cannot be read: damaged tags lose no pixels."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return value if isinstance(value, int) else 1  # text is not what the standard has there
    except Exception:  # Pillow's parser raises anything at all over damaged tags
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF orientations 2-8 as flips and quarter turns."""
    if orientation in (2, 3, 4, 5, 6, 7, 8):
        if orientation >= 5:
            pixels = pixels.transpose(1, 0, 2)
        if orientation in (2, 3, 6, 7):
            pixels = pixels[:, ::-1]
        if orientation in (3, 4, 7, 8):
            pixels = pixels[::-1]
        pixels = np.ascontiguousarray(pixels)
    return pixels


def _decode_any(data: bytes, max_pixels: int) -> Picture:
    try:
        with open_image(data) as image:
            _check_size(image.width, image.height, max_pixels)
            image.load()
            orientation = _orientation_of(image)
            opaque = image.mode in ("L", "RGB") and "transparency" not in image.info
            still = not getattr(image, "is_animated", False)
            intact = image.format in ("JPEG", "PNG") and opaque and still and orientation == 1
            return Picture(_upright(_rgb(image), orientation), intact)
    except Refused:
        raise
    except Image.DecompressionBombError as error:  # a tile or frame beyond Pillow's own limit
        raise Refused("too many pixels", str(error)) from error
    except Exception as error:  # Pillow's plugins raise anything at all over damaged files
        if "truncated" in str(error):
            raise Refused("truncated", str(error)) from error
        known = data.startswith(MAGIC)
        detail = re.sub(
            r" at 0x[0-9a-f]+", "", str(error)
        )  # an address in memory: the only thing that two runs would not share
        raise Refused("corrupt" if known else "not an image", f"{type(error).__name__}: {detail}") from error


def open_image(data: bytes) -> Image.Image:
    """Pillow's `Image.open` without its limit on pixels, which can be changed for a whole process only: `decode` has a limit of
    its own and checks it against the header, before any pixel is decoded."""
    file = io.BytesIO(data)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # not this format after all
                continue
    raise UnidentifiedImageError("cannot identify image file")


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise Refused("unsupported pixels", "floating point without a stated range")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Refused("too many pixels", f"{width}x{height}, the limit is {max_pixels}")
    if not width or not height:
        raise Refused("empty", f"{width}x{height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused("too narrow", f"{width}x{height}, the limit is {MAX_ASPECT}:1")


# ---------------------------------------------------------------- stored forms


def shrink(pixels_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes by area averaging (no aliasing) where it shrinks, bicubic where it enlarges."""
    smaller = width <= pixels_HWC.shape[1] and height <= pixels_HWC.shape[0]
    return cv2.resize(pixels_HWC, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def as_jpeg(picture: Picture, data: bytes, size: int, quality: int) -> tuple[bytes, np.ndarray]:
    """The bytes to store for encoding `jpeg`, and their pixels before compression.

    The shorter side becomes `size`; an image that is no larger is stored as it came when it is an intact JPEG or PNG.
    """
    pixels = picture.pixels
    height, width = pixels.shape[:2]
    if min(height, width) > size:
        scale = size / min(height, width)
        pixels = shrink(pixels, max(size, round(width * scale)), max(size, round(height * scale)))
    elif picture.intact:
        return data, pixels
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
