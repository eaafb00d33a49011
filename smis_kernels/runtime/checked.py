"""Checks and choices made once for calls that are alike: their outcome is kept, never a number."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_PLAIN = (Tensor, nn.Parameter)
_COUNTS = (int, type(None))
_NUMBERS = (float, int, type(None))
_LIMIT = 1024  # kinds of call that are known at a time


class Checked(Generic[T]):
    """What the calls so far were found to be, by their key: dtypes, devices, shapes, options.

    Nothing that is kept depends on what a tensor holds, so no write to one makes it stale.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, T] = {}

    def find(self, key: Hashable) -> T | None:
        """What a call of this key was found to be; None where there was none, or no key is."""
        try:
            return self._known.get(key)
        except TypeError:  # an option of a type that the checks refuse
            return None

    def keep(self, key: Hashable, found: T) -> T:
        """``found``, known from now on where there is a key."""
        if key is not None:
            if len(self._known) >= _LIMIT:
                self._known.clear()
            with suppress(TypeError):
                self._known[key] = found
        return found


def plain(num_groups: Any, *numbers: Any) -> bool:
    """Whether options are of their types: a tensor's value changes, and 2.0 groups equal 2."""
    return type(num_groups) in _COUNTS and all(type(n) in _NUMBERS for n in numbers)


def alike(options: Hashable, tensors: Iterable[Any]) -> Hashable:
    """The key of a call: what its checks read. None where they are to be made whatever it is.

    That is where the call is traced, and for anything but plain tensors: what a subclass says of
    its shape is its own affair.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    key: list[Any] = [options]
    for t in tensors:
        if t is None:
            key.append(None)
        elif type(t) in _PLAIN:
            key += (t.dtype, t.device, t.shape)
        else:
            return None
    return tuple(key)
