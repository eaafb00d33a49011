"""What every data set gives, and the base class of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset


class _Required(TypedDict):
    labels: Tensor
    image: Tensor
    name: str


class Sample(_Required, total=False):
    """One scene.

    Keys:
        labels: (H, W) uint8, or int16 where there are more than 256 classes; the don't-care rule
            of the data set has been applied, so all values are classes of the model.
        image: (3, H, W) float32 in [-1, 1].
        name: of the scene, unique in the data set.
        instances: (H, W) int32 ids; absent where the data set has none or the model reads none.
        modes: (classes,) int64, which appearance each class shows; of generated scenes only.
    """

    instances: Tensor
    modes: Tensor


@dataclass(frozen=True)
class Draw:
    """A key of a data set: item ``index`` as augmented in ``epoch``."""

    index: int
    epoch: int = 0


class SceneDataset(Dataset[Sample]):
    """Base of all data sets: ``dataset[index]`` or ``dataset[Draw(index, epoch)]``.

    Augmentation depends on (seed, index, epoch) alone, not on any global state: not on the number
    of workers, the order of reading, or what was read before a process was killed. ``epoch`` comes
    with the key (a sampler may yield :class:`Draw`), so persistent workers need no message.

    Attributes:
        classes: number of classes, don't-care class included.
        size: (height, width) of every sample, or None where it varies.
        seed: of the augmentation.
    """

    classes: int
    size: tuple[int, int] | None
    seed: int

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int, r: np.random.Generator) -> Sample:
        """Item ``index``, augmented by draws from ``r``."""
        raise NotImplementedError

    def __getitem__(self, key: int | Draw) -> Sample:
        index, epoch = (key.index, key.epoch) if isinstance(key, Draw) else (int(key), 0)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        return self.sample(index, np.random.default_rng((self.seed, index, epoch)))


def label_tensor(labels: NDArray[np.integer[Any]], classes: int) -> Tensor:
    """Labels in the dtype of :class:`Sample`."""
    return torch.from_numpy(labels.astype(np.uint8 if classes <= 256 else np.int16))


def image_tensor(picture: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1], as ToTensor and Normalize(0.5, 0.5)."""
    # Not in torch, whose threads would wait for one another on so little work.
    planes = picture.transpose(2, 0, 1).astype(np.float32, order="C")
    planes /= 127.5
    planes -= 1
    return torch.from_numpy(planes)
