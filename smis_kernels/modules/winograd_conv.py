"""nn.Conv2d that takes the Winograd form where that is the faster one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.winograd_conv.choice import conv3x3, plus, takes_winograd
from ..ops.winograd_conv.kept import KeptWeight

if TYPE_CHECKING:
    from typing_extensions import Self

_KEPT = "_smis_kept"  # neither a setting nor a part of the state


class WinogradConv2d(nn.Conv2d):
    r"""Drop-in for a 3x3 :class:`torch.nn.Conv2d` of stride 1, which may also add a tensor.

    .. math:: y = \mathrm{conv2d}(x, W, b) \ (+ \mathrm{residual})

    Same arguments, parameters and state dict. On the CPU in float32 and float64 wide convs run as
    :func:`winograd_conv2d`, of 2x2 or, in eval mode, 4x4 tiles (``SMIS_WINOGRAD=2``: 2x2 only);
    everything else (other kernels, strides and paddings, narrow or small convs, 16-bit types,
    GPUs, autocast) is :class:`torch.nn.Conv2d` itself.

    With ``keep_transform`` set the weight's transform is kept in eval mode, 4 times the weight's
    size with 4x4 tiles, until the weight changes or training begins.

    A residual half as high and wide as the output is upsampled x2 by nearest: on a GPU in the sum.

    Shapes: x (N, C, H, W), residual as the output or half as high and wide -> (N, C', H', W').

    Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Example:
        >>> conv = WinogradConv2d(64, 64, 3, padding=1)
        >>> y = conv(torch.randn(1, 64, 128, 128))
    """

    keep_transform: bool = False

    def _options(self) -> dict[str, Any]:
        """What training forbids: large tiles and a kept transform."""
        kept: KeptWeight | None = None
        if self.training or not self.keep_transform:
            vars(self).pop(_KEPT, None)
        else:
            kept = vars(self).setdefault(_KEPT, KeptWeight())
        return {"largest": 2 if self.training else 4, "kept": kept}

    @property
    def kept_bytes(self) -> int:
        """The memory that a kept transform takes now."""
        kept: KeptWeight | None = vars(self).get(_KEPT)
        return 0 if kept is None else kept.nbytes

    def train(self, mode: bool = True) -> Self:
        """Switch as every module does; training gives a kept transform back."""
        if mode:
            vars(self).pop(_KEPT, None)
        return super().train(mode)

    def _plain(self) -> bool:
        return (
            (self.kernel_size, self.stride, self.dilation) == ((3, 3), (1, 1), (1, 1))
            and self.padding in ((0, 0), (1, 1)) and self.padding_mode == "zeros"
        )

    def weight_format(self, input: Tensor) -> torch.memory_format:
        """How the weight is best stored for ``input``: as it is, else it is copied at every call.

        torch's convs want the weight channels-last where the input is; the Winograd form does not.
        """
        last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
        options = self._options()
        options["kept"] = options["kept"] is not None
        if last and not (self._plain() and takes_winograd(
                input, self.out_channels, self.groups, int(self.padding[0]), **options)):
            return torch.channels_last
        return torch.contiguous_format

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The conv, plus ``residual`` where one is given."""
        if self._plain():
            return conv3x3(input, self.weight, self.bias, residual=residual,
                           padding=int(self.padding[0]), groups=self.groups,
                           **self._options())
        return plus(super().forward(input), residual)
