"""LabelConv2d against the conv of the one-hot planes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import LabelLayout
from smis_kernels.modules.label_conv import LabelConv2d
from smis_kernels.ops.label_conv import reference
from smis_kernels.runtime.backend import missing
from smis_kernels.runtime.check import FLOATS
from smis_kernels.testing import assert_as_accurate, poisoned_empty

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))


def _layout(n: int, h: int, w: int, classes: int = 6) -> LabelLayout:
    generator = torch.Generator().manual_seed(h * w)
    coarse = torch.randint(0, classes, (n, 1, (h + 8) // 9, (w + 12) // 13), generator=generator)
    labels = F.interpolate(coarse.float(), (h, w))[:, 0].long()
    labels[0, h // 2, w // 2] = classes - 1
    return LabelLayout.from_labels(labels, classes, instances=labels)


def _weights(channels: int, planes: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    # drawn in fp32, so that sums in fp64 are exact
    weight = torch.randn((channels, planes, size, size), generator=generator)
    return weight.to(dtype), torch.randn((channels,), generator=generator).to(dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 17, 40), (1, 64, 131)])
@pytest.mark.parametrize("channels", [1, 64, 77])
def test_matches_the_dense_conv(channels: int, shape: tuple[int, int, int], size: int,
                                dtype: torch.dtype) -> None:
    layout = _layout(*shape)
    weight, bias = _weights(channels, 7, size, dtype)
    truth = reference.label_conv2d(layout.dense(dtype=torch.float64), weight.double(),
                                   bias.double())
    expected = reference.label_conv2d(layout.dense(dtype=dtype), weight, bias)
    conv, h = LabelConv2d(layout, weight, bias, backend="cpu"), shape[1]
    with poisoned_empty():
        whole = conv.rows(0, h)
        parts = [conv.rows(first, min(first + 5, h)) for first in range(0, h, 5)]
    assert whole.dtype == dtype
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(whole, expected, truth)
    assert torch.equal(torch.cat(parts, 2), whole)
    same = LabelConv2d(layout, weight, bias, backend="reference").rows(1, h)
    torch.testing.assert_close(same, expected[:, :, 1:])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_it_is_of_the_weights_that_it_was_made_of(backend: str) -> None:
    weight, bias = _weights(5, 7, 3, torch.float32)
    conv = LabelConv2d(_layout(1, 9, 9), weight, bias, backend=backend)
    before = conv.rows(0, 9)
    for written in (weight, bias):
        written.add_(1)
    assert torch.equal(conv.rows(0, 9), before)


@needs_cpu
def test_noise_large_output_and_no_bias() -> None:
    labels = torch.randint(0, 40, (1, 200, 300), generator=torch.Generator().manual_seed(0))
    layout = LabelLayout.from_labels(labels, 40)
    weight, _ = _weights(64, 40, 7, torch.float32)
    with poisoned_empty():
        found = LabelConv2d(layout, weight, backend="cpu").rows(0, 200)
    expected, truth = (reference.label_conv2d(layout.dense(dtype=w.dtype), w, None)
                       for w in (weight, weight.double()))
    assert_as_accurate(found, expected, truth)


@needs_cpu
def test_autocast_changes_nothing() -> None:
    """The kernel sums in fp32: of a table in 16 bits it would read past the end."""
    layout, (weight, bias) = _layout(1, 17, 40), _weights(64, 7, 7, torch.float32)
    expected = LabelConv2d(layout, weight, bias, backend="cpu").rows(0, 17)
    with torch.autocast("cpu", torch.bfloat16):
        found = LabelConv2d(layout, weight, bias, backend="cpu").rows(0, 17)
    assert torch.equal(found, expected)


def test_bad_input() -> None:
    layout = _layout(1, 9, 11)
    for weight, bias, message in (
        (torch.zeros(5, 6, 3, 3), None, r"weight: expected shape \(5, 7, 3, 3\) for the layout"),
        (torch.zeros(5, 7, 2, 2), None, "weight: expected an odd kernel"),
        (torch.zeros(5, 7, 19, 19), None, "weight: expected an odd kernel that half fits"),
        (torch.zeros(5, 7, 3, 3), torch.zeros(4), r"bias: expected shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            LabelConv2d(layout, weight, bias)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"expected rows of 0\.\.9, got 3, 10"):
        LabelConv2d(layout, torch.zeros(5, 7, 3, 3), backend="reference").rows(3, 10)
