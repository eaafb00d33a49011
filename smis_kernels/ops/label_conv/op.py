"""A conv of a label map as sums of table rows: the one-hot planes are never built."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.library import RawOp

KINDS = ("cpu",)


def _fake(symbols: Tensor, table: Tensor, sums: Tensor, bias: Tensor, like: Tensor, first: int,
          last: int) -> Tensor:
    n, _, w = symbols.shape
    return torch.empty((n, table.shape[3], last - first, w), dtype=like.dtype,
                       device=symbols.device, memory_format=torch.channels_last)


# Rows [first, last) of the output.
label_conv_op = RawOp(
    "label_conv(Tensor symbols, Tensor table, Tensor sums, Tensor bias, Tensor like, SymInt first, "
    "SymInt last) -> Tensor",
    _fake,
)
