"""Layouts of the float maps that networks hand to their norms: each is compiled once a call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .label_layout import LabelLayout


class _Known(threading.local):
    """Layouts that this thread has compiled from tensors."""

    depth = 0  # of layout scopes

    def __init__(self) -> None:
        self.scope: list[tuple[weakref.ref[Tensor], int, LabelLayout | None]] = []
        self.latest: LabelLayout | None = None


_known = _Known()


@contextmanager
def layout_scope() -> Iterator[None]:
    """Compile each conditioning tensor once inside the block: one forward of a whole network."""
    _known.depth += 1
    try:
        yield
    finally:
        _known.depth -= 1
        if _known.depth == 0:
            _known.scope.clear()


def scoped_layouts() -> list[tuple[Tensor | None, LabelLayout | None]]:
    """The tensors that this layout scope has met, None for those gone, and their layouts."""
    return [(reference(), layout) for reference, _, layout in _known.scope]


@contextmanager
def given_layouts(layouts: Iterable[tuple[Tensor, LabelLayout | None]]) -> Iterator[None]:
    """A layout scope of its own, in which these tensors have been met already."""
    before, _known.scope = _known.scope, []
    try:
        with layout_scope():
            _known.scope += [(weakref.ref(t), t._version, layout) for t, layout in layouts]
            yield
    finally:
        _known.scope = before


def _same(a: LabelLayout, b: LabelLayout) -> bool:
    return (
        a.symbols.shape == b.symbols.shape and a.symbols.device == b.symbols.device
        and a.vectors.dtype == b.vectors.dtype
        and torch.equal(a.vectors, b.vectors) and torch.equal(a.symbols, b.symbols)
    )


def layout_of(conditioning: Tensor) -> LabelLayout | None:
    """The layout of a conditioning tensor, or None where it is no label map.

    Inside a :func:`layout_scope` a tensor met before (the same object, at the same version) is not
    compiled again. Elsewhere its pixels are always numbered anew, so no edit can be missed (writes
    through ``.data`` or numpy leave no trace), and only what follows, the windows, is kept from the
    last layout where the numbering came out the same.
    """
    tracked = _known.depth > 0 and not conditioning.is_inference()
    if tracked:
        for reference, version, layout in _known.scope:
            if reference() is conditioning and version == conditioning._version:
                return layout
    layout = LabelLayout.from_tensor(conditioning)
    if layout is not None:
        if _known.latest is not None and _same(layout, _known.latest):
            layout = _known.latest
        _known.latest = layout
    if tracked:
        _known.scope.append((weakref.ref(conditioning), conditioning._version, layout))
    return layout


def share_layouts(module: nn.Module) -> Callable[[], None]:
    """Let a published network compile each map once per forward; returns a function that undoes it.

    A pre-hook of ``module``, the outermost one, opens a :func:`layout_scope` and a post-hook closes
    it, so code that hands its float map to every norm needs no change.
    """
    scopes: list[Any] = []

    def enter(*_: Any) -> None:
        scope = layout_scope()
        scope.__enter__()
        scopes.append(scope)

    def leave(*_: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    handles = (module.register_forward_pre_hook(enter),
               module.register_forward_hook(leave, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
