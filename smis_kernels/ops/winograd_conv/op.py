"""3x3 convolution with 2.25 or 4 times fewer multiplications, any number of groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...runtime.check import FLOATS, check_device, check_shape, check_tensor
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.library import RawOp
from ..convs import backend_of, check_bias, check_weight
from ..weight_gradient import weight_gradient
from . import reference

if TYPE_CHECKING:
    from ..kept_weight import KeptWeight

KINDS = ("cpu",)
TILES = (2, 4)


def _shape(input: Tensor, outputs: int, padding: int) -> tuple[int, int, int, int]:
    n, _, h, w = input.shape
    return n, outputs, h + 2 * padding - 2, w + 2 * padding - 2


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
          groups: int, padding: int, tile: int = 2, transformed: Tensor | None = None,
          flipped: bool = False) -> Tensor:
    outputs = groups * weight.shape[1] if flipped else weight.shape[0]
    return torch.empty(_shape(input, outputs, padding), dtype=input.dtype, device=input.device,
                       memory_format=torch.channels_last)


# Flipped, the weight is that of the conv whose input's gradient is computed.
_conv = RawOp(
    "winograd_conv(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt groups, "
    "SymInt padding, int tile=2, Tensor? transformed=None, bool flipped=False) -> Tensor",
    _fake,
)


def transformed_size(weight: Tensor, groups: int, tile: int) -> int:
    """Elements of a weight's transform, as csrc/winograd_conv/cpu_kernel.h lays it out."""
    outputs, channels = weight.shape[:2]
    return groups * (-(outputs // groups) // -16 * 16) * (tile + 2) ** 2 * (channels + 1)


def _weight_fake(weight: Tensor, groups: int, tile: int) -> Tensor:
    return weight.new_empty((transformed_size(weight, groups, tile),))


# How the products read the weight depends on the processor: for this process only.
_weight = RawOp("winograd_weight(Tensor weight, int groups, int tile) -> Tensor", _weight_fake)


def transform_weight(weight: Tensor, groups: int, tile: int) -> Tensor:
    """What the products read in place of the weight: opaque, not differentiable."""
    out: Tensor = _weight("cpu", weight.detach(), groups, tile)
    return out


class _WinogradConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None,
                residual: Tensor | None, groups: int, padding: int, tile: int,
                transformed: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.options = groups, padding, kind
        out: Tensor = _conv(kind, input, weight, bias, residual, groups, padding, tile,
                            transformed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        groups, padding, kind = ctx.options
        need_input, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        d_input = None
        if torch.is_grad_enabled():
            def conv(x: Tensor, w: Tensor) -> Tensor:
                return reference.winograd_conv2d(x, w, None, None, groups, padding)

            d_input, d_weight = recorded_gradients(conv, (input, weight), (grad,))
            return (d_input, d_weight, grad.sum((0, 2, 3)) if need_bias else None,
                    grad if need_residual else None, *(None,) * 5)
        if need_input:
            d_input = _conv(kind, grad, weight, None, None, groups, 2 - padding, 2, None, True)
        d_weight = weight_gradient(input, grad, weight, padding, groups) if need_weight else None
        d_bias = grad.sum((0, 2, 3)) if need_bias else None
        return (d_input, d_weight, d_bias, grad if need_residual else None, *(None,) * 5)


def winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
                    residual: Tensor | None = None, padding: int = 1, groups: int = 1,
                    tile: int = 2, kept: KeptWeight | None = None,
                    backend: str | None = None) -> Tensor:
    r"""A 3x3 convolution by Winograd's F(m x m, 3x3), a tensor added in the same pass.

    .. math:: y = \mathrm{residual} + A^T [(G W G^T) \odot (B^T x B)] A + b

    equal to ``residual + F.conv2d(input, weight, bias, padding=padding, groups=groups)`` up to
    rounding: 16 products for 2x2 pixels in place of 36, or 36 for 4x4 in place of 144, on the CPU.
    NaN and infinity reach the other pixels of their tile. :class:`WinogradConv2d` knows where this
    is the faster form. Errors of both tiles: README.md beside this file.

    Args:
        input: (N, C, H, W); float32 or float64, and 16-bit types, which take ``F.conv2d``.
        weight: (C', C / groups, 3, 3). bias: (C',) or None.
        residual: as the output, or None.
        padding: rows and columns of zeros around the input, 0 or 1.
        groups: blocked connections, as ``F.conv2d``.
        tile: m, 2 or 4 pixels: 4 multiplies less and rounds more, at points 0, ±√½, ±√2, ∞. The
            gradients are those of 2.
        kept: keeps the weight's transform for calls to come.
        backend: "auto", "reference" or "cpu".

    Returns:
        (N, C', H + 2·padding - 2, W + 2·padding - 2), channels-last from the native kernel.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Example:
        >>> x, weight = torch.randn(1, 8, 32, 32), torch.randn(4, 8, 3, 3)
        >>> winograd_conv2d(x, weight).shape
        torch.Size([1, 4, 32, 32])
    """
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    check_tensor("weight", weight, 4, "(C', C / groups, 3, 3)", (input.dtype,))
    check_weight(weight, input, groups, (3, 3))
    (h, w), out = input.shape[2:], weight.shape[0]
    if not isinstance(padding, int) or padding not in (0, 1):
        raise ValueError(f"padding: expected 0 or 1, got {padding}")
    if tile not in TILES:
        raise ValueError(f"tile: expected 2 or 4, got {tile}")
    shape = _shape(input, out, padding)
    if min(shape[2:]) < 0 or (not padding and min(h, w) < 3):
        raise ValueError(f"input: expected at least 3x3 pixels without padding, got ({h}, {w})")
    check_bias(bias, out, weight, input)
    if residual is not None:
        check_tensor("residual", residual, 4, "(N, C', H', W')", (input.dtype,))
        check_shape("residual", residual, shape, "as the output")
        check_device("residual", residual, input, "input")
    kind = backend_of("winograd_conv2d", input, backend, KINDS, groups=groups, tile=tile)
    if kind == "reference":
        return reference.winograd_conv2d(input, weight, bias, residual, groups, padding)
    transformed = None if kept is None else kept.of(
        weight, ("winograd_conv2d", groups, tile), lambda w: transform_weight(w, groups, tile))
    y: Tensor = applied(_WinogradConv, input, weight, bias, residual, groups, padding, tile,
                                    transformed, kind)
    return y
