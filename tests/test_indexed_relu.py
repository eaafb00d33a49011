"""indexed_relu beside the table of all ops: wide parts, rows apart, NaN, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels.ops.indexed_relu.op import indexed_relu
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import assert_as_accurate, max_error, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", [
    pytest.param("cpu", marks=pytest.mark.skipif(
        missing("cpu") is not None, reason=str(missing("cpu")))),
    pytest.param("triton", marks=pytest.mark.triton)])


def make(n: int, depth: int, parts: int, size: tuple[int, int], rows: int = 7,
         dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(depth + parts)
    c = depth * parts
    x = torch.randn((n, c, *size), generator=generator, dtype=torch.float64)
    index = torch.randint(rows, (n, *size), generator=generator, dtype=torch.int32)
    table = torch.randn((rows, c), generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last).to(dtype), index, table.to(dtype)


def moved(inputs: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in inputs) if backend == "triton" else inputs


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("depth", "parts", "size"), [
    (130, 2, (3, 5)), (17, 3, (40, 50)), (1, 5, (1, 33)), (128, 4, (9, 9)), (64, 1, (1, 1))])
def test_parts_of_any_width(depth: int, parts: int, size: tuple[int, int], dtype: torch.dtype,
                            backend: str) -> None:
    inputs = make(2, depth, parts, size, dtype=dtype)
    x, index, table = inputs
    exact = F.relu(x.double() + table.double()[index.long()].permute(0, 3, 1, 2))
    with poisoned_empty():
        found = indexed_relu(*moved(inputs, backend), parts, backend=backend)
    same = indexed_relu(*inputs, parts, backend="reference")
    assert len(found) == len(same) == parts
    for k, (got, plain) in enumerate(zip(found, same, strict=True)):
        truth = exact[:, k * depth : (k + 1) * depth]
        assert got.is_contiguous(memory_format=torch.channels_last)
        if dtype == torch.float64:
            assert max_error(got.cpu(), truth) < 1e-14
        else:
            assert_as_accurate(got.cpu(), plain, truth)


@backends
def test_rows_may_lie_apart(backend: str) -> None:
    x, index, table = moved(make(1, 3, 2, (4, 5)), backend)
    wide = F.pad(table, (0, 10), value=torch.nan)
    for own in (wide[:, :6], table.t().contiguous().t()):
        for got, same in zip(indexed_relu(x, index, own, 2, backend=backend),
                             indexed_relu(x, index, table, 2, backend="reference"), strict=True):
            assert torch.equal(got, same)


@backends
def test_nan_passes(backend: str) -> None:
    x, index, table = make(1, 2, 2, (2, 3), rows=2)
    x[0, 3, 1, 2] = torch.nan
    table[1, 0] = torch.nan
    found = torch.cat(indexed_relu(*moved((x, index, table), backend), 2, backend=backend), 1)
    expected = x.isnan()
    expected[:, 0] |= index == 1
    assert torch.equal(found.isnan().cpu(), expected)


@backends
def test_rows_are_added_in_the_dtype_of_sums(backend: str) -> None:
    x, index, table = make(1, 4, 1, (3, 3), dtype=torch.bfloat16)
    for own in (table, table.float()):
        given = moved((x, index, own), backend)
        (got,) = indexed_relu(*given, 1, backend=backend)
        assert got.dtype == torch.bfloat16
        exact = F.relu(x.float() + own.float()[index.long()].permute(0, 3, 1, 2))
        assert torch.equal(got.cpu(), exact.bfloat16())


@pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
def test_gradients_are_refused() -> None:
    x, index, table = make(1, 2, 2, (3, 3))
    for name, given in (("input", (x.requires_grad_(), index, table)),
                        ("table", (x.detach(), index, table.requires_grad_()))):
        with pytest.raises(ValueError, match=f"{name}: expected one without gradients"):
            indexed_relu(*given, 2)
        assert all(y.requires_grad for y in indexed_relu(*given, 2, backend="reference"))
    with torch.no_grad():
        assert not any(y.requires_grad for y in indexed_relu(*given, 2))


def test_bad_input() -> None:
    x, index, table = make(1, 2, 2, (3, 3))
    for parts in (0, 3, -2):
        with pytest.raises(ValueError, match=f"parts: expected a divisor of the 4 .*got {parts}"):
            indexed_relu(x, index, table, parts)
    with pytest.raises(ValueError, match=r"index: expected shape \(1, 3, 3\)"):
        indexed_relu(x, index[:, :2], table, 2)
    with pytest.raises(TypeError, match="index: expected dtype int32"):
        indexed_relu(x, index.long(), table, 2)
    with pytest.raises(ValueError, match=r"table: expected shape \(7, 4\)"):
        indexed_relu(x, index, table[:, :3], 2)
    with pytest.raises(TypeError, match="table: expected dtype float64"):
        indexed_relu(x, index, table.float(), 2)
    assert [y.shape for y in indexed_relu(x[:0], index[:0], table, 2)] == [(0, 2, 3, 3)] * 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [-1, 7])
def test_rows_that_the_table_has_not_are_refused(backend: str, bad: int) -> None:
    x, index, table = make(1, 3, 2, (4, 5))
    index[0, 1, 2] = bad
    with pytest.raises(ValueError, match=rf"^index: expected rows 0\.\.6, got {bad};"):
        indexed_relu(x, index, table, 2, backend=backend)


@pytest.mark.triton
@pytest.mark.parametrize("bad", [-1, 7, 2**31 - 1, -2**31])
def test_a_gpu_makes_nan_of_a_row_that_the_table_has_not(bad: int) -> None:
    x, index, table = make(1, 3, 2, (4, 5))
    expected = torch.cat(indexed_relu(x, index, table, 2, backend="reference"))
    expected[:, :, 1, 2] = torch.nan
    index[0, 1, 2] = bad
    found = torch.cat(indexed_relu(*moved((x, index, table), "triton"), 2, backend="triton"))
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True)
