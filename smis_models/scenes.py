"""Procedural sample scenes: label and instance maps drawn from polygons, blobs and ridges."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Parts of each kind of scene. Where the number of classes is a published data set's, a part has
# that data set's index; elsewhere parts take the classes in this order.
_STREET = (
    "road", "sidewalk", "building", "sky", "vegetation", "terrain", "car", "person", "wall",
    "fence", "pole", "traffic light", "traffic sign", "rider", "bicycle", "truck", "bus",
)
_INDOOR = (
    "wall", "floor", "ceiling", "windowpane", "curtain", "door", "painting", "rug", "sofa",
    "table", "chair", "lamp", "plant", "cabinet", "cushion", "shelf", "person", "book",
)
_PERSON = (
    "background", "hair", "face", "upper clothes", "lower clothes", "arms", "legs", "shoes",
    "bag", "hat", "belt", "scarf",
)
_CITYSCAPES_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "bicycle": 33,
}
_ADE20K_IDS = {
    "wall": 1, "building": 2, "sky": 3, "floor": 4, "vegetation": 5, "ceiling": 6, "road": 7,
    "windowpane": 9, "terrain": 10, "cabinet": 11, "sidewalk": 12, "person": 13, "rider": 13,
    "door": 15, "table": 16, "plant": 18, "curtain": 19, "chair": 20, "car": 21, "painting": 23,
    "sofa": 24, "shelf": 25, "rug": 29, "fence": 33, "lamp": 37, "cushion": 40,
    "traffic sign": 44, "book": 68, "bus": 81, "truck": 84, "pole": 94, "bicycle": 128,
    "traffic light": 137,
}
_PUBLISHED_IDS = {35: _CITYSCAPES_IDS, 151: _ADE20K_IDS}

Grid = NDArray[np.float64]
Mask = NDArray[np.bool_]
Waves = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """A drawn layout.

    Attributes:
        labels: (H, W) uint8 or int64, the class of each pixel, 0..num_classes-1.
        instances: (H, W) int32; stuff regions carry their class, things class * 1000 + number
            (the Cityscapes convention).
        names: the name of each class.
    """

    labels: NDArray[np.integer[Any]]
    instances: NDArray[np.int32]
    names: tuple[str, ...]

    @property
    def present(self) -> tuple[int, ...]:
        """The classes that cover at least one pixel."""
        return tuple(int(c) for c in np.unique(self.labels))


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


class _Canvas:
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


def _figure(canvas: _Canvas, part: str, y: float, x: float, height: float) -> None:
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


def _vehicle(canvas: _Canvas, part: str, y: float, x: float, size: float, cab: float) -> None:
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


def _street(canvas: _Canvas, r: np.random.Generator) -> None:
    horizon = r.uniform(0.38, 0.5)
    vanish = r.uniform(0.4, 0.6)
    canvas.stuff("sky", rectangle(0, 0, 1, 1))
    canvas.stuff("vegetation", below(horizon - 0.12, r.uniform(-0.03, 0.03, 4), r.uniform(0, 6)))
    left = 0.0
    while left < 1:
        width = r.uniform(0.08, 0.22)
        distance = abs(left + width / 2 - vanish)
        if distance > 0.12:
            top = horizon - r.uniform(0.3, 0.9) * distance - 0.05
            slope = r.uniform(-0.05, 0.05)
            canvas.stuff("building", polygon((top, left), (top + slope, left + width),
                                             (horizon + 0.1, left + width), (horizon + 0.1, left)))
        left += width
    canvas.stuff("terrain", below(horizon, r.uniform(-0.01, 0.01, 3)))
    canvas.stuff("wall", rectangle(horizon - 0.04, 0, horizon + 0.05, r.uniform(0.15, 0.3)))
    canvas.stuff("fence", rectangle(horizon - 0.02, r.uniform(0.7, 0.8), horizon + 0.06, 1))
    canvas.stuff("sidewalk", polygon((horizon + 0.02, vanish - 0.1), (horizon + 0.02, vanish + 0.1),
                                     (0.9, 1.3), (1, 1.3), (1, -0.3), (0.9, -0.3)))
    canvas.stuff("road", polygon((horizon + 0.02, vanish - 0.05), (horizon + 0.02, vanish + 0.05),
                                 (1, 1.05), (1, -0.05)))
    for _ in range(r.integers(3, 6)):
        x = r.uniform(0, 1)
        crown = r.uniform(0.06, 0.13)
        canvas.stuff("vegetation",
                     rectangle(horizon - crown, x - 0.006, horizon + 0.06, x + 0.006),
                     blob(horizon - 1.3 * crown, x, crown, crown * 0.8, r.uniform(-0.1, 0.1, 4)))
    for part, height in (("traffic light", 0.04), ("traffic sign", 0.03), ("traffic sign", 0.025)):
        x, top = r.uniform(0.1, 0.9), horizon - r.uniform(0.08, 0.25)
        canvas.stuff("pole", rectangle(top, x - 0.004, horizon + 0.1, x + 0.004))
        canvas.thing(part, rectangle(top - height, x - 0.015, top + height, x + 0.015))
    depths = np.sort(r.uniform(0.05, 0.45, r.integers(6, 11)))
    for i, depth in enumerate(depths):
        y, size = horizon + 0.05 + depth, 0.04 + 0.2 * depth
        x = vanish + (1 if i % 2 else -1) * r.uniform(0.15, 1.0) * (depth + 0.1)
        part, cab = (("bus", 1.5), ("truck", 1.3), ("car", 0.9))[min(i, 2)]
        _vehicle(canvas, part, y, x, size, cab)
    for depth in np.sort(r.uniform(0.05, 0.35, r.integers(4, 8))):
        y = horizon + 0.06 + depth
        _figure(canvas, "person", y, r.uniform(0.03, 0.97), 0.12 + 0.5 * depth)
    y, x, s = r.uniform(0.7, 0.9), r.uniform(0.2, 0.8), r.uniform(0.04, 0.06)
    canvas.thing("bicycle", blob(y - s, x - s, s, s * 0.8), blob(y - s, x + s, s, s * 0.8))
    _figure(canvas, "rider", y - 0.5 * s, x, 4 * s)


def _indoor(canvas: _Canvas, r: np.random.Generator) -> None:
    floor, ceiling = r.uniform(0.62, 0.72), r.uniform(0.08, 0.16)
    left, right = r.uniform(0.08, 0.2), r.uniform(0.8, 0.92)
    canvas.stuff("wall", rectangle(0, 0, 1, 1))
    canvas.stuff("ceiling", polygon((0, 0), (0, 1), (ceiling, right), (ceiling, left)))
    canvas.stuff("floor", polygon((1, 0), (1, 1), (floor, right), (floor, left)))
    x = r.uniform(0.28, 0.4)
    canvas.thing("windowpane", rectangle(0.2, x, 0.45, x + 0.22))
    for side in (x - 0.03, x + 0.22):
        fold = r.uniform(-0.008, 0.008)
        canvas.thing("curtain", polygon((0.17, side - 0.02), (0.17, side + 0.05),
                                        (0.35, side + 0.04 + fold), (0.56, side + 0.055),
                                        (0.56, side - 0.025), (0.35, side - 0.01 + fold)))
    canvas.thing("door", polygon((0.24, 0.01), (0.26, left - 0.02), (floor + 0.03, left - 0.02),
                                 (floor + 0.16, 0.01)))
    for _ in range(r.integers(1, 4)):
        y, x = r.uniform(0.2, 0.35), r.uniform(0.62, 0.76)
        canvas.thing("painting", rectangle(y, x, y + r.uniform(0.05, 0.1), x + 0.07))
    x = r.uniform(0.78, 0.84)
    canvas.thing("cabinet", rectangle(floor - 0.22, x, floor + 0.04, x + 0.16))
    canvas.thing("shelf", rectangle(0.18, x + 0.02, floor - 0.24, x + 0.15))
    for i in range(r.integers(5, 9)):
        top = r.uniform(0.2, 0.24)
        canvas.thing("book", rectangle(top, x + 0.03 + 0.014 * i, 0.3, x + 0.041 + 0.014 * i))
    canvas.stuff("rug", blob(0.85, r.uniform(0.4, 0.6), 0.1, 0.3, (0.02,)))
    x = r.uniform(0.25, 0.4)
    canvas.thing("sofa", blob(floor + 0.02, x + 0.15, 0.13, 0.2, (0.03, -0.03)),
                 rectangle(floor, x - 0.05, floor + 0.13, x + 0.35))
    for i in range(3):
        canvas.thing("cushion", blob(floor - 0.01, x + 0.04 + 0.11 * i, 0.045, 0.04, (0.06,)))
    x = r.uniform(0.55, 0.7)
    canvas.thing("table", blob(0.8, x, 0.035, 0.15), rectangle(0.8, x - 0.01, 0.94, x + 0.01))
    for side in (-0.17, 0.17):
        canvas.thing("chair", rectangle(0.7, x + side - 0.05, 0.84, x + side + 0.03),
                     polygon((0.84, x + side - 0.05), (0.84, x + side + 0.05),
                             (0.97, x + side + 0.04), (0.97, x + side - 0.04)))
    x = r.uniform(0.2, 0.26)
    canvas.thing("lamp", rectangle(0.4, x - 0.006, floor + 0.05, x + 0.006),
                 polygon((0.36, x - 0.025), (0.36, x + 0.025), (0.46, x + 0.05), (0.46, x - 0.05)))
    x = r.uniform(0.88, 0.95)
    canvas.thing("plant", blob(0.68, x, 0.12, 0.07, r.uniform(-0.12, 0.12, 5)))
    for _ in range(r.integers(1, 3)):
        _figure(canvas, "person", r.uniform(0.86, 0.98), r.uniform(0.1, 0.9), r.uniform(0.4, 0.6))


def _person(canvas: _Canvas, r: np.random.Generator) -> None:
    x, lean = r.uniform(0.44, 0.56), r.uniform(-0.02, 0.02)
    head, shoulder, hip = 0.14, r.uniform(0.12, 0.15), r.uniform(0.09, 0.12)
    waist, hem = r.uniform(0.46, 0.54), r.uniform(0.6, 0.88)
    canvas.stuff("background", rectangle(0, 0, 1, 1))
    canvas.stuff("hair", blob(head + r.uniform(0, 0.05), x + lean, 0.12, 0.085,
                              r.uniform(-0.05, 0.05, 3)))
    for side in (-1, 1):
        canvas.stuff("legs", polygon((hem - 0.1, x), (hem - 0.1, x + side * hip),
                                     (0.96, x + side * 0.075), (0.96, x + side * 0.03)))
        canvas.stuff("shoes", blob(0.965, x + side * 0.06, 0.018, 0.04))
        elbow = shoulder + r.uniform(0.02, 0.08)
        canvas.stuff("arms", polygon((0.28, x + side * shoulder * 0.8), (0.27, x + side * shoulder),
                                     (0.43, x + side * (elbow + 0.015)), (0.58, x + side * elbow),
                                     (0.58, x + side * (elbow - 0.04)),
                                     (0.43, x + side * (elbow - 0.04))))
    canvas.stuff("face", blob(head, x + lean, 0.075, 0.048), rectangle(0.2, x - 0.025, 0.27,
                                                                     x + 0.025))
    canvas.stuff("lower clothes", polygon((waist - 0.04, x - hip), (waist - 0.04, x + hip),
                                          (hem, x + hip * 1.1), (hem, x + 0.01),
                                          (waist + 0.1, x), (hem, x - 0.01),
                                          (hem, x - hip * 1.1)))
    canvas.stuff("upper clothes", blob(0.39, x, 0.155, shoulder, r.uniform(-0.04, 0.04, 3)),
                 polygon((0.25, x - shoulder * 0.6), (0.25, x + shoulder * 0.6),
                         (waist, x + hip), (waist, x - hip)))
    canvas.stuff("hair", blob(head - 0.06, x + lean, 0.04, 0.06, r.uniform(-0.05, 0.05, 2)))
    extras: tuple[tuple[str, Shape], ...] = (
        ("bag", blob(0.62, x + shoulder + 0.1, 0.07, 0.06, (0.05,))),
        ("hat", polygon((0.05, x - 0.06), (0.05, x + 0.06), (0.08, x + 0.1), (0.08, x - 0.1))),
        ("belt", rectangle(waist - 0.015, x - hip, waist + 0.01, x + hip)),
        ("scarf", blob(0.26, x, 0.03, 0.08, (0.1,))),
    )
    for part, shape in extras:
        if canvas.class_of[part] != canvas.class_of["background"]:
            canvas.stuff(part, shape)


_KINDS: dict[str, tuple[tuple[str, ...], Callable[[_Canvas, np.random.Generator], None]]] = {
    "street": (_STREET, _street),
    "indoor": (_INDOOR, _indoor),
    "person": (_PERSON, _person),
}
KINDS = tuple(_KINDS)


def _class_indices(parts: Sequence[str], num_classes: int) -> dict[str, int]:
    published = _PUBLISHED_IDS.get(num_classes, {})
    if all(part in published for part in parts):
        return {part: published[part] for part in parts}
    return {part: rank if rank < num_classes else 0 for rank, part in enumerate(parts)}


def sample_scene(kind: str, height: int, width: int, num_classes: int, seed: int = 0) -> Scene:
    """Draw a scene with the region statistics of photographs: few, large, curved regions.

    Args:
        kind: "street", "indoor" or "person".
        height, width: of the maps, at least 1.
        num_classes: 1..; at 35 (Cityscapes) and 151 (ADE20K) the data set's indices are used
            where it has the parts; parts beyond ``num_classes`` become class 0.
        seed: the same seed draws the same scene at any size.

    Raises:
        ValueError: unknown kind, or a size or ``num_classes`` below 1.

    Example:
        >>> from smis_models.scenes import sample_scene
        >>> sample_scene("street", 64, 128, 35, seed=1).labels.shape
        (64, 128)
    """
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    for name, value in (("height", height), ("width", width), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    parts, draw = _KINDS[kind]
    class_of = _class_indices(parts, num_classes)
    canvas = _Canvas(height, width, class_of)
    draw(canvas, np.random.default_rng(seed))
    names = [f"class {c}" for c in range(num_classes)]
    for part, index in reversed(class_of.items()):
        names[index] = part
    dtype = np.uint8 if num_classes <= 256 else np.int64
    return Scene(canvas.labels.astype(dtype), canvas.instances, tuple(names))


def palette(num_classes: int) -> NDArray[np.uint8]:
    """(num_classes, 3) display colours; hues a golden angle apart, so neighbours differ."""
    colours = [
        colorsys.hsv_to_rgb(
            k * 0.61803398875 % 1, (0.75, 0.5, 0.9)[k % 3], (0.9, 0.7, 0.55)[k // 3 % 3]
        )
        for k in range(num_classes)
    ]
    return np.round(np.array(colours) * 255).astype(np.uint8).reshape(num_classes, 3)
