"""The definition of the numberings, by torch.unique."""

from __future__ import annotations

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
