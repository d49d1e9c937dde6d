"""HEIC and HEIF (photos from phones), through pillow-heif."""

from dataclasses import dataclass

from PIL import Image

from pipeline.data.codecs.base import Codec, Refused, open_with_pillow
from pipeline.errors import UserError
from pipeline.libraries import import_library


@dataclass(frozen=True, kw_only=True, slots=True)
class Heif(Codec):
    """Imports pillow-heif on first use, which takes 60 ms. pillow-heif applies the rotation."""

    def open(self, data: bytes | memoryview) -> Image.Image:
        try:
            pillow_heif = import_library("pillow_heif")
        except UserError as error:
            raise Refused("unsupported format", str(error)) from error
        pillow_heif.register_heif_opener(thumbnails=False)
        return open_with_pillow(data, [self.name])


HEIF = Heif(name="HEIF", extensions=("heic", "heif", "hif"), signature=rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)")
