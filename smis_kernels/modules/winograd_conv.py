"""torch's convs, in the form with fewer multiplications where that is the faster one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.kept_weight import KeptWeight
from ..ops.narrow_conv.choice import takes_narrow
from ..ops.narrow_conv.op import MOST, narrow_conv2d
from ..ops.polyphase_conv.choice import doubling_conv2d, strided_conv2d, takes_polyphase
from ..ops.winograd_conv.choice import conv3x3, plus, takes_winograd

if TYPE_CHECKING:
    from typing_extensions import Self

_KEPT = "_smis_kept"  # neither a setting nor a part of the state


class _KeepsTransform(nn.Module):
    """Keeps a weight's transform in eval mode where ``keep_transform`` is set."""

    keep_transform: bool = False

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

    def __getstate__(self) -> Any:
        """For copies and pickles: a weight that spectral norm made of the last forward's, as it is.

        The next forward makes it anew; with its graph it could not be copied.
        """
        inherited = getattr(super(), "__getstate__", None)  # Python 3.10 has none
        state = vars(self) if inherited is None else inherited()
        return {name: value.detach() if isinstance(value, Tensor) and value.grad_fn is not None
                else value for name, value in state.items()} if isinstance(state, dict) else state


# Functions, no methods: a module to which accelerate() gives this class may have attributes of such
# names.
def _largest(conv: nn.Conv2d) -> int:
    """The largest tile of 3x3 convs: training's gradients are those of small ones."""
    return 2 if conv.training else 4


def _is_torchs(conv: nn.Conv2d) -> bool:
    """Whether what torch's forward calls is torch's: others pad in ways of their own there."""
    return ("_conv_forward" not in vars(conv)
            and type(conv)._conv_forward is nn.Conv2d._conv_forward)


def _is_plain(conv: nn.Conv2d) -> bool:
    return (
        (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
        and conv.padding in ((0, 0), (1, 1)) and conv.padding_mode == "zeros"
    )


def _is_square(conv: nn.Conv2d) -> bool:
    return (conv.dilation == (1, 1) and conv.kernel_size[0] == conv.kernel_size[1]
            and not isinstance(conv.padding, str) and conv.padding_mode == "zeros")


def _is_strided(conv: nn.Conv2d) -> bool:
    return _is_square(conv) and conv.stride in ((1, 1), (2, 2))


def _padding(conv: nn.Conv2d | nn.ConvTranspose2d) -> tuple[int, int]:
    return int(conv.padding[0]), int(conv.padding[1])


def _kept(module: _KeepsTransform) -> KeptWeight | None:
    if module.training or not module.keep_transform:
        vars(module).pop(_KEPT, None)
        return None
    kept: KeptWeight = vars(module).setdefault(_KEPT, KeptWeight())
    return kept


class WinogradConv2d(_KeepsTransform, nn.Conv2d):
    r"""Drop-in for :class:`torch.nn.Conv2d`, which may also add a tensor.

    .. math:: y = \mathrm{conv2d}(x, W, b) \ (+ \mathrm{residual})

    Same arguments, parameters and state dict. On the CPU in float32 and float64 wide convs 3x3 of
    stride 1 run as :func:`winograd_conv2d`, of 2x2 or, in eval mode, 4x4 tiles
    (``SMIS_WINOGRAD=2``: 2x2 only); of stride 2, and 4x4 ones, as :func:`polyphase_conv2d`;
    to at most four outputs, as :func:`narrow_conv2d`. Everything else (other kernels, strides and
    paddings, small convs, 16-bit types, GPUs, autocast) is :class:`torch.nn.Conv2d` itself.

    With ``keep_transform`` set the weight's transform is kept in eval mode, 4 times the weight's
    size with 4x4 tiles, until the weight changes or training begins.

    A residual half as high and wide as the output is upsampled x2 by nearest: on a GPU in the sum.

    Shapes: x (N, C, H, W), residual as the output or half as high and wide -> (N, C', H', W').

    Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Example:
        >>> conv = WinogradConv2d(64, 64, 3, padding=1)
        >>> y = conv(torch.randn(1, 64, 128, 128))
    """

    def weight_format(self, input: Tensor) -> torch.memory_format:
        """How the weight is best stored for ``input``: as it is, else it is copied at every call.

        torch's convs want the weight channels-last where the input is; other forms do not.
        """
        last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
        if not last or not _is_torchs(self):
            return torch.contiguous_format
        kept = _kept(self) is not None
        if _is_plain(self):
            ours = takes_winograd(input, self.out_channels, self.groups, _padding(self)[0],
                                  largest=_largest(self), kept=kept)
        else:
            ours = _is_strided(self) and takes_polyphase(
                input, self.out_channels, self.groups, self.kernel_size[0], self.stride[0],
                _padding(self), kept=kept)
        return torch.contiguous_format if ours else torch.channels_last

    @property
    def stored_format(self) -> torch.memory_format:
        """How a weight that is made once is best stored for channels-last inputs of any size.

        That of 16x16 pixels: where the forms differ by size a weight is small.
        """
        input = self.weight.detach().new_empty(1, 16, 16, self.in_channels).permute(0, 3, 1, 2)
        return self.weight_format(input)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The conv, plus ``residual`` where one is given."""
        if not _is_torchs(self):
            return plus(super().forward(input), residual)
        if self.out_channels <= MOST and _is_square(self) and self.stride == (1, 1) and (
                takes_narrow(input, self.out_channels, self.groups, _padding(self))):
            y = narrow_conv2d(input, self.weight, self.bias, padding=_padding(self)[0])
            return plus(y, residual)
        if _is_plain(self):
            return conv3x3(input, self.weight, self.bias, residual=residual,
                           padding=_padding(self)[0], groups=self.groups,
                           largest=_largest(self), kept=_kept(self))
        if _is_strided(self):
            y = strided_conv2d(input, self.weight, self.bias, stride=self.stride[0],
                               padding=_padding(self), groups=self.groups, kept=_kept(self))
            return plus(y, residual)
        return plus(super().forward(input), residual)


class WinogradConvTranspose2d(_KeepsTransform, nn.ConvTranspose2d):
    r"""Drop-in for :class:`torch.nn.ConvTranspose2d`.

    .. math:: y = \mathrm{conv\_transpose2d}(x, W, b)

    Same arguments, parameters and state dict. On the CPU in float32 and float64 wide ones 3x3 and
    4x4 of stride 2 run as :func:`polyphase_conv_transpose2d`; everything else is
    :class:`torch.nn.ConvTranspose2d` itself, contiguous or channels-last as it returns them; the
    form by phases is channels-last. ``keep_transform``: see :class:`WinogradConv2d`.

    Shapes: x (N, C, H, W) -> (N, C', H', W').

    Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Example:
        >>> conv = WinogradConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1)
        >>> y = conv(torch.randn(1, 64, 32, 32))  # (1, 32, 64, 64)
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The conv; ``output_size`` as :class:`torch.nn.ConvTranspose2d` reads it."""
        if output_size is not None or (self.stride, self.dilation) != ((2, 2), (1, 1)):
            return super().forward(input, output_size)
        padding, more = _padding(self), self.output_padding
        return doubling_conv2d(input, self.weight, self.bias, padding=padding,
                               output_padding=(more[0], more[1]), groups=self.groups,
                               kept=_kept(self))
