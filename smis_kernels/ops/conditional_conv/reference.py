"""The definition of the conditional convolution: predict all weights, unfold, multiply, sum."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..spatially_varying_conv import reference as spatially_varying_conv


def conditional_conv2d(input: Tensor, condition: Tensor, weight: Tensor,
                       bias: Tensor | None) -> Tensor:
    """A 3x3 conv of ``condition`` predicts the 3x3 depthwise kernels applied to ``input``."""
    kernels = F.conv2d(condition, weight, bias, padding=1)
    kernels = kernels.unflatten(1, (input.shape[1], 9))
    return spatially_varying_conv.spatially_varying_conv2d(input, kernels)
