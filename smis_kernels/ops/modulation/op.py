"""Modulation: normalise, scale by 1 + gamma, shift by beta, activate; one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import (
    autocast_enabled,
    check_device,
    check_rows,
    check_shape,
    check_tensor,
)
from ...runtime.checked import Checked, alike, plain
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.explain import record, recording
from ...runtime.library import RawOp
from ...runtime.tensors import acc_dtype, empty_nchw
from ..normalization import (
    SUFFIXES,
    Keywords,
    Options,
    Running,
    activated,
    activation_slope,
    channel_moments,
    check_input,
    input_gradient,
    modulation_center,
    normalized,
    statistics,
)
from ..segments import Pieces, order_for_gradients
from . import reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS = ("cpu", "triton")
_TRITON = "smis_kernels.ops.modulation.triton:"
__all__ = ["channel_moments", "modulation", "modulation_center", "modulation_pair"]


def modulation(
    input: Tensor, gamma: Tensor, beta: Tensor, *, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, activation: str | None = None, negative_slope: float = 0.2,
    backend: str | None = None, **options: Unpack[Keywords],
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
    branches = [Branch((gamma, beta), (running_mean, running_var), activation)]
    return modulate(DENSE, "modulation", input, None, branches, negative_slope, backend,
                    options)[0]


def modulation_pair(
    input: Tensor, gamma: Tensor, beta: Tensor, gamma_s: Tensor, beta_s: Tensor, *,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    running_mean_s: Tensor | None = None, running_var_s: Tensor | None = None,
    activation: str | None = "leaky_relu", negative_slope: float = 0.2,
    backend: str | None = None, **options: Unpack[Keywords],
) -> tuple[Tensor, Tensor]:
    """Two modulations from one read of the input: a block's norm_0 and its shortcut's norm_s.

    Equals ``(modulation(input, gamma, beta, activation=activation, ...),
    modulation(input, gamma_s, beta_s, activation=None, ...))``: arguments as there; each output
    has its own gamma, beta and running statistics, and the statistics are computed once.

    Example:
        >>> x, g, b, gs, bs = torch.randn(5, 2, 8, 16, 16).unbind(0)
        >>> y, y_s = modulation_pair(x, g, b, gs, bs, training=True)
    """
    branches = [Branch((gamma, beta), (running_mean, running_var), activation),
                Branch((gamma_s, beta_s), (running_mean_s, running_var_s), None)]
    y, y_s = modulate(DENSE, "modulation_pair", input, None, branches, negative_slope, backend,
                      options)
    return y, y_s


class Branch(NamedTuple):
    """One output: gamma and beta, or their table; running statistics; activation."""

    affine: tuple[Tensor, ...]
    running: Running
    activation: str | None


@dataclass(frozen=True, eq=False)
class Source:
    """Where gamma and beta come from: tensors of every pixel, or rows of a table.

    ``kind`` is its key in :data:`SOURCES` (torch.compile takes no object through autograd),
    ``names`` are those of a branch's arguments, ``check`` returns one as the kernels take it, and
    ``spelled`` gives gamma, and beta where its gradient is not simply the output's, of a pixel
    index and a branch's first argument.
    """

    kind: str
    names: tuple[str, ...]
    check: Callable[[str, Tensor, Tensor | None, Tensor, Options], Tensor]
    record: Callable[[Sequence[Branch]], dict[str, Any]]
    reference: Callable[..., Tensor]
    spelled: Callable[[Tensor | None, Tensor], tuple[Tensor, Tensor | None]]
    apply: RawOp
    backward: RawOp
    ordered_backward: RawOp | None = None


def modulate(source: Source, name: str, input: Tensor, index: Tensor | None,
             branches: Sequence[Branch], negative_slope: float, backend: str | None,
             keywords: Keywords, order: Callable[[], Pieces] | None = None) -> tuple[Tensor, ...]:
    """One or two outputs from one read of the input: what the four public modulations are."""
    options, slopes, branches = _checked_call(source, input, index, branches, negative_slope,
                                              keywords)
    kind = resolve(name, input, backend, KINDS)
    if index is not None:
        check_rows("index", index, branches[0].affine[0].shape[0], kind)
    if recording():
        record(name, kind, input, **source.record(branches))
    given = () if index is None else (index,)
    if kind == "reference" or input.numel() == 0:
        keywords = {**keywords, "training": options.training and input.numel() > 0}
        return tuple(
            source.reference(
                input, *given, *b.affine, running_mean=b.running[0], running_var=b.running[1],
                activation=b.activation, negative_slope=negative_slope, **keywords)
            for b in branches
        )
    stats, *rest = statistics(input, kind, options, *(b.running for b in branches))
    own = (rest[0].mean, rest[0].rstd) if rest and rest[0] is not stats else (None, None)
    affine = _placed([t for b in branches for t in b.affine], len(source.names))
    found = None if index is None else order_for_gradients(
        order, kind, (index.numel(), branches[0].affine[0].shape[0]), input, *affine)
    outputs: tuple[Tensor, Tensor] = applied(
        _Modulation, source.kind, stats.reduction, slopes, options, kind, found, input, index,
        stats.mean, stats.rstd, *own, *affine)
    return outputs[: len(branches)]


# Of calls whose arguments the kernels take as they are given.
_checked: Checked[tuple[Options, tuple[float, float]]] = Checked()


def _checked_call(
    source: Source, input: Tensor, index: Tensor | None, branches: Sequence[Branch],
    negative_slope: float, keywords: Keywords,
) -> tuple[Options, tuple[float, float], Sequence[Branch]]:
    """Options, both slopes, and the branches with gamma and beta as the kernels take them."""
    tensors = [input, index]
    for b in branches:
        tensors += (*b.affine, *b.running)
    called = (source.kind, negative_slope, *(b.activation for b in branches), *keywords.items())
    known = keywords.get("process_group") is None and plain(
        keywords.get("num_groups"), negative_slope, keywords.get("momentum"), keywords.get("eps"))
    key = alike(called, tensors) if known else None
    found = _checked.find(key)
    if found is not None:
        return (*found, branches)
    options = Options(**keywords)
    slopes = [activation_slope(b.activation, negative_slope) for b in branches]
    check_input(input, options, *(b.running for b in branches))
    taken = [
        b._replace(affine=tuple(source.check(n + suffix, t, index, input, options)
                                for n, t in zip(source.names, b.affine, strict=True)))
        for b, suffix in zip(branches, SUFFIXES, strict=False)
    ]
    for b, suffix in zip(taken[1:], SUFFIXES[1:], strict=False):
        for n, t, first in zip(source.names, b.affine, taken[0].affine, strict=True):
            check_shape(n + suffix, t, tuple(first.shape), f"as {n}")
    as_given = all(t is a for b, c in zip(branches, taken, strict=True)
                   for t, a in zip(b.affine, c.affine, strict=True))
    settled = (options, (slopes[0], slopes[1] if len(slopes) > 1 else 1.0))
    return (*_checked.keep(key if as_given else None, settled), taken)


class _Modulation(torch.autograd.Function):
    # torch.compile misplaces the arguments of a forward that takes any number of them.
    @staticmethod
    def forward(
        ctx: Any, source_kind: str, reduction: str, slopes: tuple[float, float], options: Options,
        kind: str, order: Pieces | None, input: Tensor, index: Tensor | None, mean: Tensor,
        rstd: Tensor, mean_s: Tensor | None, rstd_s: Tensor | None, first: Tensor,
        beta: Tensor | None, first_s: Tensor | None, beta_s: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        source = SOURCES[source_kind]
        count = len(source.names)
        given = () if index is None else (index,)
        out, out_s = source.apply(
            kind, input, mean, rstd, *given, *(first, beta)[:count], mean_s, rstd_s,
            *(first_s, beta_s)[:count], *slopes, options.upsample,
        )
        # The sign of the output decides the activation's slope: no pre-activation is kept.
        ctx.save_for_backward(
            input, index, first, first_s, mean, rstd, mean_s, rstd_s,
            out if slopes[0] != 1 else None,
            out_s if first_s is not None and slopes[1] != 1 else None,
        )
        ctx.settings = (source_kind, reduction, slopes, options, kind, order)
        return out, out_s

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_s: Tensor) -> tuple[Any, ...]:
        grads = (grad, grad_s)
        input, index, first, second, mean, rstd, mean_s, rstd_s, *outputs = ctx.saved_tensors
        source_kind, reduction, slopes, options, kind, order = ctx.settings
        source = SOURCES[source_kind]
        firsts = (first,) if second is None else (first, second)
        unused = (None,) * 6
        if torch.is_grad_enabled():
            dz = tuple(map(activated, grads, outputs, slopes))[: len(firsts)]

            def modulated(x: Tensor, *firsts: Tensor) -> tuple[Tensor, ...]:
                if options.upsample:
                    x = F.interpolate(x, scale_factor=2, mode="nearest")
                means = (mean, mean if mean_s is None else mean_s)
                rstds = (rstd, rstd if rstd_s is None else rstd_s)
                spelled = []
                for m, r, own in zip(means, rstds, firsts, strict=False):
                    gamma, beta = source.spelled(index, own)
                    y = normalized(x, m, r, reduction, options) * (1 + gamma.to(x.dtype))
                    spelled.append(y if beta is None else y + beta.to(x.dtype))
                return tuple(spelled)

            dinput, *found = recorded_gradients(modulated, (input, *firsts), dz)
            if len(source.names) == 2:  # beta's own gradient is the output's
                found = [t for pair in zip(found, dz, strict=True) for t in pair]
            return (*unused, dinput, None, *(None,) * 4, *_placed(found, len(source.names)))
        given = () if index is None else (index,)
        signs = [g if out is None else out for g, out in zip(grads, outputs, strict=True)]
        shortcut = (None, None) if second is None else (grads[1], signs[1])
        ordered = source.ordered_backward if order is not None else None
        partial_gradient, *found, sums = (ordered or source.backward)(
            kind, grads[0], signs[0], input, mean, rstd, *given, first, *shortcut, mean_s, rstd_s,
            second, *slopes, options.upsample, reduction != "fixed",
            *(() if order is None else order),
        )
        if reduction != "fixed":
            partial_gradient = input_gradient(
                kind, partial_gradient, sums, input, mean, rstd, reduction, options)
        wanted = found[: len(source.names) * len(firsts)]
        return (*unused, partial_gradient, None, *(None,) * 4,
                *_placed([t.to(first.dtype) for t in wanted], len(source.names)))


def _placed(found: Sequence[Any], count: int) -> list[Any]:
    """``count`` for each of at most two branches as (first, beta, first_s, beta_s)."""
    rows = [*found, *(None,) * (2 * count - len(found))]
    return rows if count == 2 else [rows[0], None, rows[1], None]


def output_shape(input: Tensor, upsample: bool) -> tuple[int, int, int, int]:
    """(N, C, H, W) of the output; twice the input's H and W when upsampling is folded in."""
    n, c, h, w = input.shape
    return (n, c, 2 * h, 2 * w) if upsample else (n, c, h, w)


def _as_input(name: str, tensor: Tensor, index: Tensor | None, input: Tensor,
             options: Options) -> Tensor:
    """Gamma or beta as the kernels take it."""
    if isinstance(tensor, Tensor) and autocast_enabled(input):
        tensor = tensor.to(input.dtype)
    check_tensor(name, tensor, 4, "(N, C, H, W)", (input.dtype,))
    why = "(twice the input's H and W: upsample=True)" if options.upsample else "to match input"
    check_shape(name, tensor, output_shape(input, options.upsample), why)
    check_device(name, tensor, input, "input")
    return tensor


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

DENSE = Source(
    "dense", ("gamma", "beta"), _as_input, lambda branches: {"path": "dense"}, reference.modulation,
    lambda index, gamma: (gamma, None), modulation_apply, modulation_backward,
)
SOURCES = {DENSE.kind: DENSE}
