"""Builders for the parity checker: every published network and op case that exists so far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import class_crops, instance_avg_pool2d, instance_edges, spatially_varying_conv2d
from smis_models.families import (
    ADE20K,
    CCFPSE_ADE20K,
    CCFPSE_CITYSCAPES,
    CCFPSE_COCO,
    CITYSCAPES,
    DEEPFASHION,
    PIX2PIXHD_CITYSCAPES,
    SPADE_ADE20K,
    SPADE_CITYSCAPES,
    SPADE_COCO,
    SPADE_COCO_VAE,
    GroupDNetPreset,
    Preset,
    network_parts,
    with_options,
)
from smis_models.families.ccfpse import discriminate_pairs, pyramid_matching_loss
from smis_models.networks.discriminator import discriminate
from smis_models.networks.losses import feature_matching_loss, gan_loss, kl_loss
from smis_models.networks.semantics import semantics
from smis_models.training import recipe

_PRESETS: dict[str, Preset] = {
    "smis_deepfashion": DEEPFASHION, "smis_cityscapes": CITYSCAPES, "smis_ade20k": ADE20K,
    "spade_coco": SPADE_COCO, "spade_coco_vae": SPADE_COCO_VAE, "spade_ade20k": SPADE_ADE20K,
    "spade_cityscapes": SPADE_CITYSCAPES, "ccfpse_coco": CCFPSE_COCO,
    "ccfpse_ade20k": CCFPSE_ADE20K, "ccfpse_cityscapes": CCFPSE_CITYSCAPES,
}


def preset_of(published: Preset, options: dict[str, Any], part: str) -> Preset:
    """``published`` with the options of a spec, whose names are those of the papers' code."""
    height = round(options["crop_size"] / options["aspect_ratio"])
    changes: dict[str, Any] = {
        "classes": options["label_nc"] + options["contain_dontcare_label"],
        "dont_care": options["label_nc"] if options["contain_dontcare_label"] else None,
        "upsampling": options.get("num_upsampling_layers", published.upsampling),
        "instance_edge": not options["no_instance"],
        "ndf": options["ndf"],
        "discriminator_scales": options.get("num_D", published.discriminator_scales),
        "discriminator_layers": options.get("n_layers_D", published.discriminator_layers),
        "image_size": (height, options["crop_size"]),
    }
    if isinstance(published, GroupDNetPreset):
        changes["nef"] = options.get("ndf_E", published.nef)
        changes["encoder_depth"] = 6 if options["crop_size"] >= 256 else 5
    else:
        changes |= {"vae": options["use_vae"], "latent_channels": options["z_dim"]}
    if part == "generator" or not isinstance(published, GroupDNetPreset):
        changes["ngf"] = options["ngf"]
    return with_options(published, changes, "spec")


def network(published: Preset, part: str, spec: dict[str, Any]) -> nn.Module:
    """The network of a spec, its memory not filled: the checker loads every entry."""
    preset = preset_of(published, spec["options"], part)
    with torch.device("meta"):
        module = network_parts(preset)[part](preset)
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


def ops_spade(spec: None) -> dict[str, Callable[..., Any]]:
    """The op and loss cases of SPADE, which are GroupDNet's too."""
    return {
        **_gan_cases(),
        "get_edges": instance_edges,
        "preprocess_cityscapes": lambda labels, ids: semantics(labels, CITYSCAPES, ids),
        "feature_matching_lambda10": feature_matching_loss,
        "kld": kl_loss,
        "discriminate_identityD": partial(discriminate, lambda x: [[x, 2 * x], [3 * x]]),
    }


def ops_ccfpse(spec: None) -> dict[str, Callable[..., Any]]:
    """The op and loss cases of CC-FPSE."""
    hinge = _gan_cases()
    return {
        **{f"{name}_flat_list": hinge[name]
           for name in ("gan_hinge_D_real", "gan_hinge_D_fake", "gan_hinge_G")},
        "get_edges": instance_edges,
        "feature_matching_lambda20": partial(pyramid_matching_loss, weight=20.0),
        "kld": kl_loss,
        "discriminate_identityD": partial(
            discriminate_pairs, lambda x, semantics: ([x, 2 * x], [3 * x, semantics])),
        "depthconv_stride1": spatially_varying_conv2d,
    }


def ops_smis(spec: None) -> dict[str, Callable[..., Any]]:
    """The op and loss cases of GroupDNet."""
    return {
        **ops_spade(spec),
        "trans_img_deepfashion": _crops,
        "trans_img_ade20k_151": _crops,
        "trans_img_cityscapes": lambda planes, image: _crops(planes[:, :-1], image, (256, 512)),
        "trans_img_zero_border": _crops,
        "trans_img_64_patched": partial(_crops, size=(64, 64)),
    }


_PARTS = {"G": "generator", "E": "encoder", "D": "discriminator"}
# What each published network is called, and the preset and part it comes from.
_NETWORKS = {
    **{f"smis_{dataset}_{letter}": (f"smis_{dataset}", part)
       for dataset in ("deepfashion", "cityscapes", "ade20k") for letter, part in _PARTS.items()},
    **{f"{name}_G": (name, "generator") for name in _PRESETS if name.startswith("spade")},
    "spade_D": ("spade_cityscapes", "discriminator"),
    "spade_vae_E": ("spade_coco_vae", "encoder"),
    **{f"ccfpse_{dataset}_{letter}": (f"ccfpse_{dataset}", part)
       for dataset in ("coco", "ade20k", "cityscapes")
       for letter, part in (("G", "generator"), ("D", "discriminator"))},
    "ccfpse_E": ("ccfpse_coco", "encoder"),
}
BUILDERS: dict[str, Callable[..., Any]] = {
    name + suffix: partial(network, _PRESETS[published], part)
    for name, (published, part) in _NETWORKS.items() for suffix in ("", "_small")
}
BUILDERS["smis_deepfashion_G_small256"] = partial(network, DEEPFASHION, "generator")
BUILDERS["ccfpse_coco_novae_G_small"] = partial(network, CCFPSE_COCO, "generator")
BUILDERS["ops_ccfpse"] = ops_ccfpse
BUILDERS["ops_smis"] = ops_smis
BUILDERS["ops_spade"] = ops_spade


def pix2pixhd(part: str, spec: dict[str, Any]) -> nn.Module:
    """A network of pix2pixHD from the options of its spec."""
    options = spec["options"]
    changes = {
        "classes": options["label_nc"], "instance_edge": not options["no_instance"],
        "ngf": options["ngf"], "ndf": options["ndf"], "nef": options["nef"],
        "enhancers": options["n_local_enhancers"] if options["netG"] == "local" else 0,
        "downsamplings": options["n_downsample_global"], "blocks": options["n_blocks_global"],
        "local_blocks": options["n_blocks_local"], "features": options["instance_feat"],
        "feature_channels": options["feat_num"],
        "encoder_downsamplings": options["n_downsample_E"],
        "discriminator_scales": options["num_D"], "discriminator_layers": options["n_layers_D"],
        "image_size": tuple(options.get("image_size", (512, 1024))),
    }
    preset = with_options(PIX2PIXHD_CITYSCAPES, changes, "spec")
    with torch.device("meta"):
        module = network_parts(preset)[part](preset)
    return module.to_empty(device="cpu")


def _pooled_gradient(x: Tensor, ids: Tensor, cotangent: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((instance_avg_pool2d(x, ids) * cotangent).sum(), x)
    return grad


def pix2pixhd_losses(fake: Any, real: Any, fake_detached: Any = None) -> dict[str, Tensor]:
    """A step's terms by the published recipe; the discriminator's own without their weight."""
    weights = recipe("pix2pixhd_cityscapes").losses
    gan = partial(gan_loss, mode=weights.gan, reduction=weights.scales)
    return {
        "gan": gan(fake, True, discriminator=False),
        "feature_matching": feature_matching_loss(fake, real, weights.feature_matching,
                                                  weighting="pix2pixhd"),
        "real": gan(real, True),
        "fake": gan(fake if fake_detached is None else fake_detached, False),
    }


def ops_pix2pixhd(spec: None) -> dict[str, Callable[..., Any]]:
    """The op and loss cases of pix2pixHD."""
    lsgan = partial(gan_loss, mode="ls", reduction="sum")
    # The published code takes the logarithm of a sigmoid; here the loss reads the logits.
    bce = partial(gan_loss, mode="original", reduction="sum")
    return {
        "get_edges": instance_edges,
        "gan_lsgan_D_real": partial(lsgan, target_is_real=True),
        "gan_lsgan_D_fake": partial(lsgan, target_is_real=False),
        "gan_lsgan_G": partial(lsgan, target_is_real=True, discriminator=False),
        # A flat list is one scale: features, and last the prediction.
        "gan_lsgan_single": lambda scale: lsgan([scale], target_is_real=True),
        "gan_bce_D_real_sigmoid": partial(bce, target_is_real=True),
        "gan_bce_D_fake_sigmoid": partial(bce, target_is_real=False),
        "losses_numD2": lambda *pairs: list(pix2pixhd_losses(*pairs).values()),
        "losses_numD3": lambda *pairs: list(pix2pixhd_losses(*pairs).values()),
        **{f"instance_avg_pool_b{n}": instance_avg_pool2d for n in (1, 2, 3)},
        "instance_avg_pool_b2_grad": _pooled_gradient,
    }


_PIX2PIXHD = {"global_G": "generator", "local_G": "generator", "E": "encoder",
              "D_num2": "discriminator", "D_num3": "discriminator"}
BUILDERS |= {
    f"pix2pixhd_{name}{suffix}": partial(pix2pixhd, part)
    for name, part in _PIX2PIXHD.items() for suffix in ("", "_small")
}
BUILDERS["ops_pix2pixhd"] = ops_pix2pixhd
