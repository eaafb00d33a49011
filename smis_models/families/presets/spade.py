"""The published options of SPADE and CC-FPSE, and of VSPADE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from .base import LatentPreset


@dataclass(frozen=True, kw_only=True)
class CodePreset(LatentPreset):
    """Options of the generators that can start from one code for the whole picture.

    With ``vae`` the generator starts from a latent code, which an image encoder of width ``ngf``
    gives; else from the semantics at the size of the first features. ``hidden`` is the width of
    the layer from which modulation (and CC-FPSE's kernels and gates) are predicted.
    """

    vae: bool = False
    latent_channels: int = 256
    hidden: int = 128
    upsampling: Literal["normal", "more", "most"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("hidden")

    @property
    def has_encoder(self) -> bool:
        return self.vae


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


SPADE_COCO = SPADEPreset(
    classes=183, image_size=(256, 256), ngf=64, instance_edge=True, dont_care=182,
)
SPADE_COCO_VAE = replace(SPADE_COCO, vae=True)
SPADE_ADE20K = SPADEPreset(
    classes=151, image_size=(256, 256), ngf=64, dont_care=150, unlabelled=0,
)
SPADE_CITYSCAPES = SPADEPreset(
    classes=35, image_size=(256, 512), ngf=64, instance_edge=True, upsampling="more",
)
# VSPADE, of GroupDNet's table: SPADE with its VAE, the schedule of one group everywhere. So read it
# has 106,808,707 parameters, the table's 106.8 M.
VSPADE = SPADEPreset(classes=8, image_size=(256, 256), ngf=64, upsampling="more", vae=True)


@dataclass(frozen=True, kw_only=True)
class CCFPSEPreset(CodePreset):
    """Options of one CC-FPSE (Liu et al., "Learning to Predict Layout-to-image Conditional
    Convolutions for Semantic Image Synthesis", NeurIPS 2019), as :class:`CodePreset` says.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6}

    vae: bool = True
    upsampling: Literal["normal", "more"] = "normal"


CCFPSE_COCO = CCFPSEPreset(
    classes=183, image_size=(256, 256), ngf=64, instance_edge=True, dont_care=182,
)
CCFPSE_ADE20K = CCFPSEPreset(
    classes=151, image_size=(256, 256), ngf=64, dont_care=150, unlabelled=0,
)
CCFPSE_CITYSCAPES = CCFPSEPreset(
    classes=35, image_size=(256, 512), ngf=64, instance_edge=True, upsampling="more",
)
