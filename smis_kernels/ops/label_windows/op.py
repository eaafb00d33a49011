"""Numbering of label maps: distinct per-pixel vectors and distinct 3x3 windows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.backend import refuse_trace, resolve
from ...runtime.check import FLOATS, check_tensor
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
