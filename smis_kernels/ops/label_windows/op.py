"""Numbering of label maps: distinct per-pixel vectors and distinct 3x3 windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime.backend import refuse_trace, resolve
from ...runtime.check import FLOATS, check_device, check_shape, check_tensor
from ...runtime.library import RawOp
from . import reference

KINDS = ("cpu", "cuda")


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
        windows: (V + 1, 9) int32 symbols, of :func:`number_windows`, trusted to be in range.
        ranges: of each group the channels (begin, end) of the vectors that it reads.
        backend: "auto", "reference" or "cpu".

    Raises:
        ValueError, TypeError: shapes, dtypes or ranges that do not fit; the message names them.

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
    if kind == "reference":
        refuse_trace("group_windows")
        return GroupWindows(*reference.group_windows(vectors, windows, ranges))
    pairs = torch.tensor(ranges, dtype=torch.int64)
    return GroupWindows(*_group_windows(kind, vectors.detach(), windows, pairs))


def _group_windows_fake(vectors: Tensor, windows: Tensor, ranges: Tensor
                        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    numberings, rows = context.new_dynamic_size(), context.new_dynamic_size()
    return (windows.new_empty((ranges.shape[0],)),
            windows.new_empty((numberings, windows.shape[0])),
            windows.new_empty((numberings, rows, 9)), windows.new_empty((numberings,)))


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
