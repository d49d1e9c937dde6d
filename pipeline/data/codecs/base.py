"""What a codec is, and the codec of any format that Pillow reads.

A codec decodes in two ways. `decode` is for `prepare`: stricter than a loader has to be, because what it lets through is
stored for good, and it gives the picture as a viewer shows it (upright, over white). `decode_stored` is for the loader: fast,
the pixels as they are stored, as TensorFlow's decoders give them.
"""

import io
import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_ASPECT = 100  # a sliver is no photograph, and resizing its shorter side would make gigabytes
ORIENTATION = 0x0112  # EXIF tag


class Refused(Exception):
    """An input that cannot become a row. `reason` is one of a small fixed set, to be counted; `detail` is free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BadImage(ValueError):
    """Bytes that are not an image, are damaged, or decode to too many pixels."""


class Picture(NamedTuple):
    """A decoded image: `pixels` uint8 RGB (H, W, 3), upright, valid until this thread decodes the next. `intact` says that
    the file itself shows the same pixels to any reader (a storable format, grey or RGB, no rotation), so it may be stored.
    `lossless` says that the file's format loses nothing, so that JPEG would be the first to change its pixels."""

    pixels: np.ndarray
    intact: bool
    lossless: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """One format of image files, read by the plugin of Pillow that has its name. A faster decoder is a subclass."""

    name: str
    """Pillow's name of the format."""
    extensions: tuple[str, ...] = ()
    """Ends of file names, in lower case, without the dot."""
    signature: bytes = rb"(?!)"
    """Regular expression of a file's first bytes. A file that matches and does not decode is damaged; a file that matches no
    codec and does not decode was never an image."""
    storable: bool = False
    """Whether `prepare` stores a file as it came when no pixel has to change: the format must be one that every reader has."""

    lossless: bool = False
    """Whether the format keeps every pixel as it was."""

    def open(self, data: bytes | memoryview) -> Image.Image:
        """The image with its header read and no pixel decoded. Raises whatever Pillow's plugin raises over damaged files."""
        return open_with_pillow(data, [self.name])

    def decode(self, data: bytes, max_pixels: int, max_aspect: float = MAX_ASPECT) -> Picture:
        """The first frame as a viewer shows it. `max_aspect` limits the longer side, in shorter sides.

        Palettes, greyscale and CMYK are converted; 16-bit grey keeps its upper 8 bits; alpha is laid over white; EXIF
        orientation is applied. Raises Refused: not an image, truncated, corrupt, too many pixels, unsupported pixels.
        """
        try:
            with self.open(data) as image:
                check_size(image.width, image.height, max_pixels, max_aspect)
                image.load()
                orientation = orientation_of(image)
                opaque = image.mode in ("L", "RGB") and "transparency" not in image.info
                still = not getattr(image, "is_animated", False)
                intact = self.storable and image.format == self.name and opaque and still and orientation == 1
                lossless = self.lossless and image.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp")
                return Picture(upright(_rgb(image), orientation), intact, lossless)
        except Refused:
            raise
        except Image.DecompressionBombError as error:  # a tile or frame beyond Pillow's own limit
            raise Refused("too many pixels", str(error)) from error
        except Exception as error:  # Pillow's plugins raise anything at all over damaged files
            if "truncated" in str(error):
                raise Refused("truncated", str(error)) from error
            # without the address in memory, the only thing that two runs would not share
            detail = f"{type(error).__name__}: {re.sub(r' at 0x[0-9a-f]+', '', str(error))}"
            raise Refused("corrupt" if self.recognizes(data) else "not an image", detail) from error

    def decode_stored(self, data: bytes | memoryview, max_pixels: int) -> np.ndarray:
        """The first frame as stored: uint8 RGB (H, W, 3), valid until this thread decodes the next.

        Alpha is dropped, palettes and greyscale are expanded, 16 bits become 8, CMYK is converted, and orientation tags
        are ignored. Raises BadImage.
        """
        try:
            with self.open(data) as image:
                if image.width * image.height > max_pixels:
                    raise BadImage(f"{image.width}x{image.height} is more than {max_pixels} pixels")
                image.load()
                if image.mode.startswith("I"):
                    return _upper_bits(image)
                return np.array(image.convert("RGB"))
        except BadImage:
            raise
        except Exception as error:  # Pillow's plugins raise anything at all over damaged files
            raise BadImage(f"not a readable image ({error})") from error

    def recognizes(self, data: bytes | memoryview) -> bool:
        """Whether a file begins as this format does."""
        return re.match(self.signature, data, re.DOTALL) is not None


class AnyOther(Codec):
    """What else Pillow reads: TGA, PCX, ICO and many more, found by trying its plugins."""

    # EPS and WMF run an interpreter over the file's contents; the video and science containers only ever raise.
    EXCLUDED = frozenset({"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"})

    def open(self, data: bytes | memoryview) -> Image.Image:
        Image.init()
        return open_with_pillow(data, sorted(set(Image.OPEN) - self.EXCLUDED))


def open_with_pillow(data: bytes | memoryview, names: list[str]) -> Image.Image:
    """Pillow's `Image.open` for the plugins called `names`, without its limit on pixels, which can be changed for a whole
    process only: codecs have a limit of their own and check it against the header, before any pixel is decoded."""
    Image.init()  # loads all plugins, once
    file = io.BytesIO(data)
    for name in names:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(bytes(data[:16])) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # not this format after all
                continue
    raise UnidentifiedImageError("cannot identify image file")


def check_size(width: int, height: int, max_pixels: int, max_aspect: float = MAX_ASPECT) -> None:
    """Raises Refused for an image that is empty, too large or too narrow."""
    if width * height > max_pixels:
        raise Refused("too many pixels", f"{width}x{height}, the limit is {max_pixels}")
    if not width or not height:
        raise Refused("empty", f"{width}x{height}")
    if max(width, height) > max_aspect * min(width, height):
        raise Refused("too narrow", f"{width}x{height}, the limit is {max_aspect:g}:1")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where the EXIF block cannot be read, since damaged tags lose no pixels."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return value if isinstance(value, int) else 1  # text is not what the standard has there
    except Exception:  # Pillow's parser raises anything at all over damaged tags
        return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
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


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise Refused("unsupported pixels", "floating point without a stated range")
    if image.mode.startswith("I"):
        return _upper_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _upper_bits(image: Image.Image) -> np.ndarray:
    """The upper 8 bits of 16-bit grey as RGB; Pillow's own conversion would clip at 255."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
