"""Every op on every backend at hand, from one table: values, gradients, schemas, memory formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CASES, OpCase, Shape, results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smis_kernels.runtime import library
from smis_kernels.runtime.backend import missing
from smis_kernels.runtime.native import cuda_emulated
from smis_kernels.runtime.tensors import memory_format
from smis_kernels.testing import assert_as_accurate, max_error, poisoned_empty, with_memory_format

SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1), (2, 3, 5, 7), (1, 13, 11, 17), (3, 8, 4, 6),
    *(() if cuda_emulated() else ((1, 40, 33, 50),)))  # too many fibers
SMALL: tuple[Shape, ...] = ((2, 3, 5, 7), (1, 13, 11, 17))
MEMORY_FORMATS = ("contiguous", "channels_last", "sliced")
# Their first input is no map of features, or their output is channels-last whatever it is, or in
# the other format.
WITHOUT_FORMAT = ("spectral_weight", "label_conv", "number_vectors", "winograd_conv2d",
                  "polyphase_conv2d", "polyphase_conv_transpose2d", "narrow_conv2d",
                  "indexed_shortcut", "reformat", "upsampling_source")
needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
# Emulated, "cpu" runs the CUDA kernel of an op that has one.
NAMES = [name for name, case in CASES.items() if not cuda_emulated() or case.gpu == "cuda"]
cases = pytest.mark.parametrize("name", NAMES)


def shown(size: object) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def agree(case: OpCase, shape: Shape, layout: str, options: Mapping[str, Any], dtype: torch.dtype,
          backend: str, seed: int = 0, view: Callable[[Tensor], Tensor] = lambda t: t,
          other: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    """The kernel against the definition in fp64, judged by the definition's own error."""
    def laid(t: Tensor) -> Tensor:
        return view(t) if t.dim() == 4 else other(t)

    call, drawn = case.build(shape, layout, dtype, options, seed)
    inputs = tuple(laid(t) for t in drawn)
    exact = results(case, call, tuple(t.double() for t in inputs), "reference", laid=laid)
    with poisoned_empty():
        found = results(case, call, inputs, backend, laid=laid)
    reference = results(case, call, inputs, "reference", laid=laid)
    # Gradients of norms over two values are what is left of large ones: no more than rounding.
    rounding = 1e-14 * max((float(t.abs().max()) for t in exact
                            if t.is_floating_point() and t.numel()), default=0.0)
    for i, (a, b, truth) in enumerate(zip(found, reference, exact, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"result {i}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"result {i}"
        elif dtype == torch.float64:
            error = max_error(a, truth)
            left = float((a - truth).abs().max()) if a.numel() else 0.0
            assert error < 1e-10 or left < rounding, f"result {i}: {error}"
        else:
            wide = a.dtype == torch.float32
            floor = (64 if wide else 0.5) * torch.finfo(a.dtype).eps
            assert_as_accurate(a, b, truth.double(), floor=floor, what=f"result {i}")


@needs_cpu
@cases
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=shown)
def test_shapes(shape: Shape, layout: str, name: str) -> None:
    case = CASES[name]
    agree(case, shape, layout, case.default(), torch.float64, "cpu")


def inside(t: Tensor, channels: int, pixels: int) -> Tensor:
    """The values as a view of a channels-last tensor with margins so wide."""
    n, c, h, w = t.shape
    size = (n, c + 2 * channels, h + 2 * pixels, w + 2 * pixels)
    large = t.new_full(size, torch.nan).contiguous(memory_format=torch.channels_last)
    view = large[:, channels : channels + c, pixels : pixels + h, pixels : pixels + w]
    return view.copy_(t)


def spaced(t: Tensor) -> Tensor:
    """The values as every second one of a larger tensor, along each axis."""
    large = t.new_full([2 * size for size in t.shape], torch.nan)
    return large[(slice(None, None, 2),) * t.dim()].copy_(t)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels": partial(inside, channels=1, pixels=0),
    "crop": partial(inside, channels=0, pixels=1),
    "both": partial(inside, channels=1, pixels=1),
    "images": lambda t: inside(t.repeat_interleave(2, 0), 0, 0)[::2],
    "expanded": lambda t: inside(t, 0, 0)[..., :1].expand(t.shape),
}


@needs_cpu
@cases
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 5, 1), (2, 3, 1, 6)], ids=shown)
def test_views_of_channels_last(shape: Shape, view: str, name: str) -> None:
    """A single column's or row's pixels lie as far apart as those of the tensor it is cut from."""
    case = CASES[name]
    agree(case, shape, "contiguous", case.default(), torch.float64, "cpu", view=VIEWS[view],
          other=spaced)
    call, inputs = case.build(shape, "contiguous", torch.float64, case.default())
    if inputs[0].dim() == 4 and name not in WITHOUT_FORMAT:
        x = VIEWS[view](inputs[0])
        (y, *_) = results(case, call, (x, *inputs[1:]), "cpu")
        assert y.dim() != 4 or y.is_contiguous(memory_format=memory_format(x))


@needs_cpu
@cases
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, layout: str, name: str) -> None:
    case = CASES[name]
    if dtype not in case.dtypes:
        pytest.skip(f"{name} computes in {', '.join(map(str, case.dtypes))}")
    agree(case, (2, 11, 9, 14), layout, case.default(), dtype, "cpu")


def single_changes() -> Iterator[Any]:
    """Every value of every option, the others at their default."""
    for name in NAMES:
        for option, values in CASES[name].options.items():
            for value in values[1:]:
                yield pytest.param(name, {option: value}, id=f"{name}-{option}-{shown(value)}")


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS[:2])
@pytest.mark.parametrize(("name", "change"), [*single_changes()])
def test_options(name: str, change: dict[str, Any], layout: str) -> None:
    case = CASES[name]
    agree(case, (2, 6, 7, 10), layout, case.default(**change), torch.float64, "cpu")


@needs_cpu
@cases
def test_any_shape(name: str) -> None:
    case = CASES[name]
    drawn = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in case.options.items()})

    # Emulated, random cases of every CUDA op are those of cuda_on_cpu.
    @settings(max_examples=8 if cuda_emulated() else 25, deadline=None)
    @given(st.tuples(st.integers(1, 3), st.integers(1, 18), st.integers(1, 12),
                     st.integers(1, 12)), st.sampled_from(MEMORY_FORMATS), drawn,
           st.integers(0, 1000))
    def check(shape: Shape, layout: str, options: dict[str, Any], seed: int) -> None:
        agree(case, shape, layout, options, torch.float64, "cpu", seed)

    check()


@needs_cpu
@pytest.mark.parametrize("name", [name for name in NAMES if name in (
    "modulation", "modulation_pair", "indexed_modulation", "indexed_modulation_pair")])
def test_statistics_of_two_values(name: str) -> None:
    """Their gradients cancel to a millionth."""
    case = CASES[name]
    options = case.default(norm="batch", training=True, upsample=True)
    for seed in range(20):
        agree(case, (1, 1, 1, 2), "contiguous", options, torch.float64, "cpu", seed)


@pytest.mark.triton
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gpu == "triton"])
@pytest.mark.parametrize("layout", MEMORY_FORMATS[:2])
@pytest.mark.parametrize("shape", SMALL, ids=shown)
def test_triton(shape: Shape, layout: str, name: str) -> None:
    case = CASES[name]
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the compiled kernels")
    agree(case, shape, layout, case.default(), torch.float32, "triton")


@needs_cpu
@cases
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layout", MEMORY_FORMATS[:2])
def test_gradcheck(layout: str, order: int, name: str) -> None:
    case = CASES[name]
    if case.leaves == 0:
        pytest.skip(f"{name} is not differentiable")
    call, inputs = case.build((2, 2, 3, 4), layout, torch.float64, case.default())
    leaves = [t.requires_grad_() for t in inputs]
    # The second derivative is the definition's, which "auto" records. A GPU's sums have no order.
    # One format has every element of the Jacobian checked, the other a random projection.
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(partial(call, backend="cpu" if order == 1 else "auto"), leaves,
                 fast_mode=order == 2 or layout != "contiguous" or cuda_emulated(),
                 nondet_tol=1e-12 if cuda_emulated() else 0.0)


class Recorded(TorchDispatchMode):
    """The calls of the library's raw operators: (overload, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == library.NAMESPACE:
            kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((func, kept))
        return func(*args, **(kwargs or {}))


def raw_calls(name: str, layout: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """What forward and backward call: with the default options, and with all the last ones."""
    case = CASES[name]
    last = {option: values[-1] for option, values in case.options.items()}
    with Recorded() as recorded:
        for options in (case.default(), last | ({"norm": "instance"} if "norm" in last else {})):
            call, inputs = case.build((2, 3, 6, 5), layout, torch.float32, options)
            results(case, call, inputs, "cpu")
    return recorded.calls


@needs_cpu
@cases
@pytest.mark.parametrize("layout", MEMORY_FORMATS[:2])
def test_opcheck(layout: str, name: str) -> None:
    calls = raw_calls(name, layout)
    assert calls
    # Fakes are held against results in both formats; how they take dynamic shapes depends on none.
    dynamic = ("test_aot_dispatch_dynamic",) if layout == "contiguous" else ()
    for overload, arguments in calls:
        torch.library.opcheck(overload, arguments, test_utils=(
            "test_schema", "test_autograd_registration", "test_faketensor", *dynamic))


@needs_cpu
@pytest.mark.skipif(cuda_emulated(), reason="the emulation passes the dispatcher by")
def test_no_operator_is_left_out_of_opcheck() -> None:
    called = {overload.name().partition("::")[2].partition(".")[0]
              for name in CASES for overload, _ in raw_calls(name, "contiguous")}
    own_file = {"content_digest", "winograd_weight", "polyphase_weight",  # of any tensor; opaque
                "winograd_weight_gradient",  # test_weight_gradient.py
                "fixed_statistics",  # of running statistics
                "indexed_modulation_ordered_backward", "segment_sums",  # test_level_order.py
                "number_labels", "number_levels"}  # no kernel on the CPU: cuda_on_cpu checks fakes
    assert set(library.raw_ops) - called == own_file


@needs_cpu
@cases
@pytest.mark.parametrize("layout", MEMORY_FORMATS[:2])
def test_the_output_keeps_dtype_and_memory_format(layout: str, name: str) -> None:
    case = CASES[name]
    for dtype in case.dtypes:
        call, inputs = case.build((2, 6, 7, 5), layout, dtype, case.default())
        if inputs[0].dim() != 4 or name in WITHOUT_FORMAT:
            continue
        output = results(case, call, inputs, "cpu")[0]
        if output.dim() == 4 and output.is_floating_point():
            assert output.dtype == dtype
            assert output.stride() == with_memory_format(torch.empty_like(output), layout).stride()
