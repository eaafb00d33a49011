"""The zoo: construction, options, inputs, labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import SPADE, class_crops, use_backend
from smis_models import SynthesisModel, create_model, list_models, reparameterize
from smis_models.families import ADE20K, CITYSCAPES, DEEPFASHION, MODELS
from smis_models.networks.blocks import SPADEResBlock, init_weights
from smis_models.networks.discriminator import (
    MultiscaleDiscriminator,
    PatchDiscriminator,
    discriminate,
)
from smis_models.networks.losses import class_l1_loss, feature_matching_loss, gan_loss, kl_loss
from smis_models.networks.semantics import prepare_labels, semantics

TINY: dict[str, dict[str, Any]] = {
    "groupdnet_deepfashion": {"ngf": 8, "nef": 16, "ndf": 8, "image_size": (64, 64)},
    "groupdnet_cityscapes": {"ngf": 70, "nef": 35, "ndf": 8, "image_size": (64, 64)},
    "groupdnet_ade20k": {"classes": 13, "dont_care": 12, "ngf": 8, "nef": 26, "ndf": 8,
                         "image_size": (64, 64)},
    "groupdnet_scenes": {"ngf": 8, "nef": 16, "ndf": 8},
}


def tiny(name: str, **kwargs: Any) -> Any:
    return create_model(name, **TINY[name], **kwargs)


def random_inputs(model: SynthesisModel, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    preset = model.preset
    coarse = torch.randint(preset.classes, (batch, 1, 4, 4), generator=random)
    labels = F.interpolate(coarse.float(), size=preset.image_size)[:, 0].long()
    planes = model.semantics(labels, labels if preset.instance_edge else None)
    return labels, planes, model.generator.sample_latent(batch, random)


def one_line(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# Classes, (height, width), instance edges, don't-care class, class of unlabelled pixels.
FACES, PEOPLE = (19, (256, 256), False, None, None), (8, (256, 256), False, None, None)
ADE, COCO = (151, (256, 256), False, 150, 0), (183, (256, 256), True, 182, None)
STREETS = (35, (256, 512), True, None, None)
# Name: what its maps hold, and the parameters of its networks: generator, encoder (where it has
# one), discriminator; those of the published networks where their code builds them.
LISTED = {
    "groupdnet_deepfashion": (PEOPLE, 96_324_451, 12_835_712, 5_544_066),
    "groupdnet_cityscapes": (STREETS, 76_501_358, 5_768_210, 5_601_410),
    "groupdnet_ade20k": (ADE, 68_326_847, 4_411_012, 5_836_930),
    "groupdnet_scenes": ((8, (128, 128), False, None, None), 2_683_475, 1_153_856, 353_826),
    "groupnet_deepfashion": (PEOPLE, 84_857_667, 12_835_712, 5_544_066),
    "mulnet_deepfashion": (PEOPLE, 91_645_518, 12_835_712, 5_544_066),
    "groupenc_deepfashion": (PEOPLE, 92_725_443, 12_835_712, 5_544_066),
    "groupdec_deepfashion": (PEOPLE, 96_324_451, 15_006_080, 5_544_066),
    "spade_coco": (COCO, 97_480_899, 5_904_514),
    "spade_coco_vae": (COCO, 112_626_883, 10_463_424, 5_904_514),
    "spade_ade20k": (ADE, 96_492_483, 5_836_930),
    "spade_cityscapes": (STREETS, 93_048_003, 5_601_410),
    "spade_celebamask": (FACES, 92_538_819, 5_566_594),
    "vspade_deepfashion": (PEOPLE, 96_345_283, 10_463_424, 5_544_066),
    "ccfpse_coco": (COCO, 141_939_843, 10_463_424, 5_194_817),
    "ccfpse_ade20k": (ADE, 140_704_323, 10_463_424, 5_190_593),
    "ccfpse_cityscapes": (STREETS, 128_055_555, 10_463_424, 5_175_873),
    "pix2pixhd_cityscapes": ((35, (512, 1024), *STREETS[2:]), 182_546_755, 5_603_202),
    "pix2pixhd_cityscapes_features": (
        (35, (512, 1024), *STREETS[2:]), 182_556_163, 788_803, 5_603_202),
    "pix2pixhd_cityscapes_1024": ((35, (1024, 2048), *STREETS[2:]), 182_857_059, 8_404_803),
    "bicyclegan_deepfashion": (PEOPLE, 54_799_747, 2_590_032, 5_544_066),
    "dscgan_deepfashion": (PEOPLE, 54_799_747, 2_590_032, 5_544_066),
}


def test_listed_sizes_are_the_published_ones() -> None:
    deepfashion = LISTED["groupdnet_deepfashion"]
    assert deepfashion[1] + deepfashion[2] == 109_160_163
    found = {}
    for info in list_models():
        preset = MODELS[info.name].preset
        maps = (preset.classes, preset.image_size, preset.instance_edge, preset.dont_care,
                preset.unlabelled)
        found[info.name] = (maps, *info.parameters.values())
    assert found == LISTED


@pytest.mark.parametrize("name", TINY)
def test_every_model_makes_a_picture(name: str) -> None:
    model = tiny(name, init_gain=1.0).eval()
    labels, planes, z = random_inputs(model, 2)
    with torch.no_grad():
        image = model(planes, z)
        mu, logvar = model.encoder.encode(image, labels)
        predictions = model.discriminator(torch.cat([planes, image], 1))
    assert image.shape == (2, 3, *model.preset.image_size)
    assert image.abs().max() <= 1
    assert image.std() > 1e-3
    latent_channels = 8 * model.preset.classes
    assert mu.shape[:2] == logvar.shape[:2] == (2, latent_channels)
    assert [len(scale) for scale in predictions] == [5, 5]
    assert all(x.isfinite().all() for x in (mu, logvar, predictions[1][-1]))


def test_most_calls_the_seventh_block_and_starts_at_one_pixel() -> None:
    model = tiny("groupdnet_scenes", init_gain=1.0).eval()
    called: list[tuple[int, ...]] = []
    model.generator.up_4.register_forward_hook(lambda _, __, out: called.append(tuple(out.shape)))
    _, planes, z = random_inputs(model)
    with torch.no_grad():
        model(planes, z)
    assert tuple(z.shape) == (1, 64, 1, 1)
    assert called == [(1, 8, 128, 128)]


def test_pictures_depend_on_every_input() -> None:
    model = tiny("groupdnet_cityscapes", init_gain=1.0).eval()
    _, planes, z = random_inputs(model)
    other_edge = planes.clone()
    other_edge[:, -1] = 1 - other_edge[:, -1]
    with torch.no_grad():
        image = model(planes, z)
        assert not torch.equal(image, model(other_edge, z))
        assert not torch.equal(image, model(planes.roll(1, 1), z))
        assert not torch.equal(image, model(planes, -z))
        assert not torch.equal(image, model(planes))  # a latent of its own, at every call
        assert not torch.equal(model(planes), model(planes))


def test_random_weights_follow_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (tiny("groupdnet_deepfashion", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [m.generator.up_3.conv_0.weight_orig for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_random_weights_are_xavier_with_published_gain() -> None:
    weight = tiny("groupdnet_deepfashion").generator.fc.weight.detach()
    out, fan_in = weight.shape[0], weight[0].numel()
    expected = 0.02 * (2 / (fan_in + 9 * out)) ** 0.5
    assert float(weight.std()) == pytest.approx(expected, rel=0.05)
    model = tiny("groupdnet_deepfashion")
    assert not model.generator.fc.bias.any()
    spectral = [layer for layer in model.modules() if "weight_u" in layer._buffers]
    assert spectral
    for layer in spectral:  # one power iteration has been done
        u, v, weight = layer.weight_u, layer.weight_v, layer.weight_orig.detach().flatten(1)
        torch.testing.assert_close(u, F.normalize(weight @ v, dim=0))
        assert float(v.norm()) == pytest.approx(1) == float(u.norm())


def test_random_weights_by_the_normal_rule() -> None:
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(4096), nn.Linear(100, 400))
    conv, norm, linear = init_weights(net, rule="normal", seed=3)
    for layer, fan_in in ((conv, 64 * 9), (linear, 100)):
        weight = layer.weight.detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
        assert abs(float(weight.mean())) < 1e-3
        bound = fan_in**-0.5
        assert 0.9 * bound < float(layer.bias.detach().abs().max()) <= bound
    weight = norm.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(weight.mean()) == pytest.approx(1, abs=2e-3)
    assert not norm.bias.any() and not norm.running_mean.any()
    assert bool((norm.running_var == 1).all())


@pytest.mark.parametrize("part", ["generator", "encoder", "discriminator"])
def test_pix2pixhd_starts_by_the_normal_rule(part: str) -> None:
    """As published, and whatever the gain, which is of the xavier rule."""
    network = create_model("pix2pixhd_cityscapes_features", part=part, init_gain=1.0, ngf=16,
                           nef=16, ndf=16, blocks=1)
    weights = {name: p.detach() for name, p in network.named_parameters() if p.dim() == 4}
    assert len(weights) > 8
    for name, weight in weights.items():
        expected = 0.02 * (1 + 4 / weight.numel() ** 0.5)
        assert float(weight.square().mean().sqrt()) < expected, name
        assert float(weight.square().mean().sqrt()) > 0.04 - expected, name
        bias = network.get_parameter(name.removesuffix("weight") + "bias").detach()
        assert bool(bias.any()) and float(bias.abs().max()) <= weight[0].numel() ** -0.5, name


@pytest.mark.parametrize(("name", "options", "shape"), [
    ("groupdnet_deepfashion", {"ngf": 8, "nef": 8, "image_size": (64, 128)}, (64, 1, 2)),
    ("spade_coco_vae", {"ngf": 2, "image_size": (64, 64)}, (256,)),
    ("ccfpse_ade20k", {"ngf": 2, "image_size": (64, 64)}, (256,)),
    ("bicyclegan_deepfashion", {"ngf": 2, "image_size": (64, 64)}, (8,)),
])
def test_every_picture_has_a_code_of_its_own(name: str, options: dict[str, Any],
                                             shape: tuple[int, ...]) -> None:
    generator = create_model(name, part="generator", **options)
    drawn = generator.sample_latent(3, torch.Generator().manual_seed(5))
    expected = torch.randn((3, *shape), generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, expected)
    assert not torch.equal(generator.sample_latent(3), generator.sample_latent(3))


def test_dtype_and_part() -> None:
    encoder = tiny("groupdnet_deepfashion", part="encoder", dtype=torch.float64)
    assert type(encoder).__name__ == "GroupDNetEncoder"
    assert {p.dtype for p in encoder.parameters()} == {torch.float64}


# Model, part, an option with another value than the published, and the shapes of weights that it
# decides, by hand: rows of the classes, the width, (C', C, k, k). None: there is no such weight.
_P, _D = "pix2pixhd_cityscapes", "groupdnet_deepfashion"
DECIDED: list[tuple[str, str, dict[str, Any], dict[str, tuple[int, ...] | None]]] = [
    ("spade_ade20k", "discriminator", {"discriminator_scales": 3},
     {"discriminator_2.model0.0.weight": (64, 151 + 3, 4, 4)}),
    ("spade_ade20k", "discriminator", {"discriminator_layers": 2, "ndf": 16},
     {"discriminator_1.model1.0.0.weight_orig": (32, 16, 4, 4),
      "discriminator_1.model2.0.weight": (1, 32, 4, 4), "discriminator_1.model3.0.weight": None}),
    ("spade_ade20k", "generator", {"hidden": 32},
     {"up_0.norm_0.mlp_shared.0.weight": (32, 151, 3, 3),
      "up_0.norm_s.mlp_gamma.weight": (1024, 32, 3, 3)}),
    ("spade_ade20k", "generator", {"norm": "instance"},
     {"up_0.norm_0.param_free_norm.running_mean": None}),
    ("spade_coco_vae", "encoder", {"latent_channels": 12}, {"fc_var.weight": (12, 8 * 64 * 16)}),
    (_D, "generator", {"norm": "instance"}, {"up_0.norm_0.param_free_norm.running_mean": None}),
    (_D, "generator", {"latent_channels": 3, "start_groups": 2},
     {"fc.weight": (16 * 160, 3 * 8 // 2, 3, 3), "head_0.conv_0.weight_orig": (2560, 1280, 3, 3)}),
    (_D, "encoder", {"latent_channels": 3, "encoder_depth": 3},
     {"layer3.0.weight_orig": (1024, 512 // 8, 3, 3), "layer4.0.weight_orig": None,
      "fc_mu.weight": (3 * 8, 1024 // 8, 3, 3), "fc_var.weight": (24, 128, 3, 3)}),
    ("ccfpse_ade20k", "generator", {"hidden": 32},
     {"up_0.gen_weights1.0.weight": (32, 151 + 64, 3, 3),
      "up_0.gen_se_weights2.2.weight": (512, 32, 3, 3),
      "up_0.norm_s.mlp_shared.0.weight": (32, 151 + 64, 3, 3)}),
    ("ccfpse_ade20k", "discriminator", {"ndf": 16},
     {"enc1.0.0.weight_orig": (16, 3, 3, 3), "embedding.weight": (32, 151, 1, 1)}),
    (_P, "generator", {"downsamplings": 2, "blocks": 1},
     {"model.7.weight": (256, 128, 3, 3), "model.10.conv_block.1.weight": (256, 256, 3, 3),
      "model.11.weight": (256, 128, 3, 3)}),
    (_P + "_1024", "generator", {"downsamplings": 2, "blocks": 1, "local_blocks": 1},
     {"model.10.conv_block.1.weight": (256, 256, 3, 3), "model.11.weight": (256, 128, 3, 3),
      "model1_2.0.conv_block.1.weight": (64, 64, 3, 3), "model1_2.1.weight": (64, 32, 3, 3)}),
    (_P + "_features", "encoder", {"feature_channels": 5, "nef": 8},
     {"model.1.weight": (8, 3, 7, 7), "model.29.weight": (5, 8, 7, 7)}),
    (_P + "_features", "generator", {"feature_channels": 5}, {"model.1.weight": (64, 41, 7, 7)}),
    (_P, "discriminator", {"discriminator_scales": 3, "discriminator_layers": 2, "ndf": 16},
     {"scale2_layer0.0.weight": (16, 36 + 3, 4, 4), "scale2_layer3.0.weight": (1, 64, 4, 4)}),
    ("bicyclegan_deepfashion", "generator", {"latent_channels": 5, "instance_edge": True},
     {"down0.weight": (64, 8 + 1 + 5, 4, 4), "down1.weight": (128, 64 + 5, 4, 4)}),
    ("bicyclegan_deepfashion", "encoder", {"latent_channels": 5, "nef": 16},
     {"layers.2.conv_1.weight": (48, 32, 3, 3), "fc_mu.weight": (5, 64)}),
]


@pytest.mark.parametrize(("name", "part", "options", "shapes"), DECIDED)
def test_options_decide_the_weights(name: str, part: str, options: dict[str, Any],
                                    shapes: dict[str, tuple[int, ...] | None]) -> None:
    state = create_model(name, part=part, device="meta", **options).state_dict()
    found = {key: tuple(state[key].shape) if key in state else None for key in shapes}
    assert found == shapes


def test_sizes_are_multiples_of_what_the_options_halve() -> None:
    for options, step in (({"downsamplings": 2}, 4), ({"downsamplings": 2, "enhancers": 2}, 16)):
        preset = create_model(_P, device="meta", image_size=(4 * step, 3 * step), **options).preset
        assert preset.size_step == step
        with pytest.raises(ValueError, match=rf"image_size: .*multiples of {step};"):
            create_model(_P, device="meta", image_size=(4 * step, 3 * step + 2), **options)


@pytest.mark.parametrize(("options", "words"), [
    ({"depth": 3}, ["unknown option 'depth'", "ngf", "image_size"]),
    ({"image_size": (100, 64)}, ["image_size", "multiples of 64", "(100, 64)"]),
    ({"upsampling": "all"}, ["upsampling", "normal or more or most", "'all'"]),
    ({"upsampling": "most"}, ["upsampling", "seventh entry", "got 6"]),
    ({"ngf": 0}, ["ngf", "at least 1"]),
    ({"ngf": 3, "groups": (8, 5, 4, 2, 2, 1)}, ["G_middle_1", "5 groups", "48"]),
    ({"groups": (8, 4)}, ["widths, groups", "6 and 2"]),
    ({"dont_care": 8}, ["dont_care", "0..7", "got 8"]),
])
def test_bad_options_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        create_model("groupdnet_deepfashion", **options)
    one_line(error, *words)


def test_bad_names_are_answered_with_the_known() -> None:
    with pytest.raises(ValueError, match=r"groupdnet_ade20k, .*; got 'gaugan'") as error:
        create_model("gaugan")
    one_line(error)
    with pytest.raises(ValueError, match=r"generator, encoder, discriminator; got 'decoder'"):
        create_model("groupdnet_ade20k", part="decoder")


def test_bad_network_inputs_are_named() -> None:
    model = tiny("groupdnet_deepfashion").eval()
    _, planes, z = random_inputs(model)
    for arguments, words in (
        ((planes[:, :-1], z), ("semantics", "8", "7")),
        ((planes[0], z), ("semantics", "(8, 64, 64)")),
        ((planes, z[:, :8]), ("z", "(N, 64, H, W)", "8 channels per class")),
        ((planes, z.repeat(2, 1, 1, 1)), ("z", "batch size 1", "got 2")),
    ):
        with pytest.raises(ValueError, match=words[0]) as error:
            model(*arguments)
        one_line(error, *words)
    with pytest.raises(ValueError, match=r"x: expected \(N, 24, H, W\)"):
        model.encoder(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"x: expected \(N, 11, H, W\)"):
        model.discriminator(torch.zeros(1, 3, 64, 64))


def test_class_channels() -> None:
    generator = tiny("groupdnet_deepfashion", part="generator")
    covered = [c for i in range(8) for c in range(64)[generator.class_channels(i)]]
    assert covered == list(range(64))
    with pytest.raises(ValueError, match=r"0\.\.7, got 8"):
        generator.class_channels(8)


def test_absent_class_is_encoded_to_the_heads_biases() -> None:
    encoder = tiny("groupdnet_deepfashion", part="encoder", init_gain=1.0).eval()
    torch.nn.init.normal_(encoder.fc_mu.bias)
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, :, 20:] = 2
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        mu, logvar = encoder.encode(image, labels)
        crops = class_crops(image, labels, 8, size=(64, 64))
        torch.testing.assert_close(encoder(crops), (mu, logvar))
    means = mu.view(8, 8, -1)
    biases = encoder.fc_mu.bias.detach().view(8, 8, 1)
    same = (means == biases).all(-1).all(-1)
    assert same.tolist() == [False, True, False, True, True, True, True, True]


def test_reparameterize() -> None:
    mu, logvar = torch.full((1, 2, 64, 64), 3.0), torch.full((1, 2, 64, 64), 2.0).log() * 2
    z = reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    assert float(z.mean()) == pytest.approx(3, abs=0.1)
    assert float(z.std()) == pytest.approx(2, abs=0.1)
    z = reparameterize(torch.zeros(3, 5), torch.zeros(3, 5), torch.Generator().manual_seed(5))
    assert torch.equal(z, torch.randn((3, 5), generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("out_channels", [6, 4])
@pytest.mark.parametrize("training", [False, True])
def test_block_folds_the_upsampling(out_channels: int, training: bool) -> None:
    block = SPADEResBlock(6, out_channels, lambda c: SPADE(c, 3, 8)).double().train(training)
    x, segmap = torch.randn(2, 6, 5, 7).double(), torch.randn(2, 3, 20, 28).double()
    state = {key: value.clone() for key, value in block.state_dict().items()}
    folded = block(x, segmap, upsample=True)
    after = {key: value.clone() for key, value in block.state_dict().items()}
    block.load_state_dict(state)
    expected = block(F.interpolate(x, scale_factor=2, mode="nearest"), segmap)
    torch.testing.assert_close(folded, expected)
    torch.testing.assert_close(after, dict(block.state_dict()))


def test_a_patch_discriminator_is_the_published_one() -> None:
    """pix2pixHD's convs and slopes, SPADE's spectral and instance norm, at most 512 channels."""
    net = PatchDiscriminator(5, 96).eval()
    state, x = net.state_dict(), torch.rand(1, 5, 32, 32)
    found = net(x)
    assert len(found) == 5
    for i, (stride, width) in enumerate(((2, 96), (2, 192), (2, 384), (1, 512), (1, 1))):
        if i in (0, 4):
            x = F.conv2d(x, state[f"model{i}.0.weight"], state[f"model{i}.0.bias"], stride, 2)
        else:
            weight, u, v = (state[f"model{i}.0.0.weight_{name}"] for name in ("orig", "u", "v"))
            x = F.conv2d(x, weight / (u @ weight.flatten(1) @ v), None, stride, 2)
            x = F.instance_norm(x)
            assert f"model{i}.0.0.bias" not in state
        x = F.leaky_relu(x, 0.2) if i < 4 else x
        assert x.shape[1] == width
        torch.testing.assert_close(found[i], x, rtol=1e-4, atol=1e-4)  # of values about 1


def test_discriminate_is_two_passes_in_one() -> None:
    net = MultiscaleDiscriminator(5, 4).eval()
    planes, fake, real = torch.rand(2, 8, 32, 32).split([2, 3, 3], 1)
    with torch.no_grad():
        both = discriminate(net, planes, fake, real)
        apart = [net(torch.cat([planes, image], 1)) for image in (fake, real)]
    torch.testing.assert_close(list(both), apart)
    halved = nn.AvgPool2d(3, 2, 1, count_include_pad=False)(torch.cat([planes, fake], 1))
    with torch.no_grad():
        torch.testing.assert_close(both[0][1], net.discriminator_1(halved))


@pytest.mark.parametrize("size", [(32, 32), (21, 35)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discriminator_sees_each_map_once(size: tuple[int, int], dtype: torch.dtype) -> None:
    net = MultiscaleDiscriminator(7, 6).to(dtype)
    state = copy.deepcopy(net.state_dict())
    planes, fake, real = torch.rand(2, 10, *size, dtype=dtype).split([4, 3, 3], 1)
    fake.requires_grad_()
    planes.requires_grad_()
    leaves, results, called = [fake, planes, *net.parameters()], [], []
    first = net.discriminator_0.model0[0]
    for backend, hook in (("auto", False), ("reference", False), ("auto", True)):
        net.load_state_dict(state)
        handle = first.register_forward_hook(lambda *_: called.append(1)) if hook else None
        with use_backend(backend):
            fakes, reals = discriminate(net, planes, fake, real)
        outputs = [x for scales in (fakes, reals) for scale in scales for x in scale]
        loss = sum(((1 + k) * x.square().mean() for k, x in enumerate(outputs)), fake.sum() * 0)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
        if handle is not None:
            handle.remove()
    assert called == [1]  # what is hooked is called
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for found in (results[0], results[2]):
        torch.testing.assert_close(found, results[1], rtol=tolerance, atol=tolerance)
    widths = []
    first.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    net(torch.cat([fake, real]), planes)
    assert widths == [(4, 7, *size)]


def test_a_hooked_discriminator_is_given_maps_and_pictures_as_one() -> None:
    net, seen = MultiscaleDiscriminator(5, 4), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append([x.shape for x in inputs]))
    planes, fake, real = torch.rand(2, 8, 16, 16).split([2, 3, 3], 1)
    discriminate(net, planes, fake, real)
    assert seen == [[(4, 5, 16, 16)]]


def test_a_discriminator_refuses_maps_that_do_not_fit() -> None:
    net = MultiscaleDiscriminator(7, 4)
    for planes, pictures, word in (((1, 4, 8, 8), (2, 4, 8, 8), r"x: expected \(N, 3, H, W\)"),
                                   ((2, 4, 8, 8), (3, 3, 8, 8), "a divisor of 3 pictures"),
                                   ((2, 4, 8, 9), (2, 3, 8, 8), r"semantics: expected \(N, L, 8")):
        with pytest.raises(ValueError, match=word) as error:
            net(torch.rand(pictures), torch.rand(planes))
        one_line(error)


def test_losses_refuse_what_has_no_meaning() -> None:
    x = [torch.zeros(1, 1, 2, 2)]
    for call, word in (
        (lambda: gan_loss(x, True, mode="lsgan"), "hinge, ls, original, w"),
        (lambda: gan_loss(x, False, discriminator=False), "target_is_real"),
        (lambda: gan_loss([], True), "at least one"),
        (lambda: feature_matching_loss([x, x], [x]), r"\(2\), got 1"),
        (lambda: class_l1_loss(x[0], x[0][..., :1], torch.zeros(1, 2, 2)), "shape of real"),
        (lambda: class_l1_loss(x[0], x[0], torch.zeros(1, 2, 3)), r"labels: expected \(1, 2, 2\)"),
        (lambda: class_l1_loss(x[0], x[0], torch.zeros(1, 2, 2)), "labels: expected integers"),
        (lambda: class_l1_loss(x[0], x[0], torch.full((1, 2, 2), -1)), "from 0 on, got -1"),
    ):
        with pytest.raises(ValueError, match=word) as error:
            call()
        one_line(error)


def test_every_class_of_an_image_counts_alike() -> None:
    labels = torch.tensor([[[0, 2, 2, 2]], [[1, 1, 1, 1]]])
    fake = torch.tensor([1.0, 2.0, 2.0, 5.0, 4.0, 4.0, 4.0, 0.0]).view(2, 1, 1, 4)
    loss = class_l1_loss(fake.requires_grad_(), torch.zeros(2, 1, 1, 4), labels)
    assert loss.item() == ((1 + 3) / 2 + 3) / 2
    loss.backward()
    assert fake.grad is not None
    torch.testing.assert_close(fake.grad.flatten(), torch.tensor(
        [1 / 4, *[1 / 12] * 3, *[1 / 8] * 3, 0]))
    half = fake.detach().half()
    assert class_l1_loss(half, torch.zeros_like(half), labels).dtype == torch.float32


def test_losses_sum_in_fp32_and_leave_the_real_side_alone() -> None:
    mu = torch.full((1, 1, 300, 300), 1.0, dtype=torch.float16)
    assert float(kl_loss(mu, torch.zeros_like(mu))) == 45_000.0
    assert kl_loss(mu, torch.zeros_like(mu)).dtype == torch.float32
    fake, real = (torch.rand(1, 2, 3, 3).requires_grad_() for _ in range(2))
    feature_matching_loss([[fake, fake]], [[real, real]]).backward()
    assert fake.grad is not None
    assert real.grad is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_unknown_pixels_become_dont_care(dtype: torch.dtype) -> None:
    labels = torch.tensor([[[0, 150 if dtype != torch.uint8 else 100, 255]]]).to(dtype)
    prepared = prepare_labels(labels, 151, dont_care=150)
    assert prepared.tolist() == [[[0, int(labels[0, 0, 1]), 150]]]
    planes = semantics(labels, ADE20K)
    assert torch.equal(planes.argmax(1), prepared)
    assert float(planes.sum()) == 3


def test_semantics_with_edges() -> None:
    labels = torch.full((1, 1, 2, 4), 26)
    ids = torch.tensor([[[[26001, 26001, 26002, 26002]] * 2]])
    planes = semantics(labels, CITYSCAPES, ids)
    assert planes.shape == (1, 36, 2, 4)
    assert planes[0, 35].tolist() == [[0, 1, 1, 0]] * 2


@pytest.mark.parametrize(("labels", "instances", "words"), [
    (torch.tensor([[[1, 35]]]), None, ("0..34", "got 35", "row 0, column 1", "in street.png")),
    (torch.tensor([[[255]]]), None, ("got 255", "no don't-care class", "street.png")),
    (torch.tensor([[[-1]]]), None, ("got -1",)),
    (torch.rand(1, 2, 2), None, ("labels", "integers", "float32")),
    (torch.zeros(2, 2).long(), None, ("labels", "(N, H, W)", "(2, 2)")),
    (torch.zeros(0, 2, 2).long(), None, ("labels", "not empty")),
    (torch.zeros(1, 2, 2).long(), None, ("instances", "got None")),
    (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long(), ("instances", "(1, 2, 3)")),
    (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2), ("instances", "integers")),
])
def test_bad_labels_are_named(labels: Tensor, instances: Tensor | None,
                              words: tuple[str, ...]) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        semantics(labels, CITYSCAPES, instances, source="street.png")
    one_line(error, *words)


def test_deepfashion_has_no_dont_care_class() -> None:
    with pytest.raises(ValueError, match=r"0\.\.7, got 255"):
        semantics(torch.tensor([[[255]]]), DEEPFASHION)
