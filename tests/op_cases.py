"""One small call of every op, for the tests that ask the same of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smis_kernels import (
    LabelLayout,
    class_boxes,
    class_crops,
    conditional_attention,
    conditional_conv2d,
    instance_avg_pool2d,
    instance_edges,
    instance_mean_table,
    modulation,
    modulation_pair,
    norm_act,
    spatially_varying_conv2d,
    spectral_weight,
    winograd_conv2d,
)
from smis_kernels.modules.label_conv import LabelConv2d
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.label_windows.op import number_vectors, number_windows
from smis_kernels.ops.window_table.op import window_embedding, window_table


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fixed numbers of their own for each shape."""
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


X, IDS = draw(2, 4, 6, 5), torch.arange(60).view(2, 6, 5) // 7
INDEX, WINDOWS = (IDS % 3).int(), torch.arange(45, dtype=torch.int32).view(5, 9) % 4
TABLES = draw(4, 6), draw(8, 6, 3, 3), draw(8), draw(8, 6, 3, 3), draw(8)
Call = Callable[..., Any]

PUBLIC: dict[str, Call] = {
    "modulation": lambda **o: modulation(X, X, X, training=True, **o),
    "modulation_pair": lambda **o: modulation_pair(X, X, X, X, X, training=True, **o),
    "norm_act": lambda **o: norm_act(X, X, activation="relu", **o),
    "indexed_modulation": lambda **o: indexed_modulation(X, INDEX, draw(3, 8), **o),
    "indexed_modulation_pair": lambda **o: indexed_modulation_pair(
        X, INDEX, draw(3, 8), draw(3, 8), **o),
    "conditional_attention": lambda **o: conditional_attention(X, X, **o),
    "conditional_conv2d": lambda **o: conditional_conv2d(X, X, draw(36, 4, 3, 3), **o),
    "spatially_varying_conv2d": lambda **o: spatially_varying_conv2d(X, draw(2, 36, 6, 5), **o),
    "winograd_conv2d": lambda **o: winograd_conv2d(X, draw(6, 4, 3, 3), **o),
    "spectral_weight": lambda **o: spectral_weight(draw(5, 4, 3, 3), draw(5), draw(36), **o),
    "window_table": lambda **o: window_table(*TABLES, WINDOWS, **o),
    "window_embedding": lambda **o: window_embedding(*TABLES[:3], WINDOWS, **o),
    "number_vectors": lambda **o: number_vectors(INDEX[:, None].float(), 100, **o),
    "number_windows": lambda **o: number_windows(INDEX + 1, 100, **o),
    "label_conv": lambda **o: LabelConv2d(
        LabelLayout.from_labels(IDS % 4, 4), draw(3, 4, 3, 3), **o).rows(0, 6),
    "class_boxes": lambda **o: class_boxes(X, IDS % 4, 4, **o),
    "class_crops": lambda **o: class_crops(X, IDS % 4, 4, size=4, **o),
    "instance_edges": lambda **o: instance_edges(IDS, **o),
    "instance_avg_pool2d": lambda **o: instance_avg_pool2d(X, IDS, **o),
    "instance_mean_table": lambda **o: instance_mean_table(X, IDS, **o),
}
