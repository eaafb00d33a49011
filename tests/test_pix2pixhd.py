"""pix2pixHD's networks: construction, paths, coarse to fine, losses, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity_builders import pix2pixhd_losses
from torch import Tensor, nn

from smis_kernels import LabelLayout, explain, instance_avg_pool2d, use_backend
from smis_kernels.runtime.backend import missing
from smis_models import create_model
from smis_models.families import PIX2PIXHD_CITYSCAPES, with_options
from smis_models.families.pix2pixhd import (
    GlobalGenerator,
    LocalEnhancer,
    Pix2pixHDDiscriminator,
    ResnetBlock,
)
from smis_models.training import recipe

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
TINY = {"ngf": 4, "ndf": 4, "nef": 2, "blocks": 2, "classes": 5, "image_size": (64, 64)}
NAMES = ("pix2pixhd_cityscapes", "pix2pixhd_cityscapes_features", "pix2pixhd_cityscapes_1024")


def tiny(name: str, **options: Any) -> Any:
    return create_model(name, **{**TINY, **options}).eval()


def inputs(model: Any, batch: int = 1) -> tuple[Tensor, Tensor | None, Tensor]:
    """Semantics, features where the model reads them, and ids."""
    random = torch.Generator().manual_seed(3)
    preset = model.preset
    coarse = torch.randint(preset.classes, (batch, 1, 8, 8), generator=random).float()
    labels = torch.nn.functional.interpolate(coarse, preset.image_size)[:, 0].long()
    shape = (batch, preset.feature_channels, *preset.image_size)
    features = torch.rand(shape, generator=random) if preset.features else None
    return model.semantics(labels, labels), features, labels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_model_makes_a_picture(name: str, batch: int) -> None:
    model = tiny(name)
    semantics, features, ids = inputs(model, batch)
    with torch.no_grad():
        image = model(semantics, features)
        with use_backend("reference"):
            expected = model(semantics, features)
        predictions = model.discriminator(torch.cat([semantics, image], 1))
    assert image.shape == (batch, 3, *model.preset.image_size)
    torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-4)
    assert image.std() > 1e-3
    assert len(predictions) == model.preset.discriminator_scales
    if features is not None:
        with torch.no_grad():
            encoded = model.encoder(image, ids)
        torch.testing.assert_close(encoded, instance_avg_pool2d(encoded, ids))


@needs_cpu
def test_norm_activation_and_sum_are_one_pass() -> None:
    model = tiny("pix2pixhd_cityscapes")
    ops = [choice.op for choice in explain(model.generator, inputs(model)[0]).choices
           if choice.op != "conv2d"]
    # The stem from its labels; then four halvings, two blocks of two, four doublings, of which
    # stem and last doubling come in one tile.
    assert ops == ["label_conv2d", *["norm_act"] * (1 + 4 + 2 * 2 + 4)]


@needs_cpu
def test_wide_blocks_take_winograd() -> None:
    block = ResnetBlock(512).eval()
    x = torch.randn((1, 512, 32, 32))
    ops = [choice.op for choice in explain(block, x).choices]
    assert ops.count("winograd_conv2d") == 2
    with torch.no_grad():
        found = block(x)
        with use_backend("reference"):
            expected = block(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_cpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_tiles_make_the_same_picture(name: str, kind: str) -> None:
    model = tiny(name, image_size=(160, 96))  # two whole tiles of 64 rows and a half
    semantics, features, _ = inputs(model, 2)
    if kind == "soft":
        semantics = semantics + 0.1 * torch.rand(semantics.shape)
    with torch.no_grad():
        tiled = model.double()(semantics.double(), features)
        with use_backend("reference"):
            expected = model(semantics.double(), features)
    torch.testing.assert_close(tiled, expected, rtol=1e-9, atol=1e-9)


def _turned(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return 1 - output


class _TurnedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 1 - super().forward(input)


@needs_cpu
@pytest.mark.parametrize(("part", "change"), [
    *((part, "hook") for part in (1, 2, 4, -6, -5, -2, -1)), (1, "class"), (4, "class"),
    (-2, "class"), (-2, "spectral"), (0, "whole")])
def test_tiles_pass_over_no_hook_and_no_code(part: int, change: str) -> None:
    model = tiny("pix2pixhd_cityscapes", image_size=(160, 96))
    generator, semantics = model.generator, inputs(model)[0]
    with torch.no_grad():
        before, layer = generator(semantics), generator.model[part]
        if change == "class":
            layer.__class__ = _TurnedConv
        elif change == "spectral":
            nn.utils.spectral_norm(layer)
        else:
            (layer if change == "hook" else generator.model).register_forward_hook(_turned)
        found = generator(semantics)
        with use_backend("reference"):
            expected = generator(semantics)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, before, rtol=1e-3, atol=1e-4)


def test_a_layout_serves_as_semantics() -> None:
    model = tiny("pix2pixhd_cityscapes", instance_edge=False)
    labels = torch.randint(5, (1, 64, 64))
    layout = LabelLayout.from_labels(labels, 5)
    with torch.no_grad():
        expected = model(model.semantics(labels))
        torch.testing.assert_close(model(layout), expected, rtol=1e-4, atol=1e-4)
    found = model.double()(layout)  # with gradients: no tiles
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)


def test_features_come_after_the_semantics() -> None:
    model = tiny("pix2pixhd_cityscapes_features")
    semantics, features, _ = inputs(model)
    with torch.no_grad():
        expected = model.generator.model(torch.cat([semantics, features], 1))
        torch.testing.assert_close(model(semantics, features), expected, rtol=1e-3, atol=1e-4)


def test_gradients_of_both_paths() -> None:
    model = tiny("pix2pixhd_cityscapes").double().train()
    semantics, _, _ = inputs(model)
    found = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            model(semantics).square().sum().backward()
        found.append({k: p.grad for k, p in model.generator.named_parameters()})
        model.zero_grad()
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_a_frozen_generator_has_derivatives_of_its_input(mode: str) -> None:
    """Tiles have none: they are for inference."""
    model = tiny("pix2pixhd_cityscapes", image_size=(96, 64)).double().requires_grad_(False)
    semantics = inputs(model)[0]
    direction = torch.randn(semantics.shape, generator=torch.Generator().manual_seed(0)).double()

    def derivative() -> Tensor:
        if mode == "forward":
            tangent: Tensor = torch.func.jvp(model.generator, (semantics,), (direction,))[1]
            return tangent
        leaf = semantics.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.generator(leaf).square().sum(), leaf)
        return gradient

    found = derivative()
    with use_backend("reference"):
        torch.testing.assert_close(found, derivative(), rtol=1e-6, atol=1e-9)


def test_the_last_scale_sees_full_resolution() -> None:
    preset = with_options(PIX2PIXHD_CITYSCAPES, {"ndf": 4, "discriminator_scales": 3}, "test")
    discriminator = Pix2pixHDDiscriminator(preset).eval()
    x = torch.randn((1, 39, 64, 96))
    whole = discriminator.get_submodule("scale2_layer0")(x)
    predictions = discriminator(x)
    torch.testing.assert_close(predictions[0][0], whole)
    assert [scale[0].shape[2:] for scale in predictions] == [(33, 49), (17, 25), (9, 13)]
    assert [len(scale) for scale in predictions] == [5, 5, 5]


def test_a_deeper_discriminator_is_at_most_512_wide() -> None:
    """As published."""
    model = create_model("pix2pixhd_cityscapes", part="discriminator", device="meta",
                         discriminator_layers=5)
    convs = [model.get_submodule(f"scale0_layer{j}")[0] for j in range(7)]
    assert [conv.out_channels for conv in convs] == [64, 128, 256, 512, 512, 512, 1]
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 2, 2, 1, 1]


def test_any_number_of_enhancers_around_a_trained_generator() -> None:
    presets = [
        with_options(PIX2PIXHD_CITYSCAPES, {**TINY, "ngf": 8 // 2**n, "enhancers": n,
                                            "image_size": (128, 128)}, "test")
        for n in range(3)
    ]
    trained = GlobalGenerator(presets[0])
    first = LocalEnhancer(presets[1]).load_global(trained.state_dict())
    with torch.no_grad():
        first.get_submodule("model1_1")[1].weight.fill_(0.5)
    second = LocalEnhancer(presets[2]).load_global(first.state_dict())
    own = second.state_dict()
    for key, value in trained.state_dict().items():
        if key in own:
            assert torch.equal(own[key], value)
    assert torch.equal(own["model1_1.1.weight"], first.state_dict()["model1_1.1.weight"])
    assert {"model2_1.1.weight", "model2_2.0.conv_block.1.weight"} <= own.keys()
    with torch.no_grad():
        assert second(torch.randn((1, 6, 128, 192))).shape == (1, 3, 128, 192)
    with pytest.raises(ValueError, match=r"generator of width 8 .* got \(4, 6, 7, 7\)"):
        LocalEnhancer(presets[1]).load_global(GlobalGenerator(
            with_options(presets[0], {"ngf": 4}, "test")).state_dict())
    with pytest.raises(ValueError, match=r"generator of width 8 .* got none"):
        LocalEnhancer(presets[1]).load_global({})


def test_freezing_the_global_generator() -> None:
    model = tiny("pix2pixhd_cityscapes_1024")
    generator = model.generator.freeze_global().train()
    optimizer = torch.optim.Adam(p for p in generator.parameters() if p.requires_grad)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    generator(inputs(model)[0]).mean().backward()
    optimizer.step()
    for key, value in generator.state_dict().items():
        # A bias before an instance norm has no effect, so no gradient moves it reliably.
        if key.endswith("weight"):
            assert torch.equal(value, before[key]) == key.startswith("model."), key
    assert all(p.requires_grad for p in generator.freeze_global(False).parameters())


def test_the_encoder_halves_as_often_as_its_own_option_says() -> None:
    for halvings in (2, 4):
        encoder = create_model("pix2pixhd_cityscapes_features", part="encoder", device="meta",
                               encoder_downsamplings=halvings)
        strides = [m.stride[0] for m in encoder.modules() if type(m).__name__ == "WinogradConv2d"]
        assert strides == [1] + [2] * halvings + [1]


def test_freezing_leaves_the_last_enhancer_of_several() -> None:
    generator = create_model("pix2pixhd_cityscapes_1024", part="generator", device="meta",
                             enhancers=2).freeze_global()
    trained = {name for name, part in generator.named_children()
               if any(p.requires_grad for p in part.parameters())}
    assert trained == {"model2_1", "model2_2"}


def test_losses_weigh_as_published() -> None:
    random = torch.Generator().manual_seed(0)

    def outputs(scales: int, layers: int) -> list[list[Tensor]]:
        return [[torch.randn((1, 2, 5, 6 + j), generator=random) for j in range(layers)]
                for _ in range(scales)]

    for scales, layers in ((2, 5), (3, 5), (2, 6)):
        fake, real = outputs(scales, layers), outputs(scales, layers)
        losses = pix2pixhd_losses(fake, real, real)
        gan = sum((scale[-1] - 1).square().mean() for scale in fake)
        matching = sum((f - r).abs().mean() for fs, rs in zip(fake, real, strict=True)
                       for f, r in zip(fs[:-1], rs[:-1], strict=True))
        torch.testing.assert_close(losses["gan"], gan)
        # n_layers_D is two less than the layers of a scale.
        weight = 10 * 4 / (layers - 2 + 1) / scales
        torch.testing.assert_close(losses["feature_matching"], matching * weight)
        real_loss = sum((scale[-1] - 1).square().mean() for scale in real)
        fake_loss = sum(scale[-1].square().mean() for scale in real)
        torch.testing.assert_close(losses["real"] + losses["fake"], real_loss + fake_loss)
    assert recipe("pix2pixhd_cityscapes").losses.discriminator == 0.5  # of the two's sum


def test_bad_input() -> None:
    model = tiny("pix2pixhd_cityscapes")
    featured = tiny("pix2pixhd_cityscapes_features")
    semantics, features, _ = inputs(featured)
    for call, message in (
        (lambda: model(semantics[:, :4]), r"semantics: expected \(N, 6, H, W\)"),
        (lambda: model(semantics[..., :63]), "semantics: expected height and width .* multiples"),
        (lambda: model(semantics[..., :16]), "at least 32; got"),
        (lambda: model(semantics, features), "features: this model reads none"),
        (lambda: featured(semantics), "features: this model reads instance features"),
        (lambda: featured(semantics, features[:, :2]), r"features: expected \(1, 3, 64, 64\)"),
        (lambda: featured.encoder(semantics, semantics), r"image: expected \(N, 3, H, W\)"),
        (lambda: model.discriminator(semantics), r"x: expected \(N, 9, H, W\)"),
        (lambda: tiny("pix2pixhd_cityscapes_1024", image_size=(48, 64)), "image_size: .* of 32"),
        (lambda: tiny("pix2pixhd_cityscapes", enhancers=-1), "enhancers: expected at least 0"),
        (lambda: pix2pixhd_losses([], []), "predictions: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(AttributeError, match="encoder: a pix2pixhd_cityscapes has none"):
        _ = model.encoder
