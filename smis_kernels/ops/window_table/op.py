"""Window tables: gamma and beta of every distinct label window, instead of every pixel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import (
    WIDE,
    autocast_enabled,
    check_device,
    check_rows,
    check_shape,
    check_tensor,
)
from ...runtime.constants import constant
from ...runtime.derivatives import recorded_gradients
from ...runtime.library import RawOp
from ..label_windows.op import GroupWindows
from ..segments import Segments, order_for_gradients
from . import reference

KINDS = ("cpu", "triton")
_TRITON = "smis_kernels.ops.window_table.triton:"
_LOW = (torch.float16, torch.bfloat16)


def window_embedding(
    vectors: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor | GroupWindows, *,
    groups: int = 1, relu: bool = True, order: Callable[[], Segments] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A 3x3 conv on label windows: an embedding bag, the one-hot map is never built.

    .. math:: h_v = \mathrm{ReLU}(b + \sum_t W_t E[s_{v,t}])

    Args:
        vectors: E, (S + 1, K), float32 or float64; row 0 zero.
        weight: (D, K / groups, 3, 3). bias: (D,) or None.
        windows: (V + 1, 9) int32 rows of ``vectors``; or, on the CPU, the :class:`GroupWindows`
            of G groups of D / G outputs, of which each takes its own.
        relu: apply it.
        order: gives windows by the row that they read, in which a GPU sums gradients:
            :meth:`LabelLayout.window_order`. Default: they are sorted in each backward.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (V + 1, D), or (R + 1, D) for windows of groups, zero beyond a group's count; row 0 is zero.
        Differentiable in vectors, weight and bias; of windows of groups, vectors that a group finds
        equal have their gradient at the first of them.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        ValueError: a row that ``vectors`` has not. A GPU is not made to wait for that check: there
            such a tap counts as outside the image, as row 0 does.

    Example:
        >>> vectors = torch.cat([torch.zeros(1, 4), torch.eye(4)])
        >>> windows = torch.randint(5, (7, 9), dtype=torch.int32)
        >>> hidden = window_embedding(vectors, torch.randn(6, 4, 3, 3), torch.zeros(6), windows)
        >>> hidden.shape
        torch.Size([7, 6])
    """
    check_tensor("vectors", vectors, 2, "(S, K)", WIDE)
    own = windows if isinstance(windows, GroupWindows) else None
    if not isinstance(windows, GroupWindows):
        _check_windows(windows, vectors, "vectors")
    elif weight.shape[0] % len(windows.kinds):
        raise ValueError(f"windows: expected those of a divisor of {weight.shape[0]} groups, got "
                         f"{len(windows.kinds)}")
    _check_groups(groups, vectors.shape[1], weight.shape[0])
    _check_conv("", weight, bias, vectors,
                (weight.shape[0], vectors.shape[1] // groups, 3, 3))
    kind = resolve("window_embedding", vectors, backend, KINDS if own is None else KINDS[:1])
    taken = windows.windows if isinstance(windows, GroupWindows) else windows
    count = vectors.shape[0]
    check_rows("windows", taken, count, kind)
    if kind == "reference":
        return reference.window_embedding(
            vectors, weight, bias, windows, groups=groups, relu=relu
        )
    channels = weight.shape[0]
    grouped = vectors.view(count, groups, -1)
    with torch.autocast(vectors.device.type, enabled=False):  # tables stay in fp32
        if kind == "cpu":  # which reorders the few rows faster than the weight
            taps = weight.reshape(groups, channels // groups, -1, 9)
            rows = torch.einsum("rgk,gdkt->rtgd", grouped, taps).reshape(count, 9, channels)
        else:
            taps = constant(("taps", groups), partial(_taps, weight, groups), weight)
            rows = torch.bmm(grouped.transpose(0, 1), taps).view(groups, count, 9, -1)
            rows = rows.permute(1, 2, 0, 3).reshape(count, 9, channels)
    found = order_for_gradients(order, kind, (9 * (taken.shape[-2] - 1), 9 * count), rows, bias)
    out: Tensor = _WindowSum.apply(rows, taken, bias, relu, kind, own, found)
    return out


def window_table(
    hidden: Tensor, weight_gamma: Tensor, bias_gamma: Tensor, weight_beta: Tensor,
    bias_beta: Tensor, windows: Tensor, *, own: GroupWindows | None = None, groups: int = 1,
    one_level: bool = False, order: Callable[[], Segments] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Gamma and beta of every distinct window: two 3x3 convs as one blocked product.

    .. math:: G_u = b + \sum_t H[v_{u,t}] W_t^T

    Args:
        hidden: H, (V + 1, D), float32 or float64; row 0 zero.
        weight_gamma, weight_beta: (C, D / groups, 3, 3). bias_gamma, bias_beta: (C,). Of hidden's
            dtype, or of 16 bits: then a GPU makes single TF32 products, in which such weights are
            exact, and hidden rounds to 10 bits, and the table is of 16 bits too; elsewhere, and
            with gradients, they are cast.
        windows: (U + 1, 9) int32 rows of ``hidden``.
        own: on the CPU, of hidden rows that groups have for themselves: group g takes row
            ``own.ids[own.kinds[g], v]`` for v in ``windows``, so that each multiplies the rows
            that it tells apart, and no others.
        groups: of the two convs.
        one_level: multiply the nine rows of each window directly, U x 9D; else the products of
            the V rows with every tap are made once (kept in cache a block of channels at a time)
            and summed nine at a time, V x D. Same result up to the order of sums.
        order: as in :func:`window_embedding`.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (U + 1, 2C), rows [gamma | beta]; row 0 is zero. Differentiable in all but windows.

    Raises:
        As :func:`window_embedding`.

    Example:
        >>> hidden, windows = torch.rand(5, 6), torch.randint(5, (7, 9), dtype=torch.int32)
        >>> gamma, beta = torch.randn(2, 8, 6, 3, 3)
        >>> window_table(hidden, gamma, torch.zeros(8), beta, torch.zeros(8), windows).shape
        torch.Size([7, 16])
    """
    check_tensor("hidden", hidden, 2, "(V, D)", WIDE)
    _check_windows(windows, hidden, "hidden")
    channels, depth = weight_gamma.shape[0], hidden.shape[1]
    _check_groups(groups, depth, channels)
    shape = (channels, depth // groups, 3, 3)
    _check_conv("_gamma", weight_gamma, bias_gamma, hidden, shape, _LOW)
    _check_conv("_beta", weight_beta, bias_beta, hidden, shape, _LOW)
    if own is not None and len(own.kinds) != groups:
        raise ValueError(f"own: expected the windows of {groups} groups, got {len(own.kinds)}")
    kind = resolve("window_table", hidden, backend, KINDS if own is None else KINDS[:1])
    check_rows("windows", windows, hidden.shape[0] if own is None else own.ids.shape[1], kind)
    if own is not None:
        check_rows("own", own.ids, hidden.shape[0], kind)
    bias_gamma, bias_beta = (
        constant(("wide", hidden.dtype), partial(bias.to, hidden.dtype), bias)
        for bias in (bias_gamma, bias_beta)
    )
    trained = torch.is_grad_enabled() and any(
        t.requires_grad for t in (hidden, weight_gamma, weight_beta, bias_gamma, bias_beta))
    mixed = weight_gamma.dtype != weight_beta.dtype
    if kind != "triton" or trained or mixed or hidden.dtype == torch.float64:
        weight_gamma, weight_beta = (
            constant(("wide", hidden.dtype), partial(weight.to, hidden.dtype), weight)
            for weight in (weight_gamma, weight_beta)
        )
    if kind == "reference":
        return reference.window_table(
            hidden, weight_gamma, bias_gamma, weight_beta, bias_beta, windows, own, groups=groups
        )
    tensors = hidden, weight_gamma, bias_gamma, weight_beta, bias_beta
    found = order_for_gradients(order, kind, (9 * (windows.shape[0] - 1), 9 * hidden.shape[0]),
                                *tensors)
    out: Tensor = _WindowTable.apply(
        *tensors, windows, groups, one_level, kind, own, found,
        hidden.dtype == torch.float32 and autocast_enabled(hidden),
    )
    return out


def _check_windows(windows: Tensor, like: Tensor, other: str) -> None:
    check_tensor("windows", windows, 2, "(V, 9)", (torch.int32,))
    check_shape("windows", windows, (windows.shape[0], 9), "(nine taps)")
    check_device("windows", windows, like, other)


def _check_groups(groups: int, *counts: int) -> None:
    if groups < 1 or any(count % groups for count in counts):
        raise ValueError(
            f"groups: expected a divisor of {' and '.join(map(str, counts))}, got {groups}"
        )


def _check_conv(suffix: str, weight: Tensor, bias: Tensor | None, like: Tensor,
                shape: tuple[int, ...], low: tuple[torch.dtype, ...] = ()) -> None:
    tensors = {"weight" + suffix: (weight, shape)}
    if bias is not None:
        tensors["bias" + suffix] = (bias, shape[:1])
    for name, (tensor, expected) in tensors.items():
        check_shape(name, tensor, expected, "for the rows and groups given")
        check_tensor(name, tensor, len(expected), str(expected), (like.dtype, *low))
        check_device(name, tensor, like, "the rows")


def _taps(weight: Tensor, groups: int) -> Tensor:
    """(D, K / groups, 3, 3) as (groups, K / groups, 9 D / groups): a product's second operand."""
    outputs, depth = weight.shape[0] // groups, weight.shape[1]
    taps = weight.reshape(groups, outputs, depth, 9).permute(0, 2, 3, 1)
    return taps.reshape(groups, depth, 9 * outputs)


class _WindowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, windows: Tensor, bias: Tensor | None, relu: bool,
                kind: str, own: GroupWindows | None, order: Segments | None) -> Tensor:
        groups = () if own is None else (own.kinds, own.counts)
        out: Tensor = _window_sum(kind, rows, windows, bias, relu, *groups)
        ctx.save_for_backward(windows, out if relu else None)
        ctx.settings = (rows.shape[0], kind, own, order)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        windows, out = ctx.saved_tensors
        count, kind, own, order = ctx.settings
        if out is not None:
            grad = torch.where(out > 0, grad, 0)
        if own is not None:
            kept = reference.used(own.counts, own.kinds, len(grad))
            grad = torch.where(kept, grad.unflatten(1, (len(own.kinds), -1)), 0).flatten(1)
        if torch.is_grad_enabled():
            def summed(weighted: Tensor) -> Tensor:
                return reference.window_sum(weighted, windows, own)

            # Linear: the values of the rows do not matter.
            like = grad.new_zeros((count, 9, grad.shape[1])).requires_grad_()
            (rows,) = recorded_gradients(summed, (like,), (grad,))
        else:
            kinds = None if own is None else own.kinds
            rows = _scattered(kind, grad, windows, count, kinds, order)
        bias = grad[1:].sum(0) if ctx.needs_input_grad[2] else None
        return rows, None, bias, *(None,) * 4


class _WindowTable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_gamma: Tensor, bias_gamma: Tensor, weight_beta: Tensor,
        bias_beta: Tensor, windows: Tensor, groups: int, one_level: bool, kind: str,
        own: GroupWindows | None, order: Segments | None, low: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight_gamma, weight_beta, windows)
        ctx.settings = (groups, kind, own, order, low)
        table: Tensor = _window_table(
            kind, hidden, weight_gamma, bias_gamma, weight_beta, bias_beta, windows, groups,
            one_level, *(() if own is None else (own.kinds, own.ids)),
        )
        return table

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight_gamma, weight_beta, windows = ctx.saved_tensors
        groups, kind, own, order, low = ctx.settings
        rows = hidden.shape[0]
        bias_gamma, bias_beta = grad[1:].sum(0).split(weight_gamma.shape[0])
        if torch.is_grad_enabled():
            zero = torch.zeros_like(bias_gamma, requires_grad=False)

            def table(h: Tensor, w_gamma: Tensor, w_beta: Tensor) -> Tensor:
                return reference.window_table(h, w_gamma, zero, w_beta, zero, windows, own,
                                              groups=groups)

            dhidden, dgamma, dbeta = recorded_gradients(
                table, (hidden, weight_gamma, weight_beta), (grad,))
            return (dhidden, dgamma, bias_gamma, dbeta, bias_beta, *(None,) * 7)
        if own is None:
            scattered = _scattered(kind, grad, windows, rows, None, order)
        else:
            taken = own.ids[:, windows.long()]  # [K, U + 1, 9]
            scattered = _scattered(kind, grad, taken, rows, own.kinds.repeat(2), None)
        dhidden, dweight = _table_products(
            kind, scattered, hidden, weight_gamma, weight_beta, groups, low)
        dgamma, dbeta = dweight.unbind()
        return (dhidden, dgamma, bias_gamma, dbeta, bias_beta, *(None,) * 7)


def _scattered(kind: str, grad: Tensor, windows: Tensor, rows: int, kinds: Tensor | None,
               order: Segments | None) -> Tensor:
    if order is None:
        scattered: Tensor = _window_scatter(kind, grad, windows, rows, kinds)
    else:
        scattered = _segment_sums(kind, grad, *order).view(rows, 9, -1)
    return scattered


def _products_in_torch(scattered: Tensor, hidden: Tensor, weight_gamma: Tensor,
                       weight_beta: Tensor, groups: int, single: bool) -> tuple[Tensor, Tensor]:
    # T[v, j, tsc] = H[v, j, k] W[j, tsc, k]: groups j, taps t, halves s, channels c
    rows, depth = hidden.shape
    wide, deep = weight_gamma.shape[0] // groups, depth // groups
    scattered = scattered.view(rows, 9, 2, groups, wide)
    # One group: a view, so that the large (V, 18C) is never copied.
    scattered = scattered.permute(3, 0, 1, 2, 4).reshape(groups, rows, 18 * wide)
    weight = torch.stack([weight_gamma, weight_beta]).view(2, groups, wide, deep, 9)
    weight = weight.permute(1, 4, 0, 2, 3).reshape(groups, 18 * wide, deep)
    grouped = hidden.reshape(rows, groups, deep).transpose(0, 1)
    with torch.autocast(hidden.device.type, enabled=False):  # as forward's products
        dhidden = torch.bmm(scattered, weight).transpose(0, 1).reshape(rows, depth)
        dweight = torch.bmm(scattered.transpose(1, 2), grouped).view(groups, 9, 2, wide, deep)
    dweight = dweight.permute(2, 0, 3, 4, 1).contiguous()  # of one group a view would do
    return dhidden, dweight.view(2, *weight_gamma.shape)


def _table_fake(
    hidden: Tensor, weight_gamma: Tensor, bias_gamma: Tensor, weight_beta: Tensor,
    bias_beta: Tensor, windows: Tensor, groups: int, one_level: bool,
    kinds: Tensor | None = None, ids: Tensor | None = None,
) -> Tensor:
    # Weights of 16 bits come to a GPU's kernel alone, which rounds the table as convs would.
    return weight_gamma.new_empty((windows.shape[0], 2 * weight_gamma.shape[0]))


def _sum_fake(rows: Tensor, windows: Tensor, bias: Tensor | None, relu: bool,
              kinds: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    return rows.new_empty((windows.shape[-2], rows.shape[2]))


def _scatter_fake(grad: Tensor, windows: Tensor, rows: int, kinds: Tensor | None = None) -> Tensor:
    return grad.new_empty((rows, 9, grad.shape[1]))


def _segments_fake(source: Tensor, elements: Tensor, bounds: Tensor) -> Tensor:
    return source.new_empty((bounds.shape[0] - 1, source.shape[1]))


def _products_fake(scattered: Tensor, hidden: Tensor, weight_gamma: Tensor, weight_beta: Tensor,
                   groups: int, single: bool) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty((2, *weight_gamma.shape))


# Row 0 of every table stands for the outside of the image and is zero. The optional arguments are
# of GroupWindows, on the CPU alone: windows are then (K, V, 9), or rows of hidden go through ids.
_window_table = RawOp(
    "window_table(Tensor hidden, Tensor weight_gamma, Tensor bias_gamma, Tensor weight_beta, "
    "Tensor bias_beta, Tensor windows, int groups, bool one_level, Tensor? kinds=None, "
    "Tensor? ids=None) -> Tensor",
    _table_fake, _TRITON + "window_table",
)
# (R, 9, C) rows -> (V, C): the sum of row windows[v, t] at tap t, plus bias.
_window_sum = RawOp(
    "window_sum(Tensor rows, Tensor windows, Tensor? bias, bool relu, Tensor? kinds=None, "
    "Tensor? counts=None) -> Tensor", _sum_fake, _TRITON + "window_sum",
)
# Its transpose: (V, C) -> (R, 9, C).
_window_scatter = RawOp(
    "window_scatter(Tensor grad, Tensor windows, int rows, Tensor? kinds=None) -> Tensor",
    _scatter_fake, _TRITON + "window_scatter")
# The same on a GPU that has the order of the sums: rows of ``source`` by segments.
_segment_sums = RawOp(
    "segment_sums(Tensor source, Tensor elements, Tensor bounds) -> Tensor",
    _segments_fake, _TRITON + "segment_sum", on_cpu=False)
# (R, 9, 2C) of it -> gradients of the hidden rows, and of both weights (2, C, D / groups, 3, 3).
# ``single``: a GPU makes one TF32 product in place of three.
_table_products = RawOp(
    "table_products(Tensor scattered, Tensor hidden, Tensor weight_gamma, Tensor weight_beta, "
    "int groups, bool single) -> (Tensor, Tensor)",
    _products_fake, _TRITON + "table_products", _products_in_torch)
