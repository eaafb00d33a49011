"""The current stream, CUDA graphs, and no wait for the device on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.op_cases import CASES, GpuCase
from smis_kernels import LabelLayout, accelerate
from smis_kernels.acceleration.swap import REPLAYS
from smis_kernels.ops.label_windows.op import number_levels
from smis_kernels.runtime.graphs import WARM_UPS
from smis_models import Synthesizer, create_model
from tests.foreign_cases import label_map, small_painter
from tests.op_cases import Made, cotangents, outputs_of

# The size of what these return depends on the data, so they wait for the device once.
WAITING = ("number_windows", "number_vectors", "instance_mean_table")
STEADY = [case for case in CASES if case.name not in WAITING]
CYCLES = 100_000_000  # about 50 ms
LONG = 4 * CYCLES  # beyond what a busy host needs for one call


def prepared(case: GpuCase) -> Made:
    return case.inputs("cuda", torch.float32, "channels_last")


def alike(a: list[Tensor], b: list[Tensor], exact: bool) -> None:
    for x, y in zip(a, b, strict=True):
        if exact or not x.is_floating_point():
            assert torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda_only
@pytest.mark.parametrize("case", STEADY, ids=lambda case: case.name)
def test_runs_on_the_current_stream(case: GpuCase) -> None:
    made = call, inputs = prepared(case)
    expected = case.run(made, case.kind)
    late = tuple(torch.zeros_like(t) for t in inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)  # a kernel on another stream would read zeros meanwhile
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        got = case.run((call, late), case.kind)
    side.synchronize()
    alike(got, expected, case.repeatable)


@pytest.mark.cuda_only
@pytest.mark.parametrize("case", STEADY, ids=lambda case: case.name)
def test_nothing_waits_for_the_device(case: GpuCase) -> None:
    call, inputs = prepared(case)
    marker = torch.cuda.Event()
    with torch.no_grad():
        call(*inputs, backend=case.kind)  # compiled
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        call(*inputs, backend=case.kind)
    marker.record()
    assert not marker.query(), "the call returned after the device had caught up"
    torch.cuda.synchronize()


@pytest.mark.cuda_only
@pytest.mark.parametrize("case", STEADY, ids=lambda case: case.name)
def test_replays_from_a_cuda_graph(case: GpuCase) -> None:
    made = call, inputs = prepared(case)
    # made before: what comes from the host cannot be captured
    against = cotangents(outputs_of(call(*inputs, backend=case.kind)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            case.run(made, case.kind, against)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = case.run(made, case.kind, against)
    for target in inputs:
        target.copy_(target.flip(-1) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    alike(out, case.run(made, case.kind, against), case.repeatable)


@pytest.mark.cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["groupdnet_deepfashion", "spade_coco", "ccfpse_coco",
                                  "groupdnet_cityscapes"])
def test_a_synthesizer_as_one_graph(name: str, dtype: torch.dtype) -> None:
    ngf = 70 if name == "groupdnet_cityscapes" else 8
    generator = create_model(name, part="generator", ngf=ngf, image_size=(64, 64), device="cuda",
                             dtype=dtype, init_gain=1.0).eval()
    preset = generator.preset
    cells = torch.arange(64).view(1, 8, 8) % preset.classes
    labels = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    ids = labels * 3 if preset.instance_edge else None
    fast = Synthesizer(generator, labels, ids, cuda_graph=True)
    plain = Synthesizer(generator, labels, ids, cuda_graph=False)
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.05}
    for seed in range(5):
        torch.testing.assert_close(fast.sample(seed=seed), plain.sample(seed=seed), **tolerance)
    labels = labels.clone()
    labels[0, :20, :20] = labels[0, 40, 40]
    ids = labels * 3 if preset.instance_edge else None
    for made in (fast, plain):
        made.update(labels, ids)
    for seed in range(4):
        torch.testing.assert_close(fast.sample(seed=seed), plain.sample(seed=seed), **tolerance)
    assert fast._replays is not None and fast._replays.failed is None
    assert fast._replays._graphed is not None


@pytest.mark.cuda_only
@torch.no_grad()
def test_an_accelerated_network_as_one_graph() -> None:
    network = small_painter().float().eval().cuda()
    original = copy.deepcopy(network)
    accelerate(network, inference=True, cuda_graph=True)
    for seed in range(6):
        planes = label_map(64, seed=seed).float().cuda()
        torch.testing.assert_close(network(planes), original(planes), rtol=0, atol=2e-2)
        if seed == 3:
            for m in (network, original):
                m.conv_img.bias.data.add_(0.5)
    replays = vars(network)[REPLAYS]
    assert replays.failed is None and len(replays._graphs) == 1


@pytest.mark.cuda_only
def test_two_streams_at_once() -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    case = next(case for case in CASES if case.name == "modulation pair upsampled")
    inputs = [prepared(case) for _ in streams]
    expected = [case.run(each, case.kind) for each in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for _ in range(20):
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.run(each, case.kind))
    torch.cuda.synchronize()
    for i, got in enumerate(results):
        alike(got, expected[i % 2], True)


def test_a_layout_is_compiled_where_its_labels_are(device: str) -> None:
    labels = torch.arange(4096, device=device).view(1, 64, 64) // 100 % 7
    layout = LabelLayout.from_labels(labels, 7)
    level, expected = layout.level((32, 32)), layout.to("cpu").level((32, 32))
    cpu = LabelLayout.from_labels(labels.cpu(), 7).level((32, 32))
    for name in ("symbols", "windows3", "index3", "windows5", "index5"):
        assert getattr(level, name).device.type == device
        assert torch.equal(getattr(level, name).cpu(), getattr(cpu, name))
        assert torch.equal(getattr(expected, name), getattr(cpu, name))
    assert torch.equal(layout.dense((20, 24)).cpu(), LabelLayout.from_labels(
        labels.cpu(), 7).dense((20, 24)))


@pytest.mark.cuda_only
def test_a_later_layout_is_compiled_while_the_device_is_busy() -> None:
    labels = torch.arange(4096, device="cuda").view(1, 64, 64) // 100 % 7
    sizes = [(64, 64), (32, 32), (8, 8)]
    first = LabelLayout.from_labels(labels, 7)
    expected = [first.level(size) for size in sizes]
    LabelLayout.from_labels(labels, 7).level((8, 8))  # pinned memory is kept for the next
    marker = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    layout = LabelLayout.from_labels(labels, 7)
    marker.record()
    assert not marker.query(), "the layout was made after the device had caught up"
    for size, level in zip(sizes, expected, strict=True):
        for name, value in vars(level).items():
            assert torch.equal(getattr(layout.level(size), name), value)


@pytest.mark.cuda_only
def test_windows_are_numbered_in_a_cuda_graph() -> None:
    labels = torch.arange(4096, device="cuda").view(1, 64, 64) // 100 % 7
    symbols = LabelLayout.from_labels(labels, 7).symbols.clone()
    sizes, limits = [(64, 64), (32, 32), (8, 8)], [4096, 1024, 64]
    number_levels(symbols, sizes, limits, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        levels, counts = number_levels(symbols, sizes, limits, backend="cuda")
    for shift in (0, 1):
        symbols.copy_(symbols.flip(-1) % 5 + 1 + shift)
        graph.replay()
        truth, expected = number_levels(symbols, sizes, limits, backend="reference")
        assert torch.equal(counts, expected)
        for a, b, v, u in zip(levels, truth, *counts.tolist(), strict=True):
            for name in ("symbols", "index3", "index5"):
                assert torch.equal(getattr(a, name), getattr(b, name))
            assert torch.equal(a.windows3[: v + 1], b.windows3[: v + 1])
            assert torch.equal(a.windows5[: u + 1], b.windows5[: u + 1])


@pytest.mark.cuda_only
def test_an_order_found_on_another_stream_is_waited_for() -> None:
    labels = torch.arange(4096, device="cuda").view(1, 64, 64) // 100 % 7
    layout, alone = (LabelLayout.from_labels(labels, 7) for _ in range(2))
    index, own = (made.level((64, 64)).index5 for made in (layout, alone))
    expected = alone.pixel_order(own)
    assert expected is not None
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)  # who does not wait reads memory that nothing wrote
        order = layout.pixel_order(index)
        assert order is not None
        order()
    found = [t.clone() for t in order()]
    for got, right in zip(found, expected(), strict=True):
        assert torch.equal(got, right)
