"""AVIF. Its decoder refuses a whole file for EXIF that it cannot read."""

from dataclasses import dataclass

from PIL import Image

from pipeline.data.codecs.base import Codec, open_with_pillow


@dataclass(frozen=True, kw_only=True, slots=True)
class Avif(Codec):
    """Unreadable EXIF loses no pixels: the file is opened again with the EXIF item under a name that no reader knows."""

    def open(self, data: bytes | memoryview) -> Image.Image:
        try:
            return open_with_pillow(data, [self.name])
        except ValueError as error:
            if "Exif" not in str(error):
                raise
            return open_with_pillow(bytes(data).replace(b"Exif", b"skip"), [self.name])


AVIF = Avif(name="AVIF", extensions=("avif",), signature=rb"....ftypavi[fs]")
