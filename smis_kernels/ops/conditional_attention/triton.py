"""GPU kernels of the conditional attention: elementwise over flat, dense memory."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.tensors import memory_format
from ...runtime.triton_support import CompileCase, acc_type, meta, narrowed, on_device

BLOCK = 1024
# SLOPE is a constant of the kernel: as an argument it would be rounded to float32


@triton.jit
def _gate(logits):
    # exp of a number that is not above zero cannot overflow
    e = tl.exp(-tl.abs(logits))
    return tl.where(logits < 0, e, 1.0) / (1.0 + e)


@triton.jit
def attention_kernel(X, S, Y, count, SLOPE: tl.constexpr, ACC: tl.constexpr,
                     BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    x, s = tl.load(X + i, mask=mask).to(ACC), tl.load(S + i, mask=mask).to(ACC)
    z = x * _gate(s)
    tl.store(Y + i, narrowed(tl.where(z > 0, z, z * SLOPE), Y), mask=mask)


@triton.jit
def attention_backward_kernel(G, X, S, DX, DS, count, SLOPE: tl.constexpr, ACC: tl.constexpr,
                              BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    dy, x = tl.load(G + i, mask=mask).to(ACC), tl.load(X + i, mask=mask).to(ACC)
    s = tl.load(S + i, mask=mask).to(ACC)
    dx = tl.where(x > 0, dy, dy * SLOPE) * _gate(s)
    tl.store(DX + i, narrowed(dx, DX), mask=mask)
    tl.store(DS + i, narrowed(dx * x * _gate(-s), DS), mask=mask)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(like))


def conditional_attention(input: Tensor, logits: Tensor, negative_slope: float) -> Tensor:
    """Launch the forward kernel."""
    x, s = _dense(input, input), _dense(logits, input)
    y = torch.empty_like(x)
    if y.numel():
        with on_device(x):
            attention_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, s, y, x.numel(), SLOPE=negative_slope, ACC=acc_type(x), BLOCK=BLOCK)
    return y


def conditional_attention_backward(grad: Tensor, input: Tensor, logits: Tensor,
                                   negative_slope: float) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel."""
    g, x, s = (_dense(t, input) for t in (grad, input, logits))
    dx, ds = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        with on_device(x):
            attention_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                g, x, s, dx, ds, x.numel(), SLOPE=negative_slope, ACC=acc_type(x), BLOCK=BLOCK)
    return dx, ds


def _compile_cases() -> list[CompileCase]:
    cases: list[CompileCase] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, name = meta(2, 64, 64, 64, dtype=dtype), str(dtype).removeprefix("torch.")
        cases += [CompileCase(name, partial(conditional_attention, x, x, 0.2)),
                  CompileCase(name, partial(conditional_attention_backward, x, x, x, 0.2))]
    return cases


COMPILE_CASES = _compile_cases()
