"""Networks that this project did not write, to accelerate: written from the papers' descriptions.

Attributes are those of the published state dicts, since checkpoints fix them; classes, methods and
code are not. Nothing here knows of ``smis_kernels``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm


class LayoutNorm(nn.Module):
    """SPADE's norm; with groups GroupDNet's."""

    def __init__(self, width: int, planes: int, hidden: int = 128, *, groups: int = 1,
                 shared_groups: int = 1, norm: Callable[..., nn.Module] = nn.BatchNorm2d,
                 size: int = 3) -> None:
        super().__init__()
        pad = size // 2
        self.param_free_norm = norm(width, affine=False)
        self.mlp_shared = nn.Sequential(
            nn.Conv2d(planes, hidden, size, padding=pad, groups=shared_groups), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, width, size, padding=pad, groups=groups)
        self.mlp_beta = nn.Conv2d(hidden, width, size, padding=pad, groups=groups)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        scene = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
        return self.blend(self.param_free_norm(x), self.mlp_gamma(scene), self.mlp_beta(scene))

    def blend(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return x * (1 + gamma) + beta


class PlainScale(LayoutNorm):
    """A known clone: the same attributes, but no 1 is added to gamma."""

    def blend(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return x * gamma + beta


class Rectified(LayoutNorm):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap).relu()


class Clamped(LayoutNorm):
    """An extra operation that most values pass unchanged."""

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap).clamp(-8, 8)


class StopGradient(LayoutNorm):
    """The same values, but gamma learns nothing."""

    def blend(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return super().blend(x, gamma.detach(), beta)


class SmoothResize(LayoutNorm):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        resized = F.interpolate(segmap, size=x.shape[2:], mode="bilinear")
        return super().forward(x, resized)


class UncountedBatchNorm(nn.BatchNorm2d):
    """As the published synchronised norms do on one device: batches are not counted."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias,
                            self.training, self.momentum, self.eps)


class Unit(nn.Module):
    """The residual block of SPADE and GroupDNet."""

    def __init__(self, width: int, out: int, norm: Callable[[int], nn.Module],
                 groups: int = 1) -> None:
        super().__init__()
        middle = min(width, out)
        self.learned = width != out
        self.conv_0 = spectral_norm(nn.Conv2d(width, middle, 3, padding=1, groups=groups))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, out, 3, padding=1, groups=groups))
        if self.learned:
            self.conv_s = spectral_norm(nn.Conv2d(width, out, 1, bias=False, groups=groups))
        self.norm_0, self.norm_1 = norm(width), norm(middle)
        if self.learned:
            self.norm_s = norm(width)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        side = self.conv_s(self.norm_s(x, segmap)) if self.learned else x
        x = self.conv_0(self.active(self.norm_0(x, segmap)))
        return side + self.conv_1(self.active(self.norm_1(x, segmap)))

    def active(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2)


class DampedUnit(Unit):
    """Residual scaling: an extra operation in a block."""

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) * 0.9


class HalfTrainedUnit(Unit):
    """The same values, but the shortcut passes no gradient."""

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        side = self.conv_s(self.norm_s(x, segmap)).detach()
        x = self.conv_0(self.active(self.norm_0(x, segmap)))
        return side + self.conv_1(self.active(self.norm_1(x, segmap)))


class ReluUnit(Unit):
    def active(self, x: Tensor) -> Tensor:
        return F.relu(x)


_NAMES = ("head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3")


class Painter(nn.Module):
    """SPADE's generator without a latent code; it hands its float map to every block."""

    def __init__(self, planes: int = 184, ngf: int = 64, hidden: int = 128, size: int = 256,
                 norm: Callable[..., nn.Module] = LayoutNorm,
                 unit: Callable[..., nn.Module] = Unit) -> None:
        super().__init__()
        self.start = (size // 32, size // 32)
        width = 16 * ngf
        self.fc = nn.Conv2d(planes, width, 3, padding=1)
        for name, factor in zip(_NAMES, (16, 16, 16, 8, 4, 2, 1), strict=True):
            block = unit(width, factor * ngf, lambda c: norm(c, planes, hidden))
            self.add_module(name, block)
            width = factor * ngf
        self.conv_img = nn.Conv2d(width, 3, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, segmap: Tensor) -> Tensor:
        x = self.fc(F.interpolate(segmap, size=self.start))
        for name in _NAMES:
            if name not in ("head_0", "G_middle_1"):
                x = self.up(x)
            x = getattr(self, name)(x, segmap)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class ResizingPainter(Painter):
    """It resizes the map itself, anew for every block."""

    def forward(self, segmap: Tensor) -> Tensor:
        x = self.fc(F.interpolate(segmap, size=self.start))
        for name in _NAMES:
            if name not in ("head_0", "G_middle_1"):
                x = self.up(x)
            x = getattr(self, name)(x, F.interpolate(segmap, size=x.shape[2:]))
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class GroupPainter(nn.Module):
    """GroupDNet's generator for ADE20K: a code per class, and ever fewer groups."""

    def __init__(self, classes: int = 151,
                 widths: Sequence[int] = (2048, 1024, 1024, 512, 256, 128),
                 groups: Sequence[int] = (16, 16, 8, 4, 2, 1)) -> None:
        super().__init__()
        width = 16 * classes
        self.code = (8 * classes, 4, 4)
        self.fc = nn.Conv2d(8 * classes, width, 3, padding=1, groups=classes)
        for name, out, count in zip(_NAMES, (width, *widths), (classes, *groups), strict=True):
            hidden = 2 * classes if classes % count == 0 else classes * count

            def norm(c: int, hidden: int = hidden, count: int = count) -> nn.Module:
                return LayoutNorm(c, classes, hidden, groups=count, shared_groups=classes,
                                  norm=UncountedBatchNorm)

            self.add_module(name, Unit(width, out, norm, count))
            width = out
        self.conv_img = nn.Conv2d(width, 3, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, segmap: Tensor, z: Tensor) -> Tensor:
        x = self.fc(z.view(-1, *self.code))
        for name in _NAMES:
            if name != "head_0":
                x = self.up(x)
            x = getattr(self, name)(x, segmap)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))
