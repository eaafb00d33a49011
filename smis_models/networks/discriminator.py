"""PatchGAN discriminators of the SPADE family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import InstanceNormAct2d, WinogradConv2d
from smis_kernels.interface import hooked, requested, strided_conv2d

from .blocks import check_maps, conv


def _with_maps(semantics: Tensor, pictures: Tensor) -> Tensor:
    """(N, L, H, W) beside each of (kN, C, H, W): (kN, L + C, H, W)."""
    times = len(pictures) // max(len(semantics), 1)
    return torch.cat([semantics.repeat(times, 1, 1, 1), pictures], 1)


def _shares(layer: nn.Sequential, semantics: Tensor, pictures: Tensor) -> bool:
    """Whether :func:`_shared` computes what the layer would, as exactly: measured on a CPU."""
    first = layer[0]
    return (
        requested() != "reference" and pictures.is_cpu
        and semantics.dtype == pictures.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu") and not hooked(layer, first)
        and isinstance(first, nn.Conv2d) and type(first) in (nn.Conv2d, WinogradConv2d)
        and first.groups == 1 and first.padding_mode == "zeros" and first.dilation == (1, 1)
        and first.stride[0] == first.stride[1] and not isinstance(first.padding, str)
    )


def _shared(layer: nn.Sequential, semantics: Tensor, pictures: Tensor) -> Tensor:
    """``layer(_with_maps(semantics, pictures))``; each map goes through the conv once."""
    first, *rest = layer
    assert isinstance(first, nn.Conv2d)
    n = semantics.shape[1]
    options: dict[str, Any] = {"stride": first.stride[0], "padding": first.padding}
    x = strided_conv2d(pictures, first.weight[:, n:], None, **options)
    of_maps = strided_conv2d(semantics, first.weight[:, :n], first.bias, **options)
    x = (x.unflatten(0, (-1, len(semantics))) + of_maps).flatten(0, 1)
    for module in rest:
        x = module(x)
    return x


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
            normalised = nn.Sequential(layer, InstanceNormAct2d(out, activation="leaky_relu"))
            self.add_module(f"model{i}", nn.Sequential(normalised))
        last = conv(out, 1, kernel_size=4, padding=2)
        self.add_module(f"model{layers}", nn.Sequential(last))

    def forward(self, x: Tensor, semantics: Tensor | None = None) -> list[Tensor]:
        features: list[Tensor] = []
        for layer in self.children():
            if semantics is not None and not features:
                assert isinstance(layer, nn.Sequential)
                x = (_shared(layer, semantics, x) if _shares(layer, semantics, x)
                     else layer(_with_maps(semantics, x)))
            else:
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

    Shapes: x (N, channels, H, W), or with ``semantics`` (N, L, H, W) the pictures alone, any
        number of times N of them in the maps' order, (kN, channels - L, H, W) -> ``scales`` lists
        of ``layers`` features and the prediction.

    Raises:
        ValueError: channels or sizes that do not belong together.

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

    def forward(self, x: Tensor, semantics: Tensor | None = None) -> list[list[Tensor]]:
        channels = self.channels - (0 if semantics is None else semantics.shape[1])
        check_maps("x", x, channels, "semantics and image concatenated")
        if semantics is not None and (
                semantics.shape[2:] != x.shape[2:] or not len(semantics)
                or len(x) % len(semantics)):
            raise ValueError(f"semantics: expected (N, L, {x.shape[2]}, {x.shape[3]}), N a "
                             f"divisor of {len(x)} pictures; got {tuple(semantics.shape)}")
        results: list[list[Tensor]] = []
        for scale in self.children():
            if results:
                x = halved(x)
                semantics = None if semantics is None else halved(semantics)
            results.append(scale(x) if semantics is None else scale(x, semantics))
        return results


def halved(x: Tensor) -> Tensor:
    """The next scale's input: means over 3x3 windows, of what lies inside."""
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)


def discriminate(discriminator: Callable[..., list[list[Tensor]]], semantics: Tensor,
                 fake: Tensor, real: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Predictions for fake and real images from one pass, so that both share its statistics.

    Shapes: semantics (N, L, H, W), fake and real (N, 3, H, W) -> two nested lists.
    """
    pictures, n = torch.cat([fake, real]), semantics.shape[0]
    results = (discriminator(pictures, semantics)
               if isinstance(discriminator, MultiscaleDiscriminator) and not hooked(discriminator)
               else discriminator(_with_maps(semantics, pictures)))
    fake_results = [[x[:n] for x in scale] for scale in results]
    real_results = [[x[n:] for x in scale] for scale in results]
    return fake_results, real_results
