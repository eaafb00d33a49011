"""Pictures with words: captions under them, and the legend of a label map's colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .images import Picture, grid

_BAND, _SIZE, _GAP = 16, 11, 4


def _drawn(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """Text that ends in ... where it is wider than ``width``; that alone where nothing fits.

    In one line, whatever is in it.
    """
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    font = ImageFont.load_default(_SIZE)
    shown = text
    while text and len(shown) > 1 and draw.textlength(shown, font) > width:
        text = text[:-1]
        shown = text.rstrip() + "..."
    draw.text(place, shown, "black", font)


def captioned(picture: Picture, text: str) -> Picture:
    """(H, W, 3) -> (H + 16, W, 3), with a line of text below; cut where it is too long.

    Example:
        >>> captioned(np.zeros((64, 64, 3), np.uint8), "sky").shape
        (80, 64, 3)
    """
    height, width = picture.shape[:2]
    sheet = Image.new("RGB", (width, height + _BAND), "white")
    sheet.paste(Image.fromarray(picture), (0, 0))
    _drawn(ImageDraw.Draw(sheet), (2, height + 1), text, width - 4)
    return np.asarray(sheet)


def legend(entries: Sequence[tuple[str, Sequence[int]]], size: tuple[int, int]) -> Picture:
    """Names beside their colours on white, of ``size`` (height, width); as many as there is room.

    Example:
        >>> legend([("sky", (135, 190, 235))], (64, 64)).shape
        (64, 64, 3)
    """
    height, width = size
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    room = max(1, height // _BAND)
    for row, (name, colour) in enumerate(entries[:room]):
        top = row * _BAND
        last = row == room - 1 and len(entries) > room
        if last:
            name = f"and {len(entries) - row} more"
        else:
            draw.rectangle((2, top + 2, 12, top + 12), tuple(map(int, colour)), "black")
        _drawn(draw, (16, top), name, width - 18)
    return np.asarray(sheet)


def captioned_grid(rows: Sequence[Sequence[tuple[str, Picture]]], gap: int = _GAP) -> Picture:
    """Rows of (caption, picture), all pictures of one size; a row's end is white.

    Example:
        >>> captioned_grid([[("sky", np.zeros((64, 64, 3), np.uint8))]]).shape
        (80, 64, 3)
    """
    return grid([[captioned(picture, text) for text, picture in row] for row in rows], gap)
