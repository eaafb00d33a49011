"""Mixed precision: ops take what autocast hands them, and whole generators train under it."""

from __future__ import annotations

import pytest
import torch
from small_models import small_options
from torch import Tensor

from smis_kernels import (
    conditional_attention,
    conditional_conv2d,
    norm_act,
    spatially_varying_conv2d,
    use_backend,
)
from smis_models.families import create_model
from smis_models.networks.semantics import semantics

# The least size that each takes: bfloat16 is slow on processors without its instructions.
GENERATORS = {"groupdnet_deepfashion": 64, "spade_coco": 32, "ccfpse_coco": 32,
              "pix2pixhd_cityscapes": 32}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_convolutions_are_cast_as_conv2d_is(backend: str) -> None:
    x, condition, weight = draw(1, 4, 5, 6), draw(1, 3, 5, 6), draw(36, 3, 3, 3)
    kernels = draw(1, 36, 5, 6)
    with autocast():
        found = (conditional_conv2d(x, condition.bfloat16(), weight, draw(36), backend=backend),
                 spatially_varying_conv2d(x, kernels, backend=backend))
        wide = conditional_conv2d(x.double(), condition.double(), weight.double(), backend=backend)
    low = [t.bfloat16() for t in (x, condition, weight, draw(36))]
    expected = (conditional_conv2d(*low, backend=backend),
                spatially_varying_conv2d(x.bfloat16(), kernels.bfloat16(), backend=backend))
    for got, same in zip(found, expected, strict=True):
        assert torch.equal(got, same)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_elementwise_ops_follow_their_input(backend: str) -> None:
    x, other = draw(1, 4, 5, 6).bfloat16(), draw(1, 4, 6, 5).view(1, 4, 5, 6)
    for op in (conditional_attention, norm_act):
        with autocast():
            got = op(x, other, backend=backend)
        assert torch.equal(got, op(x, other.bfloat16(), backend=backend))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_training_step_of_every_family(name: str, backend: str) -> None:
    options = {**small_options(name), "ngf": 4, "image_size": (GENERATORS[name],) * 2}
    generator = create_model(name, part="generator", **options)
    preset = generator.preset
    size = GENERATORS[name] // 8
    cells = torch.arange(2 * size**2).view(2, size, size) % preset.classes
    labels, ids = (
        (cells * step).repeat_interleave(8, 1).repeat_interleave(8, 2) for step in (1, 7)
    )
    planes = semantics(labels % preset.classes, preset, ids if preset.instance_edge else None)
    draws = hasattr(generator, "sample_latent")
    arguments = (planes, generator.sample_latent(2)) if draws else (planes,)
    with use_backend(backend), autocast():
        image = generator(*arguments)
    assert image.dtype == torch.bfloat16
    image.float().square().mean().backward()
    grads = [p.grad for p in generator.parameters() if p.grad is not None]
    assert len(grads) > 20
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
