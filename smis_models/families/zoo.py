"""What the zoo holds: the models' names, presets, and the networks that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from ..networks.discriminator import MultiscaleDiscriminator
from ..networks.encoder import GroupDNetEncoder
from .bicyclegan import ResNetEncoder, UNetGenerator
from .ccfpse import CCFPSEGenerator, FPSEDiscriminator
from .groupdnet import GroupDNetGenerator
from .pix2pixhd import FeatureEncoder, Pix2pixHDDiscriminator, pix2pixhd_generator
from .presets import (
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
    SPADE_CITYSCAPES,
    SPADE_COCO,
    SPADE_COCO_VAE,
    VSPADE,
    CCFPSEPreset,
    GroupDNetPreset,
    Pix2pixHDPreset,
    Preset,
    SPADEPreset,
    UNetPreset,
)
from .spade import SPADEEncoder, SPADEGenerator

PARTS = ("generator", "encoder", "discriminator")


def _discriminator(preset: Preset) -> MultiscaleDiscriminator:
    return MultiscaleDiscriminator(
        preset.semantic_channels + 3, preset.ndf, layers=preset.discriminator_layers,
        scales=preset.discriminator_scales,
    )


_FAMILIES: dict[type[Preset], dict[str, Callable[[Any], nn.Module]]] = {
    GroupDNetPreset: {
        "generator": GroupDNetGenerator, "encoder": GroupDNetEncoder,
        "discriminator": _discriminator,
    },
    SPADEPreset: {
        "generator": SPADEGenerator, "encoder": SPADEEncoder, "discriminator": _discriminator,
    },
    CCFPSEPreset: {
        "generator": CCFPSEGenerator, "encoder": SPADEEncoder, "discriminator": FPSEDiscriminator,
    },
    Pix2pixHDPreset: {
        "generator": pix2pixhd_generator, "encoder": FeatureEncoder,
        "discriminator": Pix2pixHDDiscriminator,
    },
    # One discriminator judges pictures of encoded and of drawn codes (BicycleGAN's use_same_D),
    # and like every other system's it sees the semantics.
    UNetPreset: {
        "generator": UNetGenerator, "encoder": ResNetEncoder, "discriminator": _discriminator,
    },
}


def network_parts(preset: Preset) -> dict[str, Callable[[Any], nn.Module]]:
    """What makes each network of a model of ``preset`` from the preset."""
    return {
        part: make for part, make in _FAMILIES[type(preset)].items()
        if part != "encoder" or preset.has_encoder
    }


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    description: str
    preset: Preset


MODELS = {
    "groupdnet_deepfashion": Entry(
        "GroupDNet for DeepFashion: 8 classes, 256x256", DEEPFASHION
    ),
    "groupdnet_cityscapes": Entry(
        "GroupDNet for Cityscapes: 35 classes and instance edges, 256x512", CITYSCAPES
    ),
    "groupdnet_ade20k": Entry("GroupDNet for ADE20K: 151 classes, 256x256", ADE20K),
    "groupdnet_scenes": Entry(
        "GroupDNet for the package's landscapes, small: 8 classes, 128x128; its weights ship",
        SCENES,
    ),
    "spade_coco": Entry("SPADE for COCO-Stuff: 183 classes and instance edges, 256x256",
                        SPADE_COCO),
    "spade_ade20k": Entry("SPADE for ADE20K: 151 classes, 256x256", SPADE_ADE20K),
    "spade_cityscapes": Entry(
        "SPADE for Cityscapes: 35 classes and instance edges, 256x512", SPADE_CITYSCAPES
    ),
    "spade_coco_vae": Entry(
        "SPADE for COCO-Stuff with a latent code and its image encoder, 256x256", SPADE_COCO_VAE
    ),
    "ccfpse_coco": Entry(
        "CC-FPSE for COCO-Stuff: 183 classes and instance edges, 256x256", CCFPSE_COCO
    ),
    "ccfpse_ade20k": Entry("CC-FPSE for ADE20K: 151 classes, 256x256", CCFPSE_ADE20K),
    "ccfpse_cityscapes": Entry(
        "CC-FPSE for Cityscapes: 35 classes and instance edges, 256x512", CCFPSE_CITYSCAPES
    ),
    "pix2pixhd_cityscapes": Entry(
        "pix2pixHD for Cityscapes, global generator: 35 classes and instance edges, 512x1024",
        PIX2PIXHD_CITYSCAPES,
    ),
    "pix2pixhd_cityscapes_features": Entry(
        "pix2pixHD for Cityscapes, global generator with instance features, 512x1024",
        PIX2PIXHD_CITYSCAPES_FEATURES,
    ),
    "pix2pixhd_cityscapes_1024": Entry(
        "pix2pixHD for Cityscapes, local enhancer around the global generator, 1024x2048",
        PIX2PIXHD_CITYSCAPES_1024,
    ),
    "mulnet_deepfashion": Entry(
        "MulNet: a network for each of DeepFashion's classes, side by side, 256x256", MULNET
    ),
    "groupnet_deepfashion": Entry(
        "GroupNet for DeepFashion: one group per class in every layer, 256x256", GROUPNET
    ),
    "groupenc_deepfashion": Entry(
        "GroupEnc for DeepFashion: GroupDNet's encoder, a decoder without groups, 256x256",
        GROUPENC,
    ),
    "groupdec_deepfashion": Entry(
        "GroupDec for DeepFashion: an encoder without groups, GroupDNet's decoder, 256x256",
        GROUPDEC,
    ),
    "vspade_deepfashion": Entry(
        "VSPADE for DeepFashion: SPADE with a latent code and its image encoder, 256x256", VSPADE
    ),
    "bicyclegan_deepfashion": Entry(
        "BicycleGAN for DeepFashion: a U-Net with a latent code and its encoder, 256x256",
        BICYCLEGAN,
    ),
    "dscgan_deepfashion": Entry(
        "DSCGAN for DeepFashion: BicycleGAN's networks, trained for diversity, 256x256", DSCGAN
    ),
}


def entry(name: str) -> Entry:
    """The model of that name, or a ValueError that lists the known."""
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name]


@cache
def published(name: str, part: str) -> nn.Module:
    """A part with published options and no memory behind it."""
    preset = entry(name).preset
    with torch.device("meta"):
        return network_parts(preset)[part](preset)


@dataclass(frozen=True)
class ModelInfo:
    """One row of :func:`list_models`: name, description, parameters of each part."""

    name: str
    description: str
    parameters: dict[str, int]


def list_models() -> list[ModelInfo]:
    """The models that :func:`create_model` knows, with their published sizes.

    Example:
        >>> [info.name for info in list_models()]
        ['groupdnet_deepfashion', 'groupdnet_cityscapes', 'groupdnet_ade20k', 'spade_coco', ...]
    """
    return [
        ModelInfo(name, model.description, {
            part: sum(p.numel() for p in published(name, part).parameters())
            for part in network_parts(model.preset)
        })
        for name, model in MODELS.items()
    ]
