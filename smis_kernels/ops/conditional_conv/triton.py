"""GPU kernels of the conditional convolution: a tile of kernels is predicted by tensor-core
products, one per tap of the predictor, held in registers and used at once.

Weights are repacked to (9 applied taps, 9 predictor taps, D, C), so that every product reads a
dense (D, C) slice. Operands come with (n, c, y, x) strides: any layout. Every result is summed by
one program in a fixed order; no atomics.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.constants import constant
from ...runtime.tensors import acc_dtype, empty_nchw
from ...runtime.triton_support import (
    CompileCase,
    acc_type,
    batch_grids,
    meta,
    narrowed,
    on_device,
    product,
    product_precision,
)
from ...runtime.tuned import Setting, setting


def _tile(pixels: int, channels: int, depth: int) -> Setting:
    # 4 warps spill: the 64-bit offsets of a tile take as many registers as its sums
    return {"pixels": pixels, "channels": channels, "depth": depth, "warps": 8, "stages": 3}


# By bytes of an element. 64 pixels and more run on Hopper's wgmma; float32 takes three products.
USUAL = {
    "conditional_conv": {2: _tile(128, 64, 32), 4: _tile(64, 32, 32), 8: _tile(32, 32, 16)},
    "condition_gradient": {2: _tile(64, 64, 32), 4: _tile(64, 32, 32), 8: _tile(32, 32, 16)},
    "weight_gradient": {2: _tile(64, 64, 32), 4: _tile(32, 32, 16), 8: _tile(32, 32, 16)},
}

# Channels and strides keep what their divisibility tells: loads along channels are joined by it.
UNSPECIALISED = ("first", "N", "H")


@triton.jit
def _load(base, n, c, y, x, H, W, C, sn, sc, sy, sx, ok):
    # [pixels, channels] of an operand, zeros outside
    inside = ok & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    offset = n * sn + y * sy + x * sx
    return tl.load(base + offset[:, None] + c[None, :] * sc,
                   mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _predict(COND, WEIGHT, BIAS, n, c, y, x, H, W, C, D, hn, hc, hy, hx, k, ok,
             BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
             ACC: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    # the predicted kernels at tap k: [BLOCK_P, BLOCK_C]
    kernels = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    if BIASED:
        kernels += tl.load(BIAS + c * 9 + k, mask=c < C, other=0.0).to(ACC)[None, :]
    steps = tl.cdiv(D, BLOCK_D)
    # one loop over taps and depth: the loads of the next step overlap across taps too
    for step in range(9 * steps):
        t = step // steps
        d = step % steps * BLOCK_D + tl.arange(0, BLOCK_D)
        h = _load(COND, n, d, y + t // 3 - 1, x + t % 3 - 1, H, W, D, hn, hc, hy, hx, ok)
        w = tl.load(WEIGHT + ((k * 9 + t) * D + d)[:, None].to(tl.int64) * C + c[None, :],
                    mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
        kernels = product(h, w, kernels, PRECISION, ACC)
    return kernels


@triton.jit(do_not_specialize=UNSPECIALISED)
def conditional_conv_kernel(
    X, COND, WEIGHT, BIAS, Y, first, H, W, C, D, xn, xc, xy, xx, hn, hc, hy, hx, yn, yc, yy, yx,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    BIASED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """y(p) = sum of w_k(p) x(p + k); TRANSPOSED: y(p) = sum of w_k(p - k) x(p - k)."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64) + first
    y, x, ok = p // W, p % W, p < H * W
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for k in range(9):
        if TRANSPOSED:
            ys, xs = y - (k // 3 - 1), x - (k % 3 - 1)
            at_y, at_x = ys, xs
        else:
            ys, xs = y + (k // 3 - 1), x + (k % 3 - 1)
            at_y, at_x = y, x
        kernels = _predict(COND, WEIGHT, BIAS, n, c, at_y, at_x, H, W, C, D, hn, hc, hy, hx, k, ok,
                           BLOCK_P, BLOCK_C, BLOCK_D, ACC, BIASED, PRECISION)
        total += kernels * _load(X, n, c, ys, xs, H, W, C, xn, xc, xy, xx, ok).to(ACC)
    offset = (n * yn + y * yy + x * yx)[:, None] + c[None, :] * yc
    tl.store(Y + offset, narrowed(total, Y), mask=ok[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=UNSPECIALISED)
def condition_gradient_kernel(
    G, X, WEIGHT, OUT, first, H, W, C, D, gn, gc, gy, gx, xn, xc, xy, xx, on, oc, oy, ox,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh(q) = sum over t, k of W_kt^T (dy(q - t) x(q - t + k))."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.program_id(2).to(tl.int64) + first
    y, x, ok = p // W, p % W, p < H * W
    total = tl.zeros((BLOCK_P, BLOCK_D), ACC)
    for t in range(9):
        ys, xs = y - (t // 3 - 1), x - (t % 3 - 1)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            grad = _load(G, n, c, ys, xs, H, W, C, gn, gc, gy, gx, ok).to(ACC)
            for k in range(9):
                source = _load(X, n, c, ys + k // 3 - 1, xs + k % 3 - 1, H, W, C, xn, xc, xy, xx,
                               ok).to(ACC)
                w = tl.load(WEIGHT + ((k * 9 + t) * D + d)[None, :] * C + c[:, None],
                            mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
                total = product(narrowed(grad * source, WEIGHT), w, total, PRECISION, ACC)
    offset = (n * on + y * oy + x * ox)[:, None] + d[None, :] * oc
    tl.store(OUT + offset, narrowed(total, OUT), mask=ok[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=UNSPECIALISED)
def weight_gradient_kernel(
    G, X, COND, DW, DB, N, H, W, C, D, gn, gc, gy, gx, xn, xc, xy, xx, hn, hc, hy, hx,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_kt = sum over pixels of h(p + t)^T (dy(p) x(p + k)); one program per (k, t) slice tile."""
    k, t = tl.program_id(0) // 9, tl.program_id(0) % 9
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_D, BLOCK_C), ACC)
    bias = tl.zeros((BLOCK_C,), ACC)
    for n in range(N):
        for p0 in range(0, H * W, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P).to(tl.int64)
            y, x, ok = p // W, p % W, p < H * W
            grad = _load(G, n, c, y, x, H, W, C, gn, gc, gy, gx, ok).to(ACC)
            source = _load(X, n, c, y + k // 3 - 1, x + k % 3 - 1, H, W, C, xn, xc, xy, xx, ok)
            both = grad * source.to(ACC)
            bias += tl.sum(both, 0)
            h = _load(COND, n, d, y + t // 3 - 1, x + t % 3 - 1, H, W, D, hn, hc, hy, hx, ok)
            total = product(tl.trans(h), narrowed(both, COND), total, PRECISION, ACC)
    offset = ((k * 9 + t) * D + d)[:, None] * C + c[None, :]
    tl.store(DW + offset, total, mask=(d < D)[:, None] & (c < C)[None, :])
    if (t == 0) & (tl.program_id(1) == 0):
        tl.store(DB + c * 9 + k, bias, mask=c < C)


def _blocks(chosen: Setting) -> dict[str, int]:
    return {"BLOCK_P": chosen["pixels"], "BLOCK_C": chosen["channels"], "BLOCK_D": chosen["depth"]}


def _settings(kernel: str, x: Tensor) -> dict[str, Any]:
    usual = USUAL[kernel][x.element_size()]
    chosen = setting(kernel, str(x.dtype).removeprefix("torch."), usual, x.device)
    return {**_blocks(chosen), "ACC": acc_type(x), "PRECISION": product_precision(x),
            "num_warps": chosen["warps"], "num_stages": chosen["stages"]}


def _packed(weight: Tensor) -> Tensor:
    """(9C, D, 3, 3) -> (applied tap, predictor tap, D, C)."""
    rows, depth = weight.shape[:2]
    return weight.reshape(rows // 9, 9, depth, 9).permute(1, 3, 2, 0).contiguous()


def _unpacked(packed: Tensor) -> Tensor:
    _, _, depth, channels = packed.shape
    return packed.permute(3, 0, 2, 1).reshape(9 * channels, depth, 3, 3)


def _apply(x: Tensor, condition: Tensor, packed: Tensor, bias: Tensor | None, like: Tensor,
           transposed: bool) -> Tensor:
    n, c, h, w = x.shape
    out = empty_nchw((n, c, h, w), like)
    settings = _settings("conditional_conv", x)
    tiles = triton.cdiv(h * w, settings["BLOCK_P"]), triton.cdiv(c, settings["BLOCK_C"])
    with on_device(x):
        for first, grid in batch_grids(*tiles, n):
            conditional_conv_kernel[grid](
                x, condition, packed, packed if bias is None else bias, out, first, h, w, c,
                condition.shape[1], *x.stride(), *condition.stride(), *out.stride(),
                BIASED=bias is not None, TRANSPOSED=transposed, **settings)
    return out


def conditional_conv(input: Tensor, condition: Tensor, weight: Tensor,
                     bias: Tensor | None) -> Tensor:
    """Launch the forward kernel."""
    if input.numel() == 0:
        return empty_nchw(tuple(input.shape), input)
    packed = constant("packed kernels", partial(_packed, weight), weight)
    return _apply(input, condition, packed, bias, input, False)


def conditional_conv_backward(
    grad: Tensor, input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None,
    need_input: bool, need_condition: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch a kernel for each gradient that is needed; the others are empty."""
    n, c, h, w = input.shape
    depth = condition.shape[1]
    packed = _packed(weight)
    dx, dcondition, dweight, dbias = (input.new_empty(0) for _ in range(4))
    if input.numel() == 0:
        return (
            empty_nchw((n, c, h, w), input) if need_input else dx,
            torch.zeros_like(condition) if need_condition else dcondition,
            torch.zeros_like(weight) if need_weight else dweight,
            weight.new_zeros(9 * c) if need_weight else dbias,
        )
    if need_input:
        dx = _apply(grad, condition, packed, bias, input, True)
    with on_device(input):
        if need_condition:
            dcondition = empty_nchw(tuple(condition.shape), condition)
            settings = _settings("condition_gradient", input)
            tiles = triton.cdiv(h * w, settings["BLOCK_P"]), triton.cdiv(depth, settings["BLOCK_D"])
            for first, grid in batch_grids(*tiles, n):
                condition_gradient_kernel[grid](
                    grad, input, packed, dcondition, first, h, w, c, depth, *grad.stride(),
                    *input.stride(), *dcondition.stride(), **settings)
        if need_weight:
            sums = input.new_empty(packed.shape, dtype=acc_dtype(input))
            bias_sums = input.new_empty(9 * c, dtype=acc_dtype(input))
            settings = _settings("weight_gradient", input)
            grid = (81, triton.cdiv(depth, settings["BLOCK_D"]),
                    triton.cdiv(c, settings["BLOCK_C"]))
            weight_gradient_kernel[grid](
                grad, input, condition, sums, bias_sums, n, h, w, c, depth, *grad.stride(),
                *input.stride(), *condition.stride(), **settings)
            dweight, dbias = _unpacked(sums).to(weight.dtype), bias_sums.to(weight.dtype)
    return dx, dcondition, dweight.contiguous(), dbias


def _compile_cases() -> list[CompileCase]:
    cases: list[CompileCase] = []
    products = {torch.float32: "tf32", torch.bfloat16: "bf16", torch.float16: "f16",
                torch.float64: "f64"}
    for dtype, operands in products.items():
        x, condition = (meta(2, c, 64, 64, dtype=dtype, nhwc=True) for c in (128, 64))
        weight, bias = meta(9 * 128, 64, 3, 3, dtype=dtype), meta(9 * 128, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        cases += [
            CompileCase(name, partial(conditional_conv, x, condition, weight, bias), operands),
            CompileCase(f"{name} backward", partial(
                conditional_conv_backward, x, x, condition, weight, bias, True, True, True),
                operands),
        ]
    return cases


COMPILE_CASES = _compile_cases()
