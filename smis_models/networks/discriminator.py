"""PatchGAN discriminators of the SPADE family."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv


class PatchDiscriminator(nn.Module):
    """One scale: convs 4x4 with padding 2, strides 2, ..., 2, 1, 1; returns every layer's output.

    Shapes: (N, channels, H, W) -> ``layers`` features and the prediction (N, 1, h, w), a list.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        out = width
        first = conv(channels, out, kernel_size=4, stride=2, padding=2)
        self.model0 = nn.Sequential(first, nn.LeakyReLU(0.2))
        for i in range(1, layers):
            previous, out = out, min(out * 2, 512)
            layer = conv(previous, out, kernel_size=4, stride=1 if i == layers - 1 else 2,
                         padding=2, bias=False, spectral=True)
            normalised = nn.Sequential(layer, nn.InstanceNorm2d(out))
            self.add_module(f"model{i}", nn.Sequential(normalised, nn.LeakyReLU(0.2)))
        last = conv(out, 1, kernel_size=4, padding=2)
        self.add_module(f"model{layers}", nn.Sequential(last))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.children():
            x = layer(x)
            features.append(x)
        return features


class MultiscaleDiscriminator(nn.Module):
    """PatchGAN discriminators on halved copies of the input; ``discriminator_0`` sees it whole.

    Args:
        channels: of the input: semantics and image, concatenated.
        width: of the first conv (``ndf``).
        layers: convs per scale but the last.
        scales: number of discriminators.

    Shapes: x (N, channels, H, W) -> ``scales`` lists of ``layers`` features and the prediction.

    Papers: Wang et al., pix2pixHD, CVPR 2018; Park et al., SPADE, CVPR 2019.

    Example:
        >>> semantics, image = torch.rand(1, 8, 64, 64), torch.rand(1, 3, 64, 64)
        >>> predictions = MultiscaleDiscriminator(8 + 3)(torch.cat([semantics, image], 1))
    """

    def __init__(self, channels: int, width: int = 64, *, layers: int = 4, scales: int = 2) -> None:
        super().__init__()
        for i in range(scales):
            self.add_module(f"discriminator_{i}", PatchDiscriminator(channels, width, layers))
        self.channels = channels

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"x: expected (N, {self.channels}, H, W), semantics and image concatenated; "
                f"got {tuple(x.shape)}"
            )
        results: list[list[Tensor]] = []
        for scale in self.children():
            if results:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            results.append(scale(x))
        return results


def discriminate(discriminator: Callable[[Tensor], list[list[Tensor]]], semantics: Tensor,
                 fake: Tensor, real: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Predictions for fake and real images from one pass, so that both share its statistics.

    Shapes: semantics (N, L, H, W), fake and real (N, 3, H, W) -> two nested lists.
    """
    pairs = torch.cat([torch.cat([semantics, fake], 1), torch.cat([semantics, real], 1)])
    n = semantics.shape[0]
    results = discriminator(pairs)
    fake_results = [[x[:n] for x in scale] for scale in results]
    real_results = [[x[n:] for x in scale] for scale in results]
    return fake_results, real_results
