"""The mathematics of conditional norms, found in a recorded forward: y = N(x) (1 + G(m)) + B(m)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .graph import (
    FEATURES,
    MAP,
    Graph,
    Ref,
    Step,
    is_plain_conv,
    is_plain_instance_norm,
    outline,
    pruned,
)

PATTERN = "N(x) * (o + G(m)) + B(m)"
# Of each value alone, or of each pixel's channels: the same on rows of a table as on an image.
POINTWISE = {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "elu", "selu", "celu",
              "softplus", "hardtanh", "relu6", "hardswish", "hardsigmoid", "mish", "softsign",
              "abs", "exp", "log", "pow", "square", "sqrt", "rsqrt", "sin", "cos", "clamp",
              "clamp_min", "clamp_max", "reciprocal", "sign", "add", "sub", "mul", "div", "rpow",
              "maximum", "minimum", "addcmul", "where", "gt", "lt", "ge", "le", "eq", "ne", "lerp",
              "long", "int", "logsigmoid", "tanhshrink"}
POINTWISE_LAYERS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.SELU,
                     nn.CELU, nn.Softplus, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid,
                     nn.Mish, nn.PReLU, nn.Identity, nn.Softsign)
_CHANNELS = {"chunk", "split", "cat", "stack", "__getitem__", "argmax", "softmax", "permute",
             "transpose", "movedim", "unsqueeze", "squeeze", "embedding", "einsum", "one_hot",
             "narrow", "unbind", "select"}
# Of whole images; whatever their size.
_IMAGES = {"conv2d", "pad", "instance_norm", "group_norm", "mean", "var", "std", "var_mean",
           "std_mean", "sum", "amax", "amin", "normalize", "layer_norm", "rms_norm", "norm",
           "linear", "matmul", "linalg_vector_norm", "vector_norm", "batch_norm", "expand_as",
           "view_as", "type_as"}
_KNOWN = POINTWISE | _CHANNELS | _IMAGES | {"item", "number", "tensor", "module", "resize",
                                             "features", "map"}


class Mismatch(Exception):
    """A term that the pattern does not have; the message names it."""


@dataclass(frozen=True)
class Conv:
    """A conv's step, and what is fixed of it."""

    step: int
    kernel: int
    groups: int
    channels: int
    source: int  # channels of its input


@dataclass(frozen=True)
class Form:
    """What a norm computes: ``source * (1 + gamma) + beta``, three steps of ``graph``.

    Attributes:
        norm: the part whose statistics the kernels compute, where source is that of the features;
            "" where source is the features, or computed as it was written.
        resized: whether the map is resized to the features, by nearest.
        levels: of each step that tables have, how far it reaches on the map: 0 a pixel, 1 a 3x3
            window, 2 a 5x5 window; -1 for what does not depend on the map.
        no_tables: why there are none; "" where there are.
        convs: those on the way from the map.
        pair: the last convs of gamma and beta, where they read the same and look alike.
        label_channels: of the map; 0 for any number.
        per_image: whether the map's results are normalised over an image.
    """

    graph: Graph
    source: int
    gamma: int
    beta: int
    norm: str
    resized: bool
    levels: tuple[int, ...]
    no_tables: str
    convs: tuple[Conv, ...]
    pair: tuple[int, int] | None
    label_channels: int
    per_image: bool

    @cached_property
    def reach(self) -> int:
        """How far gamma and beta reach on the map."""
        return max(self.levels[self.gamma], self.levels[self.beta], 0)

    @cached_property
    def products(self) -> tuple[int, int]:
        """Multiply-adds at one pixel: of the last convs, and of those before."""
        last = [c for c in self.convs if self.levels[c.step] == self.reach]
        first = [c for c in self.convs if c not in last]
        return tuple(sum(c.channels * c.source // c.groups * c.kernel**2 for c in convs)
                     for convs in (last, first))  # type: ignore[return-value]

    @property
    def work(self) -> float:
        """Multiply-adds at one pixel; all there is to win where there are none."""
        return float(sum(self.products)) or float("inf")

    @cached_property
    def dense_order(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The steps of gamma and beta, each with those that no later one reads."""
        wanted = {self.gamma, self.beta}
        for i in range(len(self.graph.steps) - 1, -1, -1):
            if i in wanted:
                wanted.update(self.graph.steps[i].inputs)
        last = {j: i for i in sorted(wanted) for j in self.graph.steps[i].inputs}
        kept = {self.gamma, self.beta, MAP}
        return tuple((i, tuple(j for j, k in last.items() if k == i and j not in kept))
                     for i in sorted(wanted - {MAP}))

    @property
    def outline(self) -> Any:
        """What two norms that differ in their widths alone have in common."""
        convs = tuple((c.step, c.kernel, c.groups > 1) for c in self.convs)
        return (outline(self.graph.steps), convs, self.levels, self.no_tables, self.pair, self.norm,
                self.resized,
                self.source, self.gamma, self.beta, bool(self.label_channels))

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def described(step: Step, module: nn.Module) -> str:
    """A step in words."""
    if step.op != "module":
        return step.op
    return f"{step.settings} ({type(module.get_submodule(step.settings)).__name__})"


def conv_problem(conv: nn.Conv2d) -> str | None:
    """Why a conv has no tables; None where it has."""
    k = conv.kernel_size[0]
    if conv.kernel_size != (k, k) or k not in (1, 3, 5) or conv.padding not in (
            (k // 2, k // 2), "same"):
        return "does not keep the size, or has an uncommon kernel"
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return "has a stride or is dilated"
    if conv.padding_mode != "zeros" and k > 1:
        return f"pads by {conv.padding_mode}"
    return None


def resize_of(step: Step, size: tuple[int, int]) -> Step:
    """A step that resizes the map to the features, whatever their size.

    Raises:
        Mismatch: it resizes otherwise than by nearest, or not to the features' ``size``.
    """
    _, args, kwargs = step.settings
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor",
             "antialias")
    given = {**dict(zip(names, args, strict=False)), **dict(kwargs)}
    mode, to = given.get("mode", "nearest"), given.get("size")
    if mode != "nearest":
        raise Mismatch(f"the map is resized by {mode}, not by nearest")
    if to is None or tuple((to,) * 2 if isinstance(to, int) else to) != size:
        raise Mismatch("the map is resized to another size than the features'")
    return Step("resize", (MAP,))


class _Matcher:
    """Takes a recorded forward apart; new steps are put at its end."""

    def __init__(self, graph: Graph, module: nn.Module, size: tuple[int, int],
                 map_size: tuple[int, int]) -> None:
        self.steps: list[Step] = list(graph.steps)
        self.module, self.size, self.map_size = module, size, map_size
        self.resized = False
        for i, step in enumerate(self.steps):
            if step.op == "interpolate" and step.inputs == (MAP,):
                self.steps[i], self.resized = resize_of(step, size), True
        self._reads: list[frozenset[int]] = []
        self._affine: dict[int, tuple[int, int, int]] = {}

    def reads(self, i: int) -> frozenset[int]:
        """Which of the two inputs a step depends on."""
        while len(self._reads) <= i:
            j = len(self._reads)
            if j in (FEATURES, MAP):
                self._reads.append(frozenset({j}))
            else:
                self._reads.append(frozenset().union(*(
                    self._reads[k] for k in self.steps[j].inputs)))
        return self._reads[i]

    def _add(self, op: str, inputs: Sequence[int] = (), settings: Any = None) -> int:
        self.steps.append(Step(op, tuple(inputs), settings))
        return len(self.steps) - 1

    def number(self, value: float) -> int:
        return self._add("number", (), value)

    def value(self, i: int) -> float | None:
        """A step's number, if it is one."""
        step = self.steps[i]
        return float(step.settings) if step.op == "number" else None

    def total(self, a: int, b: int) -> int:
        """a + b, numbers added up."""
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None:
            return self.number(x + y)
        if y is not None:
            a, b, x, y = b, a, y, x
        if x is not None:
            if x == 0:
                return b
            step = self.steps[b]
            if step.op == "add":
                for i, j in (step.inputs, step.inputs[::-1]):
                    inner = self.value(i)
                    if inner is not None:
                        return self.total(self.number(x + inner), j)
        return self._add("add", (a, b))

    def product(self, a: int, b: int) -> int:
        """a b, ones left out."""
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None:
            return self.number(x * y)
        for number, other in ((x, b), (y, a)):
            if number == 1:
                return other
            if number == 0:
                return self.number(0)
        return self._add("mul", (a, b))

    def affine(self, i: int) -> tuple[int, int, int]:
        """A step as ``source * scale + shift``: scale and shift do not depend on the features."""
        if i not in self._affine:
            self._affine[i] = self._taken_apart(i)
        return self._affine[i]

    def _taken_apart(self, i: int) -> tuple[int, int, int]:
        step = self.steps[i]
        if MAP not in self.reads(i):
            return i, self.number(1), self.number(0)
        features = [FEATURES in self.reads(j) for j in step.inputs]
        if step.op in ("add", "sub"):
            (a, b), sign = step.inputs, self.number(1 if step.op == "add" else -1)
            if all(features):
                (x, p, q), (y, r, s) = self.affine(a), self.affine(b)
                if x != y:
                    raise Mismatch("it adds features that are normalised in two ways")
                return (x, self.total(p, self.product(sign, r)),
                        self.total(q, self.product(sign, s)))
            if features[0]:
                x, p, q = self.affine(a)
                return x, p, self.total(q, self.product(sign, b))
            x, p, q = self.affine(b)
            return x, self.product(sign, p), self.total(a, self.product(sign, q))
        if step.op == "mul" and not all(features):
            a, b = step.inputs if features[0] else step.inputs[::-1]
            x, p, q = self.affine(a)
            return x, self.product(p, b), self.product(q, b)
        if step.op == "div" and features == [True, False]:
            inverse = self._add("div", (self.number(1), step.inputs[1]))
            if (known := self.value(step.inputs[1])) is not None:
                inverse = self.number(1 / known) if known else inverse
            x, p, q = self.affine(step.inputs[0])
            return x, self.product(p, inverse), self.product(q, inverse)
        if step.op == "addcmul" and len(step.inputs) == 3 and not step.settings[2]:
            shift, a, b = step.inputs
            return self.affine(self._add("add", (shift, self._add("mul", (a, b)))))
        if step.op == "detach":
            raise Mismatch("detach stops a gradient")
        raise Mismatch(f"{described(step, self.module)} of features that the map has modulated")

    def check(self, output: int, what: str) -> None:
        """Whether the steps that an output depends on can be done again at any size."""
        for i in self.below(output):
            step = self.steps[i]
            if step.op == "interpolate":
                raise Mismatch(f"{what} is resized")
            constant = not self.reads(i)
            sizes = step.op in ("view", "reshape", "expand", "repeat", "flatten") and constant
            if step.op not in _KNOWN and not sizes:
                why = "stops a gradient" if step.op == "detach" else "is not known to be safe"
                raise Mismatch(f"{what}: {step.op} {why}")
            if step.op == "__getitem__" and not constant and not self._picks_rows(step) and (
                    not _slices_channels(step)):
                raise Mismatch(f"{what} is cut to another size")
            if step.op == "batch_norm" or (step.op == "module" and isinstance(
                    self.module.get_submodule(step.settings), (
                        nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Upsample))):
                raise Mismatch(f"{what}: {described(step, self.module)}")

    def _picks_rows(self, step: Step) -> bool:
        """Whether it is an index of each pixel into what does not depend on the inputs."""
        table, index = step.settings[1]
        return isinstance(table, Ref) and isinstance(index, Ref) and not self.reads(table.step)

    def below(self, output: int) -> list[int]:
        """The steps that one depends on, and itself, in order."""
        wanted = {output}
        for i in range(output, -1, -1):
            if i in wanted:
                wanted.update(self.steps[i].inputs)
        return sorted(wanted)


def _slices_channels(step: Step) -> bool:
    """Whether an index leaves all but the first two dimensions whole."""
    index = step.settings[1][1]
    entries = index if isinstance(index, tuple) and index[:1] != ("slice",) else (index,)
    whole = ("slice", None, None, None)
    return all(e in (whole, None, Ellipsis) for e in entries[2:]) and not any(
        isinstance(e, Ref) for e in entries) and entries[0] == whole


def match(graph: Graph, module: nn.Module, size: tuple[int, int], map_size: tuple[int, int],
          label_channels: int) -> Form:
    """What the recorded forward of a norm computes.

    Args:
        size, map_size: (H, W) of the features and the map that it was recorded with.

    Raises:
        Mismatch: it is no such norm; the message names the term that differs.
    """
    m = _Matcher(graph, module, size, map_size)
    reads = m.reads(graph.output)
    if reads != {FEATURES, MAP}:
        raise Mismatch("its result does not depend on both the features and the map")
    source, scale, shift = m.affine(graph.output)
    gamma = m.total(scale, m.number(-1))
    m.check(source, "the features")
    m.check(gamma, "gamma")
    m.check(shift, "beta")
    uses_raw = any(MAP in m.steps[i].inputs and m.steps[i].op != "resize"
                   for end in (gamma, shift) for i in m.below(end))
    if m.resized and uses_raw:
        raise Mismatch("the map is used at two sizes")
    if not m.resized and map_size != size and uses_raw:
        raise Mismatch("the map has another size than the features")
    first = m.steps[source]
    norm = ""
    if first.op == "module" and first.inputs == (FEATURES,) and serves_statistics(
            module.get_submodule(first.settings)):
        norm = first.settings
    # One graph of the three, with the last steps kept.
    joint = m._add("item", (source, gamma, shift))
    kept = pruned(m.steps, joint)
    source, gamma, shift = kept.steps[kept.output].inputs
    kept = Graph(kept.steps[:-1], source)
    levels, why, convs, per_image = _levels(kept, module)
    return Form(kept, source, gamma, shift, norm, m.resized, levels, why, convs,
                _pair(kept, module, convs, gamma, shift),
                _label_channels(kept, convs, label_channels), per_image)


def serves_statistics(norm: nn.Module) -> bool:
    """Whether the kernels compute the statistics of a norm layer."""
    if isinstance(norm, _BatchNorm):
        return norm.momentum is not None
    if isinstance(norm, _InstanceNorm):
        return is_plain_instance_norm(norm) and not norm.track_running_stats
    return type(norm) is nn.GroupNorm


def _label_channels(graph: Graph, convs: Sequence[Conv], channels: int) -> int:
    """The map's channels where a conv fixes them, else 0."""
    starts = {MAP} | {i for i, step in enumerate(graph.steps) if step.op == "resize"}
    return channels if any(
        starts & set(graph.steps[c.step].inputs) for c in convs) else 0


def _levels(graph: Graph, module: nn.Module,
            ) -> tuple[tuple[int, ...], str, tuple[Conv, ...], bool]:
    """How far each step reaches on the map; why there are no tables; the convs; norms of images."""
    levels: list[int] = []
    per_image: set[int] = set()
    why, convs = "", []
    for i, step in enumerate(graph.steps):
        level = max((levels[j] for j in step.inputs), default=-1)
        images = any(j in per_image for j in step.inputs)
        if i == MAP:
            level = 0
        elif step.op == "module" and level >= 0:
            layer = module.get_submodule(step.settings)
            if is_plain_conv(layer):
                assert isinstance(layer, nn.Conv2d)
                k = layer.kernel_size[0]
                convs.append(Conv(i, k, layer.groups, layer.out_channels, layer.in_channels))
                problem = conv_problem(layer)
                if problem is not None:
                    why = why or f"{step.settings} {problem}"
                if images and k > 1:
                    why = why or f"{step.settings} comes after a norm of the image"
                if k == 5 and level > 0:
                    why = why or f"{step.settings} sees 5x5 windows of windows"
                level += k // 2
            elif isinstance(layer, _InstanceNorm) and serves_statistics(layer):
                images = True
            elif not isinstance(layer, POINTWISE_LAYERS):
                why = why or f"{described(step, module)} has no tables"
        elif level >= 0 and step.op in _IMAGES:
            why = why or f"{step.op} has no tables"
        levels.append(level)
        if images:
            per_image.add(i)
        if level > 2:
            why = why or "windows are larger than 5x5"
    return tuple(levels), why, tuple(convs), bool(per_image)


def _pair(graph: Graph, module: nn.Module, convs: Sequence[Conv], gamma: int,
          beta: int) -> tuple[int, int] | None:
    """The convs that gamma and beta end in, where both read the same result and look alike."""
    ends = []
    for end in (gamma, beta):
        while graph.steps[end].op != "module" or not any(c.step == end for c in convs):
            inputs = [j for j in graph.steps[end].inputs if graph.steps[j].op not in (
                "number", "tensor")]
            if len(inputs) != 1 or graph.steps[end].op in ("item", "chunk", "split"):
                return None
            end = inputs[0]
        ends.append(next(c for c in convs if c.step == end))
    a, b = ends
    one, two = (module.get_submodule(graph.steps[c.step].settings) for c in ends)
    assert isinstance(one, nn.Conv2d) and isinstance(two, nn.Conv2d)
    alike = all(getattr(one, name) == getattr(two, name) for name in (
        "kernel_size", "groups", "in_channels", "out_channels", "padding", "stride", "dilation"))
    zeros = one.padding_mode == two.padding_mode == "zeros"
    same = graph.steps[a.step].inputs == graph.steps[b.step].inputs and a.step != b.step
    return (a.step, b.step) if alike and zeros and same and conv_problem(one) is None else None
