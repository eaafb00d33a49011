"""A weight's transform, kept between calls as long as the weight is what it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .content_digest.stamp import Stamp


class KeptWeight:
    """Keeps the transform of one weight.

    It takes (m + 2)² / 9 of the weight's size for F(m x m, 3x3), 4 (4x4) or 7.1 (3x3) times its
    size for a conv by phases.

    Kept from the second call in a row with the same tensor on, so that weights made anew at every
    call take no memory. Each use compares the weight's content with what it was, in one read of it.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[Tensor] | None = None
        self._seen: weakref.ref[Tensor] | None = None
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
        before, self._seen = self._seen, weakref.ref(weight)
        return before is None or before() is weight

    def of(self, weight: Tensor, key: Hashable, transform: Callable[[Tensor], Tensor],
           ) -> Tensor | None:
        """``transform(weight)``, named ``key``, as it is now; None where none is kept."""
        if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter):
            return None
        kept = self._kept
        if kept is not None and kept[0] == key and kept[1].holds([weight]):
            return kept[2]
        self._kept = None
        again = self._last is not None and self._last() is weight
        self._last = weakref.ref(weight)
        if not again:
            return None
        # No inference tensor: later calls may ask for gradients of their inputs.
        with torch.inference_mode(False), torch.no_grad():
            stamp = Stamp([weight])
            made = transform(weight)
        self._kept = key, stamp, made
        return made

    def __reduce__(self) -> tuple[Any, ...]:  # it is made anew where it is copied or read
        return KeptWeight, ()
