"""Conditional attention: a predicted gate for every pixel and channel, then LeakyReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import FLOATS, check_tensor, like_input
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import empty_nchw, memory_format
from . import reference

KINDS = ("cpu", "triton")
_TRITON = "smis_kernels.ops.conditional_attention.triton"


def conditional_attention(input: Tensor, logits: Tensor, *, negative_slope: float = 0.2,
                          backend: str | None = None) -> Tensor:
    r"""CC-FPSE's conditional attention in one pass: a sigmoid gate, then LeakyReLU.

    .. math:: y = \mathrm{LeakyReLU}(x \cdot \sigma(s))

    Args:
        input: x, (N, C, H, W); float32, float64, float16 or bfloat16.
        logits: s, of the input's shape and dtype (cast under autocast).
        negative_slope: of the LeakyReLU.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (N, C, H, W) in the input's dtype and memory format; differentiable twice in both.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Source: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions", 2019.

    Example:
        >>> y = conditional_attention(torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4))
    """
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    logits = like_input("logits", logits, input)
    kind = resolve("conditional_attention", input, backend, KINDS)
    record("conditional_attention", kind, input)
    if kind == "reference":
        y = reference.conditional_attention(input, logits, negative_slope)
        return y.contiguous(memory_format=memory_format(input))
    out: Tensor = applied(_ConditionalAttention, input, logits, negative_slope, kind)
    return out


class _ConditionalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, logits: Tensor, negative_slope: float,
                kind: str) -> Tensor:
        ctx.save_for_backward(input, logits)
        ctx.settings = (negative_slope, kind)
        out: Tensor = _attention(kind, input, logits, negative_slope)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, logits = ctx.saved_tensors
        negative_slope, kind = ctx.settings
        if torch.is_grad_enabled():
            def gated(x: Tensor, s: Tensor) -> Tensor:
                return reference.conditional_attention(x, s, negative_slope)

            return (*recorded_gradients(gated, (input, logits), (grad,)), None, None)
        return (*_backward(kind, grad, input, logits, negative_slope), None, None)


def _fake(input: Tensor, logits: Tensor, negative_slope: float) -> Tensor:
    return empty_nchw(tuple(input.shape), input)


def _backward_fake(grad: Tensor, input: Tensor, logits: Tensor,
                   negative_slope: float) -> tuple[Tensor, Tensor]:
    return empty_nchw(tuple(input.shape), input), empty_nchw(tuple(input.shape), input)


_attention = RawOp(
    "conditional_attention(Tensor input, Tensor logits, float negative_slope) -> Tensor",
    _fake, triton=f"{_TRITON}:conditional_attention",
)
# -> gradients of input and logits, both in the input's memory format
_backward = RawOp(
    "conditional_attention_backward(Tensor grad, Tensor input, Tensor logits, "
    "float negative_slope) -> (Tensor, Tensor)",
    _backward_fake, triton=f"{_TRITON}:conditional_attention_backward",
)
