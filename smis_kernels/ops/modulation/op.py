"""Modulation: normalise, scale by 1 + gamma, shift by beta, activate; one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import FLOATS, autocast_enabled, check_device, check_shape, check_tensor
from ...runtime.derivatives import recorded_gradients
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import acc_dtype, empty_nchw
from . import reference

KINDS = ("cpu", "triton")
NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = (None, "relu", "leaky_relu")
_TRITON = "smis_kernels.ops.modulation.triton:"


def _moments_fake(input: Tensor) -> tuple[Tensor, Tensor]:
    shape = input.shape[:2]
    return (input.new_empty(shape, dtype=acc_dtype(input)),
            input.new_empty(shape, dtype=acc_dtype(input)))


def output_shape(input: Tensor, upsample: bool) -> tuple[int, int, int, int]:
    """(N, C, H, W) of the output; twice the input's H and W when upsampling is folded in."""
    n, c, h, w = input.shape
    return (n, c, 2 * h, 2 * w) if upsample else (n, c, h, w)


def _apply_fake(
    input: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, mean_s: Tensor | None,
    rstd_s: Tensor | None, gamma_s: Tensor | None, beta_s: Tensor | None, slope: float,
    slope_s: float, upsample: bool,
) -> tuple[Tensor, Tensor]:
    out = empty_nchw(output_shape(input, upsample), input)
    return out, torch.empty_like(out) if gamma_s is not None else input.new_empty(0)


def _backward_fake(
    grad: Tensor, output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor,
    grad_s: Tensor | None, output_s: Tensor | None, mean_s: Tensor | None, rstd_s: Tensor | None,
    gamma_s: Tensor | None, slope: float, slope_s: float, upsample: bool, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c = input.shape[:2]
    wide = output_shape(input, upsample)
    absent = gamma_s is None
    return (
        empty_nchw((n, c, *input.shape[2:]), input),
        empty_nchw(wide, input), empty_nchw(wide, input),
        input.new_empty(0) if absent else empty_nchw(wide, input),
        input.new_empty(0) if absent else empty_nchw(wide, input),
        input.new_empty((2, n, c) if sums else (0,), dtype=acc_dtype(input)),
    )


def _center_fake(
    grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    n, c, h, w = input.shape
    return empty_nchw((n, c, h, w), input)


# Biased mean and variance of every plane: (N, C, H, W) -> 2 x (N, C), fp32 (fp64 for fp64).
channel_moments = RawOp(
    "channel_moments(Tensor input) -> (Tensor, Tensor)", _moments_fake, _TRITON + "channel_moments"
)
# One or two outputs from one read of the input; mean and rstd are (1 or N, C), and serve the
# second output too where it has none of its own.
modulation_apply = RawOp(
    "modulation_apply(Tensor input, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, "
    "Tensor? mean_s, Tensor? rstd_s, Tensor? gamma_s, Tensor? beta_s, "
    "float slope, float slope_s, bool upsample) -> (Tensor, Tensor)",
    _apply_fake, _TRITON + "modulation_apply",
)
# -> rstd-scaled input gradient with fixed statistics, gamma and beta gradients, and the two sums
# over each plane (of that gradient, and of it times x-hat) that batch statistics need.
modulation_backward = RawOp(
    "modulation_backward(Tensor grad, Tensor output, Tensor input, Tensor mean, Tensor rstd, "
    "Tensor gamma, Tensor? grad_s, Tensor? output_s, Tensor? mean_s, Tensor? rstd_s, "
    "Tensor? gamma_s, float slope, float slope_s, bool upsample, bool sums) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake, _TRITON + "modulation_backward",
)
# grad - shift - x_hat * scale: what remains of it once the statistics move with the input.
modulation_center = RawOp(
    "modulation_center(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor shift, "
    "Tensor scale) -> Tensor",
    _center_fake, _TRITON + "modulation_center",
)


class Statistics(NamedTuple):
    """Mean and reciprocal deviation (1 or N, C), and how they were reduced ("fixed": given)."""

    mean: Tensor
    rstd: Tensor
    reduction: str


@dataclass(frozen=True)
class Options:
    """What one call fixes besides its tensors."""

    norm: str = "batch"
    num_groups: int | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    upsample: bool = False
    process_group: dist.ProcessGroup | None = None


def _pool(values: Tensor, reduction: str, num_groups: int | None) -> Tensor:
    """The mean of (N, C) plane values over what shares one statistic, as (1 or N, C)."""
    n, c = values.shape
    if reduction == "batch":
        return values.mean(0, keepdim=True)
    if reduction == "group":
        assert num_groups is not None
        grouped = values.view(n, num_groups, -1).mean(2, keepdim=True)
        return grouped.repeat(1, 1, c // num_groups).view(n, c)
    return values


def _synchronize(
    mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge (1, C) statistics of all processes, weighted by their pixel counts."""
    row = torch.cat([mean[0], var[0], mean.new_tensor([float(count)])])
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    means, variances, counts = torch.stack(rows).split([mean.shape[1], mean.shape[1], 1], 1)
    total = counts.sum()
    weight = counts / total
    merged = (weight * means).sum(0, keepdim=True)
    spread = (weight * (variances + (means - merged).square())).sum(0, keepdim=True)
    return merged, spread, total


Running = tuple[Tensor | None, Tensor | None]


def _update_running(running: Running, mean: Tensor, var: Tensor, seen: int | Tensor,
                    momentum: float) -> None:
    running_mean, running_var = running
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean[0].to(running_mean.dtype), momentum)
        running_var.lerp_((var[0] * (seen / (seen - 1))).to(running_var.dtype), momentum)


@torch.no_grad()
def statistics(input: Tensor, kind: str, options: Options, *runnings: Running) -> list[Statistics]:
    """One set of statistics per output; those of the data are computed once.

    In training every output's running statistics are updated.
    """
    n, c, h, w = input.shape
    dtype = acc_dtype(input)
    if options.norm == "none":
        zero = torch.zeros((1, c), dtype=dtype, device=input.device)
        return [Statistics(zero, torch.ones_like(zero), "fixed")] * len(runnings)
    if options.norm == "batch" and not options.training and runnings[0][0] is not None:
        fixed = []
        for mean, var in runnings:
            assert mean is not None and var is not None
            rstd = torch.rsqrt(var.to(dtype) + options.eps)
            fixed.append(Statistics(mean.to(dtype).view(1, c), rstd.view(1, c), "fixed"))
        return fixed
    mean, var = channel_moments(kind, input)
    reduction = options.norm
    if reduction == "group" or (reduction == "batch" and n > 1):
        pooled = _pool(mean, reduction, options.num_groups)
        var = _pool(var + (mean - pooled).square(), reduction, options.num_groups)
        mean = pooled
    count: int | Tensor = n * h * w
    if reduction == "batch" and options.training:
        if options.process_group is not None:
            mean, var, count = _synchronize(mean, var, n * h * w, options.process_group)
        seen = count * 4 if options.upsample else count
        for running in runnings:
            _update_running(running, mean, var, seen, options.momentum)
    return [Statistics(mean, torch.rsqrt(var + options.eps), reduction)] * len(runnings)


def input_gradient(kind: str, grad: Tensor, sums: Tensor, input: Tensor, mean: Tensor,
                   rstd: Tensor, reduction: str, options: Options) -> Tensor:
    """Complete the input gradient where the statistics were computed from the input."""
    n, c, h, w = input.shape
    if reduction == "batch":
        total = sums.sum(1, keepdim=True)  # [2, 1, C]
        count: float | Tensor = float(n * h * w)
        if options.training and options.process_group is not None:
            row = torch.cat([total.flatten(), total.new_tensor([count])])
            dist.all_reduce(row, group=options.process_group)
            total, count = row[:-1].view(2, 1, c), row[-1]
        shift, scale = (total / count).unbind(0)
    else:
        shift, scale = (_pool(s / (h * w), reduction, options.num_groups) for s in sums.unbind(0))
    return modulation_center(kind, grad, input, mean, rstd, shift.contiguous(), scale.contiguous())


def normalized(input: Tensor, mean: Tensor, rstd: Tensor, reduction: str,
               options: Options) -> Tensor:
    """x-hat for autograd: statistics of the data move with the input, fixed ones do not."""
    if reduction == "fixed":
        centered = input.to(mean.dtype) - mean[:, :, None, None]
        return (centered * rstd[:, :, None, None]).to(input.dtype)
    return reference.normalize(
        input, norm=options.norm, num_groups=options.num_groups, training=True, eps=options.eps,
        process_group=options.process_group if options.training else None,
    )


def activated(grad: Tensor, output: Tensor | None, slope: float) -> Tensor:
    """The gradient before the activation, whose slope the sign of the output decides."""
    return grad if output is None else torch.where(output > 0, grad, grad * slope)


class _Modulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, gamma: Tensor, beta: Tensor, gamma_s: Tensor | None,
        beta_s: Tensor | None, mean: Tensor, rstd: Tensor, mean_s: Tensor | None,
        rstd_s: Tensor | None, reduction: str, slope: float, slope_s: float, options: Options,
        kind: str,
    ) -> tuple[Tensor, Tensor]:
        out, out_s = modulation_apply(
            kind, input, mean, rstd, gamma, beta, mean_s, rstd_s, gamma_s, beta_s, slope, slope_s,
            options.upsample,
        )
        pair = gamma_s is not None
        # The sign of the output decides the activation's slope: no pre-activation is kept.
        ctx.save_for_backward(
            input, gamma, gamma_s, mean, rstd, mean_s, rstd_s,
            out if slope != 1 else None, out_s if pair and slope_s != 1 else None,
        )
        ctx.settings = (reduction, slope, slope_s, options, kind, pair)
        return out, out_s

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_s: Tensor) -> tuple[Any, ...]:
        input, gamma, gamma_s, mean, rstd, mean_s, rstd_s, out, out_s = ctx.saved_tensors
        reduction, slope, slope_s, options, kind, pair = ctx.settings
        if torch.is_grad_enabled():
            grads = [activated(grad, out, slope), activated(grad_s, out_s, slope_s)]

            def scaled(x: Tensor, *gammas: Tensor) -> tuple[Tensor, ...]:
                if options.upsample:
                    x = F.interpolate(x, scale_factor=2, mode="nearest")
                means = (mean, mean if mean_s is None else mean_s)
                rstds = (rstd, rstd if rstd_s is None else rstd_s)
                return tuple(normalized(x, m, r, reduction, options) * (1 + gamma)
                             for m, r, gamma in zip(means, rstds, gammas, strict=False))

            gammas = (gamma, gamma_s) if pair else (gamma,)
            dinput, *dgammas = recorded_gradients(scaled, (input, *gammas), grads[: len(gammas)])
            second = (dgammas[1], grads[1]) if pair else (None, None)
            return (dinput, dgammas[0], grads[0], *second, *(None,) * 9)
        partial, dgamma, dbeta, dgamma_s, dbeta_s, sums = modulation_backward(
            kind, grad, grad if out is None else out, input, mean, rstd, gamma,
            grad_s if pair else None, (grad_s if out_s is None else out_s) if pair else None,
            mean_s, rstd_s, gamma_s, slope, slope_s, options.upsample, reduction != "fixed",
        )
        if reduction != "fixed":
            partial = input_gradient(kind, partial, sums, input, mean, rstd, reduction, options)
        second = (dgamma_s, dbeta_s) if pair else (None, None)
        return (partial, dgamma, dbeta, *second, *(None,) * 9)


def activation_slope(activation: str | None, negative_slope: float) -> float:
    """The slope below zero: 1 without an activation, 0 for ReLU."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'relu' or 'leaky_relu'; got {activation!r}")
    if activation is None:
        return 1.0
    if activation == "relu":
        return 0.0
    if not 0 < negative_slope < 1:
        raise ValueError(f"negative_slope: expected a number in (0, 1), got {negative_slope}")
    return float(negative_slope)


def check_input(input: Tensor, options: Options, running: Running) -> None:
    """The checks that dense and indexed modulation share."""
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    n, c, h, w = input.shape
    if options.norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}; got {options.norm!r}")
    if options.norm == "group" and (not options.num_groups or c % options.num_groups):
        raise ValueError(
            f"num_groups: expected a divisor of the {c} channels, got {options.num_groups}"
        )
    if (running[0] is None) != (running[1] is None):
        raise ValueError("running_mean, running_var: expected both or neither")
    fixed = options.norm == "none" or (
        options.norm == "batch" and not options.training and running[0] is not None
    )
    per_statistic = {"batch": n * h * w, "group": h * w * c // (options.num_groups or 1)}
    if not fixed and input.numel() and per_statistic.get(options.norm, h * w) == 1:
        raise ValueError(
            "input: expected more than one value for each statistic of norm "
            f"{options.norm!r}, got shape {tuple(input.shape)}"
        )
    for name, tensor in zip(("running_mean", "running_var"), running, strict=True):
        if tensor is not None:
            check_shape(name, tensor, (c,), "for the input's channels")
            check_device(name, tensor, input, "input")


def check_running_pair(
    input: Tensor, options: Options, running: Running, running_s: Running
) -> None:
    """:func:`check_input` for both outputs of a pair."""
    check_input(input, options, running)
    check_input(input, options, running_s)
    if (running[0] is None) != (running_s[0] is None):
        raise ValueError("running_mean_s: expected running statistics for both outputs or neither")


def _check_dense(name: str, tensor: Tensor, input: Tensor, options: Options) -> Tensor:
    if isinstance(tensor, Tensor) and autocast_enabled(input):
        tensor = tensor.to(input.dtype)
    check_tensor(name, tensor, 4, "(N, C, H, W)", (input.dtype,))
    why = "(twice the input's H and W: upsample=True)" if options.upsample else "to match input"
    check_shape(name, tensor, output_shape(input, options.upsample), why)
    check_device(name, tensor, input, "input")
    return tensor


def modulation(
    input: Tensor, gamma: Tensor, beta: Tensor, *, norm: str = "batch",
    num_groups: int | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, activation: str | None = None, negative_slope: float = 0.2,
    upsample: bool = False, process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Normalise the features and modulate them per pixel, in one pass over memory.

    .. math:: y = \mathrm{act}(\hat x (1 + \gamma) + \beta), \quad
              \hat x = (x - \mu) / \sqrt{\sigma^2 + \epsilon}

    Args:
        input: (N, C, H, W), float32, float64, float16 or bfloat16, contiguous or channels-last.
        gamma, beta: (N, C, H, W) of the input's dtype (cast under autocast);
            (N, C, 2H, 2W) with ``upsample``.
        norm: "batch", "instance", "group" (with ``num_groups``) or "none".
        running_mean, running_var: (C,), used in eval and updated in training (norm "batch").
        training: normalise with the batch's statistics. In eval without running statistics too.
        momentum, eps: as in :func:`torch.nn.functional.batch_norm`.
        activation: None, "relu" or "leaky_relu" (with ``negative_slope``).
        upsample: fold a nearest x2 upsampling of the input into the read. Statistics are those of
            the upsampled input, whose count enters the unbiased running variance.
        process_group: batch statistics over all its processes (SyncBN); training only.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (N, C, H, W), or (N, C, 2H, 2W) with ``upsample``, in the input's dtype and memory format.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend asked for cannot run here.

    Source: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", 2019.

    Example:
        >>> x, gamma, beta = torch.randn(3, 2, 8, 16, 16).unbind(0)
        >>> y = modulation(x, gamma, beta, training=True, activation="leaky_relu")
    """
    options = Options(norm, num_groups, training, momentum, eps, upsample, process_group)
    slope = activation_slope(activation, negative_slope)
    check_input(input, options, (running_mean, running_var))
    gamma = _check_dense("gamma", gamma, input, options)
    beta = _check_dense("beta", beta, input, options)
    kind = resolve("modulation", input, backend, KINDS)
    record("modulation", kind, input, path="dense")
    if kind == "reference" or input.numel() == 0:
        return reference.modulation(
            input, gamma, beta, norm=norm, num_groups=num_groups, running_mean=running_mean,
            running_var=running_var, training=training and input.numel() > 0, momentum=momentum,
            eps=eps, activation=activation, negative_slope=negative_slope, upsample=upsample,
            process_group=process_group,
        )
    (stats,) = statistics(input, kind, options, (running_mean, running_var))
    out, _ = _Modulation.apply(
        input, gamma, beta, None, None, stats.mean, stats.rstd, None, None, stats.reduction,
        slope, 1.0, options, kind,
    )
    return out


def modulation_pair(
    input: Tensor, gamma: Tensor, beta: Tensor, gamma_s: Tensor, beta_s: Tensor, *,
    norm: str = "batch", num_groups: int | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, running_mean_s: Tensor | None = None,
    running_var_s: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, activation: str | None = "leaky_relu", negative_slope: float = 0.2,
    upsample: bool = False, process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Two modulations from one read of the input: a block's norm_0 and its shortcut's norm_s.

    Equals ``(modulation(input, gamma, beta, activation=activation, ...),
    modulation(input, gamma_s, beta_s, activation=None, ...))``: arguments as there; each output
    has its own gamma, beta and running statistics, and the statistics are computed once.

    Example:
        >>> x, g, b, gs, bs = torch.randn(5, 2, 8, 16, 16).unbind(0)
        >>> y, y_s = modulation_pair(x, g, b, gs, bs, training=True)
    """
    options = Options(norm, num_groups, training, momentum, eps, upsample, process_group)
    slope = activation_slope(activation, negative_slope)
    running, running_s = (running_mean, running_var), (running_mean_s, running_var_s)
    check_running_pair(input, options, running, running_s)
    gamma, beta, gamma_s, beta_s = (
        _check_dense(name, tensor, input, options)
        for name, tensor in (("gamma", gamma), ("beta", beta), ("gamma_s", gamma_s),
                             ("beta_s", beta_s))
    )
    kind = resolve("modulation_pair", input, backend, KINDS)
    record("modulation_pair", kind, input, path="dense")
    if kind == "reference" or input.numel() == 0:
        return tuple(  # type: ignore[return-value]
            reference.modulation(
                input, g, b, norm=norm, num_groups=num_groups, running_mean=rm, running_var=rv,
                training=training and input.numel() > 0, momentum=momentum, eps=eps,
                activation=act, negative_slope=negative_slope, upsample=upsample,
                process_group=process_group,
            )
            for g, b, rm, rv, act in (
                (gamma, beta, running_mean, running_var, activation),
                (gamma_s, beta_s, running_mean_s, running_var_s, None),
            )
        )
    stats, stats_s = statistics(input, kind, options, running, running_s)
    own = (stats_s.mean, stats_s.rstd) if stats_s is not stats else (None, None)
    out: tuple[Tensor, Tensor] = _Modulation.apply(
        input, gamma, beta, gamma_s, beta_s, stats.mean, stats.rstd, *own, stats.reduction,
        slope, 1.0, options, kind,
    )
    return out
