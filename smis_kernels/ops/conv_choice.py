"""What decides between a direct conv and its forms with fewer multiplications, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.backend import requested, resolve
from ..runtime.derivatives import transformed

# Of one core with AVX2, by benchmarks/winograd_forms.py --fit: multiply-adds per nanosecond, and
# nanoseconds for each kernel, in which it is reordered. Only the ratios of such numbers matter.
DIRECT_RATE, DIRECT_KERNEL = 35.0, 14.0
WIDE = (torch.float32, torch.float64)
LEAST_WIDTH = 32  # channels and outputs of a group, below which register tiles stay half empty


def runs_on_cpu(op: str, input: Tensor) -> bool:
    """Whether the op's CPU kernel may serve the call."""
    return (
        input.is_cpu and transformed() is None and input.dim() == 4
        and requested() in ("auto", "cpu")
        and not torch.is_autocast_enabled("cpu")
        and resolve(op, input, None, ("cpu",)) == "cpu"
    )


def is_wide(input: Tensor, channels: int, outputs: int) -> bool:
    """Whether a group's channels and outputs, in that dtype, fill the products' registers."""
    return input.dtype in WIDE and min(channels, outputs) >= LEAST_WIDTH


def batch_of(input: Tensor) -> int:
    """The batch; 1 where it is not known, as torch.export has it for batches of any size."""
    n = input.shape[0]
    return n if isinstance(n, int) else 1
