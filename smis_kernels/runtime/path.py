"""How modulation is computed: dense convs, or tables over distinct label windows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

PATHS = ("auto", "dense", "one_level", "two_level")
ENVIRONMENT = "SMIS_PATH"


def _validated(name: str, origin: str) -> str:
    if name not in PATHS:
        raise ValueError(f"{origin}: expected one of {', '.join(PATHS)}; got {name!r}")
    return name


_environment = os.environ.get(ENVIRONMENT, "auto")


class _Selection:
    path: str | None = None  # process-wide, as the backend's


_selection = _Selection()


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Take one path for every modulation inside the block: the fastest ("auto"), or a forced one.

    A forced table path raises where it cannot run (a map that requires a gradient, another kernel
    size than 3, windows that do not repeat); ``backend="reference"`` implies "dense".

    Example:
        >>> import torch
        >>> from smis_kernels import SPADE, LabelLayout
        >>> layout = LabelLayout.from_labels(torch.zeros(1, 32, 32).long(), 8)
        >>> with use_path("two_level"):
        ...     y = SPADE(16, 8)(torch.randn(1, 16, 32, 32), layout)
    """
    previous = _selection.path
    _selection.path = _validated(path, "path")
    try:
        yield
    finally:
        _selection.path = previous


def requested_path(path: str | None = None) -> str:
    """The path asked for: the argument, else ``use_path``, else ``SMIS_PATH``."""
    if path is not None:
        return _validated(path, "path")
    if _selection.path is not None:
        return _selection.path
    return _validated(_environment, ENVIRONMENT)
