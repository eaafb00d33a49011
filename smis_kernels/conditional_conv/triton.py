"""GPU kernels of the conditional convolution: a tile of kernels is predicted by tensor-core
products, one per tap of the predictor, held in registers and used at once.

Weights are repacked to (9 applied taps, 9 predictor taps, D, C), so that every product reads a
dense (D, C) slice. Operands come with (n, c, y, x) strides: any layout. Every result is summed by
one program in a fixed order; no atomics.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import acc_dtype, empty_nchw

BLOCK_P, BLOCK_C, BLOCK_D = 64, 64, 32
WARPS = 8  # 4 spill: the 64-bit offsets of a tile take as many registers as its sums


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
    for t in range(9):
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            h = _load(COND, n, d, y + t // 3 - 1, x + t % 3 - 1, H, W, D, hn, hc, hy, hx, ok)
            w = tl.load(WEIGHT + ((k * 9 + t) * D + d)[:, None].to(tl.int64) * C + c[None, :],
                        mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
            kernels = tl.dot(h, w, kernels, input_precision=PRECISION, out_dtype=ACC)
    return kernels


@triton.jit
def conditional_conv_kernel(
    X, COND, WEIGHT, BIAS, Y, H, W, C, D, xn, xc, xy, xx, hn, hc, hy, hx, yn, yc, yy, yx,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    BIASED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """y(p) = sum of w_k(p) x(p + k); TRANSPOSED: y(p) = sum of w_k(p - k) x(p - k)."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
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
    tl.store(Y + offset, total.to(Y.dtype.element_ty), mask=ok[:, None] & (c < C)[None, :])


@triton.jit
def condition_gradient_kernel(
    G, X, WEIGHT, OUT, H, W, C, D, gn, gc, gy, gx, xn, xc, xy, xx, on, oc, oy, ox,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh(q) = sum over t, k of W_kt^T (dy(q - t) x(q - t + k))."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.program_id(2).to(tl.int64)
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
                total = tl.dot((grad * source).to(w.dtype), w, total, input_precision=PRECISION,
                               out_dtype=ACC)
    offset = (n * on + y * oy + x * ox)[:, None] + d[None, :] * oc
    tl.store(OUT + offset, total.to(OUT.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])


@triton.jit
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
            product = grad * source.to(ACC)
            bias += tl.sum(product, 0)
            h = _load(COND, n, d, y + t // 3 - 1, x + t % 3 - 1, H, W, D, hn, hc, hy, hx, ok)
            total = tl.dot(tl.trans(h), product.to(h.dtype), total, input_precision=PRECISION,
                           out_dtype=ACC)
    offset = ((k * 9 + t) * D + d)[:, None] * C + c[None, :]
    tl.store(DW + offset, total, mask=(d < D)[:, None] & (c < C)[None, :])
    if (t == 0) & (tl.program_id(1) == 0):
        tl.store(DB + c * 9 + k, bias, mask=c < C)


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _tile(half: bool) -> dict[str, int]:
    # without tensor cores, at full precision, a product's operands lie in registers too
    sizes = {"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C, "BLOCK_D": BLOCK_D}
    return sizes if half else {name: size // 2 for name, size in sizes.items()}


def _settings(x: Tensor) -> dict[str, Any]:
    wide, half = x.dtype == torch.float64, x.element_size() == 2
    return {**_tile(half), "ACC": tl.float64 if wide else tl.float32, "PRECISION": "ieee",
            "num_warps": WARPS}


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
    settings = _settings(x)
    grid = (triton.cdiv(h * w, settings["BLOCK_P"]), triton.cdiv(c, settings["BLOCK_C"]), n)
    with _on(x):
        conditional_conv_kernel[grid](
            x, condition, packed, packed if bias is None else bias, out, h, w, c,
            condition.shape[1], *x.stride(), *condition.stride(), *out.stride(),
            BIASED=bias is not None, TRANSPOSED=transposed, **settings)
    return out


def conditional_conv(input: Tensor, condition: Tensor, weight: Tensor,
                     bias: Tensor | None) -> Tensor:
    """Launch the forward kernel."""
    if input.numel() == 0:
        return empty_nchw(tuple(input.shape), input)
    return _apply(input, condition, _packed(weight), bias, input, False)


def conditional_conv_backward(
    grad: Tensor, input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None,
    need_input: bool, need_condition: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch a kernel for each gradient that is needed; the others are empty."""
    n, c, h, w = input.shape
    depth = condition.shape[1]
    packed, settings = _packed(weight), _settings(input)
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
    with _on(input):
        if need_condition:
            dcondition = empty_nchw(tuple(condition.shape), condition)
            grid = (triton.cdiv(h * w, settings["BLOCK_P"]),
                    triton.cdiv(depth, settings["BLOCK_D"]), n)
            condition_gradient_kernel[grid](
                grad, input, packed, dcondition, h, w, c, depth, *grad.stride(), *input.stride(),
                *dcondition.stride(), **settings)
        if need_weight:
            sums = input.new_empty(packed.shape, dtype=acc_dtype(input))
            bias_sums = input.new_empty(9 * c, dtype=acc_dtype(input))
            grid = (81, triton.cdiv(depth, settings["BLOCK_D"]),
                    triton.cdiv(c, settings["BLOCK_C"]))
            weight_gradient_kernel[grid](
                grad, input, condition, sums, bias_sums, n, h, w, c, depth, *grad.stride(),
                *input.stride(), *condition.stride(), **settings)
            dweight, dbias = _unpacked(sums).to(weight.dtype), bias_sums.to(weight.dtype)
    return dx, dcondition, dweight.contiguous(), dbias


def _compile_cases() -> list[tuple[object, ...]]:
    cases: list[tuple[object, ...]] = []
    sizes = dict.fromkeys(("H", "W", "C", "D"), "i64:16")

    def strides(*names: str) -> dict[str, str]:
        return {f"{name}{axis}": "i64" if axis == "c" else "i64:16"
                for name in names for axis in "ncyx"}

    for kind in ("fp32", "bf16", "fp16"):
        pointer = f"*{kind}"
        settings = {**_tile(kind != "fp32"), "ACC": tl.float32, "PRECISION": "ieee"}
        for transposed in (False, True):
            cases.append((
                f"conditional_conv{'_transposed' * transposed}_{kind}", conditional_conv_kernel,
                {**dict.fromkeys(("X", "COND", "WEIGHT", "BIAS", "Y"), pointer), **sizes,
                 **strides("x", "h", "y")},
                {**settings, "BIASED": True, "TRANSPOSED": transposed}, WARPS))
        cases.append((
            f"condition_gradient_{kind}", condition_gradient_kernel,
            {**dict.fromkeys(("G", "X", "WEIGHT", "OUT"), pointer), **sizes,
             **strides("g", "x", "o")}, settings, WARPS))
        cases.append((
            f"weight_gradient_{kind}", weight_gradient_kernel,
            {**dict.fromkeys(("G", "X", "COND"), pointer), "DW": "*fp32", "DB": "*fp32",
             "N": "i64", **sizes, **strides("g", "x", "h")}, settings, WARPS))
    return cases


COMPILE_CASES = _compile_cases()
