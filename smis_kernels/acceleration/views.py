"""Layers whose code takes views of their input, which channels-last features do not have."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .watch import hooked, original_type

# Methods of a tensor that raise, or return something else, where its memory has another order.
_VIEWS = {"view", "view_as", "view_as_complex", "as_strided", "is_contiguous", "data_ptr"}
_KNOWN = ("torch", "smis_kernels", "builtins", "typing")  # whose layers take any order
_DEPTH = 3  # to which functions are followed that a function calls
_found: WeakKeyDictionary[types.FunctionType, bool] = WeakKeyDictionary()


def may_view(layer: nn.Module) -> bool:
    """Whether a call of a layer runs code that may take a view of features, or keep them for one.

    Hooks may; a layer's own code is read.
    """
    if torch.compiler.is_compiling():  # in which no code is read
        return not _known(original_type(layer))
    return any(hooked(part, weights=False) or isinstance(part, torch.jit.ScriptModule)
               or any(map(_views, _methods(part))) for part in layer.modules())


def _known(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _KNOWN


def _methods(module: nn.Module) -> Iterator[Any]:
    for cls in original_type(module).__mro__:
        if not _known(cls):
            yield from (value for name, value in vars(cls).items() if name != "__init__")


def _views(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a function, or one that it calls, names one of the methods."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if not isinstance(value, types.FunctionType) or _known(value):
        return False
    if value not in _found:
        _found[value] = False  # where it calls itself
        names = set(_names(value.__code__))
        _found[value] = bool(names & _VIEWS) or (
            depth > 0 and any(_views(f, depth - 1) for f in _called(value, names)))
    return _found[value]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _called(function: types.FunctionType, names: set[str]) -> Iterator[Any]:
    """What a function may call: of its file, of modules that it names, what it wraps."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not there yet
            continue
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in _KNOWN:
            yield from (vars(value).get(other) for other in names)
