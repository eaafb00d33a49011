"""GPU kernels of level tables: rows of weights picked by symbols, and one product for all norms."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.triton_support import (
    SIZES,
    CompileCase,
    acc_type,
    known_row,
    meta,
    narrowed,
    on_device,
    product,
    product_precision,
)
from .packing import FIELDS, LEAST, NormConvs, pack

# Rows, warps and stages of a product's tile by its operands; columns and depth are as packed.
PRODUCT = {torch.bfloat16: (128, 8, 3), torch.float16: (128, 8, 3), torch.float32: (64, 8, 3),
           torch.float64: (64, 8, 3)}
EMBEDDED_ROWS, EMBEDDED_COLUMNS = 16, 128


@triton.jit
def symbol_entries_kernel(vectors, channels, values, counts, K, BLOCK: tl.constexpr):
    # the first entry of a vector of zeros is a zero too: who reads one entry needs no count
    s = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(vectors + s * K + k, mask=k < K, other=0.0)
    some = value != 0
    at = s * K + tl.cumsum(some.to(tl.int32), 0) - 1
    count = tl.sum(some.to(tl.int32), 0)
    tl.store(channels + at, k, mask=some)
    tl.store(values + at, value, mask=some)
    tl.store(counts + s, count)
    tl.store(channels + s * K, 0, mask=count == 0)
    tl.store(values + s * K, 0.0, mask=count == 0)


@triton.jit
def _picked(channels, values, weight, entry, some, tap, c, columns, within, ACC: tl.constexpr):
    """The rows of ``weight`` that entries pick at a tap, times their values."""
    value = tl.load(values + entry, mask=some, other=0.0).to(ACC)
    channel = tl.load(channels + entry, mask=some, other=0).to(tl.int64)
    # a weight that is not read cannot spoil a sum
    row = tl.load(weight + (channel * 9 + tap)[:, None] * columns + c[None, :],
                  mask=(value != 0)[:, None] & within[None, :], other=0.0)
    return value[:, None] * row.to(ACC)


@triton.jit(do_not_specialize=SIZES)
def level_embedding_kernel(
    channels, values, counts, weight, bias, windows, out, rows, sources, K, steps,
    RELU: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = steps * UNIT
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = c < columns
    last = tl.minimum(r, rows - 1) * 9
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    total += tl.load(bias + c, mask=within, other=0.0).to(ACC)[None, :]
    most = tl.zeros((BLOCK_R,), tl.int32)
    for tap in tl.static_range(9):  # the one entry of a one-hot vector: loads overlap
        symbol = known_row(tl.load(windows + last + tap), sources)
        most = tl.maximum(most, tl.load(counts + symbol))
        total += _picked(channels, values, weight, symbol * K, r < rows, tap, c, columns, within,
                         ACC)
    for entry in range(1, tl.max(most, 0)):
        for at in range(9):
            symbol = known_row(tl.load(windows + last + at), sources)
            total += _picked(channels, values, weight, symbol * K + entry,
                             entry < tl.load(counts + symbol), at, c, columns, within, ACC)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN passes
    total = tl.where((r > 0)[:, None], total, 0.0)
    tl.store(out + r[:, None] * columns + c[None, :], narrowed(total, out),
             mask=(r < rows)[:, None] & within[None, :])


@triton.jit(do_not_specialize=SIZES)
def level_product_kernel(
    hidden, weight, bias, tiles, windows, out, rows, sources, chunks,
    UNIT: tl.constexpr, LEAST: tl.constexpr, FIELDS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A tile of one norm's table: the sum over the taps of each window, as ``tiles`` places it."""
    tile = tiles + tl.program_id(1) * FIELDS
    base, at = tl.load(tile) * LEAST, tl.load(tile + 1).to(tl.int64) * LEAST
    stride, steps = tl.load(tile + 2) * LEAST, tl.load(tile + 3)
    start, width = tl.load(tile + 4).to(tl.int64) * UNIT, tl.load(tile + 5) * UNIT
    first, valid = tl.load(tile + 6) * UNIT, tl.load(tile + 7) * UNIT
    columns = chunks * LEAST
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    last = tl.minimum(r, rows - 1) * 9
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    # one loop over taps and depth without a mask: blocks of weights are padded to whole tiles
    for step in range(9 * steps):
        row = known_row(tl.load(windows + last + step // steps), sources)
        deep = base + step % steps * BLOCK_K + k
        a = tl.load(hidden + (row * columns)[:, None] + deep[None, :])
        b = tl.load(weight + at + (step * BLOCK_K + k)[:, None] * stride + c[None, :])
        total = product(a, b, total, PRECISION, ACC)
    total += tl.load(bias + tl.program_id(1) * BLOCK_C + c)[None, :]
    total = tl.where((r > 0)[:, None], total, 0.0)
    to = out + start * rows + first + r[:, None] * width + c[None, :]
    tl.store(to, narrowed(total, out), mask=(r < rows)[:, None] & (c < valid)[None, :])


def symbol_entries(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    vectors = vectors.contiguous()
    count, depth = vectors.shape
    channels = vectors.new_empty((count, depth), dtype=torch.int32)
    values, counts = torch.empty_like(vectors), channels.new_empty(count)
    with on_device(vectors):
        symbol_entries_kernel[(count,)](
            vectors, channels, values, counts, depth, BLOCK=triton.next_power_of_2(depth))
    return channels, values, counts


def level_embedding(channels: Tensor, values: Tensor, counts: Tensor, weight: Tensor,
                    bias: Tensor, windows: Tensor, relu: bool) -> Tensor:
    windows = windows.contiguous()
    rows, columns = windows.shape[0], weight.shape[2]
    out = weight.new_empty((rows, columns))
    grid = (triton.cdiv(rows, EMBEDDED_ROWS), triton.cdiv(columns, EMBEDDED_COLUMNS))
    with on_device(weight):
        level_embedding_kernel[grid](
            channels, values, counts, weight, bias, windows, out, rows, channels.shape[0],
            channels.shape[1], columns // LEAST, RELU=relu, UNIT=LEAST, ACC=acc_type(weight),
            BLOCK_R=EMBEDDED_ROWS, BLOCK_C=EMBEDDED_COLUMNS, num_warps=4,
        )
    return out


def level_product(hidden: Tensor, weight: Tensor, bias: Tensor, tiles: Tensor, windows: Tensor,
                  columns: int, block_c: int, block_k: int, unit: int) -> Tensor:
    windows = windows.contiguous()
    rows = windows.shape[0]
    out = hidden.new_empty(rows * columns)
    block_r, warps, stages = PRODUCT[hidden.dtype]
    with on_device(hidden):
        level_product_kernel[(triton.cdiv(rows, block_r), tiles.shape[0])](
            hidden, weight, bias, tiles, windows, out, rows, hidden.shape[0],
            hidden.shape[1] // LEAST, UNIT=unit, LEAST=LEAST, FIELDS=FIELDS,
            PRECISION=product_precision(hidden), ACC=acc_type(hidden), BLOCK_R=block_r,
            BLOCK_C=block_c, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )
    return out


def _compile_cases() -> list[CompileCase]:
    cases: list[CompileCase] = []
    windows3, windows5 = (meta(n, 9, dtype=torch.int32) for n in (777, 1001))
    for dtype, operands in ((torch.bfloat16, "bf16"), (torch.float16, "f16"),
                            (torch.float32, "tf32"), (torch.float64, "f64")):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        channels, counts = meta(21, 184, dtype=torch.int32), meta(21, dtype=torch.int32)
        vectors = meta(21, 184, dtype=wide)
        for c, depth, groups in ((256, 128, 1), (48, 96, 6)):
            weight, bias = meta(c, depth // groups, 3, 3, dtype=dtype), meta(c, dtype=dtype)
            norm = NormConvs(meta(depth, 184, 3, 3, dtype=dtype), meta(depth, dtype=dtype),
                             weight, bias, weight, bias, shared_groups=1, groups=groups)
            packed = pack([norm])
            hidden = meta(777, packed.embedding.shape[2], dtype=dtype)
            name = f"{str(dtype).removeprefix('torch.')} groups={groups}"
            cases += [
                CompileCase(name, partial(level_embedding, channels, vectors, counts,
                                          packed.embedding, packed.embedding_bias, windows3, True)),
                CompileCase(name, partial(
                    level_product, hidden, packed.weight, packed.bias, packed.tiles, windows5,
                    packed.columns, packed.block_c, packed.block_k, packed.unit), operands),
            ]
        cases.append(CompileCase(str(wide).removeprefix("torch."),
                                 partial(symbol_entries, vectors)))
    return cases


COMPILE_CASES = _compile_cases()
