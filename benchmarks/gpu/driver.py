"""Runs the parts, each in its own process with its own deadline, and keeps the results whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from .journal import KEPT, read_json, write_json
from .parts import PARTS, Part
from .settings import ROOT, Settings, environment
from .worker import DONE, FAILED, LATE, LOST

GRACE = 10.0  # past a part's deadline before its process is ended
RESTARTS = 4
DRY_RUN = 10  # times a part's share: a processor in use by others has no schedule
POLL = 0.2
TAIL = 25  # lines of a failed part's log that are printed; ten times as many are kept
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
)
Save = Callable[[dict[str, Any]], None]


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    deadline: float
    started: float
    restarts: int = 0
    seconds: float = field(default=0.0)


def _start(part: Part, seconds: float, settings: Settings) -> subprocess.Popen[bytes]:
    settings.journal(part.name).with_suffix(".end.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.worker", part.name, part.target,
               f"{seconds:.1f}", settings.to_json()]
    log = settings.log(part.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        # A group, not a session: whoever ends the command's session ends the part too.
        return subprocess.Popen(command, cwd=ROOT, env=environment(settings), stdout=sink,
                                stderr=subprocess.STDOUT, **OWN_GROUP)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started (it leads a group of its own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fail_running_row(settings: Settings, name: str, reason: str, **more: Any) -> None:
    path = settings.journal(name)
    journal = read_json(path) or {"rows": []}
    for row in journal["rows"]:
        if row["state"] == "running":
            row.update(state="failed", reason=reason, **more)
    write_json(path, journal)


def collect(settings: Settings, name: str, default: str = "running") -> dict[str, Any]:
    """A part's state, reason and rows from its files."""
    path = settings.journal(name)
    rows = (read_json(path) or {"rows": []})["rows"]
    end = read_json(path.with_suffix(".end.json")) or {"state": default, "reason": ""}
    return {**end, "rows": rows}


def _finished(running: _Running, settings: Settings, total_left: float) -> bool:
    """Whether a part has ended for good; one that lost its device or crashed starts again."""
    code = running.process.poll()
    name = running.part.name
    left = min(running.deadline - time.monotonic(), total_left)
    if code is None:
        if left > -GRACE:
            return False
        end_process(running.process)
        _fail_running_row(settings, name, "ended at the part's deadline; --from tries it last",
                          late=True)
        write_json(settings.journal(name).with_suffix(".end.json"),
                   {"state": "stopped", "reason": "time budget; --from goes on"})
        return True
    if code in (DONE, FAILED, LATE):
        return True
    reason = ("the GPU was lost" if code == LOST else f"the process ended with code {code}")
    _fail_running_row(settings, name, f"{reason}: {last_line(settings, name)}")
    if running.restarts < RESTARTS and left > GRACE:
        running.restarts += 1
        running.process = _start(running.part, left, settings)
        return False
    state = collect(settings, name, "lost")
    write_json(settings.journal(name).with_suffix(".end.json"),
               {"state": "failed", "reason": f"{reason}; {state['reason']}".rstrip("; ")})
    return True


def last_line(settings: Settings, name: str) -> str:
    """The last line that a part printed."""
    path = settings.log(name)
    return next((line.strip() for line in reversed(_lines(path)) if line.strip()),
                "no output")[:300]


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def keep_log(settings: Settings, name: str) -> None:
    """Print the end of a failed part's log, and append more of it to a file beside the results."""
    lines = _lines(settings.log(name))
    settings.failures.parent.mkdir(parents=True, exist_ok=True)
    with settings.failures.open("a") as kept:
        kept.write("\n".join([f"== {name}", *lines[-10 * TAIL:]]) + "\n")
    print("\n".join(f"  {name}| {line[:300]}" for line in lines[-TAIL:]), flush=True)


def grouped(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts that run together; a timed one is alone."""
    key = lambda item: item[1].group or item[0]  # noqa: E731
    return [[part for _, part in group] for _, group in groupby(enumerate(parts), key)]


def _say(part: Part, content: dict[str, Any], seconds: float) -> None:
    rows = content["rows"]
    counts = {state: sum(row["state"] == state for row in rows)
              for state in ("done", "skipped", "failed")}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    reason = f": {content['reason']}" if content["reason"] else ""
    print(f"{part.name:12} {content['state']:8} {seconds:6.1f} s  {text}{reason}", flush=True)


def run_parts(parts: Iterable[Part], settings: Settings, budget: float, save: Save,
              results: dict[str, Any]) -> dict[str, Any]:
    """Run parts in order within ``budget`` seconds; ``save(results)`` after every change.

    Args:
        parts: in order.
        settings: of the run.
        budget: for all of them.
        save: called with the parts' results so far.
        results: of parts that are not run again; receives those that are.

    Returns:
        Part name -> {"state", "reason", "seconds", "rows"}.
    """
    end = time.monotonic() + budget
    scale = DRY_RUN if settings.dry_run else 1
    groups = grouped(parts)
    for i, group in enumerate(groups):
        left = end - time.monotonic()
        # what earlier parts did not need, less what the later ones may
        spare = left - scale * sum(max(part.seconds for part in later) for later in groups[i + 1:])
        if left <= 5:
            for part in group:
                results[part.name] = {**results.get(part.name, {"rows": []}), "state": "stopped",
                                      "reason": "time budget; --from goes on", "seconds": 0.0}
                _say(part, results[part.name], 0.0)
            save(results)
            continue
        running = []
        for part in group:
            seconds = min(max(scale * part.seconds, spare), left)
            now = time.monotonic()
            running.append(_Running(part, _start(part, seconds, settings), now + seconds, now))
        try:
            _wait(running, settings, end, save, results)
        finally:
            for item in running:
                if item.process.poll() is None:
                    end_process(item.process)
        broken = [part.name for part in group
                  if part.fatal and results[part.name]["state"] != "done"]
        if broken:
            print(f"stopped: {broken[0]} did not work, and all else needs it", flush=True)
            break
    return results


def _wait(running: list[_Running], settings: Settings, end: float, save: Save,
          results: dict[str, Any]) -> None:
    stamps: dict[str, float] = {}
    open_items = list(running)
    while open_items:
        time.sleep(POLL)
        for item in list(open_items):
            name, path = item.part.name, settings.journal(item.part.name)
            finished = _finished(item, settings, end - time.monotonic())
            stamp = path.stat().st_mtime if path.exists() else 0.0
            if finished or stamp != stamps.get(name):
                stamps[name] = stamp
                seconds = round(time.monotonic() - item.started, 1)
                results[name] = {**collect(settings, name), "seconds": seconds}
                save(results)
            if finished:
                open_items.remove(item)
                _say(item.part, results[name], results[name]["seconds"])
                if results[name]["state"] in ("failed", "lost"):
                    keep_log(settings, name)


def order(names: Iterable[str]) -> list[Part]:
    """Parts of these names in the order of PARTS, those that the others need included."""
    wanted = set(names)
    return [part for part in PARTS if part.name in wanted or part.again]


def restore(settings: Settings, results: dict[str, Any]) -> None:
    """Make the journals ready to go on: rows that failed go, and what each call does again.

    A machine without journals gets those of the results; the machine and its libraries may be new.
    """
    again = {part.name for part in PARTS if part.again}
    for name, content in results.items():
        path = settings.journal(name)
        rows = (read_json(path) or content)["rows"]
        kept = [{"name": row["name"], "state": "late"} if row.get("late") else row for row in rows
                if name not in again and not row.get("again")
                and (row["state"] in (*KEPT, "late") or row.get("late"))]
        write_json(path, {"rows": kept})
