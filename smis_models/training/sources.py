"""The data set that a configuration names."""

from __future__ import annotations

from ..data import GeneratedScenes, SceneDataset
from .config import TrainConfig

HELD_OUT = 64  # scenes drawn for the split that is not trained on


def dataset(config: TrainConfig, split: str) -> SceneDataset:
    """The pictures of a split, "train" or "val", at the network's size.

    Raises:
        ValueError: an unknown data set, or one with other classes than the network.
    """
    data, network = config.data, config.network
    if data.name != "scenes":
        raise NotImplementedError
    count = data.length if split == "train" else HELD_OUT
    return GeneratedScenes(count, network.image_size, split, config.seed)
