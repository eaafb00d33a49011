"""Published options of every network: a frozen dataclass per family, an instance per data set."""

from .base import LatentPreset, Preset, with_options
from .groupdnet import (
    ADE20K,
    CITYSCAPES,
    DEEPFASHION,
    GROUPDEC,
    GROUPENC,
    GROUPNET,
    MULNET,
    SCENES,
    GroupDNetPreset,
    NormWidths,
)
from .pix2pixhd import (
    PIX2PIXHD_CITYSCAPES,
    PIX2PIXHD_CITYSCAPES_1024,
    PIX2PIXHD_CITYSCAPES_FEATURES,
    Pix2pixHDPreset,
)
from .spade import (
    CCFPSE_ADE20K,
    CCFPSE_CITYSCAPES,
    CCFPSE_COCO,
    SPADE_ADE20K,
    SPADE_CITYSCAPES,
    SPADE_COCO,
    SPADE_COCO_VAE,
    VSPADE,
    CCFPSEPreset,
    CodePreset,
    SPADEPreset,
)
from .unet import BICYCLEGAN, DSCGAN, UNetPreset

__all__ = [
    "ADE20K",
    "BICYCLEGAN",
    "CCFPSE_ADE20K",
    "CCFPSE_CITYSCAPES",
    "CCFPSE_COCO",
    "CITYSCAPES",
    "DEEPFASHION",
    "DSCGAN",
    "GROUPDEC",
    "GROUPENC",
    "GROUPNET",
    "MULNET",
    "PIX2PIXHD_CITYSCAPES",
    "PIX2PIXHD_CITYSCAPES_1024",
    "PIX2PIXHD_CITYSCAPES_FEATURES",
    "SCENES",
    "SPADE_ADE20K",
    "SPADE_CITYSCAPES",
    "SPADE_COCO",
    "SPADE_COCO_VAE",
    "VSPADE",
    "CCFPSEPreset",
    "CodePreset",
    "GroupDNetPreset",
    "LatentPreset",
    "NormWidths",
    "Pix2pixHDPreset",
    "Preset",
    "SPADEPreset",
    "UNetPreset",
    "with_options",
]
