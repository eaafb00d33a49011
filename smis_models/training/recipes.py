"""The published hyper-parameters by name, and those of the small models on generated scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..presets import (
    ADE20K,
    CCFPSE_ADE20K,
    CCFPSE_CITYSCAPES,
    CCFPSE_COCO,
    CITYSCAPES,
    DEEPFASHION,
    PIX2PIXHD_CITYSCAPES,
    PIX2PIXHD_CITYSCAPES_1024,
    PIX2PIXHD_CITYSCAPES_FEATURES,
    SPADE_ADE20K,
    SPADE_CITYSCAPES,
    SPADE_COCO,
    SPADE_COCO_VAE,
    Pix2pixHDPreset,
    Preset,
)
from .config import (
    DataConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


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


def _pix2pixhd(model: str, network: Pix2pixHDPreset, *, epochs: int = 100, decay: int = 100,
               freeze: int = 0) -> TrainConfig:
    return TrainConfig(
        model=model, network=network, data=DataConfig(name="cityscapes", batch=1),
        losses=LossConfig(gan="ls", scales="sum", discriminator=0.5, kl=0.0),
        optimizer=OptimizerConfig(generator=2e-4, discriminator=2e-4, betas=(0.5, 0.999),
                                  reuse_fake=True),
        schedule=ScheduleConfig(epochs=epochs, decay_epochs=decay, freeze_global_epochs=freeze),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "groupdnet_deepfashion": lambda: _spade(
        "groupdnet_deepfashion", DEEPFASHION, "deepfashion", batch=8, epochs=60, decay=40,
        kl=_kl(4)),
    "groupdnet_cityscapes": lambda: _spade(
        "groupdnet_cityscapes", CITYSCAPES, "cityscapes", batch=4, epochs=100, decay=100,
        kl=_kl(4)),
    "groupdnet_ade20k": lambda: _spade(
        "groupdnet_ade20k", ADE20K, "ade20k", batch=4, epochs=100, decay=100, kl=_kl(4)),
    "spade_coco": lambda: _spade(
        "spade_coco", SPADE_COCO, "coco_stuff", batch=32, epochs=100, decay=0),
    "spade_coco_vae": lambda: _spade(
        "spade_coco_vae", SPADE_COCO_VAE, "coco_stuff", batch=32, epochs=100, decay=0, kl=_kl(8)),
    "spade_ade20k": lambda: _spade(
        "spade_ade20k", SPADE_ADE20K, "ade20k", batch=32, epochs=100, decay=100),
    "spade_cityscapes": lambda: _spade(
        "spade_cityscapes", SPADE_CITYSCAPES, "cityscapes", batch=32, epochs=100, decay=100),
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
}
"""Name -> its configuration: what `smis train NAME` starts from."""
