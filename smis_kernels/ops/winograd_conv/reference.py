"""The definition: a 3x3 conv, and a tensor added to it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                    groups: int, padding: int) -> Tensor:
    """``residual + conv2d(input, weight, bias)``, any dtype."""
    y = F.conv2d(input, weight, bias, padding=padding, groups=groups)
    return y if residual is None else residual + y
