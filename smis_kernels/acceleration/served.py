"""A recorded norm as the kernels serve it: gamma and beta at every pixel, or in rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layout.label_layout import LabelLayout
from ..modules.spade import CGNorm
from ..ops.window_table.op import window_embedding, window_table
from ..ops.winograd_conv.choice import conv3x3
from ..runtime.tensors import acc_dtype
from .formats import gradient_in_format
from .graph import FEATURES, MAP, Graph, Step, call
from .match import Conv, Form
from .watch import make_weight

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


def _attribute(owner: nn.Module, name: str) -> Any:
    return reduce(getattr, name.split("."), owner)


def _conv(owner: nn.Module, step: Step) -> nn.Conv2d:
    """A conv whose weight is to be read: hooks that make it have run, as in a call of it."""
    conv = owner.get_submodule(step.settings)
    assert isinstance(conv, nn.Conv2d)
    make_weight(conv)
    return conv


class Evaluation:
    """The steps of a recorded forward, each done once and when it is asked for."""

    def __init__(self, owner: nn.Module, graph: Graph, inputs: Mapping[int, Any]) -> None:
        self.owner, self.steps = owner, graph.steps
        self.found: dict[int, Any] = dict(inputs)

    def value(self, i: int) -> Any:
        if i not in self.found:
            self.found[i] = self._done(i, self.steps[i])
        return self.found[i]

    def _done(self, i: int, step: Step) -> Any:
        if step.op == "number":
            return step.settings
        if step.op == "tensor":
            return self._tensor(_attribute(self.owner, step.settings))
        if step.op == "module":
            return self._module(i, step)
        if step.op == "item":
            return self.value(step.inputs[0])[step.settings]
        if step.op in _OPERATORS and step.settings is None:
            return _OPERATORS[step.op](*map(self.value, step.inputs))
        if step.op == "relu":
            return F.relu(self.value(step.inputs[0]))
        if step.op == "leaky_relu":
            return F.leaky_relu(self.value(step.inputs[0]), step.settings)
        return call(step, self.value)

    def _tensor(self, tensor: Tensor) -> Tensor:
        return tensor

    def _module(self, i: int, step: Step) -> Tensor:
        out: Tensor = self.owner.get_submodule(step.settings)(self.value(step.inputs[0]))
        return out


class _Pixels(Evaluation):
    """Evaluates on the map itself, part by part as written; ``fused``: the last convs as one."""

    def __init__(self, owner: nn.Module, form: Form, segmap: Tensor, size: tuple[int, int],
                 fused: bool) -> None:
        super().__init__(owner, form.graph, {MAP: segmap})
        self.form, self._size, self._fused = form, size, fused

    def _done(self, i: int, step: Step) -> Any:
        if step.op == "resize":
            return F.interpolate(self.value(MAP), size=self._size, mode="nearest")
        return super()._done(i, step)

    def _module(self, i: int, step: Step) -> Tensor:
        pair = self.form.pair
        known = next((c for c in self.form.convs if c.step == i), None)
        if not self._fused or pair is None or i not in pair or known is None or (
                known.kernel != 3 or known.groups > 1):  # grouped outputs would interleave
            return super()._module(i, step)
        convs = [_conv(self.owner, self.form.graph.steps[j]) for j in pair]
        both = conv3x3(self.value(step.inputs[0]), torch.cat([conv.weight for conv in convs]),
                       _joined_bias(convs))
        self.found.update(zip(pair, both.split(known.channels, 1), strict=True))
        out: Tensor = self.found[i]
        return out


def _joined_bias(convs: list[nn.Conv2d]) -> Tensor | None:
    if all(conv.bias is None for conv in convs):
        return None
    return torch.cat([_bias(conv) for conv in convs])


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


class _Rows(Evaluation):
    """Evaluates on a layout's distinct windows, as (1 or N, C, rows, 1): N after an image's norm.

    Row 0 is the outside of the image: zero wherever a conv reads it.
    """

    def __init__(self, owner: nn.Module, form: Form, layout: LabelLayout, size: tuple[int, int],
                 path: str, dtype: torch.dtype) -> None:
        self._layout, self._size, self._path, self._dtype = layout, size, path, dtype
        vectors = layout.vectors.to(dtype).t()[None, :, :, None]
        inputs = {i: vectors for i, s in enumerate(form.graph.steps) if s.op == "resize"}
        super().__init__(owner, form.graph, {MAP: vectors, **inputs})
        self.form = form
        self._convs = {conv.step: conv for conv in form.convs}
        self.table: Tensor | None = None  # of both last convs, whole

    def windows(self, level: int) -> Tensor:
        """(rows, 9): the rows of the level below that each row of a level holds."""
        found = self._layout.level(self._size)
        return found.windows3 if level == 1 else found.windows5

    def index(self, level: int) -> Tensor:
        """(N, H, W): the row of a level at each pixel."""
        if level == 0:
            return self._layout.resized(self._size)
        found = self._layout.level(self._size)
        return found.index3 if level == 1 else found.index5

    def count(self, level: int) -> int:
        """How many rows a level has."""
        return len(self.windows(level)) if level else len(self._layout.vectors)

    def lifted(self, i: int, level: int) -> Any:
        """A step's rows at a higher level: what is at the centre of each window."""
        value = self.value(i)
        for above in range(self.form.levels[i] + 1, level + 1):
            if self.form.levels[i] >= 0:
                value = value[:, :, self.windows(above)[:, 4].long()]
        return value

    def _done(self, i: int, step: Step) -> Any:
        level = self.form.levels[i]
        if i in self._convs or level < 0 or all(
                self.form.levels[j] in (-1, level) for j in step.inputs):
            return super()._done(i, step)
        values = {j: self.lifted(j, level) for j in step.inputs}
        if step.op in _OPERATORS and step.settings is None:
            return _OPERATORS[step.op](*(values[j] for j in step.inputs))
        return call(step, values.__getitem__)

    def _tensor(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _module(self, i: int, step: Step) -> Tensor:
        if i in self._convs:
            return self._convolved(self._convs[i], step)
        module, rows = self.owner.get_submodule(step.settings), self.value(step.inputs[0])
        if isinstance(module, _InstanceNorm):
            return self._instance_norm(module, rows, self.form.levels[i])
        if any(True for _ in module.parameters(recurse=False)):  # in the tables' dtype
            own = {k: self._tensor(p) for k, p in module.named_parameters(recurse=False)}
            out: Tensor = torch.func.functional_call(module, own, (rows,))
            return out
        out = module(rows)
        return out

    def _convolved(self, conv: Conv, step: Step) -> Tensor:
        source = step.inputs[0]
        rows = self.value(source)
        pair = self.form.pair
        if conv.kernel == 1:
            module = _conv(self.owner, step)
            bias = None if module.bias is None else self._tensor(module.bias)
            return F.conv2d(rows, self._tensor(module.weight), bias, groups=conv.groups)
        matrix = self._matrix(rows)
        if conv.kernel == 5:
            return self._image(self._of_patches(matrix, _conv(self.owner, step)))
        windows = self.windows(self.form.levels[source] + 1)
        if pair is None or conv.step not in pair or self.form.levels[source] == 0:
            module = _conv(self.owner, step)
            return self._image(window_embedding(
                matrix, self._tensor(module.weight), self._tensor(_bias(module)), windows,
                groups=conv.groups, relu=False,
                order=self._layout.window_order(windows, self.form.reach)))
        gamma, beta = (_conv(self.owner, self.form.graph.steps[j]) for j in pair)
        self.table = window_table(
            matrix, gamma.weight, _bias(gamma), beta.weight, _bias(beta), windows,
            groups=conv.groups, one_level=self._path == "one_level",
            order=self._layout.window_order(windows, self.form.reach))
        for j, half in zip(pair, self.table.split(conv.channels, 1), strict=True):
            self.found[j] = self._image(half)
        out: Tensor = self.found[conv.step]
        return out

    def _matrix(self, rows: Tensor) -> Tensor:
        """(rows, C), the outside zero."""
        matrix = rows[0, :, :, 0].t()
        return torch.cat([torch.zeros_like(matrix[:1]), matrix[1:]])

    def _image(self, matrix: Tensor) -> Tensor:
        return matrix.t()[None, :, :, None]

    def _of_patches(self, matrix: Tensor, conv: nn.Conv2d) -> Tensor:
        """A 5x5 conv of the symbols, on the distinct 5x5 windows."""
        weight = self._tensor(conv.weight)
        patches = self._layout.patches(self._size).long()
        grouped = matrix.view(len(matrix), conv.groups, -1)
        taps = weight.view(conv.groups, weight.shape[0] // conv.groups, -1, 25)
        products = torch.einsum("rgk,gdkt->trgd", grouped, taps).flatten(2)
        out = products[0][patches[:, 0]]
        for tap in range(1, 25):
            out = out + products[tap][patches[:, tap]]
        return out + self._tensor(_bias(conv))

    def _instance_norm(self, norm: _InstanceNorm, rows: Tensor, level: int) -> Tensor:
        """The statistics of an image are those of its rows, each as often as it occurs."""
        index = self.index(level)
        images, count = len(index), rows.shape[2]
        offset = count * torch.arange(images, device=index.device)
        numbers = (index.flatten(1) + offset[:, None]).flatten()
        share = torch.bincount(numbers, minlength=images * count).view(images, 1, count, 1)
        share = share.to(rows.dtype) / index[0].numel()
        mean = (rows * share).sum(2, keepdim=True)
        centred = rows - mean
        var = (centred.square() * share).sum(2, keepdim=True)
        out = centred * torch.rsqrt(var + norm.eps)
        if norm.weight is not None and norm.bias is not None:
            out = out * self._tensor(norm.weight)[:, None, None] + self._tensor(
                norm.bias)[:, None, None]
        return out


class ForeignNorm(CGNorm):
    """A foreign norm as :class:`CGNorm` sees its own: parts and settings, nothing registered.

    Made for each call, so that no part can be out of date.
    """

    owner: nn.Module
    form: Form
    counts: bool
    norm: nn.Module | None
    takes_affine = True
    calls_norm = False  # it is left alone where it has hooks or a forward of its own

    def __init__(self, owner: nn.Module, form: Form, counts: bool, channels: int,
                 label_channels: int) -> None:
        norm = owner.get_submodule(form.norm) if form.norm else None
        vars(self).update(
            owner=owner, form=form, counts=counts, norm=norm, channels=channels, backend=None,
            training=owner.training if norm is None else norm.training,
            label_channels=label_channels, _modules={}, _parameters={}, _buffers={},
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForeignNorm) and other.owner is self.owner

    def __hash__(self) -> int:
        return hash(self.owner)

    @property
    def hidden(self) -> int:  # type: ignore[override]
        """Channels of what the last convs read."""
        last = self.form.pair or [c.step for c in self.form.convs[-1:]]
        return next((c.source for c in self.form.convs if c.step in last), 0)

    @property
    def reach(self) -> int:
        return self.form.reach

    @property
    def rows(self) -> tuple[int, bool]:
        return self.form.reach, self.form.per_image

    @property
    def no_tables(self) -> str:
        return self.form.no_tables

    @property
    def products(self) -> tuple[int, int]:
        return self.form.products

    @property
    def outline(self) -> Hashable:
        return (self.channels, self.label_channels, self.hidden, self.form.reach,
                self.form.no_tables, self.form.products)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return ()

    def norm_arguments(self, suffix: str = "") -> dict[str, Any]:
        return {"running_mean" + suffix: getattr(self.norm, "running_mean", None),
                "running_var" + suffix: getattr(self.norm, "running_var", None)}

    def shared_arguments(self) -> dict[str, Any]:
        if self.norm is None:
            return {"norm": "none", "training": self.training}
        if isinstance(self.norm, nn.GroupNorm):
            return {"norm": "group", "num_groups": self.norm.num_groups, "eps": self.norm.eps,
                    "training": self.training}
        vars(self)["param_free_norm"], vars(self)["synchronized"] = self.norm, False
        return super().shared_arguments()

    def count_batch(self) -> None:
        counter = getattr(self.norm, "num_batches_tracked", None)
        if self.counts and self.training and counter is not None:
            counter.add_(1)

    def forward(self, input: Tensor, segmap: Tensor | LabelLayout, **options: Any) -> Tensor:
        source = gradient_in_format(self.source(gradient_in_format(input)))
        return super().forward(source, segmap, **options)

    def source(self, input: Tensor) -> Tensor:
        """What is modulated: the features, where the kernels or nothing normalise them."""
        if self.norm is not None:
            return input
        steps = Evaluation(self.owner, self.form.graph, {FEATURES: input})
        found: Tensor = steps.value(self.form.source)
        return found

    @property
    def shares_features(self) -> bool:
        """Whether it modulates what it is given, so that one read may serve two norms."""
        return self.norm is not None or self.form.source == FEATURES

    def gamma_beta(self, segmap: Tensor, size: tuple[int, int],
                   fused: bool) -> tuple[Tensor, Tensor]:
        values = _Pixels(self.owner, self.form, segmap, size, fused)
        for i, drops in self.form.dense_order:
            values.value(i)
            for j in drops:  # what is read no more makes room for what comes
                values.found.pop(j, None)
        gamma, beta = self._with_affine(*(self._whole(values.value(i), (len(segmap), *size))
                                          for i in (self.form.gamma, self.form.beta)))
        return gradient_in_format(gamma), gradient_in_format(beta)

    def _whole(self, value: Any, shape: tuple[int, int, int]) -> Any:
        n, h, w = shape
        if not isinstance(value, Tensor):
            weight = next(self.owner.parameters())
            value = weight.new_full((1, 1, 1, 1), value)
        return value.expand(n, self.channels, h, w)

    def _with_affine(self, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """The norm's own weight and bias taken in."""
        weight, bias = getattr(self.norm, "weight", None), getattr(self.norm, "bias", None)
        if weight is None:
            return gamma, beta
        scale = weight.to(gamma.dtype)[:, None, None]
        if bias is not None:
            shift = bias.to(gamma.dtype)[:, None, None]
            beta = beta + torch.addcmul(shift, shift, gamma)
        return torch.addcmul(scale - 1, scale, gamma), beta

    def table(self, layout: LabelLayout, size: tuple[int, int], path: str) -> Tensor:
        dtype = acc_dtype(next(self.owner.parameters()))
        with torch.autocast(layout.vectors.device.type, enabled=False):
            rows = _Rows(self.owner, self.form, layout, size, path, dtype)
            level = self.form.reach
            gamma, beta = (rows.lifted(i, level) for i in (self.form.gamma, self.form.beta))
            if rows.table is not None and self.form.pair == (
                    self.form.gamma, self.form.beta) and getattr(self.norm, "weight", None) is None:
                table = rows.table
            else:
                shape = (max(len(v) if isinstance(v, Tensor) else 1 for v in (gamma, beta)),
                         rows.count(level), 1)
                both = self._with_affine(self._whole(gamma, shape), self._whole(beta, shape))
                table = torch.cat(both, 1).squeeze(3).transpose(1, 2).reshape(
                    -1, 2 * self.channels)
        weight = next(self.owner.parameters())
        low = table.is_cuda and not table.requires_grad and weight.element_size() == 2
        return table.to(weight.dtype) if low else table

    def index(self, layout: LabelLayout, size: tuple[int, int]) -> Tensor:
        """The row of :meth:`table` at each pixel; each image has its own after norms of it."""
        rows = _Rows(self.owner, self.form, layout, size, "", torch.float32)
        index = rows.index(self.form.reach)
        if not self.form.per_image or len(index) == 1:
            return index
        offset = torch.arange(len(index), dtype=index.dtype, device=index.device)
        return index + rows.count(self.form.reach) * offset[:, None, None]
