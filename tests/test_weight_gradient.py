"""The gradient of a conv's weight: Winograd's form against autograd of the conv itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smis_kernels import WinogradConv2d
from smis_kernels.ops.weight_gradient import LEAST_WIDTH, weight_gradient
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    max_error,
    poisoned_empty,
    with_memory_format,
)

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
F64 = torch.float64
OP = torch.ops.smis_kernels.winograd_weight_gradient.default


def tensors(channels: int, outputs: int, size: tuple[int, int], padding: int = 1, groups: int = 1,
            batch: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(channels + 7 * outputs + size[1])
    x = torch.randn((batch, channels * groups, *size), generator=random, dtype=F64)
    height, width = (n + 2 * padding - 2 for n in size)
    grad = torch.randn((batch, outputs * groups, height, width), generator=random, dtype=F64)
    return x.to(dtype), grad.to(dtype)


def expected(x: Tensor, grad: Tensor, padding: int = 1, groups: int = 1) -> Tensor:
    weight = x.new_zeros(grad.shape[1], x.shape[1] // groups, 3, 3, requires_grad=True)
    y = F.conv2d(x, weight, None, 1, padding, 1, groups)
    (found,) = torch.autograd.grad(y, weight, grad)
    return found


def check(x: Tensor, grad: Tensor, padding: int = 1, groups: int = 1) -> None:
    unread = x.new_full((grad.shape[1], x.shape[1] // groups, 3, 3), torch.nan)
    with poisoned_empty():
        found = weight_gradient(x, grad, unread, padding, groups)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected(x, grad, padding, groups), rtol=1e-12, atol=1e-11)
    if min(unread.shape[1], len(unread) // groups) >= LEAST_WIDTH:
        assert torch.equal(found, OP(x, grad, groups, padding))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize(("size", "padding", "groups"), [
    ((5, 7), 1, 1), ((1, 1), 1, 2), ((37, 1), 1, 1), ((1, 6), 1, 3), ((7, 4), 0, 1),
    ((3, 3), 0, 2), ((4, 5), 2, 1)])
@pytest.mark.parametrize(("channels", "outputs"), [(64, 64), (65, 16), (16, 65), (15, 64)])
def test_equals_autograd(size: tuple[int, int], padding: int, groups: int, channels: int,
                         outputs: int, layout: str) -> None:
    x, grad = tensors(channels, outputs, size, padding, groups)
    check(with_memory_format(x, layout), with_memory_format(grad, layout), padding, groups)


# csrc/winograd_conv/gradient.h: lanes of every instruction set, panels of three vectors, kTiles;
# cpu.cpp: kMostRows and kLeastRows.
@pytest.mark.parametrize("channels", [16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 97, 145])
def test_columns(channels: int) -> None:
    check(*tensors(channels, 19, (4, 6)))


@pytest.mark.parametrize("outputs", [16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 130])
def test_rows(outputs: int) -> None:
    check(*tensors(21, outputs, (4, 6)))


@pytest.mark.parametrize("tiles", [1, 2, 127, 128, 129, 255, 256, 257])
def test_tiles(tiles: int) -> None:
    check(*tensors(17, 18, (2, 2 * tiles), batch=1))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("size", "groups"), [((45, 51), 1), ((23, 33), 4), ((64, 128), 1)])
def test_blocks_of_tiles_add_up(size: tuple[int, int], groups: int, threads: int) -> None:
    """At 4 MiB a block all but the smallest take several, the last of them not full."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*tensors(70, 34, size, groups=groups), groups=groups)
    finally:
        torch.set_num_threads(before)


def test_slices_are_read_where_they_lie() -> None:
    x, grad = tensors(48, 40, (6, 9))
    wide = torch.full((2, 100, 6, 9), torch.nan, dtype=F64).contiguous(
        memory_format=torch.channels_last)
    wide[:, 7:55], wide[:, 60:] = x, grad
    check(wide[:, 7:55], wide[:, 60:])
    check(x[::2], grad[1::2])
    check(x[..., 1:8], grad[..., 1:8])
    check(x[:1].expand(3, -1, -1, -1), grad[:1, :, :1, :1].expand(3, -1, 6, 9))


@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 1, 2)])
def test_no_pixel_gives_zeros(shape: tuple[int, ...]) -> None:
    padding = 1 if shape[0] == 0 else 0
    x = torch.randn(shape)
    grad = torch.randn(shape[0], 16, *(max(n + 2 * padding - 2, 0) for n in shape[2:]))
    with poisoned_empty():
        found = weight_gradient(x, grad, torch.empty(16, 32, 3, 3), padding, 1)
    assert torch.equal(found, torch.zeros(16, 32, 3, 3))


@pytest.mark.parametrize(("channels", "size"), [(32, (64, 66)), (256, (16, 16)), (96, (5, 3))])
def test_float32_is_as_accurate_as_torch(channels: int, size: tuple[int, int]) -> None:
    for shift in (0.0, 3.0):
        x, grad = tensors(channels, 48, size)
        x = x.relu() + shift
        truth = expected(x, grad)
        narrow = x.float(), grad.float()
        found = weight_gradient(*narrow, torch.empty(48, channels, 3, 3), 1, 1)
        assert_as_accurate(found, expected(*narrow), truth, what="dW")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(16, 70), st.integers(16, 70), st.integers(1, 13),
       st.integers(1, 13), st.integers(1, 3), st.integers(1, 2))
def test_any_shape(batch: int, channels: int, outputs: int, height: int, width: int, groups: int,
                   padding: int) -> None:
    check(*tensors(channels, outputs, (height, width), padding, groups, batch), padding, groups)


@pytest.mark.parametrize("layout", MEMORY_FORMATS[:2])
def test_opcheck(layout: str) -> None:
    x, grad = (with_memory_format(t, layout) for t in tensors(20, 18, (5, 6), groups=2))
    torch.library.opcheck(OP, (x, grad, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("side", [3, 4])
def test_an_hwc_picture_as_a_batch_of_one(side: int, dtype: torch.dtype) -> None:
    """Its strides are those that torch's own gradients of grouped convs misread in float64."""
    conv = WinogradConv2d(64, 64, side, 2, 1, groups=2).to(dtype)
    x = torch.randn(33, 40, 64, dtype=dtype).permute(2, 0, 1)[None]
    plain = F.conv2d(x.contiguous(), conv.weight, conv.bias, 2, 1, 1, 2)
    found, truth = (torch.autograd.grad(y.square().sum(), conv.weight)[0] for y in (conv(x), plain))
    assert max_error(found, truth) < (1e-12 if dtype == F64 else 1e-5) * float(truth.abs().max())
    other = torch.randn(31, 29, 16 * 3, dtype=dtype).permute(2, 0, 1)[None]
    narrow = torch.randn(12, 16, 3, 3, dtype=dtype)  # of 4 outputs a group
    grad = torch.randn(31, 29, 12, dtype=dtype).permute(2, 0, 1)[None]
    torch.testing.assert_close(weight_gradient(other, grad, narrow, 1, 3), expected(
        other.contiguous(), grad.contiguous(), 1, 3), rtol=1e-4, atol=1e-3)
