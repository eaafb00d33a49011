"""The zoo: a file for each family, with its networks and published options; models by name."""

# The zoo lists its models in the order of these imports.
# isort: off
from ..networks.preset import CodePreset, LatentPreset, Preset, with_options
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
from .spade import (
    SPADE_ADE20K,
    SPADE_CELEBAMASK,
    SPADE_CITYSCAPES,
    SPADE_COCO,
    SPADE_COCO_VAE,
    VSPADE,
    SPADEPreset,
)
from .ccfpse import (
    CCFPSE_ADE20K,
    CCFPSE_CITYSCAPES,
    CCFPSE_COCO,
    CCFPSEPreset,
)
from .pix2pixhd import (
    PIX2PIXHD_CITYSCAPES,
    PIX2PIXHD_CITYSCAPES_1024,
    PIX2PIXHD_CITYSCAPES_FEATURES,
    Pix2pixHDPreset,
)
from .bicyclegan import (
    BICYCLEGAN,
    DSCGAN,
    UNetPreset,
)
from .models import (
    Configuration,
    SynthesisModel,
    checkpoint_file,
    configured_preset,
    create_model,
    shipped_weights,
    stored_configuration,
)
from .registry import MODELS, PARTS, RECIPES, ModelInfo, entry, list_models, network_parts
# isort: on

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
    "MODELS",
    "MULNET",
    "PARTS",
    "PIX2PIXHD_CITYSCAPES",
    "PIX2PIXHD_CITYSCAPES_1024",
    "PIX2PIXHD_CITYSCAPES_FEATURES",
    "RECIPES",
    "SCENES",
    "SPADE_ADE20K",
    "SPADE_CELEBAMASK",
    "SPADE_CITYSCAPES",
    "SPADE_COCO",
    "SPADE_COCO_VAE",
    "VSPADE",
    "CCFPSEPreset",
    "CodePreset",
    "Configuration",
    "GroupDNetPreset",
    "LatentPreset",
    "ModelInfo",
    "NormWidths",
    "Pix2pixHDPreset",
    "Preset",
    "SPADEPreset",
    "SynthesisModel",
    "UNetPreset",
    "checkpoint_file",
    "configured_preset",
    "create_model",
    "entry",
    "list_models",
    "network_parts",
    "shipped_weights",
    "stored_configuration",
    "with_options",
]
