"""Indexed modulation: gamma and beta are rows of a small table, picked by an index per pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...runtime.check import check_device, check_shape, check_tensor
from ...runtime.library import RawOp
from ...runtime.tensors import acc_dtype, empty_nchw
from ..modulation.op import KINDS, SOURCES, Branch, Source, modulate, output_shape
from ..normalization import Keywords, Options
from ..segments import Pieces
from . import reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

_TRITON = "smis_kernels.ops.indexed_modulation.triton:"
__all__ = ["KINDS", "indexed_modulation", "indexed_modulation_pair"]


def indexed_modulation(
    input: Tensor, index: Tensor, table: Tensor, *, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, activation: str | None = None, negative_slope: float = 0.2,
    order: Callable[[], Pieces] | None = None, backend: str | None = None,
    **options: Unpack[Keywords],
) -> Tensor:
    r"""Modulate with gamma and beta gathered from a table: one read of x, one write of y.

    .. math:: y_p = \mathrm{act}(\hat x_p (1 + G^\gamma_{u(p)}) + G^\beta_{u(p)})

    Args:
        input: (N, C, H, W) as in :func:`modulation`; channels-last is the fast layout.
        index: u, (N, H, W) int32 rows of the table ((N, 2H, 2W) with ``upsample``), as
            :class:`LabelLayout` makes them.
        table: G, (U, 2C), rows [gamma | beta], float32 (float64 for a float64 input), or of the
            input's dtype: half the bytes to gather, rounded as convs would round gamma and beta.
        order: gives pixels by the row that they pick, in which a GPU sums a table's gradient:
            :meth:`LabelLayout.pixel_order`. Default: they are sorted in each backward.
        others: as in :func:`modulation`.

    Returns:
        As :func:`modulation`. Differentiable in input and table.

    Raises:
        As :func:`modulation`; ValueError: a row that the table has not. A GPU is not made to wait
            for that check: there such a pixel becomes NaN, and no gradient of the table has it.

    Example:
        >>> x, table = torch.randn(1, 8, 4, 4), torch.randn(3, 16)
        >>> index = torch.arange(16, dtype=torch.int32).view(1, 4, 4) % 3
        >>> y = indexed_modulation(x, index, table, training=True)
    """
    branches = [Branch((table,), (running_mean, running_var), activation)]
    return modulate(INDEXED, "indexed_modulation", input, index, branches, negative_slope,
                    backend, options, order)[0]


def indexed_modulation_pair(
    input: Tensor, index: Tensor, table: Tensor, table_s: Tensor, *,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    running_mean_s: Tensor | None = None, running_var_s: Tensor | None = None,
    activation: str | None = "leaky_relu", negative_slope: float = 0.2,
    order: Callable[[], Pieces] | None = None, backend: str | None = None,
    **options: Unpack[Keywords],
) -> tuple[Tensor, Tensor]:
    """Two indexed modulations from one read of the input, as :func:`modulation_pair`.

    Both tables, (U, 2C), are picked from by the same ``index``; the first output is activated,
    the second is not.

    Example:
        >>> x, table = torch.randn(1, 8, 4, 4), torch.randn(3, 16)
        >>> index = torch.arange(16, dtype=torch.int32).view(1, 4, 4) % 3
        >>> y, y_s = indexed_modulation_pair(x, index, table, 2 * table, training=True)
    """
    branches = [Branch((table,), (running_mean, running_var), activation),
                Branch((table_s,), (running_mean_s, running_var_s), None)]
    y, y_s = modulate(INDEXED, "indexed_modulation_pair", input, index, branches, negative_slope,
                      backend, options, order)
    return y, y_s


def _checked(name: str, table: Tensor, index: Tensor | None, input: Tensor,
             options: Options) -> Tensor:
    """The table as the kernels take it: a GPU's reads it as it is."""
    n, c, h, w = output_shape(input, options.upsample)
    assert index is not None
    check_tensor("index", index, 3, "(N, H, W)", (torch.int32,))
    check_shape("index", index, (n, h, w), "for the output's pixels")
    check_tensor(name, table, 2, "(U, 2C)", tuple({acc_dtype(input): 0, input.dtype: 0}))
    check_shape(name, table, (table.shape[0], 2 * c), "(gamma and beta of the input's channels)")
    check_device(name, table, input, "input")
    check_device("index", index, input, "input")
    return table if input.is_cuda else table.to(acc_dtype(input))


def _gamma_beta(index: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor | None]:
    assert index is not None
    return reference.gamma_beta(index, table)


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
    sums: bool, *order: Tensor,
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
_GRADIENTS = (
    "(Tensor grad, Tensor output, Tensor input, Tensor mean, Tensor rstd, Tensor index, "
    "Tensor table, Tensor? grad_s, Tensor? output_s, Tensor? mean_s, Tensor? rstd_s, "
    "Tensor? table_s, float slope, float slope_s, bool upsample, bool sums{}) "
    "-> (Tensor, Tensor, Tensor, Tensor)")
_backward = RawOp("indexed_modulation_backward" + _GRADIENTS.format(""), _backward_fake,
                  _TRITON + "indexed_modulation_backward")
# The same on a GPU that has the order of the sums.
_ordered_backward = RawOp(
    "indexed_modulation_ordered_backward"
    + _GRADIENTS.format(", Tensor elements, Tensor pieces, Tensor firsts"),
    _backward_fake, _TRITON + "indexed_modulation_backward", on_cpu=False)

INDEXED = Source(
    "indexed", ("table",), _checked, lambda branches: {"rows": branches[0].affine[0].shape[0] - 1},
    reference.indexed_modulation, _gamma_beta, _apply, _backward, _ordered_backward,
)
SOURCES[INDEXED.kind] = INDEXED
