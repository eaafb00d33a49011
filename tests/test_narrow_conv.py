"""narrow_conv2d against its definition, and where convs take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smis_kernels import WinogradConv2d, explain, narrow_conv2d, use_backend
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import MEMORY_FORMATS, poisoned_empty, with_memory_format
from smis_models.benchmark.macs import effective_macs

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
F64, LAST = torch.float64, torch.channels_last


# Channels below, at and beyond one vector of every instruction set and dtype; pixels beside each
# tile's, and tiles that touch no border.
@pytest.mark.parametrize("layout", [*MEMORY_FORMATS, "channels of more"])
@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33])
def test_every_rest_of_a_vector_and_a_tile(channels: int, outputs: int, layout: str) -> None:
    torch.manual_seed(channels)
    for height, width in (*((9 - width, width) for width in range(1, 9)), (6, 19)):
        x = torch.randn(2, channels, height, width, dtype=F64)
        if layout == "channels of more":
            x = torch.cat([x, x], 1).contiguous(memory_format=LAST)[:, channels:]
        else:
            x = with_memory_format(x, layout)
        for side, padding in ((3, 1), (1, 0), (4, 2), (3, 3)):
            w = torch.randn(outputs, channels, side, side, dtype=F64)
            b = torch.randn(outputs, dtype=F64)
            if min(x.shape[2:]) + 2 * padding < side:
                continue
            for bias in (None, b):
                expected = F.conv2d(x, w, bias, padding=padding)
                with poisoned_empty():
                    found = narrow_conv2d(x, w, bias, padding=padding, backend="cpu")
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        narrow = narrow_conv2d(x.float(), w.float(), b.float(), padding=padding, backend="cpu")
        torch.testing.assert_close(narrow.double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 12),
       st.integers(1, 12), st.integers(1, 7), st.integers(0, 4), st.integers(0, 2**31))
def test_any_shape(n: int, channels: int, outputs: int, h: int, w: int, side: int, padding: int,
                   seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(n, channels, max(h, side), max(w, side), dtype=F64)
    weight = torch.randn(outputs, channels, side, side, dtype=F64)
    found = narrow_conv2d(x, weight, padding=padding, backend="cpu")
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=padding), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels", [16, 512])
def test_float32_is_as_exact_as_torchs(channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, channels, 20, 23).contiguous(memory_format=LAST)
    w = torch.randn(3, channels, 3, 3) / (3 * channels**0.5)
    truth = F.conv2d(x.double(), w.double())
    errors = [(y - truth).square().mean().sqrt() for y in (
        narrow_conv2d(x, w, backend="cpu"), F.conv2d(x, w))]
    assert errors[0] < 1.5 * errors[1]


def test_gradcheck() -> None:
    torch.manual_seed(0)
    leaves = [t.double().requires_grad_() for t in (
        torch.randn(2, 3, 4, 3), torch.randn(2, 3, 3, 3), torch.randn(2))]

    def call(*t: torch.Tensor) -> torch.Tensor:
        return narrow_conv2d(*t, padding=1, backend="cpu")

    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves)
    for wanted in ([0], [1], [2], [0, 2]):
        given = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        found, expected = (torch.autograd.grad(y.square().sum(), [given[i] for i in wanted])
                           for y in (call(*given), F.conv2d(*given, padding=1)))
        torch.testing.assert_close(found, expected)


def test_the_module_takes_it_for_channels_last_features() -> None:
    torch.manual_seed(0)
    conv, plain = WinogradConv2d(64, 3, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 64, 17, 19)
    last = x.contiguous(memory_format=LAST)
    assert "narrow_conv2d" in str(explain(conv, last))
    assert "narrow_conv2d" not in str(explain(conv, x))
    torch.testing.assert_close(conv(last), plain(last), rtol=1e-4, atol=1e-5)
    assert torch.equal(conv(x), plain(x))
    torch.testing.assert_close(conv(last, 2 * plain(last)), 3 * plain(last), rtol=1e-4, atol=1e-4)
    assert conv(last).is_contiguous(memory_format=LAST)
    with use_backend("reference"):
        assert torch.equal(conv(last), plain(last))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(last), plain(last))
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(last), conv(last))


@pytest.mark.parametrize("options", [
    {"stride": 2}, {"groups": 2, "out_channels": 4}, {"dilation": 2}, {"padding": (1, 0)},
    {"padding_mode": "reflect", "padding": 1}, {"kernel_size": (3, 1)}, {"out_channels": 5},
    {"in_channels": 15}, {"padding": "same"}], ids=lambda v: " ".join(map(str, v.values())))
def test_other_convs_are_torchs(options: dict[str, Any]) -> None:
    arguments = {"in_channels": 64, "out_channels": 3, "kernel_size": 3, **options}
    conv, plain = WinogradConv2d(**arguments), nn.Conv2d(**arguments)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, arguments["in_channels"], 16, 16).contiguous(memory_format=LAST)
    assert torch.equal(conv(x), plain(x))


def test_empty_batch_and_sixteen_bits() -> None:
    x, w = torch.randn(1, 32, 8, 8), torch.randn(3, 32, 3, 3)
    assert narrow_conv2d(x[:0], w).shape == (0, 3, 6, 6)
    half = x.bfloat16(), w.bfloat16()
    assert torch.equal(narrow_conv2d(*half), F.conv2d(*half))
    assert "reference" in str(explain(narrow_conv2d, *half))


def test_products_are_counted() -> None:
    x, w = torch.zeros(2, 16, 9, 8), torch.zeros(3, 16, 3, 3)
    assert effective_macs(lambda: narrow_conv2d(x, w, padding=1)) == 2 * 9 * 8 * 3 * 16 * 9


@pytest.mark.parametrize(("change", "message"), [
    ({"weight": (5, 32, 3, 3)}, "weight: expected 1 to 4 outputs, got 5; use F.conv2d"),
    ({"weight": (3, 16, 3, 3)}, "weight: expected shape"),
    ({"weight": (3, 32, 3, 4)}, "weight: expected shape"),
    ({"bias": (4,)}, "bias: expected shape"),
    ({"padding": -1}, "padding: expected an integer of at least 0, got -1"),
    ({"padding": (1, 1)}, "padding: expected an integer of at least 0"),
    ({"input": (1, 32, 2, 8)}, "input: expected at least 3x3 pixels with their padding"),
    ({"input": (1, 0, 8, 8)}, "input: expected at least one channel"),
    ({"input": (32, 8, 8)}, "input: expected"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"input": (1, 32, 8, 8), "weight": (3, 32, 3, 3), **change}
    given = {k: torch.randn(v) if k in ("input", "weight", "bias") else v
             for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        narrow_conv2d(given.pop("input"), given.pop("weight"), **given)
