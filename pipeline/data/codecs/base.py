"""Base class of codecs, and the codec for all formats that Pillow reads.

A codec has two decode methods. `decode` is for `prepare`: it is strict, because its output is stored permanently, and
returns the image as a viewer shows it (EXIF rotation applied, alpha over white). `decode_stored` is for the loader: it
is fast and returns the stored pixels, like TensorFlow's decoders."""

import io
import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_ASPECT = 100  # resizing the shorter side of a very narrow image would need gigabytes
ORIENTATION = 0x0112  # EXIF tag


class Refused(Exception):
    """Raised for an input that is rejected. `reason` is from a small fixed set, for counting; `detail` is free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BadImage(ValueError):
    """Bytes that are not an image, are damaged, or decode to too many pixels."""


class Picture(NamedTuple):
    """A decoded image. `pixels`: uint8 RGB (H, W, 3), upright, valid until this thread decodes the next image.
    `intact`: the file can be stored unchanged, because any reader decodes it to the same pixels (storable format, grey
    or RGB, no rotation). `lossless`: the format of the file is lossless."""

    pixels: np.ndarray
    intact: bool
    lossless: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """An image format that is decoded by the Pillow plugin with its name. Subclasses implement faster decoders."""

    name: str
    """Name of the format in Pillow."""
    extensions: tuple[str, ...] = ()
    """File extensions, in lower case, without the dot."""
    signature: bytes = rb"(?!)"
    """Regular expression for the first bytes. A file that matches but cannot be decoded is damaged; a file that matches
    no codec and cannot be decoded is not an image."""
    storable: bool = False
    """Whether `prepare` may store a file unchanged, which requires a format that all readers support."""

    lossless: bool = False
    """Whether the format is lossless."""

    def open(self, data: bytes | memoryview) -> Image.Image:
        """Opens an image without decoding pixels. May raise any exception for damaged files."""
        return open_with_pillow(data, [self.name])

    def decode(self, data: bytes, max_pixels: int, max_aspect: float = MAX_ASPECT) -> Picture:
        """Decodes the first frame as a viewer shows it. max_aspect: maximum ratio of the longer to the shorter side.

        Palettes, greyscale and CMYK are converted; 16-bit grey keeps its upper 8 bits; alpha is composited over white;
        EXIF orientation is applied. Raises Refused: not an image, truncated, corrupt, too many pixels, unsupported
        pixels."""
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
        except Image.DecompressionBombError as error:  # a tile or frame above Pillow's limit
            raise Refused("too many pixels", str(error)) from error
        except Exception as error:  # Pillow's plugins raise arbitrary exceptions for damaged files
            if "truncated" in str(error):
                raise Refused("truncated", str(error)) from error
            if not self.recognizes(data):
                raise Refused("not an image") from error
            # Remove memory addresses, so that the message is the same in every run.
            detail = f"{type(error).__name__}: {re.sub(r' at 0x[0-9a-f]+', '', str(error))}"
            raise Refused("corrupt", detail) from error

    def decode_stored(self, data: bytes | memoryview, max_pixels: int) -> np.ndarray:
        """Decodes the first frame as stored: uint8 RGB (H, W, 3), valid until this thread decodes the next image.

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
        except Exception as error:  # Pillow's plugins raise arbitrary exceptions for damaged files
            raise BadImage(f"not a readable image ({error})") from error

    def recognizes(self, data: bytes | memoryview) -> bool:
        """Whether a file starts with the signature of this format."""
        return re.match(self.signature, data, re.DOTALL) is not None


class AnyOther(Codec):
    """Other formats that Pillow reads (TGA, PCX, ICO and more), by trying its plugins."""

    # EPS and WMF are excluded because they interpret the content; video and science containers always raise.
    EXCLUDED = frozenset({"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"})

    def open(self, data: bytes | memoryview) -> Image.Image:
        Image.init()
        return open_with_pillow(data, sorted(set(Image.OPEN) - self.EXCLUDED))


def open_with_pillow(data: bytes | memoryview, names: list[str]) -> Image.Image:
    """`Image.open` of Pillow for the plugins in `names`, without Pillow's pixel limit, which is process-wide. Codecs
    check their own limit against the header before decoding."""
    Image.init()  # loads all plugins, once
    file = io.BytesIO(data)
    for name in names:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(bytes(data[:16])) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # a different format
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
    """EXIF orientation, 1 (upright) to 8; 1 if the EXIF data cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return value if isinstance(value, int) else 1  # invalid EXIF may contain text
    except Exception:  # Pillow's parser raises arbitrary exceptions for damaged tags
        return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies EXIF orientations 2-8 as flips and 90-degree rotations."""
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
    """The upper 8 bits of 16-bit grey as RGB. Pillow's conversion would clip at 255."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
