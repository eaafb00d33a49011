"""The order in which gradients of a resolution's tables are summed: sorted once, then kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.segments import Pieces, Segments, in_pieces, of_windows, sorted_rows, window_index
from ..runtime import constants


class LevelOrder(NamedTuple):
    """The pixels and windows of a resolution by the row that they read: gradients are summed so.

    Attributes:
        pixels: by row of a table.
        windows: that the table is of, by what they hold; of 3x3 windows the same as ``windows3``.
        windows3: 3x3 windows by symbol.
    """

    pixels: Pieces
    windows: Segments
    windows3: Segments

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        return *self.pixels, *self.windows, *self.windows3


class SortedLevel:
    """A :class:`LevelOrder`, what it was made of, and when the device has made it."""

    def __init__(self, sources: tuple[Tensor, ...], symbols: int) -> None:
        index, windows, windows3 = self._sources = sources
        self._known = constants.state(sources), symbols
        keys = [(index, len(windows)), window_index(windows3, symbols)]
        if windows is not windows3:
            keys.append(window_index(windows, len(windows3)))
        pixels, *others = sorted_rows(keys)
        found = [*map(of_windows, others)]
        self.order = LevelOrder(in_pieces(pixels), found[-1], found[0])
        self._stream: Any = None
        if index.is_cuda and torch.cuda.is_available():  # no fake tensor
            self._stream = torch.cuda.current_stream(index.device)
            self._made = self._stream.record_event()

    def fits(self, sources: tuple[Tensor, ...], symbols: int) -> bool:
        """Whether it is of these tensors, and they are as they were."""
        return (all(a is b for a, b in zip(sources, self._sources, strict=True))
                and self._known == (constants.state(sources), symbols))

    def taken(self) -> LevelOrder:
        """The order, on the current stream."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._sources[0].device)
            if stream != self._stream:
                stream.wait_event(self._made)
                for tensor in self.order.tensors:
                    tensor.record_stream(stream)
        return self.order
