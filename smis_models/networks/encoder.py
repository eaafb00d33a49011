"""The encoder of strided convs, and the draw of its code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from smis_kernels import norm_act
from smis_kernels.interface import hooked, strided_conv2d

from .blocks import conv, fast_format


def of_classes(parameter: Tensor, classes: Tensor, count: int) -> Tensor:
    """The rows of ``classes`` of a parameter whose rows belong to ``count`` classes."""
    return parameter.unflatten(0, (count, -1)).index_select(0, classes).flatten(0, 1)


def _conv_weight(layer: nn.Conv2d, classes: Tensor, count: int) -> Tensor:
    """The weight of ``classes``, spectral norm applied as the layer's hook does: over all of it."""
    hooks = layer._forward_pre_hooks.values()
    spectral = next((hook for hook in hooks if isinstance(hook, SpectralNorm)), None)
    if spectral is None or layer.training:
        if spectral is not None:
            spectral(layer, ())  # a step of power iteration
        return of_classes(layer.weight, classes, count)
    original, u, v = (
        layer.get_parameter("weight_orig"), layer.get_buffer("weight_u"),
        layer.get_buffer("weight_v"),
    )
    sigma = torch.dot(u, torch.mv(spectral.reshape_weight_to_matrix(original), v))
    return of_classes(original, classes, count) / sigma


class StridedEncoder(nn.Module):
    """Convs 3x3, stride 2, spectral and instance normalised, each followed by LeakyReLU(0.2).

    A plane of one pixel, in which there is nothing to normalise, is left as it is.

    Args:
        channels: of the input.
        width: of the first conv; it doubles up to eight times that.
        depth: number of convs.
        groups: of every conv.
    """

    def __init__(self, channels: int, width: int, depth: int, groups: int = 1) -> None:
        super().__init__()
        self.depth, self.groups = depth, groups
        for i in range(depth):
            out = width * min(2**i, 8)
            layer = conv(channels, out, groups=groups, stride=2, bias=False, spectral=True,
                         what=f"layer{i + 1}")
            self.add_module(f"layer{i + 1}", nn.Sequential(layer, nn.InstanceNorm2d(out)))
            channels = out
        self.width = channels

    def strided(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """The features of ``x``; where ``classes`` are given, its groups are theirs alone."""
        x = fast_format(x)
        for i in range(self.depth):
            stage = self.get_submodule(f"layer{i + 1}")
            layer, norm = stage.children()
            if classes is None and (hooked(stage, norm) or type(norm) is not nn.InstanceNorm2d):
                x = F.leaky_relu(stage(x), 0.2)  # hooks see what the modules say
                continue
            assert isinstance(layer, nn.Conv2d) and isinstance(norm, nn.InstanceNorm2d)
            if classes is None:
                x = layer(x)
            else:
                weight = _conv_weight(layer, classes, self.groups)
                x = strided_conv2d(x, weight, stride=2, padding=1, groups=len(classes))
            kind = "none" if x.shape[2:].numel() == 1 else "instance"
            x = norm_act(x, norm=kind, eps=norm.eps, activation="leaky_relu", negative_slope=0.2)
        return x


class CodeEncoder(nn.Module):
    """Two linear heads, mean and log variance of one code for the whole image."""

    def add_heads(self, features: int, channels: int) -> None:
        """Make the heads, which read that many features; each gives that many channels."""
        self.fc_mu = nn.Linear(features, channels)
        self.fc_var = nn.Linear(features, channels)

    def encode(self, image: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of ``image``; labels, which other systems' encoders read, are not read."""
        return self(image)


def reparameterize(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None,
                   noise: Tensor | None = None) -> Tensor:
    """A sample of the latent code: ``z = mu + exp(logvar / 2) * noise``, noise from N(0, 1)."""
    if noise is None:
        noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    return mu + noise * torch.exp(0.5 * logvar)
