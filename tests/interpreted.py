"""Triton's interpreter, which looks through its language at every launch and call of a helper."""

from __future__ import annotations

import inspect
from typing import Any


def look_once() -> None:
    """Keep what the interpreter finds to replace in ``triton.language``: a third of its time.

    A launch replaces the functions of each module and takes that back at its end. A helper called
    meanwhile looks again, though all of them are replaced.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    found: dict[Any, list[tuple[str, Any]]] = {}

    def replace(module: Any, *rest: Any) -> None:
        if module not in found:
            found[module] = [(n, m) for n, m in inspect.getmembers(module) if is_builtin(m)]
        for name, member in found[module]:
            if getattr(module, name) is not member:
                return  # all are, or none
            interpreter._patch_attr(module, name, member, *rest)

    interpreter._patch_builtin = replace
