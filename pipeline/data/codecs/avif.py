"""AVIF. Pillow's decoder rejects files with invalid EXIF data."""

from dataclasses import dataclass

from PIL import Image

from pipeline.data.codecs.base import Codec, open_with_pillow


@dataclass(frozen=True, kw_only=True, slots=True)
class Avif(Codec):
    """Opens files with invalid EXIF data by renaming the EXIF item to an unknown type."""

    def open(self, data: bytes | memoryview) -> Image.Image:
        try:
            return open_with_pillow(data, [self.name])
        except ValueError as error:
            if "Exif" not in str(error):
                raise
            return open_with_pillow(bytes(data).replace(b"Exif", b"skip"), [self.name])


AVIF = Avif(name="AVIF", extensions=("avif",), signature=rb"....ftypavi[fs]")
