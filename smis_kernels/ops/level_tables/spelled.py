"""The level's kernels spelled in torch: on a CPU, where norms make their own tables faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.tensors import acc_dtype
from ..window_table.reference import window_sum
from .packing import LEAST


def symbol_entries(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    some = vectors != 0
    order = torch.argsort((~some).int(), dim=1, stable=True)
    return order.int(), vectors.gather(1, order), some.sum(1).int()


def level_embedding(channels: Tensor, values: Tensor, counts: Tensor, weight: Tensor,
                    bias: Tensor, windows: Tensor, relu: bool) -> Tensor:
    acc, columns = acc_dtype(weight), weight.shape[2]
    used = torch.arange(channels.shape[1]) < counts[:, None]
    vectors = torch.zeros_like(values).scatter_add_(
        1, channels.long().where(used, 0), values.where(used, 0))
    rows = (vectors.to(acc) @ weight.to(acc).flatten(1)).view(-1, 9, columns)
    sums = window_sum(rows, windows) + bias.to(acc)
    hidden = F.relu(sums) if relu else sums
    hidden[0] = 0
    return hidden.to(weight.dtype)


def level_product(hidden: Tensor, weight: Tensor, bias: Tensor, tiles: Tensor, windows: Tensor,
                  columns: int, block_c: int, block_k: int, unit: int) -> Tensor:
    count, acc = windows.shape[0], bias.dtype
    out = hidden.new_zeros(count * columns)
    for i, (base, at, stride, steps, start, width, first, valid) in enumerate(tiles.tolist()):
        deep = steps * block_k
        rows = hidden.narrow(1, base * LEAST, deep)[windows.long()].flatten(1).to(acc)
        block = weight.as_strided((9 * deep, block_c), (stride * LEAST, 1), at * LEAST).to(acc)
        made = rows @ block + bias.narrow(0, i * block_c, block_c)
        made[0] = 0
        table = out.narrow(0, count * start * unit, count * width * unit).view(count, -1)
        table.narrow(1, first * unit, valid * unit).copy_(made[:, : valid * unit])
    return out
