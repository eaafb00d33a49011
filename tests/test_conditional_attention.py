"""conditional_attention against gate, then LeakyReLU: values, gradients, layouts, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smis_kernels import conditional_attention
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    max_error,
    poisoned_empty,
    with_memory_format,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
SHAPES = [(2, 6, 5, 7), (1, 16, 8, 8), (3, 4, 1, 1), (1, 1, 4, 3), (1, 17, 20, 37)]


def make(shape: tuple[int, ...], layout: str, other: str,
         dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, logits = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return (with_memory_format(x.to(dtype), layout),
            with_memory_format((8 * logits).to(dtype), other))


def results(inputs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    def call(x: Tensor, logits: Tensor) -> Tensor:
        return conditional_attention(x, logits, negative_slope=0.3, backend=backend)

    return [call(*inputs), *gradients(call, inputs)]


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_reference(shape: tuple[int, ...], layout: str) -> None:
    for other in MEMORY_FORMATS:
        inputs = make(shape, layout, other)
        for a, b in zip(results(inputs, "cpu"), results(inputs, "reference"), strict=True):
            assert max_error(a, b) < 1e-14


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [33, 300])  # the larger output is written past the caches
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype, size: int) -> None:
    inputs = make((1, 48, size, size), "channels_last", "channels_last", dtype)
    truth = results(tuple(t.double() for t in inputs), "reference")
    for a, b, t in zip(results(inputs, "cpu"), results(inputs, "reference"), truth, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, b, t)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([float("inf"), -float("inf"), 1e4, -1e4, 88, -88, 0, float("nan")])
    logits = logits.to(dtype).view(1, 1, 2, 4)
    x = torch.full_like(logits, -3)
    got, expected = (conditional_attention(x, logits, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu),
                                     pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_keep_their_digits_far_out(dtype: torch.dtype, backend: str) -> None:
    """Both a gate that is nearly shut and what an open one lets through of the logits' gradient."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    logits = torch.linspace(-80, 80, 321, dtype=dtype, device=device)
    logits = logits.view(1, 1, 3, 107).requires_grad_()
    x = torch.linspace(1, 2, 321, dtype=dtype, device=device).view(1, 1, 3, 107).requires_grad_()
    y = conditional_attention(x, logits, backend=backend)
    features, opened, shut = x.double(), logits.double().sigmoid(), (-logits.double()).sigmoid()
    for found, exact in zip((y, *torch.autograd.grad(y.sum(), (x, logits))),
                            (features * opened, opened, features * opened * shut), strict=True):
        error = (found.detach().double() / exact.detach() - 1).abs().max()
        assert float(error) < 16 * torch.finfo(dtype).eps


@needs_cpu
def test_every_element_is_written() -> None:
    with poisoned_empty():
        for layout in ("contiguous", "channels_last"):
            found = results(make((2, 5, 7, 3), layout, layout), "cpu")
            assert all(torch.isfinite(t).all() for t in found)


@needs_cpu
def test_compiles_into_one_graph() -> None:
    inputs = make(SHAPES[0], "contiguous", "contiguous", torch.float32)
    compiled = torch.compile(conditional_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), conditional_attention(*inputs))


@pytest.mark.triton
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
def test_triton_equals_reference(layout: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in SHAPES:
        inputs = tuple(t.to(device) for t in make(shape, layout, "contiguous"))
        for a, b in zip(results(inputs, "triton"), results(inputs, "reference"), strict=True):
            assert max_error(a, b) < 1e-14


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_empty_batch_passes(backend: str) -> None:
    x = torch.randn(0, 4, 6, 6)
    assert conditional_attention(x, x, backend=backend).shape == x.shape


def test_bad_input() -> None:
    x = torch.zeros(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"logits: expected shape \(1, 4, 5, 5\) .*\(1, 4, 5, 4\)"):
        conditional_attention(x, torch.zeros(1, 4, 5, 4))
    with pytest.raises(TypeError, match="logits: expected dtype float32; got float64"):
        conditional_attention(x, x.double())
