"""The definition: gather gamma and beta of every pixel, then modulate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modulation import reference


def gamma_beta(index: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, W) row numbers and (U, 2C) rows [gamma | beta] -> two (N, C, H, W)."""
    rows = table[index.long()].permute(0, 3, 1, 2)
    gamma, beta = rows.chunk(2, 1)
    return gamma, beta


def indexed_modulation(input: Tensor, index: Tensor, table: Tensor, **options: Any) -> Tensor:
    """``modulation`` with gamma and beta spelled out."""
    gamma, beta = (t.to(input.dtype) for t in gamma_beta(index, table))
    return reference.modulation(input, gamma, beta, **options)
