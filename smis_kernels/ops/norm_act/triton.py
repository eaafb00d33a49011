"""GPU kernels of norm_act: tiles and layouts are those of modulation's kernels."""

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
    activate,
    load_tile,
    normalize,
    store_sums,
    store_tile,
    tile_at,
)


@triton.jit
def norm_act_kernel(
    x, x_n, x_s, mean, rstd, stat_n, residual, residual_n, residual_s, out, C, P,
    SLOPE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    n, c, p, mask = tile_at(C, P, BLOCK_C, BLOCK_P)
    features = load_tile(x, n, x_n, c, p, x_s, mask, ROWS, ACC)
    hat, _ = normalize(features, mean, rstd, n, stat_n, c, C)
    value = activate(hat, SLOPE)
    if ADD:
        value += load_tile(residual, n, residual_n, c, p, residual_s, mask, ROWS, ACC)
    store_tile(out, value, n, c, p, C, P, mask, ROWS)


@triton.jit
def norm_act_backward_kernel(
    grad, grad_n, grad_s, x, x_n, x_s, mean, rstd, stat_n, dx, partial, partial_s, C, P,
    SLOPE: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    n, c, p, mask = tile_at(C, P, BLOCK_C, BLOCK_P)
    features = load_tile(x, n, x_n, c, p, x_s, mask, ROWS, ACC)
    hat, r = normalize(features, mean, rstd, n, stat_n, c, C)
    dz = load_tile(grad, n, grad_n, c, p, grad_s, mask, ROWS, ACC)
    if SLOPE != 1.0:
        dz = tl.where(hat > 0, dz, dz * SLOPE)
    value = r * dz
    store_tile(dx, value, n, c, p, C, P, mask, ROWS)
    if SUMS:
        store_sums(value, hat, partial, partial_s, n, c, C, mask)


def norm_act(input: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None,
             slope: float) -> Tensor:
    n, c, h, w = input.shape
    rows = is_channels_last(input)
    x = dense(input, rows)
    r = x if residual is None else dense(residual, rows)
    out = empty_nchw((n, c, h, w), input)
    chosen = launch_setting("norm_act", x, rows, APPLY)
    blocks = tile_sizes(c, h * w, rows, chosen["tile"])
    with on_device(x):
        norm_act_kernel[tile_grid(n, c, h * w, blocks)](
            x, *strides(x, rows), mean, rstd, c if mean.shape[0] > 1 else 0,
            r, *strides(r, rows), out, c, h * w,
            SLOPE=slope, ADD=residual is not None, ROWS=rows, ACC=acc_type(x),
            BLOCK_C=blocks[0], BLOCK_P=blocks[1], num_warps=chosen["warps"],
        )
    return out


def norm_act_backward(grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, slope: float,
                      sums: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    rows = is_channels_last(input)
    x, dy = dense(input, rows), dense(grad, rows)
    dx = empty_nchw((n, c, h, w), input)
    chosen = launch_setting("norm_act_backward", x, rows, APPLY)
    blocks = tile_sizes(c, h * w, rows, chosen["tile"])
    grid = tile_grid(n, c, h * w, blocks)
    shape = (2, n, c, grid[0]) if sums else (0,)
    partial = torch.empty(shape, dtype=acc_dtype(x), device=x.device)
    with on_device(x):
        norm_act_backward_kernel[grid](
            dy, *strides(dy, rows), x, *strides(x, rows), mean, rstd,
            c if mean.shape[0] > 1 else 0, dx, partial, partial.numel() // 2, c, h * w,
            SLOPE=slope, SUMS=sums, ROWS=rows, ACC=acc_type(x), BLOCK_C=blocks[0],
            BLOCK_P=blocks[1], num_warps=chosen["warps"],
        )
    return dx, partial.sum(3) if sums else partial


def _compile_cases() -> list[CompileCase]:
    """What ``tools.kernel_report`` cross-compiles: (name, kernel, signature, constexprs, warps)."""
    cases = []
    for element, rows in (("fp32", False), ("bf16", False), ("bf16", True)):
        common: dict[str, object] = {
            "SLOPE": 0.0, "ACC": tl.float32, **case_blocks(rows, APPLY["tile"])
        }
        suffix = f"{element} {'channels_last' if rows else 'contiguous'}"
        for name, kernel, extra in (("norm_act", norm_act_kernel, {"ADD": True}),
                                    ("norm_act_backward", norm_act_backward_kernel,
                                     {"SUMS": True})):
            types = signature(kernel, element,
                              dict.fromkeys(("mean", "rstd", "partial"), "*fp32"))
            cases.append((f"{name} {suffix}", kernel, types, {**common, **extra}, APPLY["warps"]))
    return cases


COMPILE_CASES = _compile_cases()
