"""3x3 convs that read a label map, or it and features: the map's part in rows for its windows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.indexed_relu.op import KINDS as PASS_KINDS
from ..ops.indexed_relu.op import indexed_relu
from ..ops.level_tables.op import KINDS, embedded_rows, pack_conv
from ..ops.window_table.op import window_embedding
from ..ops.winograd_conv.choice import conv3x3
from ..runtime.backend import resolve
from ..runtime.check import autocast_enabled
from ..runtime.constants import constant, keeps
from ..runtime.tensors import acc_dtype
from . import shared_tables
from .label_layout import LabelLayout

# Bytes that the sums of convs made together may take: of larger ones the launches do not count.
MOST_TOGETHER = 2**28


def label_rows(layout: LabelLayout, size: tuple[int, int], weight: Tensor,
               bias: Tensor | None) -> Tensor:
    """A 3x3 conv of the map at ``size`` on each of its windows: (V + 1, D), row 0 zero.

    Weight (D, K, 3, 3), bias (D,). In the weight's dtype where a GPU picks rows of constants, else
    in that of sums.
    """
    dtype, windows = acc_dtype(weight), layout.level(size).windows3
    if bias is not None and _constants(layout, weight, bias):
        kind = resolve("level_tables", weight, None, KINDS)
        if kind in shared_tables.SHARING:
            packed = constant("rows", partial(pack_conv, weight, bias), weight, bias)
            rows = embedded_rows(shared_tables.entries_of(layout, dtype), *packed, windows, kind)
            return rows[:, : len(bias)]
    weight = constant(("wide", dtype), partial(weight.to, dtype), weight)
    if bias is not None:
        bias = constant(("wide", dtype), partial(bias.to, dtype), bias)
    return window_embedding(layout.vectors.to(dtype), weight, bias, windows, relu=False,
                            order=layout.window_order(windows, 1))


def conditioned_convs(layout: LabelLayout, features: Tensor,
                      convs: Sequence[nn.Conv2d]) -> list[Tensor] | None:
    """The ReLU of each 3x3 conv of the map's planes and the features, concatenated, all at once.

    One conv, one embedding and one pass serve all, as wide as each other and with biases. For a
    GPU's inference with weights that are constants, all in the dtype of the features; elsewhere,
    and where the sums take too much memory, None: the convs are then made one by one.

    Shapes: features (N, F, H, W) -> (N, D, H, W) for each conv of (K + F) channels.
    """
    weights = tuple(c.weight for c in convs)
    biases = tuple(c.bias for c in convs if c.bias is not None)
    if len(biases) < len(convs) or len({len(w) for w in weights}) > 1:
        return None
    n, _, h, w = features.shape
    taken = n * h * w * len(convs) * len(weights[0]) * features.element_size()
    if taken > MOST_TOGETHER or not _together(layout, features, *weights, *biases):
        return None
    labels = layout.shape[1]
    of_map, of_features, bias = constant(
        ("side by side", labels), partial(_side_by_side, weights, biases, labels),
        *weights, *biases)
    x = conv3x3(features, of_features, largest=4)
    rows = label_rows(layout, (h, w), of_map, bias)
    return indexed_relu(x, layout.level((h, w)).index3, rows, len(convs))


def _side_by_side(weights: Sequence[Tensor], biases: Sequence[Tensor],
                  labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """All convs as one: its weight for the map, that for the features, its bias."""
    weight = torch.cat(list(weights))
    # channels-last as the features are: a conv copies a weight that is not at every call
    of_features = weight[:, labels:].contiguous(memory_format=torch.channels_last)
    return weight[:, :labels].contiguous(), of_features, torch.cat(list(biases))


def _constants(layout: LabelLayout, *tensors: Tensor) -> bool:
    """Whether what follows from the tensors is kept, and the map's vectors carry no gradient."""
    vectors = layout.vectors
    return (keeps(*tensors) and not (torch.is_grad_enabled() and vectors.requires_grad)
            and all(t.device == vectors.device for t in tensors))


def _together(layout: LabelLayout, features: Tensor, *tensors: Tensor) -> bool:
    if not _constants(layout, *tensors) or autocast_enabled(features):
        return False
    if torch.is_grad_enabled() and features.requires_grad:
        return False
    if any((t.dtype, t.device) != (features.dtype, features.device) for t in tensors):
        return False
    return resolve("indexed_relu", features, None, PASS_KINDS) in shared_tables.SHARING
