"""Conditional norms that compute what SPADE does, under other names and in other parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from foreign import LayoutNorm
from torch import Tensor, nn
from torch.nn.utils import spectral_norm


class Noised(nn.Module):
    """As OASIS names it: the norm comes first, ReLU is a function."""

    def __init__(self, width: int, planes: int, hidden: int = 8) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(width, affine=False)
        self.trunk = nn.Conv2d(planes, hidden, 3, padding=1)
        self.scale, self.shift = (nn.Conv2d(hidden, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, seg: Tensor) -> Tensor:
        y = self.first_norm(x)
        seg = F.interpolate(seg, size=x.size()[2:], mode="nearest")
        h = F.relu(self.trunk(seg))
        return y * (1 + self.scale(h)) + self.shift(h)


class Wrapped(nn.Sequential):
    """A conv in a module of its own, with what follows it."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, slope: float | None = None,
                 norm: nn.Module | None = None) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(inputs, outputs, size, padding=size // 2))
        after = nn.Sequential()
        if norm is not None:
            after.add_module("N", norm)
        if slope is not None:
            after.add_module("A", nn.LeakyReLU(slope))
        self.add_module("after", after)


class Blocks(nn.Module):
    """As MONAI builds it: wrapped convs, and gamma and beta normalised over the image."""

    def __init__(self, width: int, planes: int, hidden: int = 8, *, norm: nn.Module | None = None,
                 inner: Callable[[int], nn.Module] | None = nn.InstanceNorm2d) -> None:
        super().__init__()
        self.plain = norm or nn.InstanceNorm2d(width)
        self.shared = Wrapped(planes, hidden, slope=0.01)
        self.g, self.b = (Wrapped(hidden, width, norm=inner and inner(width)) for _ in range(2))

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        segmap = F.interpolate(segmap, size=x.size()[2:], mode="nearest")
        h = self.shared(segmap)
        return self.plain(x) * (1 + self.g(h)) + self.b(h)


class Separate(nn.Module):
    """As imaginaire has it: an affine norm, a trunk for each, any number of maps."""

    def __init__(self, width: int, planes: int, hidden: int = 8, size: int = 5) -> None:
        super().__init__()

        def head(out: int) -> nn.Module:
            pad = size // 2
            return nn.Sequential(
                spectral_norm(nn.Conv2d(planes, hidden, size, padding=pad)), nn.ReLU(True),
                spectral_norm(nn.Conv2d(hidden, out, size, padding=pad, bias=False)))

        self.norm = nn.BatchNorm2d(width)
        self.gammas, self.betas = (nn.ModuleList([head(width)]) for _ in range(2))

    def forward(self, x: Tensor, *maps: Tensor, **_: Any) -> Tensor:
        y = self.norm(x)
        for i, plane in enumerate(maps):
            plane = F.interpolate(plane, size=x.shape[2:])
            y = y * (1 + self.gammas[i](plane)) + self.betas[i](plane)
        return y


class Reflected(nn.Module):
    """As CoCosNet has it: positional norm, reflection outside the convs."""

    def __init__(self, width: int, planes: int, hidden: int = 8) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.c0, self.c1, self.c2 = (nn.Conv2d(i, o, 3) for i, o in (
            (planes, hidden), (hidden, width), (hidden, width)))

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        std = x.var(dim=1, keepdim=True).add(1e-5).sqrt()
        y = (x - mean) / std
        segmap = F.interpolate(segmap, size=x.shape[2:], mode="nearest")
        h = F.relu(self.c0(self.pad(segmap)))
        return y * (1 + self.c1(self.pad(h))) + self.c2(self.pad(h))


class Table(nn.Module):
    """As CLADE has it: a row of scale and shift for each class."""

    def __init__(self, width: int, planes: int) -> None:
        super().__init__()
        self.base = nn.BatchNorm2d(width, affine=False)
        self.rows, self.offsets = (nn.Parameter(torch.randn(planes, width)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, distances: Tensor | None = None) -> Tensor:
        mask = F.interpolate(mask, size=x.shape[2:], mode="nearest")
        which = torch.argmax(mask, 1).long()
        scale = F.embedding(which, self.rows).permute(0, 3, 1, 2)
        y = self.base(x) * scale + F.embedding(which, self.offsets).permute(0, 3, 1, 2)
        return y if distances is None else y + distances


class Summed(nn.Module):
    """As a sum over classes: one-hot planes choose the rows."""

    def __init__(self, width: int, planes: int) -> None:
        super().__init__()
        self.base = nn.InstanceNorm2d(width)
        self.rows, self.offsets = (nn.Parameter(torch.randn(planes, width)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scale = torch.einsum("ic,nihw->nchw", self.rows, mask)
        return self.base(x) * scale + torch.einsum("ic,nihw->nchw", self.offsets, mask)


class Chunked(nn.Module):
    """One conv for both; the sum is written out."""

    def __init__(self, width: int, planes: int, hidden: int = 8, norm: nn.Module | None = None,
                 bias: bool = True) -> None:
        super().__init__()
        self.n = norm or nn.GroupNorm(2, width)
        self.a = nn.Conv2d(planes, hidden, 1)
        self.b = nn.Conv2d(hidden, 2 * width, 3, padding=1, bias=bias)

    def forward(self, feat: Tensor, cond: Tensor) -> Tensor:
        y = self.n(feat)
        gamma, beta = self.b(F.leaky_relu(self.a(cond), 0.3, True)).chunk(2, dim=1)
        return y + y * gamma + beta


class MapFirst(Chunked):
    def forward(self, cond: Tensor, feat: Tensor) -> Tensor:
        if cond.shape[2:] != feat.shape[2:]:
            cond = F.interpolate(cond, feat.shape[2:])
        return super().forward(feat, cond)


class Layered(LayoutNorm):
    """A norm over the channels of each pixel, with parameters."""

    def __init__(self, width: int, planes: int, hidden: int = 8) -> None:
        super().__init__(width, planes, hidden)
        self.param_free_norm = nn.Identity()
        self.ln = nn.LayerNorm(width)

    def blend(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = self.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return gamma * y + beta


class WideTable(nn.Module):
    """One 5x5 conv each from the map."""

    def __init__(self, width: int, planes: int) -> None:
        super().__init__()
        self.n = nn.BatchNorm2d(width)
        self.g, self.b = (nn.Conv2d(planes, width, 5, padding=2, groups=1) for _ in range(2))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        m = F.interpolate(m, x.shape[2:])
        return torch.addcmul(self.b(m), self.n(x), self.g(m) + 1)


class Skipped(nn.Module):
    """The map joins what a conv makes of it."""

    def __init__(self, width: int, planes: int, hidden: int = 8) -> None:
        super().__init__()
        self.n = nn.InstanceNorm2d(width, affine=True)
        self.t = nn.Conv2d(planes, hidden, 3, padding=1, groups=1)
        self.g, self.b = (nn.Conv2d(hidden + planes, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        m = F.interpolate(m, x.shape[2:])
        h = torch.cat([torch.tanh(self.t(m)), m], 1)
        return self.n(x) * (1 + torch.sigmoid(self.g(h))) + self.b(h)


class Unnormalised(nn.Module):
    """Spatial feature transform: nothing is normalised."""

    def __init__(self, width: int, planes: int) -> None:
        super().__init__()
        self.g0, self.b0 = (nn.Conv2d(planes, 8, 3, padding=1) for _ in range(2))
        self.g1, self.b1 = (nn.Conv2d(8, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        gamma = self.g1(F.gelu(self.g0(m)))
        return x * (gamma + 1) + self.b1(F.gelu(self.b0(m)))


def width_list(width: int, planes: int) -> dict[str, Callable[[], nn.Module]]:
    """Every norm of the kind, by name."""
    return {
        "noised": lambda: Noised(width, planes),
        "blocks": lambda: Blocks(width, planes),
        "blocks_affine": lambda: Blocks(width, planes, norm=nn.GroupNorm(3, width), inner=None),
        "blocks_batch": lambda: Blocks(width, planes, norm=nn.BatchNorm2d(width), inner=(
            lambda c: nn.InstanceNorm2d(c, affine=True, eps=0.1))),
        "separate": lambda: Separate(width, planes),
        "separate_3": lambda: Separate(width, planes, size=3),
        "reflected": lambda: Reflected(width, planes),
        "table": lambda: Table(width, planes),
        "summed": lambda: Summed(width, planes),
        "chunked": lambda: Chunked(width, planes),
        "chunked_no_bias": lambda: Chunked(width, planes, norm=nn.BatchNorm2d(width), bias=False),
        "map_first": lambda: MapFirst(width, planes),
        "layered": lambda: Layered(width, planes),
        "wide_table": lambda: WideTable(width, planes),
        "skipped": lambda: Skipped(width, planes),
        "unnormalised": lambda: Unnormalised(width, planes),
    }
