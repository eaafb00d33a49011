"""The definition: modulate every pixel, then a 1x1 conv."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..indexed_modulation import reference


def indexed_shortcut(input: Tensor, index: Tensor, table: Tensor, weight: Tensor, groups: int,
                     **options: Any) -> Tensor:
    """``conv2d(indexed_modulation(input, index, table, **options), weight, groups=groups)``."""
    modulated = reference.indexed_modulation(input, index, table, **options)
    return F.conv2d(modulated, weight, groups=groups)
