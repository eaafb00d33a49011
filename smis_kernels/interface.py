"""What networks are built with beside the public modules: the one door to the rooms behind them."""

from .acceleration.prepared import Prepared
from .acceleration.watch import Settings
from .layout.label_layout import TableCache, WindowLevel
from .layout.planner import prepare_map
from .layout.static_layout import StaticLayout
from .modules.label_conv import LabelConv2d
from .ops.content_digest.stamp import Stamp
from .ops.modulation.op import channel_moments
from .ops.winograd_conv.choice import conv3x3
from .runtime.backend import no_fallback, requested, resolve
from .runtime.constants import constant
from .runtime.derivatives import transformed
from .runtime.graphs import capture, circumstances, difference
from .runtime.library import NAMESPACE

__all__ = [
    "NAMESPACE",
    "LabelConv2d",
    "Prepared",
    "Settings",
    "Stamp",
    "StaticLayout",
    "TableCache",
    "WindowLevel",
    "capture",
    "channel_moments",
    "circumstances",
    "constant",
    "conv3x3",
    "difference",
    "no_fallback",
    "prepare_map",
    "requested",
    "resolve",
    "transformed",
]
