"""What is measured: a case, its inputs, and the providers that compute it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smis_kernels.testing import max_error

from ..data.scenes import sample_scene
from ..io import images
from ..io.names import INSTANCES, map_files, match
from ..networks.semantics import UNKNOWN

Inputs = tuple[Any, ...]
Run = Callable[..., Any]
DIRECTIONS = ("forward", "backward", "step")
DATA_SETS = ("coco", "cityscapes")
COCO_CLASSES = 183
_TINY = 16
_MOST = 16


class Maps:
    """Label and instance maps for the cases: a folder of real ones, or the sample scenes.

    Args:
        folder: with label PNGs, or with ``label/`` and (optionally) ``inst/`` inside, or with one
            such folder for each data set, ``coco`` and ``cityscapes``. Classes
            beyond a case's number are taken modulo it: only the layout matters to speed. Of more
            than 16 maps the first 16 are taken: the inputs of each stay in memory.

    ``left_out`` tells how many maps are not taken.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self.left_out = 0
        self._files: list[Path] = []
        self._ids: list[Path] = []
        if folder is not None:
            root = Path(folder)
            nested = root / "label"
            place = nested if nested.is_dir() else root
            if any((root / name / "label").is_dir() for name in DATA_SETS):
                return  # maps come from `named`
            if not place.is_dir():
                raise FileNotFoundError(f"maps: {folder} is no folder of label PNGs")
            found = map_files("maps", place)
            scenes = dict(list(found.items())[:_MOST])
            self.left_out = len(found) - len(scenes)
            self._files = list(scenes.values())
            ids = root / "inst"
            self._ids = match("maps", list(scenes), map_files("maps", ids, INSTANCES)
                              ) if place == nested and ids.is_dir() else self._files

    def named(self, name: str) -> Maps:
        """The maps of one data set, where the folder holds one folder for each."""
        if self.folder is not None and (Path(self.folder) / name).is_dir():
            return Maps(Path(self.folder) / name)
        return self

    @property
    def count(self) -> int:
        """How many maps there are; of the endless sample scenes, four."""
        return len(self._files) or 4

    def labels(self, kind: str, size: tuple[int, int], num_classes: int,
               index: int = 0) -> NDArray[np.int64]:
        """(H, W) labels; ``kind`` chooses among the sample scenes only."""
        if not self._files:
            return sample_scene(kind, *size, num_classes, seed=index).labels.astype(np.int64)
        path = self._files[index % len(self._files)]
        return images.read_labels(path, 1 << 16, size) % num_classes

    def instances(self, kind: str, size: tuple[int, int], index: int = 0) -> NDArray[np.int64]:
        """(H, W) instance ids."""
        if not self._files:
            return sample_scene(kind, *size, 35, seed=index).instances.astype(np.int64)
        return images.read_instances(self._ids[index % len(self._ids)], size)


@dataclass(frozen=True)
class Setting:
    """Where and on what a case is measured."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    maps: Maps = field(default_factory=Maps)
    compiled: bool = True
    """Measure the torch.compile providers too."""
    index: int = 0
    """Which map."""
    seconds: float | None = None
    """Measuring time in place of a case's own."""
    tiny: bool = False
    """A rehearsal: every size at its smallest, so that figures mean nothing."""

    def at(self, index: int) -> Setting:
        """The same with another map."""
        return replace(self, index=index)

    def shape(self, *full: int) -> tuple[int, ...]:
        """``full``; on a rehearsal no dimension is larger than 16."""
        return tuple(min(n, _TINY) for n in full) if self.tiny else full

    def pick(self, full: Any, tiny: Any) -> Any:
        """``full``, or ``tiny`` on a rehearsal."""
        return tiny if self.tiny else full

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers in ``dtype``, drawn on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

    def labels(self, kind: str, size: tuple[int, ...], classes: int, batch: int = 1) -> Tensor:
        """(N, H, W): real classes where there are as many, else their ranks modulo the number."""
        height, width = size
        real, found = self.maps.folder is not None, []
        for i in range(batch):
            raw = self.maps.labels(kind, (height, width), 1 << 16 if real else classes,
                                   self.index + i)
            if classes == COCO_CLASSES:
                raw[raw == UNKNOWN] = COCO_CLASSES - 1
            if raw.max() >= classes:
                raw = np.unique(raw, return_inverse=True)[1].reshape(raw.shape) % classes
            found.append(torch.from_numpy(raw))
        return torch.stack(found).to(self.device)

    def instances(self, kind: str, size: tuple[int, ...], batch: int = 1) -> Tensor:
        """(N, H, W) instance ids."""
        height, width = size
        found = [torch.from_numpy(self.maps.instances(kind, (height, width), self.index + i))
                 for i in range(batch)]
        return torch.stack(found).to(self.device)


def unchanged(inputs: Inputs) -> Inputs:
    """Inputs as the case makes them."""
    return inputs


def convert(inputs: Inputs, **to: Any) -> Inputs:
    """``x.to(**to)`` for every floating tensor (4-D ones for a memory format) and module."""

    def one(x: Any) -> Any:
        if isinstance(x, nn.Module):
            return copy.deepcopy(x).to(**to)
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.to(**to) if x.dim() == 4 or "memory_format" not in to else x
        return x

    return tuple(one(x) for x in inputs)


channels_last = partial(convert, memory_format=torch.channels_last)
"""The inputs in channels-last memory."""
contiguous = partial(convert, memory_format=torch.contiguous_format)
"""The inputs, weights of modules included, as published code holds them."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: ``run(*prepare(inputs))``.

    Attributes:
        name: one of ``records.PROVIDERS``; further forms of ours begin with "fused".
        run: the computation.
        prepare: the form in which it gets the case's inputs.
        compile: by torch.compile; where that fails, the others are measured all the same.
        dtype: of the inputs in place of the setting's. The first provider of a dtype is the
            yardstick of the others' errors.
        moved: bytes in place of the case's, for a form that has less to read.
        graph: on CUDA, replay it from a graph where the case can be captured.
        judged: its error must be within the case's bound.
    """

    name: str
    run: Run
    prepare: Callable[[Inputs], Inputs] = unchanged
    compile: bool = False
    dtype: torch.dtype | None = None
    moved: Callable[[Inputs, Any], int] | None = None
    graph: bool = True
    judged: bool = True

    @property
    def ours(self) -> bool:
        """Whether our kernels compute it."""
        return self.name.startswith("fused")


def providers(reference: Run, fused: Run, *, prepare: Callable[[Inputs], Inputs] = unchanged,
              loops: bool = False) -> tuple[Provider, ...]:
    """The reference as it is, at its best twice, and ours.

    Args:
        reference: the definition that the tests check.
        fused: ours.
        prepare: the layout in which ``reference``, ``compiled`` and ``fused`` get the inputs.
        loops: the reference loops over values, so that torch.compile has nothing to fuse and no
            CUDA graph can be captured.
    """
    compiled = () if loops else (Provider("compiled", reference, prepare, compile=True),)
    return (Provider("reference", reference, prepare, graph=not loops),
            Provider("channels_last", reference, channels_last, graph=not loops),
            *compiled, Provider("fused", fused, prepare))


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists, depth first."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)


def nbytes(*values: Any) -> int:
    """Bytes of all tensors in ``values``."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


def read_and_written(inputs: Inputs, outputs: Any) -> int:
    """The floor of a streaming op: every input read once, every output written once."""
    return nbytes(inputs, outputs)


class Remaining(NamedTuple):
    """The work that remains: the bound is its time at the rates of the run, on the first map."""

    macs: int
    bytes: int
    """Read and written by passes over the features."""
    largest: int
    """Bytes of the largest features: the copy whose bandwidth counts is of that size."""


@dataclass(frozen=True)
class Case:
    """One measured computation.

    Attributes:
        name: "<op or model>/<case>".
        make_inputs: the arguments of the providers; floating ones in ``setting.dtype``.
        providers: in the order reference, channels_last, compiled, fused, further forms.
        direction: "forward", "backward" or "step" (both), over the inputs in ``leaves``.
        leaves: positions of the inputs that get gradients.
        moved: bytes that any implementation must read and write, from inputs and outputs.
        macs: multiply-accumulates of the definition, given the inputs.
        memory_bound: report the share of the copy bandwidth.
        targets: what must be reached, as :func:`.records.checks` reads it.
        factor, floor: error allowed against fp64, in the yardstick's own error and absolute;
            ``floor`` None is ``units`` in the last place.
        error: the measure of an error: of the largest one (the default), or of the mean square
            where chaos makes the largest one a lottery.
        seconds: measuring time to spend.
        graphs: on CUDA, whether the case may be captured in a graph (no synchronisation inside).
        confirm: repeat peak memory as the resident size of fresh processes.
        every_map: ours runs on every map of the setting, the baselines on the first.
        scenes: the data set whose maps are used where the folder holds several.
        windows: V, U and pixels of the map in the inputs.
        bound: the work that remains at the least, from the inputs.
        counts: what the set's own table shows beside time, from the inputs.
        truth: computes what outputs are judged by from the inputs as they are (fp64 would not
            fit); None: the reference on inputs in fp64.
        sample: of the inputs, what the truth is computed of; as many of the outputs are judged.
    """

    name: str
    make_inputs: Callable[[Setting], Inputs]
    providers: tuple[Provider, ...]
    direction: str = "forward"
    leaves: tuple[int, ...] = ()
    moved: Callable[[Inputs, Any], int] = read_and_written
    macs: Callable[[Inputs], int] = lambda inputs: 0
    memory_bound: bool = True
    targets: dict[str, float] = field(default_factory=dict)
    factor: float = 3.0
    floor: float | None = None
    units: float = 4.0
    error: Callable[[Tensor, Tensor], float] = max_error
    seconds: float = 4.0
    graphs: bool = True
    confirm: bool = False
    every_map: bool = False
    scenes: str = "coco"
    windows: Callable[[Inputs], tuple[int, int, int]] | None = None
    bound: Callable[[Inputs], Remaining] | None = None
    counts: Callable[[Inputs], dict[str, int]] | None = None
    truth: Run | None = None
    sample: Callable[[Inputs], Inputs] = unchanged

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            expected = ", ".join(DIRECTIONS)
            raise ValueError(f"direction: expected one of {expected}; got {self.direction!r}")

    @property
    def group(self) -> str:
        """"<op or model>/<case>/<direction>"."""
        return f"{self.name}/{self.direction}"
