"""Inputs of the timed rows: label maps, layouts and features, at full or (dry run) tiny size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smis_kernels import LabelLayout
from smis_models.benchmark.case import Maps

from .settings import Settings

COCO = 183


@dataclass(frozen=True)
class Scene:
    """Where inputs live and how large they are."""

    settings: Settings

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    @property
    def dry(self) -> bool:
        return self.settings.dry_run

    def pick(self, full: Any, tiny: Any) -> Any:
        """``full``, or ``tiny`` on a dry run."""
        return tiny if self.dry else full

    @cached_property
    def maps(self) -> Maps:
        return Maps(self.settings.maps)

    def draw(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32,
             channels_last: bool = False) -> Tensor:
        """Normal numbers, drawn on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(shape, generator=generator, device=self.device).to(dtype)
        return x.to(memory_format=torch.channels_last) if channels_last else x

    def labels(self, kind: str, size: tuple[int, int], classes: int, batch: int = 1) -> Tensor:
        """(N, H, W) labels: real maps where a folder was given, else the sample scenes."""
        name = "cityscapes" if kind == "street" else "coco"
        maps = self.maps.named(name)
        found = []
        for i in range(batch):
            drawn = maps.labels(kind, size, 1 << 16 if self.settings.maps else classes, i)
            if drawn.max() >= classes:  # ranks: which classes they are does not matter to speed
                drawn = np.unique(drawn, return_inverse=True)[1].reshape(drawn.shape) % classes
            found.append(torch.from_numpy(drawn))
        return torch.stack(found).to(self.device)

    def instances(self, kind: str, size: tuple[int, int], batch: int = 1) -> Tensor:
        """(N, H, W) instance ids."""
        maps = self.maps.named("cityscapes" if kind == "street" else "coco")
        found = [torch.from_numpy(maps.instances(kind, size, i)) for i in range(batch)]
        return torch.stack(found).to(self.device)

    def layout(self, labels: Tensor, classes: int, *sizes: tuple[int, int]) -> LabelLayout:
        """A compiled layout, ready at the given sizes."""
        layout = LabelLayout.from_labels(labels, classes)
        for size in sizes:
            layout.level(size)
        return layout
