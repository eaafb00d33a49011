"""winograd_conv2d against its definition, and the module that chooses it."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smis_kernels import (
    SPADE,
    WinogradConv2d,
    explain,
    spectral_norm,
    use_backend,
    use_path,
    winograd_conv2d,
)
from smis_kernels.ops.kept_weight import KeptWeight
from smis_kernels.ops.winograd_conv import choice, reference
from smis_kernels.ops.winograd_conv.op import transform_weight, transformed_size
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    poisoned_empty,
    with_memory_format,
)

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


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize(("shape", "out", "groups"), CASES)
def test_forward(shape, out, groups, layout):
    x, w, b, r = _tensors(shape, out, groups)
    x, r = with_memory_format(x, layout), with_memory_format(r, layout)
    for bias, residual in ((None, None), (b, None), (None, r), (b, r)):
        arguments = (x, w, bias, residual)
        wide = [None if t is None else t.double() for t in arguments]
        truth = reference.winograd_conv2d(*wide, groups, 1)
        with poisoned_empty():
            found = winograd_conv2d(x, w, bias, residual=residual, groups=groups, backend="cpu")
        expected = reference.winograd_conv2d(*arguments, groups, 1)
        assert_as_accurate(found, expected, truth)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("shape", "out", "groups"), CASES[1:4] + CASES[5:])
def test_float64_equals_the_direct_conv(shape, out, groups, tile, padding, layout):
    x, w, b, _ = _tensors(shape, out, groups, torch.float64)
    w = with_memory_format(w, layout)
    if not padding and min(shape[2:]) < 3:
        x = torch.cat([x, x], 3)
    with poisoned_empty():
        found = winograd_conv2d(x, w, b, padding=padding, groups=groups, tile=tile, backend="cpu")
    torch.testing.assert_close(
        found, reference.winograd_conv2d(x, w, b, None, groups, padding), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [2, 4])
def test_tiles_compute_the_conv(tile):
    x, w, _, _ = _tensors((2, 5, 9, 11), 4, 1, torch.float64)
    torch.testing.assert_close(reference.by_tiles(x, w, tile),
                               reference.winograd_conv2d(x, w, None, None, 1, 1),
                               rtol=1e-12, atol=1e-12)


# Kernels that outgrow a core's cache, at most 64 tiles: transformed where they are multiplied.
# Channels below, at and beyond a chunk's 160, of the input's gradient too; outputs that end in part
# of a vector, and panels of one, two and three.
@pytest.mark.parametrize("size", [(1, 2, 2), (1, 9, 11), (3, 13, 5), (1, 32, 32), (1, 32, 36),
                                  (2, 8, 7)])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [
    (159, 75, 1), (160, 96, 1), (161, 99, 1), (330, 90, 1), (2 * 165, 2 * 90, 2), (330, 85, 1),
    (90, 330, 1), (2 * 90, 2 * 165, 2)])
def test_few_tiles_of_many_kernels(size, channels, outputs, groups):
    n, height, width = size
    x, w, b, r = _tensors((n, channels, height, width), outputs, groups, torch.float64)
    expected = reference.winograd_conv2d(x.requires_grad_(), w, b, r, groups, 1)
    (expected_grad,) = torch.autograd.grad(expected, x, r)
    for tile, weight in ((2, w), (4, w), (4, w.contiguous(memory_format=torch.channels_last))):
        with poisoned_empty():
            found = winograd_conv2d(x, weight, b, residual=r, groups=groups, tile=tile,
                                    backend="cpu")
            (grad,) = torch.autograd.grad(found, x, r)
            plain = winograd_conv2d(x, weight, groups=groups, padding=0, tile=tile, backend="cpu"
                                    ) if min(height, width) > 2 else None
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)
        if plain is not None:
            torch.testing.assert_close(
                plain, reference.winograd_conv2d(x, w, None, None, groups, 0), rtol=1e-11,
                atol=1e-11)


@pytest.mark.parametrize("tile", [2, 4])
def test_streamed_kernels_multiply_as_kept_ones_do(tile):
    for side in (4 * tile, 8 * tile, 8 * tile + 1):  # 64 tiles, and more
        x, w, b, r = _tensors((1, 170, side, side), 190, 1, torch.float32)
        found = winograd_conv2d(x, w, b, residual=r, tile=tile, backend="cpu")
        kept = winograd_conv2d(x, w, b, residual=r, tile=tile, kept=KeptWeight(), backend="cpu")
        torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("height", range(1, 10))
def test_every_rest_of_a_large_tile(height):
    for width in range(1, 10):
        x, w, b, r = _tensors((2, 6, height, width), 5, 1, torch.float64)
        with poisoned_empty():
            found = winograd_conv2d(x, w, b, residual=r, tile=4, backend="cpu")
        torch.testing.assert_close(found, reference.winograd_conv2d(x, w, b, r, 1, 1),
                                   rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("channels", [1, 33, 512])
@pytest.mark.parametrize("positive", [False, True])
def test_error_is_within_the_derived_tolerance(tile, channels, positive):
    """README.md: (channels / 32 + 10) roundings of what the transforms make of magnitudes."""
    x, w, _, _ = _tensors((1, channels, 18, 21), 40, 1)
    if positive:
        x = x.relu() + 1
    truth = reference.winograd_conv2d(x.double(), w.double(), None, None, 1, 1)
    size = reference.by_tiles(x.double(), w.double(), tile, magnitudes=True)
    found = winograd_conv2d(x, w, tile=tile, backend="cpu")
    bound = (channels / 32 + 10) * 2.0**-24 * size
    assert ((found - truth).abs() <= bound).all()
    assert ((found - truth).abs() > bound / 1000).any()
    # The error that README.md states, of the output's root mean square.
    if channels == 512 and not positive:
        rms = truth.square().mean().sqrt()
        assert (found - truth).square().mean().sqrt() / rms < {2: 6e-7, 4: 1.5e-6}[tile]


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


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_large_tiles(create_graph):
    tensors = _tensors((2, 34, 9, 7), 36, 2, torch.float64)
    leaves = [t.clone().requires_grad_() for t in tensors]
    found, expected = (torch.autograd.grad(y.square().sum(), leaves, create_graph=create_graph)
                       for y in (
        winograd_conv2d(*leaves[:3], residual=leaves[3], groups=2, tile=4, backend="cpu"),
        reference.winograd_conv2d(*leaves, 2, 1)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if create_graph:
        again = [torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
                 for first in (found, expected)]
        torch.testing.assert_close(*again, rtol=1e-9, atol=1e-9)


def test_opcheck():
    x, w, b, r = _tensors((1, 32, 6, 7), 48, 1)
    ops = torch.ops.smis_kernels
    strided = with_memory_format(x, "channels_last")
    back = with_memory_format(torch.randn(1, 48, 6, 7), "channels_last")
    for arguments in ((x, w, b, r, 1, 1), (strided, w, None, None, 1, 0),
                      (x, w, b, r, 1, 1, 4, transform_weight(w, 1, 4)),
                      (back, w, None, None, 1, 1, 2, None, True)):
        torch.library.opcheck(ops.winograd_conv.default, arguments)
    u = ops.winograd_weight.default(w, 3, 4)
    assert u.shape == (transformed_size(w, 3, 4),)
    # Its values are of this processor's layout, and unused ones are not written.
    torch.library.opcheck(ops.winograd_weight.default, (w, 3, 4),
                          test_utils=("test_schema", "test_autograd_registration"))


def test_compile_is_one_graph():
    conv = WinogradConv2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 64, 64)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 2 * x), conv(x, 2 * x))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 12),
       st.integers(1, 12), st.sampled_from((1, 2, 3)), st.sampled_from((2, 4)),
       st.integers(0, 2**31))
def test_any_shape(n, channels, out, h, w, groups, tile, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, channels * groups, h, w, dtype=torch.float64)
    weight = torch.randn(out * groups, channels, 3, 3, dtype=torch.float64)
    found = winograd_conv2d(x, weight, groups=groups, tile=tile, backend="cpu")
    expected = reference.winograd_conv2d(x, weight, None, None, groups, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_not_a_number_stays_in_reach_of_its_tile():
    x, w, b, _ = _tensors((1, 32, 12, 12), 32, 1)
    x[0, 3, 5, 6] = float("nan")
    bad = winograd_conv2d(x, w, b, backend="cpu").isnan().any(1)[0]
    direct = reference.winograd_conv2d(x, w, b, None, 1, 1).isnan().any(1)[0]
    assert bad[direct].all()
    assert not bad[:4].any()
    assert not bad[8:].any()


def test_a_batch_of_gradients():
    x, w, b, _ = (t.double().requires_grad_() for t in _tensors((1, 64, 5, 5), 64, 1))
    y = winograd_conv2d(x, w, b, backend="cpu")
    grads = torch.randn(3, *y.shape, dtype=torch.float64)
    for found, wanted in zip(
            torch.autograd.grad(y, (x, w, b), grads, is_grads_batched=True),
            torch.autograd.grad(F.conv2d(x, w, b, padding=1), (x, w, b), grads,
                                is_grads_batched=True), strict=True):
        torch.testing.assert_close(found, wanted)


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
        ({"padding": 1.0}, "padding: expected 0 or 1, got 1.0"),
        ({"weight": (0, 32, 3, 3)}, "weight: expected at least one output"),
        ({"tile": 3}, "tile: expected 2 or 4"),
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


def _tile(module: nn.Module, x: Tensor) -> str:
    return str(explain(module, x))


def test_large_tiles_are_for_eval_and_can_be_forbidden(monkeypatch):
    conv, x = WinogradConv2d(64, 64, 3, padding=1), torch.randn(1, 64, 64, 64)
    with torch.no_grad():
        assert "tile=2" in _tile(conv, x)
        assert "tile=4" in _tile(conv.eval(), x)
        monkeypatch.setenv(choice.ENVIRONMENT, "2")
        assert "tile=2" in _tile(conv, x)
        monkeypatch.setenv(choice.ENVIRONMENT, "3")
        with pytest.raises(ValueError, match="SMIS_WINOGRAD: expected 2 or 4, got '3'"):
            conv(x)


def test_a_norm_in_training_takes_small_tiles():
    norm, x, soft = SPADE(64, 8, 64), torch.randn(1, 64, 64, 64), torch.rand(1, 8, 64, 64)
    with torch.no_grad(), use_path("dense"):
        for training, tile in ((True, "tile=2"), (False, "tile=4")):
            assert tile in str(explain(norm.train(training), x, soft))


def _kept_conv() -> tuple[WinogradConv2d, Tensor]:
    torch.manual_seed(3)
    conv, x = WinogradConv2d(64, 48, 3, padding=1).eval(), torch.randn(1, 64, 24, 24)
    conv.keep_transform = True
    with torch.no_grad():
        for _ in range(3):
            conv(x)
    return conv, x


def test_a_kept_transform_changes_no_value_and_is_given_back():
    conv, x = _kept_conv()
    tile = choice.form(x, 48, 1, largest=4, kept=True)
    assert conv.kept_bytes == 4 * transformed_size(conv.weight, 1, tile)
    again = pickle.loads(pickle.dumps(conv))
    assert again.kept_bytes == 0
    assert again.keep_transform
    with torch.no_grad():
        assert torch.equal(conv(x), winograd_conv2d(x, conv.weight, conv.bias, tile=tile))
        assert torch.equal(conv(x), again(x))
    assert set(conv.state_dict()) == {"weight", "bias"}
    conv.train()
    assert conv.kept_bytes == 0
    conv, x = _kept_conv()
    conv.training = True  # as a parent's attribute may be set
    conv(x)
    assert conv.kept_bytes == 0
    conv, x = _kept_conv()
    conv.keep_transform = False
    conv(x)
    assert conv.kept_bytes == 0


@pytest.mark.parametrize(("size", "keeps"), [(8, False), (16, False), (17, True), (32, True)])
def test_few_tiles_of_a_large_weight_keep_nothing(size: int, keeps: bool) -> None:
    conv, x = WinogradConv2d(256, 256, 3, padding=1, bias=False).eval(), torch.randn(
        1, 256, size, size)
    conv.keep_transform = True
    with torch.no_grad():
        for _ in range(3):
            found = conv(x)
    assert (conv.kept_bytes > 0) == keeps
    torch.testing.assert_close(found, F.conv2d(x, conv.weight, padding=1), rtol=1e-4, atol=1e-4)


def _another(conv: WinogradConv2d) -> None:
    conv.weight = nn.Parameter(2 * conv.weight.detach())


def _in_place(conv: WinogradConv2d) -> None:
    with torch.no_grad():
        conv.weight[40, 3, 1, 1] += 1


def _unseen(conv: WinogradConv2d) -> None:
    conv.weight.data[40, 3, 1, 1] += 1  # moves no version


def _by_numpy(conv: WinogradConv2d) -> None:
    conv.weight.detach().numpy()[:] *= 3


def _to_double_and_back(conv: WinogradConv2d) -> None:
    conv.double().float()
    _unseen(conv)


@pytest.mark.parametrize("change", [_another, _in_place, _unseen, _by_numpy, _to_double_and_back])
def test_a_kept_transform_is_never_stale(change):
    conv, x = _kept_conv()
    assert conv.kept_bytes
    change(conv)
    with torch.no_grad():
        for _ in range(3):
            expected = reference.winograd_conv2d(x, conv.weight, conv.bias, None, 1, 1)
            torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)


def test_one_keeper_serves_tiles_and_groups_in_turn():
    x, w, _, _ = _tensors((1, 64, 8, 8), 64, 1, torch.float64)
    kept = KeptWeight()
    for tile, groups in ((2, 1), (2, 1), (4, 1), (4, 1), (4, 2), (4, 2), (2, 1)):
        weight = w if groups == 1 else w[:, :32]
        found = winograd_conv2d(x, weight, groups=groups, tile=tile, kept=kept, backend="cpu")
        torch.testing.assert_close(found, reference.winograd_conv2d(x, weight, None, None,
                                                                    groups, 1))


def test_weights_made_anew_take_no_memory():
    conv = nn.utils.spectral_norm(_kept_conv()[0])
    x = torch.randn(1, 64, 24, 24)
    with torch.no_grad():
        for _ in range(3):
            conv(x)
    assert conv.kept_bytes == 0


def test_weights_made_anew_in_the_same_place_are_told():
    """A dead tensor's id and memory are given out again."""
    kept = KeptWeight()
    for turn in range(20):
        weight = torch.randn(4, 4, 3, 3)
        assert kept.of(weight, "same", torch.clone) is None
        assert kept.expects(weight) == (turn == 0)
        del weight


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2)])
def test_a_kept_transform_lets_its_weight_be_swapped(kernel, stride):
    conv = WinogradConv2d(64, 64, kernel, stride=stride, padding=1).eval()
    conv.keep_transform = True
    plain, x = nn.Conv2d(64, 64, kernel, stride=stride, padding=1), torch.randn(1, 64, 24, 24)
    with torch.no_grad():
        for _ in range(3):
            conv(x)
        assert conv.kept_bytes
        torch.utils.swap_tensors(conv.weight, nn.Parameter(0.05 * torch.randn_like(conv.weight)))
        for _ in range(3):
            plain.load_state_dict(conv.state_dict())
            torch.testing.assert_close(conv(x), plain(x), rtol=1e-4, atol=1e-4)
        assert conv.kept_bytes
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        conv.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(conv(x.double()), plain.double()(x.double()))


def test_a_kept_transform_made_in_inference_mode_serves_gradients():
    conv, x = _kept_conv()
    conv.train().eval()
    conv.requires_grad_(False)
    with torch.inference_mode():
        for _ in range(3):
            conv(x)
    assert conv.kept_bytes
    leaf = x.clone().requires_grad_()
    conv(leaf).sum().backward()
    expected = torch.autograd.grad(
        reference.winograd_conv2d(leaf, conv.weight, conv.bias, None, 1, 1).sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_kept_transform_compiles():
    conv, x = _kept_conv()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), conv(x))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4), (1, 16, 1, 7), (3, 7, 2, 1)])
def test_a_residual_of_half_the_size_is_upsampled_in_the_sum(shape, dtype, layout):
    """As a GPU does it; bit for bit, in the conv's format, and without a copy of the sum."""
    n, c, h, w = shape
    half, y = torch.randn(shape).to(dtype), torch.randn(n, c, 2 * h, 2 * w).to(dtype)
    y = with_memory_format(y, layout)
    expected = nn.functional.interpolate(half, scale_factor=2, mode="nearest") + y
    for other in (half, half.contiguous(memory_format=torch.channels_last)):
        found = choice._plus_half(y, other)
        assert torch.equal(found, expected)
        assert found.dtype == dtype and found._is_view()
        if layout in ("contiguous", "channels_last") and c > 1:
            assert found.stride() == torch.empty_like(y).stride()
    assert torch.equal(choice.plus(y, half), expected)


def test_gradients_of_a_sum_with_half_the_size():
    g = torch.Generator().manual_seed(0)
    y, half = (torch.randn(2, 3, h, w, generator=g, dtype=torch.float64, requires_grad=True)
               for h, w in ((4, 6), (2, 3)))

    def squared(y, half):
        return choice._plus_half(y, half).square()

    torch.autograd.gradcheck(squared, (y, half))
    torch.autograd.gradgradcheck(squared, (y, half))


@pytest.mark.parametrize(("width", "size", "kernel"), [(64, 64, 3), (8, 8, 3), (8, 8, 5)])
def test_every_conv_takes_a_residual_of_half_the_size(width, size, kernel):
    conv = WinogradConv2d(width, width, kernel, padding=kernel // 2).double()
    x, half = (torch.randn(1, width, n, n, dtype=torch.float64) for n in (size, size // 2))
    whole = nn.functional.interpolate(half, scale_factor=2, mode="nearest")
    assert torch.equal(conv(x, half), conv(x, whole))
    with use_backend("reference"):
        torch.testing.assert_close(conv(x, half), nn.Conv2d.forward(conv, x) + whole)


@pytest.mark.parametrize("spectral", [False, True])
def test_a_picture_without_a_batch_passes(spectral: bool) -> None:
    torch.manual_seed(0)
    conv, published = WinogradConv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    published.load_state_dict(conv.state_dict())
    if spectral:
        conv, published = spectral_norm(conv).eval(), nn.utils.spectral_norm(published).eval()
        published.load_state_dict(conv.state_dict())
    x = torch.randn(64, 16, 16)
    torch.testing.assert_close(conv(x), published(x), rtol=1e-4, atol=1e-4)


def test_no_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="input: expected at least one channel"):
        winograd_conv2d(torch.zeros(1, 0, 8, 8), torch.zeros(4, 0, 3, 3))


def test_only_a_weight_that_stays_is_expected_to_be_kept() -> None:
    kept = KeptWeight()
    first, second = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    assert [kept.expects(w) for w in (first, first, second, first, first)] == [
        True, True, False, False, True]
