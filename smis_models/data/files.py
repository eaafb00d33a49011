"""Scenes on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..io.images import ImageError, read_instances, read_labels, read_picture
from .listing import Problem, Record
from .preprocess import Preprocess
from .sample import Sample, SceneDataset, image_tensor, label_tensor


def _shape(size: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in size)


def same_shape(sizes: dict[Path, tuple[int, ...]], *, exactly: bool) -> list[Problem]:
    """One problem for each file whose size does not go with the first one's.

    Sizes go together where one is the other scaled, to the pixel; ``exactly``: where they are one.
    """
    (first, (h, w)), *others = sizes.items()
    problems = []
    for path, (height, width) in others:
        # Half a pixel of each side may have been rounded off.
        scaled = abs(height * w - width * h) * 2 <= max(h, w, height, width)
        if (height, width) != (h, w) and (exactly or not scaled):
            problems.append(Problem(path, f"{_shape((height, width))}, but {first.name} is "
                                          f"{_shape((h, w))}; one scene has one shape"))
    return problems


class FileScenes(SceneDataset):
    """Scenes of picture, label map and perhaps instance map, read when asked for.

    Args:
        records: the files; :func:`list_scenes` finds them.
        classes: number of classes, don't-care class included.
        preprocess: resizing, cropping and mirroring.
        unknown: the class that 255 stands for; None where the data set has none.
        seed: of the augmentation.

    Raises (when a scene is read):
        ImageError: a file that cannot be read, a label out of range, files of different shapes;
            the message names file, value and cure.

    Example:
        >>> from smis_models.data import list_scenes, write_scenes
        >>> (folder,) = write_scenes("my_data", {"train": 2}, 64)
        >>> records = list_scenes("folder", folder).records
        >>> FileScenes(records, 8, Preprocess("fixed", (256, 256)))[0]["image"].shape
        torch.Size([3, 256, 256])
    """

    def __init__(self, records: Sequence[Record], classes: int, preprocess: Preprocess, *,
                 unknown: int | None = None, seed: int = 0) -> None:
        if not records:
            raise ValueError("records: expected at least one scene, got none")
        if unknown is not None and not 0 <= unknown < classes:
            raise ValueError(f"unknown: expected a class 0..{classes - 1}, got {unknown}")
        self.records, self.classes, self.preprocess = list(records), classes, preprocess
        self.unknown, self.seed, self.size = unknown, seed, preprocess.output_size

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, r: np.random.Generator) -> Sample:
        record = self.records[index]
        picture = read_picture(record.image)
        labels = read_labels(record.labels, self.classes, unknown=self.unknown)
        maps: dict[Path, NDArray[Any]] = {record.labels: labels, record.image: picture}
        if record.instances is not None:
            maps[record.instances] = read_instances(record.instances)
        sizes = {path: pixels.shape[:2] for path, pixels in maps.items()}
        for problem in same_shape(sizes, exactly=self.preprocess.keeps_size):
            raise ImageError(str(problem))
        try:
            plan = self.preprocess.plan(sizes[record.labels], r)
        except ValueError as error:
            raise ImageError(f"{record.labels}: {error}") from error
        sample: Sample = {
            "labels": label_tensor(plan.indices(labels), self.classes),
            "image": image_tensor(plan.picture(picture)),
            "name": record.name,
        }
        if record.instances is not None:
            sample["instances"] = torch.from_numpy(plan.indices(maps[record.instances]).copy())
        return sample
