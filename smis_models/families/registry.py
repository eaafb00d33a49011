"""Where the families enter their networks, models and recipes, each in its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from ..io.choices import unknown_name
from ..networks.discriminator import MultiscaleDiscriminator
from ..networks.preset import Preset

PARTS = ("generator", "encoder", "discriminator")

Maker = Callable[[Any], nn.Module]
Recipe = Mapping[str, Any]
"""Options of :class:`smis_models.training.TrainConfig` that are not its defaults, by group."""

M = TypeVar("M", bound=Maker)
P = TypeVar("P", bound=Preset)


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    description: str
    preset: Preset


MODELS: dict[str, Entry] = {}
RECIPES: dict[str, tuple[str, Recipe]] = {}
"""What `smis train NAME` starts from: the model that it trains, and how."""
_NETWORKS: dict[type[Preset], dict[str, Maker]] = {}


def patch_discriminator(preset: Preset) -> MultiscaleDiscriminator:
    """The multi-scale PatchGAN that judges a picture beside its semantics."""
    return MultiscaleDiscriminator(
        preset.semantic_channels + 3, preset.ndf, layers=preset.discriminator_layers,
        scales=preset.discriminator_scales,
    )


def network(part: str, preset: type[Preset]) -> Callable[[M], M]:
    """Decorate what makes ``part`` of a family's models from their options.

    Args:
        part: "generator", "encoder" or "discriminator"; without one of its own a family is judged
            by :func:`patch_discriminator`.
        preset: the family's class of options.
    """
    def enter(maker: M) -> M:
        _NETWORKS.setdefault(preset, {"discriminator": patch_discriminator})[part] = maker
        return maker

    return enter


def register_model(name: str, description: str, preset: P, recipe: Recipe) -> P:
    """Enter a model and its training recipe under ``name``; returns its published options."""
    if name in MODELS:
        raise ValueError(f"name: {name!r} is registered already")
    MODELS[name] = Entry(description, preset)
    RECIPES[name] = name, recipe
    return preset


def hinge_recipe(data: str, batch: int, epochs: int, decay: int, *, kl_devices: int | None = None,
                 matching: float = 10.0) -> Recipe:
    """The training of SPADE, GroupDNet and CC-FPSE: hinge loss, two rates (TTUR).

    Args:
        data: the data set.
        batch: images of a step.
        epochs, decay: with constant and with falling learning rates.
        kl_devices: the published number of devices, where there is an encoder: the published code
            sums the KL of each device's images and takes the devices' mean.
        matching: weight of feature matching.
    """
    return {
        "data": {"name": data, "batch": batch},
        "losses": {"kl": 0.05 / kl_devices if kl_devices else 0.0, "feature_matching": matching},
        "schedule": {"epochs": epochs, "decay_epochs": decay},
    }


ADAM_OF_PIX2PIX: Recipe = {"generator": 2e-4, "discriminator": 2e-4, "betas": (0.5, 0.999),
                           "reuse_fake": True}
"""The optimizer of pix2pixHD and BicycleGAN."""


def network_parts(preset: Preset) -> dict[str, Maker]:
    """What makes each network of a model of ``preset`` from the preset."""
    makers = _NETWORKS[type(preset)]
    return {part: makers[part] for part in PARTS if part != "encoder" or preset.has_encoder}


def entry(name: str) -> Entry:
    """The model of that name, or a ValueError that lists the known."""
    if name not in MODELS:
        raise ValueError(unknown_name("name", MODELS, name))
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
        >>> [info.name for info in list_models()][:2]
        ['groupdnet_deepfashion', 'groupdnet_cityscapes']
    """
    return [
        ModelInfo(name, model.description, {
            part: sum(p.numel() for p in published(name, part).parameters())
            for part in network_parts(model.preset)
        })
        for name, model in MODELS.items()
    ]
