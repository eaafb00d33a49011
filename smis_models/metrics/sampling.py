"""Pictures of one scene in numbers: codes drawn by seed, painted by a Synthesizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..io.seeds import derived_seed
from ..synthesis.codes import drawn_code, resample_class
from ..synthesis.scene import Scene
from ..synthesis.synthesizer import Synthesizer

Draw = Callable[[Tensor], Tensor]
"""Codes (N, ...) of one scene -> pictures (N, 3, H, W)."""
BATCH = 4  # pictures at once: small layers fill the processor better, memory grows little


def has_class_codes(model: Any) -> bool:
    """Whether a model has a code for each class."""
    return hasattr(model.generator, "class_channels")


def sample_codes(model: Any, samples: int, seed: int, index: int | None = None) -> Tensor:
    """(samples, ...): codes drawn anew, or one code of which class ``index`` is drawn anew."""
    if index is None:
        return torch.cat([drawn_code(model, derived_seed(seed, k)) for k in range(samples)])
    one = drawn_code(model, derived_seed(seed, 0))
    return torch.cat([resample_class(model, one, index, derived_seed(seed, k, index + 1))
                      for k in range(samples)])


class LayoutSampler:
    """Pictures by a :class:`Synthesizer`: a scene is compiled once for all of its samples.

    Args:
        model: of the zoo, in eval mode.
        batch: pictures made at once.

    Example:
        >>> import numpy as np
        >>> from smis_models import create_model
        >>> from smis_models.synthesis.scene import Scene
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> scene = Scene("plain", np.zeros((128, 128), np.int64), None)
        >>> draw = LayoutSampler(model, 2).load(scene)
        >>> draw(sample_codes(model, 4, seed=0, index=3)).shape
        torch.Size([4, 3, 128, 128])
    """

    def __init__(self, model: Any, batch: int = BATCH) -> None:
        self._model, self._batch = model, batch
        self._synthesizer: Synthesizer | None = None

    def load(self, scene: Scene) -> LayoutSampler:
        """Go on with another scene; windows that both have are not computed again."""
        labels, instances = scene.tensors(self._batch)
        if self._synthesizer is None:
            self._synthesizer = Synthesizer(self._model, labels, instances)
        else:
            self._synthesizer.update(labels, instances)
        return self

    def _loaded(self) -> Synthesizer:
        if self._synthesizer is None:
            raise RuntimeError("scene: none is loaded; call load(scene) first")
        return self._synthesizer

    def picture(self, z: Tensor | None) -> Tensor:
        """(batch, 3, H, W): of one code for each of the batch, or of a model that reads none."""
        return self._loaded().sample(z)

    def __call__(self, codes: Tensor) -> Tensor:
        synthesizer = self._loaded()
        device = next(self._model.generator.parameters()).device
        pictures = []
        for z in codes.to(device).split(self._batch):
            missing = self._batch - len(z)
            full = torch.cat([z, z[-1:].expand(missing, *z.shape[1:])]) if missing else z
            pictures.append(synthesizer.sample(full)[: len(z)])
        return torch.cat(pictures)
