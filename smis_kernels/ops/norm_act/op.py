"""Normalisation, activation and residual addition in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import like_input
from ...runtime.checked import Checked, alike, plain
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import acc_dtype, empty_nchw
from ..normalization import (
    Options,
    activation_slope,
    check_input,
    input_gradient,
    normalized,
    statistics,
)
from . import reference

KINDS = ("cpu", "triton")
_TRITON = "smis_kernels.ops.norm_act.triton:"


def norm_act(
    input: Tensor, residual: Tensor | None = None, *, norm: str = "instance",
    num_groups: int | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, activation: str | None = None, negative_slope: float = 0.2,
    process_group: dist.ProcessGroup | None = None, backend: str | None = None,
) -> Tensor:
    r"""Normalise, activate and add a residual, in one pass over memory.

    .. math:: y = \mathrm{act}(\hat x) + r, \quad \hat x = (x - \mu) / \sqrt{\sigma^2 + \epsilon}

    Args:
        input: (N, C, H, W), float32, float64, float16 or bfloat16, contiguous or channels-last.
        residual: (N, C, H, W) of the input's dtype (cast under autocast), added after the
            activation; or None.
        norm: "instance", "batch", "group" (with ``num_groups``) or "none".
        running_mean, running_var, training, momentum, eps, process_group: as in
            :func:`smis_kernels.modulation`.
        activation: None, "relu" or "leaky_relu" (with ``negative_slope``).
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (N, C, H, W) in the input's dtype and memory format.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend asked for cannot run here.

    Source: the residual blocks of Wang et al., "High-Resolution Image Synthesis and Semantic
    Manipulation with Conditional GANs", 2018.

    Example:
        >>> x, skip = torch.randn(2, 1, 8, 16, 16).unbind(0)
        >>> y = norm_act(x, skip, activation="relu")
    """
    running = (running_mean, running_var)
    called = (norm, num_groups, training, momentum, eps, activation, negative_slope)
    known = process_group is None and plain(num_groups, negative_slope, momentum, eps)
    key = alike(called, (input, residual, *running)) if known else None
    found = _checked.find(key)
    if found is None:
        slope = activation_slope(activation, negative_slope)
        options = Options(norm, num_groups, training, momentum, eps, False, process_group)
        check_input(input, options, running)
        given = residual
        if residual is not None:
            residual = like_input("residual", residual, input)
        found = _checked.keep(key if residual is given else None, (options, slope))
    options, slope = found
    kind = resolve("norm_act", input, backend, KINDS)
    record("norm_act", kind, input)
    if kind == "reference" or input.numel() == 0:
        return reference.norm_act(
            input, residual, norm=norm, num_groups=num_groups, running_mean=running_mean,
            running_var=running_var, training=training and input.numel() > 0, momentum=momentum,
            eps=eps, activation=activation, negative_slope=negative_slope,
            process_group=process_group,
        )
    (stats,) = statistics(input, kind, options, running)
    out: Tensor = applied(_NormAct, input, residual, stats.mean, stats.rstd, stats.reduction, slope,
                          options, kind)
    return out


# Of calls whose residual the kernel takes as it is given.
_checked: Checked[tuple[Options, float]] = Checked()


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor,
                reduction: str, slope: float, options: Options, kind: str) -> Tensor:
        ctx.save_for_backward(input, mean, rstd)
        ctx.settings = (reduction, slope, options, kind, residual is not None)
        return norm_act_op(kind, input, mean, rstd, residual, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, mean, rstd = ctx.saved_tensors
        reduction, slope, options, kind, added = ctx.settings
        if torch.is_grad_enabled():
            def active(x: Tensor) -> Tensor:
                return F.leaky_relu(normalized(x, mean, rstd, reduction, options), slope)

            (dinput,) = recorded_gradients(active, (input,), (grad,))
            return (dinput, grad if added else None, *(None,) * 6)
        moving = reduction != "fixed"
        partial, sums = norm_act_backward(kind, grad, input, mean, rstd, slope, moving)
        if moving:
            partial = input_gradient(kind, partial, sums, input, mean, rstd, reduction, options)
        return (partial, grad if added else None, *(None,) * 6)


def _fake(input: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None,
          slope: float) -> Tensor:
    n, c, h, w = input.shape
    return empty_nchw((n, c, h, w), input)


def _backward_fake(grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, slope: float,
                   sums: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    return (empty_nchw((n, c, h, w), input),
            input.new_empty((2, n, c) if sums else (0,), dtype=acc_dtype(input)))


# mean and rstd are (1 or N, C).
norm_act_op = RawOp(
    "norm_act(Tensor input, Tensor mean, Tensor rstd, Tensor? residual, float slope) -> Tensor",
    _fake, _TRITON + "norm_act",
)
# -> the input gradient with fixed statistics, and the sums over each plane (of it, and of it times
# x-hat) that statistics of the data need.
norm_act_backward = RawOp(
    "norm_act_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, float slope, "
    "bool sums) -> (Tensor, Tensor)",
    _backward_fake, _TRITON + "norm_act_backward",
)
