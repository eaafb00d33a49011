"""Instance shapes from label maps, and a scene with one instance's shape exchanged for another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..io.images import resize_nearest
from .features import THINGS
from .scene import Scene

Mask = NDArray[np.bool_]
_SMALLEST = 1 / 2000  # of the map: smaller regions are no shapes


def _box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _pieces(mask: Mask) -> list[Mask]:
    """Connected regions, largest first."""
    from scipy import ndimage  # here, for its import would slow every command

    numbers, count = ndimage.label(mask, np.ones((3, 3), int))
    pieces = [numbers == k for k in range(1, count + 1)]
    return sorted(pieces, key=lambda piece: -int(piece.sum()))


def regions(scene: Scene, index: int) -> list[Mask]:
    """Masks (H, W) of the instances of a class; without instance ids its connected regions."""
    of_class = scene.labels == index
    if scene.instances is not None:
        ids = np.unique(scene.instances[of_class])
        things = ids[ids >= THINGS]
        if len(things):
            return [(scene.instances == i) & of_class for i in things]
    return _pieces(of_class)


@dataclass(frozen=True)
class ShapeLibrary:
    """Shapes by class: masks cut to their boxes.

    Example:
        >>> ids = np.zeros((64, 64), np.int64)
        >>> ids[20:40, 20:40] = 26001
        >>> library = ShapeLibrary.from_scenes([Scene("street", ids // 1000, ids)])
        >>> len(library.shapes[26])
        1
    """

    shapes: dict[int, list[Mask]]

    @classmethod
    def from_scenes(cls, scenes: Iterable[Scene]) -> ShapeLibrary:
        """The shapes of every class in label maps; those cut off by the border are left out."""
        shapes: dict[int, list[Mask]] = {}
        for scene in scenes:
            least = scene.labels.size * _SMALLEST
            for index in scene.present:
                for mask in regions(scene, index):
                    edge = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
                    if mask.sum() >= least and not edge:
                        shapes.setdefault(index, []).append(mask[_box(mask)])
        return cls(shapes)

    def of(self, index: int) -> Sequence[Mask]:
        """The shapes of a class.

        Raises:
            ValueError: there is none.
        """
        if not self.shapes.get(index):
            known = ", ".join(map(str, sorted(self.shapes))) or "none"
            raise ValueError(f"library: expected a shape of class {index} that lies whole inside "
                             f"its map, got shapes of the classes {known}")
        return self.shapes[index]


def target_region(scene: Scene, target: int) -> tuple[Mask, int]:
    """(mask, class) of an instance id, or of the largest region of a class.

    Raises:
        ValueError: neither an instance nor a class of the map has that number.
    """
    if scene.instances is not None and target >= THINGS:
        mask = scene.instances == target
        if mask.any():
            return mask, int(scene.labels[mask][0])
    elif (scene.labels == target).any():
        return max(regions(scene, target), key=lambda mask: int(mask.sum())), target
    have = scene.present if scene.instances is None else [
        *scene.present, *np.unique(scene.instances[scene.instances >= THINGS]).tolist()]
    raise ValueError(f"exchange: expected a class or an instance of {scene.name}, one of "
                     f"{', '.join(map(str, have))}; got {target}")


def exchange_shape(scene: Scene, target: int, shape: Mask) -> Scene:
    """The scene with the shape of one instance (or region of a class) exchanged for another.

    The new shape is scaled to the old one's height and stands where that stood: at the middle of
    its lower edge. Pixels that it leaves take label and instance of the nearest pixel around.

    Args:
        scene: the scene.
        target: an instance id, or a class, of which the largest region is taken.
        shape: (h, w) mask, from :class:`ShapeLibrary`.

    Raises:
        ValueError: no such instance or class; a region that fills the whole map.

    Example:
        >>> ids = np.zeros((64, 64), np.int64)
        >>> ids[20:40, 20:40] = 26001
        >>> scene = Scene("street", ids // 1000, ids)
        >>> library = ShapeLibrary.from_scenes([scene])
        >>> other = exchange_shape(scene, 26001, library.of(26)[0])
    """
    from scipy import ndimage

    old, index = target_region(scene, target)
    if old.all():
        raise ValueError(f"exchange: {target} fills the whole map; nothing is left around it")
    rows, columns = _box(old)
    height = rows.stop - rows.start
    width = max(1, round(shape.shape[1] * height / shape.shape[0]))
    scaled = resize_nearest(shape.astype(np.int64), (height, width)) > 0
    new = np.zeros_like(old)
    left = (columns.start + columns.stop - width) // 2
    first, last = max(left, 0), min(left + width, old.shape[1])
    new[rows, first:last] = scaled[:, first - left : last - left]
    nearest = tuple(ndimage.distance_transform_edt(old, return_distances=False,
                                                   return_indices=True))
    labels = np.where(new, index, scene.labels[nearest])
    instances = scene.instances
    if instances is not None:
        instances = np.where(new, instances[old][0], instances[nearest])
    return replace(scene, labels=labels, instances=instances)
