"""Level tables: gamma and beta of every norm of a resolution, in two launches for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import check_device, check_rows, check_shape, check_tensor
from ...runtime.library import RawOp
from . import reference, spelled
from .packing import TILES, NormConvs, Packed, pack, pack_conv

KINDS = ("cpu", "triton")
_TRITON = "smis_kernels.ops.level_tables.triton:"
__all__ = ["NormConvs", "Packed", "embedded_rows", "level_tables", "pack", "pack_conv",
           "symbol_entries"]


def level_tables(
    vectors: Tensor, windows3: Tensor, windows5: Tensor, norms: Sequence[NormConvs], *,
    packed: Packed | None = None, entries: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    r"""The tables of all norms that read one label map at one resolution, made together.

    .. math:: h_v = \mathrm{ReLU}(b + \sum_t W_t E[s_{v,t}]), \quad
              G_u = b' + \sum_t W'_t h_{v_{u,t}}

    Args:
        vectors: E, (S + 1, K), float32 or float64; row 0 zero. Their few nonzero entries pick
            rows of W: of a one-hot map one.
        windows3: (V + 1, 9) int32 rows of ``vectors``; windows5: (U + 1, 9) int32 3x3-window ids.
        norms: their convs, of one dtype.
        packed: what :func:`pack` made of them, kept.
        entries: what :func:`symbol_entries` made of ``vectors``, kept.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A table (U + 1, 2C) for every norm, rows [gamma | beta] in the dtype of the weights; row 0
        is zero. h is rounded to that dtype, as the convs would round it. Not differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        ValueError: windows of rows or ids that there are not. A GPU is not made to wait for that
            check: there such a tap counts as outside the image.

    Example:
        >>> vectors = torch.cat([torch.zeros(1, 4), torch.eye(4)])
        >>> w3, w5 = (torch.randint(5, (7, 9), dtype=torch.int32) for _ in range(2))
        >>> gamma, beta = torch.randn(2, 8, 6, 3, 3)
        >>> norm = NormConvs(torch.randn(6, 4, 3, 3), torch.zeros(6), gamma, torch.zeros(8), beta,
        ...                  torch.zeros(8), shared_groups=1, groups=1)
        >>> [table.shape for table in level_tables(vectors, w3, w5, [norm])]
        [torch.Size([7, 16])]
    """
    check_tensor("vectors", vectors, 2, "(S, K)", (torch.float32, torch.float64))
    for name, windows in (("windows3", windows3), ("windows5", windows5)):
        check_tensor(name, windows, 2, "(V, 9)", (torch.int32,))
        check_shape(name, windows, (windows.shape[0], 9), "(nine taps)")
        check_device(name, windows, vectors, "vectors")
    _check_norms(norms, vectors)
    kind = resolve("level_tables", vectors, backend, KINDS)
    checked = "reference" if kind == "cpu" else kind  # which is spelled in torch
    check_rows("windows3", windows3, vectors.shape[0], checked)
    check_rows("windows5", windows5, windows3.shape[0], checked)
    if kind == "reference":
        wide = vectors.to(norms[0].weight.dtype)
        return reference.level_tables(wide, windows3, windows5, norms)
    if torch.is_grad_enabled() and any(t.requires_grad for norm in norms for t in norm.tensors):
        raise ValueError("norms: expected convs without gradients, got some that require them; "
                         "use window_table, or torch.no_grad()")
    packed = pack(norms) if packed is None else packed
    channels, values, counts = symbol_entries(vectors, kind) if entries is None else entries
    hidden = _level_embedding(kind, channels, values, counts, packed.embedding,
                              packed.embedding_bias, windows3, True)
    rows = windows5.shape[0]
    flat: Tensor = _level_product(kind, hidden, packed.weight, packed.bias, packed.tiles, windows5,
                                  packed.columns, packed.block_c, packed.block_k, packed.unit)
    return [flat.narrow(0, rows * start, rows * columns).view(rows, columns)
            for start, columns in packed.places]


def symbol_entries(vectors: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of each vector that are not zero, first: channels, values (S + 1, K), counts."""
    channels, values, counts = _symbol_entries(kind, vectors)
    return channels, values, counts


def embedded_rows(entries: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor,
                  windows3: Tensor, kind: str) -> Tensor:
    """A conv on each window, (V + 1, H) in the dtype of the weight: what :func:`pack_conv` gave.

    ``entries`` are those of :func:`symbol_entries`. Row 0 is zero. Not differentiable.
    """
    rows: Tensor = _level_embedding(kind, *entries, weight, bias, windows3, False)
    return rows


def _check_norms(norms: Sequence[NormConvs], vectors: Tensor) -> None:
    if not norms:
        raise ValueError("norms: expected at least one, got none")
    dtype = norms[0].weight.dtype
    for i, norm in enumerate(norms):
        depth, channels = norm.weight.shape[0], norm.weight_gamma.shape[0]
        shared = vectors.shape[1] // norm.shared_groups
        shapes = ((depth, shared, 3, 3), (depth,),
                  *((channels, depth // norm.groups, 3, 3), (channels,)) * 2)
        for name, tensor, shape in zip(NormConvs._fields, norm.tensors, shapes, strict=False):
            check_shape(f"norms[{i}].{name}", tensor, shape, "for the vectors and groups given")
            check_tensor(f"norms[{i}].{name}", tensor, len(shape), str(shape),
                         (dtype,) if dtype in TILES else tuple(TILES))
            check_device(f"norms[{i}].{name}", tensor, vectors, "vectors")


def _entries_fake(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = vectors.new_empty(vectors.shape, dtype=torch.int32)
    return channels, vectors.new_empty(vectors.shape), channels.new_empty(vectors.shape[:1])


def _embedding_fake(channels: Tensor, values: Tensor, counts: Tensor, weight: Tensor,
                    bias: Tensor, windows: Tensor, relu: bool) -> Tensor:
    return weight.new_empty((windows.shape[0], weight.shape[2]))


def _product_fake(hidden: Tensor, weight: Tensor, bias: Tensor, tiles: Tensor, windows: Tensor,
                  columns: int, block_c: int, block_k: int, unit: int) -> Tensor:
    return hidden.new_empty(windows.shape[0] * columns)


_symbol_entries = RawOp("symbol_entries(Tensor vectors) -> (Tensor, Tensor, Tensor)",
                        _entries_fake, _TRITON + "symbol_entries", spelled.symbol_entries)
# (K, 9, H) weight -> (V, H): the sum of the rows that each window's entries pick, or its ReLU.
_level_embedding = RawOp(
    "level_embedding(Tensor channels, Tensor values, Tensor counts, Tensor weight, Tensor bias, "
    "Tensor windows, bool relu) -> Tensor",
    _embedding_fake, _TRITON + "level_embedding", spelled.level_embedding)
# (V, H) hidden rows -> the tables (U, 2C) of all norms, one after another.
_level_product = RawOp(
    "level_product(Tensor hidden, Tensor weight, Tensor bias, Tensor tiles, Tensor windows, "
    "int columns, int block_c, int block_k, int unit) -> Tensor",
    _product_fake, _TRITON + "level_product", spelled.level_product)
