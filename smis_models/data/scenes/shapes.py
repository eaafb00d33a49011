"""Shapes in unit coordinates and the canvas on which they are painted over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.float64]
Mask = NDArray[np.bool_]
Waves = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """A region in unit coordinates: a box (top, left, bottom, right) and a test inside it."""

    box: tuple[float, float, float, float]
    inside: Callable[[Grid, Grid], Mask]


def polygon(*points: tuple[float, float]) -> Shape:
    """The polygon through ``points`` (y, x), by the even-odd rule."""
    ys, xs = [p[0] for p in points], [p[1] for p in points]

    def inside(y: Grid, x: Grid) -> Mask:
        odd = np.zeros(np.broadcast_shapes(y.shape, x.shape), bool)
        for (y0, x0), (y1, x1) in zip(points, (*points[1:], points[0]), strict=True):
            if y0 != y1:
                crosses = (y0 <= y) != (y1 <= y)
                odd ^= crosses & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
        return odd

    return Shape((min(ys), min(xs), max(ys), max(xs)), inside)


def rectangle(top: float, left: float, bottom: float, right: float) -> Shape:
    """An axis-aligned box."""
    return Shape((top, left, bottom, right), lambda y, x: (y >= top) & (x >= left))


def blob(y0: float, x0: float, ry: float, rx: float, waves: Waves = ()) -> Shape:
    """An ellipse whose radius swings by ``waves[k]`` at k + 3 turns around the outline."""
    reach = 1 + sum(abs(w) for w in waves)

    def inside(y: Grid, x: Grid) -> Mask:
        dy, dx = (y - y0) / ry, (x - x0) / rx
        radius: Grid | float = 1.0
        if len(waves):
            angle = np.arctan2(dy, dx)
            radius = 1 + sum(w * np.sin((k + 3) * angle + k) for k, w in enumerate(waves))
        return dy * dy + dx * dx <= radius * radius

    return Shape((y0 - reach * ry, x0 - reach * rx, y0 + reach * ry, x0 + reach * rx), inside)


def below(level: float, waves: Waves = (), phase: float = 0.0) -> Shape:
    """Everything under the ridge y = level + sum of waves[k] * sin(2 pi (k + 1) x + phase)."""
    reach = sum(abs(w) for w in waves)

    def inside(y: Grid, x: Grid) -> Mask:
        ridge = level + sum(
            w * np.sin(2 * np.pi * (k + 1) * x + phase * (k + 1)) for k, w in enumerate(waves)
        )
        return np.broadcast_to(y >= ridge, np.broadcast_shapes(y.shape, x.shape))

    return Shape((level - reach, 0.0, 1.0, 1.0), inside)


class Canvas:
    """Paints shapes over one another; things are numbered per class in the order painted."""

    def __init__(self, height: int, width: int, class_of: dict[str, int]) -> None:
        self.labels = np.zeros((height, width), np.int64)
        self.instances = np.zeros((height, width), np.int32)
        self.class_of = class_of
        self._things: dict[int, int] = {}
        self._y = ((np.arange(height) + 0.5) / height)[:, None]
        self._x = ((np.arange(width) + 0.5) / width)[None, :]

    def stuff(self, part: str, *shapes: Shape) -> None:
        self._paint(self.class_of[part], self.class_of[part], shapes)

    def thing(self, part: str, *shapes: Shape) -> None:
        index = self.class_of[part]
        if index == 0:  # as in the data sets, where class 0 has no instances
            self.stuff(part, *shapes)
            return
        number = self._things.get(index, 0)
        self._things[index] = number + 1
        self._paint(index, index * 1000 + number, shapes)

    def _paint(self, index: int, instance: int, shapes: Sequence[Shape]) -> None:
        for shape in shapes:
            top, left, bottom, right = shape.box
            rows = slice(*np.searchsorted(self._y[:, 0], (top, bottom)))
            columns = slice(*np.searchsorted(self._x[0], (left, right)))
            mask = shape.inside(self._y[rows], self._x[:, columns])
            self.labels[rows, columns][mask] = index
            self.instances[rows, columns][mask] = instance


def figure(canvas: Canvas, part: str, y: float, x: float, height: float) -> None:
    """A standing person: head, trunk and two legs, one instance."""
    w = height * 0.16
    canvas.thing(
        part,
        blob(y - height * 0.9, x, height * 0.1, w * 0.5),
        blob(y - height * 0.58, x, height * 0.27, w),
        polygon((y - height * 0.4, x - w * 0.9), (y - height * 0.4, x), (y, x - w * 0.2),
                (y, x - w * 0.8)),
        polygon((y - height * 0.4, x), (y - height * 0.4, x + w * 0.9), (y, x + w * 0.8),
                (y, x + w * 0.2)),
    )


def vehicle(canvas: Canvas, part: str, y: float, x: float, size: float, cab: float) -> None:
    """Body, cab and wheels, one instance; ``cab`` is the height of the upper half."""
    s = size
    canvas.thing(
        part,
        blob(y - s * 0.35, x, s * 0.3, s, (0.04,)),
        polygon((y - s * 0.4, x - s * 0.8), (y - s * cab, x - s * 0.5),
                (y - s * cab, x + s * 0.45), (y - s * 0.4, x + s * 0.85)),
        blob(y - s * 0.12, x - s * 0.55, s * 0.18, s * 0.18),
        blob(y - s * 0.12, x + s * 0.55, s * 0.18, s * 0.18),
    )
