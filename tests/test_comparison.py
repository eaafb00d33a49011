"""GroupDNet's comparison systems: published sizes, pictures, codes, a training step of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import LabelLayout, use_backend
from smis_models import create_model, list_models, reparameterize
from smis_models.networks.discriminator import discriminate
from smis_models.networks.losses import (
    diversity_loss,
    feature_matching_loss,
    gan_loss,
    kl_loss,
    latent_regression_loss,
)

# Millions of parameters of generator and encoder, as in the paper's table.
PUBLISHED = {
    "mulnet_deepfashion": 105.1, "groupnet_deepfashion": 97.7, "groupenc_deepfashion": 105.5,
    "groupdec_deepfashion": 111.3, "vspade_deepfashion": 106.8, "bicyclegan_deepfashion": 58.4,
    "dscgan_deepfashion": 58.4, "groupdnet_deepfashion": 109.1,
}
_GROUPED = {"ngf": 8, "nef": 8}
TINY: dict[str, dict[str, Any]] = {
    "mulnet_deepfashion": _GROUPED, "groupnet_deepfashion": _GROUPED,
    "groupenc_deepfashion": {"ngf": 4, "nef": 8}, "groupdec_deepfashion": _GROUPED,
    "vspade_deepfashion": {"ngf": 4, "hidden": 16, "latent_channels": 12},
    "bicyclegan_deepfashion": {"ngf": 8, "nef": 8}, "dscgan_deepfashion": {"ngf": 8, "nef": 8},
}
ONE_CODE = ("vspade_deepfashion", "bicyclegan_deepfashion", "dscgan_deepfashion")
SIZE = (64, 64)


def tiny(name: str, **options: Any) -> Any:
    return create_model(name, **{"ndf": 8, "image_size": SIZE, "init_gain": 1.0, **TINY[name],
                                 **options})


def scene(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    """Labels of four of the eight classes in 16x16 blocks."""
    coarse = torch.randint(4, (batch, 1, size[0] // 16, size[1] // 16),
                           generator=torch.Generator().manual_seed(batch))
    return F.interpolate(coarse.float(), size)[:, 0].long()


def code(model: Any, batch: int, seed: int = 0) -> Tensor:
    z: Tensor = model.generator.sample_latent(batch, torch.Generator().manual_seed(seed))
    return z


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones_within_two_percent(name: str) -> None:
    sizes = {info.name: info.parameters for info in list_models()}[name]
    millions = (sizes["generator"] + sizes["encoder"]) / 1e6
    assert millions == pytest.approx(PUBLISHED[name], rel=0.02)


def test_vspade_is_spade_to_the_last_parameter() -> None:
    sizes = {info.name: info.parameters for info in list_models()}["vspade_deepfashion"]
    assert sizes["generator"] + sizes["encoder"] == 106_808_707


@pytest.mark.parametrize(("name", "size"), [
    *((name, SIZE) for name in TINY), ("groupdec_deepfashion", (64, 128)),
    ("bicyclegan_deepfashion", (64, 96)),
])
def test_every_system_paints_and_encodes(name: str, size: tuple[int, int]) -> None:
    model = tiny(name, image_size=size, dtype=torch.float64).eval()
    labels, z = scene(2, size), code(model, 2)
    planes = model.semantics(labels)
    layout = LabelLayout.from_labels(labels, 8)
    with torch.no_grad():
        with use_backend("reference"):
            expected = model(planes, z)
            codes = model.encoder.encode(expected, labels)
        image, painted = model(planes, z), model(layout, z)
        mu, logvar = model.encoder.encode(expected, labels)
        again = model(planes, reparameterize(mu, logvar))
    assert image.shape == again.shape == (2, 3, *size)
    assert image.std() > 1e-3
    assert not torch.equal(again, image)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(painted, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close((mu, logvar), codes, rtol=1e-9, atol=1e-9)
    assert mu.shape == logvar.shape == z.shape


def generator_losses(model: Any, planes: Tensor, labels: Tensor, image: Tensor) -> list[Tensor]:
    """Each system's own objective, without the perceptual term."""
    mu, logvar = model.encoder.encode(image, labels)
    fake = model.generator(planes, reparameterize(mu, logvar))
    verdicts, reals = discriminate(model.discriminator, planes, fake, image)
    objective = getattr(model.preset, "objective", None)
    if objective is None:
        return [gan_loss(verdicts, True, discriminator=False), 0.05 * kl_loss(mu, logvar),
                feature_matching_loss(verdicts, reals)]
    z_0, z_1 = code(model, 2, 1), code(model, 2, 2)
    drawn = model.generator(planes, z_0)
    verdicts = [*verdicts, *discriminate(model.discriminator, planes, drawn, image)[0]]
    losses = [gan_loss(verdicts, True, discriminator=False, mode="ls", reduction="sum"),
              10 * F.l1_loss(fake, image), 0.01 * kl_loss(mu, logvar)]
    if objective == "bicyclegan":
        return [*losses, 0.5 * latent_regression_loss(model.encoder(drawn)[0], z_0)]
    return [*losses, 8 * diversity_loss(model.generator(planes, z_1), drawn, z_1, z_0)]


@pytest.mark.parametrize("name", TINY)
def test_every_system_trains_a_step(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name).train()
    labels = scene(2)
    planes, image = model.semantics(labels), torch.rand(2, 3, *SIZE) * 2 - 1
    networks = nn.ModuleList([model.generator, model.encoder])
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3, (0.0, 0.9))
                  for m in (networks, model.discriminator)]
    before = [p.detach().clone() for p in model.parameters()]

    losses = generator_losses(model, planes, labels, image)
    assert all(loss.isfinite() for loss in losses)
    torch.stack(losses).sum().backward()
    without = [key for key, p in networks.named_parameters() if p.grad is None]
    assert not without
    optimizers[0].step()

    with torch.no_grad():
        fake = model.generator(planes, code(model, 2, 3))
    model.discriminator.zero_grad()
    verdicts = discriminate(model.discriminator, planes, fake, image)
    loss = gan_loss(verdicts[0], False) + gan_loss(verdicts[1], True)
    loss.backward()
    optimizers[1].step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)  # biases before a norm have no gradient but rounding


@pytest.mark.parametrize("edge", [False, True])
def test_mulnet_paints_every_class_from_its_own_code(edge: bool) -> None:
    """Inside a class, a pixel off its border, other classes' codes have no gradient."""
    model = tiny("mulnet_deepfashion", dtype=torch.float64, instance_edge=edge).eval()
    labels = torch.zeros(1, *SIZE, dtype=torch.long)
    labels[:, :, 32:] = 3
    z = code(model, 1).requires_grad_()
    image = model(model.semantics(labels, labels if edge else None), z)
    for columns, own in ((slice(0, 31), 0), (slice(33, 64), 3)):
        (gradient,) = torch.autograd.grad(image[..., columns].sum(), z, retain_graph=True)
        moved = gradient.view(8, -1).abs().amax(1) > 0
        assert moved.nonzero().flatten().tolist() == [own]


@pytest.mark.parametrize(("name", "mixes"), [("groupenc_deepfashion", False),
                                             ("groupdec_deepfashion", True)])
def test_codes_are_of_one_class_where_the_encoder_is_grouped(name: str, mixes: bool) -> None:
    model = tiny(name, dtype=torch.float64).eval()
    image = torch.rand(1, 3, *SIZE, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(1, *SIZE, dtype=torch.long)
    labels[:, :, 32:] = 3
    mu, _ = model.encoder.encode(image, labels)
    (gradient,) = torch.autograd.grad(mu[:, :8].square().sum(), image)
    assert gradient[..., :32].any()
    assert bool(gradient[..., 32:].any()) == mixes


def test_codes_of_whole_pictures_belong_to_no_class() -> None:
    for name in TINY:
        generator = tiny(name, part="generator")
        assert hasattr(generator, "class_channels") == (name not in ONE_CODE)


def test_unet_depth_follows_the_size() -> None:
    for size, depth, layers in (((256, 256), 8, 5), ((128, 128), 7, 4), ((64, 96), 5, 2),
                                ((256, 512), 8, 5)):
        model = create_model("bicyclegan_deepfashion", image_size=size, device="meta")
        assert sum(name.startswith("down") for name, _ in model.generator.named_children()) == depth
        assert len(model.encoder.layers) == layers


@torch.no_grad()
def test_unet_and_encoder_layer_by_layer() -> None:
    """As U-Net-256 with the code at every layer and resnet_256 are described, in plain torch."""
    model = tiny("bicyclegan_deepfashion", ngf=4, nef=4).double().eval()
    g, e, last = model.generator, model.encoder, 5
    planes, z = model.semantics(scene(2)), code(model, 2)
    x, kept = planes, []
    for i in range(last + 1):
        given = torch.cat([x, z[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        x = g.get_submodule(f"down{i}")(F.leaky_relu(given, 0.2) if i else given)
        x = F.instance_norm(x) if 0 < i < last else x
        kept.append(x)
    assert x.shape[2:] == (1, 1)
    for i in range(last, 0, -1):
        x = F.instance_norm(g.get_submodule(f"up{i}")(F.relu(x)))
        x = torch.cat([x, kept[i - 1]], 1)
    torch.testing.assert_close(g(planes, z), g.up0(F.relu(x)).tanh())
    picture = g(planes, z)
    first, *blocks = e.layers
    x = first(picture)
    for block in blocks:
        h = x
        for layer in (block.conv_0, block.conv_1):
            h = layer(F.leaky_relu(F.instance_norm(h), 0.2))
        x = F.avg_pool2d(h, 2) + block.shortcut(F.avg_pool2d(x, 2))
    x = F.leaky_relu(x, 0.2).mean((2, 3))
    torch.testing.assert_close(e(picture), (e.fc_mu(x), e.fc_var(x)))


@pytest.mark.parametrize(("name", "options", "words"), [
    ("mulnet_deepfashion", {"ngf": 12}, ["fusion", "8 classes", "12", "ngf"]),
    ("mulnet_deepfashion", {"fusion": "sum"}, ["fusion", "conv or masks", "'sum'"]),
    ("bicyclegan_deepfashion", {"image_size": (48, 64)}, ["image_size", "multiples of 32"]),
    ("bicyclegan_deepfashion", {"objective": "gan"}, ["objective", "bicyclegan or dscgan"]),
    ("dscgan_deepfashion", {"nef": 0}, ["nef", "at least 1"]),
    ("groupdec_deepfashion", {"encoder_groups": 5}, ["layer1", "5 groups", "24"]),
])
def test_bad_options_are_named(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        create_model(name, device="meta", **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_bad_network_inputs_are_named() -> None:
    model = tiny("bicyclegan_deepfashion").eval()
    planes, z = model.semantics(scene(1)), code(model, 1)
    for call, words in (
        (lambda: model(planes[:, :-1], z), ("semantics", "(N, 8, H, W)", "7")),
        (lambda: model(planes, z[:, :5]), ("z: expected (1, 8)", "(1, 5)")),
        (lambda: model.generator(planes, None), ("z: expected (1, 8)", "None")),
        (lambda: model.encoder(planes), ("x: expected (N, 3, H, W)", "8")),
    ):
        with pytest.raises(ValueError, match=words[0].split()[0]) as error:
            call()
        assert all(word in str(error.value) for word in words)


def test_diversity_is_a_bounded_ratio_of_distances() -> None:
    image_0, z_0 = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8)
    image_1, z_1 = torch.stack([torch.full((3, 4, 4), 0.5), torch.ones(3, 4, 4)]), z_0 + 0.25
    z_1[1] = 1e-3  # a ratio of about 1000: bounded
    loss = diversity_loss(image_1, image_0, z_1, z_0, bound=10)
    assert float(loss) == pytest.approx(-(0.5 / 0.25 + 10) / 2, rel=1e-4)
    for arguments in ((image_0, image_1[:1], z_0, z_1), (image_0, image_1, z_0, z_1[:, :3]),
                      (image_0[:1], image_1[:1], z_0, z_1)):
        with pytest.raises(ValueError, match="expected"):
            diversity_loss(*arguments)


def test_diversity_has_gradients_to_pictures_alone() -> None:
    images = [torch.rand(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    codes = [torch.rand(2, 8, requires_grad=True) for _ in range(2)]
    diversity_loss(*images, *codes).backward()
    assert all(image.grad is not None and image.grad.any() for image in images)
    assert all(z.grad is None for z in codes)


def test_latent_regression_is_l1_and_leaves_the_code_alone() -> None:
    mean = torch.tensor([[1.0, -1.0]], dtype=torch.float16).requires_grad_()
    z = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    loss = latent_regression_loss(mean, z)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == 1
    loss.backward()
    assert mean.grad is not None
    assert z.grad is None
    with pytest.raises(ValueError, match=r"z: expected the mean's shape \(1, 2\), got \(1, 3\)"):
        latent_regression_loss(mean, torch.zeros(1, 3))
