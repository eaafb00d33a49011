"""LabelLayout: a label map compiled once into the index maps that every norm shares."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.instance_edges.op import instance_edges
from ..ops.label_windows.op import (
    MAX_LEVELS,
    GroupWindows,
    NumberedLevel,
    group_windows,
    number_labels,
    number_levels,
    number_vectors,
    number_windows,
)
from ..ops.label_windows.reference import present_labels
from ..ops.segments import Pieces, Segments, in_pieces, of_windows, sorted_rows, window_index
from ..runtime import constants
from ..runtime.backend import refuse_trace, resolve
from ..runtime.check import (
    FLOATS,
    INTEGERS,
    check_device,
    check_range,
    check_shape,
    check_tensor,
    refuse_label,
)
from ..runtime.tensors import capturing as _capturing

_compiling = torch.compiler.is_compiling  # a call asks more than once, and each look-up takes time
IDS = (*INTEGERS, torch.uint16, torch.uint32, torch.uint64)
MAX_VECTORS = 4096  # distinct conditioning vectors beyond which a tensor is no label map
MOST_SPARE = 2**24  # bytes of room for windows beyond which those found are copied out of it
MOST_ROOM = 2**22  # numbers that vectors may take where there is room for all kinds of pixels


@dataclass
class WindowLevel:
    """The distinct windows of one resolution.

    Attributes:
        symbols: (N, h, w) int32 symbol of each pixel, from 1.
        windows3, index3: (V + 1, 9) symbols of each distinct 3x3 window, and the window (N, h, w)
            at each pixel. Row 0 is the outside.
        windows5, index5: (U + 1, 9) 3x3-window ids of each distinct 5x5 window, and the window at
            each pixel.
    """

    symbols: Tensor
    windows3: Tensor
    index3: Tensor
    windows5: Tensor
    index5: Tensor

    @property
    def repeats(self) -> bool:
        """Whether windows repeat enough for the tables to exist."""
        return len(self.windows3) > 0 and len(self.windows5) > 0

    @property
    def counts(self) -> tuple[int, int]:
        """(V, U), the numbers of distinct 3x3 and 5x5 windows."""
        return len(self.windows3) - 1, len(self.windows5) - 1


def _limit(pixels: int, unlimited: bool) -> int:
    # With more rows than half the pixels dense convs win anyway; small maps are always cheap.
    return pixels if unlimited else max(pixels // 2, 4096)


def _compile_level(symbols: Tensor, unlimited: bool = False) -> WindowLevel:
    limit = _limit(symbols.numel(), unlimited)
    # Numbering is exact on every implementation: it follows the device, whatever norms run on.
    index3, windows3 = number_windows(symbols, limit, backend="auto")
    if len(windows3) == 0:
        return WindowLevel(symbols, windows3, index3, windows3, index3)
    index5, windows5 = number_windows(index3, limit, backend="auto")
    return WindowLevel(symbols, windows3, index3, windows5, index5)


def _class_count(num_classes: Any) -> int:
    try:
        count = operator.index(num_classes)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")
    return count


def nearest_source(size: int, source: int, device: torch.device) -> Tensor:
    """Source index of each target index, exactly as F.interpolate: floor(fp32 dst * fp32 scale)."""
    scale = float(np.float32(source) / np.float32(size))
    # made on the device: a copy from the host could not be captured in a CUDA graph
    index = torch.arange(size, dtype=torch.float32, device=device) * scale
    return index.floor().long().clamp_(max=source - 1)


def _device_kernels(map: Tensor) -> bool:
    """Whether a GPU compiles layouts of this map without the host."""
    return resolve("number_levels", map, "auto", ("cuda",)) == "cuda"


@contextmanager
def outlasting() -> Iterator[None]:
    """No inference tensors are made inside: what is kept serves later calls with gradients."""
    if not _compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def _lasting(tensor: Tensor) -> Tensor:
    """The tensor, copied where it is an inference tensor: no gradients, and no trace of writes."""
    if _compiling() or not tensor.is_inference():
        return tensor
    with outlasting():
        return tensor.clone()


def _check_size(size: tuple[int, int]) -> None:
    """(h, w), a resolution that a map can be resized to."""
    if (not isinstance(size, tuple) or len(size) != 2
            or not all(hasattr(n, "__index__") and n >= 1 for n in size)):
        raise ValueError(f"size: expected a tuple (h, w) of integers from 1, got {size!r}")


def _check_dense(name: str, tensor: Tensor) -> None:
    """A map of pixels, neither sparse nor empty; a batch of none is one."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}; call .to_dense()")
    if 0 in tensor.shape[-2:]:
        raise ValueError(f"{name}: expected maps of at least one pixel, got shape "
                         f"{tuple(tensor.shape)}; leave empty maps out")


class _Reading:
    """Numbers of the device on their way to the host; it waits for them when they are asked for.

    Raises:
        RuntimeError: when asked for, where the device's work is captured in a CUDA graph.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._held: Tensor | None = numbers
        self._sent: torch.cuda.Event | None = None
        self._read: Any = None
        if _capturing(numbers):
            self._held = None
        elif numbers.device.type == "cuda":
            self._held = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu",
                                     pin_memory=True)
            self._held.copy_(numbers, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(numbers.device))

    @property
    def done(self) -> bool:
        """Whether they have been asked for before."""
        return self._read is not None

    def numbers(self) -> Any:
        """The numbers as (nested) lists."""
        held = self._held  # before the other, which a second thread may set first
        if self._read is None:
            if held is None:
                raise RuntimeError("layout: its counts stay in the CUDA graph that was captured "
                                   "when it was made; make it before the capture")
            if self._sent is not None:
                self._sent.synchronize()
            self._read = held.tolist()
            self._held = None
        return self._read


@dataclass(frozen=True)
class _Prepared:
    """A resolution that the device numbers; ``counts`` holds those of all that it made with it."""

    level: NumberedLevel
    counts: _Reading
    column: int

    def finished(self) -> WindowLevel:
        v, u = (row[self.column] for row in self.counts.numbers())
        numbered = self.level
        windows3, windows5 = numbered.windows3[:v + 1], numbered.windows5[:u + 1]
        if windows3.untyped_storage().nbytes() > MOST_SPARE:
            windows3, windows5 = windows3.clone(), windows5.clone()
        return WindowLevel(numbered.symbols, windows3, numbered.index3, windows5, numbered.index5)


@lru_cache(maxsize=64)
def _sizes_asked(device: torch.device, shape: torch.Size) -> dict[tuple[int, int], None]:
    """The sizes that layouts of maps of this shape were asked for, to be compiled together."""
    return {}


class _Own(NamedTuple):
    """A layout's windows as groups tell them apart, and what they were made of."""

    windows3: Tensor  # held, so that its id stays its own
    vectors: Tensor
    windows: GroupWindows


class LevelOrder(NamedTuple):
    """The pixels and windows of a resolution by the row that they read: gradients are summed so.

    Attributes:
        pixels: by row of a table.
        windows: that the table is of, by what they hold; of 3x3 windows the same as ``windows3``.
        windows3: 3x3 windows by symbol.
    """

    pixels: Pieces
    windows: Segments
    windows3: Segments

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        return *self.pixels, *self.windows, *self.windows3


class _Sorted:
    """A :class:`LevelOrder`, what it was made of, and when the device has made it."""

    def __init__(self, sources: tuple[Tensor, ...], symbols: int) -> None:
        index, windows, windows3 = self._sources = sources
        self._known = constants.state(sources), symbols
        keys = [(index, len(windows)), window_index(windows3, symbols)]
        if windows is not windows3:
            keys.append(window_index(windows, len(windows3)))
        pixels, *others = sorted_rows(keys)
        found = [*map(of_windows, others)]
        self.order = LevelOrder(in_pieces(pixels), found[-1], found[0])
        self._stream: Any = None
        if index.is_cuda and torch.cuda.is_available():  # no fake tensor
            self._stream = torch.cuda.current_stream(index.device)
            self._made = self._stream.record_event()

    def fits(self, sources: tuple[Tensor, ...], symbols: int) -> bool:
        """Whether it is of these tensors, and they are as they were."""
        return (all(a is b for a, b in zip(sources, self._sources, strict=True))
                and self._known == (constants.state(sources), symbols))

    def taken(self) -> LevelOrder:
        """The order, on the current stream."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._sources[0].device)
            if stream != self._stream:
                stream.wait_event(self._made)
                for tensor in self.order.tensors:
                    tensor.record_stream(stream)
        return self.order


class LabelLayout:
    """A batch of label maps compiled for modulation: gamma and beta depend on windows of it alone.

    Make it with :meth:`from_labels` or :meth:`from_tensor`, and pass it to a norm or a generator
    of the zoo in place of the segmentation map. Resolutions are compiled when first asked for and
    kept; the object can be pickled, moved with :meth:`to`, and shared by any number of networks.
    A GPU compiles all sizes that earlier layouts of this shape were asked for in one go, and the
    host waits for it once, when a norm asks for the first.

    Both tensors may be written into, not through ``.data`` or numpy, which leave no trace: what was
    compiled of them is then made anew. A graph of torch.compile looks at no version, and has the
    new windows once :meth:`level` has been asked for them.

    Attributes:
        symbols: (N, H, W) int32, from 1.
        vectors: (S + 1, K), the conditioning vector of each symbol; row 0 (outside) is zero.
        tables: the :class:`TableCache` of frozen norms, or None.

    Example:
        >>> from smis_kernels import SPADE
        >>> labels = torch.arange(4).repeat(1, 64, 16)
        >>> layout = LabelLayout.from_labels(labels, num_classes=35)
        >>> y = SPADE(16, 35)(torch.randn(1, 16, 64, 64), layout)
        >>> print(layout.summary())
        LabelLayout(1x35x64x64, 4 symbols)
           size      pixels  3x3 windows          5x5 windows
           64x64        4096       18 (  0.4%)         40 (  1.0%)
    """

    def __init__(self, symbols: Tensor, vectors: Tensor) -> None:
        self._symbols, self._vectors = _lasting(symbols), _lasting(vectors)
        self._levels: dict[tuple[int, int], WindowLevel] = {}
        self._own: dict[Any, _Own] = {}
        self._orders: dict[tuple[tuple[int, int], int], _Sorted] = {}
        self._prepared: dict[tuple[int, int], _Prepared] = {}
        self._labels: tuple[_Reading, int] | None = None  # not looked at yet, and their classes
        self._tables: TableCache | None = None
        self._tables_of = self.state
        self._compiled_of = [self._tables_of[0]]  # symbols, by version; shared as levels are

    @property
    def symbols(self) -> Tensor:
        self._check_labels()
        return self._symbols

    @property
    def vectors(self) -> Tensor:
        self._check_labels()
        return self._vectors

    @property
    def state(self) -> tuple[int, int]:
        """Versions of symbols and vectors, which writes move; -1 while torch.compile traces."""
        if _compiling():
            return -1, -1
        return self._symbols._version, self._vectors._version

    @property
    def tables(self) -> TableCache | None:
        tables = self._tables
        if tables is not None and not _compiling() and self._tables_of != (
                self._symbols._version, self._vectors._version):
            tables.forget()
            self._tables_of = self.state
        return tables

    @tables.setter
    def tables(self, tables: TableCache | None) -> None:
        self._tables = tables

    @property
    def levels(self) -> dict[tuple[int, int], WindowLevel]:
        """The resolutions compiled so far, by size."""
        self._look()
        return self._levels

    def _look(self) -> None:
        """Forget what was compiled of symbols that have been written to since."""
        if not _compiling() and self._symbols._version != self._compiled_of[0]:
            for kept in (self._levels, self._prepared, self._orders, self._own):
                kept.clear()
            self._compiled_of[0] = self._symbols._version

    def _settle(self) -> None:
        """Take what is compiled, and the tables, for those of the symbols and vectors of now."""
        self._tables_of = self.state
        self._compiled_of[0] = self._tables_of[0]

    def _check_labels(self) -> None:
        """Refuse labels out of range, of which the device has told by now."""
        if self._labels is None or _capturing(self._symbols):
            return
        found, classes = self._labels
        symbols, below, above = found.numbers()
        if below or above:
            refuse_label("labels", -below if below else classes - 1 + above, classes)
        self._vectors = self._vectors[: symbols + 1]  # there was room for all
        self._labels = None

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int, *, instances: Tensor | None = None,
                    edges: Tensor | None = None) -> LabelLayout:
        """Compile integer labels, with an edge channel where instances or edges are given.

        Args:
            labels: (N, H, W) or (N, 1, H, W) integers in 0..num_classes-1.
            num_classes: K; the conditioning vector of class c is the c-th unit vector.
            instances: instance ids of the labels' shape; their edges become channel K.
            edges: or the edge map itself, bool or numbers: any but 0 is an edge.

        Raises:
            ValueError, TypeError: a label out of range, another shape; the message names it. Labels
                on a GPU are looked at there: the error comes from the first use of the layout.
        """
        check_tensor("labels", labels, (3, 4), "(N, H, W) or (N, 1, H, W)", INTEGERS)
        if labels.dim() == 4 and labels.shape[1] != 1:
            raise ValueError("labels: expected (N, H, W) or (N, 1, H, W), got shape "
                             f"{tuple(labels.shape)}; planes are for from_tensor, as floats")
        _check_dense("labels", labels)
        num_classes = _class_count(num_classes)
        if instances is not None and edges is not None:
            raise ValueError("edges: expected instances or edges, got both")
        for name, given in (("instances", instances), ("edges", edges)):
            if given is not None:
                check_tensor(name, given, (3, 4), "(N, H, W) or (N, 1, H, W)",
                             IDS if name == "instances" else None)
                check_shape(name, given, tuple(labels.shape), "to match labels")
                _check_dense(name, given)
        refuse_trace("LabelLayout")
        with outlasting():
            return cls._of_labels(labels, num_classes, instances, edges)

    @classmethod
    def _of_labels(cls, labels: Tensor, num_classes: int, instances: Tensor | None,
                   edges: Tensor | None) -> LabelLayout:
        flat = labels.reshape(labels.shape[0], *labels.shape[-2:])
        if instances is not None:
            edges = instance_edges(instances, dtype=torch.uint8)
        elif edges is not None:
            edges = edges.ne(0).view(torch.uint8)
        if edges is not None:
            check_device("edges", edges, labels, "labels")
            edges = edges.reshape(flat.shape)
        device = (_device_kernels(flat) and num_classes > 0
                  and 2 * (num_classes + 1) ** 2 <= MOST_ROOM)
        if not device:
            check_range("labels", labels, num_classes)
        dtype = torch.get_default_dtype()
        if not device:
            symbols, vectors = present_labels(flat, edges, num_classes)
            return cls(symbols, vectors.to(dtype))
        symbols, vectors, found = number_labels(flat, edges, num_classes, backend="auto")
        layout = cls(symbols, vectors.to(dtype))
        layout._labels = _Reading(found), num_classes
        layout.prepare(_sizes_asked(symbols.device, symbols.shape))
        return layout

    @classmethod
    def from_tensor(cls, conditioning: Tensor, *, limit: int = MAX_VECTORS) -> LabelLayout | None:
        """Compile any conditioning tensor (N, K, H, W) whose per-pixel vectors repeat.

        One-hot, one-hot with edges, multi-hot: one mechanism. None where there are more than
        ``limit`` distinct vectors, or a NaN.

        Raises:
            ValueError, TypeError: no dense float tensor of that shape; the message names it.
        """
        check_tensor("conditioning", conditioning, 4, "(N, K, H, W)", FLOATS)
        _check_dense("conditioning", conditioning)
        with outlasting():
            symbols, vectors = number_vectors(conditioning.detach(), limit, backend="auto")
        return cls(symbols, vectors) if len(vectors) else None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, K, H, W) of the conditioning tensor it stands for."""
        n, h, w = self._symbols.shape
        return n, self._vectors.shape[1], h, w

    def level(self, size: tuple[int, int], *, unlimited: bool = False) -> WindowLevel:
        """The windows at (h, w), the map resized by nearest as ``F.interpolate`` does.

        Numbering stops where windows hardly repeat, unless ``unlimited``: for a forced path.
        """
        if not isinstance(size, tuple):
            _check_size(size)
        self._look()
        found = self._levels.get(size)
        if found is None or (unlimited and not found.repeats):
            _check_size(size)
            with outlasting():
                found = self._levels[size] = self._compiled(size, unlimited, found is not None)
        return found

    def _compiled(self, size: tuple[int, int], unlimited: bool, again: bool) -> WindowLevel:
        if not _device_kernels(self.symbols):
            return _compile_level(self.resized(size), unlimited)
        if _capturing(self._symbols) and (again or not self.countable(size)):
            raise RuntimeError(f"layout: its windows at {size[0]}x{size[1]} cannot be counted "
                               "while a CUDA graph is captured; run the network once before")
        if not again:
            asked = _sizes_asked(self._symbols.device, self._symbols.shape)
            asked[size] = None
            while len(asked) > MAX_LEVELS:
                asked.pop(next(iter(asked)), None)
            if size not in self._prepared:
                self.prepare(asked)
            found = self._finish(size)
            if found.repeats or not unlimited:
                return found
        return self._number((size,), unlimited=True)[size].finished()

    def _finish(self, size: tuple[int, int]) -> WindowLevel:
        """The level at ``size``, with all that were counted together with it."""
        asked = self._prepared.get(size)
        counts = None if asked is None else asked.counts
        for other, prepared in [*self._prepared.items()]:
            if prepared.counts is counts:
                self._levels.setdefault(other, prepared.finished())
                self._prepared.pop(other, None)
        return self._levels[size]

    def prepare(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Begin to compile these sizes on a GPU, all in one go; nothing waits for it.

        Elsewhere each is compiled when it is asked for, and this does nothing.
        """
        if not _device_kernels(self._symbols):
            return
        self._look()
        due = [size for size in dict.fromkeys(sizes)
               if size not in self._levels and size not in self._prepared]
        with outlasting():
            for first in range(0, len(due), MAX_LEVELS):
                self._prepared.update(self._number(due[first : first + MAX_LEVELS]))

    def _number(self, sizes: Sequence[tuple[int, int]], *,
                unlimited: bool = False) -> dict[tuple[int, int], _Prepared]:
        limits = [_limit(len(self._symbols) * h * w, unlimited) for h, w in sizes]
        levels, counts = number_levels(self._symbols, sizes, limits, backend="auto")
        reading = _Reading(counts)
        return {size: _Prepared(level, reading, column)
                for column, (size, level) in enumerate(zip(sizes, levels, strict=True))}

    def countable(self, size: tuple[int, int]) -> bool:
        """Whether :meth:`level` can be had: its counts cannot be read during a graph's capture."""
        self._look()
        prepared = self._prepared.get(size)
        return (size in self._levels or not _capturing(self._symbols)
                or (prepared is not None and prepared.counts.done and self._labels is None))

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Symbols (N, h, w) at another size, by nearest."""
        _check_size(size)
        _, h, w = self.symbols.shape
        if size == (h, w):
            return self.symbols
        device = self.symbols.device
        rows, columns = nearest_source(size[0], h, device), nearest_source(size[1], w, device)
        return self.symbols[:, rows[:, None], columns[None, :]].contiguous()

    def dense(self, size: tuple[int, int] | None = None,
              dtype: torch.dtype | None = None) -> Tensor:
        """The conditioning tensor (N, K, h, w) itself, channels-last, for code that needs it."""
        self._check_labels()
        self._look()
        if size is not None and not isinstance(size, tuple):
            _check_size(size)
        if size is None:
            symbols = self._symbols
        elif size in self._levels:
            symbols = self._levels[size].symbols
        elif size in self._prepared:
            symbols = self._prepared[size].level.symbols
        else:
            symbols = self.resized(size)
        vectors = self.vectors if dtype is None else self.vectors.to(dtype)
        return F.embedding(symbols, vectors).permute(0, 3, 1, 2)

    def patches(self, size: tuple[int, int]) -> Tensor:
        """(U + 1, 25) symbols of each distinct 5x5 window, row-major, 0 outside the image."""
        level = self.level(size)
        steps = torch.arange(5, device="cpu")
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        # Position (y, x) of the 5x5 window lies in the 3x3 window of the nearest inner tap.
        tap_y, tap_x = rows.clamp(1, 3) - 1, columns.clamp(1, 3) - 1
        tap = (3 * tap_y + tap_x).flatten().to(level.windows5.device)
        inner = (3 * (rows - tap_y) + columns - tap_x).flatten().to(level.windows5.device)
        return level.windows3[level.windows5.long()[:, tap], inner]

    def group_windows(self, windows3: Tensor,
                      ranges: tuple[tuple[int, int], ...]) -> GroupWindows:
        """The 3x3 windows of this layout's symbols as groups of channels tell them apart, kept.

        ``ranges``: of each group the channels (begin, end) of the vectors that it reads. They are
        numbered anew where the vectors have been written to.
        """
        key = id(windows3), ranges
        found = self._own.get(key)
        if found is None or not torch.equal(found.vectors, self.vectors):
            # No inference tensors: later calls may ask for gradients.
            with torch.inference_mode(False), torch.no_grad():
                vectors = self.vectors.detach().clone()
                made = group_windows(vectors, windows3, ranges, backend="auto")
            found = self._own[key] = _Own(windows3, vectors, made)
        return found.windows

    def pixel_order(self, index: Tensor) -> Callable[[], Pieces] | None:
        """What sorts the pixels of one of this layout's index maps by row: once, then it is kept.

        A GPU sums gradients of tables in this order. One sort finds it, of the index map and the
        windows together, for all norms of a resolution; it is found anew where one of them has been
        replaced or written to (not through ``.data``), and kept with the layout on its device: 4
        bytes a pixel, 44 a 5x5 and 72 a 3x3 window. Copies and pickles have none.

        None of another map, where gradients are off, and while torch.compile traces or a CUDA graph
        is captured: there each backward sorts.
        """
        found = self._place(index, "index3", "index5")
        if found is None:
            return None
        level, size, reach = found
        return lambda: self._order(level, size, reach).pixels

    def window_order(self, windows: Tensor, reach: int) -> Callable[[], Segments] | None:
        """What sorts a resolution's windows by what they hold, as :meth:`pixel_order` its pixels.

        ``reach`` is that of the table which they serve: 1 of 3x3 windows, 2 of 5x5 windows.
        """
        found = self._place(windows, "windows3", "windows5")
        if found is None:
            return None
        level, size, own = found
        if own < reach:
            return lambda: self._order(level, size, reach).windows3
        return lambda: self._order(level, size, own).windows

    def _place(self, map: Tensor,
               *names: str) -> tuple[WindowLevel, tuple[int, int], int] | None:
        """The resolution whose own the map is, by one of these names, and its size and reach."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        # A graph's memory is no place for what others read, nor may it read theirs, which may go.
        # Writes to inference tensors leave no trace.
        if _capturing(map) or map.is_inference():
            return None
        for size, level in [*self._levels.items()]:
            for reach, name in enumerate(names, 1):
                if getattr(level, name) is map:
                    return level, size, reach
        return None

    def _order(self, level: WindowLevel, size: tuple[int, int], reach: int) -> LevelOrder:
        if reach == 1:
            sources = level.index3, level.windows3, level.windows3
        else:
            sources = level.index5, level.windows5, level.windows3
        symbols = len(self.vectors)
        found = self._orders.get((size, reach))
        if found is None or not found.fits(sources, symbols):
            found = self._orders[size, reach] = _Sorted(sources, symbols)
        return found.taken()

    def map_vectors(self, function: Callable[[Tensor], Tensor]) -> LabelLayout:
        """The layout of ``function`` applied to every pixel's vector: (S, K) -> (S, K').

        Windows depend on the symbols alone, so the compiled resolutions are shared.
        """
        with outlasting():
            vectors = function(self._vectors)
            # A write to a view of its own vectors would be one to them.
            if not _compiling() and (vectors.untyped_storage()._cdata
                                     == self._vectors.untyped_storage()._cdata):
                vectors = vectors.clone()
            vectors[0] = 0
        mapped = LabelLayout(self._symbols, vectors)
        mapped._levels, mapped._tables = self._levels, self.tables
        mapped._orders, mapped._compiled_of = self._orders, self._compiled_of
        mapped._prepared, mapped._labels = self._prepared, self._labels
        return mapped

    def to(self, device: torch.device | str) -> LabelLayout:
        """A copy on another device, compiled resolutions included."""
        if not isinstance(device, (str, int, torch.device)):
            raise TypeError(f"device: expected a device such as 'cpu', got {device!r}; for vectors "
                            "of another dtype use map_vectors")
        self._look()
        with outlasting():
            moved = LabelLayout(self.symbols.to(device), self.vectors.to(device))
            for size, level in self._levels.items():
                moved._levels[size] = WindowLevel(
                    **{k: v.to(device) for k, v in vars(level).items()})
        return moved

    def __getstate__(self) -> dict[str, Any]:
        self._check_labels()
        self._look()
        levels = {size: WindowLevel(**{k: v.clone() for k, v in vars(level).items()})
                  for size, level in self._levels.items()}  # views would take all that they lie in
        return {**self.__dict__, "_levels": levels, "_prepared": {}, "_tables": None, "_own": {},
                "_orders": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "symbols" in state:  # of 0.2
            state = {**state, "_symbols": state["symbols"], "_vectors": state["vectors"]}
            del state["symbols"], state["vectors"]
        self.__dict__.update({"_own": {}, "_orders": {}, "_prepared": {}, "_labels": None, **state,
                              "_tables": None, "_compiled_of": [-1]})
        self.__dict__.pop("tables", None)  # of 0.2
        self._symbols, self._vectors = _lasting(self._symbols), _lasting(self._vectors)
        for level in self._levels.values():
            level.__dict__.update({k: _lasting(v) for k, v in vars(level).items()})
        self._settle()  # a copy's versions are its own

    def __repr__(self) -> str:
        n, k, h, w = self.shape
        return f"LabelLayout({n}x{k}x{h}x{w}, {len(self.vectors) - 1} symbols)"

    def summary(self) -> str:
        """A table of the compiled resolutions: distinct windows and their share of the pixels."""
        self._look()
        lines = [repr(self), "   size      pixels  3x3 windows          5x5 windows"]
        for (h, w), level in sorted(self._levels.items(), reverse=True):
            pixels = level.symbols.numel()
            if not level.repeats:
                lines.append(f"{h:>5}x{w:<5}{pixels:>9}  nothing repeats")
                continue
            v, u = level.counts
            lines.append(
                f"{h:>5}x{w:<5}{pixels:>9}  {v:>7} ({v / pixels:6.1%})    "
                f"{u:>7} ({u / pixels:6.1%})"
            )
        return "\n".join(lines)


def _names(old: LabelLayout, new: LabelLayout) -> tuple[Tensor, Tensor]:
    """A number for each symbol of both layouts: of equal vectors the same one."""
    marked = [
        torch.cat([x.vectors.double(), torch.zeros(
            (len(x.vectors), 1), dtype=torch.double, device=x.vectors.device,
        ).index_fill_(0, _first(x.vectors), 1)], 1)
        for x in (old, new)
    ]  # the outside differs from a pixel whose vector is zero
    _, common = torch.unique(torch.cat(marked), dim=0, return_inverse=True)
    before, after = common.split([len(old.vectors), len(new.vectors)])
    return before, after


def match_windows(old: LabelLayout, new: LabelLayout, size: tuple[int, int], *, reach: int,
                  names: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return for each window of ``new`` at ``size`` the row of the same window in ``old``, or -1.

    Windows are the same where their symbols have the same vectors; ``reach`` is 1 for 3x3 and 2
    for 5x5 windows. ``names``: of the symbols, where they are known.
    """
    before, after = (layout.level(size) for layout in (old, new))
    named = zip(_names(old, new) if names is None else names, (before, after), strict=True)
    joint = torch.cat([name[level.symbols.long()] for name, level in named]).int() + 1
    row = torch.full((after.counts[reach - 1] + 1,), -1, device=joint.device)
    row[0] = 0
    for _ in range(reach):  # both maps' windows, numbered together
        joint, windows = number_windows(joint, joint.numel(), backend="auto")
        if len(windows) == 0:  # too many for the kernel's keys
            return row
    was, now = joint.long().split([len(before.symbols), len(after.symbols)])
    index = f"index{2 * reach + 1}"
    known = torch.full((len(windows),), -1, device=joint.device)
    known[was] = getattr(before, index).long()
    row[getattr(after, index).long()] = known[now]
    return row


def _first(rows: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.long, device=rows.device)


@dataclass(frozen=True)
class _Edit:
    """What the windows of an edited layout have in common with those before it.

    Attributes:
        row: (U + 1,) the row before of each window; of new ones 0. None where nothing has changed.
        fresh: (F,) the windows that are new.
        windows3, windows: the new ones, row 0 the outside, by the 3x3 windows that they hold alone.
    """

    row: Tensor | None
    fresh: Tensor
    windows3: Tensor
    windows: Tensor

    @classmethod
    def of(cls, row: Tensor, rows_before: int, level: WindowLevel, reach: int) -> _Edit:
        fresh = (row < 0).nonzero().flatten()
        windows3, windows = level.windows3, level.windows3 if reach == 1 else level.windows5
        wanted = torch.cat([torch.zeros_like(windows[:1]), windows.index_select(0, fresh)])
        if reach == 2:
            used, renamed = torch.unique(wanted, return_inverse=True)  # 0 is the first of them
            windows3, wanted = windows3.index_select(0, used.long()), renamed.int()
        if len(row) == rows_before and torch.equal(
                row, torch.arange(len(row), device=row.device)):
            return cls(None, fresh, windows3, wanted)
        return cls(row.clamp_min(0), fresh, windows3, wanted)


T = TypeVar("T")
Build = Callable[[Tensor, Tensor], Tensor]  # of the 3x3 windows and those that rows are for


class TableCache:
    """Finished tables of frozen norms on one layout: further samples skip building them.

    Where an edited layout follows another, rows of windows that both have are taken over.

    Args:
        earlier: the tables of the layout that was edited.
        budget: bytes that predictions (:meth:`prediction`) may take; tables are not counted.
    """

    def __init__(self, earlier: TableCache | None = None, *, budget: int = 0) -> None:
        # The layout, its state when the table was made, and the table.
        self._kept: dict[tuple[nn.Module, tuple[int, int]],
                         tuple[LabelLayout, tuple[int, ...], Tensor]] = {}
        self._names: dict[tuple[int, int], tuple[LabelLayout, LabelLayout, Any]] = {}
        self._edits: dict[Any, _Edit] = {}
        self._counts: dict[tuple[tuple[int, int], int], tuple[int, int]] = {}
        self._predictions: dict[nn.Module, Any] = {}  # None: asked for once
        self._budget = budget
        self._earlier = None if earlier is None else earlier._kept
        if earlier is not None:  # one step back serves; a chain would keep every edit's tables
            earlier._predictions.clear()
            earlier._earlier = None
            earlier._names.clear()
            earlier._edits.clear()

    def put(self, owner: nn.Module, size: tuple[int, int], layout: LabelLayout,
            table: Tensor) -> None:
        self._kept[owner, size] = (layout, layout.state, table)

    def forget(self) -> None:
        """Drop what was made of a layout that has been written to since."""
        for kept in (self._kept, self._names, self._edits, self._counts):
            kept.clear()
        self._predictions = dict.fromkeys(self._predictions)  # made anew at the next request

    def lacks(self, owner: Any, size: tuple[int, int]) -> bool:
        """Whether the owner's table at ``size`` is to be made of all windows."""
        return all((owner, size) not in kept for kept in (self._kept, self._earlier or {}))

    def items(self) -> Iterator[tuple[tuple[nn.Module, tuple[int, int]], Tensor]]:
        """((owner, size), table) of all tables kept."""
        for key, (*_, table) in self._kept.items():
            yield key, table

    @property
    def windows(self) -> tuple[int, int]:
        """(new, kept): windows whose rows were computed, and taken over, over all resolutions."""
        return (sum(new for new, _ in self._counts.values()),
                sum(kept for _, kept in self._counts.values()))

    def table(self, owner: nn.Module, size: tuple[int, int], layout: LabelLayout, reach: int,
              build: Build) -> Tensor:
        """The owner's rows (U + 1, 2C) of the windows at ``size``; ``build`` makes those missing.

        ``reach`` is 1 for 3x3 and 2 for 5x5 windows.
        """
        found = self._kept.get((owner, size))
        if found is not None:
            return found[2]
        with outlasting():
            table = self._made(owner, size, layout, reach, build)
        self.put(owner, size, layout, table)
        return table

    def _made(self, owner: nn.Module, size: tuple[int, int], layout: LabelLayout, reach: int,
              build: Build) -> Tensor:
        level = layout.level(size)
        earlier = None if self._earlier is None else self._earlier.get((owner, size))
        if earlier is None or earlier[0].state != earlier[1]:
            windows = level.windows3 if reach == 1 else level.windows5
            table, new, total = build(level.windows3, windows), len(windows) - 1, len(windows) - 1
        else:
            before, _, rows = earlier
            edit = self._edit(before, layout, size, reach, len(rows))
            table = rows if edit.row is None else rows.index_select(0, edit.row)
            new, total = len(edit.fresh), len(table) - 1
            if new:
                made = build(edit.windows3, edit.windows)[1:]
                table.index_copy_(0, edit.fresh, made)
        self._counts[size, reach] = (new, total - new)
        return table

    @property
    def predicts(self) -> bool:
        """Whether a network keeps predictions of its own, or is about to."""
        return bool(self._predictions)

    def prediction(self, owner: nn.Module, size: int, make: Callable[[], T]) -> T | None:
        """What a frozen ``owner`` makes of the layout alone, kept from the second request on.

        None at the first request, for a layout that is painted once pays for nothing, and where
        ``size``, its bytes, does not fit what the budget has left.
        """
        if owner not in self._predictions:
            if size <= self._budget:
                self._budget -= size
                self._predictions[owner] = None
            return None
        if self._predictions[owner] is None:
            with outlasting():
                self._predictions[owner] = make()
        found: T = self._predictions[owner]
        return found

    def _edit(self, before: LabelLayout, after: LabelLayout, size: tuple[int, int], reach: int,
              rows: int) -> _Edit:
        pair = id(before), id(after)
        if pair not in self._names:
            found = _names(before, after)
            plain = tuple(tuple(name.tolist()) for name in found)  # once: a GPU waits for it
            self._names[pair] = before, after, (found, plain)
        names, plain = self._names[pair][2]
        # The same for all norms of a resolution that see as far, on vectors that differ alike.
        key = size, reach, plain
        if key not in self._edits:
            row = match_windows(before, after, size, reach=reach, names=names)
            self._edits[key] = _Edit.of(row, rows, after.level(size), reach)
        return self._edits[key]


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
