"""Indexed modulation: gamma and beta are rows of a small table, picked by an index per pixel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import check_device, check_shape, check_tensor
from ...runtime.derivatives import recorded_gradients
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import acc_dtype, empty_nchw
from ..modulation.op import (
    Options,
    activated,
    activation_slope,
    check_input,
    check_running_pair,
    input_gradient,
    normalized,
    output_shape,
    statistics,
)
from . import reference

KINDS = ("cpu", "triton")
_TRITON = "smis_kernels.ops.indexed_modulation.triton:"


def _apply_fake(
    input: Tensor, mean: Tensor, rstd: Tensor, index: Tensor, table: Tensor, mean_s: Tensor | None,
    rstd_s: Tensor | None, table_s: Tensor | None, slope: float, slope_s: float, upsample: bool,
) -> tuple[Tensor, Tensor]:
    out = empty_nchw(output_shape(input, upsample), input)
    return out, torch.empty_like(out) if table_s is not None else input.new_empty(0)


def _backward_fake(
    grad: Tensor, output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, index: Tensor,
    table: Tensor, grad_s: Tensor | None, output_s: Tensor | None, mean_s: Tensor | None,
    rstd_s: Tensor | None, table_s: Tensor | None, slope: float, slope_s: float, upsample: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = input.shape
    acc = acc_dtype(input)
    shape = table.shape
    return (
        empty_nchw((n, c, h, w), input), input.new_empty(shape, dtype=acc),
        input.new_empty(shape if table_s is not None else (0,), dtype=acc),
        input.new_empty((2, n, c) if sums else (0,), dtype=acc),
    )


_apply = RawOp(
    "indexed_modulation_apply(Tensor input, Tensor mean, Tensor rstd, Tensor index, Tensor table, "
    "Tensor? mean_s, Tensor? rstd_s, Tensor? table_s, float slope, float slope_s, bool upsample) "
    "-> (Tensor, Tensor)",
    _apply_fake, _TRITON + "indexed_modulation_apply",
)
# -> input gradient with fixed statistics, gradients of the tables, and the two sums over each
# plane that batch statistics need.
_backward = RawOp(
    "indexed_modulation_backward(Tensor grad, Tensor output, Tensor input, Tensor mean, "
    "Tensor rstd, Tensor index, Tensor table, Tensor? grad_s, Tensor? output_s, Tensor? mean_s, "
    "Tensor? rstd_s, Tensor? table_s, float slope, float slope_s, bool upsample, bool sums) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake, _TRITON + "indexed_modulation_backward",
)


class _IndexedModulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, table: Tensor, table_s: Tensor | None, index: Tensor,
        mean: Tensor, rstd: Tensor, mean_s: Tensor | None, rstd_s: Tensor | None, reduction: str,
        slope: float, slope_s: float, options: Options, kind: str,
    ) -> tuple[Tensor, Tensor]:
        out, out_s = _apply(
            kind, input, mean, rstd, index, table, mean_s, rstd_s, table_s, slope, slope_s,
            options.upsample,
        )
        pair = table_s is not None
        ctx.save_for_backward(
            input, index, table, table_s, mean, rstd, mean_s, rstd_s,
            out if slope != 1 else None, out_s if pair and slope_s != 1 else None,
        )
        ctx.settings = (reduction, slope, slope_s, options, kind, pair)
        return out, out_s

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_s: Tensor) -> tuple[Any, ...]:
        input, index, table, table_s, mean, rstd, mean_s, rstd_s, out, out_s = ctx.saved_tensors
        reduction, slope, slope_s, options, kind, pair = ctx.settings
        if torch.is_grad_enabled():
            grads = [activated(grad, out, slope), activated(grad_s, out_s, slope_s)]

            def modulated(x: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
                if options.upsample:
                    x = F.interpolate(x, scale_factor=2, mode="nearest")
                means = (mean, mean if mean_s is None else mean_s)
                rstds = (rstd, rstd if rstd_s is None else rstd_s)
                outputs = []
                for m, r, rows in zip(means, rstds, tables, strict=False):
                    gamma, beta = (t.to(x.dtype) for t in reference.gamma_beta(index, rows))
                    outputs.append(normalized(x, m, r, reduction, options) * (1 + gamma) + beta)
                return tuple(outputs)

            tables = (table, table_s) if pair else (table,)
            found = recorded_gradients(modulated, (input, *tables), grads[: len(tables)])
            return (*found, *(None,) * (13 - len(found)))
        partial, dtable, dtable_s, sums = _backward(
            kind, grad, grad if out is None else out, input, mean, rstd, index, table,
            grad_s if pair else None, (grad_s if out_s is None else out_s) if pair else None,
            mean_s, rstd_s, table_s, slope, slope_s, options.upsample, reduction != "fixed",
        )
        if reduction != "fixed":
            partial = input_gradient(kind, partial, sums, input, mean, rstd, reduction, options)
        dtable_s = dtable_s.to(table.dtype) if pair else None
        return (partial, dtable.to(table.dtype), dtable_s, *(None,) * 10)


def _checked_table(name: str, table: Tensor, index: Tensor, input: Tensor,
                   upsample: bool) -> Tensor:
    """The table as the kernels take it: a GPU's reads it as it is."""
    n, c, h, w = output_shape(input, upsample)
    check_tensor("index", index, 3, "(N, H, W)", (torch.int32,))
    check_shape("index", index, (n, h, w), "for the output's pixels")
    check_tensor(name, table, 2, "(U, 2C)", tuple({acc_dtype(input): 0, input.dtype: 0}))
    check_shape(name, table, (table.shape[0], 2 * c), "(gamma and beta of the input's channels)")
    check_device(name, table, input, "input")
    check_device("index", index, input, "input")
    return table if input.is_cuda else table.to(acc_dtype(input))


def indexed_modulation(
    input: Tensor, index: Tensor, table: Tensor, *, norm: str = "batch",
    num_groups: int | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, activation: str | None = None, negative_slope: float = 0.2,
    upsample: bool = False, process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Modulate with gamma and beta gathered from a table: one read of x, one write of y.

    .. math:: y_p = \mathrm{act}(\hat x_p (1 + G^\gamma_{u(p)}) + G^\beta_{u(p)})

    Args:
        input: (N, C, H, W) as in :func:`modulation`; channels-last is the fast layout.
        index: u, (N, H, W) int32 rows of the table ((N, 2H, 2W) with ``upsample``), trusted to be
            in range: :class:`LabelLayout` makes it.
        table: G, (U, 2C), rows [gamma | beta], float32 (float64 for a float64 input), or of the
            input's dtype: half the bytes to gather, rounded as convs would round gamma and beta.
        others: as in :func:`modulation`.

    Returns:
        As :func:`modulation`. Differentiable in input and table.

    Example:
        >>> x, table = torch.randn(1, 8, 4, 4), torch.randn(3, 16)
        >>> index = torch.arange(16, dtype=torch.int32).view(1, 4, 4) % 3
        >>> y = indexed_modulation(x, index, table, training=True)
    """
    options = Options(norm, num_groups, training, momentum, eps, upsample, process_group)
    slope = activation_slope(activation, negative_slope)
    check_input(input, options, (running_mean, running_var))
    table = _checked_table("table", table, index, input, upsample)
    kind = resolve("indexed_modulation", input, backend, KINDS)
    record("indexed_modulation", kind, input, rows=table.shape[0] - 1)
    if kind == "reference" or input.numel() == 0:
        return reference.indexed_modulation(
            input, index, table, norm=norm, num_groups=num_groups, running_mean=running_mean,
            running_var=running_var, training=training and input.numel() > 0, momentum=momentum,
            eps=eps, activation=activation, negative_slope=negative_slope, upsample=upsample,
            process_group=process_group,
        )
    (stats,) = statistics(input, kind, options, (running_mean, running_var))
    out, _ = _IndexedModulation.apply(
        input, table, None, index, stats.mean, stats.rstd, None, None, stats.reduction, slope, 1.0,
        options, kind,
    )
    return out


def indexed_modulation_pair(
    input: Tensor, index: Tensor, table: Tensor, table_s: Tensor, *, norm: str = "batch",
    num_groups: int | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, running_mean_s: Tensor | None = None,
    running_var_s: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, activation: str | None = "leaky_relu", negative_slope: float = 0.2,
    upsample: bool = False, process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Two indexed modulations from one read of the input, as :func:`modulation_pair`.

    Both tables, (U, 2C), are picked from by the same ``index``; the first output is activated,
    the second is not.

    Example:
        >>> x, table = torch.randn(1, 8, 4, 4), torch.randn(3, 16)
        >>> index = torch.arange(16, dtype=torch.int32).view(1, 4, 4) % 3
        >>> y, y_s = indexed_modulation_pair(x, index, table, 2 * table, training=True)
    """
    options = Options(norm, num_groups, training, momentum, eps, upsample, process_group)
    slope = activation_slope(activation, negative_slope)
    running, running_s = (running_mean, running_var), (running_mean_s, running_var_s)
    check_running_pair(input, options, running, running_s)
    table = _checked_table("table", table, index, input, upsample)
    table_s = _checked_table("table_s", table_s, index, input, upsample)
    kind = resolve("indexed_modulation_pair", input, backend, KINDS)
    record("indexed_modulation_pair", kind, input, rows=table.shape[0] - 1)
    if kind == "reference" or input.numel() == 0:
        y, y_s = (
            reference.indexed_modulation(
                input, index, t, norm=norm, num_groups=num_groups, running_mean=r[0],
                running_var=r[1], training=training and input.numel() > 0, momentum=momentum,
                eps=eps, activation=act, negative_slope=negative_slope, upsample=upsample,
                process_group=process_group,
            )
            for t, r, act in ((table, running, activation), (table_s, running_s, None))
        )
        return y, y_s
    stats, stats_s = statistics(input, kind, options, running, running_s)
    own = (stats_s.mean, stats_s.rstd) if stats_s is not stats else (None, None)
    out: tuple[Tensor, Tensor] = _IndexedModulation.apply(
        input, table, table_s, index, stats.mean, stats.rstd, *own, stats.reduction, slope, 1.0,
        options, kind,
    )
    return out
