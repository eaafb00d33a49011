"""Spatially varying depthwise convolution: a kernel of its own for every pixel and channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import FLOATS, autocast_as_conv, check_device, check_tensor
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import empty_nchw, is_channels_last, memory_format
from . import reference

KINDS = ("cpu", "cuda")
KERNEL_SIZES = (1, 3, 5)
Window = tuple[int, int, int, int]  # kernel_size, stride, padding, dilation


def spatially_varying_conv2d(
    input: Tensor, weight: Tensor, *, kernel_size: int = 3, stride: int = 1, padding: int = 1,
    dilation: int = 1, backend: str | None = None,
) -> Tensor:
    r"""Depthwise convolution whose kernel differs at every pixel: one pass, nothing unfolded.

    .. math:: y_c(p) = \sum_k w_{c,k}(p)\, x_c(p \cdot \mathrm{stride} - \mathrm{padding}
              + k \cdot \mathrm{dilation})

    The weights are read once. With ``G < C`` neighbouring channels share a kernel, as in
    involution and decoupled dynamic filters.

    Args:
        input: (N, C, H, W); float32, float64, float16 or bfloat16. Zeros lie outside.
        weight: (N, G, k*k, h, w) or (N, G*k*k, h, w) of the input's dtype, G dividing C; h and w
            as :func:`torch.nn.functional.conv2d` would give. Under autocast both are cast to its
            dtype, as conv2d casts them.
        kernel_size: k, one of 1, 3, 5.
        stride, padding, dilation: as in conv2d.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (N, C, h, w) in the input's dtype and memory format; differentiable twice in both.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Source: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions", 2019.

    Example:
        >>> x, w = torch.randn(1, 8, 16, 16), torch.randn(1, 8 * 9, 16, 16)
        >>> y = spatially_varying_conv2d(x, w)
    """
    window = (kernel_size, stride, padding, dilation)
    _check_window(window)
    input, weight = autocast_as_conv(input, weight)  # type: ignore[assignment]
    weight = _checked_weight(input, weight, window)
    kind = resolve("spatially_varying_conv2d", input, backend, KINDS)
    record("spatially_varying_conv2d", kind, input, groups=weight.shape[1])
    if kind == "reference":
        y = reference.spatially_varying_conv2d(
            input, weight, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation,
        )
        return y.contiguous(memory_format=memory_format(input))
    out: Tensor = applied(_VaryingConv, input, weight.flatten(1, 2), window, kind)
    return out


def _check_window(window: Window) -> None:
    kernel_size, stride, padding, dilation = window
    if kernel_size not in KERNEL_SIZES:
        raise ValueError(
            f"kernel_size: expected {', '.join(map(str, KERNEL_SIZES))}; got {kernel_size!r}"
        )
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0),
                               ("dilation", dilation, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _checked_weight(input: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The weights as (N, G, k*k, h, w)."""
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    kernel_size, stride, padding, dilation = window
    taps = kernel_size**2
    check_tensor("weight", weight, (4, 5), f"(N, C*{taps}, H, W) or (N, C, {taps}, H, W)",
                 (input.dtype,))
    check_device("weight", weight, input, "input")
    n, c, h, w = input.shape
    span = dilation * (kernel_size - 1) + 1
    out = tuple((size + 2 * padding - span) // stride + 1 for size in (h, w))
    if min(out) < 1:
        raise ValueError(
            f"input: expected at least {span} x {span} pixels with its padding, got "
            f"{tuple(input.shape)}; lower dilation or raise padding"
        )
    given = tuple(weight.shape)
    if weight.dim() == 4:
        if given[1] % taps:
            raise ValueError(
                f"weight: expected channels divisible by kernel_size**2 = {taps}, got {given} for "
                f"input {tuple(input.shape)}"
            )
        weight = weight.unflatten(1, (given[1] // taps, taps))
    groups = weight.shape[1]
    wanted = (n, groups, taps, *out)
    if tuple(weight.shape) != wanted or groups < 1 or c % groups:
        raise ValueError(
            f"weight: expected (N, G, {taps}, *{out}) with N = {n} and G dividing {c} for input "
            f"{tuple(input.shape)}, got {given}"
        )
    return weight


class _VaryingConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, window: Window, kind: str) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.settings = (window, kind)
        out: Tensor = _conv(kind, input, weight, *window)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        window, kind = ctx.settings
        if torch.is_grad_enabled():
            kernel_size, stride, padding, dilation = window

            def conv(x: Tensor, w: Tensor) -> Tensor:
                return reference.spatially_varying_conv2d(
                    x, w.unflatten(1, (-1, kernel_size**2)), kernel_size=kernel_size,
                    stride=stride, padding=padding, dilation=dilation)

            return (*recorded_gradients(conv, (input, weight), (grad,)), None, None)
        dinput = dweight = None
        if ctx.needs_input_grad[0]:
            dinput = _grad_input(kind, grad, weight, input.shape[2], input.shape[3],
                                 is_channels_last(input), *window)
        if ctx.needs_input_grad[1]:
            dweight = _grad_weight(kind, grad, input, weight, *window)
        return dinput, dweight, None, None


def _conv_fake(input: Tensor, weight: Tensor, kernel_size: int, stride: int, padding: int,
               dilation: int) -> Tensor:
    return empty_nchw((*input.shape[:2], *weight.shape[2:]), input)


def _grad_weight_fake(grad: Tensor, input: Tensor, weight: Tensor, kernel_size: int, stride: int,
                      padding: int, dilation: int) -> Tensor:
    return empty_nchw(tuple(weight.shape), weight)


def _grad_input_fake(grad: Tensor, weight: Tensor, height: int, width: int, channels_last: bool,
                     kernel_size: int, stride: int, padding: int, dilation: int) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*grad.shape[:2], height, width), dtype=grad.dtype, device=grad.device,
                       memory_format=layout)


# Weights are (N, G*k*k, OH, OW): channel group major, then tap.
_conv = RawOp(
    "varying_conv(Tensor input, Tensor weight, int kernel_size, int stride, int padding, "
    "int dilation) -> Tensor",
    _conv_fake,
)
_grad_weight = RawOp(
    "varying_conv_grad_weight(Tensor grad, Tensor input, Tensor weight, int kernel_size, "
    "int stride, int padding, int dilation) -> Tensor",
    _grad_weight_fake,
)
_grad_input = RawOp(
    "varying_conv_grad_input(Tensor grad, Tensor weight, SymInt height, SymInt width, "
    "bool channels_last, int kernel_size, int stride, int padding, int dilation) -> Tensor",
    _grad_input_fake,
)
