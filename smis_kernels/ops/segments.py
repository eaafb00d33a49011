"""Elements sorted by the row that they read: gradients of rows are summed in this order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

PIECE = 64  # pixels whose gradients one program sums: a sky has thousands in one row


class Segments(NamedTuple):
    """Elements by row: ``elements[bounds[r] : bounds[r + 1]]``, ascending, are those of row r.

    Attributes:
        elements: (E,) int32, or int64 where there are more.
        bounds: (R + 1,) of the same dtype.
    """

    elements: Tensor
    bounds: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """(E, R), the numbers of elements and rows."""
        return self.elements.numel(), self.bounds.numel() - 1


class Pieces(NamedTuple):
    """:class:`Segments` in pieces of at most PIECE elements: a row of many has many programs.

    Attributes:
        elements: as there.
        pieces: (Q + 1,), where each piece begins; each lies in one row, and some are empty.
        firsts: (R + 1,), row r has the pieces from ``firsts[r]`` to ``firsts[r + 1]``.
    """

    elements: Tensor
    pieces: Tensor
    firsts: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """(E, R), the numbers of elements and rows."""
        return self.elements.numel(), self.firsts.numel() - 1


def sorted_rows(indices: Sequence[tuple[Tensor, int]]) -> list[Segments]:
    """The segments of each (row of every element, number of rows), all from one sort.

    Rows of several indices have to be in range; of a single one those out of range are in none.
    It is stable, so sums over segments have a fixed order, without atomics.
    """
    counts, rows = [index.numel() for index, _ in indices], [number for _, number in indices]
    narrow = max(sum(counts), sum(rows)) < 2**31
    dtype = torch.int32 if narrow else torch.int64
    before = [*accumulate(rows, initial=0)]
    keys = [index.flatten().to(dtype) + offset if offset else index.flatten().to(dtype)
            for (index, _), offset in zip(indices, before, strict=False)]
    ordered, order = torch.sort(torch.cat(keys) if len(keys) > 1 else keys[0], stable=True)
    every = torch.arange(before[-1] + 1, dtype=dtype, device=order.device)
    bounds = torch.searchsorted(ordered, every, out_int32=narrow)
    found, start = [], 0
    for count, (first, last) in zip(counts, pairwise(before), strict=True):
        # copies: views would keep the memory of all
        elements = order.narrow(0, start, count).to(dtype)
        own = bounds.narrow(0, first, last - first + 1)
        if start:
            elements, own = elements.sub_(start), own - start
        found.append(Segments(elements, own))
        start += count
    return found


def window_index(windows: Tensor, rows: int) -> tuple[Tensor, int]:
    """What :func:`sorted_rows` sorts (V + 1, 9) windows of so many ``rows`` by: row and tap."""
    # row 0 of the windows is the outside: it receives no gradient
    taps = torch.arange(9, dtype=torch.int32, device=windows.device)
    taken = windows.narrow(0, 1, windows.shape[0] - 1)
    # clamped, so that no product wraps into a row's: below 0 or beyond the last is in no segment
    return torch.add(taps, taken.clamp(-1, rows), alpha=9), 9 * rows


def of_windows(found: Segments) -> Segments:
    """The windows themselves in place of their taps."""
    return Segments(found.elements // 9 + 1, found.bounds)


def in_pieces(found: Segments) -> Pieces:
    """The segments cut at every PIECE-th element."""
    elements, bounds = found
    cuts = torch.arange(0, elements.numel(), PIECE, dtype=bounds.dtype, device=bounds.device)
    # Merged without a sort: a bound comes before a cut at the same element.
    of_bounds = torch.arange(bounds.numel(), device=bounds.device) + (bounds + (PIECE - 1)) // PIECE
    of_cuts = torch.searchsorted(bounds, cuts, right=True)
    of_cuts = of_cuts + torch.arange(cuts.numel(), device=bounds.device)
    pieces = bounds.new_empty(bounds.numel() + cuts.numel())
    pieces.scatter_(0, of_bounds, bounds).scatter_(0, of_cuts, cuts)
    return Pieces(elements, pieces, of_bounds.to(bounds.dtype))


Order = TypeVar("Order", Segments, Pieces)


def order_for_gradients(order: Callable[[], Order] | None, kind: str, sizes: tuple[int, int],
                        *inputs: Tensor | None) -> Order | None:
    """What ``order`` gives, where a GPU's kernel will sum gradients of one of ``inputs`` in it.

    Raises:
        ValueError: it is of another number of elements or rows than ``sizes``.
    """
    if order is None or kind != "triton" or torch.compiler.is_compiling():
        return None
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        return None
    found = order()
    if found.sizes != sizes:
        raise ValueError("order: expected that of {} elements and {} rows, got {} and {}; give the "
                         "order of this very index".format(*sizes, *found.sizes))
    return found
