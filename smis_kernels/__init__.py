"""Fused kernels for semantic image synthesis: drop-in, exact, a plain reference beside each."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    raise ImportError(
        "smis_kernels needs PyTorch, which is not installed; "
        "cure: pip install torch && python -m smis_kernels.build",
        name="smis_kernels",
    ) from None

from .acceleration.model import accelerate, restore
from .acceleration.report import Report
from .layout.label_layout import LabelLayout
from .layout.scope import layout_scope, share_layouts
from .modules.conditional_conv import ConditionalConv2d
from .modules.conditional_norm import ConditionalNorm2d, adain
from .modules.crops import ClassCrops
from .modules.edges import InstanceEdges
from .modules.multi_spade import MultiSPADE
from .modules.norm_act import InstanceNormAct2d
from .modules.pooling import InstanceAvgPool2d
from .modules.spade import SPADE, CGNorm, modulate_pair
from .modules.spatially_varying_conv import SpatiallyVaryingConv2d
from .modules.spectral_norm import spectral_norm
from .modules.winograd_conv import WinogradConv2d, WinogradConvTranspose2d
from .ops.class_crops.op import class_boxes, class_crops
from .ops.conditional_attention.op import conditional_attention
from .ops.conditional_conv.op import conditional_conv2d
from .ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from .ops.instance_edges.op import instance_edges
from .ops.instance_pool.op import InstanceMeans, instance_avg_pool2d, instance_mean_table
from .ops.label_windows.op import number_vectors, number_windows
from .ops.modulation.op import modulation, modulation_pair
from .ops.narrow_conv.op import narrow_conv2d
from .ops.norm_act.op import norm_act
from .ops.polyphase_conv.op import polyphase_conv2d, polyphase_conv_transpose2d
from .ops.spatially_varying_conv.op import spatially_varying_conv2d
from .ops.spectral_weight.op import spectral_weight
from .ops.window_table.op import window_embedding, window_table
from .ops.winograd_conv.op import winograd_conv2d
from .runtime.backend import BackendError, use_backend
from .runtime.explain import Explanation, explain
from .runtime.library import note_absent_kernels
from .runtime.path import use_path

note_absent_kernels()

__version__ = "0.2.0"

__all__ = [
    "SPADE",
    "BackendError",
    "CGNorm",
    "ClassCrops",
    "ConditionalConv2d",
    "ConditionalNorm2d",
    "Explanation",
    "InstanceAvgPool2d",
    "InstanceEdges",
    "InstanceMeans",
    "InstanceNormAct2d",
    "LabelLayout",
    "MultiSPADE",
    "Report",
    "SpatiallyVaryingConv2d",
    "WinogradConv2d",
    "WinogradConvTranspose2d",
    "accelerate",
    "adain",
    "class_boxes",
    "class_crops",
    "conditional_attention",
    "conditional_conv2d",
    "explain",
    "indexed_modulation",
    "indexed_modulation_pair",
    "instance_avg_pool2d",
    "instance_edges",
    "instance_mean_table",
    "layout_scope",
    "modulate_pair",
    "modulation",
    "modulation_pair",
    "narrow_conv2d",
    "norm_act",
    "number_vectors",
    "number_windows",
    "polyphase_conv2d",
    "polyphase_conv_transpose2d",
    "restore",
    "share_layouts",
    "spatially_varying_conv2d",
    "spectral_norm",
    "spectral_weight",
    "use_backend",
    "use_path",
    "window_embedding",
    "window_table",
    "winograd_conv2d",
]
