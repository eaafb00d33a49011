"""Batches of a step: the order of the pictures, and the random codes that belong to them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from smis_kernels import LabelLayout
from smis_kernels.interface import requested

from ..data import Batch, Collate, Draw, SceneDataset
from ..data.build import build_dataset
from ..families import Preset
from ..io.seeds import derived_seed
from .config import TrainConfig
from .distributed import Processes


def dataset(config: TrainConfig, split: str, count: int | None = None) -> SceneDataset:
    """The pictures of a split; ``count`` of them where they are generated.

    Raises:
        ValueError, FileNotFoundError: an unknown data set, missing or unpaired files.
    """
    data = config.data
    return build_dataset(
        data.name, data.root, config.network, split, count=count or data.count, mode=data.mode,
        load=data.load, flip=data.flip, unknown=data.unknown, seed=config.seed,
        option="--data.unknown",
    )


@dataclass
class MicroBatch:
    """What one forward of a step sees.

    Attributes:
        image: (N, 3, H, W) in [-1, 1].
        labels: (N, H, W), integers.
        layout: the compiled labels; None where ``planes`` is set instead.
        instances: (N, H, W) ids, or None.
        noise_seed, first, drawn: which random codes are this batch's: N of ``drawn``, from
            ``first`` on, so that several processes draw what one would.
        share: what a mean over the classes that the pictures show counts for, where the batches of
            a step show unequal numbers of them: this batch's over their mean.
    """

    image: Tensor
    labels: Tensor
    layout: LabelLayout | None = None
    instances: Tensor | None = None
    noise_seed: int = 0
    first: int = 0
    drawn: int | None = None
    share: float = 1.0
    dense: bool = field(default_factory=lambda: requested() == "reference")

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> MicroBatch:
        """The data loader's batch, on ``device``."""
        ids = batch.get("instances")
        return cls(
            batch["image"].to(device, non_blocking=True), batch["labels"].to(device),
            batch["layout"].to(device), None if ids is None else ids.to(device),
        )

    def __len__(self) -> int:
        return len(self.image)

    @cached_property
    def planes(self) -> Tensor:
        """The semantics as planes, (N, classes [+ edge], H, W)."""
        assert self.layout is not None
        return self.layout.dense(dtype=self.image.dtype)

    @property
    def semantics(self) -> Tensor | LabelLayout:
        """What the generator reads: the layout, or for the reference backend the planes."""
        return self.planes if self.dense or self.layout is None else self.layout

    def shown(self, classes: int) -> Tensor:
        """Which classes each picture shows, (N, classes) bool."""
        found = torch.zeros(len(self), classes, dtype=torch.bool, device=self.labels.device)
        return found.scatter_(1, self.labels.flatten(1).long(), True)

    def noise(self, like: Tensor, draw: int = 0) -> Tensor:
        """N(0, 1) of the shape of ``like`` (N, ...); ``draw`` numbers the draws of a step."""
        generator = torch.Generator().manual_seed(derived_seed(self.noise_seed, draw))
        shape = (self.drawn or len(self), *like.shape[1:])
        drawn = torch.randn(shape, generator=generator)
        return drawn[self.first : self.first + len(self)].to(like)


def first_batches(pictures: SceneDataset, config: TrainConfig, device: torch.device,
                  most: int, parts: int = 1) -> Iterator[MicroBatch]:
    """The first pictures, ``most`` of them, in batches of a ``parts``-th of a step's: those of one
    process and micro-batch, for more there may not be the memory."""
    collate, count = Collate(config.network), min(most, len(pictures))
    size = max(1, config.data.batch // parts)
    for first in range(0, count, size):
        chosen = [pictures[i] for i in range(first, min(first + size, count))]
        yield MicroBatch.of(collate(chosen), device)


class Place(NamedTuple):
    """How far a run is: the epoch, and the pictures of its order that were seen."""

    epoch: int
    seen: int

    @classmethod
    def of(cls, step: int, length: int, batch: int) -> Place:
        """The place before a step of a run whose batch never changed."""
        epoch, steps = divmod(step, length // batch)
        return cls(epoch, steps * batch)

    def settled(self, length: int, batch: int) -> Place:
        """The same, or the next epoch's start where no batch is left of this one."""
        return self if not self.seen or self.seen + batch <= length else Place(self.epoch + 1, 0)

    def after(self, length: int, batch: int) -> Place:
        """The place after one more step."""
        return Place(self.epoch, self.seen + batch).settled(length, batch)

    def left(self, epochs: int, length: int, batch: int) -> int:
        """Steps that are left of ``epochs``."""
        whole = (epochs - self.epoch) * (length // batch)
        return max(0, whole - length // batch + (length - self.seen) // batch)


class Order(Sampler[list[Draw]]):
    """Endless micro-batches of one process: every epoch a new permutation, its rest dropped.

    Args:
        length: of the data set.
        batch: images of a step over all processes and micro-batches.
        accumulate: micro-batches of a step.
        seed: of the permutations.
        start: the place to begin with, or a step of a run whose batch never changed.
        processes: whose share it is.
    """

    def __init__(self, length: int, batch: int, accumulate: int, seed: int, start: Place | int,
                 processes: Processes) -> None:
        self.length, self.batch, self.accumulate = length, batch, accumulate
        self.seed, self.processes = seed, processes
        self.start = start if isinstance(start, Place) else Place.of(start, length, batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        micro = self.batch // self.accumulate
        own = micro // self.processes.count
        first = self.processes.rank * own
        epoch, seen = self.start
        while True:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
            end = seen + (self.length - seen) // self.batch * self.batch
            for begin in range(seen + first, end, micro):
                yield [Draw(index, epoch) for index in order[begin : begin + own]]
            epoch, seen = epoch + 1, 0


@contextmanager
def _unsignalled() -> Iterator[None]:
    """Processes that start here never see SIGTERM and SIGINT; a worker's end interrupts nobody.

    Schedulers signal whole process groups: a worker that died of it would take the step with it.
    torch's handler of SIGCHLD raises wherever the training process is, in the middle of an update
    too; without it :class:`Batches` sees the end of a worker when it waits for its next batch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Collated(Dataset[Any]):
    """Batches by the keys of their pictures.

    Errors travel as values: a worker's own come with its whole traceback.
    """

    def __init__(self, source: SceneDataset, preset: Preset) -> None:
        self._source, self._collate = source, Collate(preset)

    def __getitem__(self, keys: Sequence[Draw]) -> Batch | Exception:
        try:
            return self._collate([self._source[key] for key in keys])
        except (ValueError, OSError) as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


class Batches:
    """The micro-batches of all steps from ``start`` on; layouts are compiled by the workers.

    Workers take no notice of the signals that stop a run, which the process that started them
    heeds; one that ends is told of by :meth:`step` and nowhere else.

    Args:
        dataset, config, processes, device: of the run.
        start: the step to begin with.
        place: where it is in the order of the pictures; by default that of a run whose batch never
            changed.

    Raises:
        ValueError: fewer pictures than a step needs, or a batch that cannot be shared equally.
    """

    def __init__(self, dataset: SceneDataset, config: TrainConfig, processes: Processes,
                 device: torch.device, start: int = 0, place: Place | None = None) -> None:
        batch, accumulate = config.data.batch, config.optimizer.accumulate
        parts = accumulate * processes.count
        if batch % parts:
            raise ValueError(
                f"data.batch: expected a multiple of {parts} (optimizer.accumulate x processes), "
                f"got {batch}"
            )
        if len(dataset) < batch:
            raise ValueError(f"data.batch: expected at most {len(dataset)}, for there are no more "
                             f"pictures; got {batch}")
        self._accumulate, self._micro, self._own = accumulate, batch // accumulate, batch // parts
        self._seed, self._step = config.seed, start
        self._first, self._device = processes.rank * self._own, device
        self.length = len(dataset)
        self._place = Place.of(start, self.length, batch) if place is None else place
        self._dataset, self._config, self._processes = dataset, config, processes
        self._iterator: Iterator[Batch | Exception] | None = None

    def _open(self) -> Iterator[Batch | Exception]:
        config = self._config
        order = Order(self.length, config.data.batch, self._accumulate, self._seed, self._place,
                      self._processes)
        loader = DataLoader(
            _Collated(self._dataset, config.network), batch_size=None, sampler=order,
            collate_fn=_as_it_is,
            num_workers=config.data.workers, pin_memory=self._device.type == "cuda")
        with _unsignalled():
            return iter(loader)

    def _lost_worker(self, error: Exception) -> bool:
        """Whether a worker ended: torch saw it, or the pipe or socket of its batch broke before."""
        if isinstance(error, RuntimeError):
            return str(error).startswith("DataLoader worker")
        raised_there = str(error).startswith("Caught ")  # torch's words for what a data set raised
        return (self._config.data.workers > 0 and isinstance(error, (EOFError, OSError))
                and not raised_there)

    def _next(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._open()
        try:
            made = next(self._iterator)
        except Exception as error:
            if not self._lost_worker(error):
                raise
            raise ValueError("data.workers: a worker ended unexpectedly, killed for memory "
                             "perhaps; take fewer, or 0") from error
        if isinstance(made, Exception):
            raise made
        return made

    def close(self, step: int, place: Place) -> None:
        """End the workers; the next :meth:`step` is ``step``, at ``place``, with new ones."""
        iterator: Any = self._iterator
        if hasattr(iterator, "_shutdown_workers"):  # an error's traceback may hold the iterator
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # one that hangs; the interpreter would wait for it at its end
        self._iterator, self._step, self._place = None, step, place

    def step(self) -> list[MicroBatch]:
        """The micro-batches of the next step, on the device.

        Raises:
            ValueError, OSError: a picture or map that cannot be used; the message names it.
        """
        made = []
        for i in range(self._accumulate):
            batch = MicroBatch.of(self._next(), self._device)
            batch.noise_seed = derived_seed(self._seed, self._step, i)
            batch.first, batch.drawn = self._first, self._micro
            made.append(batch)
        self._step += 1
        return made
