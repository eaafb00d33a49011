"""GPU kernels of modulation. Tiles are [BLOCK_C, BLOCK_P]; ROWS says which axis is dense in memory.

An operand's ``*_n`` is its batch stride and ``*_s`` the stride of the axis that is not dense.
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

APPLY = {"tile": 1024, "warps": 4}
BACKWARD = {"tile": 1024, "warps": 8}  # 4 warps spill where two outputs and upsampling meet
MOMENTS = {"tile": 4096, "warps": 8}
MOMENT_PROGRAMS = 2048  # several for each multiprocessor of the largest GPUs
MOMENT_CHUNKS = 64  # of one plane at the most: what one program merges


@triton.jit
def _offset(c, p, stride, ROWS: tl.constexpr):
    # [BLOCK_C, BLOCK_P] offsets inside one image
    if ROWS:
        return c[:, None] + p.to(tl.int64)[None, :] * stride
    return c[:, None] * stride + p[None, :]


@triton.jit
def load_tile(base, n, stride_n, c, p, stride, mask, ROWS: tl.constexpr, ACC: tl.constexpr):
    return tl.load(base + n * stride_n + _offset(c, p, stride, ROWS), mask=mask, other=0.0).to(ACC)


@triton.jit
def store_tile(base, value, n, c, p, channels, pixels, mask, ROWS: tl.constexpr):
    # outputs are dense: their strides follow from the shape
    stride = channels if ROWS else pixels
    offset = n * channels * pixels + _offset(c, p, stride, ROWS)
    tl.store(base + offset, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def tile_at(C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    # 64-bit: batch x channels x pixels exceeds 2^31 at sizes that fit one GPU. Pixels of one image
    # do not, and dividing them by the width is several times cheaper in 32 bits.
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    return n, c, p, (c < C)[:, None] & (p < P)[None, :]


@triton.jit
def normalize(x, mean, rstd, n, stat_n, c, C):
    m = tl.load(mean + n * stat_n + c, mask=c < C, other=0.0)[:, None]
    r = tl.load(rstd + n * stat_n + c, mask=c < C, other=0.0)[:, None]
    return (x - m) * r, r


@triton.jit
def activate(z, SLOPE: tl.constexpr):
    # NaN is not below zero, so it passes
    if SLOPE == 1.0:
        return z
    if SLOPE == 0.0:
        return tl.where(z < 0, 0.0, z)
    return tl.where(z < 0, z * SLOPE, z)


@triton.jit
def modulation_apply_kernel(
    x, x_n, x_s, mean, rstd, stat_n, gamma, gamma_n, gamma_s, beta, beta_n, beta_s, out,
    mean2, rstd2, gamma2, gamma2_n, gamma2_s, beta2, beta2_n, beta2_s, out2,
    C, W, P,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # p counts output pixels; W is the output's width
    n, c, p, mask = tile_at(C, P, BLOCK_C, BLOCK_P)
    if UPSAMPLE:
        source = (p // W // 2) * (W // 2) + (p % W) // 2
    else:
        source = p
    value = load_tile(x, n, x_n, c, source, x_s, mask, ROWS, ACC)
    hat, _ = normalize(value, mean, rstd, n, stat_n, c, C)
    g = load_tile(gamma, n, gamma_n, c, p, gamma_s, mask, ROWS, ACC)
    b = load_tile(beta, n, beta_n, c, p, beta_s, mask, ROWS, ACC)
    store_tile(out, activate(hat * (1.0 + g) + b, SLOPE), n, c, p, C, P, mask, ROWS)
    if PAIR:
        hat2, _ = normalize(value, mean2, rstd2, n, stat_n, c, C)
        g2 = load_tile(gamma2, n, gamma2_n, c, p, gamma2_s, mask, ROWS, ACC)
        b2 = load_tile(beta2, n, beta2_n, c, p, beta2_s, mask, ROWS, ACC)
        store_tile(out2, activate(hat2 * (1.0 + g2) + b2, SLOPE2), n, c, p, C, P, mask, ROWS)


@triton.jit
def activation_gradient(
    grad, grad_n, grad_s, out, out_n, out_s, n, c, p, mask, SLOPE: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):
    dz = load_tile(grad, n, grad_n, c, p, grad_s, mask, ROWS, ACC)
    if SLOPE != 1.0:
        y = load_tile(out, n, out_n, c, p, out_s, mask, ROWS, ACC)
        dz = tl.where(y > 0, dz, dz * SLOPE)
    return dz


@triton.jit
def _branch_gradients(
    grad, grad_n, grad_s, out, out_n, out_s, gamma, gamma_n, gamma_s, dgamma, dbeta, hat, rstd,
    n, c, p, C, P, mask, SLOPE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):
    dz = activation_gradient(
        grad, grad_n, grad_s, out, out_n, out_s, n, c, p, mask, SLOPE, ROWS, ACC
    )
    g = load_tile(gamma, n, gamma_n, c, p, gamma_s, mask, ROWS, ACC)
    store_tile(dbeta, dz, n, c, p, C, P, mask, ROWS)
    store_tile(dgamma, dz * hat, n, c, p, C, P, mask, ROWS)
    return rstd * dz * (1.0 + g)


@triton.jit
def store_sums(total, hat, partial, partial_s, n, c, C, mask):
    # [2, N, C, blocks]: summed afterwards in a fixed order, so the result is deterministic
    kept = tl.where(mask, total, 0.0)
    at = (n * C + c) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + at, tl.sum(kept, 1), mask=c < C)
    tl.store(partial + partial_s + at, tl.sum(kept * hat, 1), mask=c < C)


@triton.jit
def modulation_backward_kernel(
    x, x_n, x_s, mean, rstd, stat_n,
    grad, grad_n, grad_s, out, out_n, out_s, gamma, gamma_n, gamma_s, dgamma, dbeta,
    mean2, rstd2, grad2, grad2_n, grad2_s, out2, out2_n, out2_s, gamma2, gamma2_n, gamma2_s,
    dgamma2, dbeta2, dx, partial, partial_s,
    C, W, P,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # p counts input pixels; W is the input's width
    n, c, p, mask = tile_at(C, P, BLOCK_C, BLOCK_P)
    value = load_tile(x, n, x_n, c, p, x_s, mask, ROWS, ACC)
    hat, r = normalize(value, mean, rstd, n, stat_n, c, C)
    if PAIR:
        hat2, r2 = normalize(value, mean2, rstd2, n, stat_n, c, C)
    total = tl.zeros_like(hat)
    for q in tl.static_range(4 if UPSAMPLE else 1):
        if UPSAMPLE:
            wide = (2 * (p // W) + q // 2) * (2 * W) + 2 * (p % W) + q % 2
            pixels = 4 * P
        else:
            wide = p
            pixels = P
        total += _branch_gradients(
            grad, grad_n, grad_s, out, out_n, out_s, gamma, gamma_n, gamma_s, dgamma, dbeta, hat,
            r, n, c, wide, C, pixels, mask, SLOPE, ROWS, ACC,
        )
        if PAIR:
            total += _branch_gradients(
                grad2, grad2_n, grad2_s, out2, out2_n, out2_s, gamma2, gamma2_n, gamma2_s,
                dgamma2, dbeta2, hat2, r2, n, c, wide, C, pixels, mask, SLOPE2, ROWS, ACC,
            )
    store_tile(dx, total, n, c, p, C, P, mask, ROWS)
    if SUMS:
        store_sums(total, hat, partial, partial_s, n, c, C, mask)


@triton.jit
def channel_moments_kernel(
    x, x_n, x_s, mean, square, C, P, CHUNK,
    ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # mean and summed squared deviation of CHUNK pixels, tile by tile: no cancellation
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, P)
    average = tl.zeros((BLOCK_C,), ACC)
    spread = tl.zeros((BLOCK_C,), ACC)
    for first in range(start, stop, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (p < stop)[None, :]
        value = load_tile(x, n, x_n, c, p, x_s, mask, ROWS, ACC)
        count = tl.sum((p < stop).to(ACC), 0)
        own = tl.sum(value, 1) / count
        deviation = tl.where(mask, value - own[:, None], 0.0)
        share = count / (count + (first - start))
        delta = own - average
        average += delta * share
        spread += tl.sum(deviation * deviation, 1) + delta * delta * ((first - start) * share)
    at = (n * C + c) * tl.num_programs(0) + tl.program_id(0)
    tl.store(mean + at, average, mask=c < C)
    tl.store(square + at, spread, mask=c < C)


@triton.jit
def merge_moments_kernel(
    mean, square, out_mean, out_var, C, P, CHUNK, CHUNKS,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # (N * C, CHUNKS) means and summed squared deviations -> (N * C) means and variances
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_P)
    mask = (c < C)[:, None] & (t < CHUNKS)[None, :]
    at = c.to(tl.int64)[:, None] * CHUNKS + t[None, :]
    count = tl.where(t < CHUNKS, tl.minimum(P - t * CHUNK, CHUNK), 0).to(ACC)[None, :]
    means = tl.load(mean + at, mask=mask, other=0.0)
    average = tl.sum(means * (count / P), 1)
    delta = means - average[:, None]
    spread = tl.load(square + at, mask=mask, other=0.0) + count * delta * delta
    tl.store(out_mean + c, average, mask=c < C)
    tl.store(out_var + c, tl.sum(tl.where(mask, spread, 0.0), 1) / P, mask=c < C)


@triton.jit
def modulation_center_kernel(
    grad, grad_n, grad_s, x, x_n, x_s, mean, rstd, stat_n, shift, scale, dx, C, P,
    ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    n, c, p, mask = tile_at(C, P, BLOCK_C, BLOCK_P)
    value = load_tile(x, n, x_n, c, p, x_s, mask, ROWS, ACC)
    hat, _ = normalize(value, mean, rstd, n, stat_n, c, C)
    g = load_tile(grad, n, grad_n, c, p, grad_s, mask, ROWS, ACC)
    a = tl.load(shift + n * stat_n + c, mask=c < C, other=0.0)[:, None]
    b = tl.load(scale + n * stat_n + c, mask=c < C, other=0.0)[:, None]
    store_tile(dx, g - a - hat * b, n, c, p, C, P, mask, ROWS)


def channel_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    rows, pixels = is_channels_last(input), h * w
    x = dense(input, rows)
    chosen = launch_setting("channel_moments", x, rows, MOMENTS)
    blocks = tile_sizes(c, pixels, rows, chosen["tile"])
    tiles, groups, _ = tile_grid(n, c, pixels, blocks)
    chunks = min(tiles, triton.cdiv(MOMENT_PROGRAMS, n * groups), MOMENT_CHUNKS)
    chunk = triton.cdiv(tiles, chunks) * blocks[1]
    chunks = triton.cdiv(pixels, chunk)
    means, squares = (
        torch.empty((n, c, chunks), dtype=acc_dtype(x), device=x.device) for _ in range(2)
    )
    mean, var = (torch.empty((n, c), dtype=acc_dtype(x), device=x.device) for _ in range(2))
    block_t = triton.next_power_of_2(chunks)
    block_c = max(1, 1024 // block_t)
    with on_device(x):
        channel_moments_kernel[(chunks, groups, n)](
            x, *strides(x, rows), means, squares, c, pixels, chunk,
            ROWS=rows, ACC=acc_type(x), BLOCK_C=blocks[0], BLOCK_P=blocks[1],
            num_warps=chosen["warps"],
        )
        merge_moments_kernel[(triton.cdiv(n * c, block_c),)](
            means, squares, mean, var, n * c, pixels, chunk, chunks,
            ACC=acc_type(x), BLOCK_C=block_c, BLOCK_P=block_t, num_warps=4,
        )
    return mean, var


def modulation_apply(
    input: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, mean_s: Tensor | None,
    rstd_s: Tensor | None, gamma_s: Tensor | None, beta_s: Tensor | None, slope: float,
    slope_s: float, upsample: bool,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    rows, up, pair = is_channels_last(input), 2 if upsample else 1, gamma_s is not None
    x, g, b = (dense(t, rows) for t in (input, gamma, beta))
    g2, b2 = (dense(t, rows) if t is not None else s for t, s in ((gamma_s, g), (beta_s, b)))
    out = empty_nchw((n, c, h * up, w * up), input)
    out2 = torch.empty_like(out) if pair else input.new_empty(0)
    pixels = h * w * up * up
    chosen = launch_setting("modulation_apply", x, rows, APPLY)
    blocks = tile_sizes(c, pixels, rows, chosen["tile"])
    with on_device(x):
        modulation_apply_kernel[tile_grid(n, c, pixels, blocks)](
            x, *strides(x, rows), mean, rstd, c if mean.shape[0] > 1 else 0,
            g, *strides(g, rows), b, *strides(b, rows), out,
            mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s,
            g2, *strides(g2, rows), b2, *strides(b2, rows), out2 if pair else out,
            c, w * up, pixels,
            SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, ROWS=rows, ACC=acc_type(x),
            BLOCK_C=blocks[0], BLOCK_P=blocks[1], num_warps=chosen["warps"],
        )
    return out, out2


def modulation_backward(
    grad: Tensor, output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor,
    grad_s: Tensor | None, output_s: Tensor | None, mean_s: Tensor | None, rstd_s: Tensor | None,
    gamma_s: Tensor | None, slope: float, slope_s: float, upsample: bool, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = input.shape
    rows, up, pair = is_channels_last(input), 2 if upsample else 1, gamma_s is not None
    x, dy, y, g = (dense(t, rows) for t in (input, grad, output, gamma))
    dy2, y2, g2 = (
        dense(t, rows) if t is not None else s
        for t, s in ((grad_s, dy), (output_s, y), (gamma_s, g))
    )
    dx = empty_nchw((n, c, h, w), input)
    dgamma, dbeta, *second = (
        empty_nchw((n, c, h * up, w * up), input) for _ in range(4 if pair else 2)
    )
    dgamma2, dbeta2 = second or (dgamma, dbeta)
    check_plane(h * w * up * up)
    chosen = launch_setting("modulation_backward", x, rows, BACKWARD)
    blocks = tile_sizes(c, h * w, rows, chosen["tile"])
    grid = tile_grid(n, c, h * w, blocks)
    partial = torch.empty((2, n, c, grid[0]) if sums else (0,), dtype=acc_dtype(x), device=x.device)
    with on_device(x):
        modulation_backward_kernel[grid](
            x, *strides(x, rows), mean, rstd, c if mean.shape[0] > 1 else 0,
            dy, *strides(dy, rows), y, *strides(y, rows), g, *strides(g, rows), dgamma, dbeta,
            mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s,
            dy2, *strides(dy2, rows), y2, *strides(y2, rows), g2, *strides(g2, rows),
            dgamma2, dbeta2, dx, partial, partial.numel() // 2,
            c, w, h * w,
            SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, SUMS=sums, ROWS=rows,
            ACC=acc_type(x), BLOCK_C=blocks[0], BLOCK_P=blocks[1], num_warps=chosen["warps"],
        )
    total = partial.sum(3) if sums else partial
    if not pair:
        dgamma2, dbeta2 = input.new_empty(0), input.new_empty(0)
    return dx, dgamma, dbeta, dgamma2, dbeta2, total


def modulation_center(
    grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    n, c, h, w = input.shape
    rows = is_channels_last(input)
    x, g = dense(input, rows), dense(grad, rows)
    dx = empty_nchw((n, c, h, w), input)
    chosen = launch_setting("modulation_center", x, rows, APPLY)
    blocks = tile_sizes(c, h * w, rows, chosen["tile"])
    with on_device(x):
        modulation_center_kernel[tile_grid(n, c, h * w, blocks)](
            g, *strides(g, rows), x, *strides(x, rows), mean, rstd,
            c if mean.shape[0] > 1 else 0, shift, scale, dx, c, h * w,
            ROWS=rows, ACC=acc_type(x), BLOCK_C=blocks[0], BLOCK_P=blocks[1],
            num_warps=chosen["warps"],
        )
    return dx


def _compile_cases() -> list[CompileCase]:
    """What ``tools.kernel_report`` cross-compiles: (name, kernel, signature, constexprs, warps)."""
    statistics = dict.fromkeys(
        ("mean", "rstd", "mean2", "rstd2", "shift", "scale", "partial", "square"), "*fp32")
    counts = {"CHUNK": "i32:16", "CHUNKS": "i32"}
    cases: list[CompileCase] = []
    for element, rows in (("fp32", False), ("bf16", False), ("bf16", True)):
        layout = "channels_last" if rows else "contiguous"

        def case(name: str, kernel: triton.JITFunction, usual: dict[str, int],
                 suffix: str, **constants: object) -> CompileCase:
            types = signature(kernel, element, {**statistics, **counts})  # noqa: B023
            blocks = case_blocks(rows, usual["tile"])  # noqa: B023
            return (f"{name} {suffix}", kernel, types,
                    {"ACC": tl.float32, **blocks, **constants}, usual["warps"])

        for both in (False, True):
            suffix = f"{element} {layout}" + (" upsample pair" if both else "")
            branches = {"SLOPE": 0.2, "SLOPE2": 1.0, "UPSAMPLE": both, "PAIR": both}
            cases += [
                case("modulation_apply", modulation_apply_kernel, APPLY, suffix, **branches),
                case("modulation_backward", modulation_backward_kernel, BACKWARD, suffix,
                     SUMS=True, **branches),
            ]
        suffix = f"{element} {layout}"
        cases += [
            case("modulation_center", modulation_center_kernel, APPLY, suffix),
            case("channel_moments", channel_moments_kernel, MOMENTS, suffix),
        ]
    types = signature(merge_moments_kernel, "fp32", counts)
    constants: dict[str, object] = {"ACC": tl.float32, "BLOCK_C": 16, "BLOCK_P": MOMENT_CHUNKS}
    return [*cases, ("merge_moments", merge_moments_kernel, types, constants, 4)]


COMPILE_CASES = _compile_cases()
