"""The gradient of a conv's weight, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.library import RawOp
from .convs import Pair, pair

LEAST_WIDTH = 16  # channels and outputs of a group, below which torch's own is the faster one


def _fake(input: Tensor, grad: Tensor, groups: int, padding: int) -> Tensor:
    return torch.empty((grad.shape[1], input.shape[1] // groups, 3, 3), dtype=input.dtype,
                       device=input.device, memory_format=torch.channels_last)


_winograd = RawOp("winograd_weight_gradient(Tensor input, Tensor grad, SymInt groups, "
                  "SymInt padding) -> Tensor", _fake)


def weight_gradient(input: Tensor, grad: Tensor, weight: Tensor, padding: int | Pair,
                    groups: int, stride: int = 1) -> Tensor:
    """The gradient of the weight of ``F.conv2d(input, weight, None, stride, padding, 1, groups)``.

    Winograd's F(3x3, 2x2) for 3x3 kernels of stride 1, which multiplies 16 times for 2x2 pixels in
    place of 36; of narrow groups and other kernels torch's.

    Shapes: input (N, C, H, W), grad (N, C', H', W'), weight (C', C / groups, k, l), whose values
        are not read -> (C', C / groups, k, l), in channels-last memory.
    """
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    pads = pair(padding)
    if (min(outputs, channels) >= LEAST_WIDTH and weight.shape[2:] == (3, 3) and stride == 1
            and pads[0] == pads[1]):
        by_tiles: Tensor = _winograd("cpu", input, grad, groups, pads[0])
        return by_tiles
    # torch would copy a weight of another format, though it reads none. Its float64 groups (2.13)
    # misread the strides of one channels-last image.
    apart = groups > 1 and input.dtype == torch.float64
    memory_format = torch.contiguous_format if apart else torch.channels_last
    if apart:
        input, grad = input.contiguous(), grad.contiguous()
    like = torch.empty_like(weight, memory_format=memory_format)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, input, like, None, [stride, stride], list(pads), [1, 1], False, [0, 0], groups,
        [False, True, False])[1]
    return found.contiguous(memory_format=torch.channels_last) if apart else found
