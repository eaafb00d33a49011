"""The published depthwise conditional convolution as a drop-in module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.spatially_varying_conv.op import spatially_varying_conv2d


class SpatiallyVaryingConv2d(nn.Module):
    """CC-FPSE's ``DepthConv``: :func:`spatially_varying_conv2d` called as ``conv(x, weights)``.

    The published module constructs a batch norm that it never calls; ``norm_layer`` keeps its
    entries, so that a published checkpoint loads.

    Args:
        channels: C of the features.
        kernel_size, padding, stride, dilation: of the window.
        backend: "auto", "reference", "cpu" or "cuda"; default: what ``use_backend`` says.

    State dict: ``norm_layer.*`` (unused).

    Source: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions", 2019.

    Example:
        >>> import torch
        >>> conv = SpatiallyVaryingConv2d(8)
        >>> y = conv(torch.randn(1, 8, 16, 16), torch.randn(1, 72, 16, 16))
    """

    def __init__(self, channels: int, kernel_size: int = 3, padding: int = 1, stride: int = 1,
                 dilation: int = 1, *, backend: str | None = None) -> None:
        super().__init__()
        self.kernel_size, self.padding = kernel_size, padding
        self.stride, self.dilation = stride, dilation
        self.backend = backend
        self.norm_layer = nn.BatchNorm2d(channels)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:
        return spatially_varying_conv2d(
            input, weight, kernel_size=self.kernel_size, stride=self.stride,
            padding=self.padding, dilation=self.dilation, backend=self.backend,
        )
