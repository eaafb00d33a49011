"""conditional_conv2d against predict, unfold, multiply, sum: values, gradients, memory, errors."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import ConditionalConv2d, conditional_conv2d, explain
from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.runtime.tuned import trial
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    max_error,
    poisoned_empty,
    with_memory_format,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
# N, C, H, W, D
CASES = [(2, 6, 5, 7, 5), (1, 16, 8, 8, 16), (3, 4, 1, 1, 3), (2, 3, 1, 5, 1), (1, 1, 4, 3, 17),
         (1, 17, 20, 37, 33), (1, 35, 3, 150, 20), (2, 2, 70, 3, 4)]


def make(case: tuple[int, ...], layout: str = "contiguous", other: str | None = None,
         dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    n, c, h, w, depth = case
    generator = torch.Generator().manual_seed(sum(case))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (with_memory_format(draw(n, c, h, w), layout),
            with_memory_format(draw(n, depth, h, w), other or layout),
            draw(9 * c, depth, 3, 3) / (9 * depth) ** 0.5, draw(9 * c))


def results(inputs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    def call(*tensors: Tensor) -> Tensor:
        return conditional_conv2d(*tensors, backend=backend)

    return [call(*inputs), *gradients(call, inputs)]


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_equals_reference(case: tuple[int, ...], layout: str) -> None:
    for other in ("contiguous", "channels_last", "sliced"):
        inputs = make(case, layout, other)
        for a, b in zip(results(inputs, "cpu"), results(inputs, "reference"), strict=True):
            assert a.shape == b.shape
            assert max_error(a, b) < 1e-12


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("case", [*CASES, (1, 9, 24, 24, 7), (2, 5, 9, 131, 4), (1, 3, 4, 257, 6)],
                         ids=str)
def test_tiles_of_4x4_equal_reference(case: tuple[int, ...], layout: str) -> None:
    inputs = make(case, layout, "channels_last")
    expected = conditional_conv2d(*inputs, backend="reference")
    with poisoned_empty():
        found = conditional_conv2d(*inputs, tile=4, backend="cpu")
    assert max_error(found, expected) < 1e-12
    assert found.stride() == conditional_conv2d(*inputs, backend="cpu").stride()


@needs_cpu
def test_tiles_of_4x4_over_more_regions_than_fit_at_once() -> None:
    inputs = make((2, 3, 40, 260, 120))
    found = conditional_conv2d(*inputs, tile=4, backend="cpu")
    assert max_error(found, conditional_conv2d(*inputs, backend="reference")) < 1e-12


@needs_cpu
def test_gradients_behind_4x4_tiles() -> None:
    def results_of(tile: int, backend: str) -> list[Tensor]:
        return gradients(lambda *t: conditional_conv2d(*t, tile=tile, backend=backend), inputs)

    inputs = make((2, 6, 9, 7, 5))
    for a, b in zip(results_of(4, "cpu"), results_of(2, "reference"), strict=True):
        assert max_error(a, b) < 1e-12
    small = tuple(t.requires_grad_() for t in make((1, 2, 5, 3, 2)))
    assert torch.autograd.gradgradcheck(lambda *t: conditional_conv2d(*t, tile=4, backend="cpu"),
                                        small)


@needs_cpu
def test_error_of_tiles_in_float32() -> None:
    inputs = make((1, 32, 64, 64, 128))
    exact = conditional_conv2d(*inputs, backend="reference")
    narrow = tuple(t.float() for t in inputs)
    direct = max_error(conditional_conv2d(*narrow, backend="reference"), exact)
    for tile in (2, 4):
        error = max_error(conditional_conv2d(*narrow, tile=tile, backend="cpu"), exact)
        assert error < 4 * direct + 2e-7, (tile, error, direct)


@needs_cpu
def test_the_module_takes_large_tiles_in_eval_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = ConditionalConv2d(4, 6)

    def takes(tile: int, side: int) -> bool:
        found = str(explain(conv, torch.randn(1, 4, side, side), torch.randn(1, 6, side, side)))
        return f"tile={tile}" in found

    assert takes(2, 24) and takes(2, 64)
    conv.eval()
    assert takes(2, 23) and takes(4, 24) and takes(4, 64)
    monkeypatch.setenv("SMIS_WINOGRAD", "2")
    assert takes(2, 64)


@needs_cpu
def test_more_regions_than_fit_at_once() -> None:
    # 8 MiB of transformed condition are made at a time; fp64 at depth 128 fills them with 8 regions
    inputs = make((2, 3, 20, 260, 120))
    for a, b in zip(results(inputs, "cpu"), results(inputs, "reference"), strict=True):
        assert max_error(a, b) < 1e-12


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype, layout: str) -> None:
    inputs = make((2, 19, 23, 17, 64), layout, dtype=dtype)
    truth = results(tuple(t.double() for t in inputs), "reference")
    for a, b, t in zip(results(inputs, "cpu"), results(inputs, "reference"), truth, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, b, t)


@needs_cpu
def test_output_keeps_the_memory_format_of_the_input() -> None:
    for layout, other in itertools.product(("contiguous", "channels_last"), repeat=2):
        inputs = make(CASES[0], layout, other)
        last = layout == "channels_last"
        format = torch.channels_last if last else torch.contiguous_format
        for backend in ("cpu", "reference"):
            assert conditional_conv2d(*inputs, backend=backend).is_contiguous(memory_format=format)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_element_is_written(layout: str) -> None:
    with poisoned_empty():
        for case in CASES:
            assert all(torch.isfinite(t).all() for t in results(make(case, layout), "cpu"))


@needs_cpu
def test_gradients_that_nobody_needs_are_not_made() -> None:
    x, h, weight, bias = make(CASES[0])
    for needed in itertools.product((False, True), repeat=4):
        leaves = [t.clone().requires_grad_(need) for t, need in
                  zip((x, h, weight, bias), needed, strict=True)]
        if any(needed):
            conditional_conv2d(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(needed)


@needs_cpu
def test_compiles_into_one_graph() -> None:
    inputs = make(CASES[0], dtype=torch.float32)
    compiled = torch.compile(conditional_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), conditional_conv2d(*inputs))


@needs_cpu
def test_the_predicted_kernels_are_never_in_memory() -> None:
    x, h, weight, bias = make((1, 16, 128, 128, 32), dtype=torch.float32)
    leaves = tuple(t.requires_grad_() for t in (x, h, weight, bias))
    kernels = 9 * x.numel() * x.element_size()
    with torch.profiler.profile(profile_memory=True) as profile:
        conditional_conv2d(*leaves).sum().backward()
    assert max(abs(event.cpu_memory_usage) for event in profile.events()) < kernels


# N, C, H, W, D: one pixel, rows and columns of one, less than a tile
SMALL = [(3, 4, 1, 1, 3), (2, 3, 1, 5, 1), (1, 1, 7, 1, 17), (2, 5, 6, 7, 9)]
# tiles that are full; one element more than tiles of pixels, channels and depth
FULL, MORE = (1, 32, 8, 8, 64), (1, 33, 5, 13, 65)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels() -> Any:
    """The module of the launchers."""
    pytest.importorskip("triton")
    return importlib.import_module("smis_kernels.ops.conditional_conv.triton")


@pytest.mark.triton
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_triton_equals_reference(case: tuple[int, ...], layout: str) -> None:
    other = {"contiguous": "channels_last", "channels_last": "sliced"}.get(layout, layout)
    inputs = tuple(t.to(DEVICE) for t in make(case, layout, other))
    for a, b in zip(results(inputs, "triton"), results(inputs, "reference"), strict=True):
        assert a.shape == b.shape
        assert max_error(a, b) < 1e-12


@pytest.mark.triton
@pytest.mark.parametrize("case", [SMALL[3], FULL, MORE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_is_as_accurate_as_the_reference(dtype: torch.dtype, case: tuple[int, ...]) -> None:
    inputs = tuple(t.to(DEVICE, dtype) for t in make(case, "channels_last"))
    truth = results(tuple(t.double() for t in inputs), "reference")
    found, expected = results(inputs, "triton"), results(inputs, "reference")
    for a, b, t in zip(found, expected, truth, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, b, t)


def test_float32_in_two_parts(kernels: Any) -> None:
    weight = torch.cat((torch.randn(4096), torch.tensor([0.0, -0.0, 1e-30, 3e38])))
    high, low = kernels._in_parts(weight)
    assert not torch.any(torch.stack((high, low)).view(torch.int32) & 0x1FFF)
    assert torch.all((high.double() + low.double() - weight).abs() <= weight.abs() * 2.0**-23)
    infinite, none = kernels._in_parts(torch.tensor([float("inf"), float("nan")]))[0]
    assert infinite.isinf() and none.isnan()


@pytest.mark.triton
def test_triton_without_a_bias() -> None:
    inputs = tuple(t.to(DEVICE) for t in make(SMALL[3], "channels_last"))[:3]
    for a, b in zip(results(inputs, "triton"), results(inputs, "reference"), strict=True):
        assert max_error(a, b) < 1e-12


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_writes_every_element(layout: str) -> None:
    with poisoned_empty():
        for case in SMALL:
            inputs = tuple(t.to(DEVICE) for t in make(case, layout))
            for found, like in zip(results(inputs, "triton"), (inputs[0], *inputs), strict=True):
                assert found.shape == like.shape
                assert torch.isfinite(found).all()


def predictor_gradients(kernels: Any, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
    """Of condition, weight and bias, by the launcher and by the definition."""
    x, *leaves = (t.to(DEVICE) for t in inputs)
    grad = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=DEVICE).view(x.shape)
    grad = grad.to(memory_format=torch.channels_last)
    found = kernels.conditional_conv_backward(grad, x, *leaves, False, True, True)
    assert found[0].numel() == 0
    leaves = [t.requires_grad_() for t in leaves]
    y = conditional_conv2d(x, *leaves, backend="reference")
    return list(found[1:]), list(torch.autograd.grad((y * grad).sum(), leaves))


@pytest.mark.triton
@pytest.mark.parametrize("rows", [1, 3, 4, 6, 7, 13, 14, 28])
def test_triton_gradients_in_slabs(monkeypatch: pytest.MonkeyPatch, kernels: Any,
                                   rows: int) -> None:
    """Of one row and its neighbours, of several, of one image of seven rows, of two."""
    monkeypatch.setattr(kernels, "SCRATCH", rows * 9 * 4 * 5 * 8 + 1)
    for layout in ("contiguous", "channels_last"):
        with poisoned_empty():
            found, expected = predictor_gradients(kernels, make((3, 4, 7, 5, 6), layout))
        for a, b in zip(found, expected, strict=True):
            assert max_error(a, b) < 1e-12


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_gradients_of_many_slabs_are_as_accurate(
    monkeypatch: pytest.MonkeyPatch, kernels: Any, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(kernels, "SCRATCH", 4 * 9 * 24 * 40 * dtype.itemsize)  # two rows each
    inputs = make((1, 24, 40, 40, 16), "channels_last", dtype=dtype)
    found, expected = predictor_gradients(kernels, inputs)
    _, truth = predictor_gradients(kernels, tuple(t.double() for t in inputs))
    for a, b, t in zip(found, expected, truth, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, b, t)


@pytest.mark.triton
def test_triton_keeps_nan_where_it_belongs(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    """The rows of a slab that are another's are zero, whatever lies there."""
    monkeypatch.setattr(kernels, "SCRATCH", 3 * 9 * 4 * 5 * 8)
    inputs = make((1, 4, 7, 5, 6), "channels_last")
    inputs[0][0, 1, 3, 2] = float("nan")
    for a, b in zip(*predictor_gradients(kernels, inputs), strict=True):
        assert b.isnan().any()
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("height", [1, 2, 7, 20])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 9, 20, 41])
def test_slabs_own_every_row_once(monkeypatch: pytest.MonkeyPatch, kernels: Any, images: int,
                                  height: int, room: int) -> None:
    monkeypatch.setattr(kernels, "SCRATCH", 10 * room)
    owned = torch.zeros(images, height)
    for which, (start, stop), (begin, end) in kernels._slabs(images, height, 10):
        owned[which, begin:end] += 1
        assert (start, stop) == (max(begin - 1, 0), min(end + 1, height))
        assert (stop - start) * len(owned[which]) <= max(room, 3)
    assert torch.all(owned == 1)


@pytest.mark.triton
def test_triton_makes_only_the_gradients_that_are_needed() -> None:
    inputs = tuple(t.to(DEVICE) for t in make((1, 3, 3, 4, 2), "channels_last"))
    expected = results(inputs, "reference")[1:]
    for needed in itertools.product((False, True), repeat=4):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        if any(needed):
            y = conditional_conv2d(*leaves, backend="triton")
            cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
            (y * cotangent.to(y)).sum().backward()
        for leaf, need, wanted in zip(leaves, needed, expected, strict=True):
            assert (leaf.grad is not None) == need
            assert leaf.grad is None or max_error(leaf.grad, wanted) < 1e-12


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="a limit that no GPU has")
def test_triton_batches_beyond_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smis_kernels.runtime.triton_support.GRID_LIMIT", 1)
    inputs = make((3, 4, 2, 3, 3), "channels_last")
    for a, b in zip(results(inputs, "triton"), results(inputs, "reference"), strict=True):
        assert max_error(a, b) < 1e-12


@pytest.mark.triton
@pytest.mark.parametrize("tile", [(128, 128, 64, 8, 3), (32, 16, 16, 4, 2)])
def test_triton_tiles_as_a_gpu_may_prefer(monkeypatch: pytest.MonkeyPatch, kernels: Any,
                                          tile: tuple[int, ...]) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    inputs = tuple(t.to(DEVICE) for t in make((1, 20, 5, 27, 20), "channels_last",
                                              dtype=torch.float32))
    truth = results(tuple(t.double() for t in inputs), "reference")
    names = ("pixels", "channels", "depth", "warps", "stages")
    with trial("conditional_conv", dict(zip(names, tile, strict=True))):
        found = results(inputs, "triton")
    for a, b, t in zip(found, results(inputs, "reference"), truth, strict=True):
        assert_as_accurate(a, b, t)


@pytest.mark.parametrize(("shape", "dtype", "tile"), [
    ((1, 128, 256, 256), torch.bfloat16, (128, 128, 32, 8)),
    ((1, 64, 256, 256), torch.bfloat16, (128, 64, 64, 8)),
    ((1, 1024, 32, 32), torch.bfloat16, (128, 64, 64, 8)),
    ((1, 1024, 16, 16), torch.bfloat16, (64, 64, 64, 4)),
    ((4, 1024, 16, 16), torch.bfloat16, (128, 64, 64, 8)),
    ((1, 1, 1, 1), torch.float32, (64, 16, 64, 4)),
    ((1, 8, 64, 64), torch.float64, (32, 16, 32, 8)),
])
def test_tiles_shrink_until_every_processor_has_work(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, tile: tuple[int, ...]
) -> None:
    found = kernels._settings(torch.empty(shape, dtype=dtype, device="meta"), 128)
    names = ("BLOCK_P", "BLOCK_C", "BLOCK_D", "num_warps")
    assert tuple(found[name] for name in names) == tile


def test_rows_beyond_32_bits_are_refused(kernels: Any) -> None:
    x = torch.empty((1, 4, 2, 2**28), device="meta").to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"input: expected rows of an image closer than 2\^31"):
        kernels._check_rows(64, x)


# torch's conv, of which the definition is made, refuses pictures without rows or columns.
@pytest.mark.parametrize(("backend", "n", "height", "width"), [
    ("reference", 0, 6, 6), ("auto", 0, 6, 6),
    pytest.param("auto", 2, 0, 6, marks=needs_cpu), pytest.param("auto", 2, 6, 0, marks=needs_cpu)])
def test_no_pixels_pass(backend: str, n: int, height: int, width: int) -> None:
    x, h = torch.randn(n, 4, height, width), torch.randn(n, 5, height, width)
    operands = [t.requires_grad_() for t in (x, h, torch.randn(36, 5, 3, 3), torch.randn(36))]
    y = conditional_conv2d(*operands, backend=backend)
    assert y.shape == x.shape
    y.sum().backward()
    for operand in operands:
        assert operand.grad is not None
        assert operand.grad.shape == operand.shape
        assert not operand.grad.any()


def test_module_has_the_parameters_of_the_published_predictor() -> None:
    conv, published = ConditionalConv2d(4, 6), nn.Conv2d(6, 36, 3, padding=1)
    conv.load_state_dict(published.state_dict())
    x, h = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(
        conv(x, h), conditional_conv2d(x, h, published.weight, published.bias))


@pytest.mark.parametrize(("shapes", "message"), [
    (((1, 4, 5, 5), (1, 6, 5, 4), (36, 6, 3, 3), (36,)),
     r"condition: expected shape \(1, 6, 5, 5\) to match input .*got \(1, 6, 5, 4\)"),
    (((1, 4, 5, 5), (2, 6, 5, 5), (36, 6, 3, 3), (36,)), r"condition: .*got \(2, 6, 5, 5\)"),
    (((1, 4, 5, 5), (1, 6, 5, 5), (35, 6, 3, 3), (36,)),
     r"weight: expected shape \(36, 6, 3, 3\) for input .*got \(35, 6, 3, 3\)"),
    (((1, 4, 5, 5), (1, 6, 5, 5), (36, 6, 5, 5), (36,)), r"weight: .*got \(36, 6, 5, 5\)"),
    (((1, 4, 5, 5), (1, 6, 5, 5), (36, 6, 3, 3), (4,)), r"bias: .*got \(4,\)"),
    (((4, 5, 5), (1, 6, 5, 5), (36, 6, 3, 3), (36,)), r"input: expected \(N, C, H, W\)"),
])
def test_bad_input(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditional_conv2d(*(torch.zeros(shape) for shape in shapes))


def test_mixed_dtypes_are_refused() -> None:
    x, h, weight, bias = make(CASES[0])
    with pytest.raises(TypeError, match="condition: expected dtype float64; got float32"):
        conditional_conv2d(x, h.float(), weight, bias)


@needs_cpu
def test_the_operator_knows_two_tiles() -> None:
    inputs = make((1, 2, 5, 6, 3))
    for tile in (0, 3, 5):
        with pytest.raises(RuntimeError, match=f"tile: expected 2 or 4, got {tile}"):
            torch.ops.smis_kernels.conditional_conv(*inputs, tile)
        with pytest.raises(ValueError, match=f"tile: expected 2 or 4, got {tile}"):
            conditional_conv2d(*inputs, tile=tile)


def test_sizes_of_an_export_take_small_tiles() -> None:
    conv = ConditionalConv2d(2, 3).eval()
    sizes = {2: torch.export.Dim("h", min=8, max=64), 3: torch.export.Dim("w", min=8, max=64)}
    example = torch.randn(1, 2, 30, 30), torch.randn(1, 3, 30, 30)
    program = torch.export.export(conv, example, dynamic_shapes=(sizes, sizes))
    for side in (8, 40):
        x, h = torch.randn(1, 2, side, side), torch.randn(1, 3, side, side)
        torch.testing.assert_close(program.module()(x, h), conv(x, h), rtol=1e-4, atol=1e-4)
