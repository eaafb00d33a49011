"""A run: data, steps, logs, grids and checkpoints in one folder."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..data import Collate, SceneDataset
from ..data.classes import class_colours, class_names
from ..data.listing import one_set
from ..families import checkpoint_file
from ..io.checkpoint import CheckpointError, read_metadata, save_checkpoint
from ..io.files import file_hashes, locked, remove_partial
from ..io.images import to_pictures, write_atomically, write_png
from ..io.provenance import commit, versions
from ..io.sheet import captioned_grid
from .batches import Batches, MicroBatch, Place, dataset, first_batches
from .checkpoints import (
    BEST,
    CONFIG,
    KEPT,
    LOSSES,
    RECORD,
    STATE,
    TRAINING,
    WEIGHTS,
    differences,
    keep,
    load_state,
    save_state,
)
from .config import TrainConfig
from .distributed import Processes, process_group
from .loggers import Clock, Logger, LossTable, TensorBoard, WandB, memory
from .objective import objective
from .options import to_dict, to_json
from .trainer import NonFiniteLoss, Trainer

Resume = bool | Literal["auto"]


@dataclass(frozen=True)
class Progress:
    """What is told after every logged step.

    Attributes:
        step, steps: done, and to do in all.
        epoch, epochs: the one that the step is of, from 1 on, and how many there are.
        left: seconds until the end, at the speed of this process so far.
        values: losses, learning rates, ``images_per_second``, ``waiting`` (share of the time spent
            waiting for data), ``memory`` (MB).
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    left: float
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

    Files: config.json (the options in force), record.json (what was computed, by which source, and
    what was changed on the way), losses.csv, checkpoint.pt (all that ``resume`` needs),
    model.safetensors (weights for ``create_model``), kept/, best.safetensors, grids/, tensorboard/.

    Args:
        config: all options. Where a run goes on they may differ from those that it began with, in
            all but model, network and seed; each difference is told by a warning and recorded.
        folder: written to, by one run at a time.
        device: of the networks.
        resume: go on from ``folder``'s checkpoint; "auto": where there is one. The losses are those
            of a run without a break, on the CPU to the bit.
        processes: that train together.

    Raises:
        ValueError: contradictory options; a folder that holds another run's checkpoint.
        CheckpointError: nothing to resume, or of another model.
    """

    def __init__(self, config: TrainConfig, folder: str | Path, *,
                 device: torch.device | str = "cpu", resume: Resume = False,
                 processes: Processes | None = None) -> None:
        self.config, self.folder = config, Path(folder)
        self.processes = processes or Processes()
        self._commit = commit()  # of the source that is loaded, whatever is pulled meanwhile
        there = (self.folder / STATE).exists()
        if there and not resume:
            raise ValueError(f"out: {self.folder} holds a run; --resume goes on with it, another "
                             "--out starts anew")
        state = load_state(self.folder, config) if there or resume is True else None
        left = (self.folder / BEST, *sorted((self.folder / KEPT).glob("*.pt")))
        if state is None and any(path.exists() for path in left):  # to be taken for this one's
            raise ValueError(f"out: {self.folder} holds the {BEST} or the {KEPT} states of an "
                             f"earlier run without its {STATE}; remove them, or give another --out")
        self._init = _source(config.init) if state is None else state.get(
            "init", {"file": state["config"]["init"]} if state["config"]["init"] else None)
        self.trainer = Trainer(config, device, self.processes, fresh=state is None)
        self._history: list[dict[str, Any]] = []
        place = Place(0, 0)
        if state is not None:
            self.trainer.load_state(state)
            place, self._history = Place(*state["place"]), list(state["history"])
        pictures = dataset(config, "train")
        self.place = place.settled(len(pictures), config.data.batch)
        self.batches = Batches(pictures, config, self.processes, self.trainer.device,
                               self.trainer.step_count, self.place)
        self.steps = self.trainer.step_count + self.place.left(
            config.schedule.total, len(pictures), config.data.batch)
        if state is not None:
            self._tell_changes(state)
        self._held_out = self._open_held_out()
        self._shown = self._grid_batch() if config.log.grid_every else None
        self._saved = self.trainer.step_count if there else -1
        if self.processes.first:
            remove_partial(self.folder, STATE, WEIGHTS, CONFIG, RECORD, LOSSES, BEST)
            remove_partial(self.folder / KEPT, "*")
            remove_partial(self.folder / "grids", "*.png")
            write_atomically(self.folder / CONFIG, to_json(config).encode())
            step = self.trainer.step_count
            self._table = LossTable(self.folder / LOSSES, step)
            self._loggers: list[Logger] = []
            if config.log.tensorboard:
                self._loggers.append(TensorBoard(self.folder, step))
            if config.log.wandb:
                self._loggers.append(WandB(self.folder, step, to_dict(config)))

    def _tell_changes(self, state: dict[str, Any]) -> None:
        """Warn of what is not as it was, and note it for the record."""
        changed = differences(state["config"], to_dict(self.config))
        if state["pictures"] != self.batches.length:
            changed["data (pictures)"] = state["pictures"], self.batches.length
        if not changed:
            return
        step = self.trainer.step_count
        self._history.append({"step": step, "changed": {k: list(v) for k, v in changed.items()}})
        for name, (was, now) in changed.items():
            if self.processes.first:
                warnings.warn(f"resume: {name} was {was} up to step {step} and is {now} from here",
                              stacklevel=3)

    def _open_held_out(self) -> SceneDataset | None:
        """The scenes that the best weights are chosen on."""
        data, log = self.config.data, self.config.log
        if log.best is None or not self.processes.first:
            return None
        found = dataset(self.config, log.grid_split, log.best_scenes)
        if (data.name == "folder" and data.root is not None and log.grid_split != "train"
                and one_set(data.root, log.grid_split)):
            warnings.warn(f"log.best: {data.root} has one set for every split; the best weights "
                          "are chosen on scenes that are trained on", stacklevel=3)
        return found

    def _grid_batch(self) -> MicroBatch | None:
        """The first held-out scenes."""
        if not self.processes.first:
            return None
        held_out = dataset(self.config, self.config.log.grid_split, self.config.log.rows)
        rows = min(self.config.log.rows, len(held_out))
        chosen = [held_out[i] for i in range(rows)]
        size = chosen[0]["labels"].shape  # others do not fit in one batch
        batch = Collate(self.config.network)([s for s in chosen if s["labels"].shape == size])
        return MicroBatch.of(batch, self.trainer.device)

    def __call__(self, report: Callable[[Progress], None] = lambda progress: None, *,
                 minutes: float | None = None,
                 stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the end, for ``minutes``, or until ``stop()`` says so before a step.

        An error is raised when what is good has been saved.

        Raises:
            NonFiniteLoss: a loss or a weight became NaN.
            CheckpointError: a checkpoint cannot be written; the earlier one stays.
            ValueError, OSError: a picture that cannot be used, a worker that ended, a full disk.
        """
        if self.processes.first and self._saved >= 0 and not self._exported():
            self._export()  # the kill fell between the two files
        place, every = self.place, self.config.log.keep_epochs
        if (self.processes.first and every and self._saved > 0 and not place.seen and place.epoch
                and place.epoch % every == 0):  # or before the state was kept
            keep(self.folder, self._saved, place.epoch, self.config.log.keep)
        try:
            self._train(report, minutes, stop)
        except BaseException as error:
            self._rescue(error)
            raise
        finally:
            self.batches.close(self.trainer.step_count, self.place)
            if self.processes.first:
                for logger in self._loggers:
                    logger.close()
        return Outcome(self.trainer.step_count, self.steps, self.folder)

    def _train(self, report: Callable[[Progress], None], minutes: float | None,
               stop: Callable[[], bool]) -> None:
        trainer, log, length = self.trainer, self.config.log, self.batches.length
        batch, epochs = self.config.data.batch, log.keep_epochs
        begin, first, clock = time.monotonic(), trainer.step_count, Clock()
        while trainer.step_count < self.steps:
            failure: ValueError | OSError | None = None
            try:
                with clock.waiting():
                    batches = self.batches.step()
            except (ValueError, OSError) as error:
                failure = error
            late = (minutes is not None and trainer.step_count > first
                    and time.monotonic() - begin > 60 * minutes)
            # All processes stop before the same step, whichever of them has a reason.
            worst = self._worst(2 if failure else 1 if late or stop() else 0)
            if worst == 2:
                raise failure or ValueError("data: another process cannot go on, and says why")
            if worst == 1:
                break
            epoch = self.place.epoch
            losses = trainer.step(batches, epoch)
            self.place = self.place.after(length, batch)
            clock.count(batch)
            step = trainer.step_count
            if step % log.every == 0 or step == 1:
                spent = (time.monotonic() - begin) / (step - first)
                self._log(losses, epoch, clock, report, spent * (self.steps - step))
            if log.grid_every and step % log.grid_every == 0:
                self._draw()
            ended = epoch + 1 if self.place.epoch > epoch else None
            stays = bool(epochs) and ended is not None and ended % epochs == 0
            if step % log.checkpoint_every == 0 or stays:
                self.save(ended if stays else None)
        if self._saved != trainer.step_count:
            self.save()

    def _worst(self, state: int) -> int:
        """The largest of the processes' numbers."""
        if self.processes.count == 1:
            return state
        worst = torch.tensor(state, device=self.trainer.device)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        return int(worst.item())

    def _rescue(self, error: BaseException) -> None:
        """Save what an error leaves good; say so in a warning."""
        trainer = self.trainer
        lost = trainer.step_count - max(self._saved, 0)
        if not self.processes.first or not lost or isinstance(error, CheckpointError):
            return
        half = trainer.whole == "half"
        if half:
            self._history.append({"step": trainer.step_count, "changed": {
                "generator": ["of this step", "of the next, whose discriminator failed"]}})
        try:
            if trainer.whole == "no":
                raise ValueError("it came in the middle of an update")
            self._write()
        except (ValueError, OSError) as reason:
            warnings.warn(f"train: {lost} steps since the last checkpoint are lost: {reason}",
                          stacklevel=3)
            return
        with_half = ", with the generator's half of the next" if half else ""
        warnings.warn(f"train: saved at step {trainer.step_count}{with_half}; --resume goes on "
                      "from there", stacklevel=3)

    def _log(self, losses: dict[str, float], epoch: int, clock: Clock,
             report: Callable[[Progress], None], left: float) -> None:
        step = self.trainer.step_count
        if not self.processes.first:
            return
        rate_g, rate_d = self.trainer.rates(epoch)
        values_ = {**losses, "rate_generator": rate_g, "rate_discriminator": rate_d}
        speed = {**clock.look(), "memory": memory(self.trainer.device)}
        self._table.add({"step": step, "epoch": epoch, **values_, **speed})
        for logger in self._loggers:
            logger.scalars({f"losses/{k}": v for k, v in losses.items()}, step)
            logger.scalars({f"run/{k}": v for k, v in speed.items()}, step)
        report(Progress(step, self.steps, epoch + 1, self.config.schedule.total, left,
                        {**values_, **speed}))

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
        colours = class_colours(class_names(self.config.model, self.config.network.classes))
        rows = [[colours[labels.cpu().numpy()], *pictures] for labels, *pictures in zip(
            batch.labels, *(to_pictures(column) for column in columns), strict=True)]
        painter.train()
        of_code, drawn = ("of its code", "drawn code") if shown.coded else ("painted", "painted")
        names = ("layout", "picture", of_code,
                 *(f"{drawn} {k}" for k in range(self.config.log.samples)))
        picture = captioned_grid([list(zip(names, row, strict=True)) for row in rows])
        write_png(self.folder / "grids" / f"{self.trainer.step_count:07d}.png", picture)
        for logger in self._loggers:
            logger.picture("samples", picture, self.trainer.step_count)

    def save(self, epoch: int | None = None) -> None:
        """Write checkpoint.pt, model.safetensors and record.json, each whole or not at all.

        Args:
            epoch: that has ended, where its state stays for good.

        Raises:
            NonFiniteLoss: a weight became NaN; the earlier checkpoint stays.
            CheckpointError: a file cannot be written; the earlier one stays.
        """
        if self.processes.first:
            self._write()
            self._saved = self.trainer.step_count
            keep(self.folder, self.trainer.step_count, epoch, self.config.log.keep)
            if self.config.log.best is not None:
                self._keep_best(self.config.log.best)
        self._saved = self.trainer.step_count
        self.processes.wait()

    def _write(self) -> None:
        state = self.trainer.state()
        for part in ("model", "average"):
            for name, tensor in (state[part] or {}).items():
                if not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteLoss(
                        f"weights: {name} is not finite after step {self.trainer.step_count}; the "
                        "checkpoint of an earlier step stays; lower the learning rates, or train "
                        "with precision fp32")
        save_state(self.folder, {
            **state, "place": list(self.place), "pictures": self.batches.length,
            "history": self._history, "init": self._init}, self.config)
        self._export()

    def _facts(self) -> dict[str, Any]:
        """What was computed so far: the weights' metadata."""
        perceptual = self.trainer.objective.perceptual
        computed = self.trainer.computed
        return {"step": self.trainer.step_count, "epoch": self.place.epoch, "losses": computed,
                "perceptual": perceptual.facts if perceptual and "perceptual" in computed else None,
                "ema": self.config.optimizer.ema, "precision": self.config.precision,
                "init": self._init, "whiten": self.config.whiten, "seed": self.config.seed,
                "changes": self._history}

    def _painted(self) -> torch.nn.Module:
        painted = self.trainer.painter
        kept = {n: m for n, m in painted.named_children() if n != "discriminator"}
        return type(painted)(painted.name, painted.preset, kept)

    def _export(self) -> None:
        """Write the weights, and the record."""
        facts = self._facts()
        save_checkpoint(self._painted(), self.folder / WEIGHTS, {TRAINING: json.dumps(facts)})
        record = {**facts, "model": self.config.model, "pictures": self.batches.length,
                  "processes": self.processes.count, "device": str(self.trainer.device),
                  "commit": self._commit, "versions": versions()}
        write_atomically(self.folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())

    def _exported(self) -> bool:
        """Whether the weights and the record on disk are of the state's step."""
        try:
            facts = json.loads(read_metadata(self.folder / WEIGHTS)[TRAINING])
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (ValueError, OSError, KeyError, TypeError):  # torn ones too
            return False
        return bool(facts["step"] == record["step"] == self.trainer.step_count)

    @torch.no_grad()
    def _keep_best(self, metric: str) -> None:
        """Keep the weights where no checkpoint before did as well on held-out scenes."""
        path, scenes = self.folder / BEST, self._held_out
        assert scenes is not None
        count = min(self.config.log.best_scenes, len(scenes))
        painter = self.trainer.painter.eval()
        shown = objective(painter, self.config)
        perceptual = self.trainer.objective.perceptual if metric == "perceptual" else None
        distance = perceptual or torch.nn.functional.l1_loss
        total, digest = 0.0, hashlib.sha256()
        parts = self.processes.count * self.config.optimizer.accumulate
        for batch in first_batches(scenes, self.config, self.trainer.device, count, parts):
            total += float(distance(shown.reconstruct(batch), batch.image)) * len(batch)
            for scene in zip(batch.image, batch.labels, strict=True):
                for tensor in scene:
                    digest.update(tensor.cpu().contiguous().numpy().tobytes())
        painter.train()
        found = {"metric": metric, "value": total / count, "scenes": count,
                 "split": self.config.log.grid_split, "scenes_sha256": digest.hexdigest()}
        if perceptual is not None:
            found["vgg_sha256"] = perceptual.facts.get("vgg_sha256")
        try:
            before = json.loads(read_metadata(path)[TRAINING])["best"] if path.exists() else None
        except (CheckpointError, KeyError):
            before = None
        # What earlier versions did not tell is taken for the same.
        alike = before is not None and {**found, **before, "value": None} == {
            **found, "value": None}
        if before is None or not alike or found["value"] < before["value"]:
            save_checkpoint(self._painted(), path, {
                TRAINING: json.dumps({**self._facts(), "best": found})})


def _source(init: str | None) -> dict[str, Any] | None:
    """The weights that a run starts from, and their hashes."""
    if init is None:
        return None
    path = checkpoint_file(init)
    return {"file": init, "sha256": file_hashes(path) if path.exists() else {}}


def train(config: TrainConfig, folder: str | Path, *, device: torch.device | str = "cpu",
          resume: Resume = False, minutes: float | None = None,
          report: Callable[[Progress], None] = lambda progress: None,
          stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Train a model of the zoo in ``folder``; under torchrun all processes together.

    Args:
        config: from :func:`smis_models.training.load_config`.
        folder, device, resume: as in :class:`Run`.
        minutes: stop after that long, with a checkpoint.
        report: called after every logged step by the first process.
        stop: asked before every step.

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
    with process_group(torch.device(device)) as (processes, place), (
            locked(folder) if processes.first else nullcontext()):
        run: Any = Run(config, folder, device=place, resume=resume, processes=processes)
        outcome: Outcome = run(report, minutes=minutes, stop=stop)
    return outcome
