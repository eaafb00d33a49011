"""A module's class swapped for a fused subclass of its own: parameters, state and hooks stay."""

from __future__ import annotations

import inspect
import threading
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..runtime.backend import requested
from ..runtime.derivatives import transformed
from ..runtime.explain import record
from .watch import Settings, hooked, is_injected, original_type, without_injected

PLAN = "_smis_plan"
SETTINGS = "_smis_settings"  # what the module was like when its plan was made
CALLS = "_smis_calls"  # reasons for which calls were left to the original, counted
FOLDED = "_smis_folded"  # constants made from weights: neither saved nor copied
_OF_A_CLASS = ("__dict__", "__weakref__", "__slotnames__")  # which another makes anew
_INJECTED = "_smis_injected"  # a parametrized module's class as it was before it was swapped
REPLAYS = "_smis_replays"  # CUDA graphs of a network's calls, of which a copy makes its own


class Accelerated(nn.Module):
    """Base of what :func:`swapped_class` puts before a module's class."""

    _smis_mixin: ClassVar[type[Accelerated]]
    _smis_original: ClassVar[type[nn.Module]]

    @staticmethod
    def _smis_besides(module: nn.Module, plan: FusionPlan) -> Sequence[nn.Module]:
        """Parts that are called as modules, or watch themselves."""
        return ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class of both cannot be imported by its name; its two parts can.
        getstate = getattr(self, "__getstate__", None)  # every object's from Python 3.11 on
        state = vars(self) if getstate is None else getstate()
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != FOLDED}
        return _revive, (self._smis_mixin, self._smis_original), state


_classes: dict[tuple[type[Any], type[Any]], Any] = {}


def swapped_class(mixin: type[Accelerated], original: type[nn.Module]) -> Any:
    """The subclass of both, one for each pair."""
    known = _classes.get((mixin, original))
    if known is not None:
        return known
    body = {"_smis_mixin": mixin, "_smis_original": original, "__module__": original.__module__,
            "__doc__": original.__doc__}
    made = types.new_class("Accelerated" + original.__name__, (mixin, original), {},
                           lambda namespace: namespace.update(body))
    return _classes.setdefault((mixin, original), made)


def _made(cls: type) -> set[str]:
    """The tensors that parametrizations of a class make."""
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def _on(base: Any, cls: Any) -> Any:
    """The base; beneath what parametrizations have put on a module of class ``cls``.

    There they expect to be the outermost, so that they can be taken off again.
    """
    if not is_injected(cls):
        return base
    before: Any = vars(cls).get(_INJECTED)
    if before is not None and before.__bases__[0] is base and _made(before) == _made(cls):
        return before  # the very class that the module had
    own = {k: v for k, v in vars(cls).items() if k not in (*_OF_A_CLASS, _INJECTED)}
    if before is None:
        own[_INJECTED] = cls
    name = f"Parametrized{base.__name__}"
    return types.new_class(name, (base,), {}, lambda namespace: namespace.update(own))


def _revive(mixin: type[Accelerated], original: type[nn.Module]) -> Any:
    """An accelerated module without its state yet, for pickle and deepcopy."""
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)


@dataclass(frozen=True)
class FusionPlan:
    """What a fused forward knows beforehand: the names of the arguments that it serves."""

    arguments: tuple[str, ...]

    def given(self, cls: type[nn.Module], args: tuple[Any, ...],
              kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The arguments of a call in order; None where it is a call of another kind.

        Others may be given as long as they are the defaults that they have without.
        """
        if self.arguments and self.arguments[-1][0] == "*":
            return args if len(args) == len(self.arguments) and not kwargs else None
        rest = self.arguments[len(args) :]
        if len(args) <= len(self.arguments) and kwargs.keys() == set(rest):
            return args + tuple(kwargs[name] for name in rest)
        parameters = _parameters(cast(Any, cls))
        if len(args) > len(parameters):
            return None
        found = {**dict(zip(parameters, args, strict=False)), **kwargs}
        for name in found.keys() - set(self.arguments):
            if name not in parameters or found[name] is not parameters[name].default:
                return None
        missing = any(name not in found for name in self.arguments)
        return None if missing else tuple(found[name] for name in self.arguments)


@cache
def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """The parameters of ``forward``, without self and those of variable number."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(cls.forward).parameters.items())[1:]
    return {name: p for name, p in parameters if p.kind not in variable}


def arguments_of(module: nn.Module, count: int) -> tuple[str, ...] | None:
    """Names of the arguments of ``forward`` without a default; None unless they are ``count``.

    The last may be the first of any number, as in ``def forward(self, x, *maps)``.
    """
    kinds = inspect.Parameter
    parameters = list(inspect.signature(original_type(module).forward).parameters.values())[1:]
    more = [p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL]
    needed = [p for p in parameters if p.default is kinds.empty
              and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    if any(p.kind is kinds.KEYWORD_ONLY for p in needed):
        return None
    names = tuple(p.name for p in needed)
    if more and len(names) == count - 1 and len(parameters) - len(names) <= 2:
        return (*names, f"*{more[0]}")
    return names if len(names) == count else None


class Step(Protocol):
    """Something that is done to a model, and can be undone."""

    def apply(self) -> None: ...

    def undo(self) -> None: ...


@dataclass(frozen=True)
class Change:
    """A module, the fused class that goes before its own, and what that has to know."""

    module: nn.Module
    mixin: type[Accelerated]
    plan: FusionPlan | None = None
    settings: Settings | None = None
    calls: Counter[str] = field(default_factory=Counter, compare=False)

    def apply(self) -> None:
        if self.plan is not None:
            besides = self.mixin._smis_besides(self.module, self.plan)
            settings = self.settings or Settings(self.module, besides)
            vars(self.module).update({PLAN: self.plan, SETTINGS: settings, CALLS: self.calls})
        cls: Any = type(self.module)
        self.module.__class__ = _on(swapped_class(self.mixin, without_injected(cls)), cls)

    def undo(self) -> None:
        unswap(self.module)


def unswap(module: nn.Module) -> bool:
    """Give a module its own class again; whether it had another."""
    for key in (PLAN, SETTINGS, CALLS, FOLDED, REPLAYS):
        vars(module).pop(key, None)
    if not isinstance(module, Accelerated):
        return False
    module.__class__ = _on(module._smis_original, type(module))
    return True


def serves(x: Tensor, weight: Tensor | None) -> bool:
    """Whether features (N, C, H, W) are such as the original would take with this weight."""
    if x.dim() != 4 or not x.is_floating_point() or x.numel() == 0:
        return False
    if weight is None:
        return True
    cast = torch.is_autocast_enabled(x.device.type)
    return x.device == weight.device and (cast or x.dtype == weight.dtype)


class _Sizes(threading.local):
    """Whether small calls take the fused forms too."""

    any = False


_sizes = _Sizes()


@contextmanager
def at_any_size() -> Iterator[None]:
    """Fused forms also for calls so small that the original is faster: to see what they compute."""
    before, _sizes.any = _sizes.any, True
    try:
        yield
    finally:
        _sizes.any = before


def is_small(tensor: Tensor, work: float, least: float) -> bool:
    """Whether a call on the CPU is too small for its fused form to be faster."""
    return work < least and tensor.is_cpu and not _sizes.any


class Fused(Accelerated):
    """A fused forward where it serves, else the original one; ``explain`` says which, and why."""

    def _smis_ready(self, *arguments: Any) -> Any:
        """What :meth:`_smis_run` needs; or a string, why the call is left to the original."""
        raise NotImplementedError

    def _smis_small(self, *arguments: Any) -> bool:
        """Whether a call is so small that it is faster as it was written."""
        return False

    def _smis_run(self, ready: Any, *arguments: Any) -> Any:
        raise NotImplementedError

    def _smis_changed(self) -> str | None:
        """What is no longer as it was probed; hooks inside count, the module's own are called."""
        if torch.compiler.is_compiling():
            return None
        settings: Settings = vars(self)[SETTINGS]
        # A replica of DataParallel is made anew for each call, of what is watched.
        if settings.owner is not self and "_is_replica" not in vars(self):
            return "it is a shallow copy of an accelerated one"
        if settings.is_as_noted():
            return None
        if hooked(*settings.modules[1:], weights=False):
            return "a part of it has hooks"
        change = settings.change()
        if change is not None:
            return f"{change} since accelerate()"
        settings.note()
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan: FusionPlan | None = vars(self).get(PLAN)  # a slice of a Sequential has none
        given = None if plan is None else plan.given(original_type(self), args, kwargs)
        if given is not None and self._smis_small(*given):  # the original, so nothing can be stale
            record(type(self).__name__, "original", _first_tensor(args),
                   reason="so small that it is faster as it was written")
            return super().forward(*args, **kwargs)
        reason: str | None = transformed()
        expected = reason is not None or requested() == "reference"
        if reason is None and expected:
            reason = "the reference is asked for"
        if reason is None:
            settings: Settings | None = vars(self).get(SETTINGS)
            once = settings is not None and settings.parametrized
            # A weight that a parametrization makes is made once in a call, as the original does.
            with parametrize.cached() if once else nullcontext():
                ready = "called with other arguments" if given is None else (
                    self._smis_changed() or self._smis_ready(*given))
                if not isinstance(ready, str):
                    assert given is not None
                    return self._smis_run(ready, *given)
            reason = ready
        if reason is not None and not torch.compiler.is_compiling():
            self._smis_note(reason, args, expected)
        return super().forward(*args, **kwargs)

    def _smis_note(self, reason: str, args: tuple[Any, ...], expected: bool) -> None:
        record(type(self).__name__, "original", _first_tensor(args), reason=reason)
        calls: Counter[str] = vars(self).setdefault(CALLS, Counter())
        calls[reason] += 1
        if not expected and calls[reason] == 1:
            name = original_type(self).__name__
            warnings.warn(f"accelerate: {name} runs its original forward: {reason}", stacklevel=2)


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next((a for a in args if isinstance(a, Tensor)), torch.empty(0))
