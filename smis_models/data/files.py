"""Scenes on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..io.images import ImageError
from ..io.scene import SceneFiles, read_scene
from .preprocess import Preprocess
from .sample import Sample, SceneDataset, image_tensor, label_tensor


class FileScenes(SceneDataset):
    """Scenes of picture, label map and perhaps instance map, read when asked for.

    Args:
        records: the files; :func:`list_scenes` finds them.
        classes: number of classes, don't-care class included.
        preprocess: resizing, cropping and mirroring.
        unknown: the class that 255 stands for; None where the data set has none.
        seed: of the augmentation.
        option: what the user can give ``unknown`` by, for errors.

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

    def __init__(self, records: Sequence[SceneFiles], classes: int, preprocess: Preprocess,
                 *, unknown: int | None = None, seed: int = 0, option: str = "--unknown") -> None:
        if not records:
            raise ValueError("records: expected at least one scene, got none")
        if unknown is not None and not 0 <= unknown < classes:
            raise ValueError(f"unknown: expected a class 0..{classes - 1}, got {unknown}")
        self.records, self.classes, self.preprocess = list(records), classes, preprocess
        self.unknown, self.seed, self.size = unknown, seed, preprocess.output_size
        self.option = option

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, r: np.random.Generator) -> Sample:
        scene = read_scene(self.records[index], self.classes, unknown=self.unknown,
                           option=self.option, exactly=self.preprocess.keeps_size)
        assert scene.labels is not None and scene.picture is not None
        try:
            plan = self.preprocess.plan(scene.size, r)
        except ValueError as error:
            raise ImageError(f"{self.records[index].labels}: {error}") from error
        sample: Sample = {
            "labels": label_tensor(plan.indices(scene.labels), self.classes),
            "image": image_tensor(plan.picture(scene.picture)),
            "name": scene.name,
        }
        if scene.instances is not None:
            sample["instances"] = torch.from_numpy(plan.indices(scene.instances))
        return sample
