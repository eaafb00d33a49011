"""The gradient of a 3x3 conv's weight, on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_gradient(input: Tensor, grad: Tensor, weight: Tensor, padding: int, groups: int,
                    ) -> Tensor:
    """The gradient of the weight of ``F.conv2d(input, weight, padding=padding, groups=groups)``.

    Where there are no more pixels than outputs of a group it is one product with the input's
    windows, which are then no larger than the weight; else torch's.

    Shapes: input (N, C, H, W), grad (N, C', H', W'), weight (C', C / groups, 3, 3), whose values
        are not read -> (C', C / groups, 3, 3), in channels-last memory.
    """
    n, outputs, height, width = grad.shape
    if n * height * width <= outputs // groups:
        return _product(input, grad, padding, groups)
    # torch would copy a weight of another format, though it reads none
    like = torch.empty_like(weight, memory_format=torch.channels_last)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, input, like, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups,
        [False, True, False])[1]
    return found


def _product(input: Tensor, grad: Tensor, padding: int, groups: int) -> Tensor:
    n, outputs, height, width = grad.shape
    each = input.shape[1] // groups
    x = F.pad(input.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    a, b, c, d = x.stride()
    shape, strides = (groups, n, height, width, 3, 3, each), (each * d, a, b, c, b, c, d)
    windows = x.as_strided(shape, strides, x.storage_offset())
    windows = windows.reshape(groups, n * height * width, 9 * each)
    pixels = grad.permute(1, 0, 2, 3).reshape(groups, outputs // groups, n * height * width)
    found = torch.bmm(pixels, windows)  # [group, output, (row, column, channel)]
    return found.view(outputs, 3, 3, each).permute(0, 3, 1, 2)
