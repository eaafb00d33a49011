"""Every op once: a small call of each, and the inputs that test_op_cases.py runs them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import (
    LabelLayout,
    class_boxes,
    class_crops,
    conditional_attention,
    conditional_conv2d,
    instance_avg_pool2d,
    instance_edges,
    instance_mean_table,
    modulation,
    modulation_pair,
    narrow_conv2d,
    norm_act,
    polyphase_conv2d,
    polyphase_conv_transpose2d,
    spatially_varying_conv2d,
    spectral_weight,
    winograd_conv2d,
)
from smis_kernels.modules.label_conv import LabelConv2d
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.indexed_relu.op import indexed_relu
from smis_kernels.ops.indexed_shortcut.op import indexed_shortcut
from smis_kernels.ops.label_windows.op import (
    GroupWindows,
    group_windows,
    number_vectors,
    number_windows,
)
from smis_kernels.ops.level_tables.op import NormConvs, level_tables
from smis_kernels.ops.reformat.op import reformat
from smis_kernels.ops.upsampling_source.op import upsampling_source
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.runtime.tensors import is_channels_last
from smis_kernels.testing import with_memory_format


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fixed numbers of their own for each shape."""
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


X, IDS = draw(2, 4, 6, 5), torch.arange(60).view(2, 6, 5) // 7
INDEX, WINDOWS = (IDS % 3).int(), torch.arange(45, dtype=torch.int32).view(5, 9) % 4
TABLES = draw(4, 6), draw(8, 6, 3, 3), draw(8), draw(8, 6, 3, 3), draw(8)
Call = Callable[..., Any]

PUBLIC: dict[str, Call] = {
    "modulation": lambda **o: modulation(X, X, X, training=True, **o),
    "modulation_pair": lambda **o: modulation_pair(X, X, X, X, X, training=True, **o),
    "norm_act": lambda **o: norm_act(X, X, activation="relu", **o),
    "indexed_modulation": lambda **o: indexed_modulation(X, INDEX, draw(3, 8), **o),
    "indexed_modulation_pair": lambda **o: indexed_modulation_pair(
        X, INDEX, draw(3, 8), draw(3, 8), **o),
    "indexed_shortcut": lambda **o: indexed_shortcut(X, INDEX, draw(3, 8), draw(5, 4, 1, 1), **o),
    "indexed_relu": lambda **o: indexed_relu(X, INDEX, draw(3, 4), 2, **o),
    "conditional_attention": lambda **o: conditional_attention(X, X, **o),
    "conditional_conv2d": lambda **o: conditional_conv2d(X, X, draw(36, 4, 3, 3), **o),
    "spatially_varying_conv2d": lambda **o: spatially_varying_conv2d(X, draw(2, 36, 6, 5), **o),
    "winograd_conv2d": lambda **o: winograd_conv2d(X, draw(6, 4, 3, 3), **o),
    "narrow_conv2d": lambda **o: narrow_conv2d(X, draw(3, 4, 3, 3), **o),
    "polyphase_conv2d": lambda **o: polyphase_conv2d(X, draw(6, 4, 4, 4), **o),
    "polyphase_conv_transpose2d": lambda **o: polyphase_conv_transpose2d(
        X, draw(4, 6, 3, 3), **o),
    "spectral_weight": lambda **o: spectral_weight(draw(5, 4, 3, 3), draw(5), draw(36), **o),
    "window_table": lambda **o: window_table(*TABLES, WINDOWS, **o),
    "window_embedding": lambda **o: window_embedding(*TABLES[:3], WINDOWS, **o),
    "level_tables": lambda **o: level_tables(
        TABLES[0], WINDOWS, WINDOWS % 5, [NormConvs(
            draw(6, 6, 3, 3), draw(6), *TABLES[1:], shared_groups=1, groups=1)], **o),
    "number_vectors": lambda **o: number_vectors(INDEX[:, None].float(), 100, **o),
    "number_windows": lambda **o: number_windows(INDEX + 1, 100, **o),
    "group_windows": lambda **o: group_windows(draw(4, 6), WINDOWS, [(0, 3), (3, 6)], **o),
    "label_conv": lambda **o: LabelConv2d(
        LabelLayout.from_labels(IDS % 4, 4), draw(3, 4, 3, 3), **o).rows(0, 6),
    "class_boxes": lambda **o: class_boxes(X, IDS % 4, 4, **o),
    "class_crops": lambda **o: class_crops(X, IDS % 4, 4, size=4, **o),
    "instance_edges": lambda **o: instance_edges(IDS, **o),
    "instance_avg_pool2d": lambda **o: instance_avg_pool2d(X, IDS, **o),
    "instance_mean_table": lambda **o: instance_mean_table(X, IDS, **o),
}


Shape = tuple[int, int, int, int]  # N, C, H, W of the features; other sizes follow from it
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)


class Random:
    """Draws of one case, the same on every device: normal values in fp64, and integers."""

    def __init__(self, seed: int = 0, device: str | torch.device = "cpu") -> None:
        self._generator, self._device = torch.Generator().manual_seed(seed), device

    def normal(self, *shape: int) -> Tensor:
        """From N(0, 1)."""
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return drawn.to(self._device)

    def below(self, limit: int, *shape: int) -> Tensor:
        """Integers 0..limit-1 in patches of 2x3, as label maps have them."""
        *batch, h, w = shape
        coarse = torch.randint(limit, (*batch, -(-h // 2), -(-w // 3)), generator=self._generator)
        fine = coarse.repeat_interleave(2, -2).repeat_interleave(3, -1)[..., :h, :w]
        return fine.contiguous().to(self._device)


Made = tuple[Call, tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpCase:
    """One op: its call and inputs for any shape.

    Attributes:
        make: ``make(shape, random, **options)``: ``call(*inputs, backend=...)`` and the inputs in
            fp64; those of four dimensions are laid out in memory by the test.
        options: of ``make``, the values of each; the first are the default.
        gpu: the op's GPU kernel, "triton" or "cuda", if it has one.
        dtypes: that it computes in.
        leaves: how many inputs are differentiated, from the first on.
    """

    make: Callable[..., Made]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    gpu: str = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    leaves: int = 99

    def default(self, **changes: Any) -> dict[str, Any]:
        """The first value of each option."""
        return {name: values[0] for name, values in self.options.items()} | changes

    def build(self, shape: Shape, layout: str, dtype: torch.dtype, options: Mapping[str, Any],
              seed: int = 0, device: str | torch.device = "cpu", wide: tuple[int, ...] = ()
              ) -> Made:
        """The call, and inputs of ``dtype`` (those at ``wide`` of fp32 at least) in ``layout``."""
        call, drawn = self.make(shape, Random(seed, device), **options)
        inputs = (t if i in wide and dtype == torch.float64 else
                  t.float() if i in wide else t.to(dtype) for i, t in enumerate(drawn))
        return call, tuple(with_memory_format(t, layout) if t.dim() == 4 else t for t in inputs)


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """What gradients are taken against: normal, the same in every run."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(y.shape, generator=generator).to(y) for y in outputs]


def outputs_of(found: Any) -> list[Tensor]:
    """The tensors that an op returns."""
    return [found] if isinstance(found, Tensor) else list(found)


def results(case: OpCase, call: Call, inputs: tuple[Tensor, ...], backend: str,
            against: list[Tensor] | None = None, laid: Callable[[Tensor], Tensor] = lambda t: t,
            ) -> list[Tensor]:
    """Outputs, then the gradients of the first ``case.leaves`` inputs.

    ``laid`` lays out in memory what they are taken against.
    """
    count = min(case.leaves, len(inputs))
    leaves = [t.detach().requires_grad_(i < count) for i, t in enumerate(inputs)]
    outputs = outputs_of(call(*leaves, backend=backend))
    if count == 0:
        return outputs
    given = [laid(t) for t in (cotangents(outputs) if against is None else against)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves[:count], given)]


def _statistics(shape: Shape, random: Random, norm: str, training: bool) -> dict[str, Any]:
    """Options that give a normalisation its statistics, whatever the shape."""
    n, c, h, w = shape
    if norm == "none":
        return {"norm": "none"}
    if norm == "group":
        groups = 2 if c % 2 == 0 else 1
        return {"norm": norm if c // groups * h * w > 1 else "none", "num_groups": groups}
    if norm == "instance":
        return {"norm": norm if h * w > 1 else "none"}
    if training and n * h * w > 1:
        return {"norm": norm, "training": True}
    return {"norm": norm, "running_mean": random.normal(c),
            "running_var": random.normal(c).square() + 0.5}


def _fitting(x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Running statistics in the dtype that the features' are kept in."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in options.items()}


def _modulation(pair: bool) -> Callable[..., Made]:
    def make(shape: Shape, random: Random, norm: str, training: bool, activation: str | None,
             upsample: bool) -> Made:
        n, c, h, w = shape
        wide = (n, c, 2 * h, 2 * w) if upsample else shape
        options = _statistics(shape, random, norm, training)
        options |= {"activation": activation, "upsample": upsample}
        twice = {f"{k}_s": v + 1 for k, v in options.items() if k.startswith("running")}

        def call(x: Tensor, *rest: Tensor, backend: str) -> Any:
            given = _fitting(x, options | twice if pair else options)
            return (modulation_pair if pair else modulation)(x, *rest, backend=backend, **given)

        return call, (random.normal(*shape) + 1,
                      *(random.normal(*wide) for _ in range(4 if pair else 2)))
    return make


def _indexed(pair: bool) -> Callable[..., Made]:
    def make(shape: Shape, random: Random, norm: str, training: bool, activation: str | None,
             upsample: bool, rows: int) -> Made:
        n, c, h, w = shape
        up = 2 if upsample else 1
        index = random.below(rows, n, up * h, up * w).int()
        options = _statistics(shape, random, norm, training)
        options |= {"activation": activation, "upsample": upsample}
        twice = {f"{k}_s": v + 1 for k, v in options.items() if k.startswith("running")}

        def call(x: Tensor, *tables: Tensor, backend: str) -> Any:
            given = _fitting(x, options | twice if pair else options)
            return (indexed_modulation_pair if pair else indexed_modulation)(
                x, index, *tables, backend=backend, **given)

        return call, (random.normal(*shape) + 1,
                      *(random.normal(rows, 2 * c) for _ in range(2 if pair else 1)))
    return make


def _shortcut(shape: Shape, random: Random, norm: str, training: bool, upsample: bool, rows: int,
              out: int, groups: int) -> Made:
    n, c, h, w = shape
    channels, up = c * groups, 2 if upsample else 1
    index = random.below(rows, n, up * h, up * w).int()
    options = {**_statistics((n, channels, h, w), random, norm, training), "upsample": upsample}

    def call(x: Tensor, table: Tensor, weight: Tensor, backend: str) -> Tensor:
        return indexed_shortcut(x, index, table, weight, groups=groups, backend=backend,
                                **_fitting(x, options))

    return call, (random.normal(n, channels, h, w) + 1, random.normal(rows, 2 * channels),
                  random.normal(out * groups, c, 1, 1) / c**0.5)


def _parts(shape: Shape, random: Random, parts: int, rows: int) -> Made:
    n, c, h, w = shape
    index = random.below(rows, n, h, w).int()

    def call(x: Tensor, table: Tensor, backend: str) -> list[Tensor]:
        return indexed_relu(x, index, table, parts, backend=backend)

    return call, (random.normal(n, parts * c, h, w), random.normal(rows, parts * c))


def _norm_act(shape: Shape, random: Random, norm: str, training: bool, activation: str | None,
              residual: bool) -> Made:
    options = _statistics(shape, random, norm, training) | {"activation": activation}

    def call(x: Tensor, *rest: Tensor, backend: str) -> Any:
        return norm_act(x, *rest, backend=backend, **_fitting(x, options))

    return call, tuple(random.normal(*shape) + 1 for _ in range(1 + residual))


def _attention(shape: Shape, random: Random) -> Made:
    return conditional_attention, (random.normal(*shape), random.normal(*shape))


def _conditional(shape: Shape, random: Random, depth: int, bias: bool) -> Made:
    n, c, h, w = shape
    inputs = (random.normal(*shape), random.normal(n, depth, h, w),
              random.normal(9 * c, depth, 3, 3) / (3 * depth), random.normal(9 * c))
    return conditional_conv2d, inputs[: 4 if bias else 3]


def _varying(shape: Shape, random: Random, each: int, kernel_size: int, stride: int, padding: int,
             dilation: int) -> Made:
    n, groups, h, w = shape
    least = dilation * (kernel_size - 1) + 1
    padding = max(padding, -(-max(0, least - min(h, w)) // 2))
    size = [(s + 2 * padding - least) // stride + 1 for s in (h, w)]
    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding,
               "dilation": dilation}

    def call(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        return spatially_varying_conv2d(x, weight, backend=backend, **options)

    return call, (random.normal(n, groups * each, h, w),
                  random.normal(n, groups * kernel_size**2, *size))


def _winograd(shape: Shape, random: Random, out: int, groups: int, padding: int, bias: bool,
              residual: bool) -> Made:
    n, c, h, w = shape
    h, w = (max(s, 3 - 2 * padding) for s in (h, w))
    extra = [random.normal(out * groups)] * bias
    if residual:
        extra.append(random.normal(n, out * groups, h + 2 * padding - 2, w + 2 * padding - 2))

    def call(x: Tensor, weight: Tensor, *rest: Tensor, backend: str) -> Tensor:
        given = dict(zip(["bias"] * bias + ["residual"] * residual, rest, strict=True))
        return winograd_conv2d(x, weight, padding=padding, groups=groups, backend=backend, **given)

    return call, (random.normal(n, c * groups, h, w),
                  random.normal(out * groups, c, 3, 3) / (3 * c**0.5), *extra)


def _narrow(shape: Shape, random: Random, out: int, side: int, padding: int, bias: bool) -> Made:
    n, c, h, w = shape
    h, w = (max(s, side - 2 * padding) for s in (h, w))

    def call(x: Tensor, weight: Tensor, *rest: Tensor, backend: str) -> Tensor:
        return narrow_conv2d(x, weight, *rest, padding=padding, backend=backend)

    return call, (random.normal(n, c, h, w), random.normal(out, c, side, side) / (side * c**0.5),
                  *[random.normal(out)] * bias)


def _polyphase(shape: Shape, random: Random, out: int, groups: int, padding: Any,
               form: tuple[int, int], bias: bool) -> Made:
    n, c, h, w = shape
    side, stride = form
    y, x = (padding, padding) if isinstance(padding, int) else padding
    h, w = max(h, side - 2 * y), max(w, side - 2 * x)

    def call(x: Tensor, weight: Tensor, *rest: Tensor, backend: str) -> Tensor:
        return polyphase_conv2d(x, weight, *rest, stride=stride, padding=padding, groups=groups,
                                backend=backend)

    return call, (random.normal(n, c * groups, h, w),
                  random.normal(out * groups, c, side, side) / (side * c**0.5),
                  *[random.normal(out * groups)] * bias)


def _transposed(shape: Shape, random: Random, out: int, groups: int, padding: Any, side: int,
                output_padding: Any, bias: bool) -> Made:
    n, c, h, w = shape
    h, w = max(h, 2), max(w, 2)

    def call(x: Tensor, weight: Tensor, *rest: Tensor, backend: str) -> Tensor:
        return polyphase_conv_transpose2d(
            x, weight, *rest, padding=padding, output_padding=output_padding, groups=groups,
            backend=backend)

    return call, (random.normal(n, c * groups, h, w),
                  random.normal(c * groups, out, side, side) / (side * c**0.5),
                  *[random.normal(out * groups)] * bias)


def _spectral(shape: Shape, random: Random, last: bool) -> Made:
    n, c, h, w = shape
    weight = random.normal(n + 2, 3 * c, min(h, 5), min(w, 5))
    u, v = random.normal(n + 2), random.normal(weight[0].numel())
    form = torch.channels_last if last else torch.contiguous_format

    def call(weight: Tensor, backend: str) -> Tensor:
        return spectral_weight(weight, u.to(weight), v.to(weight), memory_format=form,
                               backend=backend)

    return call, (weight,)


def _windows(random: Random, count: int, rows: int) -> Tensor:
    windows = random.below(rows, count + 1, 9).int()
    windows[0] = 0
    return windows


def _outside(random: Random, rows: int, width: int) -> Tensor:
    drawn = random.normal(rows, width)
    drawn[0] = 0
    return drawn


def _table(shape: Shape, random: Random, groups: int, one_level: bool) -> Made:
    n, c, h, w = shape
    depth, windows = 2 * n, _windows(random, h * w, w + 1)

    def call(*inputs: Tensor, backend: str) -> Tensor:
        return window_table(*inputs, windows, groups=groups, one_level=one_level, backend=backend)

    weights = (x for _ in "gb" for x in (random.normal(groups * c, depth, 3, 3),
                                         random.normal(groups * c)))
    return call, (_outside(random, w + 1, groups * depth), *weights)


def _embedding(shape: Shape, random: Random, groups: int, bias: bool, relu: bool) -> Made:
    n, c, h, w = shape
    windows = _windows(random, h * w, w + 1)

    def call(vectors: Tensor, weight: Tensor, *rest: Tensor, backend: str) -> Tensor:
        return window_embedding(vectors, weight, *(rest or (None,)), windows, groups=groups,
                                relu=relu, backend=backend)

    return call, (_outside(random, w + 1, groups * n), random.normal(groups * c, n, 3, 3),
                  *[random.normal(groups * c)] * bias)


def _level(shape: Shape, random: Random, groups: int, norms: int) -> Made:
    n, c, h, w = shape
    windows3, windows5 = _windows(random, h * w, w + 1), _windows(random, w, h * w + 1)

    def call(vectors: Tensor, *convs: Tensor, backend: str) -> list[Tensor]:
        each = [NormConvs(*convs[i : i + 6], groups, groups) for i in range(0, len(convs), 6)]
        # Weights of 16 bits come with vectors of 32.
        wide = vectors if vectors.dtype == torch.float64 else vectors.float()
        return level_tables(wide, windows3, windows5, each, backend=backend)

    depth = 2 * groups
    sizes = [(depth, n, 3, 3), (depth,), *((groups * c, 2, 3, 3), (groups * c,)) * 2] * norms
    return call, (_outside(random, w + 1, groups * n), *(random.normal(*s) for s in sizes))


def _own(shape: Shape, random: Random, groups: int) -> tuple[Tensor, Tensor, GroupWindows]:
    """Vectors of which groups find some equal, windows of them, and those as groups see them."""
    n, _, h, w = shape
    vectors = random.below(2, w + 1, groups * n).double()
    vectors[0] = 0
    windows = _windows(random, h * w, w + 1)
    ranges = [(g * n, (g + 1) * n) for g in range(groups)]
    return vectors, windows, group_windows(vectors, windows, ranges, backend="reference")


def _group_windows(shape: Shape, random: Random, groups: int) -> Made:
    n = shape[0]
    vectors, windows, _ = _own(shape, random, groups)
    ranges = [(g * n, (g + 1) * n) for g in range(groups)]
    return lambda x, backend: group_windows(x, windows, ranges, backend=backend), (vectors,)


def _table_of_groups(shape: Shape, random: Random, groups: int, one_level: bool) -> Made:
    n, c, h, w = shape
    own = _own(shape, random, groups)[2]
    windows = _windows(random, h + w, own.ids.shape[1])

    def call(*inputs: Tensor, backend: str) -> Tensor:
        return window_table(*inputs, windows, own=own, groups=groups, one_level=one_level,
                            backend=backend)

    weights = (x for _ in "gb" for x in (random.normal(groups * c, n, 3, 3),
                                         random.normal(groups * c)))
    return call, (_outside(random, own.windows.shape[1], groups * n), *weights)


def _embedding_of_groups(shape: Shape, random: Random, groups: int, bias: bool,
                         relu: bool) -> Made:
    n, c, _, _ = shape
    vectors, _, own = _own(shape, random, groups)

    def call(vectors: Tensor, weight: Tensor, *rest: Tensor, backend: str) -> Tensor:
        return window_embedding(vectors, weight, *(rest or (None,)), own, groups=groups,
                                relu=relu, backend=backend)

    return call, (vectors + _outside(random, *vectors.shape), random.normal(groups * c, n, 3, 3),
                  *[random.normal(groups * c)] * bias)


def _crops(shape: Shape, random: Random, planes: bool, box: str, size: tuple[int, int]) -> Made:
    n, _, h, w = shape
    labels = random.below(3, n, h, w)
    hot = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2)

    def call(x: Tensor, backend: str) -> Tensor:
        semantics = hot.to(x) if planes else labels
        return class_crops(x, semantics, 3, size=size, box=box, backend=backend)

    return call, (random.normal(*shape),)


def _boxes(shape: Shape, random: Random, planes: bool, box: str) -> Made:
    n, _, h, w = shape
    labels = random.below(3, n, h, w)
    hot = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2)

    def call(x: Tensor, backend: str) -> Tensor:
        return class_boxes(x, hot.to(x) if planes else labels, 3, box=box, backend=backend)

    return call, (random.normal(*shape),)


def _pooled(table: bool) -> Callable[..., Made]:
    def make(shape: Shape, random: Random, ids: int) -> Made:
        n, _, h, w = shape
        instances = random.below(ids, n, h, w) * 1000

        def call(x: Tensor, backend: str) -> Any:
            if table:
                return tuple(instance_mean_table(x, instances, backend=backend))
            return instance_avg_pool2d(x, instances, backend=backend)

        return call, (random.normal(*shape),)
    return make


def _edges(shape: Shape, random: Random) -> Made:
    n, c, h, w = shape
    ids = random.below(max(2, c), n, h, w)
    return lambda x, backend: instance_edges(ids, dtype=x.dtype, backend=backend), (
        random.normal(1),)


def _vectors(shape: Shape, random: Random, soft: bool) -> Made:
    n, c, h, w = shape
    hot = torch.nn.functional.one_hot(random.below(c, n, h, w), c).permute(0, 3, 1, 2).double()
    return lambda x, backend: number_vectors(x, x.numel(), backend=backend), (
        hot * (1 + soft * hot.argmax(1, keepdim=True)) + soft,)


def _symbols(shape: Shape, random: Random) -> Made:
    n, c, h, w = shape
    map = random.below(c, n, h, w).int() + 1
    return lambda x, backend: number_windows(map, map.numel(), backend=backend), (
        random.normal(1),)


def _label_conv(shape: Shape, random: Random, kernel_size: int) -> Made:
    n, c, h, w = shape
    h, w = (max(s, kernel_size // 2 + 1) for s in (h, w))
    layout = LabelLayout.from_labels(random.below(4, n, h, w), 4)

    def call(weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return LabelConv2d(layout, weight, bias, backend=backend).rows(0, h)

    return call, (random.normal(c, 4, kernel_size, kernel_size), random.normal(c))


def _reformat(shape: Shape, random: Random) -> Made:
    def call(x: Tensor, backend: str) -> Tensor:
        other = torch.contiguous_format if is_channels_last(x) else torch.channels_last
        return reformat(x, other, backend=backend)

    return call, (random.normal(*shape),)


def _source(shape: Shape, random: Random) -> Made:
    def call(x: Tensor, backend: str) -> Tensor:
        source = upsampling_source(F.interpolate(x, scale_factor=2.0), backend=backend)
        assert source is not None
        return source

    return call, (random.normal(*shape),)


_ACTIVATIONS = ("leaky_relu", None, "relu")
_NORMS: dict[str, tuple[Any, ...]] = {"norm": ("batch", "instance", "group", "none"),
                                      "training": (True, False), "activation": _ACTIVATIONS}
_ENLARGED = {**_NORMS, "upsample": (False, True)}
_BOXES: dict[str, tuple[Any, ...]] = {"planes": (False, True), "box": ("nonzero", "sums")}

CASES: dict[str, OpCase] = {
    "modulation": OpCase(_modulation(False), _ENLARGED, "triton"),
    "modulation_pair": OpCase(_modulation(True), _ENLARGED, "triton"),
    "norm_act": OpCase(_norm_act, {**_NORMS, "residual": (True, False)}, "triton"),
    "indexed_modulation": OpCase(_indexed(False), {**_ENLARGED, "rows": (5, 1, 12)}, "triton"),
    "indexed_modulation_pair": OpCase(_indexed(True), {**_ENLARGED, "rows": (5, 1, 12)}, "triton"),
    "indexed_shortcut": OpCase(
        _shortcut, {"norm": _NORMS["norm"], "training": (True, False), "upsample": (False, True),
                    "rows": (5, 1, 12), "out": (5, 1, 24), "groups": (1, 2, 3)},
        dtypes=WIDE, leaves=0),
    "indexed_relu": OpCase(_parts, {"parts": (3, 1, 4), "rows": (5, 1, 12)}, "triton", leaves=0),
    "reformat": OpCase(_reformat),
    "upsampling_source": OpCase(_source, dtypes=WIDE, leaves=0),
    "conditional_attention": OpCase(_attention, {}, "triton"),
    "conditional_conv2d": OpCase(_conditional, {"depth": (4, 1, 17), "bias": (True, False)},
                                 "triton"),
    "spatially_varying_conv2d": OpCase(
        _varying, {"each": (1, 2, 3), "kernel_size": (3, 1, 5), "stride": (1, 2, 3),
                   "padding": (1, 0, 3), "dilation": (1, 2)}, "cuda"),
    "winograd_conv2d": OpCase(
        _winograd, {"out": (5, 1, 24), "groups": (1, 2, 3), "padding": (1, 0),
                    "bias": (True, False), "residual": (True, False)}, dtypes=WIDE),
    "narrow_conv2d": OpCase(
        _narrow, {"out": (3, 1, 2, 4), "side": (3, 1, 4, 7), "padding": (1, 0, 2),
                  "bias": (True, False)}, dtypes=WIDE),
    "polyphase_conv2d": OpCase(
        _polyphase, {"out": (5, 1, 24), "groups": (1, 2, 3), "padding": (1, 0, 2, (1, 2)),
                     "form": ((3, 2), (4, 2), (4, 1)), "bias": (True, False)}, dtypes=WIDE),
    "polyphase_conv_transpose2d": OpCase(
        _transposed, {"out": (5, 1, 24), "groups": (1, 2, 3), "padding": (1, 0, (0, 1)),
                      "side": (3, 4), "output_padding": (1, 0, (0, 1)), "bias": (True, False)},
        dtypes=WIDE),
    "spectral_weight": OpCase(_spectral, {"last": (False, True)}, dtypes=WIDE),
    "window_table": OpCase(_table, {"groups": (1, 3), "one_level": (False, True)}, "triton", WIDE),
    "window_embedding": OpCase(_embedding, {"groups": (1, 3), "bias": (True, False),
                                            "relu": (True, False)}, "triton", WIDE),
    "level_tables": OpCase(_level, {"groups": (1, 3), "norms": (2, 1)}, "triton", leaves=0),
    "window_table of groups": OpCase(
        _table_of_groups, {"groups": (2, 1, 3), "one_level": (False, True)}, dtypes=WIDE),
    "window_embedding of groups": OpCase(
        _embedding_of_groups, {"groups": (2, 1, 3), "bias": (True, False), "relu": (True, False)},
        dtypes=WIDE),
    "class_crops": OpCase(_crops, {**_BOXES, "size": ((5, 7), (12, 3), (1, 1))}, "cuda"),
    "class_boxes": OpCase(_boxes, _BOXES, "cuda", leaves=0),
    "instance_avg_pool2d": OpCase(_pooled(False), {"ids": (6, 1, 200)}, "cuda"),
    "instance_mean_table": OpCase(_pooled(True), {"ids": (6, 1, 200)}, "cuda", leaves=0),
    "instance_edges": OpCase(_edges, {}, "cuda", leaves=0),
    "number_vectors": OpCase(_vectors, {"soft": (False, True)}, "cuda", leaves=0),
    "number_windows": OpCase(_symbols, {}, "cuda", leaves=0),
    "group_windows": OpCase(_group_windows, {"groups": (2, 1, 5)}, leaves=0),
    "label_conv": OpCase(_label_conv, {"kernel_size": (3, 1, 7)}, leaves=0),
}
