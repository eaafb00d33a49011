"""instance_avg_pool2d and instance_mean_table against the published loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smis_kernels import explain
from smis_kernels.modules.pooling import InstanceAvgPool2d
from smis_kernels.ops.instance_pool import op
from smis_kernels.ops.instance_pool.op import (
    MAX_ID,
    _pooled_by_sorting,
    _table_by_sorting,
    instance_avg_pool2d,
    instance_mean_table,
)
from smis_kernels.runtime.backend import missing
from smis_kernels.runtime.check import FLOATS, INTEGERS
from smis_kernels.runtime.native import cuda_emulated
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    poisoned_empty,
    with_memory_format,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
BACKENDS = ("reference", pytest.param("cpu", marks=needs_cpu))
SHAPES = ((1, 1, 1, 1), (2, 3, 1, 7), (1, 4, 5, 1), (2, 3, 13, 17), (1, 67, 31, 37), (3, 1, 64, 64))


def _image(n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(h * w + c)
    return (torch.randn((n, c, h, w), generator=generator) + 0.5).to(dtype)  # exact sums in fp64


def _ids(n: int, h: int, w: int, count: int = 9) -> Tensor:
    """Blobs of sparse ids, 0 among them; other ids in each image."""
    generator = torch.Generator().manual_seed(h + w)
    coarse = torch.randint(0, count, (n, 1, (h + 4) // 5, (w + 6) // 7), generator=generator)
    blobs = F.interpolate(coarse.float(), (h, w))[:, 0].long()
    return blobs * 3001 + (blobs > 0) * torch.arange(n).view(-1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    image = torch.tensor([[[[1.0, 2, 6], [3, 4, 0]]], [[[1.0, 2, 6], [3, 4, 0]]]])
    ids = torch.tensor([[[0, 0, 5], [0, 26001, 5]], [[5, 5, 5], [5, 5, MAX_ID]]])
    pooled = instance_avg_pool2d(image, ids, backend=backend)
    expected = [[[[2, 2, 3], [2, 4, 3]]], [[[3.2, 3.2, 3.2], [3.2, 3.2, 0]]]]
    torch.testing.assert_close(pooled, torch.tensor(expected))
    table = instance_mean_table(image, ids, backend=backend)
    assert table.image.tolist() == [0, 0, 0, 1, 1]
    assert table.id.tolist() == [0, 5, 26001, 5, MAX_ID]
    assert table.area.tolist() == [3, 2, 1, 5, 1]
    assert table.mean.flatten().tolist() == pytest.approx([2, 3, 4, 3.2, 0])


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_loop(shape: tuple[int, int, int, int], layout: str,
                          dtype: torch.dtype) -> None:
    image = with_memory_format(_image(*shape, dtype=dtype), layout)
    ids = with_memory_format(_ids(shape[0], *shape[2:]).unsqueeze(1), layout)
    expected = instance_avg_pool2d(image, ids, backend="reference")
    truth = instance_avg_pool2d(image.double(), ids, backend="reference")
    with poisoned_empty():
        found = instance_avg_pool2d(image, ids, backend="cpu")
        table = instance_mean_table(image, ids, backend="cpu")
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"
    assert_as_accurate(found, expected, truth)
    rows = instance_mean_table(image.double(), ids, backend="reference")
    for name in ("image", "id", "area"):
        assert torch.equal(getattr(table, name), getattr(rows, name)), name
    assert table.mean.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_as_accurate(table.mean, table.mean, rows.mean)


@needs_cpu
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint16])
def test_id_dtypes(dtype: torch.dtype) -> None:
    image, ids = _image(2, 3, 12, 31), _ids(2, 12, 31) // 3001 * 13
    expected = instance_avg_pool2d(image, ids, backend="reference")
    for backend in ("reference", "cpu"):
        found = instance_avg_pool2d(image, ids.to(dtype), backend=backend)
        torch.testing.assert_close(found, expected)
    if dtype == torch.uint16:  # 33003 does not fit int16
        high = instance_mean_table(image, (ids + 33000).to(dtype), backend="cpu")
        assert int(high.id.min()) >= 33000


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ids", ["one", "all", "noise"])
def test_extreme_maps(ids: str, layout: str) -> None:
    n, c, h, w = 2, 5, 300, 301  # several stripes, and ids that grow the hash table
    image = with_memory_format(_image(n, c, h, w, torch.float64), layout)
    generator = torch.Generator().manual_seed(0)
    maps = {
        "one": torch.full((n, h, w), 26001),
        "all": torch.randperm(MAX_ID // 40, generator=generator)[: n * h * w].view(n, h, w) * 40,
        "noise": torch.randint(0, 5000, (n, h, w), generator=generator),
    }
    with poisoned_empty():
        found = instance_avg_pool2d(image, maps[ids], backend="cpu")
    flat = image.permute(0, 2, 3, 1).reshape(n, -1, c)
    for i in range(n):
        _, index, count = maps[ids][i].flatten().unique(return_inverse=True, return_counts=True)
        sums = flat.new_zeros((len(count), c)).index_add_(0, index, flat[i])
        expected = (sums / count.unsqueeze(1))[index].T.view(c, h, w)
        torch.testing.assert_close(found[i], expected)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 64])
def test_large_output_is_streamed(layout: str, channels: int, dtype: torch.dtype) -> None:
    size = 1024 if channels == 3 else 300
    image = with_memory_format(_image(1, channels, size, size - 1, dtype), layout)
    ids = _ids(1, size, size - 1, 40)
    with poisoned_empty():
        found = instance_avg_pool2d(image, ids, backend="cpu")
    index = ids.flatten().unique(return_inverse=True)[1]
    flat = image.double().permute(0, 2, 3, 1).reshape(-1, channels)
    count = torch.bincount(index).unsqueeze(1)
    means = flat.new_zeros((len(count), channels)).index_add_(0, index, flat) / count
    expected = means[index].T.view(image.shape)
    assert_as_accurate(found, expected.to(dtype), expected)


@needs_cpu
@settings(max_examples=20 if cuda_emulated() else 80, deadline=None)
@given(st.data())
def test_any_map(data: st.DataObject) -> None:
    n, c, h, w = (data.draw(st.integers(1, m)) for m in (3, 4, 9, 40))
    ids = torch.tensor(data.draw(st.lists(
        st.sampled_from([0, 1, 2, 255, 256, 26001, 2**16, 2**20, MAX_ID]),
        min_size=n * h * w, max_size=n * h * w))).view(n, h, w)
    values = st.sampled_from([0.0, 1.0, -1.0, 0.5, float("nan"), float("inf")])
    image = torch.tensor(
        data.draw(st.lists(values, min_size=n * c * h * w, max_size=n * c * h * w))
    ).view(n, c, h, w)
    image = with_memory_format(image, data.draw(st.sampled_from(MEMORY_FORMATS)))
    expected = instance_avg_pool2d(image, ids, backend="reference")
    found = instance_avg_pool2d(image, ids, backend="cpu")
    torch.testing.assert_close(found, expected, equal_nan=True, check_stride=False)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_the_result(layout: str) -> None:
    image = with_memory_format(_image(1, 19, 300, 310), layout)
    ids, threads, results = _ids(1, 300, 310, 700), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(instance_avg_pool2d(image, ids, backend="cpu"))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@needs_cpu
def test_channel_blocks() -> None:
    """So many instances that the sums of all channels do not fit at once."""
    ids = torch.arange(200 * 210).view(1, 200, 210)
    for memory in ("contiguous", "channels_last"):
        image = with_memory_format(_image(1, 107, 200, 210), memory)
        assert torch.equal(instance_avg_pool2d(image, ids, backend="cpu"), image)
        table = instance_mean_table(image, ids, backend="cpu")
        assert torch.equal(table.mean, image[0].flatten(1).T)


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
def test_gradient(dtype: torch.dtype, layout: str) -> None:
    image, ids = with_memory_format(_image(2, 3, 17, 21, dtype), layout), _ids(2, 17, 21)

    def run(backend: str, x: Tensor) -> Tensor:
        (grad,) = gradients(lambda y: instance_avg_pool2d(y, ids, backend=backend), (x,))
        return grad

    with poisoned_empty():
        found = run("cpu", image)
    assert found.dtype == dtype
    assert_as_accurate(found, run("reference", image), run("reference", image.double()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_deterministic_path_of_the_gpu(layout: str, dtype: torch.dtype) -> None:
    image, ids = with_memory_format(_image(2, 3, 17, 21, dtype), layout), _ids(2, 17, 21)
    ids[1, 3, 4:7] = MAX_ID
    found = _pooled_by_sorting(image, ids)
    expected = instance_avg_pool2d(image, ids, backend="reference")
    assert found.stride() == image.stride()
    assert_as_accurate(found, expected, instance_avg_pool2d(image.double(), ids,
                                                            backend="reference"))


def test_ids_out_of_range_are_nan_on_the_deterministic_path() -> None:
    ids = torch.tensor([[[0, -1, MAX_ID, MAX_ID + 1, 0]]])
    found = _pooled_by_sorting(torch.arange(5.0).view(1, 1, 1, 5), ids)
    assert found.flatten()[[0, 2, 4]].tolist() == [2, 2, 2]
    assert found.isnan().flatten().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_deterministic_table_of_the_gpu(dtype: torch.dtype) -> None:
    image, ids = _image(3, 3, 17, 21, dtype), _ids(3, 17, 21)
    ids[0, 0, 0] = MAX_ID
    found = _table_by_sorting(image, ids)
    expected = instance_mean_table(image, ids, backend="reference")
    truth = instance_mean_table(image.double(), ids, backend="reference").mean
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
    for i in (0, 1, 3):
        assert torch.equal(found[i], expected[i])
    assert_as_accurate(found[2], expected.mean, truth)
    with pytest.raises(ValueError, match=r"instance_map: expected ids .* got -3; renumber"):
        _table_by_sorting(image, torch.full_like(ids, -3))


@pytest.mark.parametrize("function", [instance_avg_pool2d, instance_mean_table])
def test_determinism_is_honoured(function: Callable[..., Iterable[Tensor]],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the kernels, whose atomics have no order, are not called where it is asked for."""
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel with atomics was called")

    monkeypatch.setattr(op, "resolve", lambda _, __, backend, ___: backend or "cuda")
    monkeypatch.setattr(op, "instance_pool_op", refuse)
    monkeypatch.setattr(op, "instance_means_op", refuse)
    image, ids = _image(1, 3, 9, 8), _ids(1, 9, 8)
    with pytest.raises(AssertionError, match="atomics"):
        function(image, ids)
    torch.use_deterministic_algorithms(True)
    try:
        (choice,) = explain(function, image, ids).choices
        found = function(image, ids)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.backend.startswith("cuda") and choice.path == "sorted"  # CPU tensors: emulated
    expected = function(image, ids, backend="reference")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("way", [pytest.param("cpu", marks=needs_cpu), "sorted"])
def test_large_instances_keep_their_digits(way: str, layout: str) -> None:
    """Sums of a million pixels in fp32 would lose an eighth of the digits."""
    image = with_memory_format(_image(1, 3, 1000, 1001) + 10, layout)
    ids = torch.zeros((1, 1000, 1001), dtype=torch.int32)
    ids[0, :1] = 3
    exact = image[0, :, 1:].double().mean((1, 2))
    pooled = (instance_avg_pool2d(image, ids, backend="cpu") if way == "cpu"
              else _pooled_by_sorting(image, ids))
    table = (instance_mean_table(image, ids, backend="cpu").mean if way == "cpu"
             else _table_by_sorting(image, ids)[2])
    for found in (pooled[0, :, -1, -1], table[0]):
        assert float(((found.double() - exact) / exact).abs().max()) < 1e-7


@needs_cpu
def test_explain() -> None:
    image, ids = _image(1, 3, 6, 6), _ids(1, 6, 6)
    (choice,) = explain(InstanceAvgPool2d(), image, ids).choices
    assert (choice.op, choice.backend) == ("instance_avg_pool2d", "cpu")
    (choice,) = explain(instance_mean_table, image, ids, backend="reference").choices
    assert (choice.op, choice.backend) == ("instance_mean_table", "reference")


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, i: instance_avg_pool2d(x, i) * 2, fullgraph=True,
                             backend="aot_eager")
    for h, w in ((7, 9), (8, 11), (6, 5)):
        image, ids = with_memory_format(_image(1, 3, h, w), layout), _ids(1, h, w)
        x, y = (image.clone().requires_grad_() for _ in range(2))
        found, expected = compiled(x, ids), instance_avg_pool2d(y, ids) * 2
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        (found.square().sum() + expected.square().sum()).backward()
        torch.testing.assert_close(x.grad, y.grad)


IMAGE, IDS = torch.zeros((1, 3, 4, 5)), torch.zeros((1, 4, 5), dtype=torch.int64)


@pytest.mark.parametrize("function", [instance_avg_pool2d, instance_mean_table])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("image", "ids", "options", "message"),
    [
        (IMAGE[0], IDS, {}, r"input: expected \(N, C, H, W\), got shape \(3, 4, 5\)"),
        (IMAGE.int(), IDS, {}, "input: expected dtype float32"),
        (IMAGE[:, :0], IDS, {}, "input: expected at least one pixel and channel"),
        (IMAGE, IDS.float(), {}, "instance_map: expected dtype uint8.* got float32; cast"),
        (IMAGE, IDS[0], {}, r"instance_map: expected \(N, H, W\) or"),
        (IMAGE, IDS[:, :3], {}, r"instance_map: expected \(1, 4, 5\) or .* got \(1, 3, 5\);"),
        (IMAGE, IDS.expand(2, 4, 5), {}, "instance_map: expected"),
        (IMAGE, IDS.expand(2, 4, 5)[None].transpose(0, 1), {}, "instance_map: expected"),
        (IMAGE, IDS.to("meta"), {}, r"instance_map: expected the device of input \(cpu\)"),
        (IMAGE[:0], IDS[:0], {}, "instance_map: expected at least one pixel and channel"),
        (IMAGE, IDS - 1, {}, r"instance_map: expected ids 0\.\.2147483647, got -1; renumber"),
        (IMAGE, IDS.int() - 7, {}, r"instance_map: expected ids 0\.\.2147483647, got -7; renumber"),
        (IMAGE, IDS + MAX_ID + 1, {}, "instance_map: expected ids .* got 2147483648; renumber"),
        (IMAGE, IDS, {"backend": "triton"}, "backend: instance_.* has reference, cpu, cuda"),
        (IMAGE, IDS, {"backend": "cuda"}, "needs a cuda tensor, got one on cpu"),
    ],
)
def test_bad_input(function: object, backend: str, image: Tensor, ids: Tensor,
                   options: dict[str, object], message: str) -> None:
    assert callable(function)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        function(image, ids, **{"backend": backend, **options})
    assert len(str(caught.value).splitlines()) == 1


def test_module() -> None:
    image, ids = _image(1, 3, 8, 9), _ids(1, 8, 9)
    module = InstanceAvgPool2d()
    assert torch.equal(module(image, ids), instance_avg_pool2d(image, ids))
    assert not module.state_dict()
