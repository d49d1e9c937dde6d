"""JPEG, decoded by libjpeg-turbo; what that refuses goes to Pillow."""

import numpy as np
import simplejpeg

from pipeline.data.codecs.base import Codec, Picture, Refused, check_size, orientation_of, upright
from pipeline.data.scratch import scratch

INKS = ("CMYK", "YCCK")  # Pillow knows Adobe's inverted inks


class Jpeg(Codec):
    """`decode` wants the end marker: libjpeg fills what is missing with grey and only warns."""

    def decode(self, data: bytes, max_pixels: int) -> Picture:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            check_size(width, height, max_pixels)
            if colorspace not in INKS:
                return self._decode_fast(data, height, width)
        except ValueError:
            pass  # an unusual but legal JPEG (odd subsampling, 12 bits), or not one: Pillow says which
        return super().decode(data, max_pixels)

    def _decode_fast(self, data: bytes, height: int, width: int) -> Picture:
        buffer = scratch("prepare", (height, width, 3))
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
        except ValueError as error:
            message = str(error)
            if "Premature end of JPEG file" in message:  # without an end marker the file is cut short
                raise Refused("truncated", message) from error
            if "extraneous bytes" not in message:  # stray bytes between markers lose nothing; every other warning does
                raise Refused("corrupt", message) from error
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=False)
        orientation = 1
        if b"Exif\0\0" in data or b"tiff:Orientation" in data:  # anywhere before the image: profiles may come first
            orientation = self._orientation(data)
        return Picture(upright(pixels, orientation), orientation == 1)

    def _orientation(self, data: bytes) -> int:
        try:
            return orientation_of(self.open(data))
        except Exception:  # Pillow's parser on a damaged tag block: a picture without orientation
            return 1

    def decode_stored(self, data: bytes | memoryview, max_pixels: int) -> np.ndarray:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= max_pixels and colorspace not in INKS:
                return simplejpeg.decode_jpeg(data, "RGB", buffer=scratch("decode", (height, width, 3)))
        except ValueError:
            pass  # perhaps only a warning, such as stray bytes between markers: Pillow tells that from missing data
        return super().decode_stored(data, max_pixels)


JPEG = Jpeg(name="JPEG", extensions=("jpg", "jpeg", "jpe", "jfif"), signature=rb"\xff\xd8", storable=True)
