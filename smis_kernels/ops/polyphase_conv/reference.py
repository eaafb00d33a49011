"""The definition: torch's convolutions. Beside them what the kernels compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def polyphase_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, stride: int,
                     padding: Pair, groups: int) -> Tensor:
    """``conv2d(input, weight, bias)``, any dtype."""
    return F.conv2d(input, weight, bias, stride, padding, 1, groups)


def polyphase_conv_transpose2d(input: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair,
                               output_padding: Pair, groups: int) -> Tensor:
    """``conv_transpose2d(input, weight, bias, stride=2)``, any dtype."""
    return F.conv_transpose2d(input, weight, bias, 2, padding, output_padding, groups)


def by_phases(input: Tensor, weight: Tensor, stride: int, *, magnitudes: bool = False) -> Tensor:
    """The conv of one group and no padding, as four convs of 2x2 kernels by F(3x3, 2x2) of tiles.

    Args:
        magnitudes: of every factor and term its absolute value: what rounding errors scale with.
    """
    # y = A [(G w G^T) * (B x B^T)] A^T at the points 0, 1, -1 and infinity
    a = input.new_tensor([[1, 1, 1, 0], [0, 1, -1, 0], [0, 1, 1, -1]])
    g = input.new_tensor([[1, 0], [0.5, 0.5], [0.5, -0.5], [0, 1]])
    b = input.new_tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    if magnitudes:
        a, g, b, input, weight = (t.abs() for t in (a, g, b, input, weight))
    side = weight.shape[2]
    height, width = ((size - side) // stride + 1 for size in input.shape[2:])
    down, across = -(-height // 3), -(-width // 3)
    whole = F.pad(weight, (0, 4 - side, 0, 4 - side))
    x = F.pad(input, (0, stride * 3 * across + 4, 0, stride * 3 * down + 4))
    y: Tensor = input.new_zeros(())
    for phase in range(4):
        p, q = divmod(phase, 2)
        if stride == 2:
            kernel, part = whole[:, :, p::2, q::2], x[:, :, p::2, q::2]
        else:
            kernel = whole[:, :, 2 * p : 2 * p + 2, 2 * q : 2 * q + 2]
            part = x[:, :, 2 * p :, 2 * q :]
        part = part[:, :, : 3 * down + 1, : 3 * across + 1]
        v = torch.einsum("fi,nkyxij,gj->nkyxfg", b, part.unfold(2, 4, 3).unfold(3, 4, 3), b)
        u = torch.einsum("fi,mkij,gj->mkfg", g, kernel, g)
        y = y + torch.einsum("mkfg,nkyxfg->nmyxfg", u, v)
    y = torch.einsum("if,nmyxfg,jg->nmyixj", a, y, a)
    return y.reshape(*y.shape[:2], 3 * down, 3 * across)[:, :, :height, :width]
