"""Tables of frozen norms on one layout, kept; an edited layout takes over the rows that it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops.label_windows.op import number_windows
from ..runtime.tensors import outlasting
from .levels import WindowLevel

if TYPE_CHECKING:
    from .label_layout import LabelLayout


def _names(old: LabelLayout, new: LabelLayout) -> tuple[Tensor, Tensor]:
    """A number for each symbol of both layouts: of equal vectors the same one."""
    marked = [
        torch.cat([x.vectors.double(), torch.zeros(
            (len(x.vectors), 1), dtype=torch.double, device=x.vectors.device,
        ).index_fill_(0, _first(x.vectors), 1)], 1)
        for x in (old, new)
    ]  # the outside differs from a pixel whose vector is zero
    _, common = torch.unique(torch.cat(marked), dim=0, return_inverse=True)
    before, after = common.split([len(old.vectors), len(new.vectors)])
    return before, after


def match_windows(old: LabelLayout, new: LabelLayout, size: tuple[int, int], *, reach: int,
                  names: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return for each window of ``new`` at ``size`` the row of the same window in ``old``, or -1.

    Windows are the same where their symbols have the same vectors; ``reach`` is 1 for 3x3 and 2
    for 5x5 windows. ``names``: of the symbols, where they are known.
    """
    before, after = (layout.level(size) for layout in (old, new))
    named = zip(_names(old, new) if names is None else names, (before, after), strict=True)
    joint = torch.cat([name[level.symbols.long()] for name, level in named]).int() + 1
    row = torch.full((after.counts[reach - 1] + 1,), -1, device=joint.device)
    row[0] = 0
    for _ in range(reach):  # both maps' windows, numbered together
        joint, windows = number_windows(joint, joint.numel(), backend="auto")
        if len(windows) == 0:  # too many for the kernel's keys
            return row
    was, now = joint.long().split([len(before.symbols), len(after.symbols)])
    index = f"index{2 * reach + 1}"
    known = torch.full((len(windows),), -1, device=joint.device)
    known[was] = getattr(before, index).long()
    row[getattr(after, index).long()] = known[now]
    return row


def _first(rows: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.long, device=rows.device)


@dataclass(frozen=True)
class _Edit:
    """What the windows of an edited layout have in common with those before it.

    Attributes:
        row: (U + 1,) the row before of each window; of new ones 0. None where nothing has changed.
        fresh: (F,) the windows that are new.
        windows3, windows: the new ones, row 0 the outside, by the 3x3 windows that they hold alone.
    """

    row: Tensor | None
    fresh: Tensor
    windows3: Tensor
    windows: Tensor

    @classmethod
    def of(cls, row: Tensor, rows_before: int, level: WindowLevel, reach: int) -> _Edit:
        fresh = (row < 0).nonzero().flatten()
        windows3, windows = level.windows3, level.windows3 if reach == 1 else level.windows5
        wanted = torch.cat([torch.zeros_like(windows[:1]), windows.index_select(0, fresh)])
        if reach == 2:
            used, renamed = torch.unique(wanted, return_inverse=True)  # 0 is the first of them
            windows3, wanted = windows3.index_select(0, used.long()), renamed.int()
        if len(row) == rows_before and torch.equal(
                row, torch.arange(len(row), device=row.device)):
            return cls(None, fresh, windows3, wanted)
        return cls(row.clamp_min(0), fresh, windows3, wanted)


T = TypeVar("T")
Build = Callable[[Tensor, Tensor], Tensor]  # of the 3x3 windows and those that rows are for


class TableCache:
    """Finished tables of frozen norms on one layout: further samples skip building them.

    Where an edited layout follows another, rows of windows that both have are taken over.

    Args:
        earlier: the tables of the layout that was edited.
        budget: bytes that predictions (:meth:`prediction`) may take; tables are not counted.
    """

    def __init__(self, earlier: TableCache | None = None, *, budget: int = 0) -> None:
        # The layout, its state when the table was made, and the table.
        self._kept: dict[tuple[nn.Module, tuple[int, int]],
                         tuple[LabelLayout, tuple[int, ...], Tensor]] = {}
        self._names: dict[tuple[int, int], tuple[LabelLayout, LabelLayout, Any]] = {}
        self._edits: dict[Any, _Edit] = {}
        self._counts: dict[tuple[tuple[int, int], int], tuple[int, int]] = {}
        self._predictions: dict[nn.Module, Any] = {}  # None: asked for once
        self._budget = budget
        self._earlier = None if earlier is None else earlier._kept
        if earlier is not None:  # one step back serves; a chain would keep every edit's tables
            earlier._predictions.clear()
            earlier._earlier = None
            earlier._names.clear()
            earlier._edits.clear()

    def put(self, owner: nn.Module, size: tuple[int, int], layout: LabelLayout,
            table: Tensor) -> None:
        self._kept[owner, size] = (layout, layout.state, table)

    def forget(self) -> None:
        """Drop what was made of a layout that has been written to since."""
        for kept in (self._kept, self._names, self._edits, self._counts):
            kept.clear()
        self._predictions = dict.fromkeys(self._predictions)  # made anew at the next request

    def lacks(self, owner: Any, size: tuple[int, int]) -> bool:
        """Whether the owner's table at ``size`` is to be made of all windows."""
        return all((owner, size) not in kept for kept in (self._kept, self._earlier or {}))

    def items(self) -> Iterator[tuple[tuple[nn.Module, tuple[int, int]], Tensor]]:
        """((owner, size), table) of all tables kept."""
        for key, (*_, table) in self._kept.items():
            yield key, table

    @property
    def windows(self) -> tuple[int, int]:
        """(new, kept): windows whose rows were computed, and taken over, over all resolutions."""
        return (sum(new for new, _ in self._counts.values()),
                sum(kept for _, kept in self._counts.values()))

    def table(self, owner: nn.Module, size: tuple[int, int], layout: LabelLayout, reach: int,
              build: Build) -> Tensor:
        """The owner's rows (U + 1, 2C) of the windows at ``size``; ``build`` makes those missing.

        ``reach`` is 1 for 3x3 and 2 for 5x5 windows.
        """
        found = self._kept.get((owner, size))
        if found is not None:
            return found[2]
        with outlasting():
            table = self._made(owner, size, layout, reach, build)
        self.put(owner, size, layout, table)
        return table

    def _made(self, owner: nn.Module, size: tuple[int, int], layout: LabelLayout, reach: int,
              build: Build) -> Tensor:
        level = layout.level(size)
        earlier = None if self._earlier is None else self._earlier.get((owner, size))
        if earlier is None or earlier[0].state != earlier[1]:
            windows = level.windows3 if reach == 1 else level.windows5
            table, new, total = build(level.windows3, windows), len(windows) - 1, len(windows) - 1
        else:
            before, _, rows = earlier
            edit = self._edit(before, layout, size, reach, len(rows))
            table = rows if edit.row is None else rows.index_select(0, edit.row)
            new, total = len(edit.fresh), len(table) - 1
            if new:
                made = build(edit.windows3, edit.windows)[1:]
                table.index_copy_(0, edit.fresh, made)
        self._counts[size, reach] = (new, total - new)
        return table

    @property
    def predicts(self) -> bool:
        """Whether a network keeps predictions of its own, or is about to."""
        return bool(self._predictions)

    def prediction(self, owner: nn.Module, size: int, make: Callable[[], T]) -> T | None:
        """What a frozen ``owner`` makes of the layout alone, kept from the second request on.

        None at the first request, for a layout that is painted once pays for nothing, and where
        ``size``, its bytes, does not fit what the budget has left.
        """
        if owner not in self._predictions:
            if size <= self._budget:
                self._budget -= size
                self._predictions[owner] = None
            return None
        if self._predictions[owner] is None:
            with outlasting():
                self._predictions[owner] = make()
        found: T = self._predictions[owner]
        return found

    def _edit(self, before: LabelLayout, after: LabelLayout, size: tuple[int, int], reach: int,
              rows: int) -> _Edit:
        pair = id(before), id(after)
        if pair not in self._names:
            found = _names(before, after)
            plain = tuple(tuple(name.tolist()) for name in found)  # once: a GPU waits for it
            self._names[pair] = before, after, (found, plain)
        names, plain = self._names[pair][2]
        # The same for all norms of a resolution that see as far, on vectors that differ alike.
        key = size, reach, plain
        if key not in self._edits:
            row = match_windows(before, after, size, reach=reach, names=names)
            self._edits[key] = _Edit.of(row, rows, after.level(size), reach)
        return self._edits[key]
