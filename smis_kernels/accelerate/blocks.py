"""Residual blocks of conditional norm, activation and conv, each as one fused forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any

from torch import Tensor, nn

from ..modules.spade import modulate_pair
from ..modules.winograd_conv import WinogradConv2d
from ..runtime.derivatives import transformed
from ..runtime.tensors import is_channels_last
from .formats import channels_last, gradient_in_format, in_format_of, network_call
from .graph import is_plain_conv
from .norms import FusedNorm, NormPlan, probe_inputs
from .probe import PROBE_SIZE, Trial, agreeing, detached_copy, unit_outputs
from .served import ForeignNorm
from .swap import PLAN, Accelerated, AsWritten, Change, Fused, FusionPlan, arguments_of
from .watch import hooked

# Activation and slope between norm and conv, likeliest first.
_ACTIVATIONS = (("leaky_relu", 0.2), ("relu", 0.0), ("leaky_relu", 0.01), ("leaky_relu", 0.1))
_MOST_WIRINGS = 4
_Wiring = tuple[tuple[str, str], tuple[str, str], tuple[str, str] | None]


@dataclass(frozen=True)
class BlockPlan(FusionPlan):
    """Names of (norm, conv) in the order of the computation, and the shortcut's, if any."""

    first: tuple[str, str]
    second: tuple[str, str]
    shortcut: tuple[str, str] | None
    activation: str
    slope: float


def _wirings(widths: dict[str, int], convs: dict[str, nn.Conv2d]) -> Iterator[_Wiring]:
    """Every way in which two or three norms and as many convs of fitting widths make a block."""
    channels = {name: (c.in_channels, c.out_channels) for name, c in convs.items()}
    for n in permutations(widths):
        for c in permutations(convs):
            start, middle, end = widths[n[0]], widths[n[1]], channels[c[1]][1]
            fits = channels[c[0]] == (start, middle) and channels[c[1]] == (middle, end)
            if fits and len(n) == 2 and start == end:
                yield (n[0], c[0]), (n[1], c[1]), None
            elif fits and len(n) == 3 and widths[n[2]] == start and (
                    channels[c[2]] == (start, end)):
                yield (n[0], c[0]), (n[1], c[1]), (n[2], c[2])


def _parts_problem(block: nn.Module, names: set[str]) -> str | None:
    if block._parameters or block._buffers:
        return "it has parameters of its own"
    for name, child in block.named_children():
        if name not in names and next(iter(child.parameters()), None) is not None:
            return f"{name} has parameters of its own"
    return None


Reading = list[BlockPlan] | str | None  # what a block may be, or why it is none


def read(block: nn.Module, norms: dict[str, NormPlan]) -> Reading:
    """Ways in which a module may be a residual block; None where it is nothing like one.

    Args:
        norms: those of its children that are norms which can be fused, by name: two or three.
    """
    convs = {name: m for name, m in block.named_children() if isinstance(m, nn.Conv2d)}
    if len(convs) != len(norms):
        return None
    problem = _parts_problem(block, {*norms, *convs})
    arguments = arguments_of(block, 2)
    if problem is not None or arguments is None:
        return problem or "its forward does not take features and a map"
    widths = {name: plan.channels for name, plan in norms.items()}
    return [
        BlockPlan(arguments, *wiring, *active)
        for active in _ACTIVATIONS for wiring in islice(_wirings(widths, convs), _MOST_WIRINGS)
    ] or "the widths of its norms and convs fit no known block"


def judge(block: nn.Module, plans: list[BlockPlan],
          norms: dict[str, NormPlan]) -> tuple[int | None, str]:
    """Which of the plans a block agrees with; else why it does not with the first."""
    convs = [m for m in block.children() if isinstance(m, nn.Conv2d)]
    twin = detached_copy(block, keep=convs)
    unit_outputs(*(m for m in twin.children() if isinstance(m, nn.Conv2d)))
    for parameter in twin.parameters():  # weights' gradients have been seen norm by norm
        parameter.requires_grad_(parameter.requires_grad and parameter.dim() == 1)
    norm = norms[plans[0].first[0]]
    x, planes = probe_inputs(norm, next(twin.parameters()), PROBE_SIZE, 2)
    trials = [Trial((x, planes), True), Trial((x, planes), False, parameters=False)]
    inner = [Change(twin.get_submodule(name), FusedNorm, plan) for name, plan in norms.items()]
    return agreeing(twin, trials, [[*inner, *conv_changes(twin, plan), Change(
        twin, FusedBlock, plan)] for plan in plans])


class FusedConv(Accelerated, WinogradConv2d):
    """A block's conv, by Winograd's algorithm where that is faster."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # Elsewhere the output is to have the input's format.
        if is_channels_last(input) and transformed() is None:
            return super().forward(input, residual)
        y: Tensor = super(WinogradConv2d, self).forward(input)
        return y if residual is None else residual + y


def conv_changes(block: nn.Module, plan: BlockPlan) -> list[Change]:
    """The convs of a block that may be swapped."""
    convs = (block.get_submodule(name) for _, name in (plan.first, plan.second))
    return [Change(conv, FusedConv) for conv in convs if is_plain_conv(conv)]


class FusedBlock(Fused):
    """Norm and activation in one pass, both norms of the input from one read, channels-last."""

    @staticmethod
    def _smis_besides(module: nn.Module, plan: FusionPlan) -> list[nn.Module]:
        assert isinstance(plan, BlockPlan)
        pairs = (plan.first, plan.second, *([plan.shortcut] if plan.shortcut else []))
        return [module.get_submodule(name) for pair in pairs for name in pair]

    def _smis_ready(self, x: Any, segmap: Any) -> list[ForeignNorm] | AsWritten | str:
        plan: BlockPlan = vars(self)[PLAN]
        names = [plan.first[0], plan.second[0]] + ([plan.shortcut[0]] if plan.shortcut else [])
        norms = [self._modules.get(name) for name in names]
        views: list[ForeignNorm] = []
        small: AsWritten | None = None
        for name, norm in zip(names, norms, strict=True):
            if not isinstance(norm, FusedNorm) or hooked(norm):
                return f"{name} is not fused, or has hooks"
            # The features of norm_1 are not there yet; they have x's dtype and batch size.
            width = vars(norm)[PLAN].channels
            like = x if name != plan.second[0] else _like(x, width)
            view = norm._smis_changed() or norm._smis_ready(like, segmap)
            if isinstance(view, str):
                return f"{name}: {view}"
            if isinstance(view, AsWritten):
                small = view
            else:
                views.append(view)
        return small or views

    def _smis_run(self, ready: list[ForeignNorm], x: Tensor, segmap: Tensor) -> Tensor:
        plan: BlockPlan = vars(self)[PLAN]
        active: dict[str, Any] = {"activation": plan.activation, "negative_slope": plan.slope}
        conv_0, conv_1 = self._modules[plan.first[1]], self._modules[plan.second[1]]
        assert conv_0 is not None and conv_1 is not None
        norm_0, norm_1, *rest = ready
        with network_call():
            h = shortcut = channels_last(gradient_in_format(x))
            if rest:
                h, shortcut = _both(norm_0, rest[0], h, segmap, active)
                assert plan.shortcut is not None
                shortcut = self.get_submodule(plan.shortcut[1])(shortcut)
            else:
                h = norm_0.forward(h, segmap, **active)
            h = norm_1.forward(conv_0(h), segmap, **active)
            if isinstance(conv_1, FusedConv) and not hooked(conv_1, weights=False):
                out: Tensor = conv_1(h, shortcut)
            else:  # a hook is to see what the conv was written to take and to return
                out = shortcut + conv_1(h)
        result: Tensor = in_format_of(out, x)
        return result


def _both(norm_0: ForeignNorm, norm_s: ForeignNorm, x: Tensor, segmap: Tensor,
          active: dict[str, Any]) -> tuple[Tensor, Tensor]:
    pair = norm_0.shares_features and norm_s.shares_features
    if pair and norm_0.shared_arguments() == norm_s.shared_arguments():
        return modulate_pair(norm_0, norm_s, x, segmap, **active)
    return norm_0.forward(x, segmap, **active), norm_s.forward(x, segmap)


def _like(x: Any, width: int) -> Any:
    """A stand-in of another width, without memory."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    return x.detach().new_empty(1).expand(x.shape[0], width, *x.shape[2:])
