"""Fused kernels for semantic image synthesis: drop-in, exact, a plain reference beside each."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    raise ImportError(
        "smis_kernels needs PyTorch, which is not installed; "
        "cure: pip install torch && python -m smis_kernels.build",
        name="smis_kernels",
    ) from None

from ._backend import BackendError, use_backend
from ._explain import Explanation, explain
from ._library import note_absent_kernels
from ._path import use_path
from .accelerate.model import accelerate, restore
from .accelerate.report import Report
from .class_crops.module import ClassCrops
from .class_crops.op import class_boxes, class_crops
from .conditional_attention.op import conditional_attention
from .conditional_conv.module import ConditionalConv2d
from .conditional_conv.op import conditional_conv2d
from .instance_edges.module import InstanceEdges
from .instance_edges.op import instance_edges
from .instance_pool.module import InstanceAvgPool2d
from .instance_pool.op import InstanceMeans, instance_avg_pool2d, instance_mean_table
from .layout import LabelLayout, layout_scope, share_layouts
from .modulation.invariant import ConditionalNorm2d, adain
from .modulation.module import SPADE, CGNorm, modulate_pair
from .modulation.multi import MultiSPADE
from .modulation.op import modulation, modulation_pair
from .norm_act.module import InstanceNormAct2d
from .norm_act.op import norm_act
from .spatially_varying_conv.module import SpatiallyVaryingConv2d
from .spatially_varying_conv.op import spatially_varying_conv2d
from .spectral_weight.hook import spectral_norm
from .spectral_weight.op import spectral_weight
from .winograd_conv.module import WinogradConv2d
from .winograd_conv.op import winograd_conv2d

note_absent_kernels()

__version__ = "0.1.0"

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
    "accelerate",
    "adain",
    "class_boxes",
    "class_crops",
    "conditional_attention",
    "conditional_conv2d",
    "explain",
    "instance_avg_pool2d",
    "instance_edges",
    "instance_mean_table",
    "layout_scope",
    "modulate_pair",
    "modulation",
    "modulation_pair",
    "norm_act",
    "restore",
    "share_layouts",
    "spatially_varying_conv2d",
    "spectral_norm",
    "spectral_weight",
    "use_backend",
    "use_path",
    "winograd_conv2d",
]
