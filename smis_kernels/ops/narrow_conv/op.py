"""A convolution to at most four outputs: a generator's image, a discriminator's verdict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.check import FLOATS, check_device, check_shape, check_tensor
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.library import RawOp
from ..convs import backend_of, check_bias, check_channels
from . import reference

KINDS = ("cpu",)
MOST = 4  # outputs, whose sums stay in registers (csrc/narrow_conv/cpu_kernel.h)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    (n, _, h, w), (outputs, _, side, _) = input.shape, weight.shape
    size = (n, outputs, h + 2 * padding - side + 1, w + 2 * padding - side + 1)
    return torch.empty(size, dtype=input.dtype, device=input.device,
                       memory_format=torch.channels_last)


_conv = RawOp("narrow_conv(Tensor input, Tensor weight, Tensor? bias, int padding) -> Tensor",
              _fake)


class _NarrowConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, padding: int,
                kind: str) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.padding = padding
        out: Tensor = _conv(kind, input, weight, bias, padding)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            d_input, d_weight = recorded_gradients(
                lambda x, w: reference.narrow_conv2d(x, w, None, ctx.padding), (input, weight),
                (grad,))
            return d_input, d_weight, grad.sum((0, 2, 3)) if need[2] else None, None, None
        padding = [ctx.padding] * 2
        found = torch.ops.aten.convolution_backward(
            grad, input, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1,
            list(need))
        return *found, None, None


def narrow_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 0,
                  backend: str | None = None) -> Tensor:
    r"""A convolution to at most four outputs.

    .. math:: y = \mathrm{conv2d}(x, W) + b

    Equal to ``F.conv2d(input, weight, bias, padding=padding)`` up to rounding; on the CPU registers
    lie along the channels, where along so few outputs most lanes would be idle. The gradients are
    torch's. :class:`WinogradConv2d` takes it for channels-last features.

    Args:
        input: (N, C, H, W); float32 or float64, and 16-bit types, which take ``F.conv2d``.
        weight: (C', C, k, k), C' at most 4. bias: (C',) or None.
        padding: rows and columns of zeros around the input.
        backend: "auto", "reference" or "cpu".

    Returns:
        (N, C', H + 2·padding - k + 1, W + 2·padding - k + 1), channels-last from the native kernel.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> x, weight = torch.randn(1, 8, 32, 32), torch.randn(3, 8, 3, 3)
        >>> narrow_conv2d(x, weight, padding=1).shape
        torch.Size([1, 3, 32, 32])
    """
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    check_tensor("weight", weight, 4, "(C', C, k, k)", (input.dtype,))
    outputs, side = weight.shape[0], weight.shape[2]
    if not 1 <= outputs <= MOST:
        raise ValueError(f"weight: expected 1 to {MOST} outputs, got {outputs}; use F.conv2d")
    check_channels(input, weight, outputs)
    check_shape("weight", weight, (outputs, input.shape[1], side, side),
                f"for input {tuple(input.shape)}")
    check_device("weight", weight, input, "input")
    check_bias(bias, outputs, weight, input)
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding: expected an integer of at least 0, got {padding}")
    if side < 1 or min(input.shape[2:]) + 2 * padding < side:
        raise ValueError(f"input: expected at least {side}x{side} pixels with their padding, got "
                         f"{tuple(input.shape[2:])} and {padding}")
    kind = backend_of("narrow_conv2d", input, backend, KINDS)
    if kind == "reference":
        return reference.narrow_conv2d(input, weight, bias, padding)
    y: Tensor = applied(_NarrowConv, input, weight, bias, padding, kind)
    return y
