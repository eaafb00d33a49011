"""Builders for the parity checker: every published network and op case that exists so far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import class_crops, instance_edges
from smis_models.discriminator import discriminate
from smis_models.labels import semantics
from smis_models.losses import feature_matching_loss, gan_loss, kl_loss
from smis_models.presets import ADE20K, CITYSCAPES, DEEPFASHION, GroupDNetPreset, with_options
from smis_models.registry import GROUPDNET_PARTS

_PRESETS = {"deepfashion": DEEPFASHION, "cityscapes": CITYSCAPES, "ade20k": ADE20K}
_PARTS = {"G": "generator", "E": "encoder", "D": "discriminator"}


def groupdnet_preset(options: dict[str, Any], part: str) -> GroupDNetPreset:
    """The preset that the published options mean."""
    preset = _PRESETS[options["dataset_mode"]]
    height = round(options["crop_size"] / options["aspect_ratio"])
    changes = {
        "classes": options["label_nc"] + options["contain_dontcare_label"],
        "dont_care": options["label_nc"] if options["contain_dontcare_label"] else None,
        "upsampling": options["num_upsampling_layers"],
        "instance_edge": not options["no_instance"],
        "ndf": options["ndf"],
        "discriminator_scales": options["num_D"],
        "discriminator_layers": options["n_layers_D"],
        "nef": options.get("ndf_E", preset.nef),
    }
    if part == "generator":
        changes["ngf"] = options["ngf"]
    return with_options(preset, {**changes, "image_size": (height, options["crop_size"])}, "spec")


def groupdnet_part(part: str, spec: dict[str, Any]) -> nn.Module:
    """The network of a spec, its memory not filled: the checker loads every entry."""
    with torch.device("meta"):
        module = GROUPDNET_PARTS[part](groupdnet_preset(spec["options"], part))
    return module.to_empty(device="cpu")


def _crops(one_hot: Tensor, image: Tensor, size: tuple[int, int] = (256, 256)) -> Tensor:
    return class_crops(image, one_hot, one_hot.shape[1], size=size, box="sums")


def _gan_cases() -> dict[str, Callable[..., Tensor]]:
    cases: dict[str, Callable[..., Tensor]] = {}
    for mode in ("hinge", "ls", "original", "w"):
        loss = partial(gan_loss, mode=mode)
        cases[f"gan_{mode}_D_real"] = partial(loss, target_is_real=True)
        cases[f"gan_{mode}_D_fake"] = partial(loss, target_is_real=False)
        cases[f"gan_{mode}_G"] = partial(loss, target_is_real=True, discriminator=False)
    cases["gan_hinge_D_real_flat_list"] = cases["gan_hinge_D_real"]
    cases["gan_hinge_D_fake_flat_list"] = cases["gan_hinge_D_fake"]
    return cases


def ops_smis(spec: None) -> dict[str, Callable[..., Any]]:
    """The op and loss cases of GroupDNet."""
    return {
        **_gan_cases(),
        "get_edges": instance_edges,
        "preprocess_cityscapes": lambda labels, ids: semantics(labels, CITYSCAPES, ids),
        "feature_matching_lambda10": feature_matching_loss,
        "kld": kl_loss,
        "discriminate_identityD": partial(discriminate, lambda x: [[x, 2 * x], [3 * x]]),
        "trans_img_deepfashion": _crops,
        "trans_img_ade20k_151": _crops,
        "trans_img_cityscapes": lambda planes, image: _crops(planes[:, :-1], image, (256, 512)),
        "trans_img_zero_border": _crops,
        "trans_img_64_patched": partial(_crops, size=(64, 64)),
    }


BUILDERS: dict[str, Callable[..., Any]] = {
    f"smis_{dataset}_{letter}{suffix}": partial(groupdnet_part, part)
    for dataset in _PRESETS
    for letter, part in _PARTS.items()
    for suffix in ("", "_small")
}
BUILDERS["smis_deepfashion_G_small256"] = partial(groupdnet_part, "generator")
BUILDERS["ops_smis"] = ops_smis
