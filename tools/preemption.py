"""Runs that are stopped at any moment: signal x whom it reaches x workers.

Every case starts ``smis train``, lets it log some steps, sends the signal, and looks at what is
left: the exit code, one line where something went wrong, a checkpoint of the very last step, no
half-written file, no process. Those of one process then go on to the end, and their losses must be
those of a run without a break, to the bit.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

OPTIONS: dict[str, Any] = {
    "recipe": "groupdnet_deepfashion",
    "network": {"ngf": 2, "nef": 8, "ndf": 4, "image_size": [64, 64], "upsampling": "normal"},
    "data": {"name": "scenes", "batch": 2, "count": 24},
    "losses": {"perceptual": 0.0}, "schedule": {"epochs": 1, "decay_epochs": 1},
    "log": {"every": 1, "checkpoint_every": 1000, "grid_every": 0, "tensorboard": False},
}
STEPS = 24
_MACHINE = ("images_per_second", "waiting", "memory")


@dataclass(frozen=True)
class Case:
    """One way to stop a run: ``signal`` to ``target``, with so many workers.

    ``target``: main (the training process), group (all that a scheduler signals), agent (torchrun,
    with two training processes), group of agent, or worker (one that reads pictures).
    """

    signal: signal.Signals
    target: str
    workers: int

    def __str__(self) -> str:
        return f"{self.signal.name} to {self.target}, {self.workers} workers"

    @property
    def distributed(self) -> bool:
        """Whether torchrun starts two processes."""
        return "agent" in self.target


CASES = tuple(
    Case(number, target, workers)
    for number in (signal.SIGTERM, signal.SIGINT)
    for target in ("main", "group", "agent", "group of agent") for workers in (0, 2)
) + (Case(signal.SIGKILL, "worker", 1), Case(signal.SIGKILL, "worker", 2))


def curve(folder: Path) -> list[dict[str, str]]:
    """losses.csv without what depends on the machine."""
    path = folder / "losses.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in _MACHINE} for row in csv.DictReader(file)]


def _expect(what: str, condition: bool, detail: object) -> None:
    if not condition:
        raise AssertionError(f"{what}: {detail}")


def _command(folder: Path, workers: int, distributed: bool) -> list[str]:
    start = [sys.executable, "-m"]
    if distributed:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--redirects",
                  "3", "--log-dir", str(folder / "ranks"), "-m"]
    return [*start, "smis_models.cli", "train", str(folder / "options.json"), "--out",
            str(folder / "run"), "--resume", "auto", "--data.workers", str(workers)]


def _start(folder: Path, workers: int, distributed: bool = False) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(OPTIONS))
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            _command(folder, workers, distributed), stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _until(what: str, condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        _expect(what, time.monotonic() < end, f"not within {seconds:g} s")
        time.sleep(0.02)


def whole(folder: Path) -> list[dict[str, str]]:
    """The losses of a run without a break."""
    code = _start(folder, 0).wait(timeout=600)
    _expect("exit code of a whole run", code == 0, (code, (folder / "output").read_text()))
    return curve(folder / "run")


def _workers(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if child.cmdline() == process.cmdline()]


def _send(case: Case, process: psutil.Process) -> None:
    if case.target == "worker":
        _workers(process)[0].send_signal(case.signal)
    elif case.target.startswith("group"):
        os.killpg(process.pid, case.signal)
    else:
        process.send_signal(case.signal)


def check(case: Case, folder: Path, expected: list[dict[str, str]]) -> None:
    """Stop a run as ``case`` says.

    Args:
        case: signal, target, workers.
        folder: to work in.
        expected: the losses of a run without a break.

    Raises:
        AssertionError: what is not as it has to be.
    """
    run = folder / "run"
    started = _start(folder, case.workers, case.distributed)
    process = psutil.Process(started.pid)
    try:
        _until("first steps", lambda: len(curve(run)) >= 3 or started.poll() is not None)
        family = [process, *process.children(recursive=True)]
        _send(case, process)
        code = started.wait(timeout=120)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    outputs = sorted((folder / "ranks").rglob("std*.log")) or [folder / "output"]
    text = "".join(path.read_text() for path in outputs)
    _expect("no traceback", "Traceback" not in text, text)
    if case.target == "worker":
        _expect("exit code", code == 2, (code, text))
        _expect("message", text.count("error: data.workers: a worker ended") == 1, text)
    elif not case.distributed:  # torchrun's own code is 1, whatever its processes' are
        _expect("exit code", code == 128 + case.signal, (code, text))
    _until("no process is left", lambda: not any(
        p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 30)
    steps = [int(row["step"]) for row in curve(run)]
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    _expect("the last step is saved", saved == steps[-1] < STEPS, (saved, steps, text))
    _expect("weights", (run / "model.safetensors").exists(), text)
    _expect("half-written files", not list(run.glob(".*")), list(run.glob(".*")))
    if not case.distributed:
        code = _start(folder, case.workers).wait(timeout=600)
        _expect("exit code of the rest", code == 0, (folder / "output").read_text())
        _expect("losses", curve(run) == expected, f"{case}: not those of a run without a break")


def main() -> None:
    """All cases."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        expected = whole(Path(name) / "whole")
        for number, case in enumerate(CASES):
            begin = time.monotonic()
            try:
                check(case, Path(name) / str(number), expected)
                result = "good"
            except AssertionError as error:
                result, failed = f"FAILED: {error}", failed + 1
            print(f"{case}: {result} ({time.monotonic() - begin:.0f} s)", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
