"""The definition: a pixel is an edge where its id differs from a neighbour's, on either side."""

from __future__ import annotations

import torch
from torch import Tensor


def instance_edges(instance_map: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, H, W) ids -> (N, 1, H, W)."""
    edge = torch.zeros(instance_map.shape, dtype=torch.bool, device=instance_map.device)
    across = instance_map[:, :, 1:] != instance_map[:, :, :-1]
    down = instance_map[:, 1:, :] != instance_map[:, :-1, :]
    edge[:, :, 1:] = edge[:, :, 1:] | across
    edge[:, :, :-1] = edge[:, :, :-1] | across
    edge[:, 1:, :] = edge[:, 1:, :] | down
    edge[:, :-1, :] = edge[:, :-1, :] | down
    return edge.unsqueeze(1).to(dtype)
