"""Small networks of every family: fused against their references, training steps, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import SPADE, LabelLayout, use_backend, use_path
from smis_kernels.testing import max_error
from smis_models import create_model
from smis_models.networks.semantics import semantics

NAMES = ("groupdnet_deepfashion", "groupdnet_cityscapes", "spade_coco", "ccfpse_coco",
         "pix2pixhd_cityscapes")


def made(name: str, device: str, dtype: torch.dtype, batch: int = 2
         ) -> tuple[nn.Module, tuple[Any, ...]]:
    """A small generator and its inputs; SPADE's is smaller in a rehearsal."""
    options = {"ngf": 70 if name == "groupdnet_cityscapes" else 8, "image_size": (64, 64)}
    if device == "cpu" and name == "spade_coco":
        options |= {"image_size": (32, 32), "hidden": 8}
    generator = create_model(name, part="generator", device=device, dtype=dtype, init_gain=1.0,
                             **options)
    preset = generator.preset
    cells = torch.arange(64 * batch).view(batch, 8, 8) % preset.classes
    cell = preset.image_size[0] // 8
    labels = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    ids = labels * 3 if preset.instance_edge else None
    planes = semantics(labels, preset, ids, dtype=dtype).to(device)
    if not hasattr(generator, "sample_latent"):
        return generator, (planes,)
    return generator, (planes, generator.sample_latent(batch, torch.Generator().manual_seed(0)))


def on(backend: str, generator: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with use_backend(backend), torch.no_grad():
        return generator(*inputs)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation(name: str, device: str) -> None:
    generator, inputs = made(name, device, torch.float64, 1)
    generator.eval()
    assert max_error(on("auto", generator, inputs), on("reference", generator, inputs)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_as_accurate_as_the_reference(name: str, dtype: torch.dtype,
                                                       device: str) -> None:
    if device == "cpu" and (dtype != torch.float32 or name == "groupdnet_cityscapes"):
        pytest.skip("rehearsed in float32")
    generator, inputs = made(name, device, dtype, 1)
    generator.eval()
    got, reference = (on(kind, generator, inputs) for kind in ("auto", "reference"))
    truth = on("reference", generator.double(), tuple(
        t.double() if isinstance(t, Tensor) else t for t in inputs))
    errors = [float((x.double() - truth).norm() / truth.norm()) for x in (got, reference)]
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps / 2, errors


@pytest.mark.parametrize("name", NAMES)
def test_training_step(name: str, device: str) -> None:
    if device == "cpu" and name != "spade_coco":
        pytest.skip("rehearsed on one")
    results = []
    for kind in ("auto", "reference"):
        generator, inputs = made(name, device, torch.float64)
        generator.train()
        with use_backend(kind):
            image = generator(*inputs)
        parameters = [p for p in generator.parameters() if p.requires_grad]
        found = torch.autograd.grad(image.square().mean(), parameters, allow_unused=True)
        results.append([image.detach(), *(g for g in found if g is not None),
                        *(b for b in generator.buffers() if b.is_floating_point())])
    # biases before a normalisation have no gradient but rounding: judged beside the largest
    largest = max(float(t.abs().max()) for t in results[1][1:])
    for got, expected in zip(*results, strict=True):
        assert max_error(got, expected) < 1e-6 or (got - expected).abs().max() < 1e-12 * largest


@pytest.mark.parametrize("name", ["groupdnet_deepfashion", "spade_coco", "ccfpse_coco"])
def test_autocast(name: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("tests/test_autocast.py is its CPU form")
    generator, inputs = made(name, device, torch.float32)
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast(device, kind):
            image = generator(*inputs)
        assert image.dtype == kind
        image.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in generator.parameters() if p.grad is not None)


@pytest.mark.parametrize("path", ["dense", "one_level", "two_level"])
def test_paths_agree(path: str, device: str) -> None:
    torch.manual_seed(0)
    norm = SPADE(16, 9).to(device).eval()
    layout = LabelLayout.from_labels(torch.arange(1024, device=device).view(1, 32, 32) // 40 % 9, 9)
    x = torch.randn(1, 16, 32, 32, device=device)
    with torch.no_grad(), use_path(path):
        got = norm(x, layout, activation="leaky_relu")
    with torch.no_grad(), use_backend("reference"):
        expected = norm.double()(x.double(), layout, activation="leaky_relu")
    assert max_error(got, expected) < 2e-5


@pytest.mark.cuda_only
@pytest.mark.parametrize(("name", "mode"), [
    ("groupdnet_deepfashion", "default"), ("spade_coco", "default"), ("ccfpse_coco", "default"),
    ("groupdnet_deepfashion", "max-autotune"),  # which captures CUDA graphs too
])
def test_compiled_with_a_layout(name: str, mode: str) -> None:
    generator, (planes, *rest) = made(name, "cuda", torch.float32, 1)
    generator.eval()
    layout = LabelLayout.from_tensor(planes)
    assert layout is not None
    with torch.no_grad():
        expected = generator(layout, *rest)
        torch._dynamo.reset()
        compiled = torch.compile(lambda *z: generator(layout, *z), mode=mode)
        got = compiled(*rest)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
