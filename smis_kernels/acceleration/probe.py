"""Structure does not show what a forward computes: original and fused are run and compared."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..runtime.backend import use_backend
from ..runtime.path import use_path
from .swap import Change, FusionPlan, at_any_size
from .watch import Settings, weight_hooks

SEED = 3
PROBE_SIZE = (3, 4)
Verdict = tuple[FusionPlan | None, str]  # what a module can become, or why it cannot
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Of the largest output, and in gradients of the norm: a kink may fall on either side there.
_TOLERANCES = {torch.float64: (1e-8, 1e-2), torch.float32: (1e-4, 2e-2)}
_LOW_PRECISION = (5e-2, 2e-1)
_WIDENED = 1e-5  # some compute statistics in float32 whatever their input is


def _noise(like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    # Repeated with a prime period: drawing tens of millions of numbers would take a second.
    drawn = torch.randn(65_537, generator=generator, device="cpu") * scale
    times = -(-like.numel() // len(drawn))
    flat = drawn.repeat(times) if times > 1 else drawn
    return flat[: like.numel()].view(like.shape).to(like.device, like.dtype)


def _random_parameter(name: str, p: Tensor, generator: torch.Generator) -> nn.Parameter:
    """Values at which no term of a formula is small beside another."""
    if p.dim() > 1:
        value = _noise(p, (2.0 / max(1, p[0].numel())) ** 0.5, generator)
    else:
        value = _noise(p, 0.5, generator)
        if name.rpartition(".")[2] == "weight":
            value = value + 1
    return nn.Parameter(value)


def detached_copy(module: nn.Module, keep: Sequence[nn.Module] = ()) -> nn.Module:
    """A copy to experiment on: random parameters, buffers of its own, none of the user's hooks.

    Parameters inside ``keep`` are shared instead, and ask for no gradient.
    """
    generator = torch.Generator().manual_seed(SEED)
    memo: dict[int, Any] = {}
    kept = {id(p) for part in keep for p in part.parameters()}
    for name, p in module.named_parameters():
        memo[id(p)] = (nn.Parameter(p.detach(), requires_grad=False) if id(p) in kept
                       else _random_parameter(name, p, generator))
    for part in module.modules():
        for name in _HOOKS:
            hooks = vars(part).get(name)
            if hooks is not None:
                memo[id(hooks)] = type(hooks)()
        memo[id(part._forward_pre_hooks)] = OrderedDict(weight_hooks(part))
        for value in vars(part).values():
            if isinstance(value, Tensor):  # a weight that a hook has made
                memo[id(value)] = value
        group = vars(part).get("process_group")
        if group is not None:  # which cannot be copied
            memo[id(group)] = group
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        if isinstance(part, _NormBase) and part.running_mean is not None:
            assert part.running_var is not None
            part.running_mean.copy_(_noise(part.running_mean, 0.3, generator))
            part.running_var.copy_(_noise(part.running_var, 0.3, generator).abs() + 0.5)
    return twin


def probe_size(module: nn.Module) -> tuple[int, int]:
    """Height and width of features to try a module on, which no padding in it reaches across."""
    widths = [0]
    for part in module.modules():
        if isinstance(part, (nn.ReflectionPad2d, nn.CircularPad2d)):
            widths += part.padding
        elif isinstance(part, nn.Conv2d) and part.padding_mode != "zeros":
            widths += part._reversed_padding_repeated_twice
    height, width = PROBE_SIZE
    return max(height, max(widths) + 1), max(width, max(widths) + 2)


def unit_outputs(*convs: nn.Module) -> None:
    """Scale the outputs of a copy's convs to one, so that no weight can hide what follows."""
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * output.detach().square().mean().clamp_min(1e-30).rsqrt()

    for conv in convs:
        conv.register_forward_hook(hook)


@dataclass(frozen=True)
class Trial:
    """One call to compare: inputs, the mode, and what gets gradients: inputs and parameters."""

    inputs: tuple[Tensor, ...]
    training: bool
    differentiable: tuple[int, ...] = (0,)
    parameters: bool = True
    scale: float | None = None  # of features and their statistics; then all is in float64
    frozen: bool = False  # the parts are in the other mode
    path: str = "auto"
    features: int = 0  # which input they are

    def swapped(self) -> Trial:
        """The same trial of a forward that takes its two inputs the other way round."""
        return replace(self, inputs=self.inputs[::-1], features=1,
                       differentiable=tuple(1 - i for i in self.differentiable))


def at_scales(inputs: tuple[Tensor, ...]) -> list[Trial]:
    """Trials in float64 at several scales of the features, where another place of eps shows.

    One channel is constant; training takes two steps, so that statistics have a past.
    """
    x, *rest = inputs
    x = x.clone()
    x[:, -1] = 0.5  # as the scales a power of two: exactly zero once the mean is off
    scaled = [Trial((x, *rest), training, parameters=False, scale=scale)
              for scale in (2.0**-10, 1.0, 2.0**10)
              for training in (True, False)]
    return [*scaled, *(Trial((x, *rest), training, parameters=False, scale=1.0, frozen=True)
                       for training in (True, False))]


@dataclass(frozen=True)
class _Outcome:
    output: Tensor
    gradients: Sequence[Tensor | None]
    buffers: dict[str, Tensor]
    widened: bool


@contextmanager
def _scaled(module: nn.Module, scale: float | None) -> Iterator[None]:
    """The module in float64, its running statistics as features of this scale would have them."""
    if scale is None:
        yield
        return
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    kept = [t.data for t in tensors]
    factors = {"running_mean": scale, "running_var": scale**2}
    try:
        for t in tensors:
            t.data = t.data.double()
        for name, buffer in module.named_buffers():
            buffer.mul_(factors.get(name.rpartition(".")[2], 1))
        yield
    finally:
        for t, data in zip(tensors, kept, strict=True):
            t.data = data


def _run(module: nn.Module, trial: Trial) -> _Outcome:
    with _scaled(module, trial.scale), use_path(trial.path), at_any_size():
        return _run_as_it_is(module, trial)


def _run_as_it_is(module: nn.Module, trial: Trial) -> _Outcome:
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train(trial.training)
    if trial.frozen:
        for child in module.children():
            child.train(not trial.training)
    inputs = [x.clone() for x in trial.inputs]
    if trial.scale is not None:
        inputs = [x.double() if x.is_floating_point() else x for x in inputs]
        inputs[trial.features].mul_(trial.scale)
        if trial.training:  # the step before
            with torch.no_grad():
                module(*(2 * x.flip(0) if i == trial.features else x.flip(0)
                         for i, x in enumerate(inputs)))
    inputs = [x.requires_grad_(i in trial.differentiable) for i, x in enumerate(inputs)]
    wanted = [inputs[i] for i in trial.differentiable]
    if trial.parameters:
        wanted += [p for p in module.parameters() if p.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        output = module(*inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"it returns {type(output).__name__}, not a tensor")
    generator = torch.Generator().manual_seed(SEED)
    gradients = list(torch.autograd.grad(
        output, wanted, _noise(output, 1.0, generator), allow_unused=True)) if wanted else []
    after = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])
    return _Outcome(output.detach(), gradients, after, trial.scale is not None)


def _differs(a: Tensor | None, b: Tensor | None, tolerance: float, norm: float,
             floor: float = 1e-30) -> str | None:
    if a is None or b is None:
        present = a if b is None else b
        missing = present is None or not bool(present.any())
        return None if missing else "is missing"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {a.dtype} {tuple(a.shape)}, fused {b.dtype} {tuple(b.shape)}"
    if not a.is_floating_point():
        return None if torch.equal(a, b) else "differs"
    a, b = a.flatten(), b.flatten()
    scale = float(torch.linalg.vector_norm(a, norm))
    error = float(torch.linalg.vector_norm(a - b, norm)) / max(scale, floor)
    return None if error <= tolerance else f"differs by {error:.1e} of its size"


def _compare(original: _Outcome, fused: _Outcome) -> str | None:
    forward, backward = _TOLERANCES.get(original.output.dtype, _LOW_PRECISION)
    if original.widened:
        forward = _WIDENED
    problem = _differs(original.output, fused.output, forward, float("inf"))
    if problem is not None:
        return f"output {problem}"
    for name, buffer in original.buffers.items():
        problem = _differs(buffer, fused.buffers[name], forward, float("inf"))
        if problem is not None:
            return f"buffer {name} {problem}"
    largest = max((float(torch.linalg.vector_norm(g.float())) for g in original.gradients
                   if g is not None), default=0.0)
    # What a norm takes off again, as a bias before it, has a gradient of rounding errors only.
    floor = max(1e-30, 1e4 * torch.finfo(original.output.dtype).eps * largest)
    for a, b in zip(original.gradients, fused.gradients, strict=True):
        problem = _differs(a, b, backward, 2, floor)
        if problem is not None:
            return f"a gradient {problem}"
    return None


@contextmanager
def default_modes(module: nn.Module) -> Iterator[None]:
    """Set random state, grad mode, autocast and backend aside for a probe, and put them back."""
    devices = {t.device for t in (*module.parameters(), *module.buffers())}
    cuda = [d for d in devices if d.type == "cuda"]
    kinds = {d.type for d in devices} | {"cpu"}
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad(), \
            use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(SEED)
        saved = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        try:
            yield
        finally:
            for kind, enabled in saved.items():
                torch.set_autocast_enabled(kind, enabled)


def _left(changes: Sequence[Change]) -> str | None:
    """Why a fused form, which then agrees with itself, left a call to the original."""
    for change in changes:
        for reason in change.calls:
            return f"the fused form does not serve the probe: {reason}"
    return None


class CannotRun(Exception):
    """The original forward refuses the probe's inputs."""


def agreeing(twin: nn.Module, trials: Sequence[Trial], changes: Sequence[Sequence[Change]],
             ) -> tuple[int | None, str]:
    """Which of several ways to fuse the twin agrees with it in all trials; else why the first not.

    Raises:
        CannotRun: whatever foreign code raises; the message is one line.
    """
    if any("forward" in vars(part) for part in twin.modules()):
        raise CannotRun("a forward was put on it, or on a part of it, that is not its class's")
    settings = Settings(twin)
    try:
        originals = [_run(twin, trial) for trial in trials]
    except Exception as error:
        raise CannotRun(f"the probe cannot run it: {_line(error)}") from error
    written = settings.change()
    if written is not None:
        raise CannotRun(f"its forward writes attributes: {written} after a call")
    if not all(bool(o.output.isfinite().all()) for o in originals):
        raise CannotRun("the probe's outputs are not finite")
    reason = ""
    for i, each in enumerate(changes):
        try:
            for change in each:
                change.apply()
            problems = (_compare(o, _run(twin, t)) for o, t in zip(originals, trials, strict=True))
            problem = next((p for p in problems if p is not None), None) or _left(each)
        except Exception as error:
            problem = f"the fused forward raises {_line(error)}"
        finally:
            for change in each:
                change.undo()
        if problem is None:
            return i, ""
        reason = reason or f"another forward: {problem}"
    return None, reason


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
