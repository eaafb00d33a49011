"""The definition: a reflection-padded conv of the conditioning tensor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def label_conv2d(conditioning: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, K, H, W) and (C, K, k, k) -> (N, C, H, W)."""
    pad = weight.shape[-1] // 2
    return F.conv2d(F.pad(conditioning, (pad,) * 4, mode="reflect"), weight, bias)
