"""Sequences of layers: instance norm with its activation in one pass, batch norm in the conv."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.padding import _ReflectionPadNd, _ReplicationPadNd
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _MaxPoolNd,
)

from ..ops.convs import LEAST_WIDTH
from ..ops.norm_act.op import norm_act
from ..runtime.tensors import acc_dtype
from .convs import conv_change
from .folding import Folded, constant
from .formats import channels_last, gradient_in_format, planes
from .graph import is_plain_conv, is_plain_instance_norm
from .probe import PROBE_SIZE, SEED, Trial, Verdict, agreeing, at_scales, detached_copy
from .swap import FOLDED, PLAN, Change, Fused, FusionPlan, is_small, serves
from .views import may_view
from .watch import hooked, make_weight, original_type

# On the CPU a call of norm_act costs 80 us more than torch's: what that pays for, in values.
# Measured on one thread (66 us against 119 us at 16,384 values, 165 us against 145 us at 65,536).
SMALL = 65_536

_COPYING = (_ConvNd, _NormBase, nn.GroupNorm, _MaxPoolNd, _AvgPoolNd, _AdaptiveMaxPoolNd,
            _AdaptiveAvgPoolNd, _ReflectionPadNd, _ReplicationPadNd)


@dataclass(frozen=True)
class SequencePlan(FusionPlan):
    """``fold``: whether batch norms go into convs; ``reformat``: features channels-last inside."""

    fold: bool
    reformat: bool


def is_sequence(module: nn.Module) -> bool:
    """Whether calling it is calling its children in turn."""
    return isinstance(module, nn.Sequential) and (
        original_type(module).forward is nn.Sequential.forward)


def layers_of(sequence: nn.Module) -> Iterator[nn.Module]:
    """The layers in the order of their calls, those of sequences inside it too."""
    assert isinstance(sequence, nn.Sequential)
    for child in sequence:  # unlike children(), which names a shared layer once
        if is_sequence(child) and not hooked(child):
            yield from layers_of(child)
        else:
            yield child


def is_instance_norm(layer: nn.Module | None) -> bool:
    """Whether it is an instance norm without parameters or running statistics."""
    return (
        isinstance(layer, nn.InstanceNorm2d) and is_plain_instance_norm(layer)
        and layer.weight is None and not layer.track_running_stats
    )


def copies(layer: nn.Module) -> bool:
    """Whether a layer certainly returns new memory, and writes to none that it is given."""
    if not isinstance(layer, _COPYING) or hooked(layer, weights=False):
        return False
    cls: Any = original_type(layer)
    return all(str(function.__module__).startswith("torch.nn.") for function in (
        cls.forward, getattr(cls, "_conv_forward", cls.forward)))


def activation_of(layer: nn.Module | None) -> dict[str, Any] | None:
    """ReLU or LeakyReLU as arguments of :func:`norm_act`."""
    if type(layer) is nn.ReLU:
        return {"activation": "relu"}
    if isinstance(layer, nn.LeakyReLU) and type(layer) is nn.LeakyReLU:
        slope = float(layer.negative_slope)
        return {"activation": "leaky_relu", "negative_slope": slope} if 0 < slope < 1 else None
    return None


def foldable(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether the batch norm's eval mode can be part of the conv."""
    return (
        conv is not None and is_plain_conv(conv) and type(norm) is nn.BatchNorm2d
        and norm.running_mean is not None and norm.num_features == conv.out_channels
    )


class FusedSequence(Fused):
    """A Sequential whose instance norms take in their activation, and convs their batch norm."""

    @staticmethod
    def _smis_besides(module: nn.Module, plan: FusionPlan) -> list[nn.Module]:
        return list(module.children())  # each is looked at, or called, in each call

    def _smis_ready(self, x: Any) -> list[nn.Module] | str:
        if not isinstance(x, Tensor) or not serves(x, None):
            return "features of another kind"
        return list(layers_of(self))

    def _smis_run(self, ready: list[nn.Module], x: Tensor) -> Any:
        plan: SequencePlan = vars(self)[PLAN]
        x = gradient_in_format(x)
        h: Any = x
        i, reformatted = 0, False
        while i < len(ready):
            layer = ready[i]
            following = ready[i + 1] if i + 1 < len(ready) else None
            i += 1
            fits = isinstance(h, Tensor) and serves(h, None)
            if plan.reformat and fits:
                if reformatted and may_view(layer):
                    h = planes(h)
                elif copies(layer):  # what comes before it may write to the caller's features
                    h, reformatted = channels_last(h), True
            small = fits and is_small(h, h.numel(), SMALL)
            if fits and not small and is_instance_norm(layer) and not hooked(layer):
                options = None if following is None or hooked(following) else activation_of(
                    following)
                assert isinstance(layer, nn.InstanceNorm2d)
                h = norm_act(h, eps=layer.eps, **(options or {}))
                i += options is not None
            elif plan.fold and fits and self._may_fold(layer, following):
                h = self._folded(i, layer, following, h)
                i += 1
            else:
                h = layer(h)
                if isinstance(layer, _InstanceNorm) and isinstance(h, Tensor):
                    h = gradient_in_format(h)
        if plan.reformat and isinstance(h, Tensor) and h.dim() == 4:
            same = x.is_contiguous(memory_format=torch.channels_last)
            return h if same else planes(h)
        return h

    def _may_fold(self, conv: nn.Module, norm: nn.Module | None) -> bool:
        if norm is None or not foldable(conv, norm) or norm.training or hooked(norm):
            return False
        if hooked(conv, weights=False):
            return False
        return constant(conv, *conv.parameters(), *norm.parameters())

    def _folded(self, i: int, conv: Any, norm: Any, x: Tensor) -> Tensor:
        """The conv with the norm's scale and shift in its weight and bias, made once."""
        make_weight(conv)
        sources = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight,
                   norm.bias)
        kept: dict[int, Folded] = vars(self).setdefault(FOLDED, {})
        if i not in kept or not kept[i].holds(sources, norm.eps):
            kept[i] = Folded(sources, lambda: tuple(
                t.to(conv.weight.dtype) for t in with_norm(conv, norm)), norm.eps)
        weight, bias = kept[i].value
        out: Tensor = conv._conv_forward(x, weight, bias)
        return out


def with_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The conv's weight and bias with the norm's scale and shift in them, in the dtype of sums."""
    dtype = acc_dtype(conv.weight)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype)
    if conv.bias is not None:
        shift = shift + conv.bias.to(dtype)
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias.to(dtype)
    return conv.weight.to(dtype) * scale.view(-1, 1, 1, 1), bias


def conv_changes(sequence: nn.Module, plan: SequencePlan) -> list[Change]:
    """The convs of a sequence that are swapped: those that no norm may go into."""
    steps = list(layers_of(sequence))
    folded = {conv for conv, norm in pairwise(steps) if plan.fold and foldable(conv, norm)}
    changes = (conv_change(step, LEAST_WIDTH) for step in dict.fromkeys(steps)
               if step not in folded)
    return [change for change in changes if change is not None]


def judge(sequence: nn.Module, inference: bool) -> Verdict | None:
    """Whether a Sequential has instance norms, or in inference batch norms, to fuse."""
    if not is_sequence(sequence):
        return None
    steps = list(layers_of(sequence))
    following: list[nn.Module | None] = [*steps[1:], None]
    pairs = [(a, b) for a, b in zip(steps, following, strict=True) if is_instance_norm(a)]
    fold = inference and any(
        foldable(a, b) for a, b in zip(steps, following, strict=True))
    if not pairs and not fold:
        return None
    plan = SequencePlan(("input",), fold, _reformats(steps))
    for norm, activation in pairs:
        assert isinstance(norm, nn.InstanceNorm2d)
        parts = [norm] if activation_of(activation) is None else [norm, activation]
        twin = detached_copy(nn.Sequential(*(p for p in parts if p is not None)))
        like = next(sequence.parameters(), torch.empty(0, device="cpu"))
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn((2, norm.num_features, *PROBE_SIZE), generator=generator,
                        device="cpu").to(like)
        trials = [*(Trial((x,), training) for training in (True, False)), *at_scales((x,))]
        chosen, why = agreeing(twin, trials, [[Change(twin, FusedSequence, plan)]])
        if chosen is None:
            return None, why
    return plan, ""


def _reformats(steps: list[nn.Module]) -> bool:
    """Whether there are convs enough for channels-last to pay for the way there and back."""
    return sum(isinstance(s, (nn.Conv2d, nn.ConvTranspose2d)) for s in steps) > 2
