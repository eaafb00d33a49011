"""nn.Conv2d that takes the Winograd form where that is the faster one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._backend import requested, resolve
from .._explain import record
from .op import KINDS, WIDE, winograd_conv2d

# On two cores with AVX-512 (benchmarks/NOTES.md): multiply-adds per nanosecond, and nanoseconds for
# each 3x3 kernel that is reordered or transformed. Only their ratios matter.
DIRECT_RATE, DIRECT_KERNEL = 195.0, 4.0
WINOGRAD_RATE, WINOGRAD_KERNEL = 145.0, 14.0
LEAST_WIDTH = 32  # channels and outputs of a group, below which register tiles stay half empty


def pays(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether the Winograd form is expected to be faster than a direct conv, padding 1."""
    if input.dtype not in WIDE or min(weight.shape[0] // groups, weight.shape[1]) < LEAST_WIDTH:
        return False
    kernels = weight.shape[0] * weight.shape[1]
    tiles = input.shape[0] * ((input.shape[2] + 1) // 2) * ((input.shape[3] + 1) // 2)
    direct = DIRECT_KERNEL + input.shape[0] * input.shape[2] * input.shape[3] * 9 / DIRECT_RATE
    return kernels * (WINOGRAD_KERNEL + tiles * 16 / WINOGRAD_RATE) < kernels * direct


class WinogradConv2d(nn.Conv2d):
    r"""Drop-in for a 3x3 :class:`torch.nn.Conv2d` of stride 1, which may also add a tensor.

    .. math:: y = \mathrm{conv2d}(x, W, b) \ (+ \mathrm{residual})

    Same arguments, parameters and state dict. On the CPU in float32 and float64 wide convs run as
    :func:`winograd_conv2d`, 1.3 to 1.9 times faster than a direct conv; everything else (other
    kernels, strides, paddings, narrow or small convs, 16-bit types, GPUs, autocast) is
    :class:`torch.nn.Conv2d` itself.

    Shapes: x (N, C, H, W), residual as the output -> (N, C', H', W').

    Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Example:
        >>> conv = WinogradConv2d(64, 64, 3, padding=1)
        >>> y = conv(torch.randn(1, 64, 128, 128))
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The conv, plus ``residual`` where one is given."""
        if self._fast(input):
            return winograd_conv2d(input, self.weight, self.bias, residual=residual, padding=1,
                                   groups=self.groups)
        y = super().forward(input)
        return y if residual is None else residual + y

    def _fast(self, input: Tensor) -> bool:
        plain: tuple[Any, ...] = (self.kernel_size, self.stride, self.padding, self.dilation)
        if plain != ((3, 3), (1, 1), (1, 1), (1, 1)) or self.padding_mode != "zeros":
            return False
        if torch.is_autocast_enabled(input.device.type):
            return False
        if not input.is_cpu or requested() not in ("auto", "cpu"):
            return False
        kind = resolve("winograd_conv2d", input, None, KINDS)
        if kind == "cpu" and pays(input, self.weight, self.groups):
            return True
        record("conv2d", "reference", input, reason="a direct conv is expected to be faster")
        return False
