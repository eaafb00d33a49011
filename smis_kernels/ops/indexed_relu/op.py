"""Indexed ReLU: a row of a small table added to every pixel, ReLU, channels taken apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import FLOATS, check_device, check_rows, check_shape, check_tensor
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import acc_dtype, empty_nchw
from . import reference, spelled

KINDS = ("cpu", "triton")
_TRITON = "smis_kernels.ops.indexed_relu.triton:"


def indexed_relu(input: Tensor, index: Tensor, table: Tensor, parts: int, *,
                 backend: str | None = None) -> list[Tensor]:
    r"""Add the row that each pixel picks, and ReLU; every part of the channels becomes a tensor.

    .. math:: y_k(p) = \mathrm{ReLU}(x_k(p) + T_{u(p), k})

    with k the parts of the channels: what several convs that read a label map and features have in
    common, x their sums over the features, T those over the map's distinct windows.

    Args:
        input: x, (N, C, H, W), float32, float64, float16 or bfloat16; channels-last is the fast
            layout.
        index: u, (N, H, W) int32 rows of the table.
        table: T, (U, C), float32 (float64 for a float64 input) or of the input's dtype.
        parts: a divisor K of the channels.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        K tensors (N, C / K, H, W) in the input's dtype and memory format, dense. The
        kernels are not differentiable; the reference is.

    Raises:
        ValueError, TypeError: an argument does not fit, or requires a gradient of a kernel where
            gradients are enabled; the message names it.
        ValueError: a row that the table has not. A GPU is not made to wait for that check: there
            such a pixel is NaN.
        BackendError: the backend asked for cannot run here.

    Source: the first prediction convs of Liu et al., "Learning to Predict Layout-to-image
    Conditional Convolutions", 2019.

    Example:
        >>> x, table = torch.randn(1, 8, 4, 4), torch.randn(3, 8)
        >>> index = torch.arange(16, dtype=torch.int32).view(1, 4, 4) % 3
        >>> [y.shape for y in indexed_relu(x, index, table, 2)]
        [torch.Size([1, 4, 4, 4]), torch.Size([1, 4, 4, 4])]
    """
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    n, c, h, w = input.shape
    if parts < 1 or c % parts:
        raise ValueError(f"parts: expected a divisor of the {c} channels, got {parts}")
    check_tensor("index", index, 3, "(N, H, W)", (torch.int32,))
    check_shape("index", index, (n, h, w), "for the input's pixels")
    check_tensor("table", table, 2, "(U, C)", tuple({acc_dtype(input): 0, input.dtype: 0}))
    check_shape("table", table, (table.shape[0], c), "(the input's channels)")
    check_device("index", index, input, "input")
    check_device("table", table, input, "input")
    kind = resolve("indexed_relu", input, backend, KINDS)
    check_rows("index", index, table.shape[0], "reference" if kind == "cpu" else kind)
    record("indexed_relu", kind, input, rows=table.shape[0] - 1, parts=parts)
    if kind == "reference" or input.numel() == 0:
        return reference.indexed_relu(input, index, table, parts)
    for name, tensor in (("input", input), ("table", table)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name}: expected one without gradients, got one that requires them; "
                             "call it in torch.no_grad(), or give backend=\"reference\"")
    found: Tensor = _indexed_relu(kind, input, index, table, parts)
    return list(found.split(n))


def _fake(input: Tensor, index: Tensor, table: Tensor, parts: int) -> Tensor:
    n, c, h, w = input.shape
    return empty_nchw((parts * n, c // parts, h, w), input)


# Parts one after another along the batch.
_indexed_relu = RawOp("indexed_relu(Tensor input, Tensor index, Tensor table, int parts) -> Tensor",
                      _fake, _TRITON + "indexed_relu", spelled.indexed_relu)
