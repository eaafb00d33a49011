"""The normalisation that four ops share: statistics, their gradient, settings and checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.check import FLOATS, check_device, check_shape, check_tensor
from ..runtime.constants import constant
from ..runtime.library import RawOp
from ..runtime.tensors import acc_dtype, empty_nchw
from .modulation import reference

NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = (None, "relu", "leaky_relu")
SUFFIXES = ("", "_s")  # of the arguments of a pair's outputs
_TRITON = "smis_kernels.ops.modulation.triton:"


class Statistics(NamedTuple):
    """Mean and reciprocal deviation (1 or N, C), and how they were reduced ("fixed": given)."""

    mean: Tensor
    rstd: Tensor
    reduction: str


class Keywords(TypedDict, total=False):
    """The keywords that all modulations share; :func:`smis_kernels.modulation` explains them."""

    norm: str
    num_groups: int | None
    training: bool
    momentum: float
    eps: float
    upsample: bool
    process_group: dist.ProcessGroup | None


@dataclass(frozen=True)
class Options:
    """What one call fixes besides its tensors: :class:`Keywords` with their defaults."""

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


def _neutral(channels: int, dtype: torch.dtype, device: torch.device) -> Statistics:
    zero = torch.zeros((1, channels), dtype=dtype, device=device)
    return Statistics(zero, torch.ones_like(zero), "fixed")


def _fixed(kind: str, running: Running, dtype: torch.dtype, eps: float) -> Statistics:
    mean, var = running
    assert mean is not None and var is not None
    plain = mean.dtype == var.dtype == dtype and not (mean.requires_grad or var.requires_grad)
    if kind == "cpu" and plain:  # sooner made than a constant is found
        center, rstd = fixed_statistics(kind, mean, var, eps)
        return Statistics(center, rstd, "fixed")
    return constant(("fixed", dtype, eps), partial(_scaled, mean, var, dtype, eps), mean, var)


@torch.no_grad()
def _scaled(mean: Tensor, var: Tensor, dtype: torch.dtype, eps: float) -> Statistics:
    rstd = torch.rsqrt(var.to(dtype) + eps)
    center, rstd = (t.contiguous().view(1, -1) for t in (mean.to(dtype), rstd))
    return Statistics(center, rstd, "fixed")


def statistics(input: Tensor, kind: str, options: Options, *runnings: Running) -> list[Statistics]:
    """One set of statistics per output; those of the data are computed once.

    In training every output's running statistics are updated.
    """
    if options.norm == "batch" and not options.training and runnings[0][0] is not None:
        return [_fixed(kind, running, acc_dtype(input), options.eps) for running in runnings]
    if not torch.is_grad_enabled():  # entering no_grad costs as much as the kernel on a small input
        return _of_data(input, kind, options, runnings)
    with torch.no_grad():
        return _of_data(input, kind, options, runnings)


def _of_data(input: Tensor, kind: str, options: Options,
             runnings: Sequence[Running]) -> list[Statistics]:
    n, c, h, w = input.shape
    if options.norm == "none":
        dtype = acc_dtype(input)
        neutral = constant(("neutral", c, dtype, input.device),
                           partial(_neutral, c, dtype, input.device))
        return [neutral] * len(runnings)
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
    """x-hat for autograd: statistics of the data move with the input, fixed ones do not.

    Spelled out: torch's own norms misread some gradients of one image (2.13; reference.py).
    """
    if reduction == "fixed":
        centered = input.to(mean.dtype) - mean[:, :, None, None]
        return (centered * rstd[:, :, None, None]).to(input.dtype)
    if options.norm == "none" or (options.training and options.process_group is not None
                                  and options.norm == "batch"):
        return reference.normalize(input, norm=options.norm, training=True, eps=options.eps,
                                   process_group=options.process_group)
    rows = input.to(mean.dtype)
    if options.norm == "group":
        assert options.num_groups is not None
        rows = rows.reshape(input.shape[0], options.num_groups, -1)
    dims = {"batch": (0, 2, 3), "instance": (2, 3), "group": (2,)}[options.norm]
    centered = rows - rows.mean(dims, keepdim=True)
    var = centered.square().mean(dims, keepdim=True)
    return (centered * torch.rsqrt(var + options.eps)).reshape(input.shape).to(input.dtype)


def activated(grad: Tensor, output: Tensor | None, slope: float) -> Tensor:
    """The gradient before the activation, whose slope the sign of the output decides."""
    return grad if output is None else torch.where(output > 0, grad, grad * slope)


def activation_slope(activation: str | None, negative_slope: float) -> float:
    """The slope below zero: 1 without an activation, 0 for ReLU."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'relu' or 'leaky_relu'; got {activation!r}")
    if activation is None:
        return 1.0
    if activation == "relu":
        return 0.0
    if not hasattr(negative_slope, "__float__") or not 0 < negative_slope < 1:
        raise ValueError(f"negative_slope: expected a number in (0, 1), got {negative_slope}")
    return float(negative_slope)


def check_input(input: Tensor, options: Options, *runnings: Running) -> None:
    """The checks that norm_act, dense and indexed modulation share; one ``running`` an output."""
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    n, c, h, w = input.shape
    if options.norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}; got {options.norm!r}")
    if not hasattr(options.eps, "__float__") or not 0 <= options.eps < math.inf:
        raise ValueError(f"eps: expected a number of at least 0, got {options.eps}")
    groups = options.num_groups
    if options.norm == "group" and (
            groups is None or not hasattr(groups, "__index__") or groups < 1 or c % groups):
        raise ValueError(
            f"num_groups: expected a divisor of the {c} channels, got {options.num_groups}"
        )
    if not hasattr(options.momentum, "__float__"):
        raise ValueError(f"momentum: expected a number, got {options.momentum!r}; a mean of all "
                         "batches, nn.BatchNorm2d's None, is 1 / the batches seen so far")
    for suffix, running in zip(SUFFIXES, runnings, strict=False):
        _check_running(suffix, running, input)
        if (running[0] is None) != (runnings[0][0] is None):
            raise ValueError(
                f"running_mean{suffix}: expected running statistics for both outputs or neither")
    fixed = options.norm == "none" or (
        options.norm == "batch" and not options.training and runnings[0][0] is not None
    )
    per_statistic = {"batch": n * h * w, "group": h * w * c // (options.num_groups or 1)}
    values = per_statistic.get(options.norm, h * w) * (4 if options.upsample else 1)
    if not fixed and input.numel() and values == 1 and not _has_mates(options):
        raise ValueError(
            "input: expected more than one value for each statistic of norm "
            f"{options.norm!r}, got shape {tuple(input.shape)}; call .eval() on the model "
            "first, or give a larger batch or picture"
        )


def _has_mates(options: Options) -> bool:
    """Whether statistics are of other processes' values too."""
    return options.norm == "batch" and options.training and options.process_group is not None and (
        dist.get_world_size(options.process_group) > 1)


def _check_running(suffix: str, running: Running, input: Tensor) -> None:
    if (running[0] is None) != (running[1] is None):
        raise ValueError(f"running_mean{suffix}, running_var{suffix}: expected both or neither")
    for name, tensor in zip(("running_mean", "running_var"), running, strict=True):
        if tensor is not None:
            check_tensor(name + suffix, tensor, 1, "(C,)", None)
            check_shape(name + suffix, tensor, (input.shape[1],), "for the input's channels")
            check_device(name + suffix, tensor, input, "input")


def _moments_fake(input: Tensor) -> tuple[Tensor, Tensor]:
    shape = input.shape[:2]
    return (input.new_empty(shape, dtype=acc_dtype(input)),
            input.new_empty(shape, dtype=acc_dtype(input)))


def _fixed_fake(mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return mean.new_empty((1, mean.shape[0])), mean.new_empty((1, mean.shape[0]))


def _center_fake(
    grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    n, c, h, w = input.shape
    return empty_nchw((n, c, h, w), input)


# Biased mean and variance of every plane: (N, C, H, W) -> 2 x (N, C), fp32 (fp64 for fp64).
channel_moments = RawOp(
    "channel_moments(Tensor input) -> (Tensor, Tensor)", _moments_fake, _TRITON + "channel_moments"
)
# Running mean and variance (C,) of float32 or float64 -> mean and reciprocal deviation (1, C).
fixed_statistics = RawOp(
    "fixed_statistics(Tensor mean, Tensor var, float eps) -> (Tensor, Tensor)", _fixed_fake)
# grad - shift - x_hat * scale: what remains of it once the statistics move with the input.
modulation_center = RawOp(
    "modulation_center(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor shift, "
    "Tensor scale) -> Tensor",
    _center_fake, _TRITON + "modulation_center",
)
