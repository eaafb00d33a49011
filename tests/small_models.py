"""Every model of the zoo, as small as its options allow, and inputs for it."""

from __future__ import annotations

from typing import Any

from smis_models import create_model
from smis_models.families import MODELS, Pix2pixHDPreset
from smis_models.families.groupdnet import GroupDNetPreset

NAMES = tuple(MODELS)
SMALL_TRAINING: dict[str, Any] = {
    "recipe": "groupdnet_deepfashion",
    "network": {"ngf": 2, "nef": 8, "ndf": 4, "image_size": [64, 64], "upsampling": "normal"},
    "data": {"name": "scenes", "batch": 2, "workers": 0, "count": 8},
}
"""Options of a GroupDNet that trains on generated scenes in seconds, 4 steps an epoch."""


def small_options(name: str) -> dict[str, Any]:
    """Options of a small model of that name: few channels, 64x64, its structure kept."""
    preset = MODELS[name].preset
    if name == "groupdnet_scenes":  # whose upsampling fixes 128x128
        return {"ngf": 8, "nef": 8, "ndf": 4}
    options: dict[str, Any] = {"image_size": (64, 64), "ndf": 4}
    if isinstance(preset, GroupDNetPreset):
        options |= {"ngf": 8, "nef": 16, "upsampling": "normal"}
        if name == "groupdnet_ade20k":
            options |= {"classes": 13, "nef": 26}
        if name == "groupdnet_cityscapes":
            options |= {"classes": 5, "ngf": 20, "nef": 20, "groups": (5, 5, 5, 2, 2, 1)}
    else:
        options |= {"ngf": 4, "classes": 6}
        options |= {k: v for k, v in (("hidden", 8), ("nef", 4)) if hasattr(preset, k)}
    if isinstance(preset, Pix2pixHDPreset):
        options["blocks"] = 1
    if preset.dont_care is not None:
        options["dont_care"] = options["classes"] - 1
    return options


def small_model(name: str, **options: Any) -> Any:
    """That model with lively random weights, in eval mode."""
    return create_model(name, init_gain=1.0, **{**small_options(name), **options}).eval()
