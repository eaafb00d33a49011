"""Colour-coded label maps to class indices, exactly or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .files import read_text
from .images import ImageError, Picture, opened, read_exact, read_indices

Colour = tuple[int, int, int]


def read_colour_table(path: str | Path) -> dict[Colour, int]:
    """Colour -> class, from a text file of lines ``CLASS R G B``; commas serve as well, # comments.

    Several colours may mean one class.

    Raises:
        ValueError: no such file, another line, a colour with two classes.

    Example:
        >>> read_colour_table("colours.txt")  # doctest: +SKIP
        {(70, 130, 180): 0, (107, 142, 35): 1}
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"colours: {path} cannot be read as text ({error}); expected lines "
                         "CLASS R G B") from error
    table: dict[Colour, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        words = re.split(r"[\s,;]+", text)
        if len(words) != 4 or not all(word.isdecimal() for word in words) or max(
                map(int, words[1:])) > 255 or int(words[0]) > 65535:
            raise ValueError(f"colours: expected CLASS R G B (R, G and B 0..255) in line {number} "
                             f"of {path}, got {line.strip()!r}")
        index, red, green, blue = map(int, words)
        if table.setdefault((red, green, blue), index) != index:
            raise ValueError(f"colours: {(red, green, blue)} is class {table[red, green, blue]} "
                             f"and, in line {number} of {path}, class {index}")
    if not table:
        raise ValueError(f"colours: expected lines CLASS R G B in {path}, got none")
    return table


def _codes(pixels: NDArray[np.integer]) -> NDArray[np.int64]:
    red, green, blue = (pixels[..., i].astype(np.int64) for i in range(3))
    return red << 16 | green << 8 | blue


def indices_of(picture: Picture, table: Mapping[Colour, int], source: str | Path = "",
               ) -> NDArray[np.int64]:
    """Class indices (H, W) of colours (H, W, 3).

    Raises:
        ImageError: a colour that the table has not: which, where, how often.
    """
    colours = np.array(list(table), np.int64)
    known = _codes(colours)
    order = np.argsort(known)
    codes = _codes(picture)
    place = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
    strange = known[place] != codes
    if strange.any():
        row, column = (int(i) for i in np.argwhere(strange)[0])
        raise ImageError(
            f"{source}: expected the colours of the table, got "
            f"{tuple(int(v) for v in picture[row, column])} at row {row}, column {column} and "
            f"others in {int(strange.sum())} pixels of {strange.size}; add them to the table")
    return np.array(list(table.values()), np.int64)[place]


def convert_colours(path: str | Path, table: Mapping[Colour, int] | None) -> NDArray[np.int64]:
    """A label map in colours, as (H, W) class indices.

    Args:
        path: a PNG, BMP or TIFF; of a palette file the colours count, not the indices.
        table: colour -> class; None for grey maps, of one channel, of three equal ones or with
            alpha, whose grey level is the class.

    Raises:
        ImageError: a lossy format, a colour that the table has not, unequal channels without a
            table, pixels that are not opaque.
    """
    if table is not None:
        return indices_of(read_exact(path), table, path)
    with opened(path, "a PNG") as image:
        grey = image.mode in ("1", "L")
    if grey:  # as colours, levels of fewer than 8 bits are stretched
        return read_indices(Path(path))
    picture = read_exact(path)
    if (picture != picture[..., :1]).any():
        raise ImageError(f"{path}: expected three equal channels, got colours; give their table "
                         "(--colours)")
    return picture[..., 0].astype(np.int64)
