"""The gradient of a conv's weight, on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .convs import Pair, pair

LEAST_WIDTH = 64  # channels and outputs of a group, below which torch's own is the faster one


def weight_gradient(input: Tensor, grad: Tensor, weight: Tensor, padding: int | Pair,
                    groups: int, stride: int = 1) -> Tensor:
    """The gradient of the weight of ``F.conv2d(input, weight, None, stride, padding, 1, groups)``.

    A product for each tap of a 3x3 kernel; of narrow groups and other kernels torch's.

    Shapes: input (N, C, H, W), grad (N, C', H', W'), weight (C', C / groups, k, l), whose values
        are not read -> (C', C / groups, k, l), in channels-last memory.
    """
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    pads = pair(padding)
    if min(outputs, channels) >= LEAST_WIDTH and weight.shape[2:] == (3, 3):
        return _by_taps(input, grad, pads, groups, stride)
    # torch would copy a weight of another format, though it reads none
    like = torch.empty_like(weight, memory_format=torch.channels_last)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, input, like, None, [stride, stride], list(pads), [1, 1], False, [0, 0], groups,
        [False, True, False])[1]
    return found


def _by_taps(input: Tensor, grad: Tensor, padding: Pair, groups: int, stride: int,
             ) -> Tensor:
    (n, outputs, height, width), channels = grad.shape, input.shape[1]
    pixels, m, k = n * height * width, outputs // groups, channels // groups
    x = F.pad(input.permute(0, 2, 3, 1), (0, 0, *2 * padding[1:], *2 * padding[:1]))
    left = grad.permute(0, 2, 3, 1).reshape(pixels, groups, m).permute(1, 2, 0)
    found = input.new_empty((groups, m, 9, k))
    for tap in range(9):
        i, j = divmod(tap, 3)
        rows, columns = (slice(first, first + stride * (size - 1) + 1, stride)
                         for first, size in ((i, height), (j, width)))
        shifted = x[:, rows, columns].reshape(pixels, groups, k)
        found[:, :, tap] = torch.bmm(left, shifted.transpose(0, 1))
    return found.view(outputs, 3, 3, k).permute(0, 3, 1, 2)
