"""The definition of the content digest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 0x9E3779B97F4A7C15 - 2**64  # as a signed number


def content_digest(input: Tensor) -> Tensor:
    """The sum mod 2⁶⁴ of the 32-bit words, each times an odd number of its position's own."""
    data = input.contiguous().flatten().view(torch.uint8)
    words = F.pad(data, (0, -len(data) % 4)).view(torch.int32).long() & 0xFFFFFFFF
    m = torch.arange(1, len(words) + 1, device=input.device) * STEP
    shifted = (m >> 29) & (2**35 - 1)  # without the sign
    return (words * ((m ^ shifted) | 1)).sum()
