"""Which form a 3x3 conv takes: direct or Winograd, by expected cost."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.backend import requested, resolve
from ...runtime.derivatives import transformed
from ...runtime.explain import record
from .grouped import direct_conv3x3
from .op import KINDS, WIDE, winograd_conv2d

# On two cores with AVX-512 (benchmarks/NOTES.md): multiply-adds per nanosecond, and nanoseconds for
# each 3x3 kernel that is reordered or transformed. Only their ratios matter.
DIRECT_RATE, DIRECT_KERNEL = 195.0, 4.0
WINOGRAD_RATE, WINOGRAD_KERNEL = 145.0, 14.0
LEAST_WIDTH = 32  # channels and outputs of a group, below which register tiles stay half empty


def pays(input: Tensor, outputs: int, groups: int, padding: int = 1) -> bool:
    """Whether the Winograd form is expected to be faster than a direct conv."""
    n, channels, height, width = input.shape
    if input.dtype not in WIDE or min(outputs, channels) // groups < LEAST_WIDTH:
        return False
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    tiles = n * ((height + 1) // 2) * ((width + 1) // 2)
    direct = DIRECT_KERNEL + n * height * width * 9 / DIRECT_RATE
    return WINOGRAD_KERNEL + tiles * 16 / WINOGRAD_RATE < direct


def _runs(input: Tensor, padding: int) -> bool:
    return (
        transformed() is None and input.is_cpu and padding in (0, 1)
        and requested() in ("auto", "cpu")
        and not torch.is_autocast_enabled("cpu")
        and resolve("winograd_conv2d", input, None, KINDS) == "cpu"
    )


def takes_winograd(input: Tensor, outputs: int, groups: int, padding: int = 1) -> bool:
    """Whether :func:`conv3x3` takes the Winograd form for the input."""
    return _runs(input, padding) and pays(input, outputs, groups, padding)


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
            residual: Tensor | None = None, padding: int = 1, groups: int = 1) -> Tensor:
    """``residual + F.conv2d(...)`` of 3x3 kernels, stride 1, in the form expected to be faster.

    Everything but wide convs in float32 and float64 on the CPU is ``F.conv2d``; grouped ones on a
    GPU take the form of it that measured fastest for their shape.

    Shapes: input (N, C, H, W), weight (C', C / groups, 3, 3) -> (N, C', H', W').
    """
    if _runs(input, padding):
        if pays(input, weight.shape[0], groups, padding):
            return winograd_conv2d(input, weight, bias, residual=residual, padding=padding,
                                   groups=groups)
        record("conv2d", "torch", input, reason="a direct conv is expected to be faster")
    y = direct_conv3x3(input, weight, bias, padding, groups)
    return y if residual is None else residual + y
