"""Convs of fused blocks and sequences, in the form with fewer multiplications."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..modules.winograd_conv import WinogradConv2d, WinogradConvTranspose2d
from ..ops.winograd_conv.choice import plus
from ..runtime.derivatives import transformed
from ..runtime.tensors import is_channels_last
from .graph import convolves, is_plain_conv, is_plain_conv_transpose
from .swap import Accelerated, Change
from .watch import make_weight

_SIDES = (3, 4)  # of the kernels that have such a form


def _may_transform(conv: nn.Conv2d | nn.ConvTranspose2d, input: Tensor) -> bool:
    """Whether a call takes the form with fewer multiplications; the class decides on the rest."""
    return (transformed() is None and input.dim() == 4 and is_channels_last(input)
            and convolves(conv))


class FusedConv(Accelerated, WinogradConv2d):
    """A conv, by Winograd's algorithm where that is faster."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # Elsewhere the output is to have the input's format.
        if _may_transform(self, input):
            return super().forward(input, residual)
        return plus(super(WinogradConv2d, self).forward(input), residual)


def as_called(conv: nn.Conv2d) -> nn.Conv2d:
    """A plain conv of the weight that this call has, for one that has no hooks but a weight's."""
    make_weight(conv)
    view = nn.Conv2d.__new__(nn.Conv2d)
    vars(view).update(vars(conv), _parameters={"weight": conv.weight, "bias": conv.bias},
                      _modules={}, _forward_pre_hooks=OrderedDict())
    vars(view).pop("weight", None)  # where a hook has put it, before the parameters
    return view


class FusedConvTranspose(Accelerated, WinogradConvTranspose2d):
    """A transposed conv, by Winograd's algorithm where that is faster."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if _may_transform(self, input):
            return super().forward(input, output_size)
        y: Tensor = super(WinogradConvTranspose2d, self).forward(input, output_size)
        return y


def conv_change(module: nn.Module, least_width: int = 0) -> Change | None:
    """What a conv becomes; None where it is narrow, has no such form, or code of its own."""
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return None
    if min(module.in_channels, module.out_channels) < least_width * module.groups:
        return None
    if module.kernel_size not in [(side, side) for side in _SIDES] or module.dilation != (1, 1):
        return None
    if isinstance(module, nn.Conv2d):
        return Change(module, FusedConv) if is_plain_conv(module) else None
    return Change(module, FusedConvTranspose) if is_plain_conv_transpose(module) else None
