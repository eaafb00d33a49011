"""Which form a 3x3 conv takes: direct or Winograd's, of which tile, by expected cost."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...runtime.backend import requested
from ...runtime.explain import record
from ...runtime.tensors import is_channels_last
from ..convs import DIRECT_KERNEL, DIRECT_RATE, batch_of, is_wide, runs_on_cpu
from ..kept_weight import KeptWeight
from .grouped import direct_conv3x3
from .op import TILES, winograd_conv2d

ENVIRONMENT = "SMIS_WINOGRAD"
# Beside ops/convs.py's, by benchmarks/winograd_forms.py --fit: multiply-adds per nanosecond,
# nanoseconds for each transformed value of a tile, and for each 3x3 kernel that is transformed or,
# where that is kept, read.
PRODUCT_RATE, TILE_VALUE = {2: 33.5, 4: 33.5}, {2: 0.4, 4: 0.85}
KERNEL, KEPT_KERNEL = {2: 17.0, 4: 34.0}, {2: 13.0, 4: 21.5}
# Where few tiles read many kernels, these are transformed in cache (csrc/winograd_conv/cpu.cpp).
STREAMED_KERNEL, MOST_STREAMED, CACHE = {2: 11.5, 4: 17.0}, 64, 1800 << 10
MOST_UNKEPT = 16  # tiles, to which a kept transform is not faster than that


def largest_tile() -> int:
    """The largest tile allowed: 4, or what ``SMIS_WINOGRAD`` says."""
    value = os.environ.get(ENVIRONMENT, "") or "4"
    if value not in map(str, TILES):
        raise ValueError(f"{ENVIRONMENT}: expected 2 or 4, got {value!r}")
    return int(value)


def _tiles(input: Tensor, padding: int, tile: int) -> int:
    height, width = (size + 2 * padding - 2 for size in input.shape[2:])
    return batch_of(input) * -(-height // tile) * -(-width // tile)


def _streams(input: Tensor, outputs: int, groups: int, padding: int, tile: int,
             most: int = MOST_STREAMED) -> bool:
    """Whether kernels are transformed in cache: few tiles, a weight whose transform outgrows it."""
    values = input.shape[1] // groups * (outputs // groups) * (tile + 2) ** 2
    return _tiles(input, padding, tile) <= most and values * input.itemsize > CACHE


def form(input: Tensor, outputs: int, groups: int, padding: int = 1, *, largest: int = 2,
         kept: bool = False) -> int:
    """The tile of the form expected to be fastest; 0 is a direct conv."""
    _, channels, height, width = input.shape
    n, k, m = batch_of(input), channels // groups, outputs // groups
    if not is_wide(input, k, m):
        return 0
    height, width = height + 2 * padding - 2, width + 2 * padding - 2

    def cost(tile: int) -> float:  # of each pair of a channel and an output, in nanoseconds
        if tile == 0:
            return DIRECT_KERNEL + n * height * width * 9 / DIRECT_RATE
        values = _tiles(input, padding, tile) * (tile + 2) ** 2
        streamed = _streams(input, outputs, groups, padding, tile,
                            MOST_UNKEPT if kept else MOST_STREAMED)
        kernel = STREAMED_KERNEL if streamed else KEPT_KERNEL if kept else KERNEL
        return (kernel[tile] + values / PRODUCT_RATE[tile]
                + values * (1 / k + 1 / m) * TILE_VALUE[tile])

    allowed = min(largest, largest_tile())
    best = 0
    for tile in TILES:  # a loop, which torch.compile traces
        if tile <= allowed and cost(tile) < cost(best):
            best = tile
    return best


def _runs(input: Tensor, padding: int) -> bool:
    return padding in (0, 1) and runs_on_cpu("winograd_conv2d", input)


def takes_winograd(input: Tensor, outputs: int, groups: int, padding: int = 1, *,
                   largest: int = 2, kept: bool = False) -> bool:
    """Whether :func:`conv3x3` takes a Winograd form for the input."""
    return _runs(input, padding) and form(input, outputs, groups, padding, largest=largest,
                                          kept=kept) > 0


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
            residual: Tensor | None = None, padding: int = 1, groups: int = 1, largest: int = 2,
            kept: KeptWeight | None = None) -> Tensor:
    """``residual + F.conv2d(...)`` of 3x3 kernels, stride 1, in the form expected to be faster.

    Everything but wide convs in float32 and float64 on the CPU is ``F.conv2d``; grouped ones on a
    GPU take the form of it that measured fastest for their shape.

    Shapes: input (N, C, H, W), weight (C', C / groups, 3, 3), residual as the output or half as
        high and wide (:func:`plus`) -> (N, C', H', W').

    Args:
        largest: the largest Winograd tile that may be taken: 2, or 4 outside of training.
            ``SMIS_WINOGRAD=2`` forbids 4 everywhere.
        kept: keeps the weight's transform for calls to come, where reading it is faster than
            making it.

    Raises:
        ValueError: ``SMIS_WINOGRAD`` is neither 2 nor 4.
    """
    if _runs(input, padding):
        tile = form(input, weight.shape[0], groups, padding, largest=largest,
                    kept=kept is not None and kept.expects(weight))
        if tile:
            if residual is not None:
                size = [n + 2 * padding - 2 for n in input.shape[2:]]
                residual = _at_size(residual, size)
            if kept is not None and _streams(input, weight.shape[0], groups, padding, tile,
                                             MOST_UNKEPT):
                kept = None
            return winograd_conv2d(input, weight, bias, residual=residual, padding=padding,
                                   groups=groups, tile=tile, kept=kept)
        record("conv2d", "torch", input, reason="a direct conv is expected to be faster")
    return plus(direct_conv3x3(input, weight, bias, padding, groups), residual)


def plus(y: Tensor, residual: Tensor | None) -> Tensor:
    """``residual + y``; a residual half as high and wide is upsampled x2 by nearest.

    On a GPU both are one pass: the upsampled tensor is never written.

    Shapes: y (N, C, H, W), residual (N, C, H, W) or (N, C, H / 2, W / 2), or None.
    """
    if residual is None:
        return y
    size = y.shape[2:]
    if y.is_cpu or requested() == "reference" or not _is_half(residual, size):
        return _at_size(residual, size) + y
    return _plus_half(y, residual)


def _plus_half(y: Tensor, half: Tensor) -> Tensor:
    """The sum over pixels of y in twos: y comes first, so that the result has its format."""
    last = is_channels_last(y)
    if last:  # as it lies in memory, else a batch of one would get strides of another format
        y, half = y.permute(0, 2, 3, 1), half.permute(0, 2, 3, 1)
    rows = 1 if last else 2
    h, w = half.shape[rows : rows + 2]
    twos = y.unflatten(rows + 1, (w, 2)).unflatten(rows, (h, 2))  # [..., h, 2, w, 2, ...]
    added = twos + half.unsqueeze(rows + 2).unsqueeze(rows + 1)
    whole = added.flatten(rows + 2, rows + 3).flatten(rows, rows + 1)
    return whole.permute(0, 3, 1, 2) if last else whole


def _is_half(residual: Tensor, size: Sequence[int]) -> bool:
    h, w = size
    return residual.dim() == 4 and h > 0 and w > 0 and (
        2 * residual.shape[2], 2 * residual.shape[3]) == (h, w)


def _at_size(residual: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(residual, scale_factor=2, mode="nearest") if _is_half(
        residual, size) else residual
