"""SPADE under conditions that do not vary over the image: conditional BatchNorm, and AdaIN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.indexed_modulation.op import indexed_modulation
from ..ops.segments import Pieces, Segments, in_pieces
from ..runtime.check import (
    FLOATS,
    INTEGERS,
    check_range,
    check_tensor,
    looked_at,
    valueless,
)
from ..runtime.derivatives import transformed
from ..runtime.tensors import acc_dtype
from .normalizing import Normalizing, is_told_by_weights


def _per_image(input: Tensor, gamma: Tensor, beta: Tensor, *, upsample: bool,
               **options: Any) -> Tensor:
    """Modulate by gamma and beta (N, C): rows of a table that every pixel of an image picks."""
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    n, scale = input.shape[0], 2 if upsample else 1
    table = F.pad(torch.cat([gamma, beta], 1).to(acc_dtype(input)), (0, 0, 1, 0))
    rows = torch.arange(1, n + 1, dtype=torch.int32, device=input.device)
    size = (n, input.shape[2] * scale, input.shape[3] * scale)
    index = rows.view(-1, 1, 1).expand(size).contiguous()

    def order() -> Pieces:  # as they lie
        bounds = F.pad(torch.arange(n + 1, device=index.device) * index[0].numel(), (1, 0))
        return in_pieces(Segments(torch.arange(index.numel(), device=index.device), bounds))

    return indexed_modulation(input, index, table, order=order, upsample=upsample, **options)


def _one_hot(classes: Tensor, count: int) -> Tensor:
    """(N, count), NaN of a class that there is not; nothing waits for it."""
    numbers = torch.arange(count, device=classes.device)
    known = (classes >= 0) & (classes < count)
    return torch.where(known[:, None], (classes[:, None] == numbers).double(), torch.nan)


def _picked(classes: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
    """What the layers make of classes (N,), NaN of one that there is not; nothing waits for it."""
    count = layers[0].in_features
    known = (classes >= 0) & (classes < count)
    classes = classes.where(known, 0)
    return [torch.where(known[:, None], F.embedding(classes, layer.weight.T) + layer.bias,
                        torch.nan) for layer in layers]


class ConditionalNorm2d(Normalizing):
    r"""SPADE whose condition is one vector for an image: with norm "batch" conditional BatchNorm.

    .. math:: y = \hat x (1 + \gamma(c)) + \beta(c), \quad \gamma, \beta \text{ linear in } c

    It equals ``SPADE(channels, K, hidden=0, kernel_size=1)`` on a map that is c at every pixel, but
    gamma and beta are computed once for an image, not at every pixel. With norm "instance" it is
    AdaIN with learned parameters, as in style-based generators.

    Args:
        channels: C of the features.
        condition_channels: K; the number of classes where conditions are classes.
        norm: "batch", "syncbatch" (all-reduced in training under torch.distributed), "instance" or
            "none".
        backend: "auto", "reference", "cpu" or "triton"; default: what ``use_backend`` says.

    State dict: ``param_free_norm.*``, ``mlp_gamma.*``, ``mlp_beta.*``.

    Raises:
        ValueError, TypeError: a condition that does not fit; the message names it.
        ValueError: a class outside 0..condition_channels-1. A GPU is not made to wait for that
            check: there such an image becomes NaN.

    Papers: de Vries et al., "Modulating Early Visual Processing by Language", NeurIPS 2017; Park et
    al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019, section 3.

    Example:
        >>> norm = ConditionalNorm2d(64, 10)
        >>> y = norm(torch.randn(2, 64, 32, 32), torch.tensor([3, 7]), activation="relu")
    """

    def __init__(self, channels: int, condition_channels: int, *, norm: str = "batch",
                 backend: str | None = None) -> None:
        super().__init__(channels, norm)
        self.condition_channels, self.backend = condition_channels, backend
        self.mlp_gamma = nn.Linear(condition_channels, channels)
        self.mlp_beta = nn.Linear(condition_channels, channels)

    def _affine(self, condition: Tensor) -> list[Tensor]:
        """Gamma and beta, (N, C) each."""
        layers = self.mlp_gamma, self.mlp_beta
        if condition.is_floating_point():
            return [layer(condition) for layer in layers]
        classes = condition.long()
        here = (classes.device.type == "cpu" and not torch.compiler.is_compiling()
                and transformed() is None and not valueless(classes))
        checked = here or looked_at(classes, "triton")
        if checked:
            check_range("condition", classes, self.condition_channels)
        if not all(is_told_by_weights(layer, nn.Linear) for layer in layers):
            # what they do beside runs where they are called
            dtype = next(self.mlp_gamma.parameters()).dtype
            rows = _one_hot(classes, self.condition_channels).to(dtype)
            return [layer(rows) for layer in layers]
        if checked:
            return [F.embedding(classes, layer.weight.T) + layer.bias for layer in layers]
        return _picked(classes, layers)

    def forward(self, input: Tensor, condition: Tensor, *, activation: str | None = None,
                negative_slope: float = 0.2, upsample: bool = False) -> Tensor:
        """Modulate (N, C, H, W) by classes (N,) or vectors (N, K); the rest as :class:`SPADE`."""
        check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
        check_tensor("condition", condition, (1, 2), "(N,) classes or (N, K) vectors", None)
        shape, n, k = tuple(condition.shape), input.shape[0], self.condition_channels
        if shape != ((n, k) if condition.is_floating_point() else (n,)):
            raise ValueError(
                f"condition: expected classes ({n},) or vectors {(n, k)}, got {shape} of "
                f"{str(condition.dtype).removeprefix('torch.')}"
            )
        if not condition.is_floating_point():
            check_tensor("condition", condition, 1, "(N,) classes", INTEGERS)
        gamma, beta = self._affine(condition)
        input, options = self.normalised(input, upsample)
        return _per_image(input, gamma, beta, activation=activation, negative_slope=negative_slope,
                          backend=self.backend, **options)


def adain(input: Tensor, style: Tensor, *, activation: str | None = None,
          negative_slope: float = 0.2, upsample: bool = False, eps: float = 1e-5,
          backend: str | None = None) -> Tensor:
    r"""Give the features the mean and spread of another picture's, channel by channel: AdaIN.

    .. math:: y = \sigma(s) \frac{x - \mu(x)}{\sigma(x)} + \mu(s)

    SPADE on an image in place of a map: spatially invariant, one image at a time (instance norm),
    where gamma is the spread less 1 and beta the mean. The spread is the root of the biased
    variance plus ``eps``.

    Args:
        input: x, (N, C, H, W), float32, float64, float16 or bfloat16.
        style: s, (N, C, any, any) of the same dtype.
        activation, negative_slope, upsample, backend: as in :func:`modulation`.

    Returns:
        (N, C, H, W), or (N, C, 2H, 2W) with ``upsample``. Differentiable in both.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Paper: Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", ICCV 2017.

    Example:
        >>> y = adain(torch.randn(1, 64, 32, 32), torch.randn(1, 64, 48, 48))
    """
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    check_tensor("style", style, 4, "(N, C, H, W)", (input.dtype,))
    if style.shape[:2] != input.shape[:2]:
        raise ValueError(
            f"style: expected batch and channels {tuple(input.shape[:2])} of the input, got "
            f"{tuple(style.shape[:2])}"
        )
    var, mean = torch.var_mean(style.to(acc_dtype(style)), (2, 3), correction=0)
    return _per_image(
        input, (var + eps).sqrt() - 1, mean, upsample=upsample, activation=activation,
        negative_slope=negative_slope, norm="instance", eps=eps, backend=backend,
    )
