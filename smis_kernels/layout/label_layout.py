"""LabelLayout: a label map compiled once into the index maps that every norm shares."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.instance_edges.op import instance_edges
from ..ops.label_windows.op import (
    MAX_LEVELS,
    GroupWindows,
    group_windows,
    number_labels,
    number_levels,
    number_vectors,
)
from ..ops.label_windows.reference import present_labels
from ..ops.segments import Pieces, Segments
from ..runtime.backend import refuse_trace
from ..runtime.check import (
    FLOATS,
    INTEGERS,
    check_device,
    check_range,
    check_shape,
    check_tensor,
    refuse_label,
)
from ..runtime.tensors import capturing, lasting, outlasting
from .levels import (
    PreparedLevel,
    Reading,
    WindowLevel,
    compile_level,
    device_kernels,
    limit_of,
    nearest_source,
    sizes_asked,
)
from .order import LevelOrder, SortedLevel
from .table_cache import TableCache

_compiling = torch.compiler.is_compiling  # a call asks more than once, and each look-up takes time
IDS = (*INTEGERS, torch.uint16, torch.uint32, torch.uint64)
MAX_VECTORS = 4096  # distinct conditioning vectors beyond which a tensor is no label map
MOST_ROOM = 2**22  # numbers that vectors may take where there is room for all kinds of pixels


def _class_count(num_classes: Any) -> int:
    try:
        count = operator.index(num_classes)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")
    return count


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


class _Own(NamedTuple):
    """A layout's windows as groups tell them apart, and what they were made of."""

    windows3: Tensor  # held, so that its id stays its own
    vectors: Tensor
    windows: GroupWindows


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
        self._symbols, self._vectors = lasting(symbols), lasting(vectors)
        self._levels: dict[tuple[int, int], WindowLevel] = {}
        self._own: dict[Any, _Own] = {}
        self._orders: dict[tuple[tuple[int, int], int], SortedLevel] = {}
        self._prepared: dict[tuple[int, int], PreparedLevel] = {}
        self._labels: tuple[Reading, int] | None = None  # not looked at yet, and their classes
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
        self._own.clear()  # of windows that may have been written over where they lie
        self._tables_of = self.state
        self._compiled_of[0] = self._tables_of[0]

    def _check_labels(self) -> None:
        """Refuse labels out of range, of which the device has told by now."""
        if self._labels is None or capturing(self._symbols):
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
        device = (device_kernels(flat) and num_classes > 0
                  and 2 * (num_classes + 1) ** 2 <= MOST_ROOM)
        if not device:
            check_range("labels", labels, num_classes)
        dtype = torch.get_default_dtype()
        if not device:
            symbols, vectors = present_labels(flat, edges, num_classes)
            return cls(symbols, vectors.to(dtype))
        symbols, vectors, found = number_labels(flat, edges, num_classes, backend="auto")
        layout = cls(symbols, vectors.to(dtype))
        layout._labels = Reading(found), num_classes
        layout.prepare(sizes_asked(symbols.device, symbols.shape))
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
        if not device_kernels(self.symbols):
            return compile_level(self.resized(size), unlimited)
        if capturing(self._symbols) and (again or not self.countable(size)):
            raise RuntimeError(f"layout: its windows at {size[0]}x{size[1]} cannot be counted "
                               "while a CUDA graph is captured; run the network once before")
        if not again:
            asked = sizes_asked(self._symbols.device, self._symbols.shape)
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
        if not device_kernels(self._symbols):
            return
        self._look()
        due = [size for size in dict.fromkeys(sizes)
               if size not in self._levels and size not in self._prepared]
        with outlasting():
            for first in range(0, len(due), MAX_LEVELS):
                self._prepared.update(self._number(due[first : first + MAX_LEVELS]))

    def _number(self, sizes: Sequence[tuple[int, int]], *,
                unlimited: bool = False) -> dict[tuple[int, int], PreparedLevel]:
        limits = [limit_of(len(self._symbols) * h * w, unlimited) for h, w in sizes]
        levels, counts = number_levels(self._symbols, sizes, limits, backend="auto")
        reading = Reading(counts)
        return {size: PreparedLevel(level, reading, column)
                for column, (size, level) in enumerate(zip(sizes, levels, strict=True))}

    def countable(self, size: tuple[int, int]) -> bool:
        """Whether :meth:`level` can be had: its counts cannot be read during a graph's capture."""
        self._look()
        prepared = self._prepared.get(size)
        return (size in self._levels or not capturing(self._symbols)
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
        if capturing(map) or map.is_inference():
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
            found = self._orders[size, reach] = SortedLevel(sources, symbols)
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
        self._symbols, self._vectors = lasting(self._symbols), lasting(self._vectors)
        for level in self._levels.values():
            level.__dict__.update({k: lasting(v) for k, v in vars(level).items()})
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
