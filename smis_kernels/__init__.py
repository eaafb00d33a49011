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
from .class_crops.module import ClassCrops
from .class_crops.op import class_boxes, class_crops
from .instance_edges.module import InstanceEdges
from .instance_edges.op import instance_edges
from .layout import LabelLayout, layout_scope, share_layouts
from .modulation.module import SPADE, CGNorm, modulate_pair
from .modulation.op import modulation, modulation_pair

note_absent_kernels()

__version__ = "0.1.0"

__all__ = [
    "SPADE",
    "BackendError",
    "CGNorm",
    "ClassCrops",
    "Explanation",
    "InstanceEdges",
    "LabelLayout",
    "class_boxes",
    "class_crops",
    "explain",
    "instance_edges",
    "layout_scope",
    "modulate_pair",
    "modulation",
    "modulation_pair",
    "share_layouts",
    "use_backend",
    "use_path",
]
