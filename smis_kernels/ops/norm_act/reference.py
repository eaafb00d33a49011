"""The definition of norm_act, op by op."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..modulation.reference import normalize


def norm_act(input: Tensor, residual: Tensor | None = None, *, activation: str | None = None,
             negative_slope: float = 0.2, **norm: Any) -> Tensor:
    """``act(normalize(x)) + residual``, each step a tensor of its own."""
    out = normalize(input, **norm)
    if activation == "relu":
        out = F.relu(out)
    elif activation == "leaky_relu":
        out = F.leaky_relu(out, negative_slope)
    return out if residual is None else residual + out
