"""The definition of the numberings, by torch.unique."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ID = 2**21 - 1  # three ids are one key of the kernels


def _first_appearance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct rows of (P, K) from 1 in order of first appearance."""
    unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
    device = rows.device
    first = torch.full((len(unique),), len(rows), dtype=torch.long, device=device)
    first.scatter_reduce_(0, inverse, torch.arange(len(rows), device=device), "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1, device=device)
    zero = rows.new_zeros((1, rows.shape[1]))
    return rank[inverse].int(), torch.cat([zero, unique[order]])


def number_vectors(input: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Symbols (N, H, W) of the distinct per-pixel vectors of (N, K, H, W), and the vectors."""
    n, k, h, w = input.shape
    rows = input.permute(0, 2, 3, 1).reshape(-1, k).cpu()
    if rows.isnan().any():
        symbols = torch.zeros((n, h, w), dtype=torch.int32, device=input.device)
        return symbols, input.new_empty((0, k))
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
    inner = windows[1:].long().cpu()
    numbered = [_first_appearance(torch.tensor(names, dtype=torch.int32, device="cpu")[inner])
                for names in partitions]
    most = max(len(own) for _, own in numbered)
    ids = torch.stack([F.pad(index, (1, 0)) for index, _ in numbered])
    padded = torch.stack([F.pad(own, (0, 0, 0, most - len(own))) for _, own in numbered])
    device = windows.device
    counts = torch.tensor([len(own) - 1 for _, own in numbered], dtype=torch.int32, device=device)
    return (torch.tensor(kinds, dtype=torch.int32, device=device), ids.to(device),
            padded.to(device), counts)


def number_levels(
    map: Tensor, sizes: list[tuple[int, int]], limits: list[int],
) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """(symbols, index3, windows3, index5, windows5) of each size, and the counts (2, levels)."""
    levels, counts = [], torch.full((2, len(sizes)), -1, device=map.device)
    for number, (size, limit) in enumerate(zip(sizes, limits, strict=True)):
        symbols = F.interpolate(map.double()[:, None], size, mode="nearest")[:, 0].int()
        rows = max(min(limit, symbols.numel(), MAX_ID), 0)
        level, index = [symbols], symbols
        for reach in range(2):
            windows = symbols.new_zeros((rows + 1, 9))
            fits = index.numel() == 0 or (int(index.min()) >= 1 and int(index.max()) <= MAX_ID)
            index, found = number_windows(index, rows)
            if fits and len(found) > 0:
                windows[:len(found)] = found
                counts[reach, number] = len(found) - 1
            else:
                index = torch.zeros_like(index)
            level += [index, windows]
        levels.append(tuple(level))
    return levels, counts


def _kinds(labels: Tensor, edges: Tensor | None, num_classes: int) -> tuple[Tensor, int]:
    """Classes, or of class and edge, as numbers, and how many there are: one out of range."""
    flat = labels.long()
    bad = (flat < 0) | (flat >= num_classes)
    if edges is not None:
        flat = 2 * flat + (edges != 0)
    kinds = num_classes if edges is None else 2 * num_classes
    return flat.masked_fill(bad, kinds), kinds


def _fill(vectors: Tensor, values: Tensor, edges: bool, num_classes: int) -> None:
    """Rows 1.. of ``vectors``, zero before: what the kinds ``values`` stand for."""
    rows = torch.arange(1, len(values) + 1, device=values.device)
    vectors[rows, values // 2 if edges else values] = 1
    if edges:
        vectors[rows, num_classes] = (values % 2).to(vectors.dtype)


def present_labels(labels: Tensor, edges: Tensor | None,
                   num_classes: int) -> tuple[Tensor, Tensor]:
    """Symbols (N, H, W) of the kinds that occur, all in range, and their vectors alone."""
    flat, kinds = _kinds(labels, edges, num_classes)
    present = torch.bincount(flat.flatten(), minlength=kinds) > 0
    rank, values = present.cumsum(0), present.nonzero().flatten()
    vectors = torch.zeros((len(values) + 1, num_classes + (edges is not None)),
                          dtype=torch.float32, device=labels.device)
    _fill(vectors, values, edges is not None, num_classes)
    return rank[flat].int(), vectors


def number_labels(labels: Tensor, edges: Tensor | None,
                  num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols (N, H, W) of the classes or (class, edge) that occur, vectors, what was found."""
    flat, kinds = _kinds(labels, edges, num_classes)
    present = torch.bincount(flat.flatten(), minlength=kinds + 1)[:kinds] > 0
    rank = F.pad(present.cumsum(0), (0, 1), value=kinds + 1)
    values = present.nonzero().flatten()
    vectors = torch.zeros((kinds + 2, num_classes + (edges is not None)), dtype=torch.float32,
                          device=labels.device)
    vectors[-1] = float("nan")
    _fill(vectors, values, edges is not None, num_classes)
    least, most = (labels.long().aminmax() if labels.numel() else (rank.new_zeros(()),) * 2)
    least = least.clamp(min=1 - 2**63)  # which can be negated
    found = torch.stack([rank.new_tensor(len(values)), (-least).clamp(min=0),
                         (most.clamp(min=0) - num_classes + 1).clamp(min=0)])
    return rank[flat].int(), vectors, found
