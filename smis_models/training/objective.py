"""What a step computes: the losses of generator and discriminator, for each family of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import CCFPSEPreset, Pix2pixHDPreset, SynthesisModel
from ..families.ccfpse import discriminate_pairs, pyramid_matching_loss
from ..networks.discriminator import discriminate
from ..networks.encoder import reparameterize
from ..networks.losses import (
    class_l1_loss,
    diversity_loss,
    feature_matching_loss,
    gan_loss,
    kl_loss,
    latent_regression_loss,
)
from ..networks.perceptual import PerceptualLoss
from .batches import MicroBatch
from .config import TrainConfig

Losses = dict[str, Tensor]


class DiscriminatorOutputs(NamedTuple):
    """What the discriminator says of fake and real pictures."""

    fake: Any
    real: Any
    matching: Callable[[], Tensor]
    """Feature matching with weight 1."""


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the module's parameters from what is computed in the block."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class Objective:
    """Losses of GroupDNet, SPADE (with or without codes) and CC-FPSE.

    Generator and encoder: gan + feature matching + perceptual + KL + pixel, by their weights, of
    pictures painted with the encoder's codes; and, where weighed, of pictures painted with codes
    from N(0, 1): prior (adversarial), latent (their codes are found again), diversity.
    Discriminator: real + fake, the latter shared by both kinds of pictures where prior is weighed.

    Args:
        model: with all its parts.
        config: weights.
        parts: of the batch that a step's gradients are averaged over (processes x micro-batches);
            terms that sum over images are multiplied by it.
        perceptual: the VGG19 loss; None where no loss is computed, as for grids of samples.

    Raises:
        ValueError: a term that the model cannot have.
    """

    def __init__(self, model: SynthesisModel, config: TrainConfig, parts: int = 1,
                 perceptual: PerceptualLoss | None = None) -> None:
        self.model, self.preset, self.weights = model, model.preset, config.losses
        self.reuse_fake, self.parts = config.optimizer.reuse_fake, parts
        self.perceptual = perceptual
        for name in ("kl", "prior", "latent", "diversity"):
            if getattr(self.weights, name) > 0 and not self.coded:
                raise ValueError(f"losses.{name}: expected 0, for {config.model} has no latent "
                                 f"code with these options; got {getattr(self.weights, name)}")

    @property
    def coded(self) -> bool:
        """Whether pictures are painted from a latent code that an encoder finds."""
        return self.preset.has_encoder

    @property
    def coded_by_class(self) -> bool:
        """Whether each class has a code of its own."""
        return self.coded and hasattr(self.model.generator, "class_channels")

    def encode(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the codes of the batch's pictures."""
        return self.model.encoder.encode(batch.image, batch.labels)

    def discriminate(self, batch: MicroBatch, fake: Tensor) -> DiscriminatorOutputs:
        """Fake and real pictures in one pass."""
        real = batch.image.to(fake.dtype)
        fakes, reals = discriminate(self.model.discriminator, batch.planes, fake, real)
        return DiscriminatorOutputs(fakes, reals, lambda: feature_matching_loss(fakes, reals, 1.0))

    def gan(self, verdict: Any, real: bool, *, discriminator: bool = True) -> Tensor:
        """The adversarial loss as configured."""
        return gan_loss(verdict, real, discriminator=discriminator, mode=self.weights.gan,
                        reduction=self.weights.scales)

    def paint(self, batch: MicroBatch, losses: Losses, draw: int = 0) -> Tensor:
        """Pictures with the codes of the batch's own; adds the KL term to ``losses``.

        ``draw`` numbers the noise of the codes.
        """
        if not self.coded:
            return self.model.generator(batch.semantics, None)
        mu, logvar = self.encode(batch)
        if self.weights.kl > 0:
            losses["kl"] = self.weights.kl * self.parts * kl_loss(mu, logvar)
        noise = self.weights.code_noise * batch.noise(mu, draw)
        return self.model.generator(batch.semantics, reparameterize(mu, logvar, noise=noise))

    def generator(self, batch: MicroBatch) -> tuple[Losses, list[Tensor]]:
        """The weighted terms to minimise; the pictures of the batch's own codes and drawn ones."""
        weights = self.weights
        losses: Losses = {}
        fake = self.paint(batch, losses)
        if weights.adversarial > 0:
            verdicts = self.discriminate(batch, fake)
            losses["gan"] = weights.adversarial * self.gan(
                verdicts.fake, True, discriminator=False)
            if weights.feature_matching > 0:
                losses["feature_matching"] = weights.feature_matching * verdicts.matching()
        if weights.perceptual > 0:
            if self.perceptual is None:
                raise ValueError("perceptual: expected the VGG19 loss, for losses.perceptual is "
                                 f"{weights.perceptual:g}; got None")
            losses["perceptual"] = weights.perceptual * self.perceptual(fake, batch.image)
        if weights.pixel > 0:
            losses["pixel"] = weights.pixel * self.distance(fake.float(), batch)
        if not self._draws:
            return losses, [fake]
        return losses, [fake, self._drawn(batch, losses)]

    def distance(self, fake: Tensor, batch: MicroBatch) -> Tensor:
        """Mean L1 between fake and real, by pixels or by classes."""
        if self.weights.pixel_mean == "classes":
            return class_l1_loss(fake, batch.image.float(), batch.labels)
        return F.l1_loss(fake, batch.image.float())

    @property
    def _draws(self) -> bool:
        """Whether pictures are painted with codes from N(0, 1) too."""
        weights = self.weights
        return self.coded and max(weights.prior, weights.latent, weights.diversity) > 0

    def _code(self, batch: MicroBatch, draw: int) -> Tensor:
        """Codes from N(0, 1), of this batch's own."""
        shape = self.model.generator.sample_latent(1, torch.Generator().manual_seed(0))
        return batch.noise(shape.expand(len(batch), *shape.shape[1:]), draw)

    def _drawn(self, batch: MicroBatch, losses: Losses) -> Tensor:
        """Pictures with drawn codes; adds their terms to ``losses``."""
        weights, z = self.weights, self._code(batch, 1)
        fake: Tensor = self.model.generator(batch.semantics, z)
        if weights.prior > 0:
            verdicts = self.discriminate(batch, fake)
            losses["prior"] = weights.prior * self.gan(verdicts.fake, True, discriminator=False)
        if weights.latent > 0:
            losses["latent"] = weights.latent * self._found_again(batch, fake, z)
        if weights.diversity > 0:
            other = self._code(batch, 2)
            losses["diversity"] = weights.diversity * diversity_loss(
                self.model.generator(batch.semantics, other), fake, other, z,
                bound=weights.diversity_bound)
        return fake

    def _found_again(self, batch: MicroBatch, fake: Tensor, z: Tensor) -> Tensor:
        """How well the encoder, frozen, finds ``z`` in ``fake``, by the classes it shows."""
        with frozen_parameters(self.model.encoder):
            mean, _ = self.encode(replace(batch, image=fake))
        if not self.coded_by_class:
            return latent_regression_loss(mean, z)
        count = self.preset.classes
        shown = batch.shown(count).repeat_interleave(
            mean.shape[1] // count, 1)[:, :, None, None].expand_as(mean)
        return batch.share * latent_regression_loss(mean[shown], z[shown])

    def repaint(self, batch: MicroBatch, fakes: Sequence[Tensor]) -> list[Tensor]:
        """What the discriminator learns from: ``fakes``, or the updated generator's pictures."""
        if self.reuse_fake:
            return [fake.detach() for fake in fakes]
        with torch.no_grad():  # codes of their own, as the published loops draw them anew
            painted = [self.paint(batch, {}, 3)]
            if self._draws:
                painted.append(self.model.generator(batch.semantics, self._code(batch, 4)))
        return painted

    def discriminator(self, batch: MicroBatch, fakes: Sequence[Tensor]) -> Losses:
        """The weighted terms to minimise."""
        weight, prior = self.weights.discriminator, self.weights.prior
        verdicts = self.discriminate(batch, fakes[0])
        losses = {"fake": weight * self.gan(verdicts.fake, False),
                  "real": weight * self.gan(verdicts.real, True)}
        if prior > 0 and self._draws:
            drawn = weight * self.gan(self.discriminate(batch, fakes[1]).fake, False)
            losses["fake"] = (losses["fake"] + prior * drawn) / (1 + prior)
        return losses

    def reconstruct(self, batch: MicroBatch) -> Tensor:
        """Pictures as the batch's own would be painted, without noise: for grids."""
        z = self.encode(batch)[0] if self.coded else None
        return self.model.generator(batch.semantics, z)

    def sample(self, batch: MicroBatch, seed: int) -> Tensor:
        """Pictures with drawn codes: for grids."""
        generator = torch.Generator().manual_seed(seed)
        z = self.model.generator.sample_latent(len(batch), generator)
        return self.model.generator(batch.semantics, z)


class CCFPSEObjective(Objective):
    """CC-FPSE: its discriminator takes picture and semantics apart."""

    def discriminate(self, batch: MicroBatch, fake: Tensor) -> DiscriminatorOutputs:
        fake_features, fakes, real_features, reals = discriminate_pairs(
            self.model.discriminator, batch.planes, fake, batch.image.to(fake.dtype))
        return DiscriminatorOutputs(fakes, reals,
                        lambda: pyramid_matching_loss(fake_features, real_features, 1.0))


class Pix2pixHDObjective(Objective):
    """pix2pixHD: instance features instead of codes; feature matching weighed by the layers."""

    @property
    def coded(self) -> bool:
        return False

    def features(self, batch: MicroBatch) -> Tensor | None:
        """Instance features of the batch's pictures, where the model reads some."""
        if not self.preset.has_encoder:
            return None
        return self.model.encoder(batch.image, batch.instances)

    def paint(self, batch: MicroBatch, losses: Losses, draw: int = 0) -> Tensor:
        return self.model.generator(batch.planes, self.features(batch))

    def discriminate(self, batch: MicroBatch, fake: Tensor) -> DiscriminatorOutputs:
        fakes, reals = discriminate(self.model.discriminator, batch.planes, fake,
                                    batch.image.to(fake.dtype))
        return DiscriminatorOutputs(fakes, reals, lambda: feature_matching_loss(
            fakes, reals, 1.0, weighting="pix2pixhd"))

    def reconstruct(self, batch: MicroBatch) -> Tensor:
        return self.paint(batch, {})

    def sample(self, batch: MicroBatch, seed: int) -> Tensor:
        return self.paint(batch, {})


OBJECTIVES: dict[type, type[Objective]] = {
    CCFPSEPreset: CCFPSEObjective, Pix2pixHDPreset: Pix2pixHDObjective,
}
"""Families whose objective differs from SPADE's."""


def objective(model: SynthesisModel, config: TrainConfig, parts: int = 1,
              perceptual: PerceptualLoss | None = None) -> Objective:
    """The objective of a model's family."""
    return OBJECTIVES.get(type(model.preset), Objective)(model, config, parts, perceptual)


class Step(nn.Module):
    """Losses of a side as a module over what they train, for DistributedDataParallel."""

    def __init__(self, objective: Objective, side: Literal["generator", "discriminator"],
                 trained: Iterable[nn.Module]) -> None:
        super().__init__()
        self._objective, self._side = objective, side
        self.trained = nn.ModuleList(trained)

    def forward(self, *inputs: Any) -> Any:
        return getattr(self._objective, self._side)(*inputs)


def generator_parts(model: SynthesisModel) -> Sequence[nn.Module]:
    """The networks that the generator's losses train."""
    return [m for name, m in model.named_children() if name in ("generator", "encoder")]
