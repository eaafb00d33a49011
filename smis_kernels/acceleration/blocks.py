"""Blocks of conditional norms, activations and convs, each as one fused forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.spade import CGNorm, modulate_pair
from .convs import FusedConv, as_called, conv_change
from .formats import (
    channels_last,
    gradient_in_format,
    in_format_of,
    network_call,
    planes,
    upsampled_from,
)
from .graph import FEATURES, MAP, Graph, Order, Step, Unclear, is_plain_conv, outline, record
from .match import POINTWISE, POINTWISE_LAYERS, Mismatch, described, resize_of
from .norms import (
    FusedNorm,
    NormPlan,
    inputs_of,
    is_small_call,
    maps_of_other_sizes,
    of_another_size,
)
from .probe import Trial, agreeing, detached_copy, probe_size, unit_outputs
from .sequences import activation_of
from .served import Evaluation
from .swap import PLAN, Change, Fused, FusionPlan, arguments_of
from .watch import hooked, original_type

MOST_NORMS = 3
# Of features alone, and of any size: done as they were recorded.
_FEATURES = POINTWISE | {"item", "number", "tensor", "cat", "chunk", "split", "avg_pool2d",
                         "max_pool2d", "interpolate", "pixel_shuffle"}
_LAYERS = (*POINTWISE_LAYERS, nn.Conv2d, nn.Upsample, nn.AvgPool2d, nn.MaxPool2d, nn.PixelShuffle,
           nn.InstanceNorm2d, nn.BatchNorm2d, nn.GroupNorm)
_RESIZING = ("interpolate", "avg_pool2d", "max_pool2d", "pixel_shuffle")
_RESIZING_LAYERS = (nn.Upsample, nn.AvgPool2d, nn.MaxPool2d, nn.PixelShuffle)
_CALL = FusionPlan(("input", "segmap"))  # of a norm of this library


@dataclass(frozen=True)
class Part:
    """What gives the result of ``step``, and the results that nothing reads after it.

    Attributes:
        norms: one, or two that read the same features, of which the second's result is that of
            ``also`` and has no activation, or that of the conv ``shortcut`` which alone reads it.
        activation, slope: of the first norm.
        conv: one whose result is added to that of ``added``.
        source: what norms and conv read.
    """

    step: int
    drops: tuple[int, ...] = ()
    norms: tuple[str, ...] = ()
    also: int | None = None
    activation: str | None = None
    slope: float = 0.2
    shortcut: str = ""
    conv: str = ""
    added: int = FEATURES
    source: int = FEATURES


@dataclass(frozen=True)
class BlockPlan(FusionPlan):
    """What a block computes, and what of it is done at once.

    Attributes:
        swapped: whether its forward takes the map first.
        parts: in order; steps that others take in have none.
        channels, labels: of the features, and of the map that was probed.
        resized: whether a map of any size may come.
        convs: those on its way.
        work: multiply-adds at one pixel of that foreign norm which has the fewest.
    """

    graph: Graph
    parts: tuple[Part, ...]
    swapped: bool
    channels: int
    labels: int
    resized: bool
    convs: tuple[str, ...]
    work: float

    @property
    def outline(self) -> Any:
        """What two blocks that differ in their widths alone have in common."""
        return outline(self.graph.steps), self.parts, self.swapped, self.resized, self.convs

    @property
    def norms(self) -> list[str]:
        """Names of its norms, in the order of the computation."""
        return [name for part in self.parts for name in part.norms]

    @property
    def folds(self) -> bool:
        """Whether all that reads the features can read those that they are an upsampling of."""
        return self.graph.output != FEATURES and all(
            FEATURES not in _reads(part, self.graph) or part.norms
            or (part.conv and part.source != FEATURES) for part in self.parts)


Reading = list[BlockPlan] | str | None  # what a block may be, or why it is none
Norms = Mapping[str, NormPlan | None]  # inside a block, by name; None: one of this library


def is_own_norm(module: nn.Module) -> bool:
    """Whether it is a norm of this library, whose forward takes an activation."""
    return isinstance(module, CGNorm) and type(module).forward is CGNorm.forward


def _order(norm: nn.Module, plan: NormPlan | None) -> Order:
    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        found = (plan or _CALL).given(original_type(norm), args, kwargs)
        return found[::-1] if found and plan and plan.swapped else found

    return given


def read(block: nn.Module, norms: Norms) -> Reading:
    """What a module computes, if it is a block of two or three norms; None: nothing like one.

    Args:
        norms: all that it holds.
    """
    arguments = arguments_of(block, 2)
    inside = tuple(f"{name}." for name in norms)
    convs = [name for name, part in block.named_modules()
             if isinstance(part, nn.Conv2d) and not f"{name}.".startswith(inside)]
    if arguments is None or len(convs) != len(norms):
        return None
    without = next((name for name, plan in norms.items() if plan and plan.form.no_tables), None)
    if without is not None and all(p.is_cpu for p in block.parameters()):
        return f"{without} has no tables: on a CPU its parts are faster one by one"
    twin = detached_copy(block, keep=(block,))
    order = {name: _order(twin.get_submodule(name), plan) for name, plan in norms.items()}
    try:
        graph, swapped, channels, labels = _recorded(twin, norms, order)
        parts, resized, on_the_way = _parts(graph, block, norms)
    except (Mismatch, Unclear) as error:
        return str(error)
    work = min((plan.form.work for plan in norms.values() if plan), default=float("inf"))
    return [BlockPlan(arguments, graph, parts, swapped, channels, labels, resized, on_the_way,
                      work)]


def _widths(norm: nn.Module, plan: NormPlan | None) -> tuple[int, int]:
    """Channels of a norm's features and map."""
    if plan is not None:
        return plan.channels, plan.labels
    assert isinstance(norm, CGNorm)
    return norm.channels, norm.label_channels


def _recorded(twin: nn.Module, norms: Norms, order: Mapping[str, Order],
              ) -> tuple[Graph, bool, int, int]:
    """The block's forward, whether the map comes first, and the channels of both."""
    weight, size, problem = next(twin.parameters()), probe_size(twin), ""
    widths = dict.fromkeys(_widths(twin.get_submodule(k), p) for k, p in norms.items())
    for swapped in (False, True):
        for channels, labels in widths:
            x, planes = inputs_of(weight, channels, labels, size, _map_scale(norms))
            graphs = []
            try:
                for training in (False, True):
                    twin.train(training)
                    found = record(twin, x, planes, (planes, x) if swapped else (x, planes),
                                   norms=order)
                    graphs.append(found)
            except Unclear:
                raise
            except Exception as error:  # of foreign code, on inputs that may not be its own
                problem = problem or str(error).partition("\n")[0]
                continue
            if graphs[0] != graphs[1]:
                raise Mismatch("in training it computes something else than in eval mode")
            return _with_resizes(graphs[0], size), swapped, channels, labels
    raise Mismatch(f"the probe cannot run it: {problem}")


def _map_scale(norms: Norms) -> int:
    """How many times the features' size the map's is in a probe."""
    return 2 if all(plan is None or plan.form.resized for plan in norms.values()) else 1


def _with_resizes(graph: Graph, size: tuple[int, int]) -> Graph:
    steps = tuple(resize_of(step, size) if step.op == "interpolate" and step.inputs == (MAP,)
                  else step for step in graph.steps)
    return Graph(steps, graph.output)


def _check(graph: Graph, block: nn.Module, norms: Norms) -> bool:
    """Whether all of a block can be done again at any size; returns whether any map serves.

    Raises:
        Mismatch: it cannot; the message names what differs.
    """
    from_map = {MAP} | {i for i, step in enumerate(graph.steps) if step.op == "resize"}
    resized = any(step.op == "resize" for step in graph.steps)
    keeps, uses = True, _uses(graph)
    found = [step.settings for step in graph.steps if step.op == "norm"]
    if sorted(found) != sorted(norms):
        raise Mismatch("not each of its norms runs once in a call")
    for i, step in enumerate(graph.steps):
        if i in (FEATURES, *from_map):
            continue
        if step.op == "norm":
            if step.inputs[0] in from_map or step.inputs[1] not in from_map:
                raise Mismatch(f"{step.settings} does not get the map as it came")
            continue
        if from_map & set(step.inputs):
            raise Mismatch(f"{described(step, block)} of the map")
        module = block.get_submodule(step.settings) if step.op == "module" else None
        if getattr(module, "inplace", False) and uses[step.inputs[0]] > 1:
            raise Mismatch(f"{described(step, block)} writes to what is read elsewhere")
        if not isinstance(module, _LAYERS) if module else step.op not in _FEATURES:
            raise Mismatch(f"{described(step, block)} beside its norms and convs")
        if step.op == "interpolate" and not _by_factor(step):
            raise Mismatch("its features are resized to a size of their own")
        keeps = keeps and step.op not in _RESIZING and not isinstance(module, _RESIZING_LAYERS)
        if isinstance(module, nn.Conv2d):
            k = module.kernel_size[0]
            keeps = keeps and module.stride == (1, 1) and module.padding in (
                "same", (k // 2, k // 2))
    if not keeps and (resized or _map_scale(norms) == 1):
        raise Mismatch("its features change their size, and its norms do not resize the map")
    return resized or _map_scale(norms) == 2


def _uses(graph: Graph) -> Counter[int]:
    """How often the result of each step is read."""
    return Counter([*(j for step in graph.steps for j in step.inputs), graph.output])


def _by_factor(step: Step) -> bool:
    _, args, kwargs = step.settings
    return (len(args) < 2 or args[1] is None) and dict(kwargs).get("size") is None


def _active(step: Step, block: nn.Module) -> dict[str, Any] | None:
    """ReLU or LeakyReLU as arguments of a norm."""
    if step.op == "module":
        return activation_of(block.get_submodule(step.settings))
    if step.op == "relu":
        return {"activation": "relu"}
    if step.op == "leaky_relu" and 0 < step.settings < 1:
        return {"activation": "leaky_relu", "negative_slope": step.settings}
    return None


def _parts(graph: Graph, block: nn.Module, norms: Norms) -> tuple[
        tuple[Part, ...], bool, tuple[str, ...]]:
    """What of a block is done at once; whether any map serves; its convs.

    Raises:
        Mismatch: it is no such block.
    """
    resized = _check(graph, block, norms)
    steps = graph.steps
    uses = _uses(graph)
    reader = {j: i for i, step in enumerate(steps) for j in step.inputs}
    made: dict[int, Part] = {}
    for i, step in enumerate(steps):
        if step.op == "norm":
            next_one = reader[i] if uses[i] == 1 and i in reader else i
            active = None if next_one == i else _active(steps[next_one], block)
            result = i if active is None else next_one
            found = {} if active is None else {
                "activation": active["activation"], "slope": active.get("negative_slope", 0.2)}
            made[i] = Part(result, norms=(step.settings,), source=step.inputs[0], **found)
    taken = {part.step for part in made.values()}
    for i, step in enumerate(steps):
        plain = step.op == "add" and step.settings is None  # not torch.add(..., alpha=...)
        if plain and (conv := _last_conv(steps, step, uses, block)) is not None:
            other = next(j for j in step.inputs if j != conv)
            made[i] = Part(i, conv=steps[conv].settings, added=other, source=steps[conv].inputs[0])
            taken.add(conv)
    first = {MAP, FEATURES}
    for i in range(len(steps)):
        if i not in made and i not in taken and i not in first:
            made[i] = Part(i)
    parts = _shortened(_paired([made[i] for i in sorted(made)]), graph, uses, block)
    convs = tuple(step.settings for step in steps if step.op == "module" and is_plain_conv(
        block.get_submodule(step.settings)))
    return tuple(_dropping(parts, graph)), resized, convs


def _last_conv(steps: tuple[Step, ...], step: Step, uses: Counter[int],
               block: nn.Module) -> int | None:
    """The last 3x3 conv among what is added up, where nothing else reads its result."""
    convs = [j for j in step.inputs if uses[j] == 1 and steps[j].op == "module"
             and is_plain_conv(conv := block.get_submodule(steps[j].settings))
             and getattr(conv, "kernel_size", None) == (3, 3)]
    return max(convs) if convs and len(set(step.inputs)) == 2 else None


def _paired(parts: list[Part]) -> list[Part]:
    """Norms of the same features as one, where one of them at most is activated."""
    for i, a in enumerate(parts):
        for b in parts[i + 1 :]:
            if a.norms and b.norms and a.source == b.source and not (a.activation and b.activation):
                first, second = (b, a) if b.activation else (a, b)
                both = Part(first.step, norms=first.norms + second.norms, also=second.step,
                            activation=first.activation, slope=first.slope, source=a.source)
                return [both if p is a else p for p in parts if p is not b]
    return parts


def _shortened(parts: list[Part], graph: Graph, uses: Counter[int],
               block: nn.Module) -> list[Part]:
    """A pair of norms and the 1x1 conv that alone reads the second as one."""
    for pair in parts:
        if pair.also is None or uses[pair.also] != 1:
            continue
        for part in parts:
            step = graph.steps[part.step]
            if step.op != "module" or step.inputs != (pair.also,) or part.norms or part.conv:
                continue
            conv = block.get_submodule(step.settings)
            if is_plain_conv(conv) and getattr(conv, "kernel_size", None) == (1, 1):
                whole = replace(pair, also=part.step, shortcut=step.settings)
                return [whole if p is pair else p for p in parts if p is not part]
    return parts


def _reads(part: Part, graph: Graph) -> set[int]:
    if part.norms:
        return {part.source}
    if part.conv:
        return {part.source, part.added}
    return set(graph.steps[part.step].inputs)


def _dropping(parts: list[Part], graph: Graph) -> Iterator[Part]:
    """The parts, each with the results that are not read after it."""
    last = {j: i for i, part in enumerate(parts) for j in _reads(part, graph)}
    for i, part in enumerate(parts):
        drops = tuple(j for j, k in last.items() if k == i and j not in (MAP, graph.output))
        yield Part(**{**vars(part), "drops": drops})


def judge(block: nn.Module, plans: list[BlockPlan], norms: Norms) -> tuple[int | None, str]:
    """Which of the plans a block agrees with; else why it does not with the first."""
    convs = [block.get_submodule(name) for name in plans[0].convs]
    twin = detached_copy(block, keep=convs)
    unit_outputs(*(twin.get_submodule(name) for name in plans[0].convs))
    for parameter in twin.parameters():  # weights' gradients have been seen norm by norm
        parameter.requires_grad_(parameter.requires_grad and parameter.dim() == 1)
    plan = plans[0]
    x, planes = inputs_of(next(twin.parameters()), plan.channels, plan.labels, probe_size(twin),
                          2 if plan.resized else 1)
    other = (of_another_size(x), of_another_size(planes))
    trials = [Trial((x, planes), True), Trial((x, planes), False, parameters=False),
              Trial(other, False, differentiable=(), parameters=False)]
    trials += [Trial((x, m), False, differentiable=(), parameters=False)
               for m in (maps_of_other_sizes(x, planes) if plan.resized else ())]
    if plan.folds:
        height, width = (2 * (-(-s // 2)) for s in probe_size(twin))
        x, planes = inputs_of(next(twin.parameters()), plan.channels, plan.labels,
                              (height, width), 2 if plan.resized else 1)
        upsampled = F.interpolate(x[:, :, ::2, ::2], scale_factor=2.0, mode="nearest")
        trials.append(Trial((upsampled, planes), False, differentiable=(), parameters=False))
    if plan.swapped:
        trials = [t.swapped() for t in trials]
    inner = [Change(twin.get_submodule(name), FusedNorm, p) for name, p in norms.items() if p]
    return agreeing(twin, trials, [[*inner, *conv_changes(twin, plan), Change(
        twin, FusedBlock, plan)] for plan in plans])


def conv_changes(block: nn.Module, plan: BlockPlan) -> list[Change]:
    """The convs of a block that are swapped."""
    changes = (conv_change(block.get_submodule(name)) for name in plan.convs)
    return [change for change in changes if change is not None]


class FusedBlock(Fused):
    """Norm and activation in one pass, both norms of the input from one read, channels-last."""

    @staticmethod
    def _smis_besides(module: nn.Module, plan: FusionPlan) -> list[nn.Module]:
        assert isinstance(plan, BlockPlan)
        return [module.get_submodule(name) for name in (*plan.norms, *plan.convs)]

    def _smis_small(self, *inputs: Any) -> bool:
        plan: BlockPlan = vars(self)[PLAN]
        x, segmap = inputs[::-1] if plan.swapped else inputs
        return isinstance(segmap, Tensor) and is_small_call(x, plan.work)

    def _smis_ready(self, *inputs: Any) -> dict[str, CGNorm] | str:
        plan: BlockPlan = vars(self)[PLAN]
        x, segmap = inputs[::-1] if plan.swapped else inputs
        if not isinstance(x, Tensor) or x.dim() != 4:
            return "features of another kind"
        if any(step.op == "resize" for step in plan.graph.steps):
            segmap = _like(segmap, None, x)
        views: dict[str, CGNorm] = {}
        for part in plan.parts:
            for name in part.norms:
                norm = self.get_submodule(name)
                if hooked(norm):
                    return f"{name} has hooks"
                if isinstance(norm, CGNorm) and is_own_norm(norm):
                    views[name] = norm
                    continue
                if not isinstance(norm, FusedNorm):
                    return f"{name} is not fused"
                # Features inside are not there yet; they have x's dtype and batch size.
                like = x if part.source == FEATURES else _like(x, vars(norm)[PLAN].channels, x)
                pair = (segmap, like) if vars(norm)[PLAN].swapped else (like, segmap)
                view = norm._smis_changed() or norm._smis_ready(*pair)
                if isinstance(view, str):
                    return f"{name}: {view}"
                views[name] = view
        return views

    def _smis_run(self, ready: dict[str, CGNorm], *inputs: Tensor) -> Tensor:
        plan: BlockPlan = vars(self)[PLAN]
        x, segmap = inputs[::-1] if plan.swapped else inputs
        with network_call(x):
            half = upsampled_from(x) if plan.folds and all(
                shares_features(ready[name]) for name in plan.norms) else None
            start = channels_last(gradient_in_format(x)) if half is None else half
            steps = _Steps(self, plan.graph, {FEATURES: start, MAP: segmap}, x)
            segmap = next((steps.value(i) for i, step in enumerate(plan.graph.steps)
                           if step.op == "resize"), segmap)
            for part in plan.parts:
                # The caller may write to a leaky ReLU's result, which a fused one's gradient reads.
                late = torch.is_grad_enabled() and part.activation == "leaky_relu" and (
                    part.step == plan.graph.output)
                self._smis_do(replace(part, activation=None) if late else part, steps, ready,
                              segmap, half is not None)
                if late:
                    steps.found[part.step] = F.leaky_relu(steps.found[part.step], part.slope)
                for i in part.drops:
                    steps.found.pop(i, None)
            out = steps.found[plan.graph.output]
        result: Tensor = in_format_of(out, x)
        return result

    def _smis_do(self, part: Part, steps: _Steps, ready: Mapping[str, CGNorm],
                 segmap: Tensor, folded: bool) -> None:
        """Do a part; ``folded``: the features are those that the block's are an upsampling of."""
        found = steps.found
        if part.norms:
            active: dict[str, Any] = {"activation": part.activation, "negative_slope": part.slope}
            upsample = folded and part.source == FEATURES
            x, (first, *rest) = found[part.source], (ready[name] for name in part.norms)
            if not rest:
                found[part.step] = first.forward(x, segmap, upsample=upsample, **active)
                return
            assert part.also is not None
            conv, plain = self.get_submodule(part.shortcut) if part.shortcut else None, None
            if isinstance(conv, nn.Conv2d) and not torch.compiler.is_compiling() and (
                    not hooked(conv, weights=False)):
                plain = as_called(conv)
            found[part.step], second = _both(first, rest[0], x, segmap, active, upsample, plain)
            found[part.also] = second if conv is None or plain is not None else conv(
                _as_written(conv, second))
        elif part.conv:
            conv, h = self.get_submodule(part.conv), found[part.source]
            halved = folded and part.added == FEATURES
            added = steps.features if halved else found[part.added]
            shape = (len(h), conv.out_channels, *h.shape[2:])
            whole = isinstance(added, Tensor) and added.shape == shape and added.dtype == h.dtype
            if whole and isinstance(conv, FusedConv) and not hooked(conv, weights=False):
                found[part.step] = conv(h, found[part.added])
            else:  # a hook is to see what the conv was written to take and to return
                found[part.step] = added + conv(_as_written(conv, h))
        else:
            steps.value(part.step)


class _Steps(Evaluation):
    """The steps of a block; a map of the features' size where it resizes it."""

    def __init__(self, owner: nn.Module, graph: Graph, inputs: Mapping[int, Any],
                 features: Tensor) -> None:
        super().__init__(owner, graph, inputs)
        self.features = features  # as they were given to the block

    def _done(self, i: int, step: Step) -> Any:
        if step.op == "resize":
            return F.interpolate(self.found[MAP], size=self.features.shape[2:], mode="nearest")
        return super()._done(i, step)

    def _module(self, i: int, step: Step) -> Tensor:
        module = self.owner.get_submodule(step.settings)
        out: Tensor = module(_as_written(module, self.value(step.inputs[0])))
        return out


def _as_written(module: nn.Module, x: Tensor) -> Tensor:
    """Features that a part is called with: contiguous where its hooks see them, and may keep them.

    Code that knows nothing of the other format takes views.
    """
    return planes(x) if x.dim() == 4 and hooked(module, weights=False) else x


def _both(norm_0: CGNorm, norm_s: CGNorm, x: Tensor, segmap: Tensor, active: dict[str, Any],
          upsample: bool, conv_s: nn.Conv2d | None) -> tuple[Tensor, Tensor]:
    """Both norms of x, and the conv of the second where one is given."""
    pair = all(map(shares_features, (norm_0, norm_s)))
    if pair and norm_0.shared_arguments() == norm_s.shared_arguments():
        return modulate_pair(norm_0, norm_s, x, segmap, upsample=upsample, conv_s=conv_s, **active)
    second = norm_s.forward(x, segmap, upsample=upsample)
    return (norm_0.forward(x, segmap, upsample=upsample, **active),
            second if conv_s is None else conv_s(second))


def shares_features(norm: CGNorm) -> bool:
    """Whether a norm modulates what it is given, so that it may be given it half as large."""
    return getattr(norm, "shares_features", True)


def _like(tensor: Any, channels: int | None, x: Tensor) -> Any:
    """A stand-in of the features' size, without memory."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 4:
        return tensor
    return tensor.detach().new_empty(1).expand(
        len(tensor), channels or tensor.shape[1], *x.shape[2:])
