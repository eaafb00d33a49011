"""What follows from weights alone, made once for a network whose weights somebody vouches for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .derivatives import transformed

T = TypeVar("T")


def _state(value: Any) -> Any:
    """What a write, another dtype or other memory shows in, without reading the content."""
    if isinstance(value, tuple):
        return tuple(map(_state, value))
    if not isinstance(value, Tensor):
        return value
    version = 0 if value.is_inference() else value._version
    return (value.untyped_storage()._cdata, value.storage_offset(), version, value.dtype,
            value.shape, value.stride())


class Store:
    """Constants, each beside the tensors it was made from.

    Only ``tensors``, and what was made from them, may be sources: their content is known to be what
    it was. The store ends with that knowledge.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._known = {id(t): t for t in tensors}
        self._kept: dict[Hashable, tuple[Any, Any, Any]] = {}

    def find(self, key: Hashable, make: Callable[[], T], sources: tuple[Tensor, ...]) -> T:
        """The constant, made where it is missing or its sources, or it, are not as they were."""
        if any(id(s) not in self._known for s in sources):
            return make()
        place = (key, *map(id, sources))
        found = self._kept.get(place)
        if found is None or found[0] != (_state(sources), _state(found[1])):
            with torch.inference_mode(False), torch.no_grad():
                value: Any = make()
                # Held, so that no other memory can come to lie where theirs was.
                detached = [s.detach() for s in sources]
            found = self._kept[place] = ((_state(sources), _state(value)), value, detached)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    self._known[id(part)] = part
        kept: T = found[1]
        return kept

    def __len__(self) -> int:
        return len(self._kept)


class _Active(threading.local):
    store: Store | None = None


_active = _Active()


@contextmanager
def using(store: Store | None) -> Iterator[None]:
    """Constants inside the block are those of the store."""
    before, _active.store = _active.store, store
    try:
        yield
    finally:
        _active.store = before


def constant(key: Hashable, make: Callable[[], T], *sources: Tensor) -> T:
    """``make()``, which depends on the sources and the key alone: kept inside :func:`using`.

    Made anew where it is to carry gradients, and where the call is traced or transformed.
    """
    if torch.compiler.is_compiling() or _active.store is None or transformed() is not None:
        return make()
    if torch.is_grad_enabled() and any(s.requires_grad for s in sources):
        return make()
    return _active.store.find(key, make, sources)
