"""pix2pixHD's instance-wise pooling as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.instance_pool.op import instance_avg_pool2d


class InstanceAvgPool2d(nn.Module):
    """:func:`instance_avg_pool2d` as a layer; no parameters.

    Args:
        backend: as in :func:`instance_avg_pool2d`.

    Shape: input (N, C, H, W), instance_map (N, H, W) or (N, 1, H, W) -> (N, C, H, W).

    Example:
        >>> import torch
        >>> pool = InstanceAvgPool2d()
        >>> pool(torch.randn(1, 3, 64, 64), torch.randint(9, (1, 64, 64))).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, input: Tensor, instance_map: Tensor) -> Tensor:
        return instance_avg_pool2d(input, instance_map, backend=self.backend)
