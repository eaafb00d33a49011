"""Convs of stride 2, plain and transposed, and 4x4 ones of stride 1, with fewer multiplications."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...runtime.check import FLOATS, check_device, check_shape, check_tensor
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.library import RawOp
from ..convs import Pair, backend_of, check_bias, check_channels, pair
from ..weight_gradient import weight_gradient
from . import reference

if TYPE_CHECKING:
    from ..kept_weight import KeptWeight

KINDS = ("cpu",)
FORMS = ((3, 2), (4, 2), (4, 1))  # sides of a kernel and strides
_PHASES, _FREQUENCIES = 4, 16


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, stride: int,
          padding_y: int, padding_x: int, transposed: bool, height: int, width: int,
          transformed: Tensor | None = None) -> Tensor:
    outputs = groups * weight.shape[1] if transposed else weight.shape[0]
    return torch.empty((input.shape[0], outputs, height, width), dtype=input.dtype,
                       device=input.device, memory_format=torch.channels_last)


# Transposed it reads the weight as F.conv_transpose2d does.
_conv = RawOp(
    "polyphase_conv(Tensor input, Tensor weight, Tensor? bias, SymInt groups, int stride, "
    "int padding_y, int padding_x, bool transposed, SymInt height, SymInt width, "
    "Tensor? transformed=None) -> Tensor",
    _fake,
)


def transformed_size(weight: Tensor, groups: int, transposed: bool = False) -> int:
    """Elements of a weight's transform, as csrc/polyphase_conv/cpu_kernel.h lays it out."""
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    if transposed:
        outputs, channels = channels, outputs
    return groups * _PHASES * (-(outputs // -16) * 16) * _FREQUENCIES * (channels + 1)


def _weight_fake(weight: Tensor, groups: int, stride: int, transposed: bool) -> Tensor:
    return weight.new_empty((transformed_size(weight, groups, transposed),))


# How the products read the weight depends on the processor: for this process only.
_weight = RawOp(
    "polyphase_weight(Tensor weight, int groups, int stride, bool transposed) -> Tensor",
    _weight_fake,
)


def transform_weight(weight: Tensor, groups: int, stride: int, transposed: bool = False) -> Tensor:
    """What the products read in place of the weight: opaque, not differentiable."""
    out: Tensor = _weight("cpu", weight.detach(), groups, stride, transposed)
    return out


class _PolyphaseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int,
                stride: int, padding: Pair, transposed: bool, size: Pair,
                transformed: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.options = groups, stride, padding, transposed, size, kind
        out: Tensor = _conv(kind, input, weight, bias, groups, stride, *padding, transposed, *size,
                            transformed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        groups, stride, padding, transposed, size, kind = ctx.options
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_bias = grad.sum((0, 2, 3)) if need_bias else None
        d_input = d_weight = None
        if torch.is_grad_enabled():
            def conv(x: Tensor, w: Tensor) -> Tensor:
                if not transposed:
                    return reference.polyphase_conv2d(x, w, None, stride, padding, groups)
                more = _output_padding(x, w, padding, size)
                return reference.polyphase_conv_transpose2d(x, w, None, padding, more, groups)

            d_input, d_weight = recorded_gradients(conv, (input, weight), (grad,))
            return d_input, d_weight, d_bias, *(None,) * 7
        if need_input:
            d_input = _conv(kind, grad, weight, None, groups, stride, *padding, not transposed,
                            *input.shape[2:])
        if need_weight:
            # A transposed conv's weight is that of the conv from its output to its input.
            x, g = (grad, input) if transposed else (input, grad)
            d_weight = weight_gradient(x, g, weight, padding, groups, stride)
        return d_input, d_weight, d_bias, *(None,) * 7


def _output_padding(input: Tensor, weight: Tensor, padding: Pair, size: Pair) -> Pair:
    y, x = (out - (2 * (n - 1) + k - 2 * p) for out, n, k, p in zip(
        size, input.shape[2:], weight.shape[2:], padding, strict=True))
    return y, x


def _checked_pair(name: str, value: int | Pair, most: int) -> Pair:
    both = pair(value)
    if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(
            isinstance(v, int) and 0 <= v <= most for v in both):
        raise ValueError(f"{name}: expected 0 to {most}, or two such numbers, got {value}")
    return both[0], both[1]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int,
           transposed: bool) -> None:
    meaning = "(C, C' / groups, k, k)" if transposed else "(C', C / groups, k, k)"
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    check_tensor("weight", weight, 4, meaning, (input.dtype,))
    channels, side = input.shape[1], weight.shape[2]
    if weight.shape[3] != side or (side, stride) not in FORMS:
        known = " or ".join(f"{k}x{k} of stride {s}" for k, s in FORMS if not transposed or s == 2)
        raise ValueError(f"weight: expected a kernel {known}; got {side}x{weight.shape[3]} of "
                         f"stride {stride}")
    if isinstance(groups, float) or groups < 1 or channels % groups or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels and the weight's "
                         f"{weight.shape[0]}, got {groups}")
    size = (channels, weight.shape[1]) if transposed else (weight.shape[0], channels // groups)
    check_shape("weight", weight, (*size, side, side),
                f"for input {tuple(input.shape)} and {groups} groups")
    check_device("weight", weight, input, "input")
    outputs = groups * weight.shape[1] if transposed else weight.shape[0]
    check_channels(input, weight, outputs)
    check_bias(bias, outputs, weight, input)


def polyphase_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 2,
                     padding: int | Pair = 0, groups: int = 1, kept: KeptWeight | None = None,
                     backend: str | None = None) -> Tensor:
    r"""A conv 3x3 or 4x4 of stride 2, or 4x4 of stride 1, with fewer multiplications.

    .. math:: y_o = \sum_b \sum_a w_{2a + b} \, x_{2(o + a) + b} + \mathrm{bias}
        \quad \text{(stride 1:} \ w_{a + 2b} \, x_{o + a + 2b} \text{)}

    along each axis: four convs of 2x2 kernels over the input's phases b, each by Winograd's
    F(3x3, 2x2). Equal to ``F.conv2d(input, weight, bias, stride, padding, groups=groups)`` up to
    rounding, with 1 / 1.65 (3x3) or 1 / 2.25 (4x4) of its multiplications, on the CPU. NaN and
    infinity reach the other pixels of their tile. :class:`WinogradConv2d` knows where this is the
    faster form.

    Args:
        input: (N, C, H, W); float32 or float64, and 16-bit types, which take ``F.conv2d``.
        weight: (C', C / groups, k, k). bias: (C',) or None.
        stride: 2, or 1 for 4x4.
        padding: rows and columns of zeros around the input, 0 to k - 1.
        groups: blocked connections, as ``F.conv2d``.
        kept: keeps the weight's transform for calls to come.
        backend: "auto", "reference" or "cpu".

    Returns:
        (N, C', (H + 2·padding - k) // stride + 1, ...), channels-last from the native kernel.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Example:
        >>> x, weight = torch.randn(1, 8, 32, 32), torch.randn(4, 8, 4, 4)
        >>> polyphase_conv2d(x, weight, padding=1).shape
        torch.Size([1, 4, 16, 16])
    """
    _check(input, weight, bias, stride, groups, False)
    side = weight.shape[2]
    pads = _checked_pair("padding", padding, side - 1)
    height, width = ((n + 2 * p - side) // stride + 1
                     for n, p in zip(input.shape[2:], pads, strict=True))
    if min(height, width) < 1:
        raise ValueError(f"input: expected at least {side}x{side} pixels with their padding, got "
                         f"{tuple(input.shape[2:])} and {pads}")
    kind = backend_of("polyphase_conv2d", input, backend, KINDS, groups=groups, stride=stride)
    if kind == "reference":
        return reference.polyphase_conv2d(input, weight, bias, stride, pads, groups)
    transformed = None if kept is None else kept.of(
        weight, ("polyphase_conv2d", groups, stride),
        lambda w: transform_weight(w, groups, stride))
    y: Tensor = applied(_PolyphaseConv, input, weight, bias, groups, stride, pads, False,
                        (height, width), transformed, kind)
    return y


def polyphase_conv_transpose2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
                               padding: int | Pair = 0, output_padding: int | Pair = 0,
                               groups: int = 1, kept: KeptWeight | None = None,
                               backend: str | None = None) -> Tensor:
    r"""A transposed conv 3x3 or 4x4 of stride 2, with fewer multiplications.

    .. math:: y_{2q + b} = \sum_a w_{2a + b} \, x_{q - a} + \mathrm{bias}

    along each axis: a conv of 2x2 kernels for each phase b of the output, by Winograd's
    F(3x3, 2x2). Equal to ``F.conv_transpose2d(input, weight, bias, 2, padding, output_padding,
    groups)`` up to rounding, with 1 / 1.65 (3x3) or 1 / 2.25 (4x4) of its multiplications, on the
    CPU. NaN and infinity reach the other pixels of their tile. :class:`WinogradConvTranspose2d`
    knows where this is the faster form.

    Args:
        input: (N, C, H, W); float32 or float64, and 16-bit types, which take torch's.
        weight: (C, C' / groups, k, k). bias: (C',) or None.
        padding: rows and columns left off around the output, 0 to k - 1.
        output_padding: rows and columns more at its end, 0 or 1.
        groups: blocked connections, as ``F.conv_transpose2d``.
        kept: keeps the weight's transform for calls to come.
        backend: "auto", "reference" or "cpu".

    Returns:
        (N, C', 2·(H - 1) - 2·padding + k + output_padding, ...), channels-last from the kernel.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Example:
        >>> x, weight = torch.randn(1, 8, 16, 16), torch.randn(8, 4, 3, 3)
        >>> polyphase_conv_transpose2d(x, weight, padding=1, output_padding=1).shape
        torch.Size([1, 4, 32, 32])
    """
    _check(input, weight, bias, 2, groups, True)
    side = weight.shape[2]
    pads = _checked_pair("padding", padding, side - 1)
    more = _checked_pair("output_padding", output_padding, 1)
    height, width = (2 * (n - 1) - 2 * p + side + o
                     for n, p, o in zip(input.shape[2:], pads, more, strict=True))
    if min(height, width) < 1:
        raise ValueError(f"input: expected pixels enough for an output with padding {pads}, got "
                         f"{tuple(input.shape[2:])}")
    kind = backend_of("polyphase_conv_transpose2d", input, backend, KINDS, groups=groups)
    if kind == "reference":
        return reference.polyphase_conv_transpose2d(input, weight, bias, pads, more, groups)
    transformed = None if kept is None else kept.of(
        weight, ("polyphase_conv_transpose2d", groups),
        lambda w: transform_weight(w, groups, 2, True))
    y: Tensor = applied(_PolyphaseConv, input, weight, bias, groups, 2, pads, True,
                        (height, width), transformed, kind)
    return y
