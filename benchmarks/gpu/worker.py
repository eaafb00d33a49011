"""One part in a process of its own.

``python -m benchmarks.gpu.worker PART FUNCTION SECONDS SETTINGS``
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from .journal import Journal, OutOfTime, Skip, Unusable, explain, read_json, write_json
from .settings import TUNED, Settings

DONE, FAILED, LOST, LATE = 0, 1, 3, 4


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
    table = read_json(Path(path))
    return f"{table.get('device')}, {table.get('date')}, commit {table.get('commit')}"


def run(name: str, target: str, seconds: float, settings: Settings) -> int:
    """Run one part; its rows are in its journal, the reason for stopping in ``<part>.end.json``."""
    journal = Journal(settings.journal(name), seconds, healthy, settings.commit, tuned())
    module, _, function = target.partition(":")
    state, reason, code = "done", "", DONE
    try:
        getattr(importlib.import_module(module), function)(journal, settings)
    except Skip as why:
        state, reason = "skipped", str(why)
    except OutOfTime as row:
        state, reason, code = "stopped", f"time budget, before {row}; --from goes on", LATE
    except Unusable as why:
        state, reason, code = "lost", str(why), LOST
    except Exception as error:
        import traceback

        traceback.print_exc()
        state, reason, code = "failed", explain(error), FAILED
    if state == "done" and any(row["state"] == "failed" for row in journal.rows):
        state, code = "failed", FAILED
        reason = "; ".join(row["name"] for row in journal.rows if row["state"] == "failed")
    end = settings.journal(name).with_suffix(".end.json")
    write_json(end, {"state": state, "reason": reason})
    return code


def main() -> None:
    name, target, seconds, settings = sys.argv[1:5]
    code = run(name, target, float(seconds), Settings.from_json(settings))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: destructors may wait for a device that no longer answers.
    os._exit(code)


if __name__ == "__main__":
    main()
