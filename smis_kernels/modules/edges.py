"""The boundary channel as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.instance_edges.op import instance_edges


class InstanceEdges(nn.Module):
    """:func:`instance_edges` with its options fixed; no parameters.

    Args:
        dtype, backend: as in :func:`instance_edges`.

    Shape: instance_map (N, H, W) or (N, 1, H, W) -> (N, 1, H, W).

    Example:
        >>> InstanceEdges()(torch.randint(4, (1, 64, 64))).shape
        torch.Size([1, 1, 64, 64])
    """

    def __init__(self, *, dtype: torch.dtype = torch.float32, backend: str | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.backend = backend

    def forward(self, instance_map: Tensor) -> Tensor:
        return instance_edges(instance_map, dtype=self.dtype, backend=self.backend)

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}"
