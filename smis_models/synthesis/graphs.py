"""A generator on one layout as a CUDA graph: one launch for each picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smis_kernels import LabelLayout
from smis_kernels.interface import TableCache, WindowLevel

Call = Callable[[], Tensor]
WARM_UPS = 3  # cuDNN's choice of algorithms and Triton's compilation cannot be captured


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


class StaticLayout:
    """A used layout in buffers of fixed capacity, tables included.

    What reads :attr:`layout` may be captured: :meth:`load` brings an edited layout into the same
    memory.

    Args:
        used: a layout whose tables and resolutions a forward pass has made.
    """

    def __init__(self, used: LabelLayout) -> None:
        assert used.tables is not None
        self.layout = LabelLayout(used.symbols.clone(), _buffer(used.vectors))
        self.layout._levels = {size: _static_level(level) for size, level in used._levels.items()}
        self.layout.tables = TableCache()
        self._tables = {key: _buffer(table) for key, table in used.tables.items()}
        for (owner, size), table in self._tables.items():
            self.layout.tables.put(owner, size, self.layout, table)

    def fits(self, used: LabelLayout) -> bool:
        """Whether an edited layout, used as this was, takes the same paths in the same memory."""
        assert used.tables is not None
        levels, tables = used._levels, dict(used.tables.items())
        if levels.keys() != self.layout._levels.keys() or tables.keys() != self._tables.keys():
            return False
        pairs = [(self.layout.vectors, used.vectors)]
        for size, static in self.layout._levels.items():
            if static.repeats != levels[size].repeats:
                return False
            if static.repeats:
                pairs += [(getattr(static, name), getattr(levels[size], name)) for name in _ROWS]
        pairs += [(buffer, tables[key]) for key, buffer in self._tables.items()]
        return used.symbols.shape == self.layout.symbols.shape and all(
            len(rows) <= len(buffer) for buffer, rows in pairs
        )

    def load(self, used: LabelLayout) -> None:
        """Copy a layout that :meth:`fits` into the buffers."""
        assert used.tables is not None
        self.layout.symbols.copy_(used.symbols)
        _refill(self.layout.vectors, used.vectors)
        for size, static in self.layout._levels.items():
            level = used._levels[size]
            for name in _INDEX_MAPS:
                getattr(static, name).copy_(getattr(level, name))
            if static.repeats:
                for name in _ROWS:
                    _refill(getattr(static, name), getattr(level, name))
        for key, table in used.tables.items():
            _refill(self._tables[key], table)


def capture(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A replay of ``call`` from a CUDA graph; its result lies in memory that each replay reuses."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: allocations of other threads (a data loader's) do not break the capture
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = call()

    def replay() -> Any:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


class GraphedGenerator:
    """Pictures of one layout, each a single launch; an edited layout is loaded, not captured anew.

    Args:
        generator: frozen, in eval mode.
        used: a layout with :class:`TableCache`, after a forward pass of the generator.
        z: a code, or None for a generator that takes none.
        record: makes a replay of a call; default: :func:`capture`.

    Example:
        >>> fast = GraphedGenerator(generator, layout, z)  # doctest: +SKIP
        >>> image = fast(z)  # doctest: +SKIP
    """

    def __init__(self, generator: Any, used: LabelLayout, z: Tensor | None,
                 record: Callable[[Call, torch.device], Call] = capture) -> None:
        self._static = StaticLayout(used)
        self._z = None if z is None else z.clone()
        self._replay = record(lambda: generator(self._static.layout, self._z),
                              used.symbols.device)

    def fits(self, used: LabelLayout) -> bool:
        """Whether an edited layout can be loaded; else a new graph is due."""
        return self._static.fits(used)

    def load(self, used: LabelLayout) -> None:
        """Go on with an edited layout, after a forward pass has made its tables."""
        self._static.load(used)

    def __call__(self, z: Tensor | None) -> Tensor:
        """The picture (N, 3, H, W) of a code, in memory of its own."""
        if self._z is not None:
            if z is None or z.shape != self._z.shape:  # copy_ would broadcast
                got = None if z is None else tuple(z.shape)
                raise ValueError(f"z: expected {tuple(self._z.shape)}, got {got}")
            self._z.copy_(z)
        return self._replay().clone()
