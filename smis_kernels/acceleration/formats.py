"""One forward of a whole network: its maps compiled once, its features channels-last inside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..layout.scope import layout_scope
from ..ops.reformat.op import reformat
from ..ops.upsampling_source.op import upsampling_source
from ..runtime.backend import requested
from ..runtime.check import WIDE
from ..runtime.derivatives import transformed
from ..runtime.tensors import readable
from .resizes import resizes_of
from .swap import Accelerated


class _Calls(threading.local):
    """How many accelerated networks this thread is inside of."""

    depth = 0


_calls = _Calls()


@contextmanager
def network_call(of: nn.Module | Tensor) -> Iterator[bool]:
    """A layout scope around a call of a module, or with features; yields whether it is outermost.

    The outermost has its resizes done without torch's transpositions.
    """
    if torch.compiler.is_compiling():  # which traces no thread's state; maps are not compiled in it
        yield True
        return
    _calls.depth += 1
    outermost = _calls.depth == 1
    try:
        with layout_scope(), resizes_of(of) if outermost else nullcontext():
            yield outermost
    finally:
        _calls.depth -= 1


class _Tracked:
    """Copies of a call's inference tensors, and what becomes of them."""

    # Edits of an inference tensor leave no trace, so its map would be numbered for every norm.

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor, int]] = {}  # by the inputs' ids
        self._inputs: dict[int, Tensor] = {}  # by the copies'

    def copy(self, x: Tensor) -> Tensor:
        """What the network is to get for an input."""
        if x.dim() != 4 or not x.is_inference():
            return x
        if id(x) not in self._copies:
            with torch.inference_mode(False):
                made = x.clone()
            self._copies[id(x)] = x, made, made._version
            self._inputs[id(made)] = x
        return self._copies[id(x)][1]

    def original(self, x: Tensor) -> Tensor:
        """The input that a network returns a copy of; any other tensor itself."""
        return self._inputs.get(id(x), x)

    def write_back(self) -> None:
        """What the network has written to its inputs."""
        for x, made, version in self._copies.values():
            if made._version != version:
                x.copy_(made)


def _reformatted(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    # A backend that is asked for is one of what computes: this moves values, and has the CPU's.
    backend = "reference" if requested() == "reference" else "auto"
    return reformat(x, memory_format, backend=backend)


def channels_last(x: Tensor) -> Tensor:
    """Features in the format that convs and indexed modulation read fastest."""
    return _reformatted(x, torch.channels_last)


def planes(x: Tensor) -> Tensor:
    """Features contiguous, as what was written for them expects."""
    return _reformatted(x, torch.contiguous_format)


def upsampled_from(x: Tensor) -> Tensor | None:
    """What features on a CPU are a nearest x2 upsampling of, where no gradient is wanted."""
    if torch.is_grad_enabled() or not readable(x) or x.dtype not in WIDE:
        return None
    return upsampling_source(x, backend="auto")


def gradient_in_format(x: Tensor) -> Tensor:
    """The tensor, whose gradient will come in its own memory format.

    torch's instance norm of a single image (2.13) takes the entries of any other for other pixels'.
    """
    if x.dim() != 4 or not (x.requires_grad and torch.is_grad_enabled()) or (
            torch.compiler.is_compiling()):
        return x
    own = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    same: Tensor = torch.ops.aten.alias.default(x)  # view_as gives one image other strides
    same.register_hook(lambda gradient: _reformatted(gradient, own))
    return same


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() != 4 or transformed() is not None:  # of which vmap answers no such question
        return False
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def in_format_of(output: Any, inputs: Any) -> Any:
    """What a network returns, contiguous unless it was given channels-last tensors itself."""
    found = False

    def look(x: Tensor) -> Tensor:
        nonlocal found
        found = found or _is_channels_last(x)
        return x

    tree_map_only(Tensor, look, inputs)
    if found:
        return output
    return tree_map_only(Tensor, lambda x: planes(x) if _is_channels_last(x) else x, output)


class Network(Accelerated):
    """A module with accelerated ones inside: it computes what it did, as one network call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with network_call(self) as outermost:
            if not outermost:
                return super().forward(*args, **kwargs)
            if not torch.is_inference_mode_enabled():
                return in_format_of(super().forward(*args, **kwargs), (args, kwargs))
            tracked = _Tracked()
            given = tree_map_only(Tensor, tracked.copy, (args, kwargs))
            try:
                output = super().forward(*given[0], **given[1])
            finally:
                tracked.write_back()
            output = tree_map_only(Tensor, tracked.original, output)
            return in_format_of(output, (args, kwargs))
