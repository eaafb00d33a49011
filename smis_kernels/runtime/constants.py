"""What follows from weights alone, made once for a network whose weights somebody vouches for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .derivatives import transformed
from .tensors import capturing

T = TypeVar("T")


def state(value: Any) -> Any:
    """What a write, another dtype or other memory shows in, without reading the content."""
    if isinstance(value, tuple):
        return tuple(map(state, value))
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
        self.learned: dict[str, Any] = {}  # of one call, for the next

    def knows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these may be sources."""
        return all(id(t) in self._known for t in tensors)

    def holds(self, key: Hashable, sources: tuple[Tensor, ...]) -> bool:
        """Whether the constant is kept, and it and its sources are as they were."""
        found = self._kept.get((key, *map(id, sources)))
        return found is not None and found[0] == (state(sources), state(found[1]))

    def find(self, key: Hashable, make: Callable[[], T], sources: tuple[Tensor, ...]) -> T:
        """The constant, made where it is missing or its sources, or it, are not as they were.

        Of sources that it knows. While a CUDA graph is captured it is made in the graph, which has
        its value after a replay: nothing is kept of it.
        """
        place = (key, *map(id, sources))
        found = self._kept.get(place)
        if found is None or not self.holds(key, sources):
            if any(map(capturing, sources)):
                return make()
            with torch.inference_mode(False), torch.no_grad():
                value: Any = make()
                # Held, so that no other memory can come to lie where theirs was.
                detached = [s.detach() for s in sources]
            found = self._kept[place] = ((state(sources), state(value)), value, detached)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    self._known[id(part)] = part
        kept: T = found[1]
        return kept

    def __len__(self) -> int:
        return len(self._kept)


class Scope:
    """A call inside :func:`using`: what it keeps beside the constants ends with it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.at_end: list[Callable[[], None]] = []  # of a call that has not failed
        self._kept: dict[str, Any] = {}

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """The call's ``make()`` of this name."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found


class _Active(threading.local):
    scope: Scope | None = None


_active = _Active()


@contextmanager
def using(store: Store | None) -> Iterator[None]:
    """Constants inside the block are those of the store."""
    before, _active.scope = _active.scope, None if store is None else Scope(store)
    try:
        yield
        for finish in _active.scope.at_end if _active.scope is not None else ():
            finish()
    finally:
        _active.scope = before


def scope() -> Scope | None:
    """The innermost call inside :func:`using`."""
    return _active.scope


def keeps(*sources: Tensor) -> bool:
    """Whether :func:`constant` keeps what follows from these sources."""
    if torch.compiler.is_compiling() or _active.scope is None or transformed() is not None:
        return False
    if torch.is_grad_enabled() and any(s.requires_grad for s in sources):
        return False
    return _active.scope.store.knows(sources)


def constant(key: Hashable, make: Callable[[], T], *sources: Tensor) -> T:
    """``make()``, which depends on the sources and the key alone: kept inside :func:`using`.

    Made anew where it is to carry gradients, and where the call is traced or transformed.
    """
    if not keeps(*sources):
        return make()
    assert _active.scope is not None
    return _active.scope.store.find(key, make, sources)


def kept(key: Hashable, *sources: Tensor) -> bool:
    """Whether :func:`constant` has this one at hand."""
    return _active.scope is not None and _active.scope.store.holds(key, sources)
