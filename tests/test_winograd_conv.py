"""winograd_conv2d against its definition, and the module that chooses it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import WinogradConv2d, explain, use_backend, winograd_conv2d
from smis_kernels.ops.winograd_conv import reference
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import LAYOUTS, assert_as_accurate, gradients, poisoned_empty, with_layout

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
# (N, C, H, W), outputs, groups
CASES = (
    ((1, 1, 1, 1), 1, 1), ((2, 3, 5, 4), 7, 1), ((1, 34, 7, 9), 50, 1), ((2, 48, 8, 6), 96, 3),
    ((1, 70, 33, 2), 14, 7), ((1, 129, 13, 31), 65, 1), ((3, 64, 16, 16), 128, 2),
)


def _tensors(shape, out, groups, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(shape) + out)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    w = torch.randn((out, shape[1] // groups, 3, 3), generator=g, dtype=torch.float64)
    b = torch.randn(out, generator=g, dtype=torch.float64)
    r = torch.randn((shape[0], out, *shape[2:]), generator=g, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, w / (9 * w.shape[1]) ** 0.5, b, r))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "out", "groups"), CASES)
def test_forward(shape, out, groups, layout):
    x, w, b, r = _tensors(shape, out, groups)
    x, r = with_layout(x, layout), with_layout(r, layout)
    for bias, residual in ((None, None), (b, None), (None, r), (b, r)):
        arguments = (x, w, bias, residual)
        wide = [None if t is None else t.double() for t in arguments]
        truth = reference.winograd_conv2d(*wide, groups, 1)
        with poisoned_empty():
            found = winograd_conv2d(x, w, bias, residual=residual, groups=groups, backend="cpu")
        expected = reference.winograd_conv2d(*arguments, groups, 1)
        assert_as_accurate(found, expected, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("shape", "out", "groups"), CASES[1:4] + CASES[5:])
def test_float64_equals_the_direct_conv(shape, out, groups, padding, layout):
    x, w, b, _ = _tensors(shape, out, groups, torch.float64)
    w = with_layout(w, layout)
    with poisoned_empty():
        found = winograd_conv2d(x, w, b, padding=padding, groups=groups, backend="cpu")
    torch.testing.assert_close(
        found, reference.winograd_conv2d(x, w, b, None, groups, padding), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "out", "groups"), CASES[1:5])
def test_gradients_in_float32(shape, out, groups):
    tensors = _tensors(shape, out, groups)

    def call(backend):
        return lambda x, w, b, r: winograd_conv2d(
            x, w, b, residual=r, groups=groups, backend=backend)

    found, expected = (gradients(call(kind), tensors) for kind in ("cpu", "reference"))
    truth = gradients(call("reference"), tuple(t.double() for t in tensors))
    for name, *three in zip("xwbr", found, expected, truth, strict=True):
        assert_as_accurate(*three, what=name)


def test_compile_is_one_graph():
    conv = WinogradConv2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 64, 64)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 2 * x), conv(x, 2 * x))


def test_not_a_number_stays_in_reach_of_its_tile():
    x, w, b, _ = _tensors((1, 32, 12, 12), 32, 1)
    x[0, 3, 5, 6] = float("nan")
    bad = winograd_conv2d(x, w, b, backend="cpu").isnan().any(1)[0]
    direct = reference.winograd_conv2d(x, w, b, None, 1, 1).isnan().any(1)[0]
    assert bad[direct].all()
    assert not bad[:4].any()
    assert not bad[8:].any()


def test_empty_batch_and_sixteen_bits():
    x, w, b, _ = _tensors((1, 32, 8, 8), 32, 1)
    assert winograd_conv2d(x[:0], w, b).shape == (0, 32, 8, 8)
    half = [t.bfloat16() for t in (x, w, b)]
    found = winograd_conv2d(*half)
    assert torch.equal(found, reference.winograd_conv2d(*half, None, 1, 1))
    assert "reference" in str(explain(winograd_conv2d, *half))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (32, 16, 3, 3)}, "weight: expected shape"),
        ({"weight": (32, 32, 5, 5)}, "weight: expected shape"),
        ({"groups": 5}, "groups: expected a divisor"),
        ({"padding": 2}, "padding: expected 0 or 1"),
        ({"bias": (31,)}, "bias: expected shape"),
        ({"residual": (1, 32, 8, 7)}, "residual: expected shape"),
        ({"input": (32, 8, 8)}, "input: expected"),
        ({"input": (1, 32, 2, 8), "padding": 0}, "input: expected at least 3x3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_mistakes_are_named(change, message):
    arguments = {"input": (1, 32, 8, 8), "weight": (32, 32, 3, 3), **change}
    given = {k: torch.randn(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        winograd_conv2d(given.pop("input"), given.pop("weight"), **given)


def _ran(module: nn.Module, x: Tensor) -> str:
    return explain(module, x).choices[-1].op


def test_the_module_is_a_conv_that_chooses():
    wide = WinogradConv2d(64, 64, 3, padding=1)
    plain = nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(wide.state_dict())
    x = torch.randn(1, 64, 64, 64)
    assert _ran(wide, x) == "winograd_conv2d"
    torch.testing.assert_close(wide(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide(x, x), x + plain(x), rtol=1e-4, atol=1e-5)
    with use_backend("reference"):
        assert torch.equal(wide(x), plain(x))
    assert _ran(wide, x[:, :, :2, :2]) == "conv2d"  # too few pixels for the kernels' transform
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x).dtype == torch.bfloat16
    again = pickle.loads(pickle.dumps(wide))
    assert torch.equal(again(x), wide(x))
    for options in ({"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2},
                    {"padding": 1, "padding_mode": "reflect"}):
        other = WinogradConv2d(64, 64, 3, **options)
        same = nn.Conv2d(64, 64, 3, **options)
        same.load_state_dict(other.state_dict())
        assert torch.equal(other(x), same(x))
