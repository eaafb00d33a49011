"""A layout in memory of its own, into which others are copied: what reads it may be captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.tensors import outlasting
from .label_layout import LabelLayout
from .levels import WindowLevel
from .table_cache import TableCache


def capacity(rows: int) -> int:
    """Rows that a buffer for ``rows`` gets: half as many more, for edits."""
    return -(-3 * rows // 2) // 64 * 64 + 64


def _buffer(rows: Tensor) -> Tensor:
    """A buffer that holds ``rows`` and zeros up to its capacity: row 0 is the outside."""
    buffer = rows.new_zeros((capacity(len(rows)), *rows.shape[1:]))
    buffer[: len(rows)] = rows
    return buffer


def _refill(buffer: Tensor, rows: Tensor) -> None:
    buffer[: len(rows)] = rows
    buffer[len(rows):] = 0


@dataclass
class _StaticLevel(WindowLevel):
    """A resolution in buffers; ``counts`` stays that of the map, so that paths stay as chosen."""

    known: tuple[int, int] = (0, 0)

    @property
    def counts(self) -> tuple[int, int]:
        return self.known


_INDEX_MAPS = ("symbols", "index3", "index5")
_ROWS = ("windows3", "windows5")


def _static_level(level: WindowLevel) -> WindowLevel:
    maps = {name: getattr(level, name).clone() for name in _INDEX_MAPS}
    if not level.repeats:
        return WindowLevel(windows3=level.windows3, windows5=level.windows5, **maps)
    rows = {name: _buffer(getattr(level, name)) for name in _ROWS}
    return _StaticLevel(**maps, **rows, known=level.counts)


def _tables(layout: LabelLayout) -> Mapping[Any, Tensor]:
    return {} if layout.tables is None else dict(layout.tables.items())


class StaticLayout:
    """A used layout in buffers of fixed capacity, kept tables included.

    What reads :attr:`layout` may be captured: :meth:`load` brings an edited layout into the same
    memory.

    Args:
        used: a layout whose resolutions, and tables, a forward pass has made.
    """

    def __init__(self, used: LabelLayout) -> None:
        with outlasting():
            self._copy(used)

    def _copy(self, used: LabelLayout) -> None:
        self.layout = LabelLayout(used.symbols.clone(), _buffer(used.vectors))
        self.layout._levels = {size: _static_level(level) for size, level in used.levels.items()}
        self._tables = {key: _buffer(table) for key, table in _tables(used).items()}
        if used.tables is not None:
            self.layout.tables = TableCache()
            for (owner, size), table in self._tables.items():
                self.layout.tables.put(owner, size, self.layout, table)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The resolutions that another layout is to have made."""
        return tuple(self.layout._levels)

    def fits(self, used: LabelLayout) -> bool:
        """Whether an edited layout, used as this was, takes the same paths in the same memory."""
        levels, tables = used.levels, _tables(used)
        if not self.layout._levels.keys() <= levels.keys() or tables.keys() != self._tables.keys():
            return False
        pairs = [(self.layout.vectors, used.vectors)]
        for size, static in self.layout._levels.items():
            if static.repeats != levels[size].repeats:
                return False
            if static.repeats:
                pairs += [(getattr(static, name), getattr(levels[size], name)) for name in _ROWS]
        pairs += [(buffer, tables[key]) for key, buffer in self._tables.items()]
        return used.symbols.shape == self.layout.symbols.shape and all(
            len(rows) <= len(buffer) and rows.shape[1:] == buffer.shape[1:]
            and rows.dtype == buffer.dtype for buffer, rows in pairs
        )

    @torch.no_grad()
    def load(self, used: LabelLayout) -> None:
        """Copy a layout that :meth:`fits` into the buffers."""
        self.layout.symbols.copy_(used.symbols)
        _refill(self.layout.vectors, used.vectors)
        for size, static in self.layout._levels.items():
            level = used.levels[size]
            for name in _INDEX_MAPS:
                getattr(static, name).copy_(getattr(level, name))
            if static.repeats:
                for name in _ROWS:
                    _refill(getattr(static, name), getattr(level, name))
        for key, table in _tables(used).items():
            _refill(self._tables[key], table)
        self.layout._settle()  # all is of what was written
