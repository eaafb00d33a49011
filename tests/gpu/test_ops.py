"""Every op's GPU kernel against its reference in fp64: dtypes, layouts, forward and backward."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.op_cases import CASES, HALF, GpuCase
from smis_kernels import instance_avg_pool2d, instance_mean_table
from smis_kernels.ops.label_windows.op import number_windows
from smis_kernels.runtime.backend import missing
from smis_kernels.runtime.native import cuda_emulated
from smis_kernels.testing import assert_as_accurate, poisoned_empty, with_memory_format

MEMORY_FORMATS = ("contiguous", "channels_last", "sliced")
FACTOR = 1.5  # of the reference's own error at that dtype


def _usable(case: GpuCase, device: str, dtype: torch.dtype = torch.float32,
            layout: str = "channels_last") -> str:
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} takes no {dtype}")
    if cuda_emulated() and case.kind != "cuda":
        pytest.skip("only CUDA kernels are emulated")
    if (device == "cpu" and not cuda_emulated()
            and (dtype, layout) != (torch.float32, "channels_last")):
        pytest.skip("rehearsed in float32, channels-last")
    problem = case.problem(device)
    if problem is not None:
        pytest.skip(problem)
    return case.backend(device)


def _floating(results: list[Tensor]) -> list[Tensor]:
    return [t for t in results if t.is_floating_point()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_accurate_as_the_reference(case: GpuCase, layout: str, dtype: torch.dtype,
                                      device: str) -> None:
    backend = _usable(case, device, dtype, layout)
    made = call, inputs = case.inputs(device, dtype, layout)
    with poisoned_empty():
        found = [case.run(made, backend)]
    if not case.repeatable:  # poisoning asks for determinism: what ran is another kernel
        found.append(case.run(made, backend))
    reference = case.run(made, "reference")
    truth = case.run((call, tuple(t.double() for t in inputs)), "reference")
    for got, (i, (b, exact)) in product(found, enumerate(zip(reference, truth, strict=True))):
        a = got[i]
        assert len(got) == len(reference)
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not a.is_floating_point():
            assert torch.equal(a, b), f"result {i}"
            continue
        wide = dtype if dtype == torch.float64 else torch.float32
        sums = a.dtype if a.dtype in HALF else wide
        floor = 0.5 * torch.finfo(a.dtype).eps + 64 * torch.finfo(sums).eps * (sums in (wide,))
        assert_as_accurate(a, b, exact.double(), factor=FACTOR, floor=floor, what=f"result {i}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_output_keeps_the_memory_format(case: GpuCase, device: str) -> None:
    backend = _usable(case, device)
    for layout in ("contiguous", "channels_last"):
        made = _, inputs = case.inputs(device, torch.float32, layout)
        if inputs[0].dim() != 4 or inputs[0].shape[1] == 1:
            pytest.skip("no 4-D input")
        for tensor in _floating(case.run(made, backend))[:1]:
            if tensor.dim() == 4 and tensor.shape[1] > 1:
                strides = with_memory_format(torch.empty_like(tensor), layout).stride()
                assert tensor.stride() == strides


@pytest.mark.parametrize("case", [c for c in CASES if c.repeatable], ids=lambda case: case.name)
def test_the_same_bits_in_every_run(case: GpuCase, device: str) -> None:
    backend = _usable(case, device)
    made = case.inputs(device, torch.float32, "channels_last")
    first, second = (case.run(made, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if not c.repeatable],
                         ids=lambda case: case.name)
def test_determinism_on_request(case: GpuCase, device: str) -> None:
    backend = _usable(case, device)
    made = case.inputs(device, torch.float32, "contiguous")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (case.run(made, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", MEMORY_FORMATS[:2])
@pytest.mark.parametrize("channels", [3, 24])
def test_large_instances_keep_their_digits(channels: int, layout: str, device: str) -> None:
    """Sums of a million pixels in fp32 would lose an eighth of the digits."""
    kind = "cuda" if device == "cuda" else "cpu"
    if problem := missing(kind):
        pytest.skip(problem)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, channels, 1000, 1001), generator=generator) + 1
    exact = image[0, :, 1:].double().mean((1, 2))
    image = with_memory_format(image.to(device), layout)
    ids = torch.zeros((1, 1000, 1001), dtype=torch.int32, device=device)
    ids[0, :1] = 3
    pooled = instance_avg_pool2d(image, ids, backend=kind)[0, :, -1, -1]
    for found in (pooled, instance_mean_table(image, ids, backend=kind).mean[0]):
        assert float(((found.double().cpu() - exact) / exact).abs().max()) < 1e-7


@pytest.mark.parametrize("value", [-7, 2**31])
def test_an_id_out_of_range_is_named(value: int, device: str) -> None:
    kind = "cuda" if device == "cuda" else "cpu"
    if problem := missing(kind):
        pytest.skip(problem)
    ids = torch.tensor([[[3, value], [1, 1]]], device=device)
    with pytest.raises(ValueError, match="instance_map") as error:
        instance_mean_table(torch.zeros((1, 1, 2, 2), device=device), ids, backend=kind)
    assert str(error.value) == (f"instance_map: expected ids 0..2147483647, got {value}; "
                                "renumber the instances first")


@pytest.mark.parametrize("value", [0, -1, -(2**31)])
def test_a_window_id_below_1_is_named(value: int, device: str) -> None:
    kind = "cuda" if device == "cuda" else "cpu"
    if problem := missing(kind):
        pytest.skip(problem)
    map = torch.tensor([[[1, value]]], device=device, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"map: expected ids from 1, got {value}; 0 stands"):
        number_windows(map, 9, backend=kind)
