"""Tables of all norms of a resolution, made together when the first of them asks for its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ..runtime.tensors import acc_dtype
from .label_layout import LabelLayout, WindowLevel

SHARING = ("triton",)  # backends that gain: on a CPU a norm makes its own table faster
Key = tuple[tuple[int, int], int, torch.dtype, torch.device]


@dataclass
class _Made:
    """Tables that wait for their norms, each with the state of the weights that it is of."""

    level: WindowLevel
    vectors: Any
    tables: dict[nn.Module, tuple[Any, Tensor]]


class _Call:
    """The tables of one call of a network; they end with it."""

    def __init__(self, scope: constants.Scope) -> None:
        self._scope = scope
        # Norms are called where they were in the last call: which of them share a level.
        self._mates: dict[Key, dict[nn.Module, tuple[nn.Module, ...]]]
        self._mates = scope.store.learned.setdefault("mates", {})
        self._asked: dict[Key, dict[nn.Module, WindowLevel]] = {}
        self._made: dict[Key, _Made] = {}
        self._entries: tuple[Tensor, Any, tuple[Tensor, Tensor, Tensor]] | None = None
        scope.at_end.append(self._learn)

    def table(self, norm: nn.Module, own: NormConvs, layout: LabelLayout,
              size: tuple[int, int]) -> Tensor | None:
        level = layout.level(size)
        key = _key(own, layout, size)
        waits = self._waiting(key, level, layout)
        found = waits.pop(norm, None)
        if found is not None and found[0] == constants.state(own.tensors):
            self._asked[key][norm] = level
            return found[1]
        asked = self._asked.setdefault(key, {})
        if norm in asked:
            if waits:  # twice before its mates once: not all of theirs again
                return None
            self._learn()  # a further forward begins
        asked[norm] = level
        mates = self._mates.get(key, {}).get(norm)
        if mates is None:  # its own table alone, whose packed weights would not be used again
            return None if _capturing(own) else self._tables([own], pack([own]), layout, level)[0]
        convs = {mate: c for mate in mates if (c := shared_convs(mate, layout)) is not None
                 and _key(c, layout, size) == key}
        self._made.pop(key, None)  # before others are made: memory for one level at a time
        states = [constants.state(c.tensors) for c in convs.values()]
        tables = self._tables(list(convs.values()), _packed(list(convs.values())), layout, level)
        made = dict(zip(convs, zip(states, tables, strict=True), strict=True))
        table = made.pop(norm)[1]
        self._made[key] = _Made(level, constants.state(layout.vectors), made)
        return table

    def _waiting(self, key: Key, level: WindowLevel,
                 layout: LabelLayout) -> dict[nn.Module, tuple[Any, Tensor]]:
        made = self._made.get(key)
        if made is None or made.level is not level:
            return {}
        return made.tables if made.vectors == constants.state(layout.vectors) else {}

    def _tables(self, convs: Sequence[NormConvs], packed: Packed, layout: LabelLayout,
                level: WindowLevel) -> list[Tensor]:
        vectors = layout.vectors.to(acc_dtype(convs[0].weight))
        state = constants.state(layout.vectors)
        known = self._entries
        if known is None or known[0] is not layout.vectors or known[1] != state:
            self._entries = known = layout.vectors, state, symbol_entries(vectors, _kind(layout))
        return level_tables(vectors, level.windows3, level.windows5, convs, packed=packed,
                            entries=known[2])

    def _learn(self) -> None:
        """Note which norms asked for tables of the same level, and pack their weights."""
        for key, asked in self._asked.items():
            known = self._mates.setdefault(key, {})
            found = {norm: tuple(m for m, other in asked.items() if other is level)
                     for norm, level in asked.items()}
            if found == known:
                continue
            self._mates[key] = found
            for mates in dict.fromkeys(found.values()):
                convs = [_convs(mate) for mate in mates]
                if all(convs) and not any(_capturing(c) for c in convs if c is not None):
                    _packed([c for c in convs if c is not None])


def _kind(layout: LabelLayout) -> str:
    return resolve("level_tables", layout.vectors, None, KINDS)


def _convs(norm: object) -> NormConvs | None:
    """The convs that a norm's table follows from, where it is made of such."""
    found: NormConvs | None = getattr(norm, "convs", None)
    return found


def _key(own: NormConvs, layout: LabelLayout, size: tuple[int, int]) -> Key:
    return size, layout.shape[1], own.weight.dtype, own.weight.device


def _packed(convs: list[NormConvs]) -> Packed:
    groups = tuple((c.shared_groups, c.groups) for c in convs)
    return constants.constant(("level", groups), partial(pack, convs),
                              *chain.from_iterable(c.tensors for c in convs))


def _capturing(own: NormConvs) -> bool:
    """Whether kernels are recorded for a CUDA graph: what they make is there after a replay."""
    return (own.weight.is_cuda and torch.cuda.is_available()
            and torch.cuda.is_current_stream_capturing())


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


def shared_table(norm: nn.Module, layout: LabelLayout, size: tuple[int, int]) -> Tensor | None:
    """The norm's table at ``size``, made with those of all norms of the level; None if it cannot.

    Inside :func:`constants.using` alone. The first call of a network shows which norms read one
    level; from the second on the first of them makes the tables of all, which take theirs. A
    table whose weights or vectors have changed in between is made anew.
    """
    convs = shared_convs(norm, layout)
    if convs is None:
        return None
    scope = constants.scope()
    assert scope is not None
    make: Callable[[], _Call] = partial(_Call, scope)
    return scope.kept("tables", make).table(norm, convs, layout, size)
