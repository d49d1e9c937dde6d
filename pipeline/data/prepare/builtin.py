"""Built-in data of the demo: small images from installed libraries, written as class folders of PNG files.

    demo:letters   printed letters in the fonts of matplotlib: 41 classes, 21 images each
    demo:digits    scikit-learn's handwritten digits: 10 classes, 1,797 images

Both are 8x8 grey images, light on dark. They have no common images or labels, so results on digits after training on
letters measure transfer."""

import os
import string
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from pipeline import storage
from pipeline.data.prepare.config import DIGITS, LETTERS
from pipeline.errors import UserError

SMALL = "abdefghjmnqrtuy"  # lower-case letters that do not look like their capital or another letter
TYPEFACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)


def write_builtin(uri: str, folder: str) -> str:
    """Writes a built-in source to `folder/<name>/<class>/<file>.png` unless it exists. Returns the folder."""
    name = uri.partition(":")[2]
    place = storage.join(folder, name)
    images = list(BUILTIN[uri]())
    if not storage.exists(storage.join(place, images[-1][0])):
        for path, pixels in images:
            storage.write_bytes(storage.join(place, path), cv2.imencode(".png", pixels)[1].tobytes())
    return place


def digits() -> Iterator[tuple[str, np.ndarray]]:
    """(path, uint8 (8,8)) of 1,797 handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for i, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        yield f"{label}/{i:04d}.png", np.minimum(image * 16, 255).astype(np.uint8)  # 17 levels of grey


def letters() -> Iterator[tuple[str, np.ndarray]]:
    """(path, uint8 (8,8)) of 861 printed letters, scaled to fill the image like the digits.

    Folders of lower-case letters are named small-a, because file systems may be case-insensitive.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    for typeface in TYPEFACES:
        try:
            font = ImageFont.truetype(os.path.join(fonts, f"{typeface}.ttf"), 48)
        except OSError as error:
            raise UserError(f"{fonts}: matplotlib's font {typeface} is missing; reinstall matplotlib") from error
        for letter in string.ascii_uppercase + SMALL:
            page = Image.new("L", (96, 96))
            ImageDraw.Draw(page).text((24, 16), letter, font=font, fill=255)
            glyph = page.crop(page.getbbox())
            side = max(glyph.size)
            square = Image.new("L", (side, side))
            square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
            name = letter if letter.isupper() else f"small-{letter}"
            yield f"{name}/{typeface}.png", np.asarray(square.resize((8, 8), Image.Resampling.BOX))


BUILTIN: dict[str, Callable[[], Iterator[tuple[str, np.ndarray]]]] = {LETTERS: letters, DIGITS: digits}
