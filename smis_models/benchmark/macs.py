"""Multiply-accumulates of a network by definition, and those that a run really makes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from smis_kernels import ConditionalConv2d, use_backend
from smis_kernels.interface import NAMESPACE

from .case import Inputs

Shape = tuple[int, ...]


def conv_macs(inputs: Inputs) -> int:
    """Multiply-accumulates of a network's reference path, counted without computing."""
    module, *arguments = inputs
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.no_grad(), \
            use_backend("reference"):
        module(*arguments)
    return counter.get_total_flops() // 2


def _window_table(hidden: Tensor, weight: Tensor, *rest: Any, out_val: Tensor, **_: Any) -> int:
    """Gamma's and beta's 3x3 convs: at every 3x3 window, or on one level at every 5x5 window.

    Groups that have windows of their own multiply those alone: their ids are numbered from 1.
    """
    groups, one_level, kinds, ids = (*rest[4:], None, None)[:4]
    if one_level:
        return (len(out_val) - 1) * 2 * weight.numel()
    rows = len(hidden) - 1 if ids is None else ids.amax(1)[kinds.long()].sum().item() / groups
    return round(rows * 2 * weight.numel())


_window_table._get_raw = True  # type: ignore[attr-defined]  # values, not shapes alone


def _conditional_conv(input: Shape, condition: Shape, weight: Shape, bias: Any, tile: int = 2,
                      *_: Any, **__: Any) -> int:
    """The Winograd conv that predicts the kernels, and their application with nine taps."""
    tiles = input[0] * -(-input[2] // tile) * -(-input[3] // tile)
    return tiles * (tile + 2) ** 2 * prod(weight[:2]) + 9 * prod(input)


def _winograd_conv(input: Shape, weight: Shape, bias: Any, residual: Any, groups: int,
                   padding: int, tile: int = 2, *_: Any, out_shape: Shape, **__: Any) -> int:
    """F(m x m, 3x3): (m + 2)² products for a tile of m² pixels where 9 m² were."""
    tiles = out_shape[0] * -(-out_shape[2] // tile) * -(-out_shape[3] // tile)
    return tiles * (tile + 2) ** 2 * weight[0] * weight[1]


def _polyphase_conv(input: Shape, weight: Shape, bias: Any, groups: int, stride: int,
                    padding_y: int, padding_x: int, transposed: bool, height: int, width: int,
                    *_: Any, **__: Any) -> int:
    """F(3x3, 2x2) of four phases: 16 products each; of three taps the second phase needs 12 and 9.

    The padding of a transposed conv decides how many rows its phases have.
    """
    products = 49 if weight[2] == 3 else 64
    if transposed and stride == 2:
        height, width = ((size - 1 + p) // 2 - p // 2 + 1
                         for size, p in ((height, padding_y), (width, padding_x)))
    return input[0] * -(-height // 3) * -(-width // 3) * products * weight[0] * weight[1]


# Ops that multiply; the others only sum, pick or scale.
_FORMULAS: dict[str, Callable[..., int]] = {
    "window_table": _window_table, "conditional_conv": _conditional_conv,
    "winograd_conv": _winograd_conv, "polyphase_conv": _polyphase_conv,
    # All weights of a level at every 5x5 window, what pads them to tiles included.
    "level_product": lambda hidden, weight, bias, tiles, windows, *_, **__:
        (windows[0] - 1) * weight[0],
    "varying_conv": lambda input, weight, kernel_size, *_, out_shape, **__:
        prod(out_shape) * kernel_size**2,
    "narrow_conv": lambda input, weight, *_, out_shape, **__: prod(out_shape) * prod(weight[1:]),
    # At least once a pixel of the features: where windows differ, each of up to four in turn.
    "indexed_shortcut": lambda input, mean, rstd, index, table, weight, *_, **__:
        input[0] * prod(input[2:]) * weight[0] * weight[1],
}


def _flops(formula: Callable[..., int]) -> Callable[..., int]:
    return wraps(formula)(lambda *arguments, **options: 2 * formula(*arguments, **options))


def dense_macs(inputs: Inputs) -> int:
    """Those of a network's reference path: its convs, and predicted kernels on every pixel.

    Inputs (network, *arguments), as of a case; nothing is computed, and meta tensors do.
    """
    applied = 0

    def count(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal applied
        applied += 9 * out.numel()

    with ExitStack() as hooks:
        for layer in inputs[0].modules():
            if isinstance(layer, ConditionalConv2d):
                hooks.enter_context(layer.register_forward_hook(count))
        convs = conv_macs(inputs)  # which runs the hooks
    return convs + applied


def effective_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of one run of ``call``, without gradients.

    Example:
        >>> effective_macs(lambda: torch.nn.Conv2d(3, 5, 1)(torch.randn(1, 3, 4, 4)))
        240
    """
    ops = getattr(torch.ops, NAMESPACE)
    formulas = {getattr(ops, name): _flops(formula) for name, formula in _FORMULAS.items()}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2
