"""GPU kernels of window tables: products with gathered rows, their gradients, sums of rows."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.constants import constant
from ...runtime.triton_support import (
    SIZES,
    CompileCase,
    acc_type,
    known_row,
    meta,
    narrowed,
    on_device,
    product,
    product_precision,
    tf32,
)
from ...runtime.tuned import setting
from ..segments import of_windows, sorted_rows, window_index

# Of a product's tile, by how it is made. A weight of 16 bits is exact in TF32.
PRODUCT = {
    "tf32": {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3},
    "tf32x3": {"rows": 64, "columns": 64, "depth": 32, "warps": 8, "stages": 3},
    "ieee": {"rows": 64, "columns": 64, "depth": 16, "warps": 8, "stages": 3},
}
TILE = 2048
# Programs that fill a GPU. Where a gradient's product has fewer tiles its sums are cut in parts, of
# so many rows at the least, which are added afterwards, in a fixed order.
PROGRAMS, LEAST_ROWS = 256, 256


@triton.jit
def _wide_offsets(block, SIZE: tl.constexpr):
    # 64-bit: rows x nine taps x channels exceeds 2^31 on large maps
    return block.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit(do_not_specialize=SIZES)
def window_product_kernel(
    hidden, weight, bias, windows, out, rows, sources, depth, width, sections, groups,
    ONE_LEVEL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Tiles of H W_t: one tap for each row of H, or the sum over the taps of each window.

    hidden (V, groups * depth); weight (9, depth, sections * width), where section i reads group
    i % groups of hidden. out is (V, 9, columns), or (U, columns) with ONE_LEVEL.
    """
    blocks = tl.cdiv(width, BLOCK_C)
    section = tl.program_id(1) // blocks
    columns = sections * width
    r = _wide_offsets(tl.program_id(0), BLOCK_R)
    c = tl.program_id(1) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    column = section * width + c
    base = hidden + section % groups * depth
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    steps = tl.cdiv(depth, BLOCK_K)
    # one loop over taps and depth: the loads of the next step overlap across taps too
    for step in range(9 * steps if ONE_LEVEL else steps):
        k = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        if ONE_LEVEL:
            tap = step // steps
            row = known_row(tl.load(windows + r * 9 + tap, mask=r < rows, other=0), sources)
        else:
            tap = tl.program_id(2)
            row = r
        a = tl.load(base + row[:, None] * (groups * depth) + k[None, :],
                    mask=(r < rows)[:, None] & (k < depth)[None, :], other=0.0)
        b = tl.load(weight + (tap * depth + k)[:, None] * columns + column[None, :],
                    mask=(k < depth)[:, None] & (c < width)[None, :], other=0.0)
        total = product(a, b.to(ACC), total, PRECISION, ACC)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    if ONE_LEVEL:
        total += tl.load(bias + column, mask=c < width, other=0.0)[None, :]
        total = tl.where((r > 0)[:, None], total, 0.0)
        at = r[:, None] * columns + column[None, :]
    else:
        at = (r * 9 + tl.program_id(2))[:, None] * columns + column[None, :]
    tl.store(out + at, narrowed(total, out), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def window_sum_kernel(
    source, windows, bias, out, rows, sources, channels,
    BIAS: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # source (sources, 9, C) -> out (V, C)
    r = _wide_offsets(tl.program_id(0), BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = ((r > 0) & (r < rows))[:, None] & (c < channels)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    if BIAS:
        total += tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    for tap in tl.static_range(9):
        row = known_row(tl.load(windows + r * 9 + tap, mask=r < rows, other=0), sources)
        at = (row * 9 + tap)[:, None] * channels + c[None, :]
        total += tl.load(source + at, mask=mask, other=0.0).to(ACC)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN passes
    total = tl.where((r > 0)[:, None], total, 0.0)
    tl.store(out + r[:, None] * channels + c[None, :], narrowed(total, out),
             mask=(r < rows)[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=(*SIZES, "taps"))
def hidden_gradient_kernel(
    scattered, weight, out, rows, depth, width, sections, groups, taps,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles of the sum of T_t W_t^T over ``taps`` taps a program: gradients of hidden rows.

    scattered (V, 9, sections * width); weight (9, sections * width, depth), where section i is of
    group i % groups; out (parts, V, groups * depth).
    """
    blocks = tl.cdiv(depth, BLOCK_C)
    group = tl.program_id(1) // blocks
    columns = sections * width
    r = _wide_offsets(tl.program_id(0), BLOCK_R)
    c = tl.program_id(1) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    halves, steps = sections // groups, tl.cdiv(width, BLOCK_K)
    for step in range(taps * halves * steps):
        k = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        part = step // steps
        tap = tl.program_id(2) * taps + part // halves
        column = (part % halves * groups + group) * width + k
        a = tl.load(scattered + (r * 9 + tap)[:, None] * columns + column[None, :],
                    mask=(r < rows)[:, None] & (k < width)[None, :], other=0.0)
        b = tl.load(weight + (tap * columns + column)[:, None] * depth + c[None, :],
                    mask=(k < width)[:, None] & (c < depth)[None, :], other=0.0)
        if PRECISION == "tf32":
            b = tf32(b)
        total = product(a, b, total, PRECISION, ACC)
    at = (tl.program_id(2) * rows + r)[:, None] * (groups * depth) + group * depth + c[None, :]
    tl.store(out + at, total, mask=(r < rows)[:, None] & (c < depth)[None, :])


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    scattered, hidden, out, rows, depth, width, sections, groups, chunk,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles of T_t^T H over ``chunk`` rows a program: gradients of the weights of a tap.

    scattered (V, 9, sections * width); hidden (V, groups * depth), where section i reads group
    i % groups; out (parts, 9, sections * width, depth).
    """
    blocks, columns = tl.cdiv(width, BLOCK_R), sections * width
    tile = tl.program_id(0)
    section, tap = tile // blocks % sections, tile // blocks // sections
    m = tile % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = hidden + section % groups * depth
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    first = tl.program_id(2).to(tl.int64) * chunk
    last = tl.minimum(first + chunk, rows)
    for start in range(first, last, BLOCK_K):
        v = start + tl.arange(0, BLOCK_K)
        a = tl.load(scattered + (v * 9 + tap)[:, None] * columns + (section * width + m)[None, :],
                    mask=(v < last)[:, None] & (m < width)[None, :], other=0.0)
        b = tl.load(base + v[:, None] * (groups * depth) + c[None, :],
                    mask=(v < last)[:, None] & (c < depth)[None, :], other=0.0)
        if PRECISION == "tf32":
            b = tf32(b)
        total = product(tl.trans(a), b, total, PRECISION, ACC)
    at = ((tl.program_id(2) * 9 + tap) * columns + section * width + m).to(tl.int64)
    tl.store(out + at[:, None] * depth + c[None, :], total,
             mask=(m < width)[:, None] & (c < depth)[None, :])


@triton.jit
def segment_sum_kernel(
    source, order, bounds, out, channels,
    GATHER: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """out[s] = the sum of source[order[i]] over bounds[s] <= i < bounds[s + 1], in this order."""
    segment = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(first, last, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        row = tl.load(order + i, mask=i < last, other=0) if GATHER else i
        total += tl.load(source + row.to(tl.int64)[:, None] * channels + c[None, :],
                         mask=(i < last)[:, None] & (c < channels)[None, :], other=0.0).to(ACC)
    tl.store(out + segment * channels + c, narrowed(tl.sum(total, 0), out),
             mask=c < channels)


def _tile(channels: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_C): channels are dense, rows fill the tile."""
    block_c = min(triton.next_power_of_2(channels), 128)
    return TILE // block_c, block_c


def segment_sum(source: Tensor, order: Tensor | None, bounds: Tensor) -> Tensor:
    """Sums of rows of ``source`` (R, C) over segments of ``order`` (of all rows where None)."""
    source = source.contiguous()
    segments, channels = bounds.numel() - 1, source.shape[1]
    out = source.new_empty((segments, channels))
    # short segments abound: fewer rows at a time than the other kernels
    block_r, block_c = 8, _tile(channels)[1]
    with on_device(source):
        segment_sum_kernel[(segments, triton.cdiv(channels, block_c))](
            source, bounds if order is None else order, bounds, out, channels,
            GATHER=order is not None, ACC=acc_type(source), BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=4,
        )
    return out


def _product(
    hidden: Tensor, weight: Tensor, bias: Tensor, windows: Tensor, groups: int, one_level: bool,
    dtype: torch.dtype,
) -> Tensor:
    depth, columns = weight.shape[1:]
    # the two halves read the same hidden rows: without groups they are one section
    sections = 1 if groups == 1 else 2 * groups
    width = columns // sections
    rows = windows.shape[0] if one_level else hidden.shape[0]
    out = hidden.new_empty((rows, columns) if one_level else (rows, 9, columns), dtype=dtype)
    precision = "tf32" if weight.dtype != hidden.dtype else product_precision(hidden)
    key = f"{precision} {'one level' if one_level else 'two levels'}"
    chosen = setting("window_product", key, PRODUCT[precision], hidden.device)
    block_c = min(max(triton.next_power_of_2(width), 16), chosen["columns"])
    grid = (triton.cdiv(rows, chosen["rows"]), sections * triton.cdiv(width, block_c),
            1 if one_level else 9)
    with on_device(hidden):
        window_product_kernel[grid](
            hidden, weight, bias, windows, out, rows, hidden.shape[0], depth, width, sections,
            groups, ONE_LEVEL=one_level, PRECISION=precision, ACC=acc_type(hidden),
            BLOCK_R=chosen["rows"], BLOCK_C=block_c, BLOCK_K=chosen["depth"],
            num_warps=chosen["warps"], num_stages=chosen["stages"],
        )
    return out


def _packed(weights: tuple[Tensor, Tensor]) -> Tensor:
    """Two (C, K, 3, 3) weights as (9, K, 2C): read in place, a line would serve one float."""
    channels, depth = weights[0].shape[:2]
    packed = weights[0].new_empty((9, depth, 2, channels))
    for half, weight in enumerate(weights):
        packed[:, :, half].copy_(weight.reshape(channels, depth, 9).permute(2, 1, 0))
    return packed.view(9, depth, 2 * channels)


def window_table(
    hidden: Tensor, weight_gamma: Tensor, bias_gamma: Tensor, weight_beta: Tensor,
    bias_beta: Tensor, windows: Tensor, groups: int, one_level: bool,
) -> Tensor:
    hidden, windows = hidden.contiguous(), windows.contiguous()
    weights, biases = (weight_gamma, weight_beta), (bias_gamma, bias_beta)
    weight = constant("packed", partial(_packed, weights), *weights)
    bias = constant("gamma and beta", partial(torch.cat, biases), *biases)
    if one_level:
        return _product(hidden, weight, bias, windows, groups, True, weight.dtype)
    product = _product(hidden, weight, bias, windows, groups, False, hidden.dtype)
    return _summed(product, windows, bias, False, weight.dtype)


def window_sum(rows: Tensor, windows: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return _summed(rows, windows, bias, relu, rows.dtype)


def _summed(rows: Tensor, windows: Tensor, bias: Tensor | None, relu: bool,
            dtype: torch.dtype) -> Tensor:
    rows, windows = rows.contiguous(), windows.contiguous()
    count, channels = windows.shape[0], rows.shape[2]
    out = rows.new_empty((count, channels), dtype=dtype)
    block_r, block_c = _tile(channels)
    with on_device(rows):
        window_sum_kernel[(triton.cdiv(count, block_r), triton.cdiv(channels, block_c))](
            rows, windows, rows if bias is None else bias.contiguous(), out, count, rows.shape[0],
            channels, BIAS=bias is not None, RELU=relu, ACC=acc_type(rows), BLOCK_R=block_r,
            BLOCK_C=block_c, num_warps=4,
        )
    return out


def window_scatter(grad: Tensor, windows: Tensor, rows: int, kinds: None = None) -> Tensor:
    order = of_windows(*sorted_rows([window_index(windows, rows)]))
    return segment_sum(grad, *order).view(rows, 9, -1)


def _parts(programs: int, most: int) -> int:
    """In how many parts a sum is cut, so that its tiles are programs for the whole GPU."""
    return min(max(PROGRAMS // programs, 1), most)


def table_products(
    scattered: Tensor, hidden: Tensor, weight_gamma: Tensor, weight_beta: Tensor, groups: int,
    single: bool,
) -> tuple[Tensor, Tensor]:
    scattered, hidden = scattered.contiguous(), hidden.contiguous()
    rows, channels, depth = hidden.shape[0], *weight_gamma.shape[:2]
    sections = 1 if groups == 1 else 2 * groups
    width = 2 * channels // sections
    weight = weight_gamma.new_empty((9, 2, channels, depth))
    for half, own in enumerate((weight_gamma, weight_beta)):
        weight[:, half].copy_(own.reshape(channels, depth, 9).permute(2, 0, 1))
    precision = "tf32" if single else product_precision(hidden)
    tile = PRODUCT[precision]
    block_c = min(max(triton.next_power_of_2(depth), 16), tile["columns"])
    constants = {"PRECISION": precision, "ACC": acc_type(hidden), "BLOCK_R": tile["rows"],
                 "BLOCK_C": block_c, "BLOCK_K": tile["depth"], "num_warps": tile["warps"],
                 "num_stages": tile["stages"]}
    sizes = rows, depth, width, sections, groups
    blocks = triton.cdiv(depth, block_c)
    grid = triton.cdiv(rows, tile["rows"]), groups * blocks
    wanted = _parts(grid[0] * grid[1], 9)
    parts = next(number for number in (1, 3, 9) if number >= wanted)
    dhidden = hidden.new_empty((parts, *hidden.shape))
    tiles = 9 * sections * triton.cdiv(width, tile["rows"])
    cut = _parts(tiles * blocks, triton.cdiv(rows, LEAST_ROWS))
    chunk = triton.cdiv(triton.cdiv(rows, cut), tile["depth"]) * tile["depth"]
    cut = triton.cdiv(rows, chunk)
    dweight = hidden.new_empty((cut, 9, 2, channels, depth))
    with on_device(hidden):
        hidden_gradient_kernel[(*grid, parts)](scattered, weight, dhidden, *sizes, 9 // parts,
                                               **constants)
        weight_gradient_kernel[(tiles, blocks, cut)](scattered, hidden, dweight, *sizes, chunk,
                                                     **constants)
    dhidden, dweight = (t.sum(0) if len(t) > 1 else t[0] for t in (dhidden, dweight))
    shape = (2, *weight_gamma.shape)
    return dhidden, dweight.permute(1, 2, 3, 0).contiguous().view(shape)


def _compile_cases() -> list[CompileCase]:
    cases: list[CompileCase] = []
    windows = meta(1001, 9, dtype=torch.int32)
    products = (("tf32", torch.float32, torch.bfloat16, "tf32"),
                ("tf32x3", torch.float32, torch.float32, "tf32"),
                ("ieee", torch.float64, torch.float64, "f64"))
    for precision, dtype, kind, operands in products:
        for c, depth, groups in ((256, 128, 1), (48, 96, 6)):
            hidden, bias = meta(777, depth, dtype=dtype), meta(c, dtype=dtype)
            weight = meta(c, depth // groups, 3, 3, dtype=kind)
            for one_level in (True, False):
                name = f"{precision} {'one level' if one_level else 'two levels'} groups={groups}"
                cases.append(CompileCase(
                    name, partial(window_table, hidden, weight, bias, weight, bias, windows,
                                  groups, one_level), operands))
            wide = weight.to(dtype)
            cases.append(CompileCase(
                f"{precision} gradients groups={groups}",
                partial(table_products, meta(777, 9, 2 * c, dtype=dtype), hidden, wide, wide,
                        groups, precision == "tf32"), operands))
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        rows, bias = meta(777, 9, 256, dtype=dtype), meta(256, dtype=dtype)
        cases += [
            CompileCase(name, partial(window_sum, rows, windows, bias, True)),
            CompileCase(name, partial(window_scatter, meta(1001, 256, dtype=dtype), windows, 777)),
        ]
    return cases


COMPILE_CASES = _compile_cases()
