"""Where a learned shortcut takes the kernel for it: outside of training, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...runtime.check import WIDE
from ...runtime.tensors import is_channels_last
from ..convs import runs_on_cpu


def takes_shortcut(conv: nn.Conv2d, input: Tensor, table: Tensor, backend: str | None) -> bool:
    """Whether :func:`indexed_shortcut` computes ``conv`` of indexed modulation, and sooner."""
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.bias is not None or (
            conv.padding not in ((0, 0), "same", "valid") or backend not in (None, "auto", "cpu")):
        return False
    wanted = torch.is_grad_enabled() and any(
        t.requires_grad for t in (input, table, *conv.parameters()))
    return (not wanted and input.dtype in WIDE and is_channels_last(input)
            and runs_on_cpu("indexed_shortcut", input))
