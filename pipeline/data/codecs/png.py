"""PNG; the loader decodes it with OpenCV."""

import cv2
import numpy as np

from pipeline.data.codecs.base import MAX_ASPECT, Codec, Picture, Refused

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"IEND\xaeB`\x82"


class Png(Codec):
    """`decode` requires the end marker, because Pillow stops at the last pixel."""

    def decode(self, data: bytes, max_pixels: int, max_aspect: float = MAX_ASPECT) -> Picture:
        if data.startswith(SIGNATURE) and END not in data:
            raise (
                Refused("truncated", "no end marker")
                if len(data) > len(SIGNATURE)
                else Refused("corrupt", "only a signature")
            )
        return super().decode(data, max_pixels, max_aspect)

    def decode_stored(self, data: bytes | memoryview, max_pixels: int) -> np.ndarray:
        width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
        if 0 < width * height <= max_pixels:
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            if image is not None:
                return image
        return super().decode_stored(data, max_pixels)


PNG = Png(name="PNG", extensions=("png",), signature=rb"\x89PNG", storable=True, lossless=True)
