"""indexed_shortcut against its definition; where blocks take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smis_kernels import SPADE, CGNorm, LabelLayout, WinogradConv2d, explain, modulate_pair
from smis_kernels.ops.indexed_shortcut.op import indexed_shortcut
from smis_kernels.runtime.backend import BackendError, missing
from smis_kernels.testing import assert_as_accurate, gradients, poisoned_empty
from smis_models.benchmark.macs import effective_macs

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
F64 = torch.float64
Call = dict[str, Any]


def made(channels: int, outputs: int, size: tuple[int, int], groups: int = 1, rows: int = 5,
         upsample: bool = True, batch: int = 2, dtype: torch.dtype = F64,
         ) -> tuple[tuple[Tensor, ...], Call]:
    random = torch.Generator().manual_seed(channels + 7 * outputs + size[1])

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=F64).to(dtype)

    x = draw(batch, channels * groups, *size).contiguous(memory_format=torch.channels_last)
    height, width = (2 * n if upsample else n for n in size)
    index = torch.randint(rows, (batch, height, width), generator=random).int()
    index[:, : height // 2] = index[:, :1, :1]  # where all windows are alike
    weight = draw(outputs * groups, channels, 1, 1) / channels**0.5
    running = {"running_mean": draw(channels * groups),
               "running_var": draw(channels * groups).square() + 0.5}
    return (x, index, draw(rows, 2 * channels * groups), weight), {
        "groups": groups, "upsample": upsample, **running}


def check(tensors: tuple[Tensor, ...], options: Call) -> None:
    expected = indexed_shortcut(*tensors, backend="reference", **options)
    with poisoned_empty():
        found = indexed_shortcut(*tensors, backend="cpu", **options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


# csrc: lanes and panels of every instruction set, kDepth; kPairs, also where four
# windows differ; kMostPixels and the least of a block.
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33, 159, 160, 161, 321])
def test_channels(channels: int, upsample: bool) -> None:
    check(*made(channels, 5, (3, 4), upsample=upsample))


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 23, 24, 25, 47, 48, 49, 97])
def test_outputs(outputs: int) -> None:
    check(*made(3, outputs, (3, 4), groups=2))


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("pixels", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300,
                                    4095, 4097, 9000])
@pytest.mark.parametrize("upsample", [False, True])
def test_pairs(pixels: int, rows: int, upsample: bool) -> None:
    check(*made(4, 6, (1, pixels), rows=rows, upsample=upsample, batch=1))


@pytest.mark.parametrize("rows", [2, 5, 40])
def test_pixels_of_one_to_four_windows(rows: int) -> None:
    """Whatever their number, no more pairs than there is room for are gathered."""
    (x, index, table, weight), options = made(40, 6, (31, 29), rows=rows)
    index = torch.randint(rows, index.shape, generator=torch.Generator().manual_seed(0)).int()
    check((x, index, table, weight), options)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_large_outputs(threads: int) -> None:
    """Beyond 8 MiB stores pass the caches."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*made(10, 33, (65, 64)))
        check(*made(6, 17, (3, 5), groups=3))
    finally:
        torch.set_num_threads(before)


def test_features_in_other_layouts() -> None:
    (x, index, table, weight), options = made(6, 4, (5, 3))
    wide = torch.full((2, 20, 5, 3), torch.nan, dtype=F64).contiguous(
        memory_format=torch.channels_last)
    wide[:, 9:15] = x
    last = weight.contiguous(memory_format=torch.channels_last)
    for features in (x.contiguous(), wide[:, 9:15], x[:, :, :, :1], x.flip(0)):
        there = index[:, :, : 2 * features.shape[3]]
        check((features, there, table, last), options)
    check((x[:1].expand(3, -1, -1, -1), index[:1].expand(3, -1, -1), table, weight), options)
    none = indexed_shortcut(x[:0], index[:0], table, weight, backend="cpu", **options)
    assert none.shape == (0, 4, 10, 6)


@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
def test_statistics_of_the_data(norm: str) -> None:
    tensors, options = made(6, 4, (5, 3))
    options = {"groups": 1, "upsample": True, "norm": norm, "num_groups": 3}
    check(tensors, options)


def test_running_statistics_move_once() -> None:
    tensors, options = made(6, 4, (5, 3))
    kept = [options["running_mean"].clone(), options["running_var"].clone()]
    check(tensors, {**options, "training": True, "momentum": 0.0})
    for backend in ("cpu", "reference"):
        mean, var = (t.clone() for t in kept)
        indexed_shortcut(*tensors, backend=backend, **{
            **options, "running_mean": mean, "running_var": var, "training": True})
        if backend == "cpu":
            moved = mean, var
    torch.testing.assert_close(moved, (mean, var))
    assert not torch.equal(mean, kept[0])


def test_float32_is_as_accurate_as_the_definition() -> None:
    for channels in (33, 300):
        (x, index, table, weight), options = made(channels, 20, (9, 11))
        truth = indexed_shortcut(x, index, table, weight, backend="reference", **options)
        narrow = x.float(), index, table.float(), weight.float()
        options = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
        found, plain = (indexed_shortcut(*narrow, backend=backend, **options)
                        for backend in ("cpu", "reference"))
        assert_as_accurate(found, plain, truth, what="y")


def test_gradients_are_those_of_the_two_steps() -> None:
    (x, index, table, weight), options = made(6, 4, (5, 3))

    def call(backend: str) -> Callable[..., Tensor]:
        return lambda x, t, w: indexed_shortcut(x, index, t, w, backend=backend, **options)

    leaves = x, table, weight
    for found, expected in zip(gradients(call("cpu"), leaves), gradients(call("reference"), leaves),
                               strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    for i in range(3):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate(leaves)]
        assert call("cpu")(*one).requires_grad
    _, tangent = torch.func.jvp(call("auto"), leaves, leaves)
    _, expected = torch.func.jvp(call("reference"), leaves, leaves)
    torch.testing.assert_close(tangent, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 20), st.integers(1, 9),
       st.integers(1, 9), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_any_shape(batch: int, channels: int, outputs: int, height: int, width: int, groups: int,
                   rows: int, upsample: bool) -> None:
    check(*made(channels, outputs, (height, width), groups, rows, upsample, batch))


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"groups": 4}, ValueError, "groups: expected a divisor of 6 channels and 4 outputs, got 4"),
    ({"weight": torch.zeros(4, 6, 3, 3, dtype=F64)}, ValueError, "weight: expected shape"),
    ({"weight": torch.zeros(4, 6, 1, 1)}, TypeError, "weight: expected dtype float64"),
    ({"table": torch.zeros(5, 6, dtype=F64)}, ValueError, "table: expected shape"),
    ({"index": torch.full((2, 10, 6), 5, dtype=torch.int32)}, ValueError,
     r"index: expected rows 0\.\.4, got 5"),
    ({"backend": "triton"}, BackendError, "indexed_shortcut has reference, cpu; got 'triton'"),
])
def test_mistakes(change: Call, error: type[Exception], words: str) -> None:
    (x, index, table, weight), options = made(6, 4, (5, 3))
    given = {"index": index, "table": table, "weight": weight, **options, **change}
    with pytest.raises(error, match=words):
        indexed_shortcut(x, given.pop("index"), given.pop("table"), given.pop("weight"), **given)


def block(cls: type[CGNorm] = SPADE, groups: int = 1, norm: str = "batch", **options: Any
          ) -> tuple[nn.Module, nn.Module, nn.Module, Tensor, LabelLayout]:
    torch.manual_seed(0)
    more = {"groups": groups} if cls is CGNorm else {}
    norms = [cls(8 * groups, 4 * groups, 4 * groups, norm=norm, **more) for _ in range(2)]
    for one in norms:
        for name, buffer in one.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
    conv = WinogradConv2d(8 * groups, 6 * groups, 1, groups=groups, **{"bias": False, **options})
    x = torch.randn(1, 8 * groups, 16, 16).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4 * groups).view(2 * groups, 2).repeat_interleave(16, 1)
    layout = LabelLayout.from_labels(labels.repeat_interleave(-(-32 // len(labels)), 0)[None, :32],
                                     4 * groups)
    for module in (*norms, conv):
        module.eval()
    return norms[0], norms[1], conv, x, layout


@torch.no_grad()
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize(("cls", "groups"), [(SPADE, 1), (CGNorm, 2)])
def test_a_block_takes_it(cls: type[CGNorm], groups: int, norm: str) -> None:
    first, second, conv, x, layout = block(cls, groups, norm)

    def call(conv_s: nn.Module | None) -> tuple[Tensor, Tensor]:
        return modulate_pair(first, second, x, layout, upsample=True, conv_s=conv_s)

    y, shortcut = call(conv)
    expected = call(None)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(shortcut, F.conv2d(expected[1], conv.weight, groups=groups))
    assert "indexed_shortcut" in str(explain(call, conv))
    compiled = torch.compile(call, fullgraph=cls is SPADE, backend="aot_eager")
    torch.testing.assert_close(compiled(conv), (y, shortcut))


def test_what_it_leaves_to_the_conv() -> None:
    """Hooks, other settings, gradients, training, other dtypes and formats: the two steps."""
    def ran(first: Any, second: Any, conv: Any, x: Tensor, layout: Any, **options: Any) -> str:
        return str(explain(lambda: modulate_pair(first, second, x, layout, conv_s=conv,
                                                 upsample=True, **options)))

    with torch.no_grad():
        assert "indexed_shortcut" in ran(*block())
        for options in ({"bias": True}, {"padding": 1}, {"stride": 2}):
            assert "indexed_shortcut" not in ran(*block(**options))
        first, second, conv, x, layout = block()
        seen: list[Tensor] = []
        handle = conv.register_forward_hook(lambda m, a, y: seen.append(y))
        assert "indexed_shortcut" not in ran(first, second, conv, x, layout)
        assert len(seen) == 1
        handle.remove()
        conv.forward = lambda x: x[:, :1]
        assert modulate_pair(first, second, x, layout, upsample=True, conv_s=conv)[1].shape[1] == 1
        del conv.forward
        assert "indexed_shortcut" not in ran(first, second, conv, x.contiguous(), layout)
        second.train()
        first.train()
        assert "indexed_shortcut" not in ran(first, second, conv, x, layout)


def test_gradients_of_a_block_in_eval() -> None:
    first, second, conv, x, layout = block()

    def call() -> Tensor:
        return modulate_pair(first, second, x, layout, upsample=True, conv_s=conv)[1]

    expected = torch.ones_like(call())
    for wanted in (conv.weight, second.mlp_gamma.weight, x.requires_grad_()):
        for tensor in (*first.parameters(), *second.parameters(), *conv.parameters(), x):
            tensor.requires_grad_(tensor is wanted)
        (found,) = torch.autograd.grad(call(), wanted, expected)
        assert found.abs().sum() > 0


@torch.no_grad()
def test_another_kind_of_norm_beside_it() -> None:
    """Norms that share no pass: the conv is called on the second's output."""
    first, _, conv, x, layout = block()
    other = CGNorm(8, 4, 0, groups=1).eval()
    y, shortcut = modulate_pair(first, other, x, layout, upsample=True, conv_s=conv)
    torch.testing.assert_close(y, first(x, layout, activation="leaky_relu", upsample=True))
    torch.testing.assert_close(shortcut, conv(other(x, layout, upsample=True)))


@torch.no_grad()
def test_counted_products() -> None:
    tensors, options = made(6, 4, (5, 3))
    assert effective_macs(lambda: indexed_shortcut(*tensors, **options)) == 2 * 15 * 6 * 4
