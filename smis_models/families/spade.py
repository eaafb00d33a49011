"""SPADE's generator, and the image encoder that turns it into a VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from smis_kernels import SPADE, LabelLayout

from ..networks.blocks import SPADEResBlock, check_maps, conv, fast_format
from ..networks.encoder import CodeEncoder, StridedEncoder
from ..networks.generator import WIDTHS, CodeGenerator
from ..networks.preset import CodePreset
from .registry import hinge_recipe, network, register_model


@dataclass(frozen=True, kw_only=True)
class SPADEPreset(CodePreset):
    """Options of one SPADE (Park et al., "Semantic Image Synthesis with
    Spatially-Adaptive Normalization", CVPR 2019), as :class:`CodePreset` says.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6, "most": 7}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.upsampling == "most":  # whose last block has ngf / 2 channels
            self._check_positive("ngf", 2)


SPADE_COCO = register_model(
    "spade_coco", "SPADE for COCO-Stuff: 183 classes and instance edges, 256x256",
    SPADEPreset(
        classes=183, image_size=(256, 256), ngf=64, instance_edge=True, dont_care=182,
    ),
    hinge_recipe("coco_stuff", batch=32, epochs=100, decay=0),
)
SPADE_COCO_VAE = register_model(
    "spade_coco_vae", "SPADE for COCO-Stuff with a latent code and its image encoder, 256x256",
    replace(SPADE_COCO, vae=True),
    hinge_recipe("coco_stuff", batch=32, epochs=100, decay=0, kl_devices=8),
)
SPADE_ADE20K = register_model(
    "spade_ade20k", "SPADE for ADE20K: 151 classes, 256x256",
    SPADEPreset(
        classes=151, image_size=(256, 256), ngf=64, dont_care=150, unlabelled=0,
    ),
    hinge_recipe("ade20k", batch=32, epochs=100, decay=100),
)
SPADE_CITYSCAPES = register_model(
    "spade_cityscapes", "SPADE for Cityscapes: 35 classes and instance edges, 256x512",
    SPADEPreset(
        classes=35, image_size=(256, 512), ngf=64, instance_edge=True, upsampling="more",
    ),
    hinge_recipe("cityscapes", batch=32, epochs=100, decay=100),
)
_FACES = hinge_recipe("folder", batch=32, epochs=50, decay=0)  # SPADE's paper has none for them
SPADE_CELEBAMASK = register_model(
    "spade_celebamask", "SPADE for CelebAMask-HQ: 19 classes, 256x256",
    SPADEPreset(classes=19, image_size=(256, 256), ngf=64),
    # Nothing is mirrored: the classes tell left from right.
    {**_FACES, "data": {**_FACES["data"], "mode": "fixed", "flip": False}},
)
# VSPADE, of GroupDNet's table: SPADE with its VAE, the schedule of one group everywhere. So read it
# has 106,808,707 parameters, the table's 106.8 M. Its training is GroupDNet's.
VSPADE = register_model(
    "vspade_deepfashion",
    "VSPADE for DeepFashion: SPADE with a latent code and its image encoder, 256x256",
    SPADEPreset(classes=8, image_size=(256, 256), ngf=64, upsampling="more", vae=True),
    hinge_recipe("deepfashion", batch=8, epochs=60, decay=40, kl_devices=4),
)


_ENCODED = 256  # the encoder reads images of this height and width


@network("generator", SPADEPreset)
class SPADEGenerator(CodeGenerator):
    """SPADE's generator: a label map, and with ``vae`` a latent code, to an image.

    ``fc`` makes the first features: a 3x3 conv of the semantics resized by nearest, or with
    ``vae`` a linear layer of the code. Then residual blocks with nearest x2 upsampling between
    them -> LeakyReLU -> ``conv_img`` -> tanh.

    Args:
        preset: classes, widths, image size, upsampling ("normal" five times, "more" six, "most"
            seven with one more block), ``vae``.

    Shapes: semantics (N, classes [+ edge], any, any) or its layout; z (N, latent_channels) with
        ``vae``, else None -> image (N, 3, *image_size) in [-1, 1].

    Raises:
        ValueError: semantics or z of another rank, channel count or batch size; a missing z, or
            one that the generator has no use for.

    Paper: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019.

    Example:
        >>> import torch
        >>> from smis_models import create_model
        >>> generator = create_model("spade_coco", part="generator", ngf=8, image_size=(64, 64))
        >>> image = generator(torch.rand(1, 184, 64, 64))
    """

    preset: SPADEPreset

    def __init__(self, preset: SPADEPreset) -> None:
        super().__init__(preset)
        self._widths = {name: factor * preset.ngf for name, factor in WIDTHS.items()}
        if preset.upsampling == "most":
            self._widths["up_4"] = preset.ngf // 2
        channels = self._widths["head_0"]
        for name, out in self._widths.items():
            self.add_module(name, SPADEResBlock(channels, out, self._norm, what=name))
            channels = out
        self.conv_img = conv(channels, 3)

    def _norm(self, channels: int) -> SPADE:
        preset = self.preset
        return SPADE(channels, preset.semantic_channels, preset.hidden, norm=preset.norm)

    def forward(self, semantics: Tensor | LabelLayout, z: Tensor | None = None) -> Tensor:
        segmap = self._segmap(semantics)
        x = fast_format(self._start(segmap, z))
        for name in self._widths:
            x = self.get_submodule(name)(x, segmap, upsample=self._upsamples(name))
        return self._picture(x)


@network("encoder", SPADEPreset)
class SPADEEncoder(CodeEncoder, StridedEncoder):
    """SPADE's image encoder: mean and log variance of the latent code of a whole image.

    The image is resized to 256x256 (bilinear); six convs 3x3, stride 2, spectral and instance
    normalised, LeakyReLU(0.2); then two linear heads.

    Args:
        preset: options; ``ngf`` is the width of the first conv.

    Shapes: x (N, 3, H, W) in [-1, 1] -> mu, logvar (N, latent_channels) each.

    Raises:
        ValueError: another number of channels.

    Paper: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019.

    Example:
        >>> import torch
        >>> from smis_models import create_model, reparameterize
        >>> encoder = create_model("spade_coco_vae", part="encoder", ngf=8)
        >>> z = reparameterize(*encoder(torch.rand(1, 3, 256, 256)))
    """

    def __init__(self, preset: CodePreset) -> None:
        super().__init__(3, preset.ngf, depth=6)
        self.add_heads(self.width * (_ENCODED // 64) ** 2, preset.latent_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_maps("x", x, 3, "an image")
        if tuple(x.shape[2:]) != (_ENCODED, _ENCODED):
            x = F.interpolate(x, (_ENCODED, _ENCODED), mode="bilinear", align_corners=False)
        x = self.strided(x).flatten(1)
        return self.fc_mu(x), self.fc_var(x)
