"""Runs that are stopped at any moment: signal x whom it reaches x workers.

Every case starts ``smis train``, lets it log some steps, sends the signal, and looks at what is
left: the exit code, one line of what happened, a checkpoint of the very last step, no half-written
file, no process. Runs that go on have the losses of a run without a break, to the bit.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("jsonargparse")

OPTIONS: dict[str, Any] = {
    "recipe": "groupdnet_deepfashion",
    "network": {"ngf": 2, "nef": 8, "ndf": 4, "image_size": [64, 64], "upsampling": "normal"},
    "data": {"name": "scenes", "batch": 2, "count": 24},
    "losses": {"perceptual": 0.0}, "schedule": {"epochs": 1, "decay_epochs": 1},
    "log": {"every": 1, "checkpoint_every": 1000, "grid_every": 0, "tensorboard": False},
}
STEPS = 24
MACHINE = ("images_per_second", "waiting", "memory")


@dataclass(frozen=True)
class Case:
    """One way to stop a run: ``signal`` to ``target``, with so many workers.

    ``target``: main (the training process), group (all that a scheduler signals), agent (torchrun,
    with two training processes), group of agent, or worker (one that reads pictures). ``goes_on``:
    whether the run is resumed to its end.
    """

    signal: signal.Signals
    target: str
    workers: int
    goes_on: bool = False

    def __str__(self) -> str:
        return f"{self.signal.name}-{self.target}-{self.workers}".replace(" ", "-")

    @property
    def distributed(self) -> bool:
        """Whether torchrun starts two processes."""
        return "agent" in self.target


# Each signal to each target, each number of workers with each signal and with one process and with
# two. Without workers a process is a group alone.
CASES = [
    Case(signal.SIGTERM, "main", 0), Case(signal.SIGINT, "main", 2),
    *(Case(number, "group", 2, goes_on=True) for number in (signal.SIGTERM, signal.SIGINT)),
    Case(signal.SIGTERM, "agent", 2), Case(signal.SIGINT, "agent", 0),
    *(Case(number, "group of agent", 2) for number in (signal.SIGTERM, signal.SIGINT)),
    Case(signal.SIGKILL, "worker", 2, goes_on=True),  # as by the kernel, for memory
]


def curve(folder: Path) -> list[dict[str, str]]:
    """losses.csv without what depends on the machine."""
    path = folder / "losses.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MACHINE} for row in csv.DictReader(file)]


def start(folder: Path, workers: int, distributed: bool = False) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(OPTIONS))
    command = [sys.executable, "-m"]
    if distributed:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--redirects",
                    "3", "--log-dir", str(folder / "ranks"), "-m"]
    command += ["smis_models.cli", "train", str(folder / "options.json"), "--out",
                str(folder / "run"), "--resume", "auto", "--data.workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                start_new_session=True, env=environment)


def until(what: str, condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The losses of a run without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, 0).wait(timeout=600) == 0, (folder / "output").read_text()
    found = curve(folder / "run")
    assert len(found) == STEPS
    return found


def send(case: Case, process: psutil.Process) -> None:
    if case.target == "worker":
        workers = [child for child in process.children() if child.cmdline() == process.cmdline()]
        assert len(workers) == case.workers
        workers[0].send_signal(case.signal)
    elif case.target.startswith("group"):
        os.killpg(process.pid, case.signal)
    else:
        process.send_signal(case.signal)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stopped_run_has_saved_its_last_step(
        case: Case, whole: list[dict[str, str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = start(tmp_path, case.workers, case.distributed)
    process = psutil.Process(started.pid)
    try:
        until("first steps", lambda: len(curve(run)) >= 3 or started.poll() is not None)
        assert started.poll() is None, (tmp_path / "output").read_text()
        family = [process, *process.children(recursive=True)]
        send(case, process)
        code = started.wait(timeout=120)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    outputs = sorted((tmp_path / "ranks").rglob("std*.log")) or [tmp_path / "output"]
    text = "".join(path.read_text() for path in outputs)
    assert "Traceback" not in text, text
    if case.target == "worker":
        assert code == 2, text
        assert text.count("error: data.workers: a worker ended") == 1, text
        assert text.count("--resume goes on from there") == 1, text
    else:
        assert text.count(f"{case.signal.name}: stopping after this step") == 1, text
        if not case.distributed:  # torchrun has a code of its own
            assert code == 128 + case.signal == {"SIGTERM": 143, "SIGINT": 130}[case.signal.name]
    until("no process is left", lambda: not any(
        p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 30)
    steps = [int(row["step"]) for row in curve(run)]
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert saved == steps[-1] < STEPS, text
    assert (run / "model.safetensors").exists()
    assert not list(run.glob(".*"))
    if case.goes_on:
        code = start(tmp_path, case.workers).wait(timeout=600)
        assert code == 0, (tmp_path / "output").read_text()
        assert curve(run) == whole
