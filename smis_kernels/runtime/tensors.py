"""Memory formats (the rule is ``csrc/common/tensor.h``'s too), dtypes, captures, traces, modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .derivatives import transformed


def is_channels_last(x: Tensor) -> bool:
    """Whether (N, C, H, W) is stored (N, H, W, C) with dense channels: channel slices too."""
    _, c, h, w = x.shape
    _, sc, sh, sw = x.stride()
    if c <= 1 or h * w <= 1 or sc != 1:
        return False
    if h > 1 and w > 1 and sh != w * sw:
        return False
    return (sw if w > 1 else sh) >= c


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that the output of an op on ``x`` has."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def empty_nchw(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty (N, C, H, W) of ``like``'s dtype and device in ``like``'s memory format."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
    )


def readable(x: Tensor) -> bool:
    """Whether the values of a CPU tensor may decide what is done: no trace is made of the call."""
    return (type(x) in (Tensor, nn.Parameter) and x.is_cpu and not torch.compiler.is_compiling()
            and transformed() is None and _get_current_dispatch_mode() is None)


def capturing(where: Tensor | torch.device) -> bool:
    """Whether a CUDA graph is being captured: work is done in each replay, and not now."""
    device = where.device if isinstance(where, Tensor) else where
    return (device.type == "cuda" and torch.cuda.is_available()
            and torch.cuda.is_current_stream_capturing())


@contextmanager
def outlasting() -> Iterator[None]:
    """No inference tensors are made inside: what is kept serves later calls with gradients."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def lasting(tensor: Tensor) -> Tensor:
    """The tensor, copied where it is an inference tensor: no gradients, and no trace of writes."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with outlasting():
        return tensor.clone()


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: fp32, fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
