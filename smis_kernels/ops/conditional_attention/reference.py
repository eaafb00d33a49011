"""The definition of the conditional attention: gate, then LeakyReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conditional_attention(input: Tensor, logits: Tensor, negative_slope: float = 0.2) -> Tensor:
    """``leaky_relu(input * sigmoid(logits))``."""
    return F.leaky_relu(input * torch.sigmoid(logits), negative_slope)
