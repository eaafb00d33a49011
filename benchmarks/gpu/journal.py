"""The journal of a part: rows appended one by one to a JSON file that is whole at any moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEPT = ("done", "skipped")  # rows that the next call does not repeat
ENDED = (*KEPT, "failed")  # rows that the same run does not repeat


def write_json(path: Path, content: Any) -> None:
    """Write beside the target and rename, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


class Skip(Exception):
    """Why a row or a part cannot run here; the text goes into the results."""


class Lacking(Skip):
    """What this build of the machine lacks: skipped now, tried again by the next call."""


class OutOfTime(Exception):
    """The part's time is spent; ``--from`` runs what is left."""


class Unusable(Exception):
    """The CUDA context is lost: the rest of the part needs a new process."""


class Journal:
    """Rows of one part: ``journal.row(name, function)`` runs what is not recorded yet.

    A row is {"name", "state": "done" | "failed" | "skipped" | "running", "reason", "seconds",
    "commit", "tuned", ...} and what the function returned; "again": the next call repeats it.
    """

    def __init__(self, path: Path, seconds: float, healthy: Callable[[], str | None],
                 commit: str = "", tuned: str = "") -> None:
        self.path = path
        self.commit, self.tuned = commit, tuned
        self.deadline = time.monotonic() + seconds
        self.healthy = healthy
        self.rows: list[Row] = (read_json(path) or {"rows": []})["rows"]

    def left(self) -> float:
        """Seconds until the part's deadline."""
        return self.deadline - time.monotonic()

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that have no row that ended."""
        ended = {row["name"] for row in self.rows if row["state"] in ENDED}
        return [name for name in names if name not in ended]

    def late_last(self, names: Iterable[str]) -> list[str]:
        """The names, those that an earlier call ended at its deadline last.

        A row that never fits must not keep the others from their turn in every call.
        """
        return sorted(names, key=lambda name: (self.find(name) or {}).get("state") == "late")

    def find(self, name: str) -> Row | None:
        """The recorded row of this name."""
        return next((row for row in self.rows if row["name"] == name), None)

    def _put(self, row: Row) -> None:
        for i, old in enumerate(self.rows):
            if old["name"] == row["name"]:
                self.rows[i] = row
                break
        else:
            self.rows.append(row)
        write_json(self.path, {"rows": self.rows})

    def row(self, name: str, function: Callable[[], Row], needs: float = 0.0) -> Row | None:
        """Run ``function`` and record what it returns, unless that is recorded already.

        Args:
            name: of the row, unique in the part.
            function: returns the row's content, its "state" too where it is not "done";
                :class:`Skip` skips it with a reason, any other exception fails it.
            needs: seconds it takes at the least; with fewer left it is not started.

        Raises:
            OutOfTime: the deadline is near.
            Unusable: after an error that the device does not recover from.
        """
        found = self.find(name)
        if found is not None and found["state"] in ENDED:
            return found
        if self.left() <= needs:
            raise OutOfTime(name)
        self._put({"name": name, "state": "running"})
        start = time.monotonic()
        try:
            row: Row = {"name": name, "state": "done", **function()}
        except Skip as reason:
            row = {"name": name, "state": "skipped", "reason": str(reason)}
            if isinstance(reason, Lacking):
                row["again"] = True
        except Exception as error:
            row = {"name": name, "state": "failed", "reason": explain(error)}
        row.setdefault("seconds", round(time.monotonic() - start, 2))
        row |= {"commit": self.commit, "tuned": self.tuned}
        self._put(row)
        print(f"  {name}: {row['state']}{brief(row)} ({row['seconds']:.1f} s)", flush=True)
        problem = self.healthy()
        if problem is not None:
            raise Unusable(problem)
        return row


def explain(error: BaseException) -> str:
    """The error's type and its first telling line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


def brief(row: Row) -> str:
    """What stands behind a row's state on one line."""
    return f": {row['reason']}" if row.get("reason") else ""
