"""A module's class swapped for a fused subclass of its own: parameters, state and hooks stay."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..runtime.backend import requested
from ..runtime.explain import record

PLAN = "_smis_plan"
FOLDED = "_smis_folded"  # constants made from weights: neither saved nor copied


class Accelerated(nn.Module):
    """Base of what :func:`swapped_class` puts before a module's class."""

    _smis_mixin: ClassVar[type[Accelerated]]
    _smis_original: ClassVar[type[nn.Module]]

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


def _revive(mixin: type[Accelerated], original: type[nn.Module]) -> Any:
    """An accelerated module without its state yet, for pickle and deepcopy."""
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class that the module has without acceleration."""
    return module._smis_original if isinstance(module, Accelerated) else type(module)


@dataclass(frozen=True)
class Plan:
    """What a fused forward knows beforehand: the names of the arguments that it serves."""

    arguments: tuple[str, ...]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The arguments of a call in order; None where it is a call of another kind."""
        rest = self.arguments[len(args) :]
        if len(args) > len(self.arguments) or kwargs.keys() != set(rest):
            return None
        return args + tuple(kwargs[name] for name in rest)


def arguments_of(module: nn.Module, count: int) -> tuple[str, ...] | None:
    """Names of the arguments of ``forward`` without a default; None unless they are ``count``."""
    kinds = inspect.Parameter
    parameters = list(inspect.signature(original_type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is kinds.empty
              and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    if len(needed) != count or any(p.kind is kinds.KEYWORD_ONLY for p in needed):
        return None
    return tuple(p.name for p in needed)


class Step(Protocol):
    """Something that is done to a model, and can be undone."""

    def apply(self) -> None: ...

    def undo(self) -> None: ...


@dataclass(frozen=True)
class Change:
    """A module, the fused class that goes before its own, and what that has to know."""

    module: nn.Module
    mixin: type[Accelerated]
    plan: Plan | None = None

    def apply(self) -> None:
        if self.plan is not None:
            vars(self.module)[PLAN] = self.plan
        self.module.__class__ = swapped_class(self.mixin, type(self.module))

    def undo(self) -> None:
        unswap(self.module)


def unswap(module: nn.Module) -> bool:
    """Give a module its own class again; whether it had another."""
    for key in (PLAN, FOLDED):
        vars(module).pop(key, None)
    if not isinstance(module, Accelerated):
        return False
    original: Any = module._smis_original
    module.__class__ = original
    return True


def watched(*modules: nn.Module) -> bool:
    """Whether a hook waits for a call of one of the modules."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def serves(x: Tensor, weight: Tensor | None) -> bool:
    """Whether features (N, C, H, W) are such as the original would take with this weight."""
    if x.dim() != 4 or not x.is_floating_point() or x.numel() == 0:
        return False
    if weight is None:
        return True
    cast = torch.is_autocast_enabled(x.device.type)
    return x.device == weight.device and (cast or x.dtype == weight.dtype)


class Fused(Accelerated):
    """A fused forward where it serves, else the original one; ``explain`` says which, and why."""

    def _smis_ready(self, *arguments: Any) -> Any:
        """What :meth:`_smis_run` needs; or a string, why the call is left to the original."""
        raise NotImplementedError

    def _smis_run(self, ready: Any, *arguments: Any) -> Any:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = vars(self).get(PLAN)  # a slice of a Sequential, say, is made without one
        given = None if plan is None else plan.given(args, kwargs)
        ready: Any = "called with other arguments"
        if given is not None:
            reference = requested() == "reference"
            ready = "the reference is asked for" if reference else self._smis_ready(*given)
            if not isinstance(ready, str):
                return self._smis_run(ready, *given)
        tensor = next((a for a in args if isinstance(a, Tensor)), torch.empty(0))
        record(type(self).__name__, "original", tensor, reason=ready)
        return super().forward(*args, **kwargs)
