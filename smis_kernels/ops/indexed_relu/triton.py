"""GPU kernel of indexed_relu: modulation's tiles, each inside one part of the channels."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import triton_tile as tile
from ...runtime.tensors import empty_nchw, is_channels_last
from ...runtime.triton_support import (
    SIZES,
    CompileCase,
    batch_grids,
    dense,
    meta,
    on_device,
    tiling,
)


@triton.jit(do_not_specialize=SIZES)
def indexed_relu_kernel(
    x, x_n, x_s, table, columns, index, out, N, C, P, U, first,
    NHWC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # C counts the channels of a part; a row of the table is ``columns`` away from the next
    C, P = tile.sizes(C, P, UNIT, NHWC)
    groups = tl.cdiv(C, BLOCK_C)
    part = (tl.program_id(1) // groups).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(1) % groups).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64) + first
    mask = (c < C)[:, None] & (p < P)[None, :]
    row = tl.load(index + n * P + p, mask=p < P, other=0).to(tl.int64)
    source = part * C + c
    value = tile.load(x, n, x_n, source, p, x_s, mask, UNIT, NHWC, ACC)
    none = ((row < 0) | (row >= U))[None, :]  # no such row: NaN, and nothing is read
    added = tl.load(table + source[:, None] + row[None, :] * columns, mask=mask & ~none, other=0.0)
    value += tl.where(none, float("nan"), added.to(ACC))
    tile.store(out, tile.activate(value, 0.0), part * N + n, c, p, C, P, mask, NHWC)


def indexed_relu(input: Tensor, index: Tensor, table: Tensor, parts: int) -> Tensor:
    """Launch the kernel."""
    n, c, h, w = input.shape
    nhwc = is_channels_last(input)
    x, index = dense(input, nhwc), index.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    out = empty_nchw((parts * n, c // parts, h, w), input)
    t = tiling("indexed_relu", tile.APPLY, h * w, nhwc, x[:, : c // parts])
    with on_device(x):
        for first, grid in batch_grids(t.tiles, t.groups * parts, n):
            indexed_relu_kernel[grid](
                x, *t.strides(x), table, table.stride(0), index, out, n, *t.sizes, len(table),
                first, **t.constants,
            )
    return out


def _compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, nhwc in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        for depth, parts in ((128, 4), (128, 5)):
            x = meta(2, parts * depth, 64, 64, dtype=dtype, nhwc=nhwc)
            index = meta(2, 64, 64, dtype=torch.int32)
            table = meta(1001, parts * depth, dtype=dtype)
            name = f"{str(dtype).removeprefix('torch.')} {'rows' if nhwc else 'planes'} x{parts}"
            cases.append(CompileCase(name, partial(indexed_relu, x, index, table, parts)))
    return cases


COMPILE_CASES = _compile_cases()
