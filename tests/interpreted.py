"""Triton's interpreter, which looks through its language at every launch and call of a helper."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


def look_once() -> None:
    """Keep what the interpreter finds to replace in ``triton.language``: a third of its time.

    A launch replaces the functions of each module and takes that back at its end. A helper called
    meanwhile looks again, though all of them are replaced.
    """
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    replace_all = interpreter._patch_lang

    @cache
    def modules(function: Callable[..., Any]) -> list[Any]:
        return [m for m in function.__globals__.values() if m is tl or m is tl.core]

    @cache
    def members(module: Any) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in inspect.getmembers(module) if is_builtin(m)]

    def replace_of(function: Callable[..., Any]) -> Any:
        used = modules(function)
        if used and not any(is_builtin(module.load) for module in used):
            return None  # a helper's call
        return replace_all(function)

    def replace_in(module: Any, *rest: Any) -> None:
        for name, member in members(module):
            if getattr(module, name) is not member:
                return  # all are replaced, or none
            interpreter._patch_attr(module, name, member, *rest)

    interpreter._patch_lang, interpreter._patch_builtin = replace_of, replace_in
