"""Numbering of label maps: distinct per-pixel vectors and distinct 3x3 windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime.backend import refuse_trace, resolve
from ...runtime.check import (
    FLOATS,
    INTEGERS,
    check_device,
    check_rows,
    check_shape,
    check_tensor,
)
from ...runtime.library import RawOp
from . import reference

KINDS = ("cpu", "cuda")
MAX_LEVELS = 16  # as the kernel takes


def number_vectors(input: Tensor, limit: int, *,
                   backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Number the distinct per-pixel vectors of a conditioning tensor.

    Args:
        input: (N, K, H, W), any float dtype. Compared by value: -0 equals 0.
        limit: give up beyond so many.
        backend: "auto", "reference", "cpu" or "cuda" (which waits for the device once).

    Returns:
        Symbols (N, H, W) int32, from 1 in order of first appearance, and the vectors (S + 1, K),
        whose row 0 is zero and stands for the pixels outside the image. With NaN, or more than
        ``limit`` vectors, the vectors are empty (0, K).

    Example:
        >>> one_hot = torch.eye(3)[torch.tensor([[[2, 0], [0, 2]]])].permute(0, 3, 1, 2)
        >>> symbols, vectors = number_vectors(one_hot, 1000)
        >>> len(vectors)  # the zero vector and two others
        3
    """
    check_tensor("input", input, 4, "(N, K, H, W)", FLOATS)
    kind = resolve("number_vectors", input, backend, KINDS)
    if kind == "reference":
        refuse_trace("number_vectors")
        return reference.number_vectors(input, limit)
    return _number_vectors(kind, input, limit)


def number_windows(map: Tensor, limit: int, *,
                   backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Number the distinct 3x3 windows of an integer map, exactly (no hash is trusted).

    Args:
        map: (N, H, W) int32, ids from 1; 0 stands for the pixels outside the image.
        limit: give up beyond so many.
        backend: "auto", "reference", "cpu" or "cuda" (which waits for the device once).

    Returns:
        Ids (N, H, W) int32 from 1 in order of first appearance over the whole batch, and the
        windows (V + 1, 9) int32 in row-major order, row 0 all zero. With more than ``limit``
        windows, or (native kernels) an id above 2²¹ - 1, of which three no longer fit a key,
        they are empty (0, 9).

    Raises:
        TypeError, ValueError: the map is no (N, H, W) int32, or holds an id below 1.

    Example:
        >>> symbols = torch.ones(1, 5, 5, dtype=torch.int32)
        >>> index, windows = number_windows(symbols, symbols.numel())
        >>> len(windows)  # the empty window, then corners, sides and the inside
        10
    """
    check_tensor("map", map, 3, "(N, H, W)", (torch.int32,))
    kind = resolve("number_windows", map, backend, KINDS)
    if kind == "reference":
        refuse_trace("number_windows")
        if map.numel() > 0 and (least := int(map.min())) < 1:
            raise ValueError(
                f"map: expected ids from 1, got {least}; 0 stands for the pixels outside the "
                "image: number from 1"
            )
        return reference.number_windows(map, limit)
    return _number_windows(kind, map, limit)


class GroupWindows(NamedTuple):
    """3x3 windows as groups of channels tell them apart; groups that do so alike share a numbering.

    Attributes:
        kinds: (G,) int32, the numbering of each group.
        ids: (K, V + 1) int32, of each numbering the number of every window; 0 of the outside.
        windows: (K, R + 1, 9) int32, the windows of each numbering, by the first of the symbols
            that are equal in it; zero beyond its count.
        counts: (K,) int32, how many there are, at most R.
    """

    kinds: Tensor
    ids: Tensor
    windows: Tensor
    counts: Tensor


def group_windows(vectors: Tensor, windows: Tensor, ranges: Sequence[tuple[int, int]], *,
                  backend: str | None = None) -> GroupWindows:
    """Number the 3x3 windows that each group of channels tells apart, exactly.

    Args:
        vectors: (S + 1, K) of the symbols; row 0, the outside, is zero. Compared by value.
        windows: (V + 1, 9) int32 symbols, of :func:`number_windows`.
        ranges: of each group the channels (begin, end) of the vectors that it reads.
        backend: "auto", "reference" or "cpu".

    Raises:
        ValueError, TypeError: shapes, dtypes, ranges or symbols that do not fit; the message names
            them.

    Example:
        >>> vectors = torch.cat([torch.zeros(1, 4), torch.eye(4)])
        >>> _, windows = number_windows(torch.randint(1, 5, (1, 8, 8), dtype=torch.int32), 64)
        >>> own = group_windows(vectors, windows, [(0, 2), (2, 4)])
        >>> own.ids.shape == (2, len(windows))
        True
    """
    check_tensor("vectors", vectors, 2, "(S, K)", FLOATS)
    check_tensor("windows", windows, 2, "(V, 9)", (torch.int32,))
    check_shape("windows", windows, (windows.shape[0], 9), "(nine taps)")
    check_device("windows", windows, vectors, "vectors")
    channels = vectors.shape[1]
    for begin, end in ranges:
        if not 0 <= begin <= end <= channels:
            raise ValueError(f"ranges: expected channels 0..{channels} (begin, end), got "
                             f"({begin}, {end})")
    if not len(ranges) or not len(windows):
        raise ValueError(f"ranges: expected at least one group and the outside's window, got "
                         f"{len(ranges)} groups and {len(windows)} windows")
    kind = resolve("group_windows", vectors, backend, ("cpu",))
    check_rows("windows", windows, len(vectors), kind)
    if kind == "reference":
        refuse_trace("group_windows")
        return GroupWindows(*reference.group_windows(vectors, windows, ranges))
    pairs = torch.tensor(ranges, dtype=torch.int64, device="cpu")
    return GroupWindows(*_group_windows(kind, vectors.detach(), windows, pairs))


def _group_windows_fake(vectors: Tensor, windows: Tensor, ranges: Tensor
                        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    numberings, rows = context.new_dynamic_size(), context.new_dynamic_size()
    return (windows.new_empty((ranges.shape[0],)),
            windows.new_empty((numberings, windows.shape[0])),
            windows.new_empty((numberings, rows, 9)), windows.new_empty((numberings,)))


class NumberedLevel(NamedTuple):
    """One resolution of :func:`number_levels`; rows beyond those counted are undefined."""

    symbols: Tensor
    index3: Tensor
    windows3: Tensor
    index5: Tensor
    windows5: Tensor


def number_levels(map: Tensor, sizes: Sequence[tuple[int, int]], limits: Sequence[int], *,
                  backend: str | None = None) -> tuple[list[NumberedLevel], Tensor]:
    """Resize a map by nearest and number the 3x3 and 5x5 windows of every size, in one go.

    Nothing waits for the device: all is made at the capacity that ``limits`` give, and how many
    windows there are stays on the device.

    Args:
        map: (N, H, W) int32, ids from 1; 0 stands for the pixels outside the image.
        sizes: (h, w) of at most 16 levels, resized as ``F.interpolate`` does.
        limits: for each level, the windows of either kind beyond which it is not numbered.
        backend: "auto", "reference" or "cuda".

    Returns:
        The levels: ids (N, h, w) as of :func:`number_windows`, the 5x5 windows as 3x3 windows of
        3x3 windows; windows (limit + 1, 9) (the limit at most the pixels of the level), of which
        ``counts + 1`` rows are windows. And the counts (2, levels) int64 of 3x3 and 5x5 windows:
        -1 where there are more than the limit, or ids that are below 1 or above 2²¹ - 1; then
        the level's ids are 0.

    Raises:
        TypeError, ValueError: the map is no (N, H, W) int32, or sizes and limits do not fit.

    Example:
        >>> levels, counts = number_levels(torch.ones(1, 8, 8).int(), [(4, 4), (8, 8)], [16, 64])
        >>> counts.tolist()  # corners, sides and the inside, seen from near and from afar
        [[9, 9], [16, 25]]
    """
    check_tensor("map", map, 3, "(N, H, W)", (torch.int32,))
    if len(sizes) != len(limits) or len(sizes) > MAX_LEVELS:
        raise ValueError(f"sizes: expected at most {MAX_LEVELS}, a limit for each, "
                         f"got {len(sizes)} and {len(limits)} limits; take them in turns")
    if len(map) and 0 in map.shape[1:]:
        raise ValueError(f"map: expected at least one pixel, got {tuple(map.shape)}")
    if any(h < 1 or w < 1 for h, w in sizes):
        raise ValueError(f"sizes: expected heights and widths from 1, got {list(sizes)}")
    kind = resolve("number_levels", map, backend, ("cuda",))
    if kind == "reference":
        refuse_trace("number_levels")
        found, counts = reference.number_levels(map, list(sizes), list(limits))
        return [NumberedLevel(*level) for level in found], counts
    maps, windows, counts = _number_levels(
        kind, map, [side for size in sizes for side in size], list(limits))
    levels, first, row = [], 0, 0
    for (h, w), limit in zip(sizes, limits, strict=True):
        pixels, rows = len(map) * h * w, _rows(len(map) * h * w, limit)
        symbols, index3, index5 = maps[:, first : first + pixels].view(3, len(map), h, w).unbind()
        windows3, windows5 = windows[:, row : row + rows].unbind()
        levels.append(NumberedLevel(symbols, index3, windows3, index5, windows5))
        first, row = first + _padded(pixels), row + _padded(rows)
    return levels, counts


def number_labels(labels: Tensor, edges: Tensor | None, num_classes: int, *,
                  backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Number the classes, or pairs of class and edge, that occur in a label map, in their order.

    Nothing waits for the device.

    Args:
        labels: (N, H, W) integers, the classes 0..num_classes-1.
        edges: None, or uint8 of that shape: where it is not 0 the symbol is another.
        num_classes: K.
        backend: "auto", "reference" or "cuda".

    Returns:
        Symbols (N, H, W) int32, from 1; the vectors, float32, with a unit vector and, with edges,
        a last channel that is 1 on an edge, in rows 1.. of the symbols that occur; and (3,) int64:
        how many occur, how far the least label lies below 0, and the largest beyond num_classes-1.
        Rows before and between are 0, and labels out of range have the last one, which is NaN: of K
        + 2 rows, or 2K + 2 with edges.

    Example:
        >>> symbols, vectors, found = number_labels(torch.tensor([[[4, 0, 4, 9]]]), None, 6)
        >>> symbols.tolist(), found.tolist()
        ([[[2, 1, 2, 7]]], [2, 0, 4])
    """
    check_tensor("labels", labels, 3, "(N, H, W)", INTEGERS)
    if edges is not None:
        check_tensor("edges", edges, 3, "(N, H, W)", (torch.uint8,))
        check_shape("edges", edges, tuple(labels.shape), "to match labels")
        check_device("edges", edges, labels, "labels")
    kind = resolve("number_labels", labels, backend, ("cuda",))
    if kind == "reference":
        return reference.number_labels(labels, edges, num_classes)
    numbered: tuple[Tensor, Tensor, Tensor] = _number_labels(kind, labels, edges, num_classes)
    return numbered


def _padded(count: int) -> int:
    """What keeps the alignment of a packed tensor's next part, as in the kernel."""
    return -(-count // 64) * 64


def _rows(pixels: int, limit: int) -> int:
    return max(min(limit, pixels, reference.MAX_ID), 0) + 1


def _levels_fake(map: Tensor, sizes: list[int], limits: list[int]) -> tuple[Tensor, ...]:
    areas = [len(map) * h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True)]
    rows = sum(_padded(_rows(*each)) for each in zip(areas, limits, strict=True))
    return (map.new_empty((3, sum(_padded(area) for area in areas))),
            map.new_empty((2, rows, 9)),
            map.new_empty((2, len(limits)), dtype=torch.int64))


def _labels_fake(labels: Tensor, edges: Tensor | None, num_classes: int) -> tuple[Tensor, ...]:
    kinds, channels = (2, 1) if edges is not None else (1, 0)
    return (torch.empty(labels.shape, dtype=torch.int32, device=labels.device),
            labels.new_empty((kinds * num_classes + 2, num_classes + channels),
                             dtype=torch.float32),
            labels.new_empty(3, dtype=torch.int64))


def _vectors_fake(input: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    n, k, h, w = input.shape
    count = torch.library.get_ctx().new_dynamic_size()
    return (input.new_empty((n, h, w), dtype=torch.int32), input.new_empty((count, k)))


def _windows_fake(map: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(map), map.new_empty((count, 9))


_number_vectors = RawOp("number_vectors(Tensor input, int limit) -> (Tensor, Tensor)",
                        _vectors_fake)
_number_windows = RawOp("number_windows(Tensor map, int limit) -> (Tensor, Tensor)",
                        _windows_fake)
_group_windows = RawOp(
    "group_windows(Tensor vectors, Tensor windows, Tensor ranges) "
    "-> (Tensor, Tensor, Tensor, Tensor)", _group_windows_fake)
_number_levels = RawOp(
    "number_levels(Tensor map, int[] sizes, int[] limits) -> (Tensor, Tensor, Tensor)",
    _levels_fake, on_cpu=False)
_number_labels = RawOp(
    "number_labels(Tensor labels, Tensor? edges, int num_classes) -> (Tensor, Tensor, Tensor)",
    _labels_fake, on_cpu=False)
