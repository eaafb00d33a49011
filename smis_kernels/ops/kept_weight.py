"""A weight's transform, kept between calls as long as the weight is what it was."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .content_digest.stamp import Stamp

_PLAIN = (Tensor, torch.nn.Parameter)


class _Met:
    """A tensor met before, told again without a hold on it or its memory.

    There is no weak reference to the tensor itself, for ``torch.utils.swap_tensors`` refuses those
    that have one. One to its storage lets no other take that place: weights made anew are told.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._id = id(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def __call__(self, tensor: Tensor) -> bool:
        """Whether it is the tensor, of the same memory."""
        return self._id == id(tensor) and self._storage.cdata == tensor.untyped_storage()._cdata


class KeptWeight:
    """Keeps the transform of one weight.

    It takes (m + 2)² / 9 of the weight's size for F(m x m, 3x3), 4 (4x4) or 7.1 (3x3) times its
    size for a conv by phases.

    Kept from the second call in a row with the same tensor on, so that weights made anew at every
    call take no memory. Each use compares the weight's content with what it was, in one read of it.
    """

    def __init__(self) -> None:
        self._last: _Met | None = None
        self._seen: _Met | None = None
        self._kept: tuple[Hashable, Stamp, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """The memory that the kept transform takes."""
        return 0 if self._kept is None else self._kept[2].nbytes

    def expects(self, weight: Tensor) -> bool:
        """Whether the weight is the one of the call before, or the first one: it may be kept.

        Compiled calls keep none.
        """
        if torch.compiler.is_compiling():
            return False
        if type(weight) not in _PLAIN:
            return False
        before = self._seen
        known = before is not None and before(weight)
        if not known:
            self._seen = _Met(weight)
        return known or before is None

    def of(self, weight: Tensor, key: Hashable, transform: Callable[[Tensor], Tensor],
           ) -> Tensor | None:
        """``transform(weight)``, named ``key``, as it is now; None where none is kept."""
        if torch.compiler.is_compiling() or type(weight) not in _PLAIN:
            return None
        kept = self._kept
        if kept is not None and kept[0] == key and kept[1].holds([weight]):
            return kept[2]
        self._kept = None
        if self._last is None or not self._last(weight):
            self._last = _Met(weight)
            return None
        # No inference tensor: later calls may ask for gradients of their inputs.
        with torch.inference_mode(False), torch.no_grad():
            stamp = Stamp([weight])
            made = transform(weight)
        self._kept = key, stamp, made
        return made

    def __reduce__(self) -> tuple[Any, ...]:  # it is made anew where it is copied or read
        return KeptWeight, ()
