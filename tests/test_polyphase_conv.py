"""Convs by phases against their definition, and the modules that choose them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smis_kernels import (
    WinogradConv2d,
    WinogradConvTranspose2d,
    explain,
    polyphase_conv2d,
    polyphase_conv_transpose2d,
    use_backend,
    winograd_conv2d,
)
from smis_kernels.interface import doubling_conv2d, strided_conv2d
from smis_kernels.ops.kept_weight import KeptWeight
from smis_kernels.ops.polyphase_conv import choice, reference
from smis_kernels.ops.polyphase_conv.op import FORMS, transform_weight, transformed_size
from smis_kernels.ops.weight_gradient import weight_gradient
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import MEMORY_FORMATS, gradients, poisoned_empty, with_memory_format
from smis_models.benchmark.macs import effective_macs

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
F64 = torch.float64
forms = pytest.mark.parametrize(("side", "stride"), FORMS)


def _tensors(shape: tuple[int, ...], outputs: int, side: int, groups: int = 1,
             dtype: torch.dtype = F64, transposed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(sum(shape) + outputs + side)
    each = shape[1] // groups
    size = (shape[1], outputs // groups) if transposed else (outputs, each)
    x = torch.randn(shape, generator=g, dtype=F64)
    w = torch.randn((*size, side, side), generator=g, dtype=F64) / (each**0.5 * side)
    return x.to(dtype), w.to(dtype), torch.randn(outputs, generator=g, dtype=F64).to(dtype)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@forms
def test_every_padding_and_rest_of_a_tile(side: int, stride: int, layout: str) -> None:
    for height in range(1, 10):
        x, w, b = _tensors((2, 6, height, 11 - height), 5, side)
        x = with_memory_format(x, layout)
        for padding in (*range(side), (1, 2), (0, side - 1)):
            pads = (padding, padding) if isinstance(padding, int) else padding
            if any(n + 2 * p < side for n, p in zip(x.shape[2:], pads, strict=True)):
                continue
            with poisoned_empty():
                found = polyphase_conv2d(x, w, b, stride=stride, padding=padding, backend="cpu")
            torch.testing.assert_close(found, F.conv2d(x, w, b, stride, pads), rtol=1e-12,
                                       atol=1e-12)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("side", [3, 4])
def test_every_padding_and_rest_of_a_transposed_conv(side: int, layout: str) -> None:
    for height in range(1, 8):
        x, w, b = _tensors((2, 6, height, 9 - height), 5, side, transposed=True)
        x = with_memory_format(x, layout)
        for padding in (*range(side), (1, 2), (0, side - 1)):
            for more in (0, 1, (0, 1)):
                expected = None
                try:
                    expected = F.conv_transpose2d(x, w, b, 2, padding, more)
                except RuntimeError:  # no output is left
                    with pytest.raises(ValueError, match="input: expected pixels enough"):
                        polyphase_conv_transpose2d(x, w, b, padding=padding, output_padding=more)
                    continue
                with poisoned_empty():
                    found = polyphase_conv_transpose2d(x, w, b, padding=padding,
                                                       output_padding=more, backend="cpu")
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@forms
def test_phases_compute_the_conv(side: int, stride: int) -> None:
    x, w, _ = _tensors((2, 5, 9, 12), 4, side)
    torch.testing.assert_close(reference.by_phases(x, w, stride), F.conv2d(x, w, None, stride),
                               rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 33, 512])
@pytest.mark.parametrize("positive", [False, True])
@forms
def test_error_is_within_the_derived_tolerance(side: int, stride: int, channels: int,
                                               positive: bool) -> None:
    """README.md: (channels / 128 + 4) roundings of what the transforms make of magnitudes."""
    x, w, _ = _tensors((1, channels, 18, 21), 40, side, dtype=torch.float32)
    if positive:
        x = x.relu() + 1
    truth = F.conv2d(x.double(), w.double(), None, stride)
    size = reference.by_phases(x.double(), w.double(), stride, magnitudes=True)
    found = polyphase_conv2d(x, w, stride=stride, backend="cpu")
    bound = (channels / 128 + 4) * 2.0**-24 * size
    assert ((found - truth).abs() <= bound).all()
    assert ((found - truth).abs() > bound / 1000).any()
    # The error that README.md states, of the output's root mean square.
    if channels == 512 and not positive:
        rms = truth.square().mean().sqrt()
        assert (found - truth).square().mean().sqrt() / rms < 6e-7


def _calls(side: int, stride: int, groups: int) -> tuple[Any, tuple[Tensor, ...]]:
    if stride:
        def conv(x: Tensor, w: Tensor, b: Tensor, backend: str) -> Tensor:
            return polyphase_conv2d(x, w, b, stride=stride, padding=(2, 1), groups=groups,
                                    backend=backend)

        return conv, _tensors((2, 70, 9, 7), 66 * groups, side) if groups == 1 else _tensors(
            (2, 12, 9, 7), 9 * groups, side, groups)

    def transposed(x: Tensor, w: Tensor, b: Tensor, backend: str) -> Tensor:
        return polyphase_conv_transpose2d(x, w, b, padding=(0, 1), output_padding=(1, 0),
                                          groups=groups, backend=backend)

    shape = (2, 70, 5, 6) if groups == 1 else (2, 12, 5, 6)
    return transposed, _tensors(shape, (66 if groups == 1 else 9) * groups, side, groups,
                                transposed=True)


@pytest.mark.parametrize("groups", [1, 3])  # by a product for each tap, and torch's
@pytest.mark.parametrize(("side", "stride"), [*FORMS, (3, 0), (4, 0)])
def test_gradients(side: int, stride: int, groups: int) -> None:
    call, tensors = _calls(side, stride, groups)
    with poisoned_empty():
        found = gradients(lambda *t: call(*t, backend="cpu"), tensors)
    expected = gradients(lambda *t: call(*t, backend="reference"), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("side", "stride"), [*FORMS, (3, 0), (4, 0)])
def test_gradcheck(side: int, stride: int) -> None:
    call, _ = _calls(side, stride, 1)
    tensors = _tensors((1, 2, 4, 3), 3, side, transposed=not stride)
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.autograd.gradcheck(lambda *t: call(*t, backend="cpu"), leaves)
    torch.autograd.gradgradcheck(lambda *t: call(*t, backend="cpu"), leaves)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize(("size", "padding"), [((5, 8), (2, 1)), ((4, 4), (0, 0)),
                                               ((37, 2), (1, 1)), ((9, 5), (3, 2))])
@pytest.mark.parametrize(("channels", "outputs"), [(64, 64), (65, 64), (63, 65), (64, 63)])
@forms
def test_the_weights_gradient_of_strided_convs(side: int, stride: int, size: tuple[int, int],
                                               padding: tuple[int, int], channels: int,
                                               outputs: int, layout: str) -> None:
    padding = min(padding[0], side - 1), padding[1]
    x, w, _ = _tensors((2, channels, *size), outputs, side)
    x = with_memory_format(x, layout)
    truth = F.conv2d(x, w.requires_grad_(), None, stride, padding)
    grad = with_memory_format(torch.linspace(-1, 2, truth.numel(), dtype=F64).view_as(truth),
                              layout)
    (expected,) = torch.autograd.grad(truth, w, grad)
    with poisoned_empty():
        found = weight_gradient(x, grad, w.detach().fill_(torch.nan), padding, 1, stride)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 12),
       st.integers(1, 12), st.sampled_from((1, 2, 3)), st.sampled_from((*FORMS, (3, 0), (4, 0))),
       st.integers(0, 3), st.integers(0, 1), st.integers(0, 2**31))
def test_any_shape(n: int, channels: int, out: int, h: int, w: int, groups: int,
                   form: tuple[int, int], padding: int, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    side, stride = form
    padding = min(padding, side - 1)
    x = torch.randn(n, channels * groups, max(h, side), max(w, side), dtype=F64)
    if stride:
        weight = torch.randn(out * groups, channels, side, side, dtype=F64)
        found = polyphase_conv2d(x, weight, stride=stride, padding=padding, groups=groups,
                                 backend="cpu")
        expected = F.conv2d(x, weight, None, stride, padding, 1, groups)
    else:
        weight = torch.randn(channels * groups, out, side, side, dtype=F64)
        found = polyphase_conv_transpose2d(x, weight, padding=padding, output_padding=more,
                                           groups=groups, backend="cpu")
        expected = F.conv_transpose2d(x, weight, None, 2, padding, more, groups)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_not_a_number_stays_in_reach_of_its_tile() -> None:
    x, w, b = _tensors((1, 32, 24, 24), 32, 4, dtype=torch.float32)
    x[0, 3, 10, 12] = float("nan")
    bad = polyphase_conv2d(x, w, b, padding=1, backend="cpu").isnan().any(1)[0]
    assert bad[F.conv2d(x, w, b, 2, 1).isnan().any(1)[0]].all()
    assert not bad[:3].any()
    assert not bad[6:].any()


def test_empty_batch_and_sixteen_bits() -> None:
    x, w, b = _tensors((1, 32, 8, 8), 32, 4, dtype=torch.float32)
    assert polyphase_conv2d(x[:0], w, b).shape == (0, 32, 3, 3)
    assert polyphase_conv_transpose2d(x[:0], w).shape == (0, 32, 18, 18)
    half = [t.bfloat16() for t in (x, w, b)]
    assert torch.equal(polyphase_conv2d(*half), F.conv2d(*half, 2))
    assert "reference" in str(explain(polyphase_conv2d, *half))


@pytest.mark.parametrize("stride", [2, 0])
def test_a_batch_of_gradients(stride: int) -> None:
    transposed = not stride
    x, w, b = (t.requires_grad_() for t in _tensors((1, 64, 5, 5), 64, 3, transposed=transposed))
    ours = polyphase_conv_transpose2d if transposed else polyphase_conv2d
    theirs = F.conv_transpose2d if transposed else F.conv2d
    y, expected = ours(x, w, b, backend="cpu"), theirs(x, w, b, 2)
    grads = torch.randn(3, *y.shape, dtype=F64)
    for found, wanted in zip(torch.autograd.grad(y, (x, w, b), grads, is_grads_batched=True),
                             torch.autograd.grad(expected, (x, w, b), grads, is_grads_batched=True),
                             strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("change", "message"), [
    ({"weight": (32, 16, 3, 3)}, "weight: expected shape"),
    ({"weight": (32, 32, 5, 5)}, "weight: expected a kernel 3x3 of stride 2 or 4x4 of stride 2"),
    ({"weight": (32, 32, 4, 3)}, "weight: expected a kernel .*got 4x3 of stride 2"),
    ({"stride": 1}, "weight: expected a kernel .*got 3x3 of stride 1"),
    ({"stride": 3}, "weight: expected a kernel .*got 3x3 of stride 3"),
    ({"groups": 5}, "groups: expected a divisor"),
    ({"padding": 3}, "padding: expected 0 to 2, or two such numbers, got 3"),
    ({"padding": -1}, "padding: expected 0 to 2"),
    ({"padding": (1, 1, 1)}, "padding: expected 0 to 2"),
    ({"padding": 1.0}, "padding: expected 0 to 2, or two such numbers, got 1.0"),
    ({"padding": None}, "padding: expected 0 to 2, or two such numbers, got None"),
    ({"bias": (31,)}, "bias: expected shape"),
    ({"input": (32, 8, 8)}, "input: expected"),
    ({"input": (1, 0, 8, 8), "weight": (32, 0, 3, 3)}, "input: expected at least one channel"),
    ({"weight": (0, 32, 3, 3)}, "weight: expected at least one output"),
    ({"input": (1, 32, 2, 8)}, "input: expected at least 3x3 pixels with their padding"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"input": (1, 32, 8, 8), "weight": (32, 32, 3, 3), **change}
    given = {k: torch.randn(v) if k in ("input", "weight", "bias") else v
             for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        polyphase_conv2d(given.pop("input"), given.pop("weight"), **given)


@pytest.mark.parametrize(("change", "message"), [
    ({"weight": (16, 32, 3, 3)}, "weight: expected shape"),
    ({"weight": (32, 32, 5, 5)}, "weight: expected a kernel 3x3 of stride 2 or 4x4 of stride 2;"),
    ({"output_padding": 2}, "output_padding: expected 0 to 1"),
    ({"weight": (32, 0, 3, 3)}, "weight: expected at least one output"),
    ({"bias": (31,)}, "bias: expected shape"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_mistakes_of_transposed_convs_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"input": (1, 32, 8, 8), "weight": (32, 32, 3, 3), **change}
    given = {k: torch.randn(v) if k in ("input", "weight", "bias") else v
             for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        polyphase_conv_transpose2d(given.pop("input"), given.pop("weight"), **given)


def _ran(module: nn.Module, x: Tensor) -> str:
    choices = explain(module, x).choices
    return choices[-1].op if choices else "torch"


MODULES: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "3x3": (WinogradConv2d, nn.Conv2d, (128, 160, 3), {"stride": 2, "padding": 1}),
    "4x4": (WinogradConv2d, nn.Conv2d, (64, 96, 4), {"stride": 2, "padding": 2}),
    "4x4 stride 1": (WinogradConv2d, nn.Conv2d, (64, 96, 4), {"padding": (2, 1), "bias": False}),
    "up 3x3": (WinogradConvTranspose2d, nn.ConvTranspose2d, (160, 128, 3),
               {"stride": 2, "padding": 1, "output_padding": 1}),
    "up 4x4": (WinogradConvTranspose2d, nn.ConvTranspose2d, (96, 64, 4),
               {"stride": 2, "padding": (1, 0), "groups": 2}),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_are_convs_that_choose(name: str) -> None:
    ours, torchs, sizes, options = MODULES[name]
    torch.manual_seed(0)
    module, plain = ours(*sizes, **options), torchs(*sizes, **options)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, sizes[0], 80, 64).contiguous(memory_format=torch.channels_last)
    op = "polyphase_conv_transpose2d" if "up" in name else "polyphase_conv2d"
    assert _ran(module, x) == op
    torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-5)
    with use_backend("reference"):
        assert torch.equal(module(x), plain(x))
    assert _ran(module, x[:, :, :4, :4]) == "torch"  # too few pixels for the kernels' transform
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), plain(x))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(x), module(x))
    torch.testing.assert_close(module(x[0]), plain(x[0]), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "stride": 3}, {"kernel_size": (3, 4), "stride": 2},
    {"kernel_size": 3, "stride": (2, 1)}, {"kernel_size": 4, "dilation": 2},
    {"kernel_size": 4, "stride": 2, "padding_mode": "reflect", "padding": 1},
    {"kernel_size": 3, "padding": 2}, {"kernel_size": 3, "stride": 2, "padding": 3},
    {"kernel_size": 4, "padding": "same"}, {"kernel_size": 5, "stride": 2}],
    ids=lambda v: " ".join(map(str, v.values())))
def test_other_convs_are_torchs(options: dict[str, Any]) -> None:
    module, plain = WinogradConv2d(64, 64, **options), nn.Conv2d(64, 64, **options)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, 64, 32, 32)
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "stride": 1}, {"kernel_size": 3, "stride": 2, "dilation": 2},
    {"kernel_size": 5, "stride": 2}, {"kernel_size": 3, "stride": 3, "output_padding": 2}],
    ids=lambda v: " ".join(map(str, v.values())))
def test_other_transposed_convs_are_torchs(options: dict[str, Any]) -> None:
    module = WinogradConvTranspose2d(64, 64, **options)
    plain = nn.ConvTranspose2d(64, 64, **options)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, 64, 16, 16)
    assert torch.equal(module(x), plain(x))


def test_an_output_size_is_torchs() -> None:
    module = WinogradConvTranspose2d(64, 64, 3, stride=2, padding=1)
    x = torch.randn(1, 64, 32, 32)
    for size in ([63, 63], [64, 64]):
        y = module(x, output_size=size)
        assert list(y.shape[2:]) == size
        assert torch.equal(y, nn.ConvTranspose2d.forward(module, x, size))


@pytest.mark.parametrize("name", MODULES)
def test_a_kept_transform_changes_no_value_and_is_never_stale(name: str) -> None:
    ours, torchs, sizes, options = MODULES[name]
    torch.manual_seed(0)
    module, plain = ours(*sizes, **options).eval(), torchs(*sizes, **options)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, sizes[0], 72, 60)
    with torch.no_grad():
        once = module(x)
        module.keep_transform = True
        for _ in range(3):
            assert torch.equal(module(x), once)
        groups = options.get("groups", 1)
        assert module.kept_bytes == 4 * transformed_size(module.weight, groups, "up" in name)
        module.weight.data[3, 2, 1, 1] += 1  # moves no version
        plain.weight.data[3, 2, 1, 1] += 1
        for _ in range(3):
            torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-5)
    module.train()
    assert module.kept_bytes == 0


def test_one_keeper_serves_other_strides_and_groups_in_turn() -> None:
    x, w, _ = _tensors((1, 64, 12, 12), 64, 4)
    kept = KeptWeight()
    for stride, groups in ((2, 1), (2, 1), (1, 1), (1, 1), (2, 2), (2, 2), (0, 1), (0, 1), (2, 1)):
        weight = w if groups == 1 else w[:, :32]
        if not stride:
            found = polyphase_conv_transpose2d(x, w, kept=kept, backend="cpu")
            expected = F.conv_transpose2d(x, w, None, 2)
        else:
            found = polyphase_conv2d(x, weight, stride=stride, groups=groups, kept=kept,
                                     backend="cpu")
            expected = F.conv2d(x, weight, None, stride, 0, 1, groups)
        torch.testing.assert_close(found, expected)


def test_one_keeper_serves_both_algorithms_in_turn() -> None:
    x, w, _ = _tensors((1, 64, 12, 12), 64, 3)
    kept = KeptWeight()
    for stride in (2, 2, 1, 1, 0, 0, 2, 2, 0, 0, 1):
        if stride == 1:
            found = winograd_conv2d(x, w, tile=2, kept=kept, backend="cpu")
        elif stride:
            found = polyphase_conv2d(x, w, padding=1, kept=kept, backend="cpu")
        else:
            found = polyphase_conv_transpose2d(x, w, kept=kept, backend="cpu")
        expected = F.conv2d(x, w, None, stride, 1) if stride else F.conv_transpose2d(x, w, None, 2)
        torch.testing.assert_close(found, expected)


def test_a_compiled_call_is_not_chosen_as_if_it_kept_a_transform() -> None:
    conv, x = WinogradConv2d(64, 64, 4, 2, 1).eval(), torch.randn(1, 64, 24, 24)
    chosen = [choice.takes_polyphase(x, 64, 1, 4, 2, 1, kept=kept) for kept in (False, True)]
    assert chosen == [False, True]
    conv.keep_transform = True
    graph = torch.export.export(conv, (x,)).graph
    assert not any("polyphase" in str(node.target) for node in graph.nodes)


def test_a_module_whose_stride_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIS_WINOGRAD", "2")
    conv, x = WinogradConv2d(64, 64, 3, 2, 1).eval(), torch.randn(1, 64, 64, 64)
    conv.keep_transform = True
    with torch.no_grad():
        for stride in ((2, 2), (2, 2), (1, 1)):
            conv.stride = stride
            torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, stride, 1),
                                       rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_transforms_operator(transposed: bool) -> None:
    _, w, _ = _tensors((1, 24, 6, 7), 36, 4, 2, torch.float32, transposed)
    assert transform_weight(w, 2, 2, transposed).shape == (transformed_size(w, 2, transposed),)
    # Its values are of this processor's layout, and unused ones are not written.
    torch.library.opcheck(torch.ops.smis_kernels.polyphase_weight.default, (w, 2, 2, transposed),
                          test_utils=("test_schema", "test_autograd_registration"))


def test_functions_choose_and_pass_on_what_they_are_given() -> None:
    x, w, b = _tensors((1, 64, 60, 56), 96, 4)
    for padding in (1, (0, 1)):
        assert "polyphase_conv2d" in str(explain(strided_conv2d, x, w, b, stride=2,
                                                 padding=padding))
        torch.testing.assert_close(strided_conv2d(x, w, b, stride=2, padding=padding),
                                   F.conv2d(x, w, b, 2, padding))
    torch.testing.assert_close(strided_conv2d(x, w[:, :16], b, groups=4, padding=5),
                               F.conv2d(x, w[:, :16], b, 1, 5, 1, 4))
    x, w, b = _tensors((1, 128, 60, 56), 96, 3, transposed=True)
    for padding, more in ((1, 1), ((0, 1), (1, 0))):
        assert "polyphase_conv_transpose2d" in str(explain(
            doubling_conv2d, x, w, b, padding=padding, output_padding=more))
        torch.testing.assert_close(
            doubling_conv2d(x, w, b, padding=padding, output_padding=more),
            F.conv_transpose2d(x, w, b, 2, padding, more))


def test_products_are_counted() -> None:
    """By hand: tiles of 3x3, 49 products each of a 3x3 kernel and 64 of a 4x4 one."""
    x, w = torch.zeros(2, 64, 16, 22), torch.zeros(96, 64, 3, 3)
    assert effective_macs(lambda: polyphase_conv2d(x, w, padding=1)) == 2 * 3 * 4 * 49 * 64 * 96
    w = torch.zeros(96, 64, 4, 4)
    assert effective_macs(lambda: polyphase_conv2d(x, w, stride=1, padding=2)
                          ) == 2 * 6 * 8 * 64 * 64 * 96
    w = torch.zeros(64, 96, 3, 3)  # rows 0 to 16 of a phase, the first of which one tap reads
    assert effective_macs(lambda: polyphase_conv_transpose2d(
        x, w, padding=1, output_padding=1)) == 2 * 6 * 8 * 49 * 64 * 96


def test_the_terms_of_the_choice() -> None:
    """By hand, of 2 x 16x22 pixels, 32 channels and 48 outputs a group."""
    x = torch.zeros(2, 64, 16, 22)
    assert choice.terms(x, 96, 2, 3, 2, 1) == (
        2 * 8 * 11 * 9, 2 * 3 * 4 * 49, pytest.approx(2 * 3 * 4 * (64 / 48 + 16 / 32)))
    assert choice.terms(x, 96, 2, 4, 1, 2) == (
        2 * 17 * 23 * 16, 2 * 6 * 8 * 64, pytest.approx(2 * 6 * 8 * (64 / 48 + 16 / 32)))
    assert choice.terms(x, 96, 2, 3, 2, 1, 1, transposed=True) == (
        2 * 16 * 22 * 9, 2 * 6 * 8 * 49, pytest.approx(2 * 6 * 8 * (16 / 48 + 64 / 32)))


def test_narrow_convs_are_torchs() -> None:
    for channels, outputs, dtype in ((31, 64, F64), (64, 31, F64), (64, 64, torch.bfloat16)):
        x = torch.zeros(1, channels, 64, 64, dtype=dtype)
        assert not choice.takes_polyphase(x, outputs, 1, 4, 2, 1)
    assert choice.takes_polyphase(torch.zeros(1, 32, 64, 64), 32, 1, 4, 2, 1)
