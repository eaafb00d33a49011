"""Nearest resizes of a network's forward on a CPU, where torch transposes all of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..runtime.backend import requested
from ..runtime.check import FLOATS
from ..runtime.tensors import acc_dtype, readable

# Up to this height plus width of the output torch (2.13) has one kernel, of channels-last features:
# others are copied before it and after it. 184 maps of 256 x 256 to 8 x 8 take 40 ms so, and 0.2 ms
# by their pixels' numbers; 1024 features of 32 x 32 to twice that 38 ms and 3 ms.
_TRANSPOSED = 128
_MOST_PIXELS = 2**24  # that float32 can number


class _Resizes(TorchFunctionMode):
    """Takes the calls of ``F.interpolate``, those of ``nn.Upsample`` too."""

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type],
                           args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        found = nearest(*args, **options) if func is F.interpolate else None
        return func(*args, **options) if found is None else found


def resizes_of(module: nn.Module | Tensor) -> AbstractContextManager[object]:
    """What a forward of the module, or of these features, is to run in."""
    tensor = module if isinstance(module, Tensor) else next(module.parameters(), None)
    watched = tensor is not None and readable(tensor) and requested() != "reference"
    return _Resizes() if watched else nullcontext()


def nearest(input: Any, size: Any = None, scale_factor: Any = None, mode: Any = "nearest",
            *others: Any, **rest: Any) -> Tensor | None:
    """``F.interpolate`` of the same arguments, bit for bit; None where torch's own is to serve."""
    # Of these torch refuses align_corners=False, too.
    corners = others[0] if others else rest.get("align_corners")
    plain = mode == "nearest" and corners is None and not any((*others, *rest.values()))
    if not plain or not isinstance(input, Tensor) or not readable(input) or input.dim() != 4 or (
            input.dtype not in FLOATS or not input.is_contiguous() or input.numel() == 0):
        return None
    n, c, h, w = input.shape
    if n * c < 4 or h * w > _MOST_PIXELS or (torch.is_grad_enabled() and input.requires_grad):
        return None
    pixels = torch.arange(h * w, dtype=acc_dtype(input), device=input.device).view(1, 1, h, w)
    try:
        source = F.interpolate(pixels, size, scale_factor)[0, 0]  # which pixel each is taken from
    except (TypeError, ValueError, RuntimeError):
        return None  # torch is to say it
    height, width = source.shape
    if height + width > _TRANSPOSED:
        return None
    if height * width <= h * w:
        # Index_select does the same on one thread.
        taken = source.flatten().long().expand(n, c, height * width)
        return input.flatten(2).gather(2, taken).view(n, c, height, width)
    if (height, width) == (2 * h, 2 * w) and torch.equal(source, _doubled(pixels)[0, 0]):
        return _doubled(input)
    return None


def _doubled(x: Tensor) -> Tensor:
    """Each pixel four times."""
    n, c, h, w = x.shape
    rows = torch.stack((x, x), 4).view(n, c, h, 1, 2 * w)
    return rows.expand(n, c, h, 2, 2 * w).reshape(n, c, 2 * h, 2 * w).contiguous()  # of one row
