"""SPADE's networks: sizes, starts, layouts in place of maps, gradients, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import LabelLayout, use_backend, use_path
from smis_models import Synthesizer, create_model, reparameterize
from smis_models.data.scenes import sample_scene

_WIDTHS: dict[str, Any] = {"ngf": 4, "hidden": 16, "ndf": 8}
_CLASSES = {**_WIDTHS, "classes": 13, "dont_care": 12}
TINY: dict[str, dict[str, Any]] = {
    "spade_coco": {**_CLASSES, "image_size": (64, 64)},
    "spade_ade20k": {**_CLASSES, "image_size": (64, 96)},
    "spade_cityscapes": {**_WIDTHS, "image_size": (64, 128)},
    "spade_coco_vae": {**_CLASSES, "image_size": (64, 64), "latent_channels": 12},
}


def tiny(name: str, **kwargs: Any) -> Any:
    return create_model(name, **{**TINY[name], "init_gain": 1.0, **kwargs})


def scene(model: Any, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Labels and instance ids of street scenes."""
    scenes = [sample_scene("street", *model.preset.image_size, model.preset.classes, seed)
              for seed in range(batch)]
    labels = torch.stack([torch.from_numpy(s.labels.astype("int64")) for s in scenes])
    return labels, torch.stack([torch.from_numpy(s.instances.astype("int64")) for s in scenes])


def inputs(model: Any, batch: int = 1) -> tuple[Tensor, Tensor | None]:
    labels, instances = scene(model, batch)
    planes = model.semantics(labels, instances if model.preset.instance_edge else None)
    return planes, model.generator.sample_latent(batch, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TINY)
def test_every_model_makes_a_picture(name: str) -> None:
    model = tiny(name).eval()
    planes, z = inputs(model, 2)
    with torch.no_grad():
        image = model(planes, z)
        predictions = model.discriminator(torch.cat([planes, image], 1))
    assert image.shape == (2, 3, *model.preset.image_size)
    assert image.abs().max() <= 1
    assert image.std() > 1e-3
    assert not torch.equal(image[0], image[1])
    assert [len(scale) for scale in predictions] == [5, 5]


@pytest.mark.parametrize(("upsampling", "start", "blocks"), [
    ("normal", (4, 8), 7), ("more", (2, 4), 7), ("most", (1, 2), 8),
])
def test_upsampling_sets_the_start_and_the_blocks(upsampling: str, start: tuple[int, int],
                                                  blocks: int) -> None:
    model = tiny("spade_cityscapes", upsampling=upsampling, image_size=(128, 256)).eval()
    starts: list[Tensor] = []
    model.generator.fc.register_forward_hook(lambda fc, x, y: starts.append(y))
    with torch.no_grad():
        image = model(inputs(model)[0])
    assert image.shape == (1, 3, 128, 256)
    assert starts[0].shape == (1, 64, *start)
    assert sum(1 for _ in model.generator.children()) == blocks + 2
    assert model.generator.conv_img.in_channels == (2 if upsampling == "most" else 4)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("path", ["auto", "dense", "two_level"])
def test_a_layout_stands_for_its_map(name: str, path: str) -> None:
    model = tiny(name, dtype=torch.float64).eval()
    labels, instances = scene(model)
    planes, z = inputs(model)
    layout = LabelLayout.from_labels(
        labels, model.preset.classes, instances=instances if model.preset.instance_edge else None,
    )
    with torch.no_grad():
        with use_backend("reference"):
            expected = model(planes, z)
        with use_path(path):
            torch.testing.assert_close(model(layout, z), expected, rtol=0, atol=1e-10)
            torch.testing.assert_close(model(planes, z), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["spade_coco", "spade_coco_vae"])
def test_a_synthesizer_paints_the_same(name: str) -> None:
    model = tiny(name).eval()
    planes, z = inputs(model)
    synthesizer = Synthesizer(model, *scene(model))
    with torch.no_grad():
        expected = model(planes, z)
    for _ in range(2):  # the tables are built, then kept
        torch.testing.assert_close(synthesizer.sample(z), expected, rtol=0, atol=2e-4)


def test_maps_of_another_size_are_resized() -> None:
    model = tiny("spade_ade20k").eval()
    planes, _ = inputs(model)
    large = F.interpolate(planes, scale_factor=2)
    with torch.no_grad():
        torch.testing.assert_close(model(large), model(planes))


@pytest.mark.parametrize("name", ["spade_cityscapes", "spade_coco_vae"])
def test_gradients_are_the_reference_s(name: str) -> None:
    model = tiny(name, dtype=torch.float64).train()
    planes, z = inputs(model, 2)
    cotangent = torch.randn(2, 3, *model.preset.image_size).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def gradients(backend: str) -> list[Tensor]:
        model.load_state_dict(state)
        with use_backend(backend):
            loss = (model.generator(planes, z) * cotangent).sum()
        return list(torch.autograd.grad(loss, list(model.generator.parameters())))

    torch.testing.assert_close(gradients("auto"), gradients("reference"), rtol=1e-8, atol=1e-8)


def test_a_map_can_require_a_gradient() -> None:
    model = tiny("spade_coco", dtype=torch.float64).eval()
    planes, _ = inputs(model)
    planes.requires_grad_()
    gradients = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            gradients += torch.autograd.grad(model(planes).sum(), planes)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_the_code_comes_from_the_image() -> None:
    model = tiny("spade_coco_vae").eval()
    planes, z = inputs(model, 2)
    with torch.no_grad():
        image = model(planes, z)
        mu, logvar = model.encoder(image)
        code = reparameterize(mu, logvar)
        assert not torch.equal(model(planes, code), image)
        resized = F.interpolate(image, (256, 256), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model.encoder(resized)[0], mu)
    assert mu.shape == logvar.shape == z.shape == (2, 12)


@torch.no_grad()
def test_pictures_are_encoded_at_256_pixels() -> None:
    encoder = tiny("spade_coco_vae", part="encoder").eval()
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    enlarged = torch.nn.Upsample((256, 256), mode="bilinear", align_corners=False)(picture)
    torch.testing.assert_close(encoder(picture), encoder(enlarged))


def test_encoder_belongs_to_the_vae() -> None:
    assert create_model("spade_cityscapes", vae=True, part="encoder", device="meta")
    model = create_model("spade_coco", device="meta")
    assert [name for name, _ in model.named_children()] == ["generator", "discriminator"]
    with pytest.raises(AttributeError, match="encoder: a spade_coco has none"):
        _ = model.encoder
    with pytest.raises(ValueError, match="generator, discriminator; got 'encoder'"):
        create_model("spade_coco", part="encoder")


@pytest.mark.parametrize(("options", "words"), [
    ({"upsampling": "less"}, ["upsampling", "normal or more or most", "'less'"]),
    ({"upsampling": "most", "image_size": (64, 128)}, ["image_size", "multiples of 128"]),
    ({"upsampling": "most", "ngf": 1}, ["ngf", "at least 2", "got 1"]),
    ({"hidden": 0}, ["hidden", "at least 1"]),
    ({"nef": 16}, ["unknown option 'nef'", "vae"]),
])
def test_bad_options_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        create_model("spade_coco", **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_bad_network_inputs_are_named() -> None:
    vae, plain = tiny("spade_coco_vae").eval(), tiny("spade_coco").eval()
    planes, z = inputs(vae)
    assert z is not None
    layout = LabelLayout.from_labels(torch.zeros(1, 64, 64, dtype=torch.long), 7)
    for call, words in (
        (lambda: plain(planes[:, :-1]), ("semantics", "(N, 14, H, W)", "edge plane", "13")),
        (lambda: plain(layout), ("semantics", "14", "7")),
        (lambda: plain(planes, z), ("z: expected None", "(1, 12)")),
        (lambda: vae.generator(planes), ("z: expected (1, 12)", "None")),
        (lambda: vae(planes, z[:, :5]), ("z: expected (1, 12)", "(1, 5)")),
        (lambda: vae(planes, z.repeat(2, 1)), ("z: expected (1, 12)", "(2, 12)")),
        (lambda: vae.encoder(planes), ("x: expected (N, 3, H, W)", "14")),
    ):
        with pytest.raises(ValueError, match=words[0].split()[0]) as error:
            call()
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words)
