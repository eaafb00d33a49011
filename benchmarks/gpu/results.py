"""The results file: records and rows of all parts, whole at any moment, read and written by turns.

Its ``benchmarks`` are records of :mod:`smis_models.benchmark`, so ``python -m benchmarks.report``
reads it; its ``parts`` hold the rows, each done once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TUNED = "SMIS_TUNED"  # smis_kernels.runtime.tuned.ENVIRONMENT; nothing here imports the package,
FORMAT = 2            # which loads its libraries at once: the ``build`` part has them made first
KEPT = ("done", "skipped")  # rows that the next call does not repeat
ENDED = (*KEPT, "failed")  # rows that the same run does not repeat
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What one run of the command was asked for; handed to every part's process as JSON.

    ``path`` is the results file.
    """

    path: str
    maps: str | None = None
    parity: str | None = None
    dry_run: bool = False
    commit: str = "unknown"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def device(self) -> str:
        """"cuda", or "cpu" on a dry run."""
        return "cpu" if self.dry_run else "cuda"

    @property
    def table(self) -> Path:
        """The launch settings: the ``tune`` part writes them, later parts use them."""
        return Path(self.path).with_suffix(".tuned.json")

    def log(self, part: str) -> Path:
        """What a part's processes printed."""
        return ROOT / "build" / "gpu" / Path(self.path).stem / f"{part}.log"


def write_json(path: str | Path, content: Any) -> None:
    """Write beside the target and rename, so that no reader sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, None where there is none."""
    return json.loads(Path(path).read_text()) if Path(path).exists() else None


class Skip(Exception):
    """Why a row or a part cannot run here; the text goes into the results."""


class Lacking(Skip):
    """What this build of the machine lacks: skipped now, tried again by the next call."""


class OutOfTime(Exception):
    """The part's time is spent; ``--from`` runs what is left."""


class Unusable(Exception):
    """The CUDA context is lost: the rest of the part needs a new process."""


def read_results(path: str | Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        Skip: there are none, and why.
    """
    try:
        found = json.loads(Path(path).read_text())
        if found["format"] != FORMAT or not isinstance(found["parts"], dict):
            raise ValueError("another format")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Skip(f"{path}: expected results of python -m benchmarks.gpu "
                   f"({explain(error)})") from None
    return dict(found)


def going_on(results: dict[str, Any], every_call: Iterable[str]) -> dict[str, Any]:
    """Results to go on with: without rows that failed and those that each call makes again.

    A row that was ended at its deadline stays as a name, to be tried last. Records stay until the
    row has others.
    """
    again = set(every_call)
    for name, part in results["parts"].items():
        rows: list[Row] = []
        for row in part["rows"]:
            if not (name in again or row.get("again") or row["state"] not in (*KEPT, "late")):
                rows.append(row)
            if row.get("late") and name not in again:
                rows.append({"name": row["name"], "state": "late"})
        if len(rows) < len(part["rows"]):
            part["state"] = "stopped"
        part["rows"] = rows
    return results


class Journal:
    """Rows of one part: ``journal.row(name, function)`` runs what is not recorded yet.

    A row is {"name", "state": "done" | "failed" | "skipped" | "running", "reason", "seconds",
    "commit", "tuned", ...} and what the function returned; "again": the next call repeats it. The
    "records" of a row go to the file's ``benchmarks``; they are of the group that the row names.
    """

    def __init__(self, path: str | Path, part: str, seconds: float = 60.0,
                 healthy: Callable[[], str | None] = lambda: None,
                 commit: str = "", tuned: str = "") -> None:
        self.path, self.part, self.commit, self.tuned = path, part, commit, tuned
        self.deadline = time.monotonic() + seconds
        self.healthy = healthy
        self.content: dict[str, Any] = read_json(path) or {"parts": {}, "benchmarks": []}
        self._entry = self.content["parts"].setdefault(part, {})
        self.rows: list[Row] = self._entry.setdefault("rows", [])

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

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.content)

    def end(self, state: str, reason: str = "", **more: Any) -> None:
        """Write how the part ended; a row that it was at has failed."""
        for row in self.rows:
            if row["state"] == "running":
                row.update(state="failed", reason=reason, **more)
        self._entry.update(state=state, reason=reason)
        self.save()

    def _put(self, row: Row) -> None:
        records = row.pop("records", None)
        if records is not None:
            kept = [e for e in self.content["benchmarks"] if e["group"] != row["name"]]
            entries = [record.to_entry() for record in records]
            for entry in entries:  # there may be no git where it ran
                entry["extra_info"]["commit"] = self.commit
            self.content["benchmarks"] = kept + entries
        places = [i for i, old in enumerate(self.rows) if old["name"] == row["name"]]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        self.save()

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
        why = f": {row['reason']}" if row.get("reason") else ""
        print(f"  {name}: {row['state']}{why} ({row['seconds']:.1f} s)", flush=True)
        problem = self.healthy()
        if problem is not None:
            raise Unusable(problem)
        return row


def explain(error: BaseException) -> str:
    """The error's type and its first telling line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


def environment(settings: Settings) -> dict[str, str]:
    """The environment of the parts' processes: caches that later calls find again."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [found.get("PYTHONPATH", "")])]
    )
    found["PYTHONUNBUFFERED"] = "1"
    found.setdefault("MPLBACKEND", "Agg")
    if settings.table.exists():
        found.setdefault(TUNED, str(settings.table))
    for name in ("SMIS_BACKEND", "SMIS_PATH", "TRITON_INTERPRET"):
        found.pop(name, None)
    if settings.dry_run:
        # Kernels are interpreted, so a machine with a GPU does the same as one without.
        return {**found, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    caches = ROOT / "build" / "gpu-cache"
    found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    found.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
    return found
