"""Batches of a step: the order of the pictures, and the random codes that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from smis_kernels import LabelLayout
from smis_kernels.interface import requested

from ..data import Batch, Collate, Draw, Sample, SceneDataset
from ..data.build import build_dataset
from ..families import Preset
from ..io.seeds import derived_seed
from .config import TrainConfig
from .processes import Processes


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
    """

    image: Tensor
    labels: Tensor
    layout: LabelLayout | None = None
    instances: Tensor | None = None
    noise_seed: int = 0
    first: int = 0
    drawn: int | None = None
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

    def noise(self, like: Tensor, draw: int = 0) -> Tensor:
        """N(0, 1) of the shape of ``like`` (N, ...); ``draw`` numbers the draws of a step."""
        generator = torch.Generator().manual_seed(derived_seed(self.noise_seed, draw))
        shape = (self.drawn or len(self), *like.shape[1:])
        drawn = torch.randn(shape, generator=generator)
        return drawn[self.first : self.first + len(self)].to(like)


class Order(Sampler[list[Draw]]):
    """Endless micro-batches of one process: every epoch a new permutation, its rest dropped.

    Args:
        length: of the data set.
        batch: images of a step over all processes and micro-batches.
        accumulate: micro-batches of a step.
        seed: of the permutations.
        start: the step to begin with.
        processes: whose share it is.
    """

    def __init__(self, length: int, batch: int, accumulate: int, seed: int, start: int,
                 processes: Processes) -> None:
        self.length, self.batch, self.accumulate = length, batch, accumulate
        self.seed, self.start, self.processes = seed, start, processes

    def __iter__(self) -> Iterator[list[Draw]]:
        steps, micro = self.length // self.batch, self.batch // self.accumulate
        own = micro // self.processes.count
        first = self.processes.rank * own
        epoch, skipped = divmod(self.start, steps)
        while True:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
            for begin in range(skipped * self.batch + first, steps * self.batch, micro):
                yield [Draw(index, epoch) for index in order[begin : begin + own]]
            epoch, skipped = epoch + 1, 0


class _Told(Dataset[Any]):
    """A data set whose errors travel as values: a worker's own come with its whole traceback."""

    def __init__(self, source: SceneDataset) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: int | Draw) -> Sample | Exception:
        try:
            return self._source[key]
        except (ValueError, OSError) as error:
            return error


class _CollateTold:
    def __init__(self, preset: Preset) -> None:
        self._collate = Collate(preset)

    def __call__(self, samples: Sequence[Any]) -> Batch | Exception:
        for sample in samples:
            if isinstance(sample, Exception):
                return sample
        try:
            return self._collate(samples)
        except ValueError as error:
            return error


class Batches:
    """The micro-batches of all steps from ``start`` on; layouts are compiled by the workers.

    Raises:
        ValueError: fewer pictures than a step needs, or a batch that cannot be shared equally.
    """

    def __init__(self, dataset: SceneDataset, config: TrainConfig, processes: Processes,
                 device: torch.device, start: int = 0) -> None:
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
        self.steps_per_epoch = len(dataset) // batch
        self._accumulate, self._micro, self._own = accumulate, batch // accumulate, batch // parts
        self._seed, self._step = config.seed, start
        self._first, self._device = processes.rank * self._own, device
        workers = config.data.workers
        self._loader = DataLoader(
            _Told(dataset),
            batch_sampler=Order(len(dataset), batch, accumulate, config.seed, start, processes),
            collate_fn=_CollateTold(config.network), num_workers=workers,
            persistent_workers=workers > 0, pin_memory=device.type == "cuda",
        )
        self._iterator: Iterator[Batch | Exception] | None = None

    def _next(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            made = next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError("data.workers: a worker ended unexpectedly, killed for memory "
                             "perhaps; take fewer, or 0") from error
        if isinstance(made, Exception):
            raise made
        return made

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
