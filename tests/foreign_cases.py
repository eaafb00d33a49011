"""Small foreign networks with weights and inputs, for the tests of ``accelerate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import foreign
import foreign_layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import accelerate
from smis_models.networks.blocks import init_weights

LABELS = 7


def lively(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights at which every term of a formula shows."""
    init_weights(module, seed=1, gain=1.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, t in module.state_dict(keep_vars=True).items():
            leaf = name.rpartition(".")[2]
            if leaf in ("bias", "running_mean"):
                t.normal_(0, 0.3, generator=generator)
            elif leaf == "running_var" or (leaf == "weight" and t.dim() == 1):
                t.uniform_(0.5, 1.5, generator=generator)
    return module.to(dtype)


def stirred(module: nn.Module, seed: int = 1) -> nn.Module:
    """In float64, random wherever a value is learned or kept, whatever it is called."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.3
            p.normal_(0, scale, generator=generator)
            if p.dim() == 1 and name.rpartition(".")[2] == "weight":
                p.add_(1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return module


def label_map(size: int, seed: int = 0, batch: int = 2, labels: int = LABELS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(labels, (batch, 4, 4), generator=generator)
    cells = cells.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    return F.one_hot(cells, labels).permute(0, 3, 1, 2).double().contiguous()


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def small_painter(**options: Any) -> nn.Module:
    return lively(foreign.Painter(LABELS, 4, 8, 64, **options))


def small_group_painter() -> nn.Module:
    return lively(foreign.GroupPainter(4, (16, 16, 8, 8, 4, 4), (4, 4, 2, 2, 2, 1)))


Network = tuple[Callable[[], nn.Module], tuple[Tensor, ...], set[str]]
# What builds it, its inputs, and the kinds of modules that are fused in it.
NETWORKS: dict[str, Network] = {
    "spade": (small_painter, (label_map(64),), {"norm", "block", "conv", "spectral_norm"}),
    "resizes_the_map_itself": (
        lambda: lively(foreign.ResizingPainter(LABELS, 4, 8, 64)), (label_map(64),),
        {"norm", "block", "conv", "spectral_norm"}),
    "groupdnet": (small_group_painter, (label_map(64, labels=4), normal(2, 32, 4, 4)),
                  {"norm", "block", "conv", "spectral_norm"}),
    "relu_block": (lambda: lively(foreign.ReluUnit(6, 4, lambda c: foreign.LayoutNorm(c, LABELS))),
                   (normal(2, 6, 8, 8), label_map(16)), {"norm", "block", "conv", "spectral_norm"}),
    "ccfpse": (lambda: lively(foreign_layers.KernelUnit(4, LABELS + 5, 8)),
               (normal(2, 4, 8, 8), label_map(16), normal(2, 5, 8, 8)), {"norm", "pixel_conv"}),
    "pix2pixhd": (lambda: lively(foreign_layers.image_network()), (normal(2, 3, 16, 24),),
                  {"norm_act"}),
    "instance_encoder": (
        lambda: lively(foreign_layers.InstanceEncoder()),
        (normal(2, 3, 16, 16), label_map(16).argmax(1, keepdim=True) * 11_000),
        {"norm_act", "instance_pool"}),
    "style_encoder": (lambda: lively(foreign_layers.StyleEncoder()), (normal(2, 3, 32, 32),),
                      {"norm_act", "spectral_norm"}),
}


def norm_of(cls: type[nn.Module] = foreign.LayoutNorm, **options: Any) -> nn.Module:
    return lively(cls(6, LABELS, 8, **options))


def block_of(cls: type[nn.Module]) -> nn.Module:
    return lively(cls(6, 4, lambda c: foreign.LayoutNorm(c, LABELS, 8)))


def accelerated_painter() -> tuple[nn.Module, Tensor, Tensor]:
    """An accelerated network, a map, and the original's picture of it."""
    network, planes = small_painter().eval(), label_map(64)
    with torch.no_grad():
        expected = network(planes)
    accelerate(network, inference=True)
    return network, planes, expected
