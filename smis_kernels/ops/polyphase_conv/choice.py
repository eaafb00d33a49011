"""Which form a strided or transposed conv takes, direct or by phases, by expected cost."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..convs import (
    DIRECT_KERNEL,
    DIRECT_RATE,
    Pair,
    batch_of,
    is_wide,
    pair,
    runs_on_cpu,
)
from ..kept_weight import KeptWeight
from .op import FORMS, polyphase_conv2d, polyphase_conv_transpose2d

# Beside ops/convs.py's, by benchmarks/polyphase_forms.py --fit on a core with AVX-512, scaled
# to the direct rate there: multiply-adds per nanosecond, nanoseconds for each transformed value of
# a tile, and, by a kernel's side, for each that is transformed or, where that is kept, read.
PRODUCT_RATE, TILE_VALUE = 32.0, 0.45
KERNEL, KEPT_KERNEL = {3: 38.0, 4: 50.0}, {3: 17.0, 4: 30.0}
WORTH = 0.92  # of the direct form's expected time: nearer than that the model does not tell
_PRODUCTS = {3: 49, 4: 64}  # of a tile of 3x3 outputs: of three taps the second phase has but one


def terms(input: Tensor, outputs: int, groups: int, side: int, stride: int, padding: int | Pair,
          output_padding: int | Pair = 0, *, transposed: bool = False,
          ) -> tuple[float, float, float]:
    """Direct multiply-adds, products and transformed values of each pair of channel and output."""
    n, k, m = batch_of(input), input.shape[1] // groups, outputs // groups
    sizes, pads, more = input.shape[2:], pair(padding), pair(output_padding)
    if not transposed:
        height, width = ((s + 2 * p - side) // stride + 1 for s, p in zip(sizes, pads, strict=True))
        direct, tiles = height * width, -(-height // 3) * -(-width // 3)
        values = 64 / m + 16 / k
    else:
        down, across = ((2 * (s - 1) - p + side + o - 1) // 2 - p // 2 + 1
                        for s, p, o in zip(sizes, pads, more, strict=True))
        direct, tiles = sizes[0] * sizes[1], -(-down // 3) * -(-across // 3)
        values = 16 / m + 64 / k
    return n * direct * side * side, n * tiles * _PRODUCTS[side], n * tiles * values


def takes_polyphase(input: Tensor, outputs: int, groups: int, side: int, stride: int,
                    padding: int | Pair, output_padding: int | Pair = 0, *,
                    transposed: bool = False, kept: bool = False) -> bool:
    """Whether the form by phases is expected to be faster."""
    name = "polyphase_conv_transpose2d" if transposed else "polyphase_conv2d"
    if (side, stride) not in FORMS or not runs_on_cpu(name, input) or not is_wide(
            input, input.shape[1] // groups, outputs // groups):
        return False
    if not all(0 <= p < side for p in pair(padding)) or not all(
            o in (0, 1) for o in pair(output_padding)):
        return False
    direct, products, values = terms(input, outputs, groups, side, stride, padding, output_padding,
                                     transposed=transposed)
    kernel = (KEPT_KERNEL if kept else KERNEL)[side]
    return (kernel + products / PRODUCT_RATE + values * TILE_VALUE
            < WORTH * (DIRECT_KERNEL + direct / DIRECT_RATE))


def strided_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1,
                   padding: int | Pair = 0, groups: int = 1, kept: KeptWeight | None = None,
                   ) -> Tensor:
    """``F.conv2d(input, weight, bias, stride, padding, groups=groups)`` in the faster form.

    By phases it runs where the kernel is 3x3 or 4x4, wide and of stride 2 (4x4: or 1), in float32
    and float64 on the CPU; else it is ``F.conv2d``.

    Shapes: input (N, C, H, W), weight (C', C / groups, k, l) -> (N, C', H', W').
    """
    outputs, side = weight.shape[0], weight.shape[2]
    if weight.shape[3] == side and takes_polyphase(
            input, outputs, groups, side, stride, padding,
            kept=kept is not None and kept.expects(weight)):
        return polyphase_conv2d(input, weight, bias, stride=stride, padding=padding, groups=groups,
                                kept=kept)
    return F.conv2d(input, weight, bias, stride, padding, 1, groups)


def doubling_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
                    padding: int | Pair = 0, output_padding: int | Pair = 0, groups: int = 1,
                    kept: KeptWeight | None = None) -> Tensor:
    """``F.conv_transpose2d(input, weight, bias, 2, padding, output_padding, groups)``, as above.

    Shapes: input (N, C, H, W), weight (C, C' / groups, k, l) -> (N, C', H', W').
    """
    outputs, side = groups * weight.shape[1], weight.shape[2]
    if weight.shape[3] == side and takes_polyphase(
            input, outputs, groups, side, 2, padding, output_padding, transposed=True,
            kept=kept is not None and kept.expects(weight)):
        return polyphase_conv_transpose2d(input, weight, bias, padding=padding,
                                          output_padding=output_padding, groups=groups, kept=kept)
    return F.conv_transpose2d(input, weight, bias, 2, padding, output_padding, groups)
