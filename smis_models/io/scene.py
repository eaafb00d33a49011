"""The files of one scene, and the one reader of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .images import ImageError, Picture, read_instances, read_labels, read_picture
from .images import one_shape as one_shape


@dataclass(frozen=True)
class SceneFiles:
    """Where a scene's picture and maps lie; None for those that it has not."""

    name: str
    image: str | Path | None = None
    labels: str | Path | None = None
    instances: str | Path | None = None


@dataclass(frozen=True)
class SceneArrays:
    """What was read: labels and instances (H, W) int64, picture (H, W, 3) uint8.

    All are as large as in their files, which may differ in scale alone.
    """

    name: str
    picture: Picture | None
    labels: NDArray[np.int64] | None
    instances: NDArray[np.int64] | None
    size: tuple[int, int]
    """(height, width) of the label map, or of what stands first where there is none."""


def text_size(size: tuple[int, ...]) -> str:
    """(height, width) as people and `doctor` write it: width x height."""
    return "x".join(str(n) for n in size[::-1])


def misfits(sizes: Mapping[Path, tuple[int, ...]], *, exactly: bool) -> list[tuple[Path, str]]:
    """Each file whose (height, width) does not go with the first one's, and why.

    Sizes go together where one is the other scaled, to the pixel; ``exactly``: where they are one.
    """
    (first, (h, w)), *others = sizes.items()
    found = []
    for path, (height, width) in others:
        same = (height, width) == (h, w) if exactly else one_shape((height, width), (h, w))
        if not same:
            found.append((path, f"{text_size((height, width))} (width x height), but "
                                f"{first.parent.name}/{first.name} is {text_size((h, w))}; "
                                "one scene has one shape"))
    return found


def read_scene(files: SceneFiles, classes: int, *, unknown: int | None = None,
               option: str | None = None, exactly: bool = False) -> SceneArrays:
    """Read all files of a scene, as large as they are.

    Args:
        files: where they lie.
        classes: labels must lie below it.
        unknown: the class that 255 stands for, if any.
        option: what the user can give ``unknown`` by, for the error.
        exactly: the files must have one size, not only one shape.

    Raises:
        FileNotFoundError: a file is missing.
        ImageError: a file that cannot be read, a label out of range, files of different shapes.

    Example:
        >>> scene = read_scene(SceneFiles("a", labels=Path("a.png")), 8)  # doctest: +SKIP
    """
    labels = ids = picture = None
    label_file, image_file, id_file = (
        None if path is None else Path(path)
        for path in (files.labels, files.image, files.instances))
    maps: dict[Path, NDArray[Any]] = {}
    if label_file is not None:
        labels = maps[label_file] = read_labels(label_file, classes, None, unknown, option)
    if id_file is not None:
        ids = read_instances(id_file)
    if image_file is not None:
        drawn = labels if labels is not None else ids
        picture = maps[image_file] = read_picture(image_file,
                                                  like=None if drawn is None else drawn.shape)
    if id_file is not None:
        assert ids is not None
        maps[id_file] = ids
    sizes = {path: pixels.shape[:2] for path, pixels in maps.items()}
    for path, reason in misfits(sizes, exactly=exactly):
        raise ImageError(f"{path}: {reason}")
    height, width = next(iter(sizes.values()))
    return SceneArrays(files.name, picture, labels, ids, (height, width))
