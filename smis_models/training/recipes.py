"""The published hyper-parameters by name, and those of the small models on generated scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..families import (
    ADE20K,
    BICYCLEGAN,
    CCFPSE_ADE20K,
    CCFPSE_CITYSCAPES,
    CCFPSE_COCO,
    CITYSCAPES,
    DEEPFASHION,
    DSCGAN,
    GROUPDEC,
    GROUPENC,
    GROUPNET,
    MULNET,
    PIX2PIXHD_CITYSCAPES,
    PIX2PIXHD_CITYSCAPES_1024,
    PIX2PIXHD_CITYSCAPES_FEATURES,
    SCENES,
    SPADE_ADE20K,
    SPADE_CELEBAMASK,
    SPADE_CITYSCAPES,
    SPADE_COCO,
    SPADE_COCO_VAE,
    VSPADE,
    Pix2pixHDPreset,
    Preset,
)
from .config import DataConfig, LogConfig, LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig


def _kl(devices: int) -> float:
    """The published code sums the KL of each device's images and means over the devices."""
    return 0.05 / devices


def _spade(model: str, network: Preset, data: str, *, batch: int, epochs: int, decay: int,
           kl: float = 0.0, matching: float = 10.0) -> TrainConfig:
    """SPADE, GroupDNet and CC-FPSE: hinge, TTUR."""
    return TrainConfig(
        model=model, network=network, data=DataConfig(name=data, batch=batch),
        losses=LossConfig(kl=kl, feature_matching=matching),
        schedule=ScheduleConfig(epochs=epochs, decay_epochs=decay),
    )


def _faces() -> TrainConfig:
    """SPADE's options on CelebAMask-HQ, for which its paper has none.

    Nothing is mirrored: its classes tell left from right.
    """
    recipe = _spade("spade_celebamask", SPADE_CELEBAMASK, "folder", batch=32, epochs=50, decay=0)
    return replace(recipe, data=replace(recipe.data, mode="fixed", flip=False))


def _pix2pixhd(model: str, network: Pix2pixHDPreset, *, epochs: int = 100, decay: int = 100,
               freeze: int = 0) -> TrainConfig:
    return TrainConfig(
        model=model, network=network, data=DataConfig(name="cityscapes", batch=1),
        losses=LossConfig(gan="ls", scales="sum", discriminator=0.5, kl=0.0),
        optimizer=OptimizerConfig(generator=2e-4, discriminator=2e-4, betas=(0.5, 0.999),
                                  reuse_fake=True),
        schedule=ScheduleConfig(epochs=epochs, decay_epochs=decay, freeze_global_epochs=freeze),
    )


def _deepfashion(model: str, network: Preset) -> TrainConfig:
    """GroupDNet's own training, which its paper gives every system but the U-Nets."""
    return _spade(model, network, "deepfashion", batch=8, epochs=60, decay=40, kl=_kl(4))


def _bicyclegan(model: str, network: Preset, *, latent: float = 0.5,
                diversity: float = 0.0) -> TrainConfig:
    """The U-Nets: least squares on encoded and drawn codes alike, L1, no perceptual term.

    The published loop encodes half of its two pictures, and weighs the KL of that half with 0.01;
    here both are encoded. Its two discriminators, for encoded and for drawn codes, are one.
    """
    rates = OptimizerConfig(generator=2e-4, discriminator=2e-4, betas=(0.5, 0.999), reuse_fake=True)
    return TrainConfig(
        model=model, network=network, data=DataConfig(name="deepfashion", batch=2),
        losses=LossConfig(gan="ls", scales="sum", feature_matching=0.0, perceptual=0.0, pixel=10.0,
                          kl=0.01 / 2, prior=1.0, latent=latent, diversity=diversity),
        optimizer=rates, schedule=ScheduleConfig(epochs=100, decay_epochs=100, falls="before"),
    )


def _dscgan(model: str, network: Preset) -> TrainConfig:
    """BicycleGAN's training with the diversity term of DSCGAN in place of the code's regression.

    This deviates from the public DSGAN, whose codes are all drawn: no encoder and no KL, L1 between
    the drawn picture and the photograph, batches of 8, the discriminator updated before the
    generator, rates that fall with every step. GroupDNet's comparison, which this serves, encodes
    the codes of its pictures; its code for DSCGAN was not published.
    """
    return _bicyclegan(model, network, latent=0.0, diversity=8.0)


def _scenes_codes() -> TrainConfig:
    """The first half of the shipped model: an autoencoder, for codes that noise would keep unused.

    With noise from the start three classes of eight still had no code after 1400 steps; without
    it, without a KL term and with an L1 that counts classes alike, all eight have after 700.
    """
    return TrainConfig(
        model="groupdnet_scenes", network=SCENES,
        data=DataConfig(batch=16, workers=0, count=6400),
        losses=LossConfig(adversarial=0.0, feature_matching=0.0, perceptual=0.0, kl=0.0,
                          code_noise=0.0, pixel=10.0, pixel_mean="classes"),
        optimizer=OptimizerConfig(generator=2e-3, betas=(0.5, 0.99), ema=0.99, reuse_fake=True),
        schedule=ScheduleConfig(epochs=3), log=_SCENES_LOG, init_gain=1.0,
    )


def _scenes() -> TrainConfig:
    """The second half: codes with their noise, and a discriminator that judges pictures of encoded
    and of drawn codes. The shipped weights went on from the first half's, ``--init FILE --whiten
    true``.
    """
    return TrainConfig(
        model="groupdnet_scenes", network=SCENES,
        data=DataConfig(batch=16, workers=0, count=3200),
        losses=LossConfig(adversarial=0.5, feature_matching=2.0, perceptual=0.0, kl=1e-3,
                          pixel=10.0, pixel_mean="classes", prior=0.5),
        optimizer=OptimizerConfig(generator=5e-4, discriminator=5e-4, ema=0.99, reuse_fake=True),
        schedule=ScheduleConfig(epochs=3), log=_SCENES_LOG, init_gain=1.0,
    )


_SCENES_LOG = LogConfig(every=20, checkpoint_every=100, grid_every=100, samples=5,
                        tensorboard=False)

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "groupdnet_deepfashion": lambda: _deepfashion("groupdnet_deepfashion", DEEPFASHION),
    "groupdnet_cityscapes": lambda: _spade(
        "groupdnet_cityscapes", CITYSCAPES, "cityscapes", batch=4, epochs=100, decay=100,
        kl=_kl(4)),
    "groupdnet_ade20k": lambda: _spade(
        "groupdnet_ade20k", ADE20K, "ade20k", batch=4, epochs=100, decay=100, kl=_kl(4)),
    "groupdnet_scenes_codes": _scenes_codes,
    "groupdnet_scenes": _scenes,
    "spade_coco": lambda: _spade(
        "spade_coco", SPADE_COCO, "coco_stuff", batch=32, epochs=100, decay=0),
    "spade_coco_vae": lambda: _spade(
        "spade_coco_vae", SPADE_COCO_VAE, "coco_stuff", batch=32, epochs=100, decay=0, kl=_kl(8)),
    "spade_ade20k": lambda: _spade(
        "spade_ade20k", SPADE_ADE20K, "ade20k", batch=32, epochs=100, decay=100),
    "spade_cityscapes": lambda: _spade(
        "spade_cityscapes", SPADE_CITYSCAPES, "cityscapes", batch=32, epochs=100, decay=100),
    "spade_celebamask": _faces,
    "ccfpse_coco": lambda: _spade(
        "ccfpse_coco", CCFPSE_COCO, "coco_stuff", batch=16, epochs=100, decay=100, kl=_kl(16),
        matching=20.0),
    "ccfpse_ade20k": lambda: _spade(
        "ccfpse_ade20k", CCFPSE_ADE20K, "ade20k", batch=16, epochs=100, decay=100, kl=_kl(16),
        matching=20.0),
    "ccfpse_cityscapes": lambda: _spade(
        "ccfpse_cityscapes", CCFPSE_CITYSCAPES, "cityscapes", batch=16, epochs=100, decay=100,
        kl=_kl(16), matching=20.0),
    "pix2pixhd_cityscapes": lambda: _pix2pixhd("pix2pixhd_cityscapes", PIX2PIXHD_CITYSCAPES),
    "pix2pixhd_cityscapes_features": lambda: _pix2pixhd(
        "pix2pixhd_cityscapes_features", PIX2PIXHD_CITYSCAPES_FEATURES),
    "pix2pixhd_cityscapes_1024": lambda: _pix2pixhd(
        "pix2pixhd_cityscapes_1024", PIX2PIXHD_CITYSCAPES_1024, epochs=50, decay=50, freeze=10),
    "vspade_deepfashion": lambda: _deepfashion("vspade_deepfashion", VSPADE),
    "groupenc_deepfashion": lambda: _deepfashion("groupenc_deepfashion", GROUPENC),
    "groupdec_deepfashion": lambda: _deepfashion("groupdec_deepfashion", GROUPDEC),
    "groupnet_deepfashion": lambda: _deepfashion("groupnet_deepfashion", GROUPNET),
    "mulnet_deepfashion": lambda: _deepfashion("mulnet_deepfashion", MULNET),
    "bicyclegan_deepfashion": lambda: _bicyclegan(
        "bicyclegan_deepfashion", BICYCLEGAN),
    "dscgan_deepfashion": lambda: _dscgan("dscgan_deepfashion", DSCGAN),
}
"""Name -> its configuration: what `smis train NAME` starts from."""
