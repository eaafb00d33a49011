"""The definition of level tables: each norm's embedding and table, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..window_table import reference

if TYPE_CHECKING:
    from .packing import NormConvs


def level_tables(vectors: Tensor, windows3: Tensor, windows5: Tensor,
                 norms: Sequence[NormConvs]) -> list[Tensor]:
    """A table (U + 1, 2C) for every norm."""
    return [
        reference.window_table(
            reference.window_embedding(vectors, norm.weight, norm.bias, windows3,
                                       groups=norm.shared_groups),
            norm.weight_gamma, norm.bias_gamma, norm.weight_beta, norm.bias_beta, windows5,
            groups=norm.groups)
        for norm in norms
    ]
