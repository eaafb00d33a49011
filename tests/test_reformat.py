"""Changes of memory format: bit for bit torch's copy, whatever lies where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smis_kernels import winograd_conv2d
from smis_kernels.ops.reformat.op import reformat
from smis_kernels.runtime import library
from smis_kernels.runtime.backend import missing
from smis_kernels.runtime.check import FLOATS
from smis_kernels.testing import poisoned_empty

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
FORMATS = pytest.mark.parametrize("last", [True, False])


def other(x: Tensor, last: bool) -> Tensor:
    """The values in the format that they are not asked for in."""
    return x.contiguous(memory_format=CONTIGUOUS if last else LAST)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are called."""
    names: list[str] = []
    called = library.RawOp._called

    def noted(self: library.RawOp, backend: str, *args: object) -> object:
        names.append(self.name)
        return called(self, backend, *args)

    monkeypatch.setattr(library.RawOp, "_called", noted)
    return names


def same(x: Tensor, last: bool) -> None:
    with poisoned_empty():
        found = reformat(x, LAST if last else CONTIGUOUS, backend="cpu")
    expected = x.contiguous(memory_format=LAST if last else CONTIGUOUS)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@needs_cpu
@FORMATS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sizes_beside_lanes_and_blocks(dtype: torch.dtype, last: bool) -> None:
    for channels in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 100):
        for height, width in ((1, 1), (1, 7), (9, 1), (1, 16), (3, 5), (1, 127), (8, 16), (3, 43),
                              (1, 130), (1, 257)):
            x = torch.randn(2, channels, height, width).to(dtype)
            x[-1, -1, -1, -1] = float("nan")
            same(other(x, last), last)


@needs_cpu
@FORMATS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_slices(dtype: torch.dtype, last: bool, calls: list[str]) -> None:
    x = other(torch.randn(4, 40, 13, 21).to(dtype), last)
    views = (x[:, 3:30], x[::2], x[1:3, 7:], x[:, :, 2:9], x[:, :, :, 4:18], x[:, ::2],
             x.transpose(2, 3), x[:1].expand(3, -1, -1, -1))
    for view in views:
        calls.clear()
        same(view, last)
        assert calls == ["reformat"]


@needs_cpu
def test_threads_do_not_change_it() -> None:
    x = torch.randn(3, 50, 40, 37)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            same(x, True)
            same(x.contiguous(memory_format=LAST), False)
    finally:
        torch.set_num_threads(threads)


@FORMATS
def test_what_has_the_format_is_returned(last: bool, calls: list[str]) -> None:
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=LAST if last else CONTIGUOUS)
    assert reformat(x, LAST if last else CONTIGUOUS) is x
    assert calls == []


@needs_cpu
@FORMATS
def test_gradients_pass(last: bool) -> None:
    x = other(torch.randn(2, 9, 6, 7, dtype=torch.float64), last).requires_grad_()
    y = reformat(x, LAST if last else CONTIGUOUS)
    assert y.requires_grad
    weight = torch.randn_like(y)
    first, = torch.autograd.grad((y.square() * weight).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * x * weight)
    second, = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, (2 * weight).expand_as(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.complex64])
def test_other_dtypes_are_copied_by_torch(dtype: torch.dtype, calls: list[str]) -> None:
    x = torch.randn(2, 9, 6, 7).to(dtype)
    found = reformat(x, LAST)
    assert calls == []
    assert found.dtype == dtype
    assert torch.equal(found, x)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)])
@FORMATS
def test_nothing(shape: tuple[int, ...], last: bool) -> None:
    found = reformat(torch.empty(shape), LAST if last else CONTIGUOUS)
    assert found.shape == shape


def test_compiles_into_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x: Tensor) -> Tensor:
        return reformat(x, LAST) * 2

    x = torch.randn(2, 9, 6, 7)
    assert torch.equal(call(x), 2 * x)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^memory_format: expected torch.contiguous_format"):
        reformat(torch.randn(1, 2, 3, 4), torch.preserve_format)
    with pytest.raises(ValueError, match=r"^input: expected \(N, C, H, W\), got"):
        reformat(torch.randn(2, 3, 4), LAST)


@needs_cpu
def test_kernels_that_read_rows_are_given_planes() -> None:
    """A conv of planes, and of a slice of them, is that of rows."""
    x, weight = torch.randn(2, 48, 20, 24), torch.randn(32, 32, 3, 3)
    for part in (x[:, :32], x[:, 8:40], x[1:, :32]):
        rows = part.contiguous(memory_format=LAST)
        assert torch.equal(winograd_conv2d(part, weight, backend="cpu"),
                           winograd_conv2d(rows, weight, backend="cpu"))
