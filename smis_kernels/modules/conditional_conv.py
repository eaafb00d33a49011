"""The last layer of a kernel predictor, fused with the application of its kernels."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.conditional_conv.op import best_tile, conditional_conv2d


class ConditionalConv2d(nn.Conv2d):
    """The 3x3 conv that predicts per-pixel kernels, and the depthwise conv that applies them.

    Stands where the published network has the last layer of ``gen_weights``; parameters and
    state-dict keys are those of that ``nn.Conv2d``. In eval mode the CPU predicts in tiles of 4x4
    pixels where that is faster (``SMIS_WINOGRAD=2``: of 2x2 only).

    Args:
        channels: C of the features.
        condition_channels: D of what the kernels are predicted from.
        backend: "auto", "reference", "cpu" or "triton"; default: what ``use_backend`` says.

    Shapes: input (N, C, H, W), condition (N, D, H, W) -> (N, C, H, W).

    Source: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions", 2019.

    Example:
        >>> import torch
        >>> conv = ConditionalConv2d(8, 128)
        >>> y = conv(torch.randn(1, 8, 16, 16), torch.randn(1, 128, 16, 16))
    """

    def __init__(self, channels: int, condition_channels: int, *,
                 backend: str | None = None) -> None:
        super().__init__(condition_channels, 9 * channels, 3, padding=1)
        self.backend = backend

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return conditional_conv2d(input, condition, self.weight, self.bias,
                                  tile=2 if self.training else best_tile(input),
                                  backend=self.backend)
