"""What a result depends on besides its inputs, watched: values of tensors, settings, hooks."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..ops.content_digest.stamp import content, identity

OWN = "_smis_"  # prefix of what acceleration keeps on a module
_INTERNAL = {*vars(nn.Module()), "training", "_compiled_call_impl"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_backward_pre_hooks", "_global_backward_hooks",
                 "_global_forward_hooks", "_global_forward_pre_hooks")
# What torch's layers call of themselves, beside ``forward``: people put their own there, too.
_CALLED = ("forward", "_conv_forward", "_apply_instance_norm", "_output_padding")
_DEPTH = 3  # to which containers and plain objects are looked into


def weight_hooks(module: nn.Module) -> dict[int, Any]:
    """The pre-hooks that compute a weight, which belong to the module rather than to its user."""
    return {key: hook for key, hook in module._forward_pre_hooks.items()
            if isinstance(hook, (SpectralNorm, WeightNorm))}


def make_weight(module: nn.Module) -> None:
    """Run the hooks that make a weight, as a call of the module does, before the weight is read."""
    for hook in weight_hooks(module).values():
        hook(module, ())


def hooked(*modules: nn.Module, weights: bool = True) -> bool:
    """Whether a call of one of the modules does more than its class's ``forward``.

    Hooks, those of all modules too, and a ``forward``, or what torch's calls, of the instance's
    own; pre-hooks that compute a weight only with ``weights``.
    """
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return True
    for m in modules:
        own = vars(m)
        if is_patched(m):
            return True
        if any(own[name] for name in _HOOKS):
            ours = not weights and len(weight_hooks(m)) == len(own["_forward_pre_hooks"])
            others = any(own[name] for name in _HOOKS if name != "_forward_pre_hooks")
            if not ours or others:
                return True
    return False


def is_patched(module: nn.Module) -> bool:
    """Whether the instance has a method of its own where its class has one that a call runs."""
    own = vars(module)
    return any(callable(own.get(name)) for name in _CALLED)


class _Same:
    """An object that only itself equals."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_BUILTIN = ("builtins", "typing", "abc")  # where no class can be changed, or none should be
_FIXED = (*_PLAIN, type, types.FunctionType, types.BuiltinFunctionType, property, staticmethod,
          classmethod)


def _fixed(value: Any) -> bool:
    """Whether nothing of it can change in place."""
    return isinstance(value, _FIXED) or (isinstance(value, tuple) and all(map(_fixed, value)))


def _state_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object, those in slots too; None of what has none of its own.

    Functions and classes are taken for what they are, and so are torch's objects that can be
    called, which keep what calls of them have found.
    """
    if isinstance(value, _FIXED) or (
            callable(value) and type(value).__module__.partition(".")[0] == "torch"):
        return None
    own = getattr(value, "__dict__", None)
    names = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    if not isinstance(own, dict):
        return {name: getattr(value, name) for name in names} if names else None
    return {**own, **{name: getattr(value, name) for name in names}}


def _slots(cls: type) -> tuple[str, ...]:
    found = vars(cls).get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name[:2] != "__")


def _content_of(value: Any, depth: int = _DEPTH) -> Any:
    """What can be compared with the value later on, even if it is changed in place."""
    if isinstance(value, _PLAIN):
        return (type(value), repr(value) if isinstance(value, (float, complex)) else value)
    if isinstance(value, Tensor):
        return (_Same(value), identity(value), value.requires_grad,
                None if value.is_meta else int(content(value)))
    if depth and isinstance(value, Mapping):
        return (type(value), [(_content_of(k, depth - 1), _content_of(v, depth - 1))
                              for k, v in value.items()])
    if depth and isinstance(value, (list, tuple, deque)):
        return (type(value), [_content_of(v, depth - 1) for v in value])
    if depth and isinstance(value, (set, frozenset)):
        return (type(value), sorted(map(repr, value)))
    if hasattr(value, "tobytes"):  # numpy's
        return (type(value), getattr(value, "dtype", None), getattr(value, "shape", None),
                value.tobytes())
    if isinstance(value, nn.Module):
        return (_Same(value), _content_of(_plain_of(value), depth - 1) if depth > 1 else None)
    if isinstance(value, types.MethodType):  # made anew at each access
        owner = value.__self__
        of_module = isinstance(owner, nn.Module)
        return value.__func__, _Same(owner) if of_module else _content_of(owner, max(depth - 1, 0))
    # At the last depth what is gathered here could only be compared by its own identity.
    if depth > 1 and isinstance(value, partial):
        return (_Same(value), _content_of([value.func, value.args, value.keywords], depth - 1))
    own = _state_of(value) if depth > 1 else None
    if own is not None:
        return (_Same(value), _content_of(own, depth - 1))
    return _Same(value)


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without acceleration and without parametrizations."""
    cls = without_injected(type(module))
    original: type[nn.Module] = getattr(cls, "_smis_original", cls)
    return original


def without_injected(cls: type[nn.Module]) -> type[nn.Module]:
    """A class, or what it extends where it is one that parametrizations have put on a module."""
    return cast("type[nn.Module]", cls.__bases__[0]) if is_injected(cls) else cls


def is_injected(cls: type) -> bool:
    """Whether it is the class of one module, made by ``register_parametrization``."""
    return cls.__module__ == parametrize.__name__ and cls.__name__.startswith("Parametrized")


def _plain_of(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes: neither torch's, nor ours, nor weights that its hooks make."""
    made = {hook.name for hook in weight_hooks(module).values()}
    return {k: v for k, v in vars(module).items()
            if k not in _INTERNAL and k not in made and not k.startswith(OWN)}


class _Values:
    """Named values as they were."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {k: (v, _fixed(v), _content_of(v)) for k, v in values.items()}

    def change(self, now: Mapping[str, Any]) -> str | None:
        """A name whose value is another one, or there no longer or not before."""
        if now.keys() != self._values.keys():
            return min(now.keys() ^ self._values.keys())
        return next((k for k, v in now.items() if not self.holds(k, v)), None)

    def holds(self, name: str, value: Any) -> bool:
        """Whether a value is what it was."""
        before, fixed, content = self._values[name]
        return (fixed and value is before) or bool(_content_of(value) == content)

    def __getstate__(self) -> dict[str, Any]:  # contents suffice
        return {"_values": {k: (None, False, c) for k, (_, _, c) in self._values.items()}}


def _methods(cls: type) -> dict[str, Any]:
    if cls.__module__.startswith("torch."):
        return {name: vars(cls)[name] for name in _CALLED if name in vars(cls)}
    return {k: v for k, v in vars(cls).items() if k[:2] != "__"}


class _Part:
    """One module: its class, children, attributes, and which parameters and buffers it has."""

    def __init__(self, name: str, module: nn.Module, hooks: bool) -> None:
        self.name, self.module = name, module
        self.hooks = self._hooks() if hooks else None
        self.type = original_type(module)
        self.children = tuple(module._modules.items())
        self.attributes = _Values(_plain_of(module))
        self.present = self._present()

    def _present(self) -> list[tuple[str, bool]]:
        m = self.module
        return [(k, t is None) for k, t in (*m._parameters.items(), *m._buffers.items())]

    def _hooks(self) -> list[_Same]:
        own = vars(self.module)
        return [_Same(hook) for name in _HOOKS for hook in own[name].values()]

    def change(self) -> str | None:
        m = self.module
        if self.hooks is not None and self._hooks() != self.hooks:
            return "other hooks"
        if original_type(m) is not self.type:
            return "another class"
        now = tuple(m._modules.items())
        if len(now) != len(self.children) or any(
                a != b or x is not y
                for (a, x), (b, y) in zip(now, self.children, strict=True)):
            return "other parts"
        if self._present() != self.present:
            return "other parameters or buffers"
        attribute = self.attributes.change(_plain_of(m))
        return None if attribute is None else f"another {attribute}"

    def identities(self, outermost: bool) -> tuple[Any, ...]:
        """What :func:`_is_as_it_was` compares."""
        m, own = self.module, vars(self.module)
        plain = _plain_of(m)
        return (
            m, type(m), len(own), tuple(own["_modules"].items()),
            tuple((k, t is None) for k, t in own["_parameters"].items()),
            tuple((k, t is None) for k, t in own["_buffers"].items()),
            tuple((k, v) for k, v in plain.items() if _fixed(v)),
            tuple((k, self.attributes) for k, v in plain.items() if not _fixed(v)),
            None if outermost else tuple(tuple(own[name].values()) for name in _HOOKS),
        )


def _is_as_it_was(module: nn.Module, cls: type, size: int, children: tuple[Any, ...],
                  parameters: tuple[Any, ...], buffers: tuple[Any, ...], fixed: tuple[Any, ...],
                  others: tuple[Any, ...], hooks: tuple[Any, ...] | None) -> bool:
    """Whether a part is what it was, by identities alone: one that is not may be equal still."""
    own = module.__dict__
    if type(module) is not cls or len(own) != size or len(own["_modules"]) != len(children):
        return False
    for key, value in fixed:
        if own.get(key, own) is not value:
            return False
    if children:
        for (a, x), (b, y) in zip(own["_modules"].items(), children, strict=True):
            if x is not y or a != b:
                return False
    for name, tensors in (("_parameters", parameters), ("_buffers", buffers)):
        held = own[name]
        if len(held) != len(tensors):
            return False
        for key, none in tensors:
            if (held.get(key, own) is None) is not none or key not in held:
                return False
    for key, values in others:
        if key not in own or not values.holds(key, own[key]):
            return False
    if hooks is not None:
        for name, before in zip(_HOOKS, hooks, strict=True):
            now = own[name]
            if len(now) != len(before) or (before and any(
                    a is not b for a, b in zip(now.values(), before, strict=True))):
                return False
    return True


class Settings:
    """Whatever decides what a module computes but tensors' values, inputs and the training mode.

    Classes, their methods and class attributes; the parts; plain attributes (numbers, containers,
    tensors and objects by content, without what these objects have of their classes); with
    ``hooks`` those too. Globals that a forward reads are not seen. Parts ``besides`` are left out.
    """

    def __init__(self, module: nn.Module, besides: Sequence[nn.Module] = (), *,
                 hooks: bool = False) -> None:
        left = {id(m) for part in besides for m in part.modules()}
        self._parts = [_Part(name, m, hooks) for name, m in module.named_modules()
                       if id(m) not in left]
        self.parametrized = any(isinstance(p.module, ParametrizationList) for p in self._parts)
        self._classes: dict[type, _Values] | None = None
        self._quick: tuple[list[Any], list[Any]] | None = None
        self._note_classes()

    def _note_classes(self) -> None:
        classes = {c for p in self._parts for c in p.type.__mro__  # those of plain mixins too
                   if c is not nn.Module and c.__module__ not in _BUILTIN}
        self._classes = {c: _Values(_methods(c)) for c in classes}

    def note(self) -> None:
        """All is as it was and no part has hooks: what is so by identity need not be looked into.

        A comparison of these identities is what a call usually costs.
        """
        assert self._classes is not None
        classes = []
        for cls, values in self._classes.items():
            now = _methods(cls)
            classes.append((
                vars(cls), len(vars(cls)),
                [(k, v) for k, v in now.items() if _fixed(v) and k in vars(cls)],
                [(k, values) for k, v in now.items() if not _fixed(v)]))
        self._quick = ([part.identities(i == 0) for i, part in enumerate(self._parts)], classes)

    def is_as_noted(self) -> bool:
        """Whether all has the identity that it had when it was noted, the hooks of parts too."""
        if self._quick is None or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            return False
        parts, classes = self._quick
        for part in parts:
            if not _is_as_it_was(*part):
                return False
        for own, size, fixed, others in classes:
            if len(own) != size:
                return False
            for key, value in fixed:
                if own.get(key, own) is not value:
                    return False
            for key, values in others:
                if key not in own or not values.holds(key, own[key]):
                    return False
        return True

    @property
    def owner(self) -> nn.Module:
        """The outermost of those that are watched."""
        return self._parts[0].module

    @property
    def modules(self) -> list[nn.Module]:
        """Those that are watched, the outermost first."""
        return [p.module for p in self._parts]

    def change(self) -> str | None:
        """What is no longer as it was; None where nothing has changed."""
        for part in self._parts:
            found = part.change()
            if found is not None:
                return f"{part.name or 'it'} has {found}"
        if self._classes is None:  # read from a file: classes are what they are here
            self._note_classes()
        assert self._classes is not None
        for cls, values in self._classes.items():
            attribute = values.change(_methods(cls))
            if attribute is not None:
                return f"{cls.__name__} has another {attribute}"
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_classes": None, "_quick": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        memo[id(self)] = twin = Settings.__new__(Settings)
        vars(twin).update(_parts=copy.deepcopy(self._parts, memo), parametrized=self.parametrized,
                          _classes=self._classes, _quick=None)
        return twin
