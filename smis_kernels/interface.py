"""What networks are built with beside the public modules: the one door to the rooms behind them."""

from .acceleration.prepared import Prepared
from .acceleration.sequences import with_norm
from .acceleration.watch import Settings, hooked
from .layout.conditioned import conditioned_convs, label_rows
from .layout.levels import WindowLevel
from .layout.planner import prepare_map
from .layout.static_layout import StaticLayout
from .layout.table_cache import TableCache
from .modules.label_conv import LabelConv2d
from .modules.spectral_norm import release_weights
from .ops.content_digest.stamp import Stamp
from .ops.modulation.op import channel_moments
from .ops.polyphase_conv.choice import doubling_conv2d, strided_conv2d
from .ops.winograd_conv.choice import conv3x3
from .runtime.backend import no_fallback, requested, resolve
from .runtime.constants import constant, keeps
from .runtime.derivatives import transformed
from .runtime.graphs import capture, circumstances, difference
from .runtime.library import NAMESPACE
from .runtime.native import instruction_set

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
    "conditioned_convs",
    "constant",
    "conv3x3",
    "difference",
    "doubling_conv2d",
    "hooked",
    "instruction_set",
    "keeps",
    "label_rows",
    "no_fallback",
    "prepare_map",
    "release_weights",
    "requested",
    "resolve",
    "strided_conv2d",
    "transformed",
    "with_norm",
]
