"""``explain``: which implementation each op took, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """One op call: which backend and path ran, why, and the numbers behind it."""

    op: str
    backend: str
    path: str = ""
    reason: str = ""
    shape: tuple[int, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """The choices of one call, in order; ``print`` it for a table."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        head = ("op", "backend", "path", "shape", "reason", "numbers")
        rows = [head] + [
            (
                c.op, c.backend, c.path or "-", "x".join(map(str, c.shape)), c.reason or "-",
                " ".join(f"{k}={v}" for k, v in c.numbers.items()) or "-",
            )
            for c in self.choices
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


class _Recorder:
    choices: list[Choice] | None = None


_recorder = _Recorder()


@contextmanager
def _recording() -> Iterator[list[Choice]]:
    previous, _recorder.choices = _recorder.choices, []
    try:
        yield _recorder.choices
    finally:
        _recorder.choices = previous


def recording() -> bool:
    """Whether an ``explain`` is running: what is kept of earlier calls has no reasons to show."""
    return _recorder.choices is not None and not torch.compiler.is_compiling()


def record(op: str, backend: str, tensor: Tensor, path: str = "", reason: str = "",
           **numbers: Any) -> None:
    """Note a choice when an ``explain`` is running; costs one attribute read otherwise."""
    if _recorder.choices is not None and recording():
        shape = tuple(tensor.shape)
        if backend == "cuda" and tensor.device.type == "cpu":
            backend = "cuda (emulated)"
        _recorder.choices.append(Choice(op, backend, path, reason, shape, numbers))


def explain(module_or_op: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Run ``module_or_op(*inputs)`` once without gradients and say what ran, and why.

    Args:
        module_or_op: an op of this library, a module, or any callable that uses them.
        inputs, kwargs: its arguments.

    Example:
        >>> from smis_kernels import SPADE
        >>> norm = SPADE(16, 8)
        >>> x, labels = torch.randn(1, 16, 32, 32), torch.rand(1, 8, 32, 32)
        >>> print(explain(norm, x, labels))  # doctest: +ELLIPSIS
        op ... backend ... path ... shape ... reason ...
        SPADE ...
    """
    with torch.no_grad(), _recording() as choices:
        module_or_op(*inputs, **kwargs)
    return Explanation(tuple(choices))
