"""A generator on one layout as a CUDA graph: one launch for each picture."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smis_kernels import LabelLayout
from smis_kernels.interface import StaticLayout, capture, circumstances, difference

Call = Callable[[], Tensor]
Record = Callable[[Call, torch.device], Call]
Paint = Callable[[LabelLayout, Tensor | None], Tensor]


class GraphedGenerator:
    """Pictures of one layout, each a single launch; an edited layout is loaded, not captured anew.

    Args:
        generator: frozen, in eval mode.
        used: a layout with :class:`TableCache`, after a forward pass of the generator.
        z: a code, or None for a generator that takes none.
        record: makes a replay of a call; default: :func:`capture`.

    Example:
        >>> fast = GraphedGenerator(generator, layout, z)  # doctest: +SKIP
        >>> image = fast(z)  # doctest: +SKIP
    """

    def __init__(self, generator: Any, used: LabelLayout, z: Tensor | None,
                 record: Record = capture) -> None:
        self._static = StaticLayout(used)
        self._z = None if z is None else z.clone()
        self._call: Call = lambda: generator(self._static.layout, self._z)
        self._replay = record(self._call, used.symbols.device)

    def fits(self, used: LabelLayout) -> bool:
        """Whether an edited layout can be loaded; else a new graph is due."""
        return self._static.fits(used)

    def load(self, used: LabelLayout) -> None:
        """Go on with an edited layout, after a forward pass has made its tables."""
        self._static.load(used)

    def check(self, z: Tensor | None, picture: Tensor, again: Call, *, codes: bool) -> None:
        """See that a replay is the picture of ``z``; with ``codes``, that it follows another too.

        Args:
            again: paints the picture a second time, to see how near two of them are.

        Raises:
            RuntimeError: it is not; the message says by how much.
        """
        found = difference([self(z)], [picture], lambda: [again()])
        if found is None and codes and z is not None:
            replayed = self(z.flip(1))  # the call reads the same buffer
            found = difference([replayed], [self._call()], lambda: [self._call()])
        if found is not None:
            raise RuntimeError(found)

    def __call__(self, z: Tensor | None) -> Tensor:
        """The picture (N, 3, H, W) of a code, in memory of its own."""
        if self._z is not None:
            if z is None or z.shape != self._z.shape:  # copy_ would broadcast
                got = None if z is None else tuple(z.shape)
                raise ValueError(f"z: expected {tuple(self._z.shape)}, got {got}")
            self._z.copy_(z)
        return self._replay().clone()


class PictureReplays:
    """Pictures from a graph where a replay is what painting would give; else they are painted.

    A layout's first picture is painted, the second too, beside the capture or the loading of the
    graph, whose replay is compared with it; further ones are replays. Another layout, another kind
    of code or other circumstances (stream, backend, flags) begin anew. Where the capture fails or a
    replay differs, a warning says so once, and everything is painted from then on. A copy has no
    graph, and makes its own.

    Args:
        record: makes a replay of a call: :func:`capture`.
    """

    def __init__(self, record: Record = capture) -> None:
        self._record = record
        self._lock = threading.Lock()  # buffers serve one call at a time
        self._graphed: GraphedGenerator | None = None
        self._made: tuple[Any, ...] | None = None  # what the graph is of
        self._last: tuple[Any, ...] | None = None  # what was painted last
        self.failed: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PictureReplays, (self._record,)

    def picture(self, paint: Paint, layout: LabelLayout, z: Tensor | None) -> Tensor:
        """The picture (N, 3, H, W) of a code on a layout, as ``paint`` gives it."""
        device = layout.symbols.device
        around = None if self.failed is not None else circumstances(device)
        if around is None or (z is not None and z.device != device) or not self._lock.acquire(
                blocking=False):
            return paint(layout, z)
        try:
            kind = () if z is None else (z.shape, z.dtype)
            return self._picture(paint, layout, z, (layout, around, kind))
        finally:
            self._lock.release()

    def _picture(self, paint: Paint, layout: LabelLayout, z: Tensor | None,
                 what: tuple[Any, ...]) -> Tensor:
        if self._graphed is not None and self._made == what:
            return self._graphed(z)
        picture = paint(layout, z)
        before, self._last = self._last, what
        # What is predicted from a map alone is kept in place of a graph.
        if before != what or layout.tables is None or layout.tables.predicts:
            return picture
        try:
            self._prepare(paint, layout, z, what, picture)
        except Exception as error:  # a driver's, torch's, or the comparison's
            self._graphed, self.failed = None, str(error).partition("\n")[0]
            warnings.warn(f"Synthesizer: no CUDA graph from now on: {self.failed}", stacklevel=5)
        return picture

    def _prepare(self, paint: Paint, layout: LabelLayout, z: Tensor | None,
                 what: tuple[Any, ...], picture: Tensor) -> None:
        """Bring the layout into the graph, and see that its replay is the picture."""
        graphed, made = self._graphed, self._made
        if graphed is not None and made is not None and made[1:] == what[1:] and graphed.fits(
                layout):
            self._made = None  # until it is seen to be right
            graphed.load(layout)
            graphed.check(z, picture, partial(paint, layout, z), codes=False)
        else:
            self._graphed = self._made = graphed = None  # its memory is free for the next
            graphed = GraphedGenerator(paint, layout, z, self._record)
            graphed.check(z, picture, partial(paint, layout, z), codes=True)
        self._graphed, self._made = graphed, what
