"""Which path a norm takes: dense convs or window tables, by measured costs; never a guess."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..ops.indexed_modulation import op as indexed
from ..ops.label_windows.op import GroupWindows
from ..ops.window_table import op as window_table
from ..runtime.backend import resolve
from ..runtime.check import FLOATS, check_tensor
from ..runtime.checked import Checked
from ..runtime.derivatives import transformed
from ..runtime.explain import record, recording
from ..runtime.path import requested_path
from ..runtime.tuned import measured
from .label_layout import LabelLayout
from .levels import WindowLevel
from .scope import layout_of
from .shared_tables import shares


class ModulationConvs(Protocol):
    """What the choice reads of a norm: the convs that make its gamma and beta."""

    channels: int
    label_channels: int
    backend: str | None

    @property
    def hidden(self) -> int:
        """Channels of what the last convs read, if not the map; 0 without a conv before them."""

    @property
    def reach(self) -> int:
        """How far they see together: 0 a pixel, 1 a 3x3 window, 2 a 5x5 window."""

    @property
    def no_tables(self) -> str:
        """Why window tables do not serve; "" where they do."""

    @property
    def products(self) -> tuple[int, int]:
        """Multiply-adds at one pixel: of the last convs, and of those before."""

    @property
    def outline(self) -> Hashable:
        """What all of these follow from."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Channels (begin, end) of the map that each group of the last convs sees; () of one."""


class Rates(NamedTuple):
    """Multiply-adds a nanosecond of dense convs and of tables, and sums of table rows.

    Without fixed costs only their ratios matter, and those hold from machine to machine better
    than the figures. ``fixed_*``: nanoseconds that a path takes however small its map is.
    """

    dense: float
    two_level: float
    one_level: float
    sums: float
    fixed_dense: float = 0.0
    fixed_two_level: float = 0.0
    fixed_one_level: float = 0.0


CPU_RATES = Rates(130.0, 170.0, 175.0, 16.0)  # two threads (benchmarks/NOTES.md)
# How many multiply-adds take as long as numbering for groups, however few windows there are, as
# numbering one 3x3 window, and as writing a 5x5 window by a group's rows (benchmarks/NOTES.md).
NUMBERING, NUMBERED, RENAMED = 15e6, 1000.0, 500.0
LAUNCH = 2000.0  # nanoseconds of one kernel in a CUDA graph, however little it does
# Kernels of a path in a frozen network, the pass over the features excepted, which all have: planes
# (cast, gather), two convs and a ReLU; embedding (product, sum) and table (product, and sum).
_FIXED = {"fixed_dense": 5 * LAUNCH, "fixed_one_level": 3 * LAUNCH, "fixed_two_level": 4 * LAUNCH}
# A model of an H100, not measured: tables multiply in TF32 and gather their operands, convs in 16
# bits (the tensor cores' rates are 1 : 2), in TF32 too, or without tensor cores (1 : 1/8 of TF32's
# rate); sums read float32 rows from the cache.
_TABLES = {"two_level": 75e3, "one_level": 75e3, "sums": 1.5e3, **_FIXED}
_HALF = Rates(dense=300e3, **_TABLES)
GPU_RATES = {"bfloat16": _HALF, "float16": _HALF, "float32": Rates(dense=150e3, **_TABLES),
             "float32 without tf32": Rates(dense=18.75e3, **_TABLES)}


def products_key(dtype: torch.dtype) -> str:
    """How convs of ``dtype`` multiply on a GPU: its name; TF32 is torch's choice for float32."""
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        return name
    if torch.compiler.is_compiling():  # it guards this flag, and cannot trace the other
        allowed = torch.backends.cudnn.allow_tf32
    else:  # readable however the flags were set
        conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        allowed = conv.fp32_precision == "tf32"
    return name if allowed else f"{name} without tf32"


def rates_of(input: Tensor) -> Rates:
    """The rates of the input's device and products: measured on this GPU, else the above."""
    if input.device.type == "cpu":
        return CPU_RATES
    key = products_key(input.dtype)
    known = (measured("rates", input.device) or {}).get(key)
    return Rates(**known) if known else GPU_RATES.get(key, CPU_RATES)


def shared_rates(rates: Rates, dtype: torch.dtype) -> Rates:
    """Where all norms of a level make their tables together, without TF32 in 16 bits.

    Two launches serve two norms at least, in place of three each.
    """
    faster = 2 if dtype in (torch.float16, torch.bfloat16) else 1
    return rates._replace(one_level=faster * rates.one_level,
                          fixed_one_level=rates.fixed_one_level / 3)


class PathChoice(NamedTuple):
    """What was chosen: a layout and a table path, or a dense map (``fused``: not the reference)."""

    path: str
    fused: bool
    layout: LabelLayout | None
    segmap: Tensor | LabelLayout
    dtype: torch.dtype

    def dense(self, size: tuple[int, int]) -> Tensor:
        """The map as a tensor, for the dense path: a layout's is made at ``size`` at once."""
        if isinstance(self.segmap, LabelLayout):
            return self.segmap.dense(size, self.dtype)
        return self.segmap


def costs(norm: ModulationConvs, level: WindowLevel, pixels: int, rates: Rates = CPU_RATES, *,
          symbols: int = 0, own: GroupWindows | None = None) -> dict[str, float]:
    """Nanoseconds of each path's convs or tables for one norm, on a map of so many symbols.

    ``own``: the windows of the norm's groups, where they have tables of their own.
    """
    per_output, embedded = norm.products
    dense = rates.fixed_dense + pixels * (per_output + embedded) / rates.dense
    if not level.repeats:
        return {"dense": dense}
    v, u = level.counts
    if norm.reach == 1:
        return {"dense": dense,
                "one_level": rates.fixed_one_level + symbols * per_output / rates.one_level
                + v * 18 * norm.channels / rates.sums}
    embedding = symbols * embedded / rates.one_level + v * 9 * norm.hidden / rates.sums
    return {
        "dense": dense,
        "one_level": rates.fixed_one_level + embedding + u * per_output / rates.one_level,
        "two_level": rates.fixed_two_level + embedding + v * per_output / rates.two_level
        + u * 18 * norm.channels / rates.sums - (
            0.0 if own is None else _gain_of_own(norm, own, v, u, rates)),
    }


def _products_of_rows(norm: ModulationConvs, rates: Rates) -> float:
    """Nanoseconds that two-level tables take for each distinct 3x3 window."""
    return 9 * norm.hidden / rates.sums + norm.products[0] / rates.two_level


def _rows_of_a_group(own: GroupWindows) -> float:
    """The mean number of distinct 3x3 windows of a group."""
    return own.counts[own.kinds.long()].double().mean().item()


def _gain_of_own(norm: ModulationConvs, own: GroupWindows, v: int, u: int, rates: Rates) -> float:
    """Nanoseconds that groups' own windows save of a table of ``v`` 3x3 and ``u`` 5x5 windows."""
    rows = _rows_of_a_group(own)
    found = NUMBERING + len(own.counts) * (v * NUMBERED + u * RENAMED)
    return (v - rows) * _products_of_rows(norm, rates) - found / rates.two_level


def own_windows(norm: ModulationConvs, layout: LabelLayout, windows3: Tensor, count: int,
                rates: Rates = CPU_RATES) -> GroupWindows | None:
    """The windows that each group of a norm tells apart, on a CPU, where that is cheaper.

    A group that sees few of a map's classes finds most of its windows equal, and multiplies each
    once. ``count``: the 5x5 windows of which a two-level table is made of these 3x3 windows. They
    are numbered where that takes at most a quarter of all that it can save.
    """
    ranges = norm.ranges
    if not ranges or torch.compiler.is_compiling() or transformed() is not None:
        return None
    if torch.is_grad_enabled() and layout.vectors.requires_grad:
        return None  # of windows that a group finds equal one is read, and would get all gradients
    if resolve("window_table", windows3, None, window_table.KINDS) != "cpu":
        return None
    v, symbols = len(windows3) - 1, len(layout.vectors) - 1
    # Groups that see none of a map's symbols share a numbering, and a symbol lies in at most two.
    numberings = min(len(ranges), 2 * symbols + 1)
    bound = (NUMBERING + numberings * v * NUMBERED + layout.vectors.numel()) / rates.two_level
    if 4 * bound > v * _products_of_rows(norm, rates):
        return None
    own = layout.group_windows(windows3, ranges)
    return own if _gain_of_own(norm, own, v, count, rates) > 0 else None


def _check_map(norm: ModulationConvs, segmap: Tensor | LabelLayout, input: Tensor) -> None:
    if isinstance(segmap, Tensor) and segmap.layout != torch.strided:
        raise TypeError(f"segmap: expected a dense tensor, got {segmap.layout}; call .to_dense()")
    if not isinstance(segmap, (Tensor, LabelLayout)):
        raise TypeError(f"segmap: expected a tensor (N, {norm.label_channels}, H, W) or a "
                        f"LabelLayout, got {type(segmap).__name__}")
    shape = tuple(segmap.shape)
    if len(shape) != 4 or shape[1] != norm.label_channels:
        labels = isinstance(segmap, Tensor) and not segmap.is_floating_point() and (
            len(shape) == 3 or shape[1:2] == (1,))
        cure = ("; of integer labels make LabelLayout.from_labels(labels, num_classes)"
                if labels else "")
        raise ValueError(f"segmap: expected (N, {norm.label_channels}, H, W), got {shape}{cure}")
    if shape[0] != input.shape[0]:
        raise ValueError(
            f"segmap: expected the batch size {input.shape[0]} of the input, got {shape[0]}"
        )
    for name, given in (("segmap", shape), ("input", tuple(input.shape))):
        if 0 in given[2:]:
            raise ValueError(f"{name}: expected at least one pixel, got shape {given}; leave empty "
                             "maps out")
    if isinstance(segmap, Tensor):
        check_tensor("segmap", segmap, 4, "(N, K, H, W)", FLOATS)


def choose(norms: Sequence[ModulationConvs], input: Tensor, segmap: Tensor | LabelLayout,
           size: tuple[int, int]) -> PathChoice:
    """Choose for one norm, or for the two that share a read of the input.

    Raises:
        ValueError: the map does not fit, or a forced path cannot run; the message says why.
    """
    kind = resolve("modulation", input, norms[0].backend, indexed.KINDS)
    # On a GPU the choice follows what is being captured too.
    if (kind != "cpu" or not isinstance(segmap, LabelLayout) or torch.compiler.is_compiling()
            or recording()):
        return _choose(norms, input, segmap, size, kind)
    # Nothing is traced here: versions are read where they lie.
    key = (requested_path(), size, input.shape[0], input.dtype, CPU_RATES, segmap._tables is None,
           segmap._symbols._version, segmap._vectors._version, *[n.outline for n in norms])
    chosen = _chosen.get(segmap)
    if chosen is None:
        chosen = _chosen.setdefault(segmap, Checked())
    path = chosen.find(key)
    if path is None:
        choice = _choose(norms, input, segmap, size, kind)
        chosen.keep(key, choice.path)
        return choice
    return PathChoice(path, kind != "reference", None if path == "dense" else segmap, segmap,
                      input.dtype)


# Paths by what a choice reads beside the layout itself.
_chosen: WeakKeyDictionary[LabelLayout, Checked[str]] = WeakKeyDictionary()


def _choose(norms: Sequence[ModulationConvs], input: Tensor, segmap: Tensor | LabelLayout,
            size: tuple[int, int], kind: str) -> PathChoice:
    first = norms[0]
    for norm in norms:
        _check_map(norm, segmap, input)
    name = type(first).__name__ + (" pair" if len(norms) > 1 else "")

    def plan(path: str, layout: LabelLayout | None, reason: str, **numbers: Any) -> PathChoice:
        record(name, kind, input, path, reason, **numbers)
        return PathChoice(path, kind != "reference", layout, segmap, input.dtype)

    if kind == "reference":
        return plan("dense", None, "the reference is dense")
    wanted = requested_path()
    if wanted == "dense":
        return plan("dense", None, "asked for")
    problem = _why_dense(norms, segmap, kind)
    layout: LabelLayout | None = None
    if problem is None:
        layout = segmap if isinstance(segmap, LabelLayout) else layout_of(segmap)
        if layout is None:
            problem = "the map's vectors do not repeat (or hold NaN)"
        elif not layout.countable(size):
            problem = "a CUDA graph is captured before the host has read how many windows there are"
    if layout is not None and problem is None and not any(norm.reach for norm in norms):
        return plan("one_level" if wanted == "auto" else wanted, layout, "a pixel alone decides",
                    symbols=len(layout.vectors) - 1)
    if layout is not None and problem is None:
        # Tables that are kept serve every further sample: they are made even of unique windows.
        kept = layout.tables is not None
        level = layout.level(size, unlimited=kept or wanted != "auto")
        if not level.repeats:
            problem = "the map's windows do not repeat"
    if problem is not None or layout is None:
        if wanted != "auto":
            raise ValueError(f"path: {wanted!r} cannot run: {problem}; use 'auto' or 'dense'")
        return plan("dense", None, str(problem))
    v, u = level.counts
    pixels = input.shape[0] * size[0] * size[1]
    if wanted != "auto":
        return plan(wanted, layout, "asked for", V=v, U=u, pixels=pixels)
    total: dict[str, float] = {}
    numbers: dict[str, Any] = {}
    for norm in norms:
        rates, convs = rates_of(input), shares(norm, layout, size)
        if convs is not None:
            rates = shared_rates(rates, convs.weight.dtype)
        made = layout.tables is None or layout.tables.lacks(norm, size)
        own = own_windows(norm, layout, level.windows3, u) if made else None
        for path, cost in costs(norm, level, pixels, rates,
                                symbols=len(layout.vectors) - 1, own=own).items():
            total[path] = total.get(path, 0.0) + cost
        if own is not None:
            numbers["rows_of_a_group"] = round(_rows_of_a_group(own), 1)
    dense = total["dense"]
    if kept:
        del total["dense"]
    best = min(total, key=lambda path: total[path])
    gain = round(dense / total[best], 1) if total[best] else 1.0  # of no images nothing costs
    reason = "tables are kept" if kept else "least expected cost"
    return plan(best, None if best == "dense" else layout, reason,
                V=v, U=u, pixels=pixels, expected_gain=f"{gain}x",
                **(numbers if best == "two_level" else {}))


def prepare_map(segmap: Tensor | LabelLayout, like: Tensor,
                backend: str | None = None) -> Tensor | LabelLayout:
    """The layout of ``segmap``, compiled once for all norms of a network, where tables may serve.

    ``like`` is a feature tensor or weight: its device decides. The map itself is returned where
    only the dense path can run (the reference, a map that requires a gradient, torch.compile).
    """
    kind = resolve("modulation", like, backend, indexed.KINDS)
    if kind == "reference" or requested_path() == "dense" or isinstance(segmap, LabelLayout):
        return segmap
    if _why_dense((), segmap, kind) is not None:
        return segmap
    layout = layout_of(segmap)
    return segmap if layout is None else layout


def _why_dense(norms: Sequence[ModulationConvs], segmap: Tensor | LabelLayout,
               kind: str) -> str | None:
    """Why tables cannot serve, before any pixel is looked at; None where they can."""
    if kind not in indexed.KINDS:
        return f"tables have no {kind} kernel"
    for norm in norms:
        if norm.no_tables:
            return norm.no_tables
    if isinstance(segmap, LabelLayout):
        return None
    if segmap.requires_grad:
        return "the map requires a gradient"
    if transformed() is not None:  # where a map's values are not to be looked at
        return transformed()
    if torch.compiler.is_compiling():
        return "a map is not compiled inside torch.compile; pass a LabelLayout"
    return None
