"""Train one system for its share of the time; stopped at any moment, it goes on."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from smis_models.training import NonFiniteLoss, Progress, Run, TrainConfig
from smis_models.training.checkpoints import STATE, load_state

_SPENT = "spent.csv"


@dataclass(frozen=True)
class Trained:
    """What a system's time bought.

    Attributes:
        weights: for ``create_model``.
        steps, images: how many.
        seconds: of training; a checkpoint's steps alone are counted after a kill.
        failure: why it ended before its time, "" if it did not.
    """

    weights: Path
    steps: int
    images: int
    seconds: float
    failure: str = ""


class _Spent:
    """Seconds of training by step, on disk: those up to a checkpoint's step are not spent again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[int, float]] = []
        if path.exists():
            with path.open(newline="") as file:
                self._rows = [(int(row[0]), float(row[1])) for row in csv.reader(file)
                              if len(row) == 2]  # a kill may leave half a line

    def at(self, step: int) -> float:
        """Seconds up to a step."""
        return max((seconds for known, seconds in self._rows if known <= step), default=0.0)

    def add(self, step: int, seconds: float) -> None:
        """Note the seconds at a step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow((step, f"{seconds:.3f}"))


def train_system(config: TrainConfig, folder: Path, minutes: float, *,
                 device: torch.device | str = "cpu",
                 report: Callable[[Progress, float], None] = lambda progress, left: None,
                 ) -> Trained:
    """Train until ``minutes`` have been spent in all, one step at least, or a loss became NaN.

    Args:
        config: of the system.
        folder: of its run; one that was stopped goes on from its last checkpoint.
        minutes: of training, earlier calls' included.
        device: of the networks.
        report: called after logged steps with the progress and the seconds left.

    Raises:
        NonFiniteLoss: a loss became NaN before the first checkpoint.
        CheckpointError: a checkpoint cannot be read or written.
    """
    run = Run(config, folder, device=device, resume=(folder / STATE).exists())
    spent = _Spent(folder / _SPENT)
    before, begin = spent.at(run.trainer.step_count), time.monotonic()
    left, failure = 60 * minutes - before, ""
    if run.trainer.step_count == 0 or left > 0:

        def noted(progress: Progress) -> None:
            now = before + time.monotonic() - begin
            spent.add(progress.step, now)
            report(progress, max(0.0, 60 * minutes - now))

        try:
            step = run(noted, minutes=max(0.0, left) / 60).step
            before += time.monotonic() - begin
            spent.add(step, before)
        except NonFiniteLoss as error:  # one system's failure leaves the others theirs
            state = load_state(folder, config) if (folder / STATE).exists() else None
            if state is None:
                raise
            step, failure = state["step"], str(error)
            before = spent.at(step)
    else:
        step = run.trainer.step_count
    return Trained(folder / "model.safetensors", step, step * config.data.batch, before, failure)
