"""What is measured: a case, its inputs, and the providers that compute it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.scenes import sample_scene
from ..io import images
from ..io.names import INSTANCES, map_files, match

Inputs = tuple[Any, ...]
DIRECTIONS = ("forward", "backward", "step")


DATA_SETS = ("coco", "cityscapes")


class Maps:
    """Label and instance maps for the cases: a folder of real ones, or the sample scenes.

    Args:
        folder: with label PNGs, or with ``label/`` and (optionally) ``inst/`` inside, or with one
            such folder for each data set, ``coco`` and ``cityscapes``. Classes
            beyond a case's number are taken modulo it: only the layout matters to speed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
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
            scenes = map_files("maps", place)
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

    def at(self, index: int) -> Setting:
        """The same with another map."""
        return replace(self, index=index)


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


def channels_last(inputs: Inputs) -> Inputs:
    """The inputs in channels-last memory."""
    return convert(inputs, memory_format=torch.channels_last)


def contiguous(inputs: Inputs) -> Inputs:
    """The inputs, weights of modules included, as published code holds them."""
    return convert(inputs, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: ``run(*prepare(inputs))``, compiled first where asked."""

    name: str
    run: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] = unchanged
    compile: bool = False


def providers(reference: Callable[..., Any], fused: Callable[..., Any], *,
              prepare: Callable[[Inputs], Inputs] = unchanged,
              compile: bool = True) -> tuple[Provider, ...]:
    """The reference as it is, at its best twice, and ours.

    Args:
        reference: the definition that the tests check.
        fused: ours.
        prepare: the layout in which ``reference``, ``compiled`` and ``fused`` get the inputs.
        compile: False where torch.compile has nothing to fuse (loops over values).
    """
    baselines = (
        Provider("reference", reference, prepare),
        Provider("channels_last", reference, channels_last),
    )
    compiled = (Provider("compiled", reference, prepare, compile=True),) if compile else ()
    return (*baselines, *compiled, Provider("fused", fused, prepare))


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
    """What no implementation can leave out: the bound is its time at the rates of the run."""

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
        providers: in the order reference, channels_last, compiled, fused.
        direction: "forward", "backward" or "step" (both), over the inputs in ``leaves``.
        leaves: positions of the inputs that get gradients.
        moved: bytes that any implementation must read and write, from inputs and outputs.
        macs: multiply-accumulates of the definition, given the inputs.
        memory_bound: report the share of the copy bandwidth.
        targets: what the fused provider must reach: "reference" and "best" (times), "slowest"
            (times, on the slowest map), "copy" (share), "scratch" (share of the output's bytes),
            "memory" (share of the reference's peak).
        factor, floor: error allowed against fp64, in the reference's own error and absolute;
            ``floor`` None is four units in the last place.
        seconds: measuring time to spend on the CPU.
        graphs: on CUDA, whether the case may be captured in a graph (no synchronisation inside).
        confirm: repeat peak memory as the resident size of fresh processes.
        every_map: ours runs on every map of the setting, the baselines on the first.
        scenes: the data set whose maps are used where the folder holds several.
        windows: V, U and pixels of the map in the inputs.
        bound: the work that remains at the least, from the inputs.
        counts: what the set's own table shows beside time, from the inputs.
        single_precision_truth: judge by the reference in its own dtype (fp64 would not fit).
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
    seconds: float = 4.0
    graphs: bool = True
    confirm: bool = False
    every_map: bool = False
    scenes: str = "coco"
    windows: Callable[[Inputs], tuple[int, int, int]] | None = None
    bound: Callable[[Inputs], Remaining] | None = None
    counts: Callable[[Inputs], dict[str, int]] | None = None
    single_precision_truth: bool = False

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            expected = ", ".join(DIRECTIONS)
            raise ValueError(f"direction: expected one of {expected}; got {self.direction!r}")

    @property
    def group(self) -> str:
        """"<op or model>/<case>/<direction>"."""
        return f"{self.name}/{self.direction}"
