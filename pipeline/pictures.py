"""Draws images with titles as one PNG. Uses Pillow, because importing matplotlib would delay training workers."""

import functools
import io
import os
from collections.abc import Sequence
from importlib.util import find_spec

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 6, 16
"""Pixels between tiles, and height of a line of text in pixels."""


def sheet(
    pictures: Sequence[np.ndarray], titles: Sequence[str], heading: str, *, columns: int = 8, side: int = 128
) -> bytes:
    """A PNG of images in rows, each with a title above it, below a heading.

    pictures: uint8 (H,W,C) with C 1 or 3. Small images are enlarged by an integer
    factor. Titles wider than their image are shortened."""
    columns = min(columns, len(pictures)) or 1
    rows = -(-len(pictures) // columns)
    tiles = [_tile(picture, side) for picture in pictures]
    wide = max((tile.shape[1] for tile in tiles), default=side) + GAP
    high = max((tile.shape[0] for tile in tiles), default=side) + LINE + GAP
    lines = _wrapped(heading, max(wide * columns, 480) - 2 * GAP)
    top = GAP + LINE * len(lines)
    page = Image.new("RGB", (max(wide * columns, 480) + GAP, top + high * rows + GAP), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP // 2 + LINE * number), line, "black", _font(12))
    for i, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        left, upper = GAP + wide * (i % columns), top + high * (i // columns)
        draw.text((left, upper), _cut(title, tile.shape[1]), "black", _font(11))
        page.paste(Image.fromarray(tile), (left, upper + LINE))
    sink = io.BytesIO()
    page.save(sink, "png")
    return sink.getvalue()


def _tile(picture: np.ndarray, side: int) -> np.ndarray:
    """uint8 (h,w,3) of about `side` pixels."""
    picture = np.broadcast_to(picture, (*picture.shape[:2], 3))
    longer = max(picture.shape[:2])
    if longer <= side:
        return np.ascontiguousarray(picture).repeat(side // longer, 0).repeat(side // longer, 1)
    scale = side / longer
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The default font of matplotlib, which has more characters than Pillow's."""
    spec = find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        file = os.path.join(os.path.dirname(spec.origin), "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if os.path.exists(file):
            return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)


def _cut(title: str, width: int) -> str:
    font, title = _font(11), " ".join(title.split())
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(title + "…") > width:
        title = title[:-1]
    return title + "…"


def _wrapped(text: str, width: int) -> list[str]:
    lines, font = [""], _font(12)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
