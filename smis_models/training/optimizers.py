"""Adam for generator and discriminator, gradient scaling, and the moving average."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..families import SynthesisModel
from .config import OptimizerConfig
from .objective import generator_parts

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def adam(parameters: Iterable[nn.Parameter], rate: float, config: OptimizerConfig,
         ) -> torch.optim.Adam:
    """Adam over the parameters that are trained now."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.Adam(trained, lr=rate, betas=config.betas, fused=True)


class EMA:
    """Moving average of generator and encoder, as a model that paints.

    Parameters are averaged; buffers (running statistics, spectral norms) are the latest.

    Args:
        model: that is trained, before its first step.
        decay: near 1.
    """

    def __init__(self, model: SynthesisModel, decay: float) -> None:
        self._source = nn.ModuleList(generator_parts(model))
        self.averaged = AveragedModel(self._source, multi_avg_fn=get_ema_multi_avg_fn(decay))
        names = [name for name, _ in model.named_children() if name != "discriminator"]
        self.model = SynthesisModel(model.name, model.preset, dict(zip(
            names, self.averaged.module.children(), strict=True)))

    def update(self) -> None:
        """Take the model's present weights in."""
        self.averaged.update_parameters(self._source)
