"""GPU kernels of modulation: statistics, the pass over the features and its gradients."""

from __future__ import annotations

from collections.abc import Callable

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
    tiling,
)

MOMENT_PROGRAMS = 512  # about four for each multiprocessor, of 8 warps with four loads each
MOMENT_COLUMNS = 8  # channels that one program merges: a sector of float32


# Loads stand before the first store: behind it none may move, and all wait for memory together.
@triton.jit(do_not_specialize=SIZES)
def modulation_apply_kernel(
    x, x_n, x_s, mean, rstd, per_image, gamma, gamma_n, gamma_s, beta, beta_n, beta_s, out,
    mean2, rstd2, gamma2, gamma2_n, gamma2_s, beta2, beta2_n, beta2_s, out2,
    C, P, W, first,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    NHWC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # p counts output pixels; W is the output's width
    C, P = tile.sizes(C, P, UNIT, NHWC)
    n, c, p, mask = tile.position(C, P, first, BLOCK_C, BLOCK_P)
    source = tile.source_pixel(p, W, UPSAMPLE)
    value = tile.load(x, n, x_n, c, source, x_s, mask, UNIT, NHWC, ACC)
    g = tile.load(gamma, n, gamma_n, c, p, gamma_s, mask, UNIT, NHWC, ACC)
    b = tile.load(beta, n, beta_n, c, p, beta_s, mask, UNIT, NHWC, ACC)
    m = tile.statistic(mean, n, per_image, c, C)
    r = tile.statistic(rstd, n, per_image, c, C)
    if PAIR:
        g2 = tile.load(gamma2, n, gamma2_n, c, p, gamma2_s, mask, UNIT, NHWC, ACC)
        b2 = tile.load(beta2, n, beta2_n, c, p, beta2_s, mask, UNIT, NHWC, ACC)
        m2 = tile.statistic(mean2, n, per_image, c, C)
        r2 = tile.statistic(rstd2, n, per_image, c, C)
    tile.store_modulated(out, value, m, r, g, b, n, c, p, C, P, mask, SLOPE, NHWC)
    if PAIR:
        tile.store_modulated(out2, value, m2, r2, g2, b2, n, c, p, C, P, mask, SLOPE2, NHWC)


@triton.jit(do_not_specialize=SIZES)
def modulation_backward_kernel(
    x, x_n, x_s, mean, rstd, per_image,
    grad, grad_n, grad_s, out, out_n, out_s, gamma, gamma_n, gamma_s, dgamma, dbeta,
    mean2, rstd2, grad2, grad2_n, grad2_s, out2, out2_n, out2_s, gamma2, gamma2_n, gamma2_s,
    dgamma2, dbeta2, dx, partial, partial_s,
    C, P, W, first,
    SLOPE: tl.constexpr, SLOPE2: tl.constexpr, UPSAMPLE: tl.constexpr, PAIR: tl.constexpr,
    SUMS: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # p counts input pixels; W is the input's width
    C, P = tile.sizes(C, P, UNIT, NHWC)
    n, c, p, mask = tile.position(C, P, first, BLOCK_C, BLOCK_P)
    value = tile.load(x, n, x_n, c, p, x_s, mask, UNIT, NHWC, ACC)
    m = tile.statistic(mean, n, per_image, c, C)
    r = tile.statistic(rstd, n, per_image, c, C)
    hat = (value - m) * r
    if PAIR:
        m2 = tile.statistic(mean2, n, per_image, c, C)
        r2 = tile.statistic(rstd2, n, per_image, c, C)
        hat2 = (value - m2) * r2
    total = tl.zeros_like(hat)
    pixels = 4 * P if UPSAMPLE else P
    for q in tl.static_range(4 if UPSAMPLE else 1):
        wide = tile.output_pixel(p, q, W, UPSAMPLE)
        dz = tile.activation_gradient(
            grad, grad_n, grad_s, out, out_n, out_s, n, c, wide, mask, SLOPE, UNIT, NHWC, ACC
        )
        g = tile.load(gamma, n, gamma_n, c, wide, gamma_s, mask, UNIT, NHWC, ACC)
        if PAIR:
            dz2 = tile.activation_gradient(
                grad2, grad2_n, grad2_s, out2, out2_n, out2_s, n, c, wide, mask, SLOPE2, UNIT,
                NHWC, ACC,
            )
            g2 = tile.load(gamma2, n, gamma2_n, c, wide, gamma2_s, mask, UNIT, NHWC, ACC)
        total += r * dz * (1.0 + g)
        tile.store(dbeta, dz, n, c, wide, C, pixels, mask, NHWC)
        tile.store(dgamma, dz * hat, n, c, wide, C, pixels, mask, NHWC)
        if PAIR:
            total += r2 * dz2 * (1.0 + g2)
            tile.store(dbeta2, dz2, n, c, wide, C, pixels, mask, NHWC)
            tile.store(dgamma2, dz2 * hat2, n, c, wide, C, pixels, mask, NHWC)
    tile.store(dx, total, n, c, p, C, P, mask, NHWC)
    if SUMS:
        tile.store_sums(total, hat, partial, partial_s, n, c, C, mask, NHWC)


@triton.jit(do_not_specialize=SIZES)
def channel_moments_kernel(
    x, x_n, x_s, mean, square, C, P, first, steps,
    NHWC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Mean and summed squared deviation of ``steps`` tiles. Each slot of the tile follows its own
    # pixels about the first of them, so that nothing cancels; slots meet once, at the end.
    C, P = tile.sizes(C, P, UNIT, NHWC)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64) + first
    start = tl.program_id(0) * steps * BLOCK_P
    stop = tl.minimum(start + steps * BLOCK_P, P)
    whole = (stop - start) // BLOCK_P  # tiles without a pixel outside
    inside = (c < C)[:, None]
    p = start + tl.arange(0, BLOCK_P)
    pivot = tile.load(x, n, x_n, c, p, x_s, inside & (p < stop)[None, :], UNIT, NHWC, ACC)
    average = tl.zeros_like(pivot)
    spread = tl.zeros_like(pivot)
    seen = tl.full((1, 1), 1.0, ACC)
    for step in tl.range(1, whole, loop_unroll_factor=4):  # four loads are under way at once
        p = start + step * BLOCK_P + tl.arange(0, BLOCK_P)
        value = tile.load(x, n, x_n, c, p, x_s, inside, UNIT, NHWC, ACC) - pivot
        delta = value - average
        seen += 1.0
        average += delta * (1.0 / seen)
        spread += delta * (value - average)
    last = start + whole * BLOCK_P + tl.arange(0, BLOCK_P)
    more = last < stop
    count = whole + more.to(tl.int32)
    if start + whole * BLOCK_P < stop:
        mask = inside & more[None, :]
        value = tile.load(x, n, x_n, c, last, x_s, mask, UNIT, NHWC, ACC) - pivot
        delta = tl.where(mask, value - average, 0.0)
        average += delta * (1.0 / (whole + 1).to(ACC))
        spread += tl.where(mask, delta * (value - average), 0.0)
    share = count.to(ACC) / tl.sum(count, 0).to(ACC)
    center = pivot + average
    own = tl.sum(center * share[None, :], 1)
    own += tl.sum((center - own[:, None]) * share[None, :], 1)  # the first sum's rounding
    delta = center - own[:, None]
    at = (n * tl.num_programs(0) + tl.program_id(0)) * C + c
    tl.store(mean + at, own, mask=c < C)
    tl.store(square + at, tl.sum(spread + count.to(ACC)[None, :] * delta * delta, 1), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    mean, square, out_mean, out_var, N, C, P, chunk, chunks,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # (N, chunks, C) means and summed squared deviations -> (N, C) means and variances
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_P)
    inside = column < N * C
    mask = (t < chunks)[:, None] & inside[None, :]
    at = (column // C * chunks * C + column % C)[None, :] + (t.to(tl.int64) * C)[:, None]
    count = tl.where(t < chunks, tl.minimum(P - t * chunk, chunk), 0).to(ACC)[:, None]
    means = tl.load(mean + at, mask=mask, other=0.0)
    squares = tl.load(square + at, mask=mask, other=0.0)
    average = tl.sum(means * (count / P), 0)
    average += tl.sum(tl.where(mask, means - average[None, :], 0.0) * (count / P), 0)
    delta = means - average[None, :]
    spread = tl.where(mask, squares + count * delta * delta, 0.0)
    tl.store(out_mean + column, average, mask=inside)
    tl.store(out_var + column, tl.sum(spread, 0) / P, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def modulation_center_kernel(
    grad, grad_n, grad_s, x, x_n, x_s, mean, rstd, per_image, shift, scale, dx, C, P, first,
    NHWC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    C, P = tile.sizes(C, P, UNIT, NHWC)
    n, c, p, mask = tile.position(C, P, first, BLOCK_C, BLOCK_P)
    value = tile.load(x, n, x_n, c, p, x_s, mask, UNIT, NHWC, ACC)
    g = tile.load(grad, n, grad_n, c, p, grad_s, mask, UNIT, NHWC, ACC)
    hat = value - tile.statistic(mean, n, per_image, c, C)
    hat *= tile.statistic(rstd, n, per_image, c, C)
    a = tile.statistic(shift, n, per_image, c, C)
    b = tile.statistic(scale, n, per_image, c, C)
    tile.store(dx, g - a - hat * b, n, c, p, C, P, mask, NHWC)


def channel_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    nhwc, pixels = is_channels_last(input), h * w
    x = dense(input, nhwc)
    t = tiling("channel_moments", tile.APPLY, pixels, nhwc, x)
    steps = triton.cdiv(t.tiles, triton.cdiv(MOMENT_PROGRAMS, n * t.groups))
    chunks = triton.cdiv(t.tiles, steps)
    means, squares = (
        torch.empty((n, chunks, c), dtype=acc_dtype(x), device=x.device) for _ in range(2)
    )
    mean, var = (torch.empty((n, c), dtype=acc_dtype(x), device=x.device) for _ in range(2))
    with on_device(x):
        for first, (_, groups, images) in t.grids():
            channel_moments_kernel[(chunks, groups, images)](
                x, *t.strides(x), means, squares, *t.sizes, first, steps, **t.constants)
        merge_moments_kernel[(triton.cdiv(n * c, MOMENT_COLUMNS),)](
            means, squares, mean, var, n, c, pixels, steps * t.block_p, chunks,
            ACC=t.constants["ACC"], BLOCK_C=MOMENT_COLUMNS,
            BLOCK_P=triton.next_power_of_2(chunks), num_warps=4,
        )
    return mean, var


def modulation_apply(
    input: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, mean_s: Tensor | None,
    rstd_s: Tensor | None, gamma_s: Tensor | None, beta_s: Tensor | None, slope: float,
    slope_s: float, upsample: bool,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    nhwc, up, pair = is_channels_last(input), 2 if upsample else 1, gamma_s is not None
    x, g, b = (dense(t, nhwc) for t in (input, gamma, beta))
    g2, b2 = (dense(t, nhwc) if t is not None else s for t, s in ((gamma_s, g), (beta_s, b)))
    out = empty_nchw((n, c, h * up, w * up), input)
    out2 = torch.empty_like(out) if pair else input.new_empty(0)
    t = tiling("modulation_apply", tile.APPLY, h * w * up * up, nhwc, x, g, b, g2, b2)
    with on_device(x):
        for first, grid in t.grids():
            modulation_apply_kernel[grid](
                x, *t.strides(x), mean, rstd, tile.per_image(mean),
                g, *t.strides(g), b, *t.strides(b), out,
                mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s,
                g2, *t.strides(g2), b2, *t.strides(b2), out2 if pair else out,
                *t.sizes, w * up, first,
                SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, **t.constants,
            )
    return out, out2


def modulation_backward(
    grad: Tensor, output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor,
    grad_s: Tensor | None, output_s: Tensor | None, mean_s: Tensor | None, rstd_s: Tensor | None,
    gamma_s: Tensor | None, slope: float, slope_s: float, upsample: bool, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = input.shape
    nhwc, up, pair = is_channels_last(input), 2 if upsample else 1, gamma_s is not None
    x, dy, y, g = (dense(t, nhwc) for t in (input, grad, output, gamma))
    dy2, y2, g2 = (
        dense(t, nhwc) if t is not None else s
        for t, s in ((grad_s, dy), (output_s, y), (gamma_s, g))
    )
    dx = empty_nchw((n, c, h, w), input)
    dgamma, dbeta, *second = (
        empty_nchw((n, c, h * up, w * up), input) for _ in range(4 if pair else 2)
    )
    dgamma2, dbeta2 = second or (dgamma, dbeta)
    check_plane(h * w * up * up)
    t = tiling("modulation_backward", tile.BACKWARD if nhwc else tile.BACKWARD_PLANES, h * w, nhwc,
               x, dy, y, g, dy2, y2, g2, widest=tile.SUMMED_CHANNELS)
    partial = t.partial_sums(x, sums)
    with on_device(x):
        for first, grid in t.grids():
            modulation_backward_kernel[grid](
                x, *t.strides(x), mean, rstd, tile.per_image(mean),
                dy, *t.strides(dy), y, *t.strides(y), g, *t.strides(g), dgamma, dbeta,
                mean if mean_s is None else mean_s, rstd if rstd_s is None else rstd_s,
                dy2, *t.strides(dy2), y2, *t.strides(y2), g2, *t.strides(g2), dgamma2, dbeta2,
                dx, partial, partial.numel() // 2, *t.sizes, w, first,
                SLOPE=slope, SLOPE2=slope_s, UPSAMPLE=upsample, PAIR=pair, SUMS=sums,
                **t.constants,
            )
    if not pair:
        dgamma2, dbeta2 = input.new_empty(0), input.new_empty(0)
    return dx, dgamma, dbeta, dgamma2, dbeta2, t.total(partial)


def modulation_center(
    grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    n, c, h, w = input.shape
    nhwc = is_channels_last(input)
    x, g = dense(input, nhwc), dense(grad, nhwc)
    dx = empty_nchw((n, c, h, w), input)
    t = tiling("modulation_center", tile.APPLY, h * w, nhwc, x, g)
    with on_device(x):
        for first, grid in t.grids():
            modulation_center_kernel[grid](
                g, *t.strides(g), x, *t.strides(x), mean, rstd, tile.per_image(mean),
                shift, scale, dx, *t.sizes, first, **t.constants,
            )
    return dx


def _compile_cases() -> list[CompileCase]:
    cases: list[CompileCase] = []
    for dtype, nhwc in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        name = f"{str(dtype).removeprefix('torch.')} {'rows' if nhwc else 'planes'}"
        for c, size in ((256, 128), (280, 63)):

            def case(kind: str, function: Callable[..., object], up: int, pair: bool,
                     *rest: object) -> CompileCase:
                def draw(scale: int) -> Tensor:
                    return meta(2, c, size * scale, size * scale, dtype=dtype,  # noqa: B023
                                nhwc=nhwc)  # noqa: B023

                m = meta(2, c)  # noqa: B023
                second = (m, m, draw(up), draw(up)) if pair else (None,) * 4
                arguments = {
                    "apply": (draw(1), m, m, draw(up), draw(up), *second),
                    "backward": (draw(up), draw(up), draw(1), m, m, draw(up),
                                 *((draw(up), draw(up), m, m, draw(up)) if pair else (None,) * 5)),
                    "center": (draw(1), draw(1), m, m, m, m), "moments": (draw(1),),
                }[kind]
                suffix = " upsample pair" if pair else ""
                return CompileCase(f"{name} C={c}{suffix}",  # noqa: B023
                                   lambda: function(*arguments, *rest))

            for up, pair in ((1, False), (2, True)):
                cases += [
                    case("apply", modulation_apply, up, pair, 0.2, 1.0, up == 2),
                    case("backward", modulation_backward, up, pair, 0.2, 1.0, up == 2, True),
                ]
            cases += [case("center", modulation_center, 1, False),
                      case("moments", channel_moments, 1, False)]
    return cases


COMPILE_CASES = _compile_cases()
