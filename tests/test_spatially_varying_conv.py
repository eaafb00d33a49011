"""spatially_varying_conv2d against unfold, multiply, sum: values, gradients, layouts, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import SpatiallyVaryingConv2d, spatially_varying_conv2d
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
# N, C, H, W, groups, kernel_size, stride, padding, dilation
CASES = [
    (2, 6, 5, 7, 6, 3, 1, 1, 1), (1, 16, 8, 8, 4, 3, 1, 1, 1), (2, 4, 1, 1, 4, 3, 1, 1, 1),
    (1, 3, 1, 5, 1, 5, 1, 2, 1), (1, 17, 20, 37, 17, 3, 1, 1, 1), (1, 4, 9, 8, 2, 3, 2, 1, 1),
    (2, 6, 11, 12, 6, 5, 2, 3, 2), (1, 5, 6, 7, 5, 1, 1, 0, 1), (1, 2, 12, 9, 2, 3, 3, 0, 2),
    (1, 8, 7, 6, 8, 3, 1, 4, 1), (1, 2, 40, 300, 2, 3, 1, 1, 1), (1, 40, 3, 4, 20, 3, 1, 1, 1),
    # The CUDA kernel's bands of 16 rows and 30 columns, and its packs of 2, 4 or 8 elements.
    (2, 16, 33, 64, 16, 3, 1, 1, 1), (1, 8, 16, 30, 8, 3, 1, 0, 1), (1, 8, 17, 31, 8, 3, 1, 2, 1),
]


def make(case: tuple[int, ...], layout: str = "contiguous", weight_layout: str | None = None,
         dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor], dict[str, int]]:
    n, c, h, w, groups, k, stride, padding, dilation = case
    generator = torch.Generator().manual_seed(sum(case))
    span = dilation * (k - 1) + 1
    out = [(size + 2 * padding - span) // stride + 1 for size in (h, w)]
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, groups * k * k, *out, generator=generator, dtype=torch.float64)
    options = {"kernel_size": k, "stride": stride, "padding": padding, "dilation": dilation}
    inputs = (with_memory_format(x.to(dtype), layout),
              with_memory_format(weight.to(dtype), weight_layout or layout))
    return inputs, options


def results(inputs: tuple[Tensor, ...], options: dict[str, int], backend: str) -> list[Tensor]:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        return spatially_varying_conv2d(x, weight, backend=backend, **options)

    return [call(*inputs), *gradients(call, inputs)]


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_equals_reference(case: tuple[int, ...], layout: str) -> None:
    for weight_layout in MEMORY_FORMATS:
        inputs, options = make(case, layout, weight_layout)
        for a, b in zip(results(inputs, options, "cpu"), results(inputs, options, "reference"),
                        strict=True):
            assert a.shape == b.shape
            assert max_error(a, b) < 1e-12


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype, layout: str) -> None:
    for case in ((2, 19, 33, 17, 19, 3, 1, 1, 1), (1, 12, 9, 11, 3, 5, 2, 2, 1),
                 (1, 16, 18, 40, 16, 3, 1, 1, 1)):
        inputs, options = make(case, layout, dtype=dtype)
        wide = tuple(t.double() for t in inputs)
        for a, b, t in zip(results(inputs, options, "cpu"), results(inputs, options, "reference"),
                           results(wide, options, "reference"), strict=True):
            assert a.dtype == dtype
            assert_as_accurate(a, b, t)


@needs_cpu
def test_output_keeps_the_memory_format_of_the_input() -> None:
    for layout in ("contiguous", "channels_last"):
        for weight_layout in ("contiguous", "channels_last"):
            (x, weight), _ = make(CASES[0], layout, weight_layout)
            last = layout == "channels_last"
            format = torch.channels_last if last else torch.contiguous_format
            for backend in ("cpu", "reference"):
                y = spatially_varying_conv2d(x, weight, backend=backend)
                assert y.is_contiguous(memory_format=format)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_streamed_output_equals_the_cached_one(layout: str) -> None:
    case = (1, 40, 240, 250, 40, 3, 1, 1, 1)  # 9.6 MB of output, in fp32
    inputs, options = make(case, layout, dtype=torch.float32)
    for a, b in zip(results(inputs, options, "cpu"), results(inputs, options, "reference"),
                    strict=True):
        assert max_error(a, b) < 1e-6


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_element_is_written(layout: str) -> None:
    with poisoned_empty():
        for case in CASES:
            inputs, options = make(case, layout)
            assert all(torch.isfinite(t).all() for t in results(inputs, options, "cpu"))


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_weights_survive_at_the_border(layout: str) -> None:
    (x, weight), _ = make((1, 4, 5, 5, 4, 3, 1, 1, 1), layout)
    weight[0, 0, 0, 0] = float("nan")  # the corner's tap outside the image
    for backend in ("cpu", "reference"):
        y = spatially_varying_conv2d(x, weight, backend=backend)
        assert y[0, 0, 0, 0].isnan()
        assert y.isnan().sum() == 1


@needs_cpu
def test_compiles_into_one_graph() -> None:
    inputs, _ = make(CASES[0], dtype=torch.float32)
    compiled = torch.compile(spatially_varying_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), spatially_varying_conv2d(*inputs))


def test_is_a_depthwise_conv_where_the_kernels_are_equal() -> None:
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    kernel = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    weight = kernel.view(1, 36, 1, 1).expand(2, -1, 9, 8)
    y = spatially_varying_conv2d(x, weight)
    assert max_error(y, F.conv2d(x, kernel, padding=1, groups=4)) < 1e-12


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_empty_batch_passes(backend: str) -> None:
    x, weight = torch.randn(0, 4, 6, 6), torch.randn(0, 36, 3, 3)
    x.requires_grad_()
    y = spatially_varying_conv2d(x, weight, stride=2, backend=backend)
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.skipif(missing("cuda") is not None or not torch.cuda.is_available(),
                    reason="needs a CUDA device and the native cuda library")
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_equals_reference(case: tuple[int, ...], layout: str) -> None:
    for weight_layout in MEMORY_FORMATS:
        inputs, options = make(case, layout, weight_layout)
        inputs = tuple(with_memory_format(t.cuda(), form) for t, form in
                       zip(inputs, (layout, weight_layout), strict=True))
        for a, b in zip(results(inputs, options, "cuda"), results(inputs, options, "reference"),
                        strict=True):
            assert max_error(a, b) < 1e-12


def test_module_is_called_as_the_published_one() -> None:
    conv = SpatiallyVaryingConv2d(4)
    assert list(conv.state_dict()) == [f"norm_layer.{name}" for name in (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(2, 36, 5, 5)
    torch.testing.assert_close(conv(x, weight), spatially_varying_conv2d(x, weight))
    for options in ({"kernel_size": 5, "padding": 2}, {"padding": 0}, {"padding": 2, "stride": 2},
                    {"padding": 2, "dilation": 2}):
        x = torch.randn(2, 4, 9, 9)
        size = {"padding": 1, "dilation": 1, "stride": 1, "kernel_size": 3, **options}
        patches = F.unfold(x, **size)  # [N, C * k * k, positions]
        positions = math.isqrt(patches.shape[-1])
        patches = patches.view(2, 4, -1, positions, positions)
        weight = torch.randn(2, *patches.shape[2:]).unsqueeze(1).expand_as(patches).contiguous()
        expected = (patches * weight).sum(2)
        found = SpatiallyVaryingConv2d(4, **options)(x, weight)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("arguments", "options", "message"), [
    (((1, 4, 5, 5), (1, 35, 5, 5)), {}, r"weight: .*\(1, 35, 5, 5\) for input \(1, 4, 5, 5\)"),
    (((1, 4, 5, 5), (1, 27, 5, 5)), {}, r"weight: .*\(1, 4, 5, 5\), got \(1, 27, 5, 5\)"),
    (((2, 4, 5, 5), (1, 36, 5, 5)), {}, r"N = 2 .*got \(1, 36, 5, 5\)"),
    (((1, 4, 5, 5), (1, 36, 5, 5)), {"stride": 2},
     r"\(N, G, 9, \*\(3, 3\)\) .* got \(1, 36, 5, 5\)"),
    (((1, 4, 5, 5), (1, 4, 4, 5, 5)), {"kernel_size": 2}, "kernel_size: expected 1, 3, 5; got 2"),
    (((1, 4, 5, 5), (1, 36, 5, 5)), {"dilation": 0}, "dilation: .* at least 1, got 0"),
    (((1, 4, 5, 5), (1, 36, 5, 5)), {"dilation": 4}, "input: expected at least 9 x 9"),
    (((4, 5, 5), (1, 36, 5, 5)), {}, r"input: expected \(N, C, H, W\)"),
])
def test_bad_input(arguments: tuple[tuple[int, ...], ...], options: dict[str, int],
                   message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spatially_varying_conv2d(*(torch.zeros(shape) for shape in arguments), **options)


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="weight: expected dtype float32; got float64"):
        spatially_varying_conv2d(torch.zeros(1, 4, 5, 5),
                                 torch.zeros(1, 36, 5, 5, dtype=torch.float64))
