"""Where a conv to few outputs takes the kernel for them: on a CPU, features by pixels."""

from __future__ import annotations

from torch import Tensor

from ...runtime.check import WIDE
from ...runtime.tensors import is_channels_last
from ..convs import runs_on_cpu
from .op import MOST

LEAST_CHANNELS = 16  # below which lanes stay idle here too


def takes_narrow(input: Tensor, outputs: int, groups: int, padding: tuple[int, int]) -> bool:
    """Whether :func:`narrow_conv2d` is the faster form of a conv of square kernels and stride 1."""
    return (outputs <= MOST and groups == 1 and padding[0] == padding[1]
            and input.dtype in WIDE and runs_on_cpu("narrow_conv2d", input)
            and input.shape[1] >= LEAST_CHANNELS and is_channels_last(input))
