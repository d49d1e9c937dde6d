"""JPEG, decoded by libjpeg-turbo with Pillow as fallback."""

from collections.abc import Iterator

import numpy as np
import simplejpeg

from pipeline.data.codecs.base import MAX_ASPECT, Codec, Picture, Refused, check_size, orientation_of, upright
from pipeline.data.scratch import scratch

SCAN = 0xDA  # marker
INKS = ("CMYK", "YCCK")  # decoded by Pillow, which supports Adobe's inverted CMYK


class Jpeg(Codec):
    """`decode` requires the end marker, because libjpeg fills missing data with grey and only warns."""

    def decode(self, data: bytes, max_pixels: int, max_aspect: float = MAX_ASPECT) -> Picture:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            check_size(width, height, max_pixels, max_aspect)
            if colorspace not in INKS:
                return self._decode_fast(data, height, width)
        except ValueError:
            pass  # an unusual but valid JPEG (odd subsampling), or not a JPEG: Pillow decides
        if kind := uncommon_kind(data):
            raise Refused("unsupported pixels", kind)
        return super().decode(data, max_pixels, max_aspect)

    def _decode_fast(self, data: bytes, height: int, width: int) -> Picture:
        buffer = scratch("prepare", (height, width, 3))
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
        except ValueError as error:
            message = str(error)
            if kind := uncommon_kind(data):
                raise Refused("unsupported pixels", kind) from error
            if "Premature end of JPEG file" in message:  # no end marker: the file is truncated
                raise Refused("truncated", message) from error
            if "extraneous bytes" not in message:  # stray bytes between markers are harmless, other warnings are not
                raise Refused("corrupt", message) from error
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=False)
        orientation = 1
        if _has_tags(data):
            orientation = self._orientation(data)
        return Picture(upright(pixels, orientation), orientation == 1)

    def _orientation(self, data: bytes) -> int:
        try:
            return orientation_of(self.open(data))
        except Exception:  # damaged tags: no orientation
            return 1

    def decode_stored(self, data: bytes | memoryview, max_pixels: int) -> np.ndarray:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= max_pixels and colorspace not in INKS:
                return simplejpeg.decode_jpeg(data, "RGB", buffer=scratch("decode", (height, width, 3)))
        except ValueError:
            pass  # may be a harmless warning such as stray bytes; Pillow distinguishes it from missing data
        return super().decode_stored(data, max_pixels)


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, offset) of the segments with content, up to the first scan. Ends early at stray bytes."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without content
            position += 2
        else:
            yield marker, position
            if marker == SCAN:
                return
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _has_tags(data: bytes) -> bool:
    """Whether there may be an orientation: tags precede the first scan, and may follow profiles and other segments."""
    end = next((position for marker, position in _segments(data) if marker == SCAN), len(data))
    return data.find(b"Exif\0\0", 0, end) >= 0 or data.find(b"tiff:Orientation", 0, end) >= 0


def uncommon_kind(data: bytes) -> str:
    """ "12-bit JPEG" or "lossless JPEG" if the frame header has this unsupported kind; otherwise empty."""
    for marker, position in _segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position + 9 <= len(data):
            bits = data[position + 4]
            if marker in (0xC3, 0xC7, 0xCB, 0xCF):
                return "lossless JPEG"
            return "" if bits == 8 else f"{bits}-bit JPEG"
    return ""


JPEG = Jpeg(name="JPEG", extensions=("jpg", "jpeg", "jpe", "jfif"), signature=rb"\xff\xd8", storable=True)
