"""Tables of all norms of a resolution, made together when the first of them asks for its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.level_tables.op import KINDS, NormConvs, Packed, level_tables, pack, symbol_entries
from ..ops.level_tables.packing import TILES
from ..runtime import constants
from ..runtime.backend import resolve
from ..runtime.derivatives import transformed
from ..runtime.tensors import acc_dtype, capturing
from .label_layout import LabelLayout
from .levels import WindowLevel

SHARING = ("triton",)  # backends that gain: on a CPU a norm makes its own table faster
Key = tuple[tuple[int, int], int, torch.dtype, torch.device]


@dataclass
class _Made:
    """Tables that wait for their norms, each with the state of the weights that it is of."""

    windows: Tensor
    vectors: tuple[Tensor, Any]
    tables: dict[nn.Module, tuple[Any, Tensor]]


class _Call:
    """The tables of one call of a network; they end with it."""

    def __init__(self, scope: constants.Scope) -> None:
        # Norms are called where they were in the last call: which of them may share, and which do.
        self._level_of: dict[Key, dict[Any, int]] = scope.store.learned.setdefault("levels", {})
        self._mates: dict[Key, dict[nn.Module, tuple[nn.Module, ...]]]
        self._mates = scope.store.learned.setdefault("mates", {})
        self._seen: dict[Key, dict[Any, WindowLevel]] = {}
        self._asked: dict[Key, dict[nn.Module, Tensor]] = {}
        self._made: dict[Key, _Made] = {}
        self._entries: tuple[Any, torch.dtype, tuple[Tensor, Tensor, Tensor]] | None = None
        scope.at_end.append(self._learn)

    def shares(self, norm: Any, key: Key, level: WindowLevel) -> bool:
        """Whether others read the windows of this norm; the next call knows of it."""
        self._seen.setdefault(key, {})[norm] = level
        return self._level_of.get(key, {}).get(norm, 1) > 1

    def table(self, norm: nn.Module, own: NormConvs, layout: LabelLayout, size: tuple[int, int],
              windows3: Tensor, windows5: Tensor) -> Tensor | None:
        key = _key(own, layout, size)
        waits = self._waiting(key, windows5, layout)
        found = waits.pop(norm, None)
        if found is not None and found[0] == constants.state(own.tensors):
            self._asked[key][norm] = windows5
            return found[1]
        asked = self._asked.setdefault(key, {})
        if norm in asked:
            if waits:  # twice before its mates once: not all of theirs again
                return None
            self._learn()  # a further forward begins
        asked[norm] = windows5
        convs = {mate: c for mate in self._mates.get(key, {}).get(norm, ())
                 if (c := shared_convs(mate, layout)) is not None and _key(c, layout, size) == key}
        if len(convs) < 2 or norm not in convs:
            return None
        packed = self._pack(list(convs.values()))
        if packed is None:
            return None
        self._made.pop(key, None)  # before others are made: memory for one level at a time
        states = [constants.state(c.tensors) for c in convs.values()]
        vectors = layout.vectors.to(acc_dtype(own.weight))
        tables = level_tables(vectors, windows3, windows5, list(convs.values()), packed=packed,
                              entries=self._entries_of(vectors, layout))
        made = dict(zip(convs, zip(states, tables, strict=True), strict=True))
        table = made.pop(norm)[1]
        self._made[key] = _Made(windows5, _marked(layout.vectors), made)
        return table

    def _waiting(self, key: Key, windows5: Tensor,
                 layout: LabelLayout) -> dict[nn.Module, tuple[Any, Tensor]]:
        made = self._made.get(key)
        if made is None or made.windows is not windows5:
            return {}
        return made.tables if _same(made.vectors, layout.vectors) else {}

    def _entries_of(self, vectors: Tensor, layout: LabelLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of the symbols' vectors, which all levels of a map have."""
        known = self._entries
        if known is None or known[1] != vectors.dtype or not _same(known[0], layout.vectors):
            found = symbol_entries(vectors, _kind(layout))
            self._entries = known = _marked(layout.vectors), vectors.dtype, found
        return known[2]

    def _pack(self, convs: list[NormConvs]) -> Packed | None:
        """The weights side by side; None in a CUDA graph's capture, where they are not at hand.

        Packing writes numbers of the host, which no graph may hold.
        """
        groups = tuple((c.shared_groups, c.groups) for c in convs)
        sources = tuple(chain.from_iterable(c.tensors for c in convs))
        key = "level", groups
        if capturing(convs[0].weight) and not constants.kept(key, *sources):
            return None
        return constants.constant(key, partial(pack, convs), *sources)

    def _learn(self) -> None:
        """Note which norms read the same windows, and which of them asked for their tables."""
        for key, seen in self._seen.items():
            counts = Counter(map(id, seen.values()))
            self._level_of[key] = {norm: counts[id(level)] for norm, level in seen.items()}
        for key, asked in self._asked.items():
            self._mates[key] = {
                norm: tuple(mate for mate, other in asked.items() if other is windows)
                for norm, windows in asked.items()}


def _marked(tensor: Tensor) -> tuple[Tensor, Any]:
    """A tensor, held so that no other comes to lie where it does, and its state."""
    return tensor, constants.state(tensor)


def _same(known: tuple[Tensor, Any], tensor: Tensor) -> bool:
    return known[0] is tensor and known[1] == constants.state(tensor)


def _kind(layout: LabelLayout) -> str:
    return resolve("level_tables", layout.vectors, None, KINDS)


def _convs(norm: object) -> NormConvs | None:
    """The convs that a norm's table follows from, where it is made of such."""
    found: NormConvs | None = getattr(norm, "convs", None)
    return found


def _key(own: NormConvs, layout: LabelLayout, size: tuple[int, int]) -> Key:
    return size, layout.shape[1], own.weight.dtype, own.weight.device


def shared_convs(norm: object, layout: LabelLayout) -> NormConvs | None:
    """The norm's convs where its table may be made with others: on a GPU, of constants."""
    scope = constants.scope()
    if scope is None or torch.compiler.is_compiling() or transformed() is not None:
        return None
    convs = _convs(norm)
    if convs is None or not scope.store.knows(convs.tensors):
        return None
    if _kind(layout) not in SHARING:
        return None
    first = convs.weight
    if first.dtype not in TILES or any(
            t.dtype != first.dtype or t.device != layout.vectors.device for t in convs.tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*convs.tensors, layout.vectors)):
        return None
    return convs


def _call() -> _Call:
    scope = constants.scope()
    assert scope is not None
    make: Callable[[], _Call] = partial(_Call, scope)
    return scope.kept("tables", make)


def shares(norm: Any, layout: LabelLayout, size: tuple[int, int]) -> NormConvs | None:
    """The norm's convs where its table can be made with others': the last call has shown them."""
    convs = shared_convs(norm, layout)
    if convs is None:
        return None
    known = _call().shares(norm, _key(convs, layout, size), layout.level(size))
    return convs if known else None


def shared_table(norm: nn.Module, layout: LabelLayout, size: tuple[int, int], windows3: Tensor,
                 windows5: Tensor) -> Tensor | None:
    """The norm's rows for ``windows5``, made with those of all norms that ask for them.

    Inside :func:`constants.using` alone, else None. A call of a network shows which norms read the
    same windows; from the next on the first of them makes the tables of all, which take theirs. A
    table whose weights or vectors have changed in between is made anew.
    """
    convs = shared_convs(norm, layout)
    if convs is None:
        return None
    return _call().table(norm, convs, layout, size, windows3, windows5)


def entries_of(layout: LabelLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of the symbols' vectors, listed once a call; inside :func:`constants.using` alone."""
    return _call()._entries_of(layout.vectors.to(dtype), layout)
