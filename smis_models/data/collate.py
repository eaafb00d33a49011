"""Batches, with the label-only work done where the batch is made: in the loader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from smis_kernels import LabelLayout

from ..families import LatentPreset, Preset
from ..networks.semantics import compile_layout
from . import transport  # noqa: F401  (registers how workers send layouts)
from .sample import Sample


class _Required(TypedDict):
    labels: Tensor
    image: Tensor
    name: list[str]
    layout: LabelLayout


class Batch(_Required, total=False):
    """Samples side by side, and their compiled labels.

    Keys:
        labels: (N, H, W), dtype of the samples.
        image: (N, 3, H, W) float32 in [-1, 1].
        name: N names.
        layout: what the generator reads in place of the semantics, every resolution compiled;
            ``layout.dense()`` is the one-hot tensor [and edges], (N, classes [+ 1], H, W).
        instances: (N, H, W) int32; modes: (N, classes) int64. Absent where samples have none.
    """

    instances: Tensor
    modes: Tensor


def modulation_sizes(preset: Preset) -> list[tuple[int, int]]:
    """The (height, width) at which a generator of ``preset`` reads windows of the labels."""
    if not isinstance(preset, LatentPreset):
        return []
    (h, w), steps = preset.latent_size, preset.upsamplings[preset.upsampling]
    return [(h << k, w << k) for k in range(steps + 1)]


class Collate:
    """``collate_fn`` of a ``DataLoader``: samples -> :class:`Batch`, the layout compiled.

    Args:
        preset: of the model that reads the batches.

    Raises:
        ValueError: samples of different sizes, or without instances where the model reads them.

    Example:
        >>> from smis_models import create_model
        >>> from smis_models.data import GeneratedScenes
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> dataset = GeneratedScenes(2, model.preset.image_size)
        >>> collate = Collate(model.preset)  # a DataLoader's collate_fn
        >>> batch = collate([dataset[0], dataset[1]])
        >>> image = model(batch["layout"])
    """

    def __init__(self, preset: Preset) -> None:
        self.preset = preset

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        first = samples[0]
        for sample in samples:
            if sample["labels"].shape != first["labels"].shape:
                raise ValueError(
                    f"samples: expected one size in a batch, got {tuple(first['labels'].shape)} "
                    f"({first['name']}) and {tuple(sample['labels'].shape)} ({sample['name']}); "
                    "choose a preprocess mode that crops or resizes (data.mode), or batches of one "
                    "(data.batch)"
                )
        labels = torch.stack([sample["labels"] for sample in samples])
        instances = (torch.stack([sample["instances"] for sample in samples])
                     if "instances" in first else None)
        compiled = compile_layout(labels, self.preset, instances)
        for size in modulation_sizes(self.preset):
            compiled.level(size)
        batch: Batch = {
            "labels": labels,
            "image": torch.stack([sample["image"] for sample in samples]),
            "name": [sample["name"] for sample in samples],
            "layout": compiled,
        }
        if instances is not None:
            batch["instances"] = instances
        if "modes" in first:
            batch["modes"] = torch.stack([sample["modes"] for sample in samples])
        return batch
