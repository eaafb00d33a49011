"""One part in a process of its own, and what starts, limits and restarts it.

``python -m benchmarks.gpu.worker PART FUNCTION SECONDS SETTINGS``
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .parts import Part
from .results import (
    ROOT,
    TUNED,
    Journal,
    OutOfTime,
    Settings,
    Skip,
    Unusable,
    environment,
    explain,
    read_json,
)

DONE, LOST = 0, 3
GRACE = 10.0  # past a part's deadline before its process is ended
RESTARTS = 4
DRY_RUN = 10  # times a part's share: a processor in use by others has no schedule
TAIL = 25  # lines of a failed part's log that are printed; ten times as many are kept
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
)


def run_parts(parts: Sequence[Part], settings: Settings, budget: float,
              after: Callable[[Part, float], None] = lambda part, seconds: None) -> None:
    """Run parts in order within ``budget`` seconds.

    Args:
        parts: in order.
        settings: of the run.
        budget: for all of them.
        after: called with each part that has ended, and the seconds it took.
    """
    end = time.monotonic() + budget
    scale = DRY_RUN if settings.dry_run else 1
    for i, part in enumerate(parts):
        start = time.monotonic()
        left = end - start
        # what earlier parts did not need, less what the later ones may
        spare = left - scale * sum(later.seconds for later in parts[i + 1:])
        if left <= 5:
            Journal(settings.path, part.name).end("stopped", "time budget; --from goes on")
        else:
            _run_part(part, settings, min(left, max(scale * part.seconds, spare)))
        seconds = round(time.monotonic() - start, 1)
        state = _report(part, settings, seconds)
        after(part, seconds)
        if part.fatal and state != "done":
            print(f"stopped: {part.name} did not work, and all else needs it", flush=True)
            break


def _run_part(part: Part, settings: Settings, seconds: float) -> None:
    """One part until it ends or its time does; a process that crashes is started again."""
    deadline = time.monotonic() + seconds
    log = settings.log(part.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(1 + RESTARTS):
        left = max(deadline - time.monotonic(), 0.0)
        command = [sys.executable, "-m", "benchmarks.gpu.worker", part.name, part.target,
                   f"{left:.1f}", settings.to_json()]
        with log.open("ab") as sink:
            # A group, not a session: whoever ends the command's session ends the part too.
            process = subprocess.Popen(command, cwd=ROOT, env=environment(settings), stdout=sink,
                                       stderr=subprocess.STDOUT, **OWN_GROUP)
        try:
            code = process.wait(left + GRACE)
        except subprocess.TimeoutExpired:
            end_process(process)
            journal = Journal(settings.path, part.name)
            for row in journal.rows:
                if row["state"] == "running":
                    row.update(state="failed", late=True,
                               reason="ended at the part's deadline; --from tries it last")
            journal.end("stopped", "time budget; --from goes on")
            return
        finally:
            end_process(process)
        if code == DONE:
            return
        why = "the GPU was lost" if code == LOST else f"the process ended with code {code}"
        lines = [line for line in _lines(log) if line.strip()] or ["no output"]
        Journal(settings.path, part.name).end("failed", f"{why}: {lines[-1].strip()[:300]}")
        if deadline - time.monotonic() <= GRACE:
            return


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started (it leads a group of its own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _report(part: Part, settings: Settings, seconds: float) -> str:
    """Print how a part ended; of one that failed the end of its log, and keep more of it."""
    content = read_json(settings.path)["parts"][part.name]
    counts = {state: sum(row["state"] == state for row in content["rows"])
              for state in ("done", "skipped", "failed")}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    reason = f": {content['reason']}" if content["reason"] else ""
    print(f"{part.name:12} {content['state']:8} {seconds:6.1f} s  {text}{reason}", flush=True)
    if content["state"] == "failed":
        lines = _lines(settings.log(part.name))
        with Path(settings.path).with_suffix(".failed.log").open("a") as kept:
            kept.write("\n".join([f"== {part.name}", *lines[-10 * TAIL:]]) + "\n")
        print("\n".join(f"  {part.name}| {line[:300]}" for line in lines[-TAIL:]), flush=True)
    return str(content["state"])


def healthy() -> str | None:
    """Why the GPU can no longer be used by this process, or None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # a sticky error: every later call would fail
        return explain(error)
    return None


def tuned() -> str:
    """Which launch settings this process uses, "" where there are none."""
    path = os.environ.get(TUNED, "")
    if path in ("", "none"):
        return ""
    table = read_json(path)
    return f"{table.get('device')}, {table.get('date')}, commit {table.get('commit')}"


def run(name: str, target: str, seconds: float, settings: Settings) -> int:
    """Run one part; its rows, state and reason go to the results file."""
    journal = Journal(settings.path, name, seconds, healthy, settings.commit, tuned())
    module, _, function = target.partition(":")
    state, reason = "done", ""
    try:
        getattr(importlib.import_module(module), function)(journal, settings)
    except Skip as why:
        state, reason = "skipped", str(why)
    except OutOfTime as row:
        state, reason = "stopped", f"time budget, before {row}; --from goes on"
    except Unusable as why:
        print(why, flush=True)
        return LOST
    except Exception as error:
        traceback.print_exc()
        state, reason = "failed", explain(error)
    failed = [row["name"] for row in journal.rows if row["state"] == "failed"]
    if state == "done" and failed:
        state, reason = "failed", "; ".join(failed)
    journal.end(state, reason)
    return DONE


def main() -> None:
    """Run the part of the command line."""
    name, target, seconds, settings = sys.argv[1:5]
    code = run(name, target, float(seconds), Settings(**json.loads(settings)))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: destructors may wait for a device that no longer answers.
    os._exit(code)


if __name__ == "__main__":
    main()
