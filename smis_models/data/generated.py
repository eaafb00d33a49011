"""Generated scenes with known semantics and several appearance modes per class."""

from __future__ import annotations

import numpy as np
import torch

from .sample import Sample, SceneDataset, image_tensor, label_tensor
from .scenes import LANDSCAPE, draw_modes, paint, sample_scene

SPLITS = ("train", "val", "test")


class GeneratedScenes(SceneDataset):
    """Landscapes of 8 classes (``smis_models.data.scenes.LANDSCAPE``), each in 4 appearance modes.

    The layout, the mode of each class (independent and uniform) and all jitter depend on (seed,
    split, index) alone; the splits share no scene. Samples have ``instances`` and ``modes``.

    Args:
        count: number of scenes.
        size: (height, width), or one number for both.
        split: "train", "val" or "test".
        seed: of the whole set.

    Raises:
        ValueError: an unknown split, a count or a size below 1.

    Example:
        >>> sample = GeneratedScenes(10, 64)[3]
        >>> sample["image"].shape, sample["labels"].dtype
        (torch.Size([3, 64, 64]), torch.uint8)
    """

    size: tuple[int, int]

    def __init__(self, count: int, size: int | tuple[int, int] = 128, split: str = "train",
                 seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected {', '.join(SPLITS)}; got {split!r}")
        self.size = (size, size) if isinstance(size, int) else size
        for name, value in (("count", count), ("size", min(self.size)), ("seed", seed + 1)):
            if value < 1:
                raise ValueError(f"{name}: expected at least {int(name != 'seed')}, "
                                 f"got {value - (name == 'seed')}")
        self.classes = len(LANDSCAPE)
        self.seed, self.split, self.count = seed, split, count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, r: np.random.Generator) -> Sample:
        of_scene = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        scene = sample_scene("landscape", *self.size, self.classes,
                             int(of_scene.integers(2**62)))
        modes = draw_modes(of_scene)
        return {
            "labels": label_tensor(scene.labels, self.classes),
            "instances": torch.from_numpy(scene.instances),
            "image": image_tensor(paint(scene.labels, scene.instances, modes, of_scene)),
            "modes": torch.from_numpy(modes),
            "name": f"{self.split}_{index:06d}",
        }
