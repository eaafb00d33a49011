"""What the convs with fewer multiplications share: checks, their backend, when a CPU takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.backend import requested, resolve
from ..runtime.check import WIDE, check_device, check_shape, check_tensor
from ..runtime.derivatives import transformed
from ..runtime.explain import record

# Of one core with AVX2, by benchmarks/winograd_forms.py --fit: multiply-adds per nanosecond, and
# nanoseconds for each kernel, in which it is reordered. Only the ratios of such numbers matter.
DIRECT_RATE, DIRECT_KERNEL = 35.0, 14.0
LEAST_WIDTH = 32  # channels and outputs of a group, below which register tiles stay half empty
Pair = tuple[int, int]


def pair(value: int | Pair) -> Pair:
    """A number for both axes as two."""
    return (value, value) if isinstance(value, int) else value


def check_channels(input: Tensor, weight: Tensor, outputs: int) -> None:
    """At least one channel and, as torch has it, one output."""
    if input.shape[1] < 1:
        raise ValueError(f"input: expected at least one channel, got shape {tuple(input.shape)}")
    if outputs < 1:
        raise ValueError(f"weight: expected at least one output, got shape {tuple(weight.shape)}")


def check_weight(weight: Tensor, input: Tensor, groups: int, sides: Pair) -> None:
    """(C', C / groups, *sides) for the input's channels, on its device."""
    channels, outputs = input.shape[1], weight.shape[0]
    check_channels(input, weight, outputs)
    if isinstance(groups, float) or groups < 1 or channels % groups or outputs % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels and {outputs} "
                         f"outputs, got {groups}")
    check_shape("weight", weight, (outputs, channels // groups, *sides),
                f"for input {tuple(input.shape)} and {groups} groups")
    check_device("weight", weight, input, "input")


def check_bias(bias: Tensor | None, outputs: int, weight: Tensor, input: Tensor) -> None:
    """A bias of every output, or None."""
    if bias is not None:
        check_tensor("bias", bias, 1, "(C',)", (input.dtype,))
        check_shape("bias", bias, (outputs,), f"to match weight {tuple(weight.shape)}")
        check_device("bias", bias, input, "input")


def backend_of(op: str, input: Tensor, backend: str | None, kinds: tuple[str, ...],
               **options: Any) -> str:
    """The backend that runs the op, recorded; 16-bit types take the definition."""
    kind = resolve(op, input, backend, kinds)
    if kind != "reference" and input.dtype not in WIDE:
        record(op, "reference", input, reason="16-bit convs have matrix units")
        return "reference"
    record(op, kind, input, **options)
    return kind


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
