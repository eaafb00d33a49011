"""Blocks as other people write them: wrapped convs, other orders, norms of other arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Called(nn.Module):
    """A conv in a module that only calls it, and an activation if there is one."""

    def __init__(self, width: int, out: int, size: int = 3, act: nn.Module | None = None) -> None:
        super().__init__()
        self.inside = nn.Conv2d(width, out, size, padding=size // 2)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        return y if self.act is None else self.act(y)


class Norm(nn.Module):
    """SPADE's, its convs wrapped."""

    def __init__(self, width: int, planes: int, hidden: int = 8) -> None:
        super().__init__()
        self.plain = nn.BatchNorm2d(width, affine=False)
        self.trunk = Called(planes, hidden, act=nn.ReLU())
        self.factor, self.offset = Called(hidden, width), Called(hidden, width)

    def made(self, x: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(F.interpolate(scene, size=x.shape[2:], mode="nearest"))
        return self.factor(h), self.offset(h)

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        gamma, beta = self.made(x, scene)
        return self.plain(x) * (1 + gamma) + beta


class Squashed(Norm):
    """Gamma through a sigmoid, beta through a tanh."""

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        gamma, beta = self.made(x, scene)
        return self.plain(x) * 2 * gamma.sigmoid() + beta.tanh()


class Bounded(Norm):
    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        gamma, beta = self.made(x, scene)
        return self.plain(x) * (1 + gamma.clamp(-0.5, 0.5)) + beta


class Twice(Norm):
    """Normalised over the batch, then over the image."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.image = nn.InstanceNorm2d(self.plain.num_features)

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        gamma, beta = self.made(x, scene)
        return self.image(self.plain(x)) * (1 + gamma) + beta


class Levels(nn.Module):
    """Lists of gammas and betas, one after the other."""

    def __init__(self, width: int, planes: int, hidden: int = 8) -> None:
        super().__init__()
        self.plain = nn.InstanceNorm2d(width)
        self.trunk = nn.Conv2d(planes, hidden, 3, padding=1)
        self.factors, self.offsets = (
            nn.ModuleList(nn.Conv2d(hidden, width, 3, padding=1) for _ in range(2))
            for _ in range(2))

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        h, y = F.gelu(self.trunk(F.interpolate(scene, x.shape[-2:]))), self.plain(x)
        for factor, offset in zip(self.factors, self.offsets, strict=True):
            y = y * (1 + factor(h)) + offset(h)
        return y


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2 + 0.1


class Parametrized(Norm):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        nn.utils.parametrize.register_parametrization(self.factor.inside, "weight", Halved())


class NearestExact(Norm):
    """Another rounding of the map's pixels."""

    def made(self, x: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(F.interpolate(scene, size=x.shape[2:], mode="nearest-exact"))
        return self.factor(h), self.offset(h)


class Strided(Norm):
    def made(self, x: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        step = scene.shape[2] // x.shape[2]
        h = self.trunk(scene[:, :, ::step, ::step])
        return self.factor(h), self.offset(h)


class Pooled(Norm):
    def made(self, x: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(F.adaptive_max_pool2d(scene, x.shape[2:]))
        return self.factor(h), self.offset(h)


class Residual(Norm):
    """The features as they came are added."""

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        gamma, beta = self.made(x, scene)
        return x + self.plain(x) * gamma + beta


class Checkpointed(Norm):
    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, scene, use_reentrant=False)
        return out


class Block(nn.Module):
    """A residual block of wrapped convs."""

    def __init__(self, width: int, planes: int, norm: Callable[..., nn.Module] = Norm,
                 act: nn.Module | None = None) -> None:
        super().__init__()
        self.n_0, self.n_1 = norm(width, planes), norm(width, planes)
        self.c_0, self.c_1 = Called(width, width), Called(width, width)
        self.act = act or nn.ReLU()

    def inner(self, x: Tensor, scene: Tensor) -> Tensor:
        y = self.c_0(self.act(self.n_0(x, scene)))
        out: Tensor = self.c_1(self.act(self.n_1(y, scene)))
        return out

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        return x + self.inner(x, scene)


class Growing(Block):
    """Its features are twice as large from the start."""

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"), scene)


class Weighed(Block):
    """A learned weight of the branch, and SiLU."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        y = self.c_1(F.silu(self.n_1(self.c_0(self.act(self.n_0(x, scene))), scene)))
        return (x + self.weight * y) / math.sqrt(2)


class After(Block):
    """Norms come after the convs, the sum is activated."""

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        y = self.n_1(self.c_1(F.relu(self.n_0(self.c_0(x), scene))), scene)
        return F.leaky_relu(y + x, 0.1)


class MapFirst(Block):
    def forward(self, scene: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, scene)


class Dense(Block):
    """The second conv sees both activations."""

    def __init__(self, width: int, planes: int) -> None:
        super().__init__(width, planes)
        self.c_1 = Called(2 * width, width)

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        h = self.act(self.n_0(x, scene))
        return x + self.c_1(torch.cat([h, self.act(self.n_1(self.c_0(h), scene))], 1))


class Resizing(Block):
    """It resizes the map once for both norms."""

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        return super().forward(x, F.interpolate(scene, size=x.shape[2:], mode="nearest"))


class Noisy(Block):
    """Noise of its own is added; here it is constant."""

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.ones_like(x), scene)


class Dropping(Block):
    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        return x + F.dropout(self.inner(x, scene), 0.0, self.training)


class Stack(nn.Module):
    """A network of two such blocks."""

    def __init__(self, planes: int, block: Callable[..., nn.Module] = Block, width: int = 6,
                 **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(block(width, planes, **options) for _ in range(2))
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, scene: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(scene, x) if isinstance(block, MapFirst) else block(x, scene)
        out: Tensor = self.out(x)
        return out
