"""What the kernels that normalise share: tiles of features, statistics, the pass and its sums.

Tiles are [BLOCK_C, BLOCK_P]; NHWC says which axis is dense in memory. An operand's ``*_n`` is its
batch stride and ``*_s`` the stride of the axis that is not dense; these and the dense size come
divided by UNIT, so that the compiler sees which loads may be merged. Statistics are (1 or N, C),
``per_image`` says which. Where UPSAMPLE, the output is twice as high and wide as the input.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_support import narrowed

# 16 bytes of 16 bits a thread. A block of channels has fewer elements than there are threads: else
# its statistics reach them through shared memory, with barriers.
APPLY = BACKWARD = {"tile": 2048, "warps": 8}
BACKWARD_PLANES = {"tile": 1024, "warps": 8}  # more spills where two outputs and upsampling meet
SUMMED_CHANNELS = 64  # of a tile at the most: sums over its pixels are written, so it needs some


@triton.jit
def sizes(C, P, UNIT: tl.constexpr, NHWC: tl.constexpr):
    if NHWC:
        return C * UNIT, P
    return C, P * UNIT


@triton.jit
def _offset(c, p, stride, UNIT: tl.constexpr, NHWC: tl.constexpr):
    # [BLOCK_C, BLOCK_P] offsets inside one image
    if NHWC:
        return c[:, None] + p.to(tl.int64)[None, :] * stride * UNIT
    return c[:, None] * stride * UNIT + p[None, :]


@triton.jit
def load(base, n, stride_n, c, p, stride, mask, UNIT: tl.constexpr, NHWC: tl.constexpr,
         ACC: tl.constexpr):
    at = n * stride_n * UNIT + _offset(c, p, stride, UNIT, NHWC)
    return tl.load(base + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def store(base, value, n, c, p, channels, pixels, mask, NHWC: tl.constexpr):
    # outputs are dense: their strides follow from the shape
    stride = channels if NHWC else pixels
    offset = n * channels * pixels + _offset(c, p, stride, 1, NHWC)
    tl.store(base + offset, narrowed(value, base), mask=mask)


@triton.jit
def position(C, P, first, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    # 64-bit: batch x channels x pixels exceeds 2^31 at sizes that fit one GPU. Pixels of one image
    # do not, and dividing them by the width is several times cheaper in 32 bits.
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64) + first
    return n, c, p, (c < C)[:, None] & (p < P)[None, :]


@triton.jit
def statistic(base, n, per_image, c, C):
    return tl.load(base + n * C * per_image + c, mask=c < C, other=0.0)[:, None]


@triton.jit
def source_pixel(p, W, UPSAMPLE: tl.constexpr):
    # the input's pixel under pixel p of an output that is W wide
    if UPSAMPLE:
        return (p // W // 2) * (W // 2) + (p % W) // 2
    return p


@triton.jit
def output_pixel(p, q: tl.constexpr, W, UPSAMPLE: tl.constexpr):
    # the q-th of the output's pixels over pixel p of an input that is W wide
    if UPSAMPLE:
        return (2 * (p // W) + q // 2) * (2 * W) + 2 * (p % W) + q % 2
    return p


@triton.jit
def activate(z, SLOPE: tl.constexpr):
    # NaN is not below zero, so it passes
    if SLOPE == 1.0:
        return z
    if SLOPE == 0.0:
        return tl.where(z < 0, 0.0, z)
    return tl.where(z < 0, z * SLOPE, z)


@triton.jit
def store_modulated(
    base, value, m, r, g, b, n, c, p, C, P, mask, SLOPE: tl.constexpr, NHWC: tl.constexpr,
):
    y = activate((value - m) * r * (1.0 + g) + b, SLOPE)
    store(base, y, n, c, p, C, P, mask, NHWC)


@triton.jit
def activation_gradient(
    grad, grad_n, grad_s, out, out_n, out_s, n, c, p, mask, SLOPE: tl.constexpr,
    UNIT: tl.constexpr, NHWC: tl.constexpr, ACC: tl.constexpr,
):
    dz = load(grad, n, grad_n, c, p, grad_s, mask, UNIT, NHWC, ACC)
    if SLOPE != 1.0:
        y = load(out, n, out_n, c, p, out_s, mask, UNIT, NHWC, ACC)
        dz = tl.where(y > 0, dz, dz * SLOPE)
    return dz


@triton.jit
def store_sums(total, hat, partial, partial_s, n, c, C, mask, NHWC: tl.constexpr):
    # [2, N, ...]: summed afterwards in a fixed order, so the result is deterministic
    kept = tl.where(mask, total, 0.0)
    if NHWC:
        at = (n * tl.num_programs(0) + tl.program_id(0)) * C + c
    else:
        at = (n * C + c) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + at, tl.sum(kept, 1), mask=c < C)
    tl.store(partial + partial_s + at, tl.sum(kept * hat, 1), mask=c < C)


def per_image(statistics: Tensor) -> int:
    """Whether (1 or N, C) statistics have a row for each image."""
    return int(statistics.shape[0] > 1)
