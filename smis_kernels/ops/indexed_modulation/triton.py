"""GPU kernels of indexed modulation: modulation's tiles, with gamma and beta gathered by index.

A table is (U, 2C) for row layout (channels-last) and its transpose for plane layout, so that
neighbours in a tile read neighbours in the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.tensors import acc_dtype, empty_nchw, is_channels_last
from ...runtime.triton_support import (
    CompileCase,
    acc_type,
    case_blocks,
    check_plane,
    dense,
    launch_setting,
    on_device,
    signature,
    strides,
    tile_grid,
    tile_sizes,
)
from ..modulation.triton import (
    APPLY,
    BACKWARD,
    activate,
    activation_gradient,
    load_tile,
    normalize,
    store_sums,
    store_tile,
    tile_at,
)
from ..window_table.triton import segment_sum, sorted_segments

PIECE = 64  # pixels whose gradients one program sums: a sky has thousands in one row


@triton.jit
def _gather(table, row, c, C, U, mask, ROWS: tl.constexpr, ACC: tl.constexpr):
    if ROWS:
        return tl.load(table + c[:, None] + row[None, :] * (2 * C), mask=mask, other=0.0).to(ACC)
    return tl.load(table + c[:, None] * U + row[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _modulate(hat, table, row, c, C, U, mask, SLOPE: tl.constexpr, ROWS: tl.constexpr,
              ACC: tl.constexpr):
    gamma = _gather(table, row, c, C, U, mask, ROWS, ACC)
    beta = _gather(table, row, c + C, C, U, mask, ROWS, ACC)
    return activate(hat * (1.0 + gamma) + beta, SLOPE)


@triton.jit
def indexed_apply_kernel(
    x, x_n, x_s, mean, rstd, stat_n, table, out, mean2, rstd2, table2, out2, index,
    C, U, W, P,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # p counts output pixels; W is the output's width
    n, c, p, mask = tile_at(C, P, BLOCK_C, BLOCK_P)
    if UPSAMPLE:
        source = (p // W // 2) * (W // 2) + (p % W) // 2
    else:
        source = p
    row = tl.load(index + n * P + p, mask=p < P, other=0).to(tl.int64)
    value = load_tile(x, n, x_n, c, source, x_s, mask, ROWS, ACC)
    hat, _ = normalize(value, mean, rstd, n, stat_n, c, C)
    y = _modulate(hat, table, row, c, C, U, mask, SLOPE, ROWS, ACC)
    store_tile(out, y, n, c, p, C, P, mask, ROWS)
    if PAIR:
        hat2, _ = normalize(value, mean2, rstd2, n, stat_n, c, C)
        y2 = _modulate(hat2, table2, row, c, C, U, mask, SLOPE2, ROWS, ACC)
        store_tile(out2, y2, n, c, p, C, P, mask, ROWS)


@triton.jit
def indexed_backward_kernel(
    x, x_n, x_s, mean, rstd, stat_n, grad, grad_n, grad_s, out, out_n, out_s, table,
    mean2, rstd2, grad2, grad2_n, grad2_s, out2, out2_n, out2_s, table2, index,
    dx, partial, partial_s,
    C, U, W, P,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # p counts input pixels; W is the input's width
    n, c, p, mask = tile_at(C, P, BLOCK_C, BLOCK_P)
    value = load_tile(x, n, x_n, c, p, x_s, mask, ROWS, ACC)
    hat, r = normalize(value, mean, rstd, n, stat_n, c, C)
    if PAIR:
        _, r2 = normalize(value, mean2, rstd2, n, stat_n, c, C)
    total = tl.zeros_like(hat)
    for q in tl.static_range(4 if UPSAMPLE else 1):
        if UPSAMPLE:
            wide = (2 * (p // W) + q // 2) * (2 * W) + 2 * (p % W) + q % 2
            pixels = 4 * P
        else:
            wide = p
            pixels = P
        row = tl.load(index + n * pixels + wide, mask=p < P, other=0).to(tl.int64)
        dz = activation_gradient(
            grad, grad_n, grad_s, out, out_n, out_s, n, c, wide, mask, SLOPE, ROWS, ACC
        )
        total += r * dz * (1.0 + _gather(table, row, c, C, U, mask, ROWS, ACC))
        if PAIR:
            dz = activation_gradient(
                grad2, grad2_n, grad2_s, out2, out2_n, out2_s, n, c, wide, mask, SLOPE2, ROWS, ACC
            )
            total += r2 * dz * (1.0 + _gather(table2, row, c, C, U, mask, ROWS, ACC))
    store_tile(dx, total, n, c, p, C, P, mask, ROWS)
    if SUMS:
        store_sums(total, hat, partial, partial_s, n, c, C, mask)


@triton.jit
def table_gradient_kernel(
    x, x_n, x_s, mean, rstd, stat_n, grad, grad_n, grad_s, out, out_n, out_s, order, pieces,
    partial, C, W, P,
    SLOPE: tl.constexpr, UPSAMPLE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # pixels of a piece read one row of the table; p counts output pixels, W is the output's width
    piece = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(pieces + piece), tl.load(pieces + piece + 1)
    dgamma = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    dbeta = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for start in range(first, last, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (i < last)[None, :]
        pixel = tl.load(order + i, mask=i < last, other=0)
        n, p = (pixel // P)[None, :], pixel % P
        if UPSAMPLE:
            source = (p // W // 2) * (W // 2) + (p % W) // 2
        else:
            source = p
        statistic = n * stat_n + c[:, None]  # the pixels may belong to several images
        hat = load_tile(x, n, x_n, c, source, x_s, mask, ROWS, ACC)
        hat -= tl.load(mean + statistic, mask=mask, other=0.0)
        hat *= tl.load(rstd + statistic, mask=mask, other=0.0)
        dz = activation_gradient(
            grad, grad_n, grad_s, out, out_n, out_s, n, c, p, mask, SLOPE, ROWS, ACC
        )
        dgamma += dz * hat
        dbeta += dz
    at = piece * (2 * C) + c
    tl.store(partial + at, tl.sum(dgamma, 1), mask=c < C)
    tl.store(partial + at + C, tl.sum(dbeta, 1), mask=c < C)


def _laid_out(table: Tensor, rows: bool) -> Tensor:
    return table.contiguous() if rows else table.t().contiguous()


def indexed_modulation_apply(
    input: Tensor, mean: Tensor, rstd: Tensor, index: Tensor, table: Tensor, mean_s: Tensor | None,
    rstd_s: Tensor | None, table_s: Tensor | None, slope: float, slope_s: float, upsample: bool,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    rows, up, pair = is_channels_last(input), 2 if upsample else 1, table_s is not None
    x, t = dense(input, rows), _laid_out(table, rows)
    out = empty_nchw((n, c, h * up, w * up), input)
    out2 = torch.empty_like(out) if pair else input.new_empty(0)
    pixels = h * w * up * up
    chosen = launch_setting("indexed_apply", x, rows, APPLY)
    blocks = tile_sizes(c, pixels, rows, chosen["tile"])
    with on_device(x):
        indexed_apply_kernel[tile_grid(n, c, pixels, blocks)](
            x, *strides(x, rows), mean, rstd, c if mean.shape[0] > 1 else 0, t, out,
            mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s,
            t if table_s is None else _laid_out(table_s, rows), out2 if pair else out,
            index.contiguous(), c, table.shape[0], w * up, pixels,
            SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, ROWS=rows, ACC=acc_type(x),
            BLOCK_C=blocks[0], BLOCK_P=blocks[1], num_warps=chosen["warps"],
        )
    return out, out2


def _table_gradients(
    branches: list[tuple[Tensor, Tensor, Tensor, Tensor, float]], x: Tensor, index: Tensor,
    count: int, rows: bool, upsample: bool,
) -> list[Tensor]:
    """Gradients (U, 2C) of each branch's table; a branch is (grad, output, mean, rstd, slope).

    Pixels are sorted by their row once and summed in two steps, pieces first: the order of sums
    is fixed, so the result is deterministic, and a row of many pixels has many programs.
    """
    channels, pixels, width = x.shape[1], index[0].numel(), index.shape[2]
    order, bounds = sorted_segments(index.flatten(), count)
    cuts = torch.arange(0, index.numel(), PIECE, device=index.device)
    pieces = torch.cat([bounds, cuts]).sort().values
    block_c, block_p = tile_sizes(channels, PIECE, rows, APPLY["tile"])
    partial = torch.empty(
        (pieces.numel() - 1, 2 * channels), dtype=acc_dtype(x), device=x.device
    )
    results = []
    for grad, output, mean, rstd, slope in branches:
        with on_device(x):
            table_gradient_kernel[(len(partial), triton.cdiv(channels, block_c))](
                x, *strides(x, rows), mean, rstd, channels if mean.shape[0] > 1 else 0,
                grad, *strides(grad, rows), output, *strides(output, rows), order, pieces,
                partial, channels, width, pixels,
                SLOPE=slope, UPSAMPLE=upsample, ROWS=rows, ACC=acc_type(x), BLOCK_C=block_c,
                BLOCK_P=block_p, num_warps=4,
            )
        results.append(segment_sum(partial, None, torch.searchsorted(pieces, bounds)))
    return results


def indexed_modulation_backward(
    grad: Tensor, output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, index: Tensor,
    table: Tensor, grad_s: Tensor | None, output_s: Tensor | None, mean_s: Tensor | None,
    rstd_s: Tensor | None, table_s: Tensor | None, slope: float, slope_s: float, upsample: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = input.shape
    rows, pair = is_channels_last(input), table_s is not None
    x, dy, y = (dense(t, rows) for t in (input, grad, output))
    dy2, y2 = (
        s if t is None else dense(t, rows) for t, s in ((grad_s, dy), (output_s, y))
    )
    t, index = _laid_out(table, rows), index.contiguous()
    t2 = t if table_s is None else _laid_out(table_s, rows)
    mean2, rstd2 = mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s
    dx = empty_nchw((n, c, h, w), input)
    check_plane(index[0].numel())
    chosen = launch_setting("indexed_backward", x, rows, BACKWARD)
    blocks = tile_sizes(c, h * w, rows, chosen["tile"])
    grid = tile_grid(n, c, h * w, blocks)
    partial = torch.empty((2, n, c, grid[0]) if sums else (0,), dtype=acc_dtype(x), device=x.device)
    with on_device(x):
        indexed_backward_kernel[grid](
            x, *strides(x, rows), mean, rstd, c if mean.shape[0] > 1 else 0,
            dy, *strides(dy, rows), y, *strides(y, rows), t, mean2, rstd2,
            dy2, *strides(dy2, rows), y2, *strides(y2, rows), t2, index,
            dx, partial, partial.numel() // 2, c, table.shape[0], w, h * w,
            SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, SUMS=sums, ROWS=rows,
            ACC=acc_type(x), BLOCK_C=blocks[0], BLOCK_P=blocks[1], num_warps=chosen["warps"],
        )
    branches = [(dy, y, mean, rstd, slope), (dy2, y2, mean2, rstd2, slope_s)]
    tables = _table_gradients(
        branches if pair else branches[:1], x, index, table.shape[0], rows, upsample
    )
    absent = torch.empty(0, dtype=acc_dtype(x), device=x.device)
    return dx, tables[0], tables[1] if pair else absent, partial.sum(3) if sums else partial


def _compile_cases() -> list[CompileCase]:
    """What ``tools.kernel_report`` cross-compiles: (name, kernel, signature, constexprs, warps)."""
    others = dict.fromkeys(("mean", "rstd", "mean2", "rstd2", "partial"), "*fp32") | {
        "index": "*i32", "order": "*i64", "pieces": "*i64", "U": "i32:16"}
    cases: list[CompileCase] = []
    for element, rows in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
        common: dict[str, object] = {"ACC": tl.float32, **case_blocks(rows, APPLY["tile"])}
        layout = "channels_last" if rows else "contiguous"
        for upsample, pair in ((False, False), (True, True)):
            branch: dict[str, object] = {**common, "SLOPE": 0.2, "UPSAMPLE": upsample}
            both = {**branch, "SLOPE2": 1.0, "PAIR": pair}
            piece = branch if rows else {
                **branch, "BLOCK_C": APPLY["tile"] // PIECE, "BLOCK_P": PIECE}
            suffix = f"{element} {layout}" + (" upsample" if upsample else "") + (
                " pair" if pair else "")
            cases += [
                (f"{name} {suffix}", kernel, signature(kernel, element, others), constants, warps)
                for name, kernel, constants, warps in (
                    ("indexed_apply", indexed_apply_kernel, both, 4),
                    ("indexed_backward", indexed_backward_kernel, {**both, "SUMS": True},
                     BACKWARD["warps"]),
                    ("table_gradient", table_gradient_kernel, piece, 4),
                )
            ]
    return cases


COMPILE_CASES = _compile_cases()
