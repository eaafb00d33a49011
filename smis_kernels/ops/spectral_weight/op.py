"""A weight over its largest singular value: spectral normalisation and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import FLOATS, WIDE, check_device, check_shape, check_tensor
from ...runtime.derivatives import applied
from ...runtime.explain import record
from ...runtime.library import RawOp
from . import reference

KINDS = ("cpu",)
_FORMATS = (torch.contiguous_format, torch.channels_last)


def spectral_weight(weight: Tensor, u: Tensor, v: Tensor, *, sigma: Tensor | None = None,
                    memory_format: torch.memory_format = torch.contiguous_format,
                    backend: str | None = None) -> Tensor:
    r"""A weight over its largest singular value, as its singular vectors estimate it.

    .. math:: \hat W = W / \sigma, \quad \sigma = u^T W v, \qquad
        dW = (d\hat W - \langle d\hat W, \hat W \rangle \, u v^T) / \sigma

    One pass over the weight forward and two backward, which also reorder from and to channels-last
    memory; autograd of the formula takes eight and leaves the reordering to the conv.

    Args:
        weight: W, (C', ...), taken as a matrix of C' rows; float32 or float64, and 16-bit types,
            which take the formula.
        u: (C',). v: (K,) with K columns. Constants: they get no gradient.
        sigma: uᵀWv, where it is known already; a scalar, for the value alone.
        memory_format: of the result; ``torch.channels_last`` for a 4-d weight whose conv reads
            channels-last features, else contiguous.
        backend: "auto", "reference" or "cpu".

    Returns:
        As ``weight``; differentiable twice, the second time by the formula.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Paper: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.

    Example:
        >>> weight = torch.randn(8, 4, 3, 3)
        >>> u, v = torch.randn(8), torch.randn(36)
        >>> spectral_weight(weight, u, v).shape
        torch.Size([8, 4, 3, 3])
    """
    check_tensor("weight", weight, (2, 3, 4, 5), "(C', ...)", FLOATS)
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    given = {"u": (u, (rows,)), "v": (v, (columns,)), "sigma": (sigma, ())}
    for name, (tensor, shape) in given.items():
        if tensor is not None:
            check_tensor(name, tensor, len(shape), f"{shape}", (weight.dtype,))
            check_shape(name, tensor, shape, f"for weight {tuple(weight.shape)}")
            check_device(name, tensor, weight, "weight")
    if memory_format not in _FORMATS or (memory_format is not _FORMATS[0] and weight.dim() != 4):
        raise ValueError("memory_format: expected torch.contiguous_format, or torch.channels_last "
                         f"for a 4-d weight; got {memory_format} for {weight.dim()}-d")
    kind = resolve("spectral_weight", weight, backend, KINDS)
    if kind != "reference" and weight.dtype not in WIDE:
        record("spectral_weight", "reference", weight, reason="the kernel is of 32 and 64 bits")
        kind = "reference"
    else:
        record("spectral_weight", kind, weight)
    if kind == "reference":
        return reference.spectral_weight(weight, u, v).contiguous(memory_format=memory_format)
    with torch.no_grad():
        known = torch.dot(u, torch.mv(weight.flatten(1), v)) if sigma is None else sigma
    out: Tensor = applied(_SpectralWeight, weight, u.detach(), v.detach(), known.detach(),
                                        memory_format == torch.channels_last, kind)
    return out


class _SpectralWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, last: bool,
                kind: str) -> Tensor:
        ctx.save_for_backward(weight, u, v, sigma)
        ctx.kind = kind
        out: Tensor = _divide(kind, weight, sigma, last)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, u, v, sigma = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: penalties on gradients
            d_weight = reference.spectral_weight_backward(grad, weight, u, v)
        else:
            d_weight = _backward(ctx.kind, grad, weight, u, v, sigma)
        return (d_weight, *[None] * 5)


def _fake(weight: Tensor, sigma: Tensor, last: bool) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(weight, memory_format=form)


def _backward_fake(grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


# -> weight / sigma, in channels-last memory where asked
_divide = RawOp("spectral_weight(Tensor weight, Tensor sigma, bool last) -> Tensor", _fake)
_backward = RawOp(
    "spectral_weight_backward(Tensor grad, Tensor weight, Tensor u, Tensor v, Tensor sigma) "
    "-> Tensor", _backward_fake,
)
