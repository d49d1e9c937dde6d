"""Image decoding. `CODECS` lists the formats with their file extensions, signatures and decoders.

To add a format, add an entry to the list. If Pillow or a Pillow plugin supports the format, an entry with `name`,
`extensions` and `signature` is enough; otherwise a subclass of `Codec` overrides `open` or both decode methods."""

import re

import numpy as np

from pipeline.data.codecs.avif import AVIF
from pipeline.data.codecs.base import MAX_ASPECT, AnyOther, BadImage, Codec, Picture, Refused
from pipeline.data.codecs.heif import HEIF
from pipeline.data.codecs.jpeg import JPEG
from pipeline.data.codecs.png import PNG

__all__ = [
    "CODECS",
    "OTHER",
    "BadImage",
    "Codec",
    "Picture",
    "Refused",
    "decode",
    "decode_stored",
    "extensions",
    "find",
    "is_image_data",
    "is_image_name",
]

MAX_PIXELS = 1 << 27  # larger images are rejected by their header, before decoding (decompression bombs)

CODECS: list[Codec] = [
    JPEG,
    PNG,
    Codec(name="WEBP", extensions=("webp",), signature=rb"RIFF....WEBP"),
    Codec(name="GIF", extensions=("gif",), signature=rb"GIF8", lossless=True),
    Codec(name="BMP", extensions=("bmp",), signature=rb"BM", lossless=True),
    Codec(name="TIFF", extensions=("tif", "tiff"), signature=rb"II\*\0|MM\0\*", lossless=True),
    Codec(name="PPM", extensions=("ppm", "pgm"), signature=rb"P[1-6]\s+[\d#]", lossless=True),
    Codec(name="JPEG2000", extensions=("jp2",), signature=rb"\0\0\0\x0cjP|\xff\x4f\xff\x51"),
    AVIF,
    HEIF,
]
OTHER_FILES = [  # (first bytes, reason, detail) of files that are often named like images and are none
    (rb"version https://git-lfs", "git lfs pointer", "run git lfs pull to fetch the file itself"),
    (
        rb"(?is)\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)",
        "web page",
        "HTML in place of the image, as of a failed download",
    ),
    (
        rb"(?is)(\xef\xbb\xbf)?\s*(<\?xml[^>]*\?>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg",
        "unsupported format",
        "SVG",
    ),
    (rb"\s*<\?xml", "web page", "XML in place of the image, as of a failed download"),
    (rb"%PDF", "unsupported format", "PDF"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "unsupported format", "JPEG XL"),
    (rb".{128}DICM", "unsupported format", "DICOM"),
    (rb"....ftyp(crx)", "unsupported format", "raw file of a camera"),
    (rb"....ftyp(mp4|iso|qt|M4V|avc)", "unsupported format", "video"),
    (rb"8BPS", "unsupported format", "Photoshop"),
    (rb"#\?RADIANCE|v/1\x01", "unsupported format", "high dynamic range (Radiance or OpenEXR)"),
    (rb"\x1f\x8b|PK\x03\x04|7z\xbc|Rar!|BZh|\xfd7zXZ", "unsupported format", "a compressed file; unpack it"),
]
OTHER = AnyOther(name="other")


def find(data: bytes | memoryview) -> Codec:
    """The codec whose signature matches the start of a file, or OTHER. The file name does not matter."""
    return next((codec for codec in CODECS if codec.recognizes(data)), OTHER)


def is_image_data(data: bytes) -> bool:
    """Whether a file starts with the signature of a codec."""
    return find(data) is not OTHER


def is_image_name(path: str) -> bool:
    """Whether a path has the extension of an image format."""
    _, dot, end = path.rpartition(".")
    end = end.lower()
    return bool(dot) and any(end in codec.extensions for codec in CODECS)


def extensions() -> set[str]:
    """File extensions of all image formats, in lower case, without the dot."""
    return {extension for codec in CODECS for extension in codec.extensions}


def decode(data: bytes, max_pixels: int, max_aspect: float = MAX_ASPECT) -> Picture:
    """Decodes an image file of any format as a viewer shows it (first frame of an animation); see `Codec.decode`.

    Raises Refused: empty, not an image, git lfs pointer, web page, unsupported format, truncated, corrupt, too many pixels,
    too narrow, unsupported pixels.
    """
    if not data:
        raise Refused("empty")
    try:
        return find(data).decode(data, max_pixels, max_aspect)
    except Refused as error:
        if error.reason == "not an image":
            found = next((found for signature, *found in OTHER_FILES if re.match(signature, data, re.DOTALL)), None)
            if found is not None:
                raise Refused(*found) from error
        raise


def decode_stored(data: bytes | memoryview) -> np.ndarray:
    """The first frame of an image file as stored: uint8 (H, W, 3) RGB, valid until this thread decodes the next one.

    See `Codec.decode_stored`. Raises BadImage.
    """
    return find(data).decode_stored(data, MAX_PIXELS)
