"""Edits of label maps in words: another map, a painted box, one class for another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..data.classes import class_index
from .scene import Scene

_PAINT = re.compile(r"(.+):(\d+),(\d+),(\d+),(\d+)")
_RELABEL = re.compile(r"([^=]+)=([^=]+)")


def _class(argument: str, text: str, scene: Scene, classes: int) -> int:
    """A class of the scene's model by its name or number."""
    return class_index(argument, text, scene.class_names or tuple(
        map(scene.class_name, range(classes))))


def painted(scene: Scene, text: str, classes: int) -> Scene:
    """A box filled with a class: "CLASS:TOP,LEFT,BOTTOM,RIGHT", in pixels, ends excluded.

    A class is given by its name, where it has one, or its number.

    Instance ids inside become the class, as of stuff.

    Raises:
        ValueError: another form, an unknown class, a box outside the map.

    Example:
        >>> scene = Scene("plain", np.zeros((64, 64), np.int64), None)
        >>> int((painted(scene, "3:10,20,30,60", classes=8).labels == 3).sum())
        800
    """
    match = _PAINT.fullmatch(text)
    if match is None:
        raise ValueError(f"paint: expected CLASS:TOP,LEFT,BOTTOM,RIGHT, got {text!r}")
    index = _class("paint", match[1], scene, classes)
    top, left, bottom, right = map(int, match.groups()[1:])
    height, width = scene.labels.shape
    if not (top < bottom <= height and left < right <= width):
        raise ValueError(f"paint: expected a box inside {height}x{width} (height, width), got "
                         f"{text!r}")
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return _filled(scene, mask, index)


def relabelled(scene: Scene, text: str, classes: int) -> Scene:
    """All pixels of one class become another: "FROM=TO", by their names or numbers.

    Raises:
        ValueError: another form, an unknown class, no pixel of the first.

    Example:
        >>> scene = Scene("plain", np.full((64, 64), 3), None)
        >>> relabelled(scene, "3=5", classes=8).present
        [5]
    """
    match = _RELABEL.fullmatch(text)
    if match is None:
        raise ValueError(f"relabel: expected FROM=TO, got {text!r}")
    old, new = (_class("relabel", text, scene, classes) for text in match.groups())
    mask = scene.labels == old
    if not mask.any():
        raise ValueError(f"relabel: expected a class of {scene.name}, {scene.shown}; got {old}")
    return _filled(scene, mask, new)


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
        elif picture.isdecimal() and int(picture) < len(names):
            found[chosen] = int(picture)
        else:
            raise ValueError(f"take: expected a picture 0..{len(names) - 1} or one of "
                             f"{', '.join(names)}; got {picture!r}")
    return found


def _filled(scene: Scene, mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
            index: int) -> Scene:
    ids = scene.instances
    return replace(scene, labels=np.where(mask, index, scene.labels),
                   instances=None if ids is None else np.where(mask, index, ids))
