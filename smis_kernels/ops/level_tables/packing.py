"""The weights of several norms side by side, in the order in which the level's kernels read them.

Every block of weights is padded with zeros to whole tiles, so that the products need no masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.tensors import acc_dtype

# The largest tile of a product, (columns, depth): on tensor cores; in three TF32 products; in fp64.
TILES = {torch.bfloat16: (128, 64), torch.float16: (128, 64), torch.float32: (64, 32),
         torch.float64: (64, 16)}
LEAST = 16  # columns and depth of the smallest tile
VECTOR = 8  # columns to which a table's place in memory is rounded up: 16 bytes in 16 bits
# Of a tile: its columns of hidden and place in the weight, the weight's row (all three in LEAST),
# steps of a tap, the table's place, row and the tile's first column in it, columns (all in units).
FIELDS = 8


class NormConvs(NamedTuple):
    """The convs of one norm: ``mlp_shared``'s, and those of gamma and beta, all 3x3.

    weight (D, K / shared_groups, 3, 3), bias (D,); weight_gamma and weight_beta
    (C, D / groups, 3, 3), bias_gamma and bias_beta (C,).
    """

    weight: Tensor
    bias: Tensor
    weight_gamma: Tensor
    bias_gamma: Tensor
    weight_beta: Tensor
    bias_beta: Tensor
    shared_groups: int
    groups: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The six that the tables depend on."""
        return self[:6]


class Packed(NamedTuple):
    """What the kernels read of some norms.

    Attributes:
        embedding, embedding_bias: (K, 9, H) and (H,), H the columns of all norms' hidden rows.
        weight, bias: blocks of (9 depth, columns) one after another, and of a tile's columns each.
        tiles: (T, FIELDS) int32, where each tile of a product reads and writes.
        places: of each norm, its table's first column and their number 2C.
        columns: of all tables.
        block_c, block_k: columns and depth of a tile.
        unit: columns that divide all places, up to 16 bytes.
    """

    embedding: Tensor
    embedding_bias: Tensor
    weight: Tensor
    bias: Tensor
    tiles: Tensor
    places: tuple[tuple[int, int], ...]
    columns: int
    block_c: int
    block_k: int
    unit: int


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _tile(norms: Sequence[NormConvs]) -> tuple[int, int]:
    """(columns, depth) of a tile that hardly exceeds what the narrowest norm needs."""
    columns, depth = TILES[norms[0].weight.dtype]
    widest = max(_width(norm) for norm in norms)
    while columns > LEAST and columns // 2 >= widest:
        columns //= 2
    shallowest = min(norm.weight_gamma.shape[1] for norm in norms)
    while depth > LEAST and depth > shallowest:
        depth //= 2
    return columns, depth


def _width(norm: NormConvs) -> int:
    """Columns of the table that read the same hidden channels, side by side."""
    channels = norm.weight_gamma.shape[0]
    return 2 * channels if norm.groups == 1 else channels // norm.groups


def _embedding(norms: Sequence[NormConvs], block_k: int) -> tuple[Tensor, Tensor]:
    first = norms[0].weight
    inputs = first.shape[1] * norms[0].shared_groups
    columns = sum(norm.groups * _up(norm.weight_gamma.shape[1], block_k) for norm in norms)
    weight, bias = first.new_zeros((inputs, 9, columns)), first.new_zeros(columns)
    base = 0
    for norm in norms:
        depth, read = norm.weight_gamma.shape[1], norm.weight.shape[1]
        own = norm.weight.shape[0] // norm.shared_groups  # outputs of a shared group
        taps = norm.weight.reshape(-1, read, 9).permute(1, 2, 0)
        for group in range(norm.groups):
            start, stop = group * depth, (group + 1) * depth
            bias.narrow(0, base, depth).copy_(norm.bias.narrow(0, start, depth))
            while start < stop:  # a piece of one shared group
                shared = start // own
                count = min(stop, (shared + 1) * own) - start
                at = base + start - group * depth
                weight.narrow(0, shared * read, read).narrow(2, at, count).copy_(
                    taps.narrow(2, start, count))
                start += count
            base += _up(depth, block_k)
    return weight, bias


def pack_conv(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A conv (D, K, 3, 3) and its bias as the embedding reads them: (K, 9, H), (H,), padded."""
    padding = (0, _up(len(bias), LEAST) - len(bias))
    return F.pad(weight.flatten(2).permute(1, 2, 0), padding).contiguous(), F.pad(bias, padding)


def pack(norms: Sequence[NormConvs]) -> Packed:
    """Weights of norms that read the same vectors, in one dtype and on one device."""
    block_c, block_k = _tile(norms)
    embedding, embedding_bias = _embedding(norms, block_k)
    acc = acc_dtype(embedding)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    tiles: list[tuple[int, ...]] = []
    places: list[tuple[int, int]] = []
    hidden = placed = start = 0  # columns of hidden, elements of the weight, columns of the tables
    for norm in norms:
        channels, depth = norm.weight_gamma.shape[:2]
        width, padded, deep = _width(norm), _up(_width(norm), block_c), _up(depth, block_k)
        convs = ((norm.weight_gamma, norm.bias_gamma), (norm.weight_beta, norm.bias_beta))
        # The two halves read the same hidden channels: without groups they are one section.
        halves = (convs,) if norm.groups == 1 else tuple((conv,) for conv in convs)
        each = channels // norm.groups
        for half, parts in enumerate(halves):
            for group in range(norm.groups):
                weight = embedding.new_zeros((9, deep, padded))
                bias = embedding.new_zeros(padded, dtype=acc)
                for i, (w, b) in enumerate(parts):
                    taps = w.narrow(0, group * each, each).reshape(each, depth, 9)
                    weight.narrow(1, 0, depth).narrow(2, i * each, each).copy_(
                        taps.permute(2, 1, 0))
                    bias.narrow(0, i * each, each).copy_(b.narrow(0, group * each, each))
                weights.append(weight.view(-1))
                biases.append(bias)
                first = half * channels + group * each
                tiles += [(hidden + group * deep, placed + c, padded, deep // block_k, start,
                           2 * channels, first + c, min(width - c, block_c))
                          for c in range(0, padded, block_c)]
                placed += weight.numel()
        places.append((start, 2 * channels))
        hidden += norm.groups * deep
        start += _up(2 * channels, VECTOR)
    unit = math.gcd(16 // embedding.element_size(), *(n for tile in tiles for n in tile[4:]))
    scales = (LEAST, LEAST, LEAST, 1, unit, unit, unit, unit)
    fields = [[n // scale for n, scale in zip(tile, scales, strict=True)] for tile in tiles]
    return Packed(
        embedding, embedding_bias, torch.cat(weights), torch.cat(biases),
        torch.tensor(fields, dtype=torch.int32, device=embedding.device), tuple(places), start,
        block_c, block_k, unit,
    )
