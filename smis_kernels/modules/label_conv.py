"""A conv of a label layout as sums of table rows: the one-hot planes are never built."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.label_layout import LabelLayout
from ..ops.label_conv import reference
from ..ops.label_conv.op import KINDS, label_conv_op
from ..runtime.backend import resolve
from ..runtime.check import FLOATS, check_shape, check_tensor
from ..runtime.explain import record
from ..runtime.tensors import acc_dtype


class LabelConv2d:
    r"""A reflection-padded conv of one label layout, asked for in rows; for inference.

    .. math:: y(p) = b + \sum_t W_t E[s(p + t)]

    with s the symbol at a pixel and E its vector: every tap's product is a table row.

    Args:
        layout: of the label maps, K channels, larger than half the kernel.
        weight: (C, K, k, k), k odd, float32, float64, float16 or bfloat16.
        bias: (C,) or None.
        backend: "auto", "reference" or "cpu".

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> layout = LabelLayout.from_labels(torch.randint(5, (1, 32, 32)), 5)
        >>> LabelConv2d(layout, torch.randn(8, 5, 7, 7)).rows(0, 32).shape
        torch.Size([1, 8, 32, 32])
    """

    def __init__(self, layout: LabelLayout, weight: Tensor, bias: Tensor | None = None, *,
                 backend: str | None = None) -> None:
        check_tensor("weight", weight, 4, "(C, K, k, k)", FLOATS)
        _, channels, height, width = layout.shape
        size = weight.shape[-1]
        check_shape("weight", weight, (weight.shape[0], channels, size, size), "for the layout")
        if size % 2 == 0 or size // 2 >= min(height, width):
            raise ValueError(f"weight: expected an odd kernel that half fits the map "
                             f"({height}, {width}), got {size}")
        if bias is not None:
            check_shape("bias", bias, (weight.shape[0],), "for the weight")
        self.layout = layout
        self._kind = resolve("label_conv2d", weight, backend, KINDS)
        record("label_conv2d", self._kind, layout.symbols, symbols=len(layout.vectors) - 1)
        weight = weight.detach()
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
        if self._kind == "reference":
            planes = layout.dense(dtype=weight.dtype)
            self._whole = reference.label_conv2d(planes, weight, bias)
            return
        dtype = acc_dtype(weight)
        taps = weight.to(dtype).permute(2, 3, 1, 0)  # [k, k, K, C]
        with torch.autocast(weight.device.type, enabled=False):  # the kernel sums in this dtype
            self._table = layout.vectors.to(dtype) @ taps  # [k, k, S + 1, C]
        self._sums = self._table.sum(1)
        self._bias, self._like = bias.to(dtype, copy=True), weight

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the output: (N, C, last - first, W), channels-last."""
        height = self.layout.shape[2]
        if not 0 <= first < last <= height:
            raise ValueError(f"first, last: expected rows of 0..{height}, got {first}, {last}")
        if self._kind == "reference":
            part = self._whole[:, :, first:last]
            return part.contiguous(memory_format=torch.channels_last)
        out: Tensor = label_conv_op(self._kind, self.layout.symbols, self._table, self._sums,
                                    self._bias, self._like, first, last)
        return out
