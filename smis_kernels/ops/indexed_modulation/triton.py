"""GPU kernels of indexed modulation: modulation's tiles, with gamma and beta gathered by index.

A table is (U, 2C) for row layout (channels-last) and its transpose for plane layout, so that
neighbours in a tile read neighbours in the table.
"""

from __future__ import annotations

from functools import partial as bind

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import triton_tile as tile
from ...runtime.tensors import acc_dtype, empty_nchw, is_channels_last
from ...runtime.triton_support import (
    SIZES,
    CompileCase,
    check_plane,
    dense,
    meta,
    on_device,
    tile_sizes,
    tiling,
)
from ..segments import PIECE, Pieces, in_pieces, sorted_rows
from ..window_table.triton import segment_sum


@triton.jit
def _gather(table, row, c, C, U, mask, NHWC: tl.constexpr, ACC: tl.constexpr):
    none = ((row < 0) | (row >= U))[None, :]  # no such row: NaN, and nothing is read
    if NHWC:
        at = c[:, None] + row[None, :] * (2 * C)
    else:
        at = c[:, None] * U + row[None, :]
    value = tl.load(table + at, mask=mask & ~none, other=0.0).to(ACC)
    return tl.where(none, float("nan"), value)


@triton.jit(do_not_specialize=SIZES)
def indexed_apply_kernel(
    x, x_n, x_s, mean, rstd, per_image, table, out, mean2, rstd2, table2, out2, index,
    C, P, U, W, first,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    NHWC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # p counts output pixels; W is the output's width
    C, P = tile.sizes(C, P, UNIT, NHWC)
    n, c, p, mask = tile.position(C, P, first, BLOCK_C, BLOCK_P)
    source = tile.source_pixel(p, W, UPSAMPLE)
    row = tl.load(index + n * P + p, mask=p < P, other=0).to(tl.int64)
    value = tile.load(x, n, x_n, c, source, x_s, mask, UNIT, NHWC, ACC)
    m = tile.statistic(mean, n, per_image, c, C)
    r = tile.statistic(rstd, n, per_image, c, C)
    g = _gather(table, row, c, C, U, mask, NHWC, ACC)
    b = _gather(table, row, c + C, C, U, mask, NHWC, ACC)
    if PAIR:
        m2 = tile.statistic(mean2, n, per_image, c, C)
        r2 = tile.statistic(rstd2, n, per_image, c, C)
        g2 = _gather(table2, row, c, C, U, mask, NHWC, ACC)
        b2 = _gather(table2, row, c + C, C, U, mask, NHWC, ACC)
    tile.store_modulated(out, value, m, r, g, b, n, c, p, C, P, mask, SLOPE, NHWC)
    if PAIR:
        tile.store_modulated(out2, value, m2, r2, g2, b2, n, c, p, C, P, mask, SLOPE2, NHWC)


@triton.jit(do_not_specialize=SIZES)
def indexed_backward_kernel(
    x, x_n, x_s, mean, rstd, per_image, grad, grad_n, grad_s, out, out_n, out_s, table,
    mean2, rstd2, grad2, grad2_n, grad2_s, out2, out2_n, out2_s, table2, index,
    dx, partial, partial_s, C, P, U, W, first,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    SUMS: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # p counts input pixels; W is the input's width
    C, P = tile.sizes(C, P, UNIT, NHWC)
    n, c, p, mask = tile.position(C, P, first, BLOCK_C, BLOCK_P)
    value = tile.load(x, n, x_n, c, p, x_s, mask, UNIT, NHWC, ACC)
    r = tile.statistic(rstd, n, per_image, c, C)
    hat = (value - tile.statistic(mean, n, per_image, c, C)) * r
    if PAIR:
        r2 = tile.statistic(rstd2, n, per_image, c, C)
    total = tl.zeros_like(hat)
    pixels = 4 * P if UPSAMPLE else P
    for q in tl.static_range(4 if UPSAMPLE else 1):
        wide = tile.output_pixel(p, q, W, UPSAMPLE)
        row = tl.load(index + n * pixels + wide, mask=p < P, other=0).to(tl.int64)
        dz = tile.activation_gradient(
            grad, grad_n, grad_s, out, out_n, out_s, n, c, wide, mask, SLOPE, UNIT, NHWC, ACC
        )
        total += r * dz * (1.0 + _gather(table, row, c, C, U, mask, NHWC, ACC))
        if PAIR:
            dz = tile.activation_gradient(
                grad2, grad2_n, grad2_s, out2, out2_n, out2_s, n, c, wide, mask, SLOPE2, UNIT,
                NHWC, ACC,
            )
            total += r2 * dz * (1.0 + _gather(table2, row, c, C, U, mask, NHWC, ACC))
    tile.store(dx, total, n, c, p, C, P, mask, NHWC)
    if SUMS:
        tile.store_sums(total, hat, partial, partial_s, n, c, C, mask, NHWC)


@triton.jit(do_not_specialize=SIZES)
def table_gradient_kernel(
    x, x_n, x_s, mean, rstd, per_image, grad, grad_n, grad_s, out, out_n, out_s, order, pieces,
    partial, C, P, W, pixels,
    SLOPE: tl.constexpr, UPSAMPLE: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # pixels of a piece read one row of the table; p counts output pixels, W is the output's width
    C, _ = tile.sizes(C, P, UNIT, NHWC)
    piece = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, last = tl.load(pieces + piece), tl.load(pieces + piece + 1)
    dgamma = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    dbeta = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for at in range(start, last, BLOCK_P):
        i = at + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (i < last)[None, :]
        pixel = tl.load(order + i, mask=i < last, other=0)
        n, p = (pixel // pixels).to(tl.int64)[None, :], pixel % pixels
        source = tile.source_pixel(p, W, UPSAMPLE)
        channel = n * C * per_image + c[:, None]  # the pixels may belong to several images
        hat = tile.load(x, n, x_n, c, source, x_s, mask, UNIT, NHWC, ACC)
        hat -= tl.load(mean + channel, mask=mask, other=0.0)
        hat *= tl.load(rstd + channel, mask=mask, other=0.0)
        dz = tile.activation_gradient(
            grad, grad_n, grad_s, out, out_n, out_s, n, c, p, mask, SLOPE, UNIT, NHWC, ACC
        )
        dgamma += dz * hat
        dbeta += dz
    at = piece * (2 * C) + c
    tl.store(partial + at, tl.sum(dgamma, 1), mask=c < C)
    tl.store(partial + at + C, tl.sum(dbeta, 1), mask=c < C)


def _laid_out(table: Tensor, nhwc: bool) -> Tensor:
    return table.contiguous() if nhwc else table.t().contiguous()


def indexed_modulation_apply(
    input: Tensor, mean: Tensor, rstd: Tensor, index: Tensor, table: Tensor, mean_s: Tensor | None,
    rstd_s: Tensor | None, table_s: Tensor | None, slope: float, slope_s: float, upsample: bool,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    nhwc, up, pair = is_channels_last(input), 2 if upsample else 1, table_s is not None
    x, t, index = dense(input, nhwc), _laid_out(table, nhwc), index.contiguous()
    out = empty_nchw((n, c, h * up, w * up), input)
    out2 = torch.empty_like(out) if pair else input.new_empty(0)
    t2 = t if table_s is None else _laid_out(table_s, nhwc)
    tiles = tiling("indexed_apply", tile.APPLY, h * w * up * up, nhwc, x)
    with on_device(x):
        for first, grid in tiles.grids():
            indexed_apply_kernel[grid](
                x, *tiles.strides(x), mean, rstd, tile.per_image(mean), t, out,
                mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s, t2,
                out2 if pair else out, index, *tiles.sizes, table.shape[0], w * up, first,
                SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, **tiles.constants,
            )
    return out, out2


def _table_gradients(
    branches: list[tuple[Tensor, Tensor, Tensor, Tensor, float]], x: Tensor, index: Tensor,
    order: Pieces, nhwc: bool, upsample: bool,
) -> list[Tensor]:
    """Gradients (U, 2C) of each branch's table; a branch is (grad, output, mean, rstd, slope).

    Pixels are summed in two steps, pieces first, in a fixed order: the result is deterministic.
    """
    channels, pixels, width = x.shape[1], index[0].numel(), index.shape[2]
    block_c, block_p = tile_sizes(channels, PIECE, nhwc, tile.APPLY["tile"])
    partial = torch.empty(
        (order.pieces.numel() - 1, 2 * channels), dtype=acc_dtype(x), device=x.device
    )
    results = []
    for grad, output, mean, rstd, slope in branches:
        t = tiling("table_gradient", tile.APPLY, x.shape[2] * x.shape[3], nhwc, x, grad, output)
        t.constants.update(BLOCK_C=block_c, BLOCK_P=block_p)
        with on_device(x):
            table_gradient_kernel[(len(partial), triton.cdiv(channels, block_c))](
                x, *t.strides(x), mean, rstd, tile.per_image(mean), grad, *t.strides(grad),
                output, *t.strides(output), order.elements, order.pieces, partial, *t.sizes, width,
                pixels, SLOPE=slope, UPSAMPLE=upsample, **t.constants,
            )
        results.append(segment_sum(partial, None, order.firsts))
    return results


def indexed_modulation_backward(
    grad: Tensor, output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, index: Tensor,
    table: Tensor, grad_s: Tensor | None, output_s: Tensor | None, mean_s: Tensor | None,
    rstd_s: Tensor | None, table_s: Tensor | None, slope: float, slope_s: float, upsample: bool,
    sums: bool, *order: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = input.shape
    nhwc, pair = is_channels_last(input), table_s is not None
    x, dy, y = (dense(t, nhwc) for t in (input, grad, output))
    dy2, y2 = (
        s if t is None else dense(t, nhwc) for t, s in ((grad_s, dy), (output_s, y))
    )
    t, index = _laid_out(table, nhwc), index.contiguous()
    t2 = t if table_s is None else _laid_out(table_s, nhwc)
    mean2, rstd2 = mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s
    dx = empty_nchw((n, c, h, w), input)
    check_plane(index[0].numel())
    tiles = tiling("indexed_backward", tile.BACKWARD if nhwc else tile.BACKWARD_PLANES, h * w, nhwc,
                   x, dy, y, dy2, y2, widest=tile.SUMMED_CHANNELS)
    partial = tiles.partial_sums(x, sums)
    with on_device(x):
        for first, grid in tiles.grids():
            indexed_backward_kernel[grid](
                x, *tiles.strides(x), mean, rstd, tile.per_image(mean),
                dy, *tiles.strides(dy), y, *tiles.strides(y), t, mean2, rstd2,
                dy2, *tiles.strides(dy2), y2, *tiles.strides(y2), t2, index,
                dx, partial, partial.numel() // 2, *tiles.sizes, table.shape[0], w, first,
                SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, SUMS=sums,
                **tiles.constants,
            )
    found = Pieces(*order) if order else in_pieces(*sorted_rows([(index, table.shape[0])]))
    branches = [(dy, y, mean, rstd, slope), (dy2, y2, mean2, rstd2, slope_s)]
    tables = _table_gradients(
        branches if pair else branches[:1], x, index, found, nhwc, upsample
    )
    absent = torch.empty(0, dtype=acc_dtype(x), device=x.device)
    return dx, tables[0], tables[1] if pair else absent, tiles.total(partial)


def _compile_cases() -> list[CompileCase]:
    cases: list[CompileCase] = []
    single, low = torch.float32, torch.bfloat16
    for dtype, nhwc, c in ((single, False, 256), (low, False, 256), (single, True, 256),
                           (low, True, 256), (low, True, 280)):
        for upsample, pair in ((False, False), (True, True)):
            up = 2 if upsample else 1
            x = meta(2, c, 64, 64, dtype=dtype, nhwc=nhwc)
            y = meta(2, c, 64 * up, 64 * up, dtype=dtype, nhwc=nhwc)
            m, index = meta(2, c), meta(2, 64 * up, 64 * up, dtype=torch.int32)
            table = meta(1001, 2 * c)
            name = (f"{str(dtype).removeprefix('torch.')} {'rows' if nhwc else 'planes'} C={c}"
                    + " upsample pair" * pair)
            m2, table2, y2 = (m, table, y) if pair else (None, None, None)
            cases += [
                CompileCase(name, bind(indexed_modulation_apply, x, m, m, index, table, m2, m2,
                                       table2, 0.2, 1.0, upsample)),
                CompileCase(name, bind(indexed_modulation_backward, y, y, x, m, m, index, table,
                                       y2, y2, m2, m2, table2, 0.2, 1.0, upsample, True)),
            ]
    return cases


COMPILE_CASES = _compile_cases()
