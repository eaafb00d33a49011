"""The definition of the numberings, by torch.unique."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _first_appearance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct rows of (P, K) from 1 in order of first appearance."""
    unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(rows), dtype=torch.long)
    first.scatter_reduce_(0, inverse, torch.arange(len(rows)), "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1)
    zero = torch.zeros((1, rows.shape[1]), dtype=rows.dtype)
    return rank[inverse].int(), torch.cat([zero, unique[order]])


def number_vectors(input: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Symbols (N, H, W) of the distinct per-pixel vectors of (N, K, H, W), and the vectors."""
    n, k, h, w = input.shape
    rows = input.permute(0, 2, 3, 1).reshape(-1, k).cpu()
    if rows.isnan().any():
        return torch.zeros((n, h, w), dtype=torch.int32), rows.new_empty((0, k))
    index, vectors = _first_appearance(rows + 0.0)  # -0 becomes 0
    if len(vectors) - 1 > limit:
        vectors = rows.new_empty((0, k))
    return index.view(n, h, w).to(input.device), vectors.to(input.device)


def number_windows(map: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Ids (N, H, W) of the distinct 3x3 windows of (N, H, W), 0 outside, and the windows."""
    n, h, w = map.shape
    columns = F.unfold(map.double().unsqueeze(1), 3, padding=1)  # [N, 9, H*W]
    rows = columns.transpose(1, 2).reshape(-1, 9).to(torch.int32).cpu()
    index, windows = _first_appearance(rows)
    if len(windows) - 1 > limit:
        windows = rows.new_empty((0, 9))
    return index.view(n, h, w).to(map.device), windows.to(map.device)


def group_windows(vectors: Tensor, windows: Tensor, ranges: Sequence[tuple[int, int]]
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kinds, ids, windows, counts) of :class:`~.op.GroupWindows`."""
    partitions: list[list[int]] = []  # of each numbering the first of every symbol's equals
    kinds = []
    for begin, end in ranges:
        part = vectors[:, begin:end]
        equal = (part[:, None] == part[None]).all(2)
        equal.fill_diagonal_(True)  # a NaN is itself
        names = equal.int().argmax(1).tolist()
        if names not in partitions:
            partitions.append(names)
        kinds.append(partitions.index(names))
    numbered = [_first_appearance(torch.tensor(names, dtype=torch.int32)[windows[1:].long().cpu()])
                for names in partitions]
    most = max(len(own) for _, own in numbered)
    ids = torch.stack([F.pad(index, (1, 0)) for index, _ in numbered])
    padded = torch.stack([F.pad(own, (0, 0, 0, most - len(own))) for _, own in numbered])
    counts = torch.tensor([len(own) - 1 for _, own in numbered])
    device = windows.device
    return (torch.tensor(kinds).int().to(device), ids.to(device), padded.to(device),
            counts.int().to(device))
