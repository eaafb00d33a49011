"""What a nearest x2 upsampling was made of: bit for bit, or nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smis_kernels.ops.upsampling_source.op import upsampling_source
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import poisoned_empty

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
LAST = torch.channels_last
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


def upsampled(x: Tensor) -> Tensor:
    """By an index, which copies bits."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64 if x.element_size() == 8 else torch.int32)


def found(x: Tensor, backend: str) -> Tensor | None:
    with poisoned_empty():
        return upsampling_source(x, backend=backend)


def same(up: Tensor, x: Tensor, backend: str) -> None:
    y = found(up, backend)
    assert y is not None
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(bits(y), bits(x))


@BACKENDS
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_beside_lanes_and_blocks(dtype: torch.dtype, last: bool, backend: str) -> None:
    for channels in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 100):
        for height, width in ((1, 1), (1, 7), (9, 1), (3, 5), (1, 127), (2, 128), (3, 129),
                              (1, 260)):
            x = torch.randn(2, channels, height, width, dtype=dtype)
            x[-1, -1, -1, -1] = float("nan")
            x[0, 0, 0, 0] = -0.0
            up = upsampled(x)
            same(up.contiguous(memory_format=LAST) if last else up, x, backend)


@BACKENDS
def test_torchs_upsampling_is_one(backend: str) -> None:
    x = torch.randn(2, 19, 6, 11)
    for memory_format in (torch.contiguous_format, LAST):
        given = x.contiguous(memory_format=memory_format)
        same(F.interpolate(given, scale_factor=2, mode="nearest"), x, backend)


@BACKENDS
def test_slices(backend: str) -> None:
    for memory_format in (torch.contiguous_format, LAST):
        whole = torch.randn(4, 40, 13, 21)
        up = upsampled(whole).contiguous(memory_format=memory_format)
        for view in (lambda x: x[:, 3:30], lambda x: x[::2], lambda x: x[1:3, 7:8],
                     lambda x: x[:, ::2]):
            same(view(up), view(whole), backend)
        same(up[:, :, 4:18], whole[:, :, 2:9], backend)
        same(up[..., 8:36], whole[..., 4:18], backend)
        same(up.transpose(2, 3), whole.transpose(2, 3), backend)
        same(up[:1].expand(3, -1, -1, -1), whole[:1].expand(3, -1, -1, -1), backend)


@needs_cpu
@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 35), st.integers(1, 5), st.integers(1, 140)),
       st.booleans(), st.booleans(), st.data())
def test_one_element_that_differs_is_seen(shape: tuple[int, int, int, int], wide: bool, last: bool,
                                          data: st.DataObject) -> None:
    x = upsampled(torch.randn(shape, dtype=torch.float64 if wide else torch.float32))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in x.shape)
    bits(x)[place] ^= 1  # a view of the same memory: its last bit
    x = x.contiguous(memory_format=LAST) if last else x
    for backend in ("reference", "cpu"):
        assert found(x, backend) is None


@BACKENDS
def test_bits_are_compared(backend: str) -> None:
    """Zeros of two signs are equal numbers, and two like NaNs are none."""
    for last in (False, True):
        x = torch.zeros(1, 3, 4, 4)
        x[0, 1, 3, 3] = -0.0
        assert found(x.contiguous(memory_format=LAST) if last else x, backend) is None


@needs_cpu
def test_threads_do_not_change_it() -> None:
    x = torch.randn(3, 50, 40, 37)
    other = upsampled(x)
    other[-1, -1, -1, -1] += 1
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for _ in range(5):
                same(upsampled(x), x, "cpu")
                assert found(other, "cpu") is None
    finally:
        torch.set_num_threads(threads)


@BACKENDS
def test_none(backend: str) -> None:
    up = upsampled(torch.randn(2, 3, 4, 5))
    assert found(up[:, :, 1:], backend) is None
    assert found(up[:, :, :, :7], backend) is None
    assert found(up[:0], backend) is None
    up.requires_grad_()
    assert found(up, backend) is None  # its gradient belongs to all four pixels
    with torch.no_grad():
        assert found(up, backend) is not None
    assert torch.func.vmap(lambda x: x * (1 if upsampling_source(x) is None else 0))(
        up.detach()[None]).any()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^input: expected \(N, C, H, W\), got"):
        upsampling_source(torch.randn(2, 3, 4))
    with pytest.raises(TypeError, match=r"^input: expected dtype float32, float64; got"):
        upsampling_source(torch.randn(1, 2, 4, 4).half())
