"""A block's learned shortcut: a 1x1 conv of modulated features that are never written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import WIDE, check_tensor
from ...runtime.derivatives import transformed
from ...runtime.explain import record
from ...runtime.library import RawOp
from ..convs import check_weight
from ..indexed_modulation.op import INDEXED, indexed_modulation
from ..modulation.op import output_shape
from ..normalization import Keywords, Options, check_input, statistics
from . import reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS = ("cpu",)


def indexed_shortcut(
    input: Tensor, index: Tensor, table: Tensor, weight: Tensor, *,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, groups: int = 1,
    backend: str | None = None, **options: Unpack[Keywords],
) -> Tensor:
    r"""The 1x1 conv of an indexed modulation, once for all pixels that have features and row alike.

    .. math:: y_p = W (\hat x_p (1 + G^\gamma_{u(p)}) + G^\beta_{u(p)})

    equal to ``F.conv2d(indexed_modulation(input, index, table, ...), weight, groups=groups)`` up to
    rounding. With ``upsample`` four pixels share their features, and mostly their row too: one
    product then. Where a gradient is wanted, in 16-bit types and on a GPU it is these two calls.

    Args:
        input, index, table: (N, C, H, W), (N, H, W) int32 and (U, 2C) as in
            :func:`indexed_modulation`; index (N, 2H, 2W) with ``upsample``.
        weight: W, (C', C / groups, 1, 1), of the input's dtype.
        groups: blocked connections, as ``F.conv2d``.
        backend: "auto", "reference" or "cpu".
        others: as in :func:`modulation`.

    Returns:
        (N, C', H, W), or (N, C', 2H, 2W) with ``upsample``; channels-last from the native kernel.

    Raises:
        As :func:`indexed_modulation`; ValueError, TypeError: a weight, or groups, of other
            channels, dtype or device.

    Source: the blocks of Park et al., "Semantic Image Synthesis with Spatially-Adaptive
    Normalization", CVPR 2019.

    Example:
        >>> x, table = torch.randn(1, 8, 4, 4), torch.randn(3, 16)
        >>> index = torch.arange(16, dtype=torch.int32).view(1, 4, 4) % 3
        >>> indexed_shortcut(x, index, table, torch.randn(5, 8, 1, 1)).shape
        torch.Size([1, 5, 4, 4])
    """
    settings, running = Options(**options), (running_mean, running_var)
    check_input(input, settings, running)
    rows = INDEXED.check("table", table, index, input, settings)
    check_tensor("weight", weight, 4, "(C', C / groups, 1, 1)", (input.dtype,))
    check_weight(weight, input, groups, (1, 1))
    kind = resolve("indexed_shortcut", input, backend, KINDS)
    if backend == "reference" or input.numel() == 0:
        record("indexed_shortcut", "reference", input)
        return reference.indexed_shortcut(
            input, index, table, weight, groups, running_mean=running_mean,
            running_var=running_var, **options)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (input, table, weight))
    if kind == "reference" or wanted or transformed() is not None or input.dtype not in WIDE:
        modulated = indexed_modulation(
            input, index, table, running_mean=running_mean, running_var=running_var,
            backend=backend, **options)
        return F.conv2d(modulated, weight, groups=groups)
    record("indexed_shortcut", kind, input, groups=groups)
    mean, rstd, _ = statistics(input, kind, settings, running)[0]
    y: Tensor = _shortcut(kind, input, mean, rstd, index, rows, weight, groups, settings.upsample)
    return y


def _fake(input: Tensor, mean: Tensor, rstd: Tensor, index: Tensor, table: Tensor, weight: Tensor,
          groups: int, upsample: bool) -> Tensor:
    n, _, h, w = output_shape(input, upsample)
    return torch.empty((n, weight.shape[0], h, w), dtype=input.dtype, device=input.device,
                       memory_format=torch.channels_last)


_shortcut = RawOp(
    "indexed_shortcut(Tensor input, Tensor mean, Tensor rstd, Tensor index, Tensor table, "
    "Tensor weight, SymInt groups, bool upsample) -> Tensor", _fake)
