"""The definition of the content digest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 0x9E3779B97F4A7C15 - 2**64  # as a signed number
RUN = 1024  # words


def content_digest(input: Tensor) -> Tensor:
    """The sum mod 2⁶⁴ of the 32-bit words, each times odd numbers of its position's own."""
    data = input.contiguous().flatten().view(torch.uint8)
    words = F.pad(data, (0, -len(data) % (4 * RUN))).view(torch.int32).long() & 0xFFFFFFFF
    runs = words.view(-1, RUN)
    inside = torch.arange(1, RUN + 1, device=input.device) * STEP
    factors = ((inside >> 32) & 0xFFFFFFFF) | 1
    m = torch.arange(1, len(runs) + 1, device=input.device) * STEP
    shifted = (m >> 29) & (2**35 - 1)  # without the sign
    return ((runs * factors).sum(1) * ((m ^ shifted) | 1)).sum()
