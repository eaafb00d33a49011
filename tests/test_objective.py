"""The objective: every term by hand, its weight, its sign, and the networks that it moves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import SMALL_TRAINING
from torch import Tensor, nn

from smis_models.families.ccfpse import pyramid_matching_loss
from smis_models.networks.losses import (
    class_l1_loss,
    diversity_loss,
    feature_matching_loss,
    gan_loss,
    kl_loss,
    latent_regression_loss,
)
from smis_models.training import TrainConfig, from_dict
from smis_models.training.batches import Batches, MicroBatch, dataset
from smis_models.training.distributed import Processes
from smis_models.training.objective import Objective, frozen_parameters, objective
from smis_models.training.trainer import Trainer

pytest.importorskip("jsonargparse")

TINY = {
    **SMALL_TRAINING,
    "init_gain": 1.0,
    "losses": {"kl": 0.3, "feature_matching": 7.0, "perceptual": 0.0, "adversarial": 1.5,
               "pixel": 3.0, "prior": 0.25, "latent": 0.7, "diversity": 1.1, "discriminator": 0.8},
}
SCORES = [[1.5, -0.5], [0.25, -2.0], [3.0, 1.0]]  # two images of three scales
# mode: of SCORES per scale, by hand: (discriminator, real), (discriminator, fake), generator.
BY_HAND = {
    "hinge": ([(0 + 1.5) / 2, (0.75 + 3) / 2, 0], [(2.5 + 0.5) / 2, 1.25 / 2, (4 + 2) / 2],
              [-0.5, 0.875, -2]),
    "ls": ([(0.25 + 2.25) / 2, (0.5625 + 9) / 2, 4 / 2], [(2.25 + 0.25) / 2, (0.0625 + 4) / 2, 5],
           [(0.25 + 2.25) / 2, (0.5625 + 9) / 2, 4 / 2]),
    "original": (
        [(math.log1p(math.exp(-a)) + math.log1p(math.exp(-b))) / 2 for a, b in SCORES],
        [(math.log1p(math.exp(a)) + math.log1p(math.exp(b))) / 2 for a, b in SCORES],
        [(math.log1p(math.exp(-a)) + math.log1p(math.exp(-b))) / 2 for a, b in SCORES]),
    "w": ([-0.5, 0.875, -2], [0.5, -0.875, 2], [-0.5, 0.875, -2]),
}


@pytest.mark.parametrize("mode", BY_HAND)
def test_adversarial_losses_by_hand(mode: str) -> None:
    scales = [torch.tensor(row).view(2, 1, 1, 1) for row in SCORES]
    features = [[torch.full((2, 3, 4, 4), 9.0), scale] for scale in scales]  # which are not read
    for expected, (real, discriminator) in zip(
            BY_HAND[mode], ((True, True), (False, True), (True, False)), strict=True):
        for predictions in (scales, features):
            for reduction, total in (("mean", sum(expected) / 3), ("sum", sum(expected))):
                found = gan_loss(predictions, real, discriminator=discriminator, mode=mode,
                                 reduction=reduction)
                assert found.item() == pytest.approx(total, rel=1e-6), (real, discriminator)
        alone = gan_loss(scales[1], real, discriminator=discriminator, mode=mode)
        assert alone.item() == pytest.approx(expected[1], rel=1e-6)


def test_kl_by_hand() -> None:
    mu, logvar = torch.tensor([[0.5, -1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [-2.0, 0.5]])
    each = [0.5 * (m * m + math.exp(v) - 1 - v) for m, v in zip(
        (0.5, -1.0, 2.0, 0.0), (0.0, 1.0, -2.0, 0.5), strict=True)]
    for reduction, count in (("sum", 1), ("batchmean", 2), ("mean", 4)):
        assert kl_loss(mu, logvar, reduction=reduction).item() == pytest.approx(sum(each) / count)
    assert kl_loss(mu, logvar).item() == pytest.approx(sum(each))  # as published
    alone = kl_loss(mu.view(1, 4), logvar.view(1, 4), reduction="batchmean")
    assert alone.item() == pytest.approx(sum(each))
    normal = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    truth = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_loss(mu, logvar), truth.sum())


def test_feature_matching_by_hand() -> None:
    def scale(*values: float) -> list[Tensor]:
        return [torch.full((1, 1, i + 1, 2), float(value)) for i, value in enumerate(values)]

    # Two scales, three features and the prediction, whose distance of 50 does not count.
    fake = [scale(1, 2, 3, 50), scale(0, 0, 1, 50)]
    real = [scale(2, 0, 3, 0), scale(4, 0, 0, 0)]
    total = (1 + 2 + 0) + (4 + 0 + 1)
    assert feature_matching_loss(fake, real).item() == pytest.approx(10 * total / 2)
    assert feature_matching_loss(fake, real, 3.0).item() == pytest.approx(3 * total / 2)
    wide = feature_matching_loss(fake, real, 3.0, weighting="pix2pixhd").item()
    assert wide == pytest.approx(3 * total / 2 * 4 / 3)  # 4 / (n_layers + 1), 3 features
    pyramids = [scale(1, 2, 3, 4), scale(3, 2, 0, 8)]
    assert pyramid_matching_loss(*pyramids).item() == pytest.approx(20 * (2 + 0 + 3 + 4) / 4)


@pytest.mark.parametrize("name", ["gan", "matching", "classes", "kl", "latent", "diversity"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_16_bits_are_those_in_fp32(name: str, dtype: torch.dtype) -> None:
    """What would be infinite or rounded in 16 bits: squares, exponentials and sums."""
    given = torch.linspace(-12, 12, 2 * 3 * 64 * 64).view(2, 3, 64, 64).to(dtype)
    labels = (torch.arange(64 * 64).view(1, 64, 64) % 3).expand(2, 64, 64)

    def loss(x: Tensor) -> Tensor:
        y = -x.flip(3)
        return {
            "gan": lambda: gan_loss([32 * x], False, mode="ls"),
            "matching": lambda: feature_matching_loss([[x, x]], [[y, y]]),
            "classes": lambda: class_l1_loss(x, y, labels),
            "kl": lambda: kl_loss(x, y), "latent": lambda: latent_regression_loss(x, y),
            "diversity": lambda: diversity_loss(x, y, x, 0.5 * y, bound=100.0)}[name]()

    found, expected = loss(given), loss(given.float())
    assert found.dtype == torch.float32 and bool(expected.isfinite())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_codes_found_again_and_diversity_by_hand() -> None:
    mean, z = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]], requires_grad=True)
    assert latent_regression_loss(mean, z).item() == pytest.approx(1.5)
    assert not latent_regression_loss(mean, z).requires_grad  # none goes to the code
    images = torch.zeros(2, 3, 1, 1), torch.full((2, 3, 1, 1), 0.5)
    codes = torch.zeros(2, 4), torch.tensor([[0.25] * 4, [0.01] * 4])
    # Ratios 2 and 50, the second cut at the bound.
    assert diversity_loss(*images, *codes).item() == pytest.approx(-(2 + 10) / 2, rel=1e-4)
    assert diversity_loss(*images, *codes, bound=30).item() == pytest.approx(-(2 + 30) / 2, 1e-4)
    whole = diversity_loss(*images, codes[0].requires_grad_(), codes[1], bound=100)
    # 1e-5 keeps equal codes from dividing by zero.
    assert whole.item() == pytest.approx(-(0.5 / 0.25001 + 0.5 / 0.01001) / 2, 1e-5)
    assert not whole.requires_grad


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    made = Trainer(from_dict(TINY))
    made.model.eval()  # no power iterations: a second forward is the first
    return made


@pytest.fixture(scope="module")
def batch(trainer: Trainer) -> MicroBatch:
    config = trainer.config
    made = Batches(dataset(config, "train"), config, Processes(), torch.device("cpu"))
    (first,) = made.step()
    return first


def of(trainer: Trainer, vgg: Any = None, parts: int = 1, **losses: Any) -> Objective:
    """The trainer's model under other weights."""
    config: TrainConfig = trainer.config
    return objective(trainer.model, replace(config, losses=replace(config.losses, **losses)),
                     parts, vgg)


TERMS = {"adversarial": "gan", **{name: name for name in (
    "feature_matching", "kl", "pixel", "prior", "latent", "diversity", "perceptual")}}


class _Grey(nn.Module):
    """Stands for the VGG19 loss, whose second picture gets no gradient."""

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        return (fake.mean(1) - real.detach().mean(1)).abs().mean()


@pytest.mark.parametrize("weight", TERMS)
def test_a_weight_doubles_its_term_alone(trainer: Trainer, batch: MicroBatch, weight: str) -> None:
    base = {"perceptual": 2.0}
    before, _ = of(trainer, _Grey(), **base).generator(batch)
    value = base.get(weight, getattr(trainer.config.losses, weight))
    after, _ = of(trainer, _Grey(), **{**base, weight: 2 * value}).generator(batch)
    assert set(before) == set(after) == set(TERMS.values())
    assert all(float(term.detach().abs()) > 1e-4 for term in before.values())
    for name, term in before.items():
        factor = 2 if name == TERMS[weight] else 1
        torch.testing.assert_close(after[name], factor * term, rtol=1e-4, atol=1e-6)
    judged = of(trainer).discriminator(batch, [batch.image, batch.image])
    again = of(trainer, **{weight: 2 * value} if weight != "prior" else {}).discriminator(
        batch, [batch.image, batch.image])
    torch.testing.assert_close(again, judged)  # no generator's weight enters there


@pytest.mark.parametrize("term", ["prior", "latent", "diversity"])
def test_one_term_of_drawn_codes_is_enough(trainer: Trainer, batch: MicroBatch, term: str) -> None:
    alone = {"prior": 0.0, "latent": 0.0, "diversity": 0.0, term: 1.0}
    values, painted = of(trainer, **alone).generator(batch)
    assert set(values) == {"gan", "feature_matching", "kl", "pixel", term} and len(painted) == 2


# Term: the networks whose weights it has a gradient for.
REACHED = {"gan": {"generator", "encoder"}, "feature_matching": {"generator", "encoder"},
           "perceptual": {"generator", "encoder"}, "pixel": {"generator", "encoder"},
           "kl": {"encoder"}, "prior": {"generator"}, "latent": {"generator"},
           "diversity": {"generator"}}


def reached(trainer: Trainer, loss: Tensor) -> set[str]:
    trainer.model.zero_grad()
    loss.backward(retain_graph=True)
    found = {part for part, network in trainer.model.named_children()
             if any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())}
    trainer.model.zero_grad()
    return found


def test_gradients_reach_the_right_network(trainer: Trainer, batch: MicroBatch) -> None:
    model = trainer.model
    with frozen_parameters(model.discriminator):
        losses, fakes = of(trainer, _Grey(), perceptual=1.0).generator(batch)
        assert {name: reached(trainer, term) for name, term in losses.items()} == REACHED
    painted = of(trainer).repaint(batch, fakes)
    assert [fake.requires_grad for fake in painted] == [False, False]
    judged = of(trainer).discriminator(batch, painted)
    assert {name: reached(trainer, term) for name, term in judged.items()} == {
        "fake": {"discriminator"}, "real": {"discriminator"}}
    assert all(p.requires_grad for p in model.parameters())


def test_what_was_frozen_before_stays_frozen() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with frozen_parameters(module):
        assert not any(p.requires_grad for p in module.parameters())
    assert module.weight.requires_grad and not module.bias.requires_grad


def test_both_pictures_of_two_codes_move_the_generator(trainer: Trainer, batch: MicroBatch) -> None:
    """The gradient of the paper's formula, in which neither picture is held fixed."""
    model = trainer.model
    values, _ = of(trainer, diversity_bound=1e3).generator(batch)
    shape = model.generator.sample_latent(2).shape
    codes = [batch.noise(torch.empty(shape), draw) for draw in (1, 2)]
    one, other = (model.generator(batch.planes, z) for z in codes)
    apart = (codes[0] - codes[1]).abs().mean((1, 2, 3)) + 1e-5
    expected = -1.1 * ((one - other).abs().mean((1, 2, 3)) / apart).mean()
    weight = model.generator.fc.weight
    found, truth = (torch.autograd.grad(x, weight)[0] for x in (values["diversity"], expected))
    scale = float(truth.abs().max())
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3 * scale)
    bounded, _ = of(trainer, diversity_bound=1e-6).generator(batch)
    assert bounded["diversity"].item() == pytest.approx(-1.1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_every_term_from_its_parts(trainer: Trainer, batch: MicroBatch, noise: float) -> None:
    """Each term of the generator from the networks' outputs, by the formulas of the papers."""
    model, weights = trainer.model, trainer.config.losses
    values, (fake, drawn) = of(trainer, parts=3, code_noise=noise).generator(batch)
    mu, logvar = model.encoder.encode(batch.image, batch.labels)
    z = mu + noise * batch.noise(mu) * (0.5 * logvar).exp()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(fake, model.generator(batch.planes, z), **close)
    shape = model.generator.sample_latent(2).shape
    first, second = (batch.noise(torch.empty(shape), draw) for draw in (1, 2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(drawn, model.generator(batch.planes, first), **close)

    def scores(picture: Tensor) -> list[list[Tensor]]:
        return model.discriminator(torch.cat([batch.planes, picture], 1))

    def realness(picture: Tensor) -> Tensor:
        return torch.stack([scale[-1].mean() for scale in scores(picture)]).mean()

    pairs = zip(scores(fake), scores(batch.image), strict=True)
    matching = sum((f - r).abs().mean() for a, b in pairs
                   for f, r in zip(a[:-1], b[:-1], strict=True)) / 2
    divergence = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
    with torch.no_grad():
        found, _ = model.encoder.encode(drawn, batch.labels)
        shown = [[bool((labels == c).any()) for c in range(8)] for labels in batch.labels]
        mask = torch.tensor(shown).repeat_interleave(8, 1)[:, :, None, None].expand_as(found)
        other = model.generator(batch.planes, second)
    ratio = (other - drawn).abs().mean((1, 2, 3)) / (
        (second - first).abs().mean((1, 2, 3)) + 1e-5)
    expected = {
        "gan": -weights.adversarial * realness(fake), "feature_matching": 7.0 * matching,
        "kl": 0.3 * 3 * divergence, "pixel": 3.0 * (fake - batch.image).abs().mean(),
        "prior": -0.25 * realness(drawn), "latent": 0.7 * (found - first)[mask].abs().mean(),
        "diversity": -1.1 * ratio.clamp_max(10).mean(),
    }
    for name, value in values.items():
        torch.testing.assert_close(value, expected.pop(name), **close, msg=f"{name}: {value}")
    assert not expected


@pytest.mark.parametrize(("mode", "scales"), [("hinge", "mean"), ("ls", "sum"), ("w", "mean")])
def test_the_discriminators_loss_from_its_parts(trainer: Trainer, batch: MicroBatch, mode: str,
                                                scales: str) -> None:
    model = trainer.model
    random = torch.Generator().manual_seed(0)
    fakes = [torch.rand(batch.image.shape, generator=random) * 2 - 1 for _ in range(2)]

    def judged(picture: Tensor, real: bool) -> Tensor:
        every = model.discriminator(torch.cat([batch.planes, picture], 1))
        sign = 1 if real else -1
        each = [{"hinge": (1 - sign * s[-1]).clamp_min(0), "ls": (s[-1] - float(real)) ** 2,
                 "w": -sign * s[-1]}[mode].mean() for s in every]
        return torch.stack(each).sum() / (len(each) if scales == "mean" else 1)

    own, drawn, real = judged(fakes[0], False), judged(fakes[1], False), judged(batch.image, True)
    for prior in (0.0, 0.5):
        drawing = {"prior": prior, "latent": 0.0, "diversity": 0.0}
        values = of(trainer, gan=mode, scales=scales, **drawing).discriminator(
            batch, fakes if prior else fakes[:1])
        torch.testing.assert_close(values["real"], 0.8 * real, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values["fake"], 0.8 * (own + prior * drawn) / (1 + prior),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reuse", [True, False])
def test_which_picture_the_discriminator_sees(trainer: Trainer, batch: MicroBatch,
                                              reuse: bool) -> None:
    """The generator's own, or pictures of codes that are drawn anew."""
    config = replace(trainer.config, optimizer=replace(trainer.config.optimizer, reuse_fake=reuse))
    made = objective(trainer.model, config)
    _, fakes = made.generator(batch)
    if reuse:
        assert all(map(torch.equal, made.repaint(batch, fakes), fakes))
        return
    model, shape = made.model, made.model.generator.sample_latent(2).shape
    with torch.no_grad():
        mu, logvar = model.encoder.encode(batch.image, batch.labels)
        drawn = [batch.noise(torch.empty(shape), draw) for draw in range(5)]
        expected = [model.generator(batch.planes, z) for z in (
            mu + drawn[3] * (0.5 * logvar).exp(), drawn[4])]
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 5
    torch.testing.assert_close(made.repaint(batch, fakes), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reuse", [True, False])
def test_every_code_of_a_step_is_of_its_own(
        trainer: Trainer, batch: MicroBatch, reuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    noise = MicroBatch.noise

    def counting(self: MicroBatch, like: Tensor, draw: int = 0) -> Tensor:
        draws.append(draw)
        return noise(self, like, draw)

    monkeypatch.setattr(MicroBatch, "noise", counting)
    config = replace(trainer.config, optimizer=replace(trainer.config.optimizer, reuse_fake=reuse))
    made = objective(trainer.model, config)
    made.repaint(batch, made.generator(batch)[1])
    assert sorted(draws) == ([0, 1, 2] if reuse else [0, 1, 2, 3, 4])


@pytest.mark.parametrize("name", ["ccfpse_ade20k", "pix2pixhd_cityscapes",
                                  "pix2pixhd_cityscapes_features", "spade_ade20k"])
def test_terms_of_the_other_families(name: str) -> None:
    """Values from each discriminator's own outputs, in the family's own forms."""
    few = {"ngf": 2, "ndf": 4, "image_size": [64, 64], "classes": 8, "dont_care": None}
    more = {"pix2pixhd_cityscapes": {"blocks": 1, "discriminator_layers": 2},
            "ccfpse_ade20k": {"hidden": 32},
            "pix2pixhd_cityscapes_features": {"blocks": 1, "nef": 4},
            "spade_ade20k": {"hidden": 32}}[name]
    made = Trainer(from_dict({
        **TINY, "recipe": name, "losses": {"perceptual": 0.0}, "network": {**few, **more}}))
    model, config = made.model.eval(), made.config
    (batch,) = Batches(dataset(config, "train"), config, Processes(), torch.device("cpu")).step()
    values, (fake,) = made.objective.generator(batch)
    judged = made.objective.discriminator(batch, [fake.detach()])
    if name.endswith("features"):
        features = model.encoder(batch.image, batch.instances)
        torch.testing.assert_close(fake, model.generator(batch.planes, features))
        assert not torch.equal(fake, model.generator(batch.planes, features.flip(0)))
    with torch.no_grad():  # what grids show and best weights are judged by
        shown = [made.objective.reconstruct(batch), made.objective.sample(batch, 4)]
        if name.startswith("ccfpse"):
            drawn = torch.randn((2, 256), generator=torch.Generator().manual_seed(4))
            painted = [model.generator(batch.planes, z) for z in (
                model.encoder(batch.image)[0], drawn)]
        else:  # no code is drawn: features are the batch's own
            painted = [fake, fake]
    torch.testing.assert_close(shown, painted, rtol=1e-4, atol=1e-5)
    if name.startswith("ccfpse"):
        (of_fake, fakes), (of_real, reals) = (
            model.discriminator(image, batch.planes) for image in (fake, batch.image))
        assert len(of_fake) == 4
        matching = 20 / 4 * sum((f - r).abs().mean() for f, r in zip(of_fake, of_real, strict=True))
    else:
        every = [model.discriminator(torch.cat([batch.planes, image], 1))
                 for image in (fake, batch.image)]
        fakes, reals = ([scale[-1] for scale in image] for image in every)
        # pix2pixHD's weight falls with the layers: 4 / (n_layers + 1), of 2 and of 3 here.
        share = 4 / 3 if name == "pix2pixhd_cityscapes" else 1
        matching = share * 10 / 2 * sum(
            (f - r).abs().mean() for a, b in zip(*every, strict=True)
            for f, r in zip(a[:-1], b[:-1], strict=True))
    if name.startswith("pix2pixhd"):
        expected = {"gan": sum((s - 1).square().mean() for s in fakes),
                    "fake": 0.5 * sum(s.square().mean() for s in fakes),
                    "real": 0.5 * sum((s - 1).square().mean() for s in reals)}
    else:
        count = len(fakes)
        expected = {"gan": -sum(s.mean() for s in fakes) / count,
                    "fake": sum((1 + s).clamp_min(0).mean() for s in fakes) / count,
                    "real": sum((1 - s).clamp_min(0).mean() for s in reals) / count}
    found = {**values, **judged}
    for term, value in {**expected, "feature_matching": matching}.items():
        torch.testing.assert_close(found[term], value, rtol=1e-4, atol=1e-5, msg=term)
    for term, value in (("gan", expected["gan"]), ("feature_matching", matching)):
        moves, truth = (torch.autograd.grad(x, fake, retain_graph=True)[0]
                        for x in (values[term], value))
        torch.testing.assert_close(moves, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


def test_a_step_sums_the_terms_with_weight_one(trainer: Trainer, batch: MicroBatch) -> None:
    """The gradients that Adam sees are those of the plain sum of all terms."""
    made = Trainer(from_dict({**TINY, "losses": {**TINY["losses"], "pixel": 5.0}},  # type: ignore
                             ["--optimizer.reuse_fake", "true", "--optimizer.generator", "0",
                              "--optimizer.discriminator", "0"]))
    made.model.load_state_dict(trainer.model.state_dict())
    made.model.eval()
    with frozen_parameters(made.model.discriminator):
        losses, fakes = made.objective.generator(batch)
    wanted = [p for part in (made.model.generator, made.model.encoder) for p in part.parameters()]
    expected = torch.autograd.grad(sum(losses.values()), wanted, allow_unused=True)
    of_judge = torch.autograd.grad(
        sum(made.objective.discriminator(batch, [f.detach() for f in fakes]).values()),
        list(made.model.discriminator.parameters()), allow_unused=True)
    values = made.step([batch], 0)
    assert values["pixel"] == pytest.approx(float(losses["pixel"].detach()), rel=1e-4)
    every = zip([*wanted, *made.model.discriminator.parameters()], [*expected, *of_judge],
                strict=True)
    for parameter, gradient in every:
        if gradient is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * scale)
