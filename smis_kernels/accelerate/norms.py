"""SPADE and grouped SPADE norms of other people's models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layout.label_layout import LabelLayout
from ..modules.spade import CGNorm
from .probe import PROBE_SIZE, SEED, CannotRun, Trial, Verdict, agreeing, at_scales, shadow
from .swap import PLAN, Change, Fused, Plan, arguments_of, serves
from .watch import weight_hooks

_COUNTING = (nn.BatchNorm2d, nn.SyncBatchNorm)  # whose several processes are known, too


@dataclass(frozen=True)
class NormPlan(Plan):
    """``counts``: whether the norm advances ``num_batches_tracked``."""

    counts: bool


class ForeignNorm(CGNorm):
    """A foreign norm as :class:`CGNorm` sees its own: parts and settings, nothing registered.

    Made for each call, so that no part can be out of date.
    """

    def __init__(self, owner: nn.Module, counts: bool) -> None:
        parts = owner._modules
        norm, gamma = parts["param_free_norm"], parts["mlp_gamma"]
        shared = parts.get("mlp_shared")
        assert norm is not None and isinstance(gamma, nn.Conv2d)
        first = None if shared is None else next(iter(shared.children()))
        assert first is None or isinstance(first, nn.Conv2d)
        vars(self).update(
            owner=owner, counts=counts, param_free_norm=norm, mlp_shared=shared, mlp_gamma=gamma,
            mlp_beta=parts["mlp_beta"], channels=gamma.out_channels, synchronized=False,
            hidden=0 if first is None else first.out_channels, backend=None,
            label_channels=(gamma if first is None else first).in_channels, training=norm.training,
        )

    def __eq__(self, other: object) -> bool:  # tables are kept by norm, not by view of it
        return isinstance(other, ForeignNorm) and other.owner is self.owner

    def __hash__(self) -> int:
        return hash(self.owner)

    def made(self) -> ForeignNorm:
        """Itself, once the hooks that make weights of its convs have run, as in a call of each."""
        owner: nn.Module = vars(self)["owner"]
        for part in owner.modules():
            for hook in weight_hooks(part).values():
                hook(part, ())
        return self

    def count_batch(self) -> None:
        if self.counts:
            super().count_batch()


def is_plain_conv(module: nn.Module | None) -> bool:
    """Whether it is a conv that computes what nn.Conv2d does, whatever its weight comes from."""
    if not isinstance(module, nn.Conv2d):
        return False
    cls = type(module)
    return cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward


def _conv_problem(name: str, conv: nn.Module | None) -> str | None:
    if conv is None or not is_plain_conv(conv):
        return f"{name} is no plain conv"
    assert isinstance(conv, nn.Conv2d)
    k = conv.kernel_size[0]
    same = conv.kernel_size == (k, k) and k % 2 == 1 and conv.padding in ((k // 2, k // 2), "same")
    if not same or conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"{name} does not keep the size"
    if conv.padding_mode != "zeros":
        return f"{name} pads by {conv.padding_mode}"
    if conv.bias is None:
        return f"{name} has no bias"
    return None


def _norm_problem(norm: nn.Module | None) -> str | None:
    if not isinstance(norm, (_BatchNorm, _InstanceNorm)):
        return f"param_free_norm is {type(norm).__name__}"
    if isinstance(norm, _InstanceNorm) and (
            type(norm).forward is not _InstanceNorm.forward or norm.track_running_stats):
        return "param_free_norm is an instance norm of another kind"
    if norm.weight is not None or norm.bias is not None:
        return "param_free_norm has parameters"
    if norm.momentum is None:
        return "param_free_norm averages over all batches"
    return None


def structure_problem(module: nn.Module) -> str | None:
    """Why the parts are not those of a norm that can be fused; None where they are."""
    parts = module._modules
    gamma, beta, shared = (parts.get(n) for n in ("mlp_gamma", "mlp_beta", "mlp_shared"))
    problem = _norm_problem(parts.get("param_free_norm")) or _conv_problem(
        "mlp_gamma", gamma) or _conv_problem("mlp_beta", beta)
    if problem is not None:
        return problem
    assert isinstance(gamma, nn.Conv2d) and isinstance(beta, nn.Conv2d)
    source = gamma.in_channels
    if (gamma.kernel_size, gamma.groups, gamma.in_channels, gamma.out_channels) != (
            beta.kernel_size, beta.groups, beta.in_channels, beta.out_channels):
        return "mlp_gamma and mlp_beta differ"
    if shared is not None:
        layers = list(shared.children())
        if len(layers) != 2 or type(layers[1]) is not nn.ReLU:
            return "mlp_shared is no conv with ReLU"
        problem = _conv_problem("mlp_shared", layers[0])
        if problem is not None:
            return problem
        assert isinstance(layers[0], nn.Conv2d)
        if layers[0].out_channels != source or layers[0].kernel_size != gamma.kernel_size:
            return "mlp_shared does not fit mlp_gamma"
    return None


class FusedNorm(Fused):
    """``norm(x, segmap)`` through window tables or one dense conv, and one pass over x."""

    def _smis_ready(self, x: Any, segmap: Any) -> ForeignNorm | str:
        view = ForeignNorm(self, vars(self)[PLAN].counts)
        weight = next(view.mlp_gamma.parameters())  # as it is kept: a hook may have to make it yet
        if not isinstance(x, Tensor) or not serves(x, weight) or x.shape[1] != view.channels:
            return "features of another kind"
        shape: tuple[int, ...] = tuple(getattr(segmap, "shape", ()))
        if len(shape) != 4 or shape[0] != x.shape[0] or shape[1] != view.label_channels:
            return "a map of another shape"
        if isinstance(segmap, LabelLayout):
            return view
        if not isinstance(segmap, Tensor) or not serves(segmap, weight):
            return "a map of another kind"
        return _parallel_problem(self, view.param_free_norm) or view

    def _smis_run(self, ready: ForeignNorm, x: Tensor, segmap: Tensor) -> Tensor:
        return ready.made().forward(x, segmap)


def _parallel_problem(owner: nn.Module, norm: nn.Module) -> str | None:
    """Why statistics over several processes are left to the foreign norm."""
    if not norm.training or isinstance(norm, _InstanceNorm) or type(norm) is nn.BatchNorm2d:
        return None
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if type(norm) is nn.SyncBatchNorm:
        known = norm.process_group in (None, dist.group.WORLD) if several else True
        return None if known else "its norm has a process group of its own"
    if several or getattr(owner, "_is_replica", False):
        return f"{type(norm).__name__} may reduce over processes"
    return None


def _plans(module: nn.Module, arguments: tuple[str, ...]) -> list[NormPlan]:
    """What the norm may be, likeliest first."""
    norm = module.get_submodule("param_free_norm")
    known = isinstance(norm, _InstanceNorm) or type(norm) in _COUNTING
    return [NormPlan(arguments, counts) for counts in ((True,) if known else (False, True))]


def probe_inputs(norm: nn.Module, size: tuple[int, int], scale: int) -> tuple[Tensor, Tensor]:
    """Features of two images with outliers, and a one-hot map of another size with ``scale`` 2."""
    generator = torch.Generator().manual_seed(SEED)
    view = ForeignNorm(norm, counts=False)
    weight = next(view.mlp_gamma.parameters())
    x = torch.randn((2, view.channels, *size), generator=generator)
    height, width = (s * scale + scale - 1 for s in size)
    labels = torch.randint(view.label_channels, (2, height, width), generator=generator)
    planes = F.one_hot(labels, view.label_channels).permute(0, 3, 1, 2).contiguous()
    return (x * x.square().exp().clamp(max=50)).to(weight), planes.to(weight)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether it has the parts of a conditional norm, by their published names."""
    return {"param_free_norm", "mlp_gamma", "mlp_beta"} <= module._modules.keys()


def judge(module: nn.Module) -> Verdict:
    """Whether a module that looks like a norm can be fused."""
    if isinstance(module, CGNorm):
        return None, "it is fused already"
    problem = structure_problem(module)
    if problem is not None:
        return None, problem
    own = tuple(f"{name}." for name in ("param_free_norm", "mlp_shared", "mlp_gamma", "mlp_beta"))
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith(own):
            return None, f"{name} is no part of a norm"
    arguments = arguments_of(module, 2)
    if arguments is None:
        return None, "its forward does not take features and a map"
    plans, twin = _plans(module, arguments), shadow(module)

    def probe(scale: int) -> Verdict:
        x, planes = probe_inputs(twin, PROBE_SIZE, scale)
        soft = planes + 0.3 * torch.rand_like(planes)  # whose vectors do not repeat
        trials = [Trial((x, planes), True), Trial((x, planes), False, parameters=False),
                  Trial((x, soft), False, differentiable=(0, 1), parameters=False),
                  *at_scales((x, planes))]
        chosen, why = agreeing(twin, trials, [[Change(twin, FusedNorm, p)] for p in plans])
        return (None if chosen is None else plans[chosen]), why

    try:
        return probe(2)
    except CannotRun:  # some take a map of the features' size only
        return probe(1)
