"""What was replaced, what was left, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One module: its name, class and kind, whether it was replaced, and the reason if not."""

    name: str
    type: str
    kind: str
    replaced: bool
    note: str


@dataclass(frozen=True)
class Difference:
    """The largest difference between original and accelerated outputs, and their largest value."""

    largest: float
    scale: float

    def __str__(self) -> str:
        return f"largest difference {self.largest:.2e}, outputs up to {self.scale:.2e}"


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; ``print`` it for a table.

    Attributes:
        rows: one for each module that was recognised, or nearly.
        difference: what ``verify`` measured, else None.
        gain: how many times as fast the model was on the arguments of ``verify``, else None.
        dry_run: whether nothing was changed.
        calls: of each replaced module, the calls that its original served, by reason; goes on
            counting.
    """

    rows: tuple[Row, ...]
    difference: Difference | None = None
    gain: float | None = None
    dry_run: bool = False
    calls: Mapping[str, Counter[str]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The modules whose forward is a fused one now."""
        return tuple(row for row in self.rows if row.replaced)

    @property
    def left(self) -> tuple[Row, ...]:
        """Those that were left alone; ``note`` says why."""
        return tuple(row for row in self.rows if not row.replaced)

    @property
    def calls_left(self) -> dict[tuple[str, str], int]:
        """How often, so far, a replaced module ran its original forward: by (module, reason)."""
        return {(name, reason): count for name, counter in self.calls.items()
                for reason, count in counter.items()}

    def _expected(self) -> list[str]:
        norms = [row for row in self.replaced if row.kind == "norm"]
        dense = sum(bool(row.note) for row in norms)
        if not norms:
            return []
        # One norm of 64 channels and 35 classes on one thread, the map numbered in the call.
        return [f"expected: {len(norms) - dense} norms by tables (2 times as fast at 32x32 to 12 "
                f"at 128x128 where the map's windows repeat), {dense} with their convs (about as "
                "before)"]

    def __str__(self) -> str:
        verb = "would be replaced" if self.dry_run else "replaced"
        lines = _table([("module", "class", "kind", "what", "note")] + [
            (r.name or "(the model)", r.type, r.kind, verb if r.replaced else "left", r.note or "-")
            for r in self.rows
        ])
        kinds = Counter(row.kind for row in self.replaced)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"
        lines.append(f"{verb}: {counts}; left: {len(self.left)}")
        lines += self._expected()
        if self.difference is not None:
            lines.append(str(self.difference))
        if self.gain is not None:
            lines.append(f"measured: {self.gain:.2f} times as fast, the faster of two calls each")
        lines += [f"{name or '(the model)'} ran its original forward in {count} calls: {reason}"
                  for (name, reason), count in self.calls_left.items()]
        return "\n".join(lines)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows]
