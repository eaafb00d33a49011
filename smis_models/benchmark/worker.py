"""The fresh process behind ``resident_peak`` and ``under_default_allocator``."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

from . import cases
from .case import Case, Maps, Setting
from .measure import bind, measure


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def _resident(case: Case, provider: str, setting: Setting) -> int:
    chosen = next(p for p in case.providers if p.name == provider)
    call = bind(case, chosen.run, chosen.prepare(case.make_inputs(setting)))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
    before = _status("VmRSS")
    kept = call()
    after = _status("VmHWM")
    del kept
    return after - before


def main() -> None:
    """``resident GROUP PROVIDER`` or ``time GROUP all``; the answer is one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("resident", "time"))
    parser.add_argument("group")
    parser.add_argument("provider")
    parser.add_argument("--maps")
    arguments = parser.parse_args()
    (case,) = (c for c in cases("all") if c.group == arguments.group)
    setting = Setting(torch.device("cpu"), maps=Maps(arguments.maps), compiled=False)
    if arguments.task == "resident":
        print(json.dumps(_resident(case, arguments.provider, setting)))
    else:
        print(json.dumps([record.to_entry() for record in measure(case, setting)]))


if __name__ == "__main__":
    main()
