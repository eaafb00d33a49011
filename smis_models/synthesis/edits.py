"""Edits of label maps in words: another map, a painted box, one class for another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..data.classes import class_index
from .scene import Layout

_PAINT = re.compile(r"(.+):(\d+),(\d+),(\d+),(\d+)")
_RELABEL = re.compile(r"([^=]+)=([^=]+)")


def _class(argument: str, text: str, layout: Layout, classes: int) -> int:
    """A class of the layout's model by its name or number."""
    return class_index(argument, text, layout.class_names or tuple(
        map(layout.class_name, range(classes))))


def painted(layout: Layout, text: str, classes: int) -> Layout:
    """A box filled with a class: "CLASS:TOP,LEFT,BOTTOM,RIGHT", in pixels, ends excluded.

    A class is given by its name, where it has one, or its number.

    Instance ids inside become the class, as of stuff.

    Raises:
        ValueError: another form, an unknown class, a box outside the map.

    Example:
        >>> layout = Layout("plain", np.zeros((64, 64), np.int64), None)
        >>> int((painted(layout, "3:10,20,30,60", classes=8).labels == 3).sum())
        800
    """
    match = _PAINT.fullmatch(text)
    if match is None:
        raise ValueError(f"paint: expected CLASS:TOP,LEFT,BOTTOM,RIGHT, got {text!r}")
    index = _class("paint", match[1], layout, classes)
    top, left, bottom, right = map(int, match.groups()[1:])
    height, width = layout.labels.shape
    if not (top < bottom <= height and left < right <= width):
        raise ValueError(f"paint: expected a box inside {height}x{width} (height, width), got "
                         f"{text!r}")
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return _filled(layout, mask, index)


def relabelled(layout: Layout, text: str, classes: int) -> Layout:
    """All pixels of one class become another: "FROM=TO", by their names or numbers.

    Raises:
        ValueError: another form, an unknown class, no pixel of the first.

    Example:
        >>> layout = Layout("plain", np.full((64, 64), 3), None)
        >>> relabelled(layout, "3=5", classes=8).present
        [5]
    """
    match = _RELABEL.fullmatch(text)
    if match is None:
        raise ValueError(f"relabel: expected FROM=TO, got {text!r}")
    old, new = (_class("relabel", text, layout, classes) for text in match.groups())
    mask = layout.labels == old
    if not mask.any():
        raise ValueError(f"relabel: expected a class of {layout.name}, {layout.shown}; got {old}")
    return _filled(layout, mask, new)


def parse_takes(texts: Sequence[str], names: Sequence[str],
                class_names: Sequence[str]) -> dict[int, int]:
    """"CLASS=PICTURE" -> {class: index of the picture}; both by number or name.

    Raises:
        ValueError: another form, or no such picture.

    Example:
        >>> parse_takes(["sky=1", "1=beach"], ["forest", "beach"], ["sky", "sea"])
        {0: 1, 1: 1}
    """
    found = {}
    for text in texts:
        index, separator, picture = text.partition("=")
        if not index or not separator:
            raise ValueError(f"take: expected CLASS=PICTURE, got {text!r}")
        if list(names).count(picture) > 1:
            raise ValueError(f"take: expected one picture called {picture!r}, got several; give "
                             f"its number, 0..{len(names) - 1}")
        chosen = class_index("take", index, class_names)
        if picture in names:
            found[chosen] = list(names).index(picture)
        elif picture.isdigit() and int(picture) < len(names):
            found[chosen] = int(picture)
        else:
            raise ValueError(f"take: expected a picture 0..{len(names) - 1} or one of "
                             f"{', '.join(names)}; got {picture!r}")
    return found


def _filled(layout: Layout, mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
            index: int) -> Layout:
    ids = layout.instances
    return replace(layout, labels=np.where(mask, index, layout.labels),
                   instances=None if ids is None else np.where(mask, index, ids))
