"""Conditional norms of other people's models, found by what they compute."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..layout.label_layout import LabelLayout
from ..modules.spade import CGNorm
from ..runtime.path import requested_path
from .graph import FEATURES, MAP, Graph, Step, Unclear, record
from .match import PATTERN, Form, Mismatch, match
from .probe import SEED, CannotRun, Trial, agreeing, at_scales, detached_copy, probe_size
from .served import ForeignNorm
from .swap import PLAN, Change, Fused, FusionPlan, arguments_of, is_small, serves
from .watch import original_type

_COUNTING = (nn.BatchNorm2d, nn.SyncBatchNorm)  # whose several processes are known, too
_NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_NORM_FUNCTIONS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "var",
                   "std", "var_mean", "std_mean", "rsqrt", "normalize"}
# Multiply-adds of a norm's convs below which a fused call is not faster on the CPU. Measured on one
# thread, the map numbered in the call: 64 channels at 8x8 (12 million) 0.5x, at 16x16 (47) 1x, 256
# channels at 16x16 (161) 1.1x, 64 channels at 32x32 (189) 1.7x.
SMALL = 50e6
# Values of features below which a norm whose convs run as they were written is not faster there: it
# saves a few passes over the features. Measured on one thread, 64 channels beside 5x5 convs: 0.83x
# to 0.92x at 32x32, 1.03x at 128x128, in training 0.9x and 1.02x.
SMALL_WITHOUT_TABLES = 2**20
_MOST_PARTS = 40  # of a module that can still be one norm
_MOST_SHAPES = 24  # of inputs that are tried on one


@dataclass(frozen=True)
class NormPlan(FusionPlan):
    """What a norm computes; ``channels``: of the features, ``labels``: of the map that was probed.

    ``counts``: whether the norm advances ``num_batches_tracked``; ``swapped``: whether its forward
    takes the map first.
    """

    form: Form
    channels: int
    labels: int
    counts: bool
    swapped: bool = False


class FusedNorm(Fused):
    """``norm(x, segmap)`` through window tables or dense convs, and one pass over x."""

    def _smis_small(self, *inputs: Any) -> bool:
        plan: NormPlan = vars(self)[PLAN]
        x, segmap = inputs[::-1] if plan.swapped else inputs
        if not isinstance(segmap, Tensor) or not isinstance(x, Tensor):
            return False
        if plan.form.no_tables:
            return requested_path() == "auto" and is_small(x, x.numel(), SMALL_WITHOUT_TABLES)
        return is_small_call(x, plan.form.work)

    def _smis_ready(self, *inputs: Any) -> ForeignNorm | str:
        plan: NormPlan = vars(self)[PLAN]
        x, segmap = inputs[::-1] if plan.swapped else inputs
        weight = next(self.parameters())
        if not isinstance(x, Tensor) or not serves(x, weight) or x.shape[1] != plan.channels:
            return "features of another kind"
        form = plan.form
        shape: tuple[int, ...] = tuple(getattr(segmap, "shape", ()))
        if len(shape) != 4 or shape[0] != x.shape[0] or (
                form.label_channels not in (0, shape[1])):
            return "a map of another shape"
        if not form.resized and shape[2:] != x.shape[2:]:
            return "a map of another size"
        view = ForeignNorm(self, form, plan.counts, plan.channels, shape[1])
        if isinstance(segmap, LabelLayout):
            return view
        if not isinstance(segmap, Tensor) or not serves(segmap, weight):
            return "a map of another kind"
        return _parallel_problem(self, view.norm) or view

    def _smis_run(self, ready: ForeignNorm, *inputs: Any) -> Tensor:
        plan: NormPlan = vars(self)[PLAN]
        return ready.forward(*(inputs[::-1] if plan.swapped else inputs))


def is_small_call(x: Any, work: float) -> bool:
    """Whether convs of so many multiply-adds a pixel are too few for a fused form to be faster."""
    if not isinstance(x, Tensor) or x.dim() != 4 or requested_path() != "auto":
        return False
    n, _, height, width = x.shape
    return is_small(x, work * n * height * width, SMALL)


def _parallel_problem(owner: nn.Module, norm: nn.Module | None) -> str | None:
    """Why statistics over several processes are left to the foreign norm."""
    if norm is None or not norm.training or not isinstance(norm, _BatchNorm) or (
            type(norm) is nn.BatchNorm2d):
        return None
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if type(norm) is nn.SyncBatchNorm:
        known = norm.process_group in (None, dist.group.WORLD) if several else True
        return None if known else "its norm has a process group of its own"
    if several or getattr(owner, "_is_replica", False):
        return f"{type(norm).__name__} may reduce over processes"
    return None


def is_norm_layer(module: nn.Module) -> bool:
    """Whether it is one of torch's normalisations."""
    return isinstance(module, _NORM_LAYERS)


def may_be_norm(module: nn.Module) -> bool:
    """Whether it takes features and a map, as far as its signature shows, and is small enough."""
    if is_norm_layer(module) or next(module.parameters(), None) is None:
        return False
    if sum(1 for _ in module.modules()) > _MOST_PARTS:
        return False
    return isinstance(module, CGNorm) or arguments_of(module, 2) is not None


def takes_more(module: nn.Module) -> int:
    """How many arguments a module takes that has a norm and a conv among its own parts; else 0."""
    if original_type(module).forward is nn.Module.forward:
        return 0
    parts = list(module.modules())
    fits = len(parts) <= _MOST_PARTS and any(map(is_norm_layer, module.children())) and any(
        isinstance(part, (nn.Conv2d, nn.Conv3d)) for part in parts)
    kinds = inspect.Parameter
    needed = [p for p in list(inspect.signature(
        original_type(module).forward).parameters.values())[1:]
        if p.default is kinds.empty and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    return len(needed) if fits and len(needed) > 2 else 0


def _unique(values: Iterator[int]) -> list[int]:
    return list(dict.fromkeys(v for v in values if v > 0))


def _shapes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Channels that features and map may have, likeliest first."""
    parts = list(module.modules())

    def features() -> Iterator[int]:
        for part in parts:
            for name in ("num_features", "num_channels"):
                if is_norm_layer(part) and isinstance(getattr(part, name, None), int):
                    yield getattr(part, name)
            if isinstance(part, nn.LayerNorm):
                yield part.normalized_shape[-1]
        for part in reversed(parts):
            if isinstance(part, nn.Conv2d):
                yield part.out_channels
                yield part.out_channels // 2
        for p in module.parameters():
            if p.dim():
                yield p.shape[-1]
            if p.dim() > 1:
                yield p.shape[0]

    def maps() -> Iterator[int]:
        for part in parts:
            if isinstance(part, nn.Conv2d):
                yield part.in_channels
            if isinstance(part, nn.Embedding):
                yield part.num_embeddings
        for p in module.parameters():
            if p.dim() > 1:
                yield p.shape[0]
                yield p.shape[1]

    yield from islice(product(_unique(features()), _unique(maps())), _MOST_SHAPES)


def inputs_of(weight: Tensor, channels: int, labels: int, size: tuple[int, int],
              scale: int) -> tuple[Tensor, Tensor]:
    """Features of two images with outliers, and a one-hot map of another size with ``scale`` 2."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((2, channels, *size), generator=generator, device="cpu")
    height, width = (s * scale + scale - 1 for s in size)
    classes = torch.randint(labels, (2, height, width), generator=generator, device="cpu")
    planes = F.one_hot(classes, labels).permute(0, 3, 1, 2).contiguous()
    return (x * x.square().exp().clamp(max=50)).to(weight), planes.to(weight)


def probe_inputs(plan: NormPlan, like: Tensor, size: tuple[int, int],
                 scale: int) -> tuple[Tensor, Tensor]:
    """:func:`inputs_of` for a norm; a map of the features' size where it takes no other."""
    return inputs_of(like, plan.channels, plan.labels, size, scale if plan.form.resized else 1)


@dataclass(frozen=True)
class _Recorded:
    graph: Graph
    swapped: bool
    channels: int
    labels: int
    map_size: tuple[int, int]


def _recorded(twin: nn.Module) -> Iterator[_Recorded]:
    """What the twin computes, by each order of arguments in which it can be run.

    Raises:
        CannotRun: in one of the orders it runs on nothing that was tried.
    """
    weight, size, problems = next(twin.parameters()), probe_size(twin), []
    for swapped in (False, True):
        problem = ""
        for (channels, labels), scale in product(_shapes(twin), (2, 1)):
            inputs = inputs_of(weight, channels, labels, size, scale)
            order = inputs[::-1] if swapped else inputs
            graphs = []
            try:
                for training in (False, True):
                    twin.train(training)
                    graphs.append(record(twin, *inputs, order))
            except Unclear as error:
                problem = str(error)
                continue
            except Exception as error:
                text = str(error).strip().partition("\n")[0]
                problem = problem or f"{type(error).__name__}: {text}"
                continue
            if graphs[0] != graphs[1]:
                raise Mismatch("in training it computes something else than in eval mode")
            height, width = inputs[1].shape[2:]
            yield _Recorded(graphs[0], swapped, channels, labels, (height, width))
            break
        else:
            problems.append(problem)
    if problems:
        raise CannotRun(problems[0])


def normalises(graph: Graph, module: nn.Module) -> bool:
    """Whether features are normalised on the way to the output."""
    reads: list[set[int]] = []
    for i, step in enumerate(graph.steps):
        reads.append({i} if i in (FEATURES, MAP) else set().union(
            *(reads[j] for j in step.inputs)))
        if FEATURES in reads[i] and _is_norm_step(step, module):
            return True
    return False


def _is_norm_step(step: Step, module: nn.Module) -> bool:
    if step.op == "module":
        return is_norm_layer(module.get_submodule(step.settings))
    return step.op in _NORM_FUNCTIONS


def _plans(module: nn.Module, arguments: tuple[str, ...]) -> list[NormPlan]:
    """What the norm may be, likeliest first.

    Raises:
        Mismatch, CannotRun: it is none; the message says why.
    """
    twin, why = detached_copy(module, keep=(module,)), None
    try:
        for found in _recorded(twin):
            try:
                form = match(found.graph, module, probe_size(twin), found.map_size,
                             found.labels)
            except Mismatch as error:
                listed = normalises(found.graph, module)
                why = why or (error if listed else None)
                continue
            norm = module.get_submodule(form.norm) if form.norm else None
            known = not isinstance(norm, _BatchNorm) or type(norm) in _COUNTING
            return [NormPlan(arguments, form, found.channels, found.labels, counts, found.swapped)
                    for counts in ((True,) if known else (False, True))]
    except CannotRun:
        if why is None:
            raise
    if why is not None:
        raise Mismatch(f"nearest is {PATTERN}, but {why}")
    return []


def of_another_size(x: Tensor) -> Tensor:
    """One image, twice as high and three times as wide."""
    wide = torch.cat([x, x.flip(3), x.roll(1, 3)], 3)[:1]
    return torch.cat([wide, wide.flip(2)], 2)


def maps_of_other_sizes(x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """A map smaller than the features, and one of their size: some forwards tell them apart."""
    h, w = x.shape[2:]
    return planes[:, :, : h // 2, : w // 2].contiguous(), planes[:, :, :h, :w].contiguous()


def _trials(x: Tensor, planes: Tensor, form: Form) -> list[Trial]:
    soft = planes + 0.3 * torch.rand_like(planes)  # whose vectors do not repeat
    first, second = ("dense", "dense") if form.no_tables else ("two_level", "one_level")
    other = (of_another_size(x), of_another_size(planes))
    sizes = [Trial((x, m), False, parameters=False, path=second)
             for m in (maps_of_other_sizes(x, planes) if form.resized else ())]
    return [Trial((x, planes), True, path=first),
            Trial((x, planes), True, path="dense"),
            Trial((x, planes), False, parameters=False, path=second),
            Trial((x, soft), False, differentiable=(0, 1), parameters=False),
            Trial(other, True, path=first),
            *sizes, *at_scales((x, planes))]


Reading = list[NormPlan] | str | None  # what a norm may be, likeliest first; or why it is none


def read(module: nn.Module) -> Reading:
    """What a module computes, if it is a norm; a string: why it is none; None: nothing like one."""
    if isinstance(module, CGNorm):
        return "it is fused already"
    arguments = arguments_of(module, 2)
    assert arguments is not None
    listed = any(is_norm_layer(part) for part in module.modules())
    if any(isinstance(part, nn.Conv3d) for part in module.modules()):
        return "it is three-dimensional: the kernels take (N, C, H, W)" if listed else None
    try:
        return _plans(module, arguments) or None
    except Mismatch as error:
        return str(error)
    except CannotRun as error:
        return f"the probe cannot run it: {error}" if listed else None


def judge(module: nn.Module, plans: list[NormPlan]) -> tuple[int | None, str]:
    """Which of the plans a norm agrees with; else why it does not with the first."""
    twin = detached_copy(module)
    x, planes = probe_inputs(plans[0], next(twin.parameters()), probe_size(twin), 2)
    trials = _trials(x, planes, plans[0].form)
    if plans[0].swapped:
        trials = [t.swapped() for t in trials]
    return agreeing(twin, trials, [[Change(twin, FusedNorm, p)] for p in plans])
