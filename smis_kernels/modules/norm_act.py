"""Instance normalisation with its activation and residual, as a drop-in module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.norm_act.op import norm_act


class InstanceNormAct2d(nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` (no parameters) with activation and residual in its pass.

    Args:
        num_features: C.
        eps: as there.
        activation: None, "relu" or "leaky_relu" (with ``negative_slope``).
        backend: "auto", "reference", "cpu" or "triton"; default: what ``use_backend`` says.

    Shape: input (N, C, H, W), residual (N, C, H, W) or None -> (N, C, H, W).

    Source: Ulyanov et al., "Instance Normalization: The Missing Ingredient for Fast Stylization",
    2016.

    Example:
        >>> import torch
        >>> norm = InstanceNormAct2d(64, activation="relu")
        >>> y = norm(torch.randn(1, 64, 32, 32))
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, activation: str | None = None,
                 negative_slope: float = 0.2, backend: str | None = None) -> None:
        super().__init__(num_features, eps)
        self.activation, self.negative_slope = activation, negative_slope
        self.backend = backend

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm_act(input, residual, eps=self.eps, activation=self.activation,
                        negative_slope=self.negative_slope, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, activation={self.activation!r}"
