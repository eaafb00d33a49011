"""The same values in another memory format, transposed in registers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.backend import requested, resolve
from ...runtime.check import FLOATS, check_tensor
from ...runtime.derivatives import applied
from ...runtime.library import RawOp
from . import reference

KINDS = ("cpu",)
FORMATS = (torch.contiguous_format, torch.channels_last)


class _Reformat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, last: bool, kind: str) -> Tensor:
        out: Tensor = _reformat(kind, input, last)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None


def reformat(input: Tensor, memory_format: torch.memory_format, *,
             backend: str | None = None) -> Tensor:
    r"""``input.contiguous(memory_format=memory_format)``, several times sooner on a CPU.

    .. math:: y_{nchw} = x_{nchw}

    Args:
        input: (N, C, H, W), any dtype and strides; floats that lie in the other format, slices
            of channels and batches too, take the kernel, all else torch's copy.
        memory_format: torch.contiguous_format or torch.channels_last.
        backend: "auto", "reference" or "cpu".

    Returns:
        The values in that format; the input itself where it has it. The gradient is passed on in
        the format in which it comes.

    Raises:
        ValueError, TypeError: an input of other dimensions, another format.

    Example:
        >>> x = torch.randn(1, 8, 16, 16)
        >>> reformat(x, torch.channels_last).stride()
        (2048, 1, 128, 8)
    """
    check_tensor("input", input, 4, "(N, C, H, W)", None)
    if memory_format not in FORMATS:
        raise ValueError("memory_format: expected torch.contiguous_format or torch.channels_last, "
                         f"got {memory_format}")
    if input.is_contiguous(memory_format=memory_format):
        return input
    kind = resolve("reformat", input, backend, KINDS)
    last = memory_format == torch.channels_last
    # A compiler has copies of its own, and what are no floats torch's.
    copied = torch.compiler.is_compiling() or input.dtype not in FLOATS
    if kind == "reference" or (copied and requested(backend) == "auto"):
        return reference.reformat(input, memory_format)
    y: Tensor = applied(_Reformat, input, last, kind)
    return y


def _fake(input: Tensor, last: bool) -> Tensor:
    return torch.empty_like(input, memory_format=FORMATS[last])


_reformat = RawOp("reformat(Tensor input, bool last) -> Tensor", _fake)
