"""The definition of the spatially varying convolution: unfold, multiply, sum."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def spatially_varying_conv2d(input: Tensor, weight: Tensor, *, kernel_size: int = 3,
                             stride: int = 1, padding: int = 1, dilation: int = 1) -> Tensor:
    """``sum_k weight[:, c, k] * input[:, c] shifted by k``, weight (N, G, k*k, h, w)."""
    n, c = input.shape[:2]
    groups, taps, height, width = weight.shape[1:]
    if input.shape[0] == 0:  # F.unfold refuses a batch of none
        return input[:, :, :1, :1] * weight[:, :1, 0]
    columns = F.unfold(input, kernel_size, dilation=dilation, padding=padding, stride=stride)
    columns = columns.view(n, groups, c // groups, taps, height, width)
    return (columns * weight[:, :, None]).sum(3).view(n, c, height, width)
