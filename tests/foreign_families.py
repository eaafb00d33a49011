"""More networks that this project did not write: OASIS, imaginaire, CoCosNet, CLADE, INADE, SEAN.

Written from the papers' descriptions. No name is a published one, for names must not matter.
Nothing here knows of ``smis_kernels``; ``FAMILIES`` lists the classes that normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm


class NoisyNorm(nn.Module):
    """OASIS's: its map carries noise beside the classes; synchronised statistics."""

    def __init__(self, width: int, planes: int, hidden: int = 128,
                 statistics: Callable[..., nn.Module] = nn.SyncBatchNorm) -> None:
        super().__init__()
        self.statistics = statistics(width, affine=False)
        self.common = nn.Sequential(nn.Conv2d(planes, hidden, 3, padding=1), nn.ReLU())
        self.factor = nn.Conv2d(hidden, width, 3, padding=1)
        self.offset = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, features: Tensor, layout: Tensor) -> Tensor:
        layout = F.interpolate(layout, size=features.size()[2:], mode="nearest")
        plain = self.statistics(features)
        common = self.common(layout)
        return plain * (1 + self.factor(common)) + self.offset(common)


class NoisyUnit(nn.Module):
    """OASIS's residual block; its activation works in place."""

    def __init__(self, width: int, out: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        middle = min(width, out)
        self.first = spectral_norm(nn.Conv2d(width, middle, 3, padding=1))
        self.second = spectral_norm(nn.Conv2d(middle, out, 3, padding=1))
        self.before_first, self.before_second = norm(width), norm(middle)
        self.adapts = width != out
        if self.adapts:
            self.adapt = spectral_norm(nn.Conv2d(width, out, 1, bias=False))
            self.before_adapt = norm(width)
        self.bend = nn.LeakyReLU(0.2, True)

    def forward(self, x: Tensor, layout: Tensor) -> Tensor:
        side = self.adapt(self.before_adapt(x, layout)) if self.adapts else x
        y = self.first(self.bend(self.before_first(x, layout)))
        y = self.second(self.bend(self.before_second(y, layout)))
        return side + y


class NoisyPainter(nn.Module):
    """OASIS's generator. Its noise is one vector an image, spread over all pixels.

    ``noise`` is the number of its channels, 0 for none; it is an argument here, for repeatability.
    """

    def __init__(self, classes: int = 151, noise: int = 64, width: int = 64, hidden: int = 128,
                 size: int = 256, factors: Sequence[int] = (16, 16, 16, 8, 4, 2, 1),
                 norm: Callable[..., nn.Module] = NoisyNorm) -> None:
        super().__init__()
        self.noise, self.start = noise, size // 2 ** (len(factors) - 2)
        planes = classes + noise
        self.stem = nn.Conv2d(planes, factors[0] * width, 3, padding=1)
        self.units = nn.ModuleList(
            NoisyUnit(a * width, b * width, lambda c: norm(c, planes, hidden))
            for a, b in pairwise(factors))
        self.grow = nn.Upsample(scale_factor=2)
        self.paint = nn.Conv2d(factors[-1] * width, 3, 3, padding=1)

    def forward(self, classes: Tensor, noise: Tensor | None = None) -> Tensor:
        layout = classes
        if noise is not None:
            spread = noise.view(len(noise), self.noise, 1, 1).expand(-1, -1, *classes.shape[2:])
            layout = torch.cat((spread, classes), 1)
        x = self.stem(F.interpolate(layout, size=(self.start, self.start)))
        for i, unit in enumerate(self.units):
            x = unit(x, layout)
            if i < len(self.units) - 1:
                x = self.grow(x)
        return torch.tanh(self.paint(F.leaky_relu(x, 0.2)))


class Stage(nn.Module):
    """imaginaire's conv block: norm, activation and conv in an order given by letters."""

    def __init__(self, width: int, out: int, size: int = 3, order: str = "C", *,
                 norm: nn.Module | None = None, slope: float = 0.2, bias: bool = True,
                 wrap: Callable[[nn.Module], nn.Module] = nn.Identity) -> None:
        super().__init__()
        conv = nn.Conv2d(width, out, size, padding=size // 2, bias=bias)
        made: dict[str, nn.Module | None] = {
            "C": conv if wrap is nn.Identity else wrap(conv), "N": norm,
            "A": nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)}
        self.parts = nn.ModuleDict(
            {letter: part for letter in order if (part := made[letter]) is not None})

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        for letter, part in self.parts.items():
            x = part(x, *conditions) if letter == "N" else part(x)
        return x


class WrappedNorm(nn.Module):
    """imaginaire's: a learned affine norm, 5x5, convs in blocks, any number of conditions."""

    def __init__(self, width: int, planes: int, hidden: int = 128, *, size: int = 5,
                 separate: bool = True, affine: bool = True,
                 wrap: Callable[[nn.Module], nn.Module] = nn.Identity,
                 norm: Callable[..., nn.Module] = nn.SyncBatchNorm) -> None:
        super().__init__()
        self.inner = norm(width, affine=affine)
        self.hidden = nn.ModuleList([Stage(planes, hidden, size, "CA", slope=0.0, wrap=wrap)])
        stage = partial(Stage, hidden, size=size, wrap=wrap)
        self.separate = separate
        if separate:
            self.scales = nn.ModuleList([stage(width)])
            self.shifts = nn.ModuleList([stage(width)])
        else:
            self.both = nn.ModuleList([stage(2 * width)])

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        y = self.inner(x)
        for i, condition in enumerate(conditions):
            resized = F.interpolate(condition, size=x.shape[2:], mode="nearest")
            hidden = self.hidden[i](resized)
            if self.separate:
                scale, shift = self.scales[i](hidden), self.shifts[i](hidden)
            else:
                scale, shift = self.both[i](hidden).chunk(2, 1)
            y = y * (1 + scale) + shift
        return y


class WrappedUnit(nn.Module):
    """imaginaire's residual block: two pre-activated blocks, and a shortcut with a norm."""

    def __init__(self, width: int, out: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        middle = min(width, out)
        self.one = Stage(width, middle, 3, "NAC", norm=norm(width), wrap=spectral_norm)
        self.two = Stage(middle, out, 3, "NAC", norm=norm(middle), wrap=spectral_norm)
        self.side = (None if width == out else
                     Stage(width, out, 1, "NC", norm=norm(width), bias=False, wrap=spectral_norm))

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        y = self.two(self.one(x, *conditions), *conditions)
        return y + (x if self.side is None else self.side(x, *conditions))


class WrappedPainter(nn.Module):
    """imaginaire's SPADE generator without a style: heads at the start, widths halved upwards."""

    def __init__(self, planes: int = 184, width: int = 128, hidden: int = 128, size: int = 256,
                 norm: Callable[..., nn.Module] = WrappedNorm) -> None:
        super().__init__()
        self.start = size // 16
        self.stem = Stage(planes, 8 * width)
        factors = (8, 8, 8, 8, 4, 2, 1)
        self.units = nn.ModuleList(
            WrappedUnit(a * width, b * width, lambda c: norm(c, planes, hidden))
            for a, b in pairwise(factors))
        self.grow = nn.Upsample(scale_factor=2, mode="bilinear")
        self.paint = Stage(width, 3, 5, "AC")

    def forward(self, layout: Tensor) -> Tensor:
        x = self.stem(F.interpolate(layout, size=(self.start, self.start)))
        for i, unit in enumerate(self.units):
            x = unit(x, layout)
            if 1 < i < 6 and x.shape[2] < layout.shape[2]:
                x = self.grow(x)
        return torch.tanh(self.paint(x))


class PixelNorm(nn.Module):
    """Positional normalisation: each pixel's statistics over its channels."""

    def __init__(self, width: int, affine: bool = False, eps: float = 1e-5,
                 unbiased: bool = True) -> None:
        super().__init__()
        self.eps, self.unbiased = eps, unbiased

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        std = x.var(dim=1, keepdim=True, unbiased=self.unbiased).add(self.eps).sqrt()
        return (x - mean) / std


class MirrorNorm(nn.Module):
    """CoCosNet's: positional statistics, and maps mirrored at the border by layers of their own."""

    def __init__(self, width: int, planes: int, hidden: int = 128, size: int = 3,
                 norm: Callable[..., nn.Module] = PixelNorm) -> None:
        super().__init__()
        border = size // 2
        self.inner = norm(width, affine=False)
        self.mirror = nn.ReflectionPad2d(border)
        self.read = nn.Sequential(nn.ReflectionPad2d(border), nn.Conv2d(planes, hidden, size),
                                  nn.ReLU())
        self.scale, self.shift = nn.Conv2d(hidden, width, size), nn.Conv2d(hidden, width, size)

    def forward(self, x: Tensor, pair: Tensor, similarity: Any = None) -> Tensor:
        y = self.inner(x)
        hidden = self.mirror(self.read(F.interpolate(pair, size=x.size()[2:], mode="nearest")))
        return y * (1 + self.scale(hidden)) + self.shift(hidden)


class ClassTableNorm(nn.Module):
    """CLADE's: a row of a table for each class, and no 1 is added; the distance is never given."""

    def __init__(self, width: int, classes: int, hidden: int = 0,
                 norm: Callable[..., nn.Module] = nn.SyncBatchNorm) -> None:
        super().__init__()
        self.inner = norm(width, affine=False)
        self.rows, self.more = (nn.Parameter(torch.rand(classes, width)) for _ in range(2))

    def forward(self, x: Tensor, layout: Tensor, distance: Tensor | None = None) -> Tensor:
        y = self.inner(x)
        classes = F.interpolate(layout, size=x.size()[2:], mode="nearest").argmax(1)
        scale = F.embedding(classes, self.rows).permute(0, 3, 1, 2)
        shift = F.embedding(classes, self.more).permute(0, 3, 1, 2)
        if distance is not None:
            scale = scale * F.interpolate(distance, size=x.size()[2:], mode="nearest")
        return y * scale + shift


class InstanceTableNorm(nn.Module):
    """INADE's: each class has means and deviations, from which every instance draws by its code.

    Without instances the deviations are not read, as its baseline mode does it.
    """

    def __init__(self, width: int, classes: int, codes: int = 8,
                 norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.inner = norm(width, affine=False)
        self.means, self.deviations, self.shifts = (
            nn.Parameter(torch.randn(classes, width)) for _ in range(3))
        self.project = nn.Linear(codes, width)

    def forward(self, x: Tensor, layout: Tensor, instances: Tensor | None = None,
                codes: Tensor | None = None) -> Tensor:
        y, size = self.inner(x), x.shape[2:]
        classes = F.interpolate(layout, size=size, mode="nearest").argmax(1)
        scale = self.means[classes]
        if instances is not None and codes is not None:
            ids = F.interpolate(instances.to(x), size=size, mode="nearest")[:, 0].long()
            drawn = self.project(codes)  # [N, K, C]
            each = torch.stack([d[i] for d, i in zip(drawn, ids, strict=True)])
            scale = scale + self.deviations[classes] * each
        return y * scale.permute(0, 3, 1, 2) + self.shifts[classes].permute(0, 3, 1, 2)


class RegionStyleNorm(nn.Module):
    """SEAN's without its noise: gamma and beta from the map blended with those of styles."""

    def __init__(self, width: int, classes: int, hidden: int = 128, style: int = 16,
                 norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.inner = norm(width, affine=False)
        self.read = nn.Sequential(nn.Conv2d(classes, hidden, 3, padding=1), nn.ReLU())
        self.scale, self.shift = (nn.Conv2d(hidden, width, 3, padding=1) for _ in range(2))
        self.spread = nn.Linear(style, style)
        self.style_scale, self.style_shift = (
            nn.Conv2d(style, width, 3, padding=1) for _ in range(2))
        self.blend_scale, self.blend_shift = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor, layout: Tensor, styles: Tensor) -> Tensor:
        y = self.inner(x)
        layout = F.interpolate(layout, size=x.size()[2:], mode="nearest")
        painted = torch.einsum("nchw,ncs->nshw", layout, self.spread(styles).relu())
        hidden = self.read(layout)
        a, b = torch.sigmoid(self.blend_scale), torch.sigmoid(self.blend_shift)
        scale = a * self.style_scale(painted) + (1 - a) * self.scale(hidden)
        shift = b * self.style_shift(painted) + (1 - b) * self.shift(hidden)
        return y * (1 + scale) + shift


class PlainNorm(nn.Module):
    """The usual re-implementation: short names, functions instead of modules, no 1."""

    def __init__(self, width: int, planes: int, hidden: int = 128,
                 norm: Callable[..., nn.Module] = nn.InstanceNorm2d) -> None:
        super().__init__()
        self.norm = norm(width)
        self.shared = nn.Conv2d(planes, hidden, 3, padding=1)
        self.gamma = nn.Conv2d(hidden, width, 3, padding=1)
        self.beta = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Tensor, seg: Tensor) -> Tensor:
        h = F.relu(self.shared(F.interpolate(seg, x.shape[-2:], mode="nearest")))
        return self.gamma(h) * self.norm(x) + self.beta(h)


class ParametrizedNorm(NoisyNorm):
    """Its convs carry weight or spectral norm, of either API."""

    def __init__(self, width: int, planes: int, hidden: int = 128,
                 wrap: Callable[[nn.Module], nn.Module] = weight_norm) -> None:
        super().__init__(width, planes, hidden, nn.BatchNorm2d)
        self.factor, self.offset = wrap(self.factor), wrap(self.offset)
        self.common[0] = wrap(self.common[0])


class Channels(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__(width, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def groups_of(width: int, affine: bool = False) -> nn.Module:
    """Group norm of two groups."""
    return nn.GroupNorm(2, width, affine=affine)


NORMS = (NoisyNorm, WrappedNorm, MirrorNorm, ClassTableNorm, InstanceTableNorm, RegionStyleNorm,
         PlainNorm)


class ReflectedBlock(nn.Module):
    """pix2pixHD's residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width),
            nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_block(x)
        return out


def global_generator(planes: int, width: int = 64, depth: int = 4, blocks: int = 9,
                     ) -> nn.Sequential:
    """pix2pixHD's global generator as published."""
    layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(planes, width, 7),
                               nn.InstanceNorm2d(width), nn.ReLU(True)]
    for i in range(depth):
        wide = width * 2**i
        layers += [nn.Conv2d(wide, 2 * wide, 3, 2, 1), nn.InstanceNorm2d(2 * wide), nn.ReLU(True)]
    layers += [ReflectedBlock(width * 2**depth) for _ in range(blocks)]
    for i in reversed(range(depth)):
        wide = width * 2**i
        layers += [nn.ConvTranspose2d(2 * wide, wide, 3, 2, 1, 1), nn.InstanceNorm2d(wide),
                   nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())
