"""A run: data, steps, logs, grids and checkpoints in one folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Collate
from ..data.scenes import palette
from ..io.checkpoint import save_checkpoint
from ..io.images import grid, to_pictures, write_atomically, write_png
from .batches import Batches, MicroBatch, dataset
from .checkpoints import CONFIG, STATE, WEIGHTS, load_state, save_state
from .config import TrainConfig
from .journal import Board, Clock, LossTable, memory
from .objective import objective
from .options import to_json
from .processes import Processes, joined
from .trainer import Trainer


@dataclass(frozen=True)
class Progress:
    """What is told after every logged step.

    Attributes:
        step, steps: done, and to do in all.
        values: losses, learning rates, ``images_per_second``, ``waiting`` (share of the time spent
            waiting for data), ``memory`` (MB).
    """

    step: int
    steps: int
    values: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``step`` of ``steps``; ``finished`` or stopped before; its files."""

    step: int
    steps: int
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.step >= self.steps

    @property
    def weights(self) -> Path:
        """What ``create_model`` and ``smis synthesize --checkpoint`` take."""
        return self.folder / WEIGHTS


class Run:
    """One training run in ``folder``.

    Files: config.json, losses.csv, checkpoint.pt (all that ``resume`` needs), model.safetensors
    (weights for ``create_model``), grids/, tensorboard/.

    Args:
        config: all options.
        folder: written to.
        device: of the networks.
        resume: go on from ``folder``'s checkpoint; the losses are those of a run without a break,
            on the CPU to the bit.
        processes: that train together.

    Raises:
        ValueError: contradictory options; a folder that holds another run's checkpoint.
        CheckpointError: nothing to resume, or of another model.
    """

    def __init__(self, config: TrainConfig, folder: str | Path, *,
                 device: torch.device | str = "cpu", resume: bool = False,
                 processes: Processes | None = None) -> None:
        self.config, self.folder = config, Path(folder)
        self.processes = processes or Processes()
        if not resume and (self.folder / STATE).exists():
            raise ValueError(f"out: {self.folder} holds a run; --resume goes on with it, another "
                             "--out starts anew")
        state = load_state(self.folder, config) if resume else None
        self.trainer = Trainer(config, device, self.processes)
        if state is not None:
            self.trainer.load_state(state)
        pictures = dataset(config, "train")
        self.batches = Batches(pictures, config, self.processes, self.trainer.device,
                               self.trainer.step_count)
        self.steps = config.schedule.total * self.batches.steps_per_epoch
        self._shown = self._grid_batch() if config.log.grid_every else None
        if self.processes.first:
            write_atomically(self.folder / CONFIG, to_json(config).encode())
            self._table = LossTable(self.folder / "losses.csv", self.trainer.step_count)
            self._board = Board(self.folder, config.log.tensorboard, self.trainer.step_count)

    def _grid_batch(self) -> MicroBatch | None:
        """The first held-out scenes."""
        if not self.processes.first:
            return None
        held_out = dataset(self.config, self.config.log.grid_split, self.config.log.rows)
        rows = min(self.config.log.rows, len(held_out))
        batch = Collate(self.config.network)([held_out[i] for i in range(rows)])
        return MicroBatch.of(batch, self.trainer.device)

    def __call__(self, report: Callable[[Progress], None] = lambda progress: None, *,
                 minutes: float | None = None,
                 stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the end, for ``minutes``, or until ``stop()`` says so after a step.

        Raises:
            NonFiniteLoss: a loss became NaN; the last checkpoint stays as it was.
            CheckpointError: a checkpoint cannot be written; the earlier one stays.
        """
        trainer, log = self.trainer, self.config.log
        begin, clock, saved = time.monotonic(), Clock(), trainer.step_count
        while trainer.step_count < self.steps:
            with clock.waiting():
                batches = self.batches.step()
            epoch = trainer.step_count // self.batches.steps_per_epoch
            losses = trainer.step(batches, epoch)
            clock.count(self.config.data.batch)
            step = trainer.step_count
            if step % log.every == 0 or step == 1:
                self._log(losses, epoch, clock, report)
            if log.grid_every and step % log.grid_every == 0:
                self._draw()
            if step % log.checkpoint_every == 0:
                self.save()
                saved = step
            late = minutes is not None and time.monotonic() - begin > 60 * minutes
            if self._any(late or stop()):
                break
        if saved != trainer.step_count:
            self.save()
        if self.processes.first:
            self._board.close()
        return Outcome(trainer.step_count, self.steps, self.folder)

    def _any(self, wish: bool) -> bool:
        """Whether any process wants to stop: all stop after the same step."""
        if self.processes.count == 1:
            return wish
        flag = torch.tensor([float(wish)], device=self.trainer.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def _log(self, losses: dict[str, float], epoch: int, clock: Clock,
             report: Callable[[Progress], None]) -> None:
        step, names = self.trainer.step_count, list(losses)
        values = torch.tensor([losses[name] for name in names], dtype=torch.float64)
        losses = dict(zip(names, self.processes.mean(values).tolist(), strict=True))
        if not self.processes.first:
            return
        rate_g, rate_d = self.trainer.rates(epoch)
        values_ = {**losses, "rate_generator": rate_g, "rate_discriminator": rate_d}
        speed = {**clock.look(), "memory": memory(self.trainer.device)}
        self._table.add({"step": step, "epoch": epoch, **values_, **speed})
        self._board.scalars({f"losses/{k}": v for k, v in losses.items()}, step)
        self._board.scalars({f"run/{k}": v for k, v in speed.items()}, step)
        report(Progress(step, self.steps, {**values_, **speed}))

    @torch.no_grad()
    def _draw(self) -> None:
        """A row for each held-out scene: labels, picture, its reconstruction, samples."""
        if self._shown is None:
            return
        painter, batch = self.trainer.painter, self._shown
        painter.eval()
        shown = objective(painter, self.config)
        columns = [batch.image, shown.reconstruct(batch),
                   *(shown.sample(batch, seed) for seed in range(self.config.log.samples))]
        colours = palette(self.config.network.classes)
        rows = [[colours[labels.cpu().numpy()], *pictures] for labels, *pictures in zip(
            batch.labels, *(to_pictures(column) for column in columns), strict=True)]
        painter.train()
        picture = grid(rows)
        write_png(self.folder / "grids" / f"{self.trainer.step_count:07d}.png", picture)
        self._board.picture("samples", picture, self.trainer.step_count)

    def save(self) -> None:
        """Write checkpoint.pt and model.safetensors, each whole or not at all."""
        if self.processes.first:
            save_state(self.folder, self.trainer.state(), self.config)
            painted = self.trainer.painter
            kept = {n: m for n, m in painted.named_children() if n != "discriminator"}
            save_checkpoint(type(painted)(painted.name, painted.preset, kept),
                            self.folder / WEIGHTS)
        self.processes.wait()


def train(config: TrainConfig, folder: str | Path, *, device: torch.device | str = "cpu",
          resume: bool = False, minutes: float | None = None,
          report: Callable[[Progress], None] = lambda progress: None,
          stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Train a model of the zoo in ``folder``; under torchrun all processes together.

    Args:
        config: from :func:`smis_models.training.load_config`.
        folder, device, resume: as in :class:`Run`.
        minutes: stop after that long, with a checkpoint.
        report: called after every logged step by the first process.
        stop: asked after every step.

    Example:
        >>> from smis_models import create_model
        >>> from smis_models.training import load_config
        >>> small = ["--network.ngf=8", "--network.nef=8", "--data.batch=2", "--data.count=2"]
        >>> quiet = ["--data.workers=0", "--log.grid_every=0", "--log.tensorboard=false"]
        >>> short = ["--schedule.epochs=1", "--schedule.decay_epochs=1"]
        >>> config = load_config("groupdnet_scenes_codes", [*small, *quiet, *short])
        >>> outcome = train(config, "runs/scenes")
        >>> model = create_model(checkpoint=outcome.weights)
    """
    with joined(torch.device(device)) as (processes, place):
        run: Any = Run(config, folder, device=place, resume=resume, processes=processes)
        outcome: Outcome = run(report, minutes=minutes, stop=stop)
    return outcome
