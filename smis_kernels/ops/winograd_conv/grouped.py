"""Grouped 3x3 convs on a GPU: in the form that measured fastest for the shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.tuned import measured

FORMS = ("grouped", "split", "dense")


def shape_key(input: Tensor, outputs: int, groups: int) -> str:
    """How measured shapes are named."""
    size = "x".join(map(str, input.shape))
    return f"{str(input.dtype).removeprefix('torch.')} {size} -> {outputs}, {groups} groups"


def form_of(input: Tensor, outputs: int, groups: int) -> str:
    """The form for a shape: "grouped" (torch's own) unless another measured faster on this GPU."""
    if groups == 1 or not input.is_cuda:
        return "grouped"
    found: str = (measured("convs", input.device) or {}).get(
        shape_key(input, outputs, groups), "grouped")
    return found


def conv_in_form(form: str, input: Tensor, weight: Tensor, bias: Tensor | None, padding: int,
                 groups: int) -> Tensor:
    """``F.conv2d`` as one grouped conv, a conv for each group, or a dense one with zero blocks.

    Shapes: input (N, C, H, W), weight (C', C / groups, 3, 3).
    """
    if form == "split":
        parts = zip(input.chunk(groups, 1), weight.chunk(groups), strict=True)
        y = torch.cat([F.conv2d(x, w, padding=padding) for x, w in parts], 1)
        return y if bias is None else y + bias.to(y.dtype).view(1, -1, 1, 1)
    if form == "dense":
        outputs, each = weight.shape[:2]
        blocks = weight.view(groups, outputs // groups, each, *weight.shape[2:])
        filled = weight.new_zeros((groups, outputs // groups, groups, each, *weight.shape[2:]))
        index = torch.arange(groups, device=weight.device)
        filled[index, :, index] = blocks
        whole = filled.view(outputs, groups * each, *weight.shape[2:])
        return F.conv2d(input, whole, bias, padding=padding)
    if form != "grouped":
        raise ValueError(f"form: expected one of {', '.join(FORMS)}; got {form!r}")
    return F.conv2d(input, weight, bias, padding=padding, groups=groups)


def direct_conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, padding: int,
                   groups: int) -> Tensor:
    """The direct conv, in the form for its shape."""
    form = form_of(input, weight.shape[0], groups)
    return conv_in_form(form, input, weight, bias, padding, groups)
