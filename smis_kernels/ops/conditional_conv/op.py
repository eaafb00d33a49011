"""Conditional convolution: per-pixel kernels are predicted tile by tile and consumed at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import FLOATS, autocast_as_conv, check_device, check_shape, check_tensor
from ...runtime.derivatives import applied, recorded_gradients
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import empty_nchw, memory_format
from ..winograd_conv.choice import largest_tile
from ..winograd_conv.op import TILES
from . import reference

KINDS = ("cpu", "triton")
_LEAST_PIXELS = 24 * 24  # of an image, for tiles of 4x4
_TRITON = "smis_kernels.ops.conditional_conv.triton"


def conditional_conv2d(input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None = None,
                       *, tile: int = 2, backend: str | None = None) -> Tensor:
    r"""A depthwise 3x3 convolution whose kernels another 3x3 convolution predicts, in one pass.

    .. math:: y_c(p) = \sum_k w_{c,k}(p)\, x_c(p + k), \quad
              w = \mathrm{conv2d}(\mathrm{condition}, \mathrm{weight}, \mathrm{bias})

    The predicted kernels (N, 9C, H, W) never exist in memory; their gradient does on a GPU, 20 MB
    at a time.

    Args:
        input: x, (N, C, H, W); float32, float64, float16 or bfloat16. Zeros lie outside. Under
            autocast all four are cast to its dtype, as conv2d casts them.
        condition: (N, D, H, W), what the kernels are predicted from.
        weight: (9C, D, 3, 3), channel-major then kernel tap. bias: (9C,) or None.
        tile: m, 2 or 4 pixels, of the Winograd form in which the CPU predicts: 4 multiplies less
            and rounds more. The gradients are those of 2. Other backends do not read it.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (N, C, H, W) in the input's dtype and memory format; differentiable twice in all four.
        On the CPU kernels are predicted with F(m x m, 3x3) Winograd sums, for m = 2 as accurate in
        fp32 as direct ones; on a GPU with three TF32 products, as accurate too; 16-bit inputs are
        summed in fp32. On a GPU the gradients of condition, weight and bias are torch's
        convolution's: torch.backends.cudnn says whether in TF32, and whether deterministic.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together.
        BackendError: the backend asked for cannot run here.

    Source: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions", 2019.

    Example:
        >>> x, h = torch.randn(1, 8, 16, 16), torch.randn(1, 4, 16, 16)
        >>> y = conditional_conv2d(x, h, torch.randn(72, 4, 3, 3))
    """
    input, condition, weight, bias = autocast_as_conv(  # type: ignore[assignment]
        input, condition, weight, bias)
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    check_tensor("condition", condition, 4, "(N, D, H, W)", (input.dtype,))
    check_tensor("weight", weight, 4, "(9C, D, 3, 3)", (input.dtype,))
    n, c, h, w = input.shape
    depth = condition.shape[1]
    check_shape("condition", condition, (n, depth, h, w),
                f"to match input {tuple(input.shape)}")
    check_shape("weight", weight, (9 * c, depth, 3, 3),
                f"for input {tuple(input.shape)} and condition {tuple(condition.shape)}")
    check_device("condition", condition, input, "input")
    check_device("weight", weight, input, "input")
    if bias is not None:
        check_tensor("bias", bias, 1, "(9C,)", (input.dtype,))
        check_shape("bias", bias, (9 * c,), f"to match weight {tuple(weight.shape)}")
        check_device("bias", bias, input, "input")
    if tile not in TILES:
        raise ValueError(f"tile: expected 2 or 4, got {tile}")
    kind = resolve("conditional_conv2d", input, backend, KINDS)
    tile = tile if kind == "cpu" else 2
    record("conditional_conv2d", kind, input, condition=depth, tile=tile)
    if kind == "reference":
        y = reference.conditional_conv2d(input, condition, weight, bias)
        return y.contiguous(memory_format=memory_format(input))
    out: Tensor = applied(_ConditionalConv, input, condition, weight, bias, kind, tile)
    return out


def best_tile(input: Tensor) -> int:
    """The tile expected to be fastest outside of training, of those that may be taken.

    The transform of the weights, which more pixels share, takes twice as long for 4. A GPU has no
    tiles; sizes that are not known yet, of an export, are small ones.
    """
    h, w = input.shape[2:]
    if not input.is_cpu or type(h) is not int or type(w) is not int or h * w < _LEAST_PIXELS:
        return 2
    return largest_tile()


class _ConditionalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None,
                kind: str, tile: int) -> Tensor:
        ctx.save_for_backward(input, condition, weight, bias)
        ctx.kind = kind
        out: Tensor = _conv(kind, input, condition, weight, bias, *(() if tile == 2 else (tile,)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        need_input, need_condition, need_weight, need_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            given = [t for t in ctx.saved_tensors if t is not None]

            def conv(x: Tensor, condition: Tensor, weight: Tensor,
                     bias: Tensor | None = None) -> Tensor:
                return reference.conditional_conv2d(x, condition, weight, bias)

            gradients = recorded_gradients(conv, given, (grad,))
            return (*gradients, *(None,) * (6 - len(gradients)))
        need_weight = need_weight or need_bias
        needs = (need_input, need_condition, need_weight, need_bias)
        found = _backward(ctx.kind, grad, *ctx.saved_tensors, need_input, need_condition,
                          need_weight)
        return (*(t if need else None for t, need in zip(found, needs, strict=True)), None, None)


def _conv_fake(input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None,
               tile: int = 2) -> Tensor:
    return empty_nchw(tuple(input.shape), input)


def _backward_fake(
    grad: Tensor, input: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None,
    need_input: bool, need_condition: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = input.new_empty(0)
    return (
        empty_nchw(tuple(input.shape), input) if need_input else none,
        empty_nchw(tuple(condition.shape), condition) if need_condition else input.new_empty(0),
        input.new_empty(weight.shape) if need_weight else input.new_empty(0),
        input.new_empty(weight.shape[0]) if need_weight else input.new_empty(0),
    )


_conv = RawOp(
    "conditional_conv(Tensor input, Tensor condition, Tensor weight, Tensor? bias, int tile=2) "
    "-> Tensor",
    _conv_fake, triton=f"{_TRITON}:conditional_conv",
)
# -> gradients of input, condition, weight and bias; those not needed are empty. The predicted
# kernels are computed anew.
_backward = RawOp(
    "conditional_conv_backward(Tensor grad, Tensor input, Tensor condition, Tensor weight, "
    "Tensor? bias, bool need_input, bool need_condition, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake, triton=f"{_TRITON}:conditional_conv_backward",
)
