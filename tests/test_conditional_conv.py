"""conditional_conv2d against predict, unfold, multiply, sum: values, gradients, memory, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import ConditionalConv2d, conditional_conv2d, explain
from smis_kernels.runtime.backend import missing, triton_interpreted
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


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_triton_equals_reference(layout: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Strides are read alike at every size: beyond a tile, the format whose strides tell no other.
    large = ((1, 70, 3, 30, 40),) if layout == "sliced" or device == "cuda" else ()
    for case in ((2, 5, 6, 7, 9), *large):
        inputs = tuple(t.to(device) for t in make(case, layout, dtype=torch.float32))
        found, expected = results(inputs, "triton"), results(inputs, "reference")
        truth = results(tuple(t.double() for t in inputs), "reference")
        for a, b, t in zip(found, expected, truth, strict=True):
            assert_as_accurate(a, b, t)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = tuple(t.to(device, dtype) for t in make((1, 9, 5, 5, 6), "channels_last"))
    truth = results(tuple(t.double() for t in inputs), "reference")
    found, expected = results(inputs, "triton"), results(inputs, "reference")
    for a, b, t in zip(found, expected, truth, strict=True):
        assert_as_accurate(a, b, t, floor=2 * torch.finfo(dtype).eps)


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="a limit that no GPU has")
def test_triton_batches_beyond_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smis_kernels.runtime.triton_support.GRID_LIMIT", 1)
    inputs = make((3, 4, 2, 3, 3), "channels_last")
    for a, b in zip(results(inputs, "triton"), results(inputs, "reference"), strict=True):
        assert max_error(a, b) < 1e-11


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_empty_batch_passes(backend: str) -> None:
    x, h, weight = torch.randn(0, 4, 6, 6), torch.randn(0, 5, 6, 6), torch.randn(36, 5, 3, 3)
    x.requires_grad_()
    y = conditional_conv2d(x, h, weight, backend=backend)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


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
