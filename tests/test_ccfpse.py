"""CC-FPSE's networks: fused against reference, tables against dense convs, errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from smis_kernels import LabelLayout, explain, use_backend
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error
from smis_models import create_model
from smis_models.families import ccfpse
from smis_models.families.ccfpse import (
    SynchronizedBatchNorm,
    _kept,
    discriminate_pairs,
    pyramid_matching_loss,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
SMALL = {"ngf": 4, "ndf": 8, "hidden": 16, "image_size": (64, 64), "latent_channels": 8}


def small(name: str = "ccfpse_coco", **options: object) -> nn.Module:
    return create_model(name, init_gain=1.0, **{**SMALL, **options}).double()


def semantics(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    height, width = model.preset.image_size
    blocks = torch.randint(9, (1, height // 16, width // 16), generator=generator)
    labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return model.semantics(labels, labels if model.preset.instance_edge else None)


@needs_cpu
@pytest.mark.parametrize(("name", "options"), [
    ("ccfpse_coco", {}), ("ccfpse_coco", {"vae": False}),
    ("ccfpse_cityscapes", {"image_size": (64, 128)}), ("ccfpse_ade20k", {"instance_edge": True}),
])
def test_generator_is_the_reference(name: str, options: dict[str, object]) -> None:
    model = small(name, **options).eval()
    planes = semantics(model)
    z = model.generator.sample_latent(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = model.generator(planes, z)
        from_layout = model.generator(LabelLayout.from_tensor(planes), z)
        with use_backend("reference"):
            reference = model.generator(planes, z)
    assert max_error(fused, reference) < 1e-11
    assert max_error(from_layout, reference) < 1e-11


@needs_cpu
def test_training_step_is_the_reference() -> None:
    found = []
    for backend in ("auto", "reference"):
        model = small().train()
        z = model.generator.sample_latent(1, torch.Generator().manual_seed(0))
        with use_backend(backend):
            model.generator(semantics(model), z).square().sum().backward()
        found.append({k: p.grad for k, p in model.generator.named_parameters()})
        found.append(dict(model.generator.named_buffers()))
    gradients, buffers, expected_gradients, expected_buffers = found
    # biases before a batch norm have no gradient but rounding: judged by the largest of all
    top = max(float(g.abs().max()) for g in expected_gradients.values() if g is not None)
    for key, expected in expected_gradients.items():
        if expected is None:
            assert gradients[key] is None
            assert "norm_0" in key or "norm_layer" in key  # the published dead parameters
        else:
            assert float((gradients[key] - expected).abs().max()) < 1e-11 * top
    for key, expected in expected_buffers.items():
        assert max_error(buffers[key], expected) < 1e-11
        if key.endswith("num_batches_tracked"):
            assert int(expected) == ("norm_0" not in key and "norm_layer" not in key), key


@needs_cpu
def test_the_label_part_comes_from_tables() -> None:
    model = small().eval()
    z = model.generator.sample_latent(1)
    ops = [choice.op for choice in explain(model.generator, semantics(model), z).choices]
    # four convs a block, and the shortcut's where the width changes
    assert ops.count("indexed_modulation") == 7 * 4 + 4
    assert ops.count("conditional_conv2d") == ops.count("conditional_attention") == 14


@needs_cpu
def test_soft_maps_take_the_dense_path() -> None:
    model = small().eval()
    planes = semantics(model).softmax(1)
    planes = planes + 0.01 * torch.rand(planes.shape, dtype=planes.dtype)
    z = model.generator.sample_latent(1)
    with torch.no_grad():
        fused = model.generator(planes, z)
        with use_backend("reference"):
            assert max_error(fused, model.generator(planes, z)) < 1e-11


def test_discriminator_pools_first_and_gives_the_same() -> None:
    model = small().eval()
    planes, image = semantics(model), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features, predictions = model.discriminator(image, planes)
        with use_backend("reference"):
            expected = model.discriminator(image, planes)
    assert [x.shape[2] for x in (*features, *predictions)] == [16, 8, 4, 2, 16, 8, 4]
    for a, b in zip((*features, *predictions), (*expected[0], *expected[1]), strict=True):
        assert max_error(a, b) < 1e-12


def test_losses_take_what_the_discriminator_gives() -> None:
    model = small().eval()
    planes, fake = semantics(model), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    fake_features, fake_scores, real_features, real_scores = discriminate_pairs(
        model.discriminator, planes, fake, 1 - fake)
    assert len(fake_features) == len(real_features) == 4
    assert len(fake_scores) == len(real_scores) == 3
    expected = 5 * sum((f - r).abs().mean()
                       for f, r in zip(fake_features, real_features, strict=True))
    torch.testing.assert_close(pyramid_matching_loss(fake_features, real_features), expected)


def test_bad_input() -> None:
    model = small().eval()
    planes = semantics(model)
    with pytest.raises(ValueError, match=r"semantics: expected \(N, 184, H, W\)"):
        model.generator(planes[:, :3], None)
    with pytest.raises(ValueError, match=r"semantics: expected the image's size \(64, 64\)"):
        model.generator(planes[:, :, :32], None)
    with pytest.raises(ValueError, match=r"z: expected \(1, 8\)"):
        model.generator(planes, None)
    with pytest.raises(ValueError, match="z: expected None"):
        small(vae=False).generator(planes, torch.zeros(1, 8))
    with pytest.raises(ValueError, match="image's size, multiples of 32"):
        model.discriminator(torch.zeros(1, 3, 48, 64).double(), planes)


def test_only_frozen_networks_keep_what_they_predict() -> None:
    layout, owner = LabelLayout.from_labels(torch.zeros(1, 8, 8).long(), 3), nn.Identity()
    keeping = SimpleNamespace(prediction=lambda *given: given)

    def kept(source: object = layout) -> object:
        return _kept(source, owner.eval(), 7, make)

    def make() -> str:
        raise AssertionError("made by the layout's tables alone")

    with torch.no_grad():
        assert kept() is None  # whose layout keeps nothing
        layout.tables = keeping
        assert kept() == (owner, 7, make)
        assert kept(torch.zeros(1, 3, 8, 8)) is None
        assert _kept(layout, owner.train(), 7, make) is None
        with use_backend("reference"):
            assert kept() is None
    assert kept() is None  # gradients are wanted


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_synchronized_norms_are_batch_norm_whatever_their_settings(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with several processes, of which there is one here: its batch is all of them."""
    torch.manual_seed(0)
    norm, plain = (cls(5, momentum=0.3, eps=0.1).double()
                   for cls in (SynchronizedBatchNorm, nn.BatchNorm2d))
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    monkeypatch.setattr(ccfpse, "dist", SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2,
        group=dist.group))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for _ in range(2):
            assert max_error(norm(x), plain(x)) < 1e-12
    finally:
        dist.destroy_process_group()
    for key, expected in plain.state_dict().items():
        assert max_error(norm.state_dict()[key], expected) < 1e-12, key
