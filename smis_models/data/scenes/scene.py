"""Scenes by kind: labels, instance ids and the names of the classes."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import drawings
from .shapes import Canvas

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
LANDSCAPE = ("sky", "mountain", "water", "ground", "building", "tree", "car", "person")
_CITYSCAPES_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "bicycle": 33,
}
_ADE20K_IDS = {
    "wall": 1, "building": 2, "sky": 3, "floor": 4, "vegetation": 5, "tree": 5, "ceiling": 6,
    "road": 7, "windowpane": 9, "terrain": 10, "cabinet": 11, "sidewalk": 12, "person": 13,
    "rider": 13, "ground": 14, "door": 15, "table": 16, "mountain": 17, "plant": 18,
    "curtain": 19, "chair": 20, "car": 21, "water": 22, "painting": 23, "sofa": 24,
    "shelf": 25, "rug": 29, "fence": 33, "lamp": 37, "cushion": 40,
    "traffic sign": 44, "book": 68, "bus": 81, "truck": 84, "pole": 94, "bicycle": 128,
    "traffic light": 137,
}
_PUBLISHED_IDS = {35: _CITYSCAPES_IDS, 151: _ADE20K_IDS}


@dataclass(frozen=True)
class DrawnScene:
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


_KINDS: dict[str, tuple[tuple[str, ...], Callable[[Canvas, np.random.Generator], None]]] = {
    "street": (_STREET, drawings.street),
    "indoor": (_INDOOR, drawings.indoor),
    "person": (_PERSON, drawings.person),
    "landscape": (LANDSCAPE, drawings.landscape),
}
KINDS = tuple(_KINDS)


def _class_indices(parts: Sequence[str], num_classes: int) -> dict[str, int]:
    published = _PUBLISHED_IDS.get(num_classes, {})
    if all(part in published for part in parts):
        return {part: published[part] for part in parts}
    return {part: rank if rank < num_classes else 0 for rank, part in enumerate(parts)}


def sample_scene(kind: str, height: int, width: int, num_classes: int, seed: int = 0) -> DrawnScene:
    """Draw a scene with the region statistics of photographs: few, large, curved regions.

    Args:
        kind: "street", "indoor", "person" or "landscape".
        height, width: of the maps, at least 1.
        num_classes: 1..; at 35 (Cityscapes) and 151 (ADE20K) the data set's indices are used
            where it has the parts; parts beyond ``num_classes`` become class 0.
        seed: the same seed draws the same scene at any size.

    Raises:
        ValueError: unknown kind, or a size or ``num_classes`` below 1.

    Example:
        >>> from smis_models.data.scenes import sample_scene
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
    canvas = Canvas(height, width, class_of)
    draw(canvas, np.random.default_rng(seed))
    names = [f"class {c}" for c in range(num_classes)]
    for part, index in reversed(class_of.items()):
        names[index] = part
    dtype = np.uint8 if num_classes <= 256 else np.int64
    return DrawnScene(canvas.labels.astype(dtype), canvas.instances, tuple(names))


def palette(num_classes: int) -> NDArray[np.uint8]:
    """(num_classes, 3) display colours; hues a golden angle apart, so neighbours differ."""
    colours = [
        colorsys.hsv_to_rgb(
            k * 0.61803398875 % 1, (0.75, 0.5, 0.9)[k % 3], (0.9, 0.7, 0.55)[k // 3 % 3]
        )
        for k in range(num_classes)
    ]
    return np.round(np.array(colours) * 255).astype(np.uint8).reshape(num_classes, 3)
