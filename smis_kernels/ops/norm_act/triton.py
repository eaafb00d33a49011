"""GPU kernels of norm_act: tiles and layouts are those of modulation's kernels."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import triton_tile as tile
from ...runtime.tensors import empty_nchw, is_channels_last
from ...runtime.triton_support import SIZES, CompileCase, dense, meta, on_device, tiling


@triton.jit(do_not_specialize=SIZES)
def norm_act_kernel(
    x, x_n, x_s, mean, rstd, per_image, residual, residual_n, residual_s, out, C, P, first,
    SLOPE: tl.constexpr, ADD: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    C, P = tile.sizes(C, P, UNIT, NHWC)
    n, c, p, mask = tile.position(C, P, first, BLOCK_C, BLOCK_P)
    features = tile.load(x, n, x_n, c, p, x_s, mask, UNIT, NHWC, ACC)
    hat = features - tile.statistic(mean, n, per_image, c, C)
    value = tile.activate(hat * tile.statistic(rstd, n, per_image, c, C), SLOPE)
    if ADD:
        value += tile.load(residual, n, residual_n, c, p, residual_s, mask, UNIT, NHWC, ACC)
    tile.store(out, value, n, c, p, C, P, mask, NHWC)


@triton.jit(do_not_specialize=SIZES)
def norm_act_backward_kernel(
    grad, grad_n, grad_s, x, x_n, x_s, mean, rstd, per_image, dx, partial, partial_s, C, P, first,
    SLOPE: tl.constexpr, SUMS: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    C, P = tile.sizes(C, P, UNIT, NHWC)
    n, c, p, mask = tile.position(C, P, first, BLOCK_C, BLOCK_P)
    features = tile.load(x, n, x_n, c, p, x_s, mask, UNIT, NHWC, ACC)
    dz = tile.load(grad, n, grad_n, c, p, grad_s, mask, UNIT, NHWC, ACC)
    r = tile.statistic(rstd, n, per_image, c, C)
    hat = (features - tile.statistic(mean, n, per_image, c, C)) * r
    if SLOPE != 1.0:
        dz = tl.where(hat > 0, dz, dz * SLOPE)
    value = r * dz
    tile.store(dx, value, n, c, p, C, P, mask, NHWC)
    if SUMS:
        tile.store_sums(value, hat, partial, partial_s, n, c, C, mask, NHWC)


def norm_act(input: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None,
             slope: float) -> Tensor:
    n, c, h, w = input.shape
    nhwc = is_channels_last(input)
    x = dense(input, nhwc)
    r = x if residual is None else dense(residual, nhwc)
    out = empty_nchw((n, c, h, w), input)
    t = tiling("norm_act", tile.APPLY, h * w, nhwc, x, r)
    with on_device(x):
        for first, grid in t.grids():
            norm_act_kernel[grid](
                x, *t.strides(x), mean, rstd, tile.per_image(mean), r, *t.strides(r), out, *t.sizes,
                first, SLOPE=slope, ADD=residual is not None, **t.constants,
            )
    return out


def norm_act_backward(grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, slope: float,
                      sums: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    nhwc = is_channels_last(input)
    x, dy = dense(input, nhwc), dense(grad, nhwc)
    dx = empty_nchw((n, c, h, w), input)
    t = tiling("norm_act_backward", tile.APPLY, h * w, nhwc, x, dy, widest=tile.SUMMED_CHANNELS)
    sums_of_tiles = t.partial_sums(x, sums)
    with on_device(x):
        for first, grid in t.grids():
            norm_act_backward_kernel[grid](
                dy, *t.strides(dy), x, *t.strides(x), mean, rstd, tile.per_image(mean), dx,
                sums_of_tiles, sums_of_tiles.numel() // 2, *t.sizes, first,
                SLOPE=slope, SUMS=sums, **t.constants,
            )
    return dx, t.total(sums_of_tiles)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, nhwc in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        for c, size in ((256, 128), (280, 63)):
            x, m = meta(2, c, size, size, dtype=dtype, nhwc=nhwc), meta(2, c)
            name = (f"{str(dtype).removeprefix('torch.')} {'rows' if nhwc else 'planes'} C={c}")
            cases += [CompileCase(name, partial(norm_act, x, m, m, x, 0.0)),
                      CompileCase(name, partial(norm_act_backward, x, x, m, m, 0.0, True))]
    return cases


COMPILE_CASES = _compile_cases()
