"""GPU kernels of the conditional convolution.

Forward and gradient of the input: a tile of kernels is predicted by tensor-core products, held in
registers and used at once, without atomics. Gradients of condition and weight: the gradient of the
predicted kernels is made slab by slab, in a scratch that stays in the L2 cache, for torch's conv.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.constants import constant
from ...runtime.tensors import acc_dtype, empty_nchw
from ...runtime.triton_support import (
    VECTOR,
    CompileCase,
    acc_type,
    batch_grids,
    check_plane,
    dense,
    meta,
    narrowed,
    on_device,
    product,
    tf32,
    tile_sizes,
)
from ...runtime.tuned import Setting, setting


def _tile(pixels: int, channels: int, depth: int, warps: int, stages: int) -> Setting:
    return {"pixels": pixels, "channels": channels, "depth": depth, "warps": warps,
            "stages": stages}


# By bytes of an element. 64 pixels and more run on Hopper's wgmma; a depth of 64 spills in 16 bits.
USUAL = {2: _tile(128, 128, 32, 8, 4), 4: _tile(64, 64, 32, 4, 3), 8: _tile(32, 32, 16, 8, 3)}
LEAST_PIXELS, LEAST_CHANNELS = 64, 64  # of a tile that is made smaller for the sake of others
PROGRAMS = 128  # that a launch should have, so that each processor of a large GPU has work
GRADIENT_TILE = 2048
SCRATCH = 20 * 2**20  # bytes of a slab

UNSPECIALISED = (
    "first", "H", "W", "C", "D", "start", "begin", "end", "rows",
    *(f"{name}{axis}" for name in "xhyg" for axis in "nyx"),
)


@triton.jit
def _inside(y, x, H, W, ok):
    """Bit 5 (dy + 2) + dx + 2: whether (y + dy, x + dx) lies in the image, for up to two pixels."""
    columns = tl.zeros_like(x)
    for i in tl.static_range(5):
        columns |= ((x + (i - 2) >= 0) & (x + (i - 2) < W)).to(tl.int32) << i
    bits = tl.zeros_like(x)
    for i in tl.static_range(5):
        within = ok & (y + (i - 2) >= 0) & (y + (i - 2) < H)
        bits |= tl.where(within, columns << (5 * i), 0)
    return bits


@triton.jit
def _is_inside(bits, dy, dx):
    return ((bits >> (5 * dy + dx + 12)) & 1) != 0

@triton.jit(do_not_specialize=UNSPECIALISED)
def conditional_conv_kernel(
    X, COND, WEIGHT, BIAS, Y, first, H, W, C, D, xn, xc, xy, xx, yn, yc, yy, yx, hn, hy, hx,
    UNIT: tl.constexpr, UNIT_D: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BIASED: tl.constexpr, TRANSPOSED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """y(p) = sum of w_k(p) x(p + k); TRANSPOSED: y(p) = sum of w_k(p - k) x(p - k).

    UNIT divides C and the strides of x and y, UNIT_D D and those of the condition, whose channels
    are dense: all come divided by it. WEIGHT is (9 applied taps, C, 9 predictor taps, PARTS, D),
    BIAS (9, C). WHOLE: C and D fill their blocks. ROWS: channels of x and y are dense.
    """
    channels, depth = C * UNIT, D * UNIT_D
    p0 = tl.program_id(0) * BLOCK_P
    p = p0 + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    n = tl.program_id(2).to(tl.int64) + first
    y, x = p // W, p % W
    bits = _inside(y, x, H, W, p < H * W)
    # 64 bits reach the first row of the tile, 32 bits the others from there
    top = p0 // W
    y -= top
    at_x = X + (n * xn + top.to(tl.int64) * xy) * UNIT
    at_y = Y + (n * yn + top.to(tl.int64) * yy) * UNIT
    at_h = COND + (n * hn + top.to(tl.int64) * hy) * UNIT_D
    in_x, in_y = c, c
    if not ROWS:
        in_x, in_y = c.to(tl.int64) * xc, c.to(tl.int64) * yc
    x_tile = ((y * xy + x * xx) * UNIT)[:, None] + in_x[None, :]
    h_tile = ((y * hy + x * hx) * UNIT_D)[:, None] + d[None, :]
    # depth is dense: wgmma reads TF32 operands along it alone
    w_tile = (c * (9 * PARTS * depth))[None, :] + d[:, None]
    some = (c < channels)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for k in range(9):
        ky, kx = k // 3 - 1, k % 3 - 1
        if TRANSPOSED:
            ky, kx = -ky, -kx
        kernels = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        if BIASED:
            kernels += tl.load(BIAS + k * channels + c, mask=c < channels,
                               other=0.0).to(ACC)[None, :]
        # one loop over taps and depth: the loads of the next step overlap across taps too
        for step in range(9 * tl.cdiv(depth, BLOCK_D)):
            t, d0 = step % 9, step // 9 * BLOCK_D
            ty, tx = t // 3 - 1, t % 3 - 1
            if TRANSPOSED:
                ty, tx = ty + ky, tx + kx
            rows = _is_inside(bits, ty, tx)[:, None]
            h_at = at_h + ((ty * hy + tx * hx) * UNIT_D + d0) + h_tile
            w_at = WEIGHT + (t * (PARTS * depth) + d0) + w_tile
            if WHOLE:
                h = tl.load(h_at, mask=rows, other=0.0)
                w = tl.load(w_at)
            else:
                deep = d0 + d < depth
                h = tl.load(h_at, mask=rows & deep[None, :], other=0.0)
                w = tl.load(w_at, mask=deep[:, None] & some, other=0.0)
            if PARTS == 2:  # float32 in two TF32 parts: three products, as accurate
                if WHOLE:
                    low = tl.load(w_at + depth)
                else:
                    low = tl.load(w_at + depth, mask=deep[:, None] & some, other=0.0)
                high = tf32(h)
                kernels = product(h - high, w, kernels, "tf32", ACC)
                kernels = tl.dot(high, low, kernels, input_precision="tf32", out_dtype=ACC)
                kernels = tl.dot(high, w, kernels, input_precision="tf32", out_dtype=ACC)
            else:
                kernels = product(h, w, kernels, "ieee", ACC)
        near = _is_inside(bits, ky, kx)[:, None]
        source = tl.load(at_x + (ky * xy + kx * xx) * UNIT + x_tile,
                         mask=near if WHOLE else near & some, other=0.0)
        total += kernels * source.to(ACC)
        WEIGHT += 9 * PARTS * depth * channels
    tl.store(at_y + ((y * yy + x * yx) * UNIT)[:, None] + in_y[None, :], narrowed(total, Y),
             mask=_is_inside(bits, 0, 0)[:, None] & some)


@triton.jit(do_not_specialize=UNSPECIALISED)
def kernel_gradient_kernel(
    G, X, OUT, first, H, W, C, start, begin, end, rows, gn, gy, gx, xn, xy, xx,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """dw_k(p) = dy(p) x(p + k) where begin <= y < end, else 0: (N, rows, W, 9, C), the first row of
    which is start.
    """
    channels = C * UNIT
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64) + first
    y, x = p // W + start, p % W
    ok = p < rows * W
    bits = _inside(y, x, H, W, ok & (y >= begin) & (y < end))
    some = (c < channels)[None, :]
    wide = y.to(tl.int64)
    grad = tl.load(G + ((n * gn + wide * gy + x * gx) * UNIT)[:, None] + c[None, :],
                   mask=_is_inside(bits, 0, 0)[:, None] & some, other=0.0).to(ACC)
    x_tile = X + ((n * xn + wide * xy + x * xx) * UNIT)[:, None] + c[None, :]
    out = OUT + ((n * rows * W + p) * (9 * channels))[:, None] + c[None, :]
    for k in tl.static_range(9):
        near = _is_inside(bits, k // 3 - 1, k % 3 - 1)
        source = tl.load(x_tile + ((k // 3 - 1) * xy + (k % 3 - 1) * xx) * UNIT,
                         mask=near[:, None] & some, other=0.0)
        tl.store(out + k * channels, narrowed(grad * source.to(ACC), OUT), mask=ok[:, None] & some)


def _steps(t: Tensor) -> list[int]:
    """Strides (n, y, x), zero along an axis of one."""
    return [t.stride(i) if t.shape[i] > 1 else 0 for i in (0, 2, 3)]


def _unit(*operands: Tensor) -> int:
    """Elements that divide C and the strides of all: what a load along dense channels may join."""
    if any(t.stride(1) != 1 and t.shape[1] > 1 for t in operands):
        return 1
    return math.gcd(VECTOR, *(size for t in operands for size in (t.shape[1], *_steps(t))))


def _check_rows(pixels: int, *operands: Tensor) -> None:
    """Refuse rows so far apart that 32 bits do not count from one end of a tile to the other."""
    for t in operands:
        _, row, pixel = _steps(t)
        if (pixels // t.shape[3] + 5) * row + (t.shape[3] + 2) * pixel >= 2**31:
            raise ValueError(f"input: expected rows of an image closer than 2^31 elements to those "
                             f"of the next {pixels} pixels, got strides {t.stride()}")


def _settings(x: Tensor, depth: int) -> dict[str, int]:
    """The tile: as measured or usual, not beyond C and D, smaller where few programs have work."""
    n, c, h, w = x.shape
    kind = str(x.dtype).removeprefix("torch.")
    chosen = setting("conditional_conv", kind, USUAL[x.element_size()], x.device)
    block_p = chosen["pixels"]
    block_c = max(16, tile_sizes(c, h * w, True, 1, widest=chosen["channels"])[0])
    while n * triton.cdiv(h * w, block_p) * triton.cdiv(c, block_c) < PROGRAMS:
        if block_c > LEAST_CHANNELS:
            block_c //= 2
        elif block_p > LEAST_PIXELS:
            block_p //= 2
        else:
            break
    # a narrower tile multiplies less in a step: twice the depth, so that issuing does not bound it
    deep = chosen["depth"] * (2 if block_c < chosen["channels"] else 1)
    block_d = max(16, min(deep, triton.next_power_of_2(depth)))
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_D": block_d,
            "num_warps": chosen["warps"] * block_p // chosen["pixels"],
            "num_stages": chosen["stages"]}


def _in_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 as the sum of two numbers that TF32 holds."""
    def rounded(t: Tensor) -> Tensor:
        near = ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        return torch.where(t.isfinite(), near, t)

    high = rounded(weight)
    return high, rounded(weight - high)


def _packed(weight: Tensor) -> Tensor:
    """(9C, D, 3, 3) -> (applied tap, C, predictor tap, 1 or 2 parts, D)."""
    rows, depth = weight.shape[:2]
    packed = weight.reshape(rows // 9, 9, depth, 9).permute(1, 0, 3, 2).contiguous()
    if weight.dtype == torch.float32:
        return torch.stack(_in_parts(packed), 3)
    return packed.unsqueeze(3)


def _by_tap(bias: Tensor) -> Tensor:
    """(9C,) -> (applied tap, C)."""
    return bias.view(-1, 9).t().contiguous()


def _apply(x: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor,
           transposed: bool) -> Tensor:
    n, c, h, w = x.shape
    depth = condition.shape[1]
    check_plane(h * w)
    condition = dense(condition, True)
    packed = constant("packed kernels", partial(_packed, weight), weight)
    by_tap = packed if bias is None else constant("packed biases", partial(_by_tap, bias), bias)
    out = empty_nchw((n, c, h, w), like)
    settings = _settings(x, depth)
    _check_rows(settings["BLOCK_P"], x, condition, out)
    unit, unit_d = _unit(x, out), _unit(condition)
    strides = [size for t in (x, out) for size in _strides(t, unit)]
    tiles = triton.cdiv(h * w, settings["BLOCK_P"]), triton.cdiv(c, settings["BLOCK_C"])
    with on_device(x):
        for first, grid in batch_grids(*tiles, n):
            conditional_conv_kernel[grid](
                x, condition, packed, by_tap, out, first, h, w, c // unit, depth // unit_d,
                *strides, *(step // unit_d for step in _steps(condition)), UNIT=unit,
                UNIT_D=unit_d, PARTS=packed.shape[3],
                WHOLE=c % settings["BLOCK_C"] == 0 and depth % settings["BLOCK_D"] == 0,
                ROWS=strides[1] == strides[5] == 1, BIASED=bias is not None,
                TRANSPOSED=transposed, ACC=acc_type(x), **settings)
    return out


def _strides(t: Tensor, unit: int) -> tuple[int, int, int, int]:
    """(n, c, y, x) as the kernel receives them."""
    n, y, x = (step // unit for step in _steps(t))
    return n, t.stride(1) if t.shape[1] > 1 else 1, y, x


def conditional_conv(input: Tensor, condition: Tensor, weight: Tensor,
                     bias: Tensor | None) -> Tensor:
    """Launch the forward kernel."""
    if input.numel() == 0:
        return empty_nchw(tuple(input.shape), input)
    return _apply(input, condition, weight, bias, input, False)


Rows = tuple[int, int]


def _slabs(images: int, height: int, row: int) -> Iterator[tuple[slice, Rows, Rows]]:
    """(images, rows, rows of its own) of each slab; ``row``: bytes of a row of an image.

    A slab has whole images, or rows of one with the two beside them that a 3x3 conv reads: at least
    three, however wide, and then three times the work.
    """
    most = SCRATCH // row
    if most >= height:
        every, each = (0, height), most // height
        for n in range(0, images, each):
            yield slice(n, min(n + each, images)), every, every
        return
    own = max(1, most - 2)
    for n in range(images):
        for begin in range(0, height, own):
            end = min(begin + own, height)
            yield slice(n, n + 1), (max(begin - 1, 0), min(end + 1, height)), (begin, end)


def _kernel_gradient(grad: Tensor, x: Tensor, rows: Rows, own: Rows) -> Tensor:
    """The gradient of the predicted kernels in a slab, (N, 9C, rows, W), taps before channels."""
    n, c, h, w = x.shape
    start, stop = rows
    out = x.new_empty((n, stop - start, w, 9 * c))
    unit = _unit(grad, x)
    block_c, block_p = tile_sizes(c, (stop - start) * w, True, GRADIENT_TILE)
    tiles = triton.cdiv((stop - start) * w, block_p), triton.cdiv(c, block_c)
    strides = [step // unit for t in (grad, x) for step in _steps(t)]
    with on_device(x):
        for first, grid in batch_grids(*tiles, n):
            kernel_gradient_kernel[grid](
                grad, x, out, first, h, w, c // unit, start, *own, stop - start, *strides,
                UNIT=unit, ACC=acc_type(x), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)
    return out.permute(0, 3, 1, 2)


def _predictor_gradients(
    grad: Tensor, x: Tensor, condition: Tensor, weight: Tensor, need_condition: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of condition, weight and bias: torch's conv, backwards from each slab."""
    n, c, h, w = x.shape
    check_plane(h * w)
    grad, x = dense(grad, True), dense(x, True)
    wide = acc_dtype(x)
    by_tap = weight.unflatten(0, (c, 9)).transpose(0, 1).flatten(0, 1).contiguous(
        memory_format=torch.channels_last)
    dcondition = empty_nchw(tuple(condition.shape), condition).zero_()
    sums, bias_sums = (weight.new_zeros(size, dtype=wide) for size in (weight.shape, 9 * c))
    for images, (start, stop), own in _slabs(n, h, 9 * c * w * x.element_size()):
        kernels = _kernel_gradient(grad[images], x[images], (start, stop), own)
        to_condition, to_weight, _ = torch.ops.aten.convolution_backward(
            kernels, condition[images, :, start:stop], by_tap, None, [1, 1], [1, 1], [1, 1], False,
            [0, 0], 1, [need_condition, need_weight, False])
        if need_condition:
            dcondition[images, :, start:stop] += to_condition
        if need_weight:
            sums += to_weight
            bias_sums += kernels.sum((0, 2, 3), dtype=wide)
    dweight = sums.unflatten(0, (9, c)).transpose(0, 1).reshape(weight.shape)
    dbias = bias_sums.view(9, c).t().reshape(-1)
    return dcondition, dweight.to(weight.dtype), dbias.to(weight.dtype)


def conditional_conv_backward(
    grad: Tensor, input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None,
    need_input: bool, need_condition: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch what makes each gradient that is needed; the others are empty."""
    dx, dcondition, dweight, dbias = (input.new_empty(0) for _ in range(4))
    if input.numel() == 0:
        return (
            empty_nchw(tuple(input.shape), input) if need_input else dx,
            torch.zeros_like(condition) if need_condition else dcondition,
            torch.zeros_like(weight) if need_weight else dweight,
            weight.new_zeros(weight.shape[0]) if need_weight else dbias,
        )
    if need_input:
        dx = _apply(grad, condition, weight, bias, input, True)
    if need_condition or need_weight:
        found = _predictor_gradients(grad, input, condition, weight, need_condition, need_weight)
        dcondition = found[0] if need_condition else dcondition
        dweight, dbias = found[1:] if need_weight else (dweight, dbias)
    return dx, dcondition, dweight, dbias


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
    # tiles that C and D do not fill, and few of them
    x, condition = (meta(2, c, 16, 16, dtype=torch.bfloat16, nhwc=True) for c in (280, 136))
    cases.append(CompileCase("bfloat16 of 280 channels", partial(
        conditional_conv, x, condition, meta(9 * 280, 136, 3, 3, dtype=torch.bfloat16), None),
        "bf16"))
    return cases


COMPILE_CASES = _compile_cases()
