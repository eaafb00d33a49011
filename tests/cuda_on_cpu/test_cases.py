"""Every CUDA op on the emulated device against its reference: random cases, and the worst ones."""

from __future__ import annotations

import math
import mmap
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from smis_kernels.runtime.native import cuda_emulated

if not cuda_emulated():
    pytest.skip("SMIS_CUDA_EMULATED=1 runs it", allow_module_level=True)

from cuda_on_cpu.plugin import CALLS, DEVICE, MODE, SEED

from benchmarks.launches import NATIVE
from smis_kernels import LabelLayout
from smis_kernels.layout import label_layout
from smis_kernels.ops.class_crops.op import class_boxes, class_crops
from smis_kernels.ops.instance_edges.op import instance_edges
from smis_kernels.ops.instance_pool.op import (
    MAX_ID,
    instance_avg_pool2d,
    instance_mean_table,
    instance_means_op,
    instance_pool_op,
)
from smis_kernels.ops.label_windows.op import (
    NumberedLevel,
    number_labels,
    number_levels,
    number_vectors,
    number_windows,
)
from smis_kernels.ops.spatially_varying_conv.op import spatially_varying_conv2d
from smis_kernels.runtime.library import raw_ops
from smis_kernels.testing import (
    MEMORY_FORMATS,
    gradients,
    max_error,
    poisoned_empty,
    with_memory_format,
)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BOUND = {torch.float32: 3e-6, torch.float64: 1e-13, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SIZES = (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 40, 65)
COUNT = {"plain": 60, "race": 15, "asan": 25}[MODE]  # random cases of an op and schedule


class Draw:
    """What one random case is made of; the device's schedule and bounds of grids come with it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(1000 * SEED + seed)
        self.torch = torch.Generator().manual_seed(seed)
        DEVICE.set(seed=1000 * SEED + seed + 1, resident=self.random.randint(1, 6),
                   preempt=self.random.choice((0.0, 0.1, 0.5)),
                   grid_x=self.random.choice((1, 2, 3, 1e18)),
                   grid_y=self.random.choice((1, 2, 1e18)))

    def size(self, limit: int = 65) -> int:
        return min(self.random.choice(SIZES), limit)

    def floats(self, *shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=self.torch).to(dtype)
        return with_memory_format(x, self.random.choice(MEMORY_FORMATS))

    def map(self, n: int, h: int, w: int, dtype: torch.dtype, low: int = 0) -> Tensor:
        """Blocks, stripes, noise, or an id for every pixel; ids may lie anywhere in their range."""
        count = self.random.choice((1, 2, 9, 40, n * h * w))
        block = self.random.choice((1, 1, 4, 9))
        coarse = torch.randint(count, (n, -(-h // block), -(-w // block)), generator=self.torch)
        rows = coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w]
        top = min(torch.iinfo(dtype).max, MAX_ID)
        spread = torch.randint(low, top, (count,), generator=self.torch)
        spread[-1] = top
        small = (torch.arange(count) + low) % (top + 1 - low)
        ids = spread if self.random.random() < 0.5 else small
        held = ids.clamp(min=low)[rows].to(dtype)
        return with_memory_format(held[:, None], self.random.choice(MEMORY_FORMATS))[:, 0]


def close(got: Tensor, truth: Tensor, scale: float = 1.0) -> None:
    """Equal but for the rounding of its dtype; the same where there is no number."""
    assert got.shape == truth.shape
    error = (got.double() - truth.double()).abs()
    fine = (error <= scale * BOUND[got.dtype] * truth.double().abs().clamp(min=1)) | (
        got.double() == truth.double()) | (got.isnan() & truth.isnan())
    wrong = int((~fine).sum())
    assert wrong == 0, f"{wrong} of {fine.numel()} differ, by {error.nan_to_num().max()}"


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def refused(got: tuple[Tensor, Tensor]) -> None:
    assert len(got[1]) == 0
    assert not got[0].any()


def pooled(x: Tensor, ids: Tensor) -> Tensor:
    """The definition's mean in fp64, by index_add where its loops would take long."""
    n, c, h, w = x.shape
    keys = (torch.arange(n).view(n, 1, 1) << 32 | ids.long()).flatten()
    _, index, count = keys.unique(return_inverse=True, return_counts=True)
    rows = x.double().permute(0, 2, 3, 1).reshape(-1, c)
    means = rows.new_zeros((len(count), c)).index_add_(0, index, rows) / count[:, None]
    return means[index].view(n, h, w, c).permute(0, 3, 1, 2)


def edges(d: Draw) -> None:
    ids = d.map(d.random.randint(1, 3), d.size(), d.size(), d.random.choice(INTEGERS))
    dtype = d.random.choice((*FLOATS, torch.bool, torch.uint8))
    same((instance_edges(ids, dtype=dtype, backend="cuda"),),
         (instance_edges(ids, dtype=dtype, backend="reference"),))


def pool(d: Draw) -> None:
    n, h, w = d.random.randint(1, 3), d.size(40), d.size(40)
    channels = d.random.choice((1, 2, 3, 4, 5, 9, 15, 16, 17, 33))
    x = d.floats(n, channels, h, w, dtype=d.random.choice(FLOATS))
    ids = d.map(n, h, w, d.random.choice(INTEGERS))
    close(instance_pool_op("cuda", x, ids), pooled(x, ids), 3)
    table = instance_mean_table(x, ids, backend="cuda")
    expected = instance_mean_table(x.double(), ids, backend="cpu")
    same((table.image, table.id, table.area), (expected.image, expected.id, expected.area))
    close(table.mean, expected.mean, 3)


def conv(d: Draw) -> None:
    k, stride, dilation = d.random.choice((1, 3, 5)), d.random.randint(1, 3), d.random.randint(1, 2)
    padding, h, w = d.random.randint(0, 3), d.size(20) + 9, d.size(20) + 9
    n, groups, each = d.random.randint(1, 2), d.random.randint(1, 4), d.random.choice((1, 2, 5))
    out = [(s + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for s in (h, w)]
    dtype = d.random.choice(FLOATS)
    x = d.floats(n, groups * each, h, w, dtype=dtype)
    weight = d.floats(n, groups * k * k, *out, dtype=dtype)

    def results(backend: str, *inputs: Tensor) -> list[Tensor]:
        def call(a: Tensor, b: Tensor) -> Tensor:
            return spatially_varying_conv2d(a, b, kernel_size=k, stride=stride, padding=padding,
                                            dilation=dilation, backend=backend)
        return [call(*inputs), *gradients(call, inputs)]

    for got, truth in zip(results("cuda", x, weight),
                          results("reference", x.double(), weight.double()), strict=True):
        assert max_error(got, truth) < 5 * BOUND[dtype]


def crops(d: Draw) -> None:
    n, k, h, w = d.random.randint(1, 2), d.random.randint(1, 9), d.size(33), d.size(33)
    classes = d.random.choice((1, 2, 3, 8, 19))
    many = d.random.random() < 0.1  # more classes than shared memory holds boxes of
    image = d.floats(n, k, h, w, dtype=d.random.choice(FLOATS))
    if d.random.random() < 0.4:
        image[:, :, torch.rand((h, w), generator=d.torch) < 0.3] = 0
    if d.random.random() < 0.2:
        image[0, 0, d.random.randrange(h), d.random.randrange(w)] = d.random.choice(
            (math.nan, math.inf, -math.inf))
    labels = d.map(n, h, w, torch.int64) % classes
    semantics = labels.to(d.random.choice(INTEGERS))
    if many:
        classes = d.random.choice((2047, 2048, 2100))
    elif d.random.random() < 0.5:
        semantics = torch.nn.functional.one_hot(labels, classes).permute(0, 3, 1, 2).to(image.dtype)
        if d.random.random() < 0.5:
            semantics = semantics * torch.rand(semantics.shape, generator=d.torch).to(image.dtype)
    size = (h, w) if d.random.random() < 0.3 else (d.size(40), d.size(40))
    same((class_boxes(image, semantics, classes, backend="cuda"),),
         (class_boxes(image, semantics, classes, backend="cpu" if many else "reference"),))
    got = class_crops(image, semantics, classes, size=size, backend="cuda")
    expected = class_crops(image, semantics, classes, size=size, backend="cpu")
    close(got, expected, 0)
    if not many and image.isfinite().all():
        (a,), (b,) = (gradients(lambda x, s=s, kind=kind: class_crops(
            x, s, classes, size=size, backend=kind), (x_,)) for x_, s, kind in (
                (image, semantics, "cuda"), (image, semantics, "cpu")))
        close(a, b, 100)


def windows(d: Draw) -> None:
    map_ = d.map(d.random.randint(1, 3), d.size(), d.size(), torch.int32, 1)
    fits = int(map_.max()) < 2**21 or d.random.random() < 0.8
    map_ = map_.remainder(2**21 - 1) + 1 if fits else map_
    index, rows = number_windows(map_, 10**9, backend="reference")
    count = len(rows) - 1
    limit = d.random.choice((10**9, count + 1, count, count - 1, count // 2, 1, 0))
    got = number_windows(map_, limit, backend="cuda")
    if count <= limit and int(map_.max()) < 2**21:
        same(got, (index, rows))
    else:
        refused(got)


def vectors(d: Draw) -> None:
    n, k, h, w = d.random.randint(1, 2), d.random.choice((1, 2, 5, 19, 33)), d.size(40), d.size(40)
    dtype = d.random.choice(FLOATS)
    map_ = d.map(n, h, w, torch.int64) % d.random.choice((1, 2, 7, 50, 400))
    rows = torch.eye(400, k) if d.random.random() < 0.3 else torch.randint(
        -1, 2, (400, k), generator=d.torch).float()
    x = rows[map_].to(dtype)
    x = torch.where((x == 0) & (torch.rand(x.shape, generator=d.torch) < 0.5), -x, x)
    x = with_memory_format(x.permute(0, 3, 1, 2), d.random.choice(MEMORY_FORMATS))
    nan = d.random.random() < 0.15
    expected = number_vectors(x, 10**9, backend="reference")
    count = len(expected[1]) - 1
    limit = d.random.choice((10**9, count + 1, count, count - 1, count // 2, 1, 0))
    if nan:
        x[-1, -1, -1, -1] = math.nan
    got = number_vectors(x, limit, backend="cuda")
    if nan or count > limit:
        refused(got)
    else:
        same(got, expected)


def same_levels(got: tuple[list[NumberedLevel], Tensor],
                expected: tuple[list[NumberedLevel], Tensor]) -> None:
    (levels, counts), (truth, expected_counts) = got, expected
    assert torch.equal(counts, expected_counts), (counts.tolist(), expected_counts.tolist())
    for a, b, v, u in zip(levels, truth, *counts.tolist(), strict=True):
        same((a.symbols, a.index3, a.index5), (b.symbols, b.index3, b.index5))
        for rows, expected_rows, count in ((a.windows3, b.windows3, v),
                                           (a.windows5, b.windows5, u)):
            assert rows.shape == expected_rows.shape
            assert torch.equal(rows[: count + 1], expected_rows[: count + 1])
        assert all(t.storage_offset() % 64 == 0 for t in a)  # torch's memory begins at 512 bytes


def levels(d: Draw) -> None:
    n, h, w = d.random.randint(1, 3), d.size(), d.size()
    map_ = d.map(n, h, w, torch.int32, 1)
    if d.random.random() < 0.85:
        map_ = map_.remainder(2**21 - 1) + 1
    elif d.random.random() < 0.5:
        map_[-1, -1, d.random.randrange(w)] = d.random.choice((0, -1, -(2**31)))
    sizes = [(h, w) if d.random.random() < 0.3 else (d.size(40), d.size(40))
             for _ in range(d.random.choice((1, 2, 5, 16)))]
    limits = [d.random.choice((10**9, n * i * j, n * i * j // 2, 9, 1, 0)) for i, j in sizes]
    before = DEVICE.waits
    got = number_levels(map_, sizes, limits, backend="cuda")
    assert DEVICE.waits == before
    same_levels(got, number_levels(map_, sizes, limits, backend="reference"))


def labels(d: Draw) -> None:
    dtype = d.random.choice(INTEGERS)
    classes = d.random.choice((1, 2, 7, 100, 255, 256, 257, 600))
    shape = d.random.randint(1, 3), d.size(), d.size()
    most = min(classes, torch.iinfo(dtype).max + 1)
    map_ = torch.randint(most, shape, generator=d.torch).to(dtype)
    if d.random.random() < 0.4:
        ends = (torch.iinfo(dtype).min, -1, classes, torch.iinfo(dtype).max)
        fitting = [v for v in ends if torch.iinfo(dtype).min <= v <= torch.iinfo(dtype).max]
        map_[torch.rand(shape, generator=d.torch) < 0.1] = d.random.choice(fitting)
    map_ = with_memory_format(map_[:, None], d.random.choice(MEMORY_FORMATS))[:, 0]
    edges_ = None
    if d.random.random() < 0.5:
        edges_ = torch.randint(3, shape, generator=d.torch).to(torch.uint8)
    got = number_labels(map_, edges_, classes, backend="cuda")
    for a, b in zip(got, number_labels(map_, edges_, classes, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


CASES = (edges, pool, conv, crops, windows, vectors, levels, labels)


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_random_cases(case: Callable[[Draw], None]) -> None:
    for seed in range(COUNT):
        try:
            case(Draw(seed))
        except Exception as error:
            raise AssertionError(f"case {seed} of schedule {SEED}: {error}") from error


def slot(id: int, capacity: int) -> int:
    """Where the key of an id of the first image begins in instance_pool's table."""
    hashed = (id + 1) * 0x9E3779B97F4A7C15 % 2**64 >> 32
    return hashed * capacity >> 32


@pytest.mark.parametrize("preempt", [0.0, 0.5, 1.0])
def test_keys_that_collide_and_a_table_as_full_as_it_gets(preempt: float) -> None:
    DEVICE.set(preempt=preempt, resident=5)
    generator = torch.Generator().manual_seed(0)
    capacity = 512 + 512 // 4 + 1
    x = torch.randn((1, 3, 16, 32), generator=generator)
    for wanted in (5, capacity - 1):  # the last slot: the search goes on at the first
        near = [i for i in range(60 * capacity) if slot(i, capacity) == wanted][:40]
        ids = torch.tensor(near)[torch.randint(40, (1, 16, 32), generator=generator)]
        close(instance_pool_op("cuda", x, ids), pooled(x, ids))
    ids = (torch.randperm(512, generator=generator) * 2097143 % 2**31).view(1, 16, 32)
    close(instance_pool_op("cuda", x, ids), x)


def checked_pool(shape: tuple[int, int, int, int], count: int, last: bool,
                 dtype: torch.dtype = torch.float32) -> None:
    """Means of ``count`` ids in blocks of rows, and of the same ids in another image."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(h * w + c)
    x = with_memory_format(torch.randn(shape, generator=generator).to(dtype),
                           "channels_last" if last else "contiguous")
    ids = torch.randint(count, (n, -(-h // 3), w), generator=generator).repeat_interleave(3, 1)
    ids = ids[:, :h].sort(2).values * 1009
    with poisoned_empty():
        close(instance_pool_op("cuda", x, ids), pooled(x, ids), 3)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("name", "shapes"), [
    ("kRun, rows of a thread", [(1, 3, h, 33) for h in (7, 8, 9)]),
    ("kWarps x kRun, rows of a block", [(1, 4, h, 5) for h in (63, 64, 65)]),
    ("columns of a warp", [(2, 2, 5, w) for w in (31, 32, 33)]),
    ("channels of a thread", [(2, c, 5, 9) for c in (1, 2, 3, 4, 5)]),
    ("channels of a warp", [(1, c, 9, 8) for c in (15, 16, 17, 31, 32, 33, 130, 280, 1041)]),
    ("kPiece, pixels of a warp", [(1, 17, 1, w) for w in (31, 32, 33)]),
    ("kWarps x kPiece, pixels of a block", [(1, 20, 1, w) for w in (255, 256, 257)]),
    ("kPixels, pixels that a block numbers", [(1, 1, 1, w) for w in (2047, 2048, 2049)]),
])
def test_pool_beside_its_constants(name: str, shapes: list[tuple[int, int, int, int]],
                                   last: bool) -> None:
    for shape in shapes:
        for count in (1, 4, 300):
            checked_pool(shape, count, last, torch.float16 if count == 4 else torch.float32)


@pytest.mark.skipif(MODE != "plain", reason="65536 pixels of 130 channels")
@pytest.mark.parametrize(("channels", "last"), [(130, False), (130, True), (136, True)])
def test_pool_of_several_blocks_of_channels(channels: int, last: bool) -> None:
    checked_pool((1, channels, 256, 256), 40, last)  # sums of 128 channels are held at a time


def test_ids_at_the_ends_of_their_range() -> None:
    x = torch.arange(8.0).view(2, 1, 1, 4)
    ids = torch.tensor([[[0, MAX_ID, 0, MAX_ID - 1]], [[MAX_ID, 0, 1, MAX_ID]]])
    close(instance_pool_op("cuda", x, ids), instance_avg_pool2d(x, ids, backend="reference"))
    wrong = torch.tensor([[[-1, 2**31, 5, 5]], [[-(2**63), 2**40, 7, 7]]])
    assert instance_pool_op("cuda", x, wrong).isnan().flatten().tolist() == 2 * [
        True, True, False, False]
    with pytest.raises(ValueError, match="instance_map"):
        instance_mean_table(x, wrong, backend="cuda")
    map_ = torch.ones((1, 5, 40), dtype=torch.int32)
    for value, fits in ((2**21 - 1, True), (2**21, False), (2**31 - 1, False)):
        map_[0, 3, 17] = value
        got = number_windows(map_, 10**6, backend="cuda")
        (same if fits else lambda a, b: refused(a))(
            got, number_windows(map_, 10**6, backend="reference"))
    map_[0, 3, 17] = -5
    with pytest.raises(ValueError, match="map: expected ids from"):
        number_windows(map_, 10, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_labels_of_no_class_are_in_no_crop(layout: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    image = with_memory_format(torch.randn((2, 3, 9, 33), generator=random), layout)
    labels = torch.randint(5, (2, 9, 33), generator=random).to(dtype)
    ends = torch.iinfo(dtype)
    for k, wrong in enumerate((-1, 5, ends.min, ends.max)):
        labels[k % 2, 2 * k, k::9] = wrong
    planes = labels[:, None] == torch.arange(5).to(dtype)[:, None, None]
    assert torch.equal(class_boxes(image, labels, 5, backend="cuda"),
                       class_boxes(image, planes, 5, backend="reference"))
    (got, dx), (expected, dx_expected) = (
        (class_crops(image, s, 5, size=(8, 16), backend=kind), *gradients(
            lambda x, s=s, kind=kind: class_crops(x, s, 5, size=(8, 16), backend=kind), (image,)))
        for s, kind in ((labels, "cuda"), (planes, "reference")))
    close(got, expected)
    close(dx, dx_expected, 8)


def test_far_more_windows_than_the_limit() -> None:
    map_ = torch.randint(1, 1000, (1, 48, 65), generator=torch.Generator().manual_seed(4)).int()
    expected = number_windows(map_, 10**9, backend="reference")
    count = len(expected[1]) - 1
    for limit in (0, 1, 31, 32, 33, 1000, count - 1, count, count + 1):
        got = number_windows(map_, limit, backend="cuda")
        (same if count <= limit else lambda a, b: refused(a))(got, expected)


def test_more_tiles_than_a_block_has_threads() -> None:
    """256 tiles of 256 pixels are counted at a time; new vectors come before and after those."""
    x = torch.zeros((1, 1, 2, 33000))
    for i, column in enumerate((7, 20000, 32535, 32536, 32999)):  # 32536: the tile after them
        x[0, 0, 1, column] = i + 1.0
    same(number_vectors(x, 1000, backend="cuda"), number_vectors(x, 1000, backend="reference"))


def test_each_level_has_its_own_limit() -> None:
    map_ = torch.randint(1, 4, (2, 33, 40), generator=torch.Generator().manual_seed(4)).int()
    sizes = [(33, 40), (16, 20), (8, 10), (1, 1)]
    _, counts = number_levels(map_, sizes, [10**6] * 4, backend="reference")
    for of in range(2):  # 3x3 windows fit and 5x5 ones do not, or both, or neither
        exact = counts[of].tolist()
        for less in (0, 1):
            for level in range(4):
                limits = [10**6 if i != level else c - less for i, c in enumerate(exact)]
                same_levels(number_levels(map_, sizes, limits, backend="cuda"),
                            number_levels(map_, sizes, limits, backend="reference"))


def test_windows_of_a_level_that_is_refused_leave_its_neighbours_alone() -> None:
    map_ = torch.ones((1, 16, 64), dtype=torch.int32)
    map_[0, 3, 5] = 2**21  # which only the whole map reads
    sizes = [(8, 32), (16, 64), (4, 16)]
    got = number_levels(map_, sizes, [10**6] * 3, backend="cuda")
    assert (got[1] >= 0).tolist() == [[True, False, True]] * 2
    assert not got[0][1].index3.any() and not got[0][1].index5.any()
    same_levels(got, number_levels(map_, sizes, [10**6] * 3, backend="reference"))


def test_fakes_are_shaped_as_the_kernels_results() -> None:
    with FakeTensorMode() as mode:
        for n, h, w in ((1, 1, 1), (2, 33, 40)):
            map_ = torch.ones((n, h, w), dtype=torch.int32)
            sizes, limits = [h, w, 5, 7], [3, 10**6]
            edges_ = map_.byte()
            for op, arguments in (("number_levels", (map_, sizes, limits)),
                                  ("number_labels", (map_, None, 5)),
                                  ("number_labels", (map_, edges_, 5))):
                faked = raw_ops[op].overload(*(mode.from_tensor(torch.ones(
                    a.shape, dtype=a.dtype), ) if isinstance(a, Tensor) else a
                    for a in arguments))
                with unset_fake_temporarily():
                    real = raw_ops[op]("cuda", *(torch.ones(a.shape, dtype=a.dtype) if isinstance(
                        a, Tensor) else a for a in arguments))
                for a, b in zip(real, faked, strict=True):
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_launches_are_those_that_the_benchmark_counts() -> None:
    # Memory sets and copies leave no trace here: two for every numbering with a cleared result.
    others = {"number_vectors": 1, "number_windows": 3, "number_labels": 2, "number_levels": 3}
    map_ = torch.ones((1, 8, 9), dtype=torch.int32)
    for name, call in (
        ("number_vectors", lambda: number_vectors(map_[:, None].float(), 9, backend="cuda")),
        ("number_windows", lambda: number_windows(map_, 99, backend="cuda")),
        ("number_labels", lambda: number_labels(map_, map_.byte(), 3, backend="cuda")),
        ("number_levels", lambda: number_levels(map_, [(8, 9), (4, 4), (1, 2)], [99, 99, 99],
                                                backend="cuda")),
    ):
        before = sum(kernel[0] for kernel in DEVICE.kernels().values())
        call()
        kernels = sum(kernel[0] for kernel in DEVICE.kernels().values()) - before
        assert kernels + others[name] == NATIVE[name], name


@pytest.mark.parametrize("edge", [False, True])
def test_a_layout_is_compiled_on_the_device_as_on_the_cpu(
        edge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``LabelLayout`` on its way for a GPU, with the kernels emulated."""
    def on_device(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, backend: op(*arguments, backend="cuda")

    random = torch.Generator().manual_seed(3)
    coarse = torch.randint(2, 9, (2, 9, 11), generator=random)
    map_ = coarse.repeat_interleave(7, 1).repeat_interleave(7, 2)
    ids = map_ // 2 if edge else None
    sizes = [(63, 77), (16, 20), (5, 7), (1, 1)]
    cpu = LabelLayout.from_labels(map_, 10, instances=ids)
    expected = {size: vars(cpu.level(size)) for size in sizes}
    monkeypatch.setattr(label_layout, "device_kernels", lambda map: True)
    for name in ("number_levels", "number_labels"):
        monkeypatch.setattr(label_layout, name, on_device(getattr(label_layout, name)))
    label_layout.sizes_asked.cache_clear()
    before = CALLS["number_levels"], DEVICE.waits
    for again in range(2):
        device = LabelLayout.from_labels(map_, 10, instances=ids)
        assert torch.equal(device.vectors, cpu.vectors)
        assert torch.equal(device.symbols, cpu.symbols)
        for size in sizes:
            for key, value in expected[size].items():
                assert torch.equal(getattr(device.level(size), key), value)
        # One go for each size that is new, then one for all.
        assert CALLS["number_levels"] - before[0] == len(sizes) + again
    assert DEVICE.waits == before[1]
    label_layout.sizes_asked.cache_clear()


def far(x: Tensor, *strides: int) -> Tensor:
    """A view with these strides, in memory of which only the touched pages exist."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    no_reserve = 0x4000
    held = mmap.mmap(-1, (last + 1) * x.element_size(),
                     flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    view = torch.frombuffer(held, dtype=x.dtype).as_strided(tuple(x.shape), strides)
    return view.copy_(x)


@pytest.mark.skipif(MODE == "asan", reason="AddressSanitizer's shadow of it is not sparse")
def test_strides_beyond_32_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 5, 6), generator=generator)
    ids = far(labels.byte(), 2**32 + 7, 97, 3)
    edges_ = instance_edges(ids, dtype=torch.uint8, backend="cuda")
    assert torch.equal(edges_, instance_edges(labels, dtype=torch.uint8, backend="reference"))
    near = torch.randn((2, 3, 5, 6), generator=generator).half()
    x = far(near, 2**32 + 64, 2**31 + 64, 6, 1)
    close(instance_pool_op("cuda", x, labels), pooled(near, labels), 3)
    for crops_ in (lambda y, kind: class_boxes(y, labels, 3, backend=kind),
                   lambda y, kind: class_crops(y, labels, 3, size=(9, 8), backend=kind)):
        assert torch.equal(crops_(x, "cuda"), crops_(near, "reference"))
    same(number_vectors(x, 10**6, backend="cuda"), number_vectors(near, 10**6, backend="reference"))


@pytest.mark.skipif(MODE == "asan", reason="AddressSanitizer's shadow of it is not sparse")
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_of_strides_beyond_32_bits(size: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(size)
    near = torch.randn((2, 4, 5, 6), generator=generator).half()
    out = [(n + 2 - size) // stride + 1 for n in (5 + 2, 6 + 2)]
    weight = torch.randn((2, 2 * size**2, *out), generator=generator).half()
    window = {"kernel_size": size, "stride": stride, "padding": 2}

    def results(x: Tensor, w: Tensor, backend: str) -> list[Tensor]:
        for t in (x, w):
            t.requires_grad_()
        y = spatially_varying_conv2d(x, w, backend=backend, **window)
        seed = torch.Generator().manual_seed(7)
        dy = torch.randn(y.shape, generator=seed).half().to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]

    apart = 2 * size**2 * (2**30 // size**2 + 8)
    found = results(far(near, 2**32 + 64, 2**31 + 64, 6, 1),
                    far(weight, apart, apart // (2 * size**2), out[1], 1), "cuda")
    for got, exact in zip(found, results(near.double(), weight.double(), "reference"),
                          strict=True):
        close(got, exact, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_beside_its_constants(stride: int, dtype: torch.dtype) -> None:
    """Packs beside those of a warp and a block, channels that are no whole packs, both formats."""
    for channels, width in ((8, 15), (8, 16), (8, 17), (8, 127), (8, 128), (8, 129), (17, 5),
                            (130, 4), (280, 3), (1041, 2)):
        generator = torch.Generator().manual_seed(channels + width)
        x = torch.randn((1, channels, 2, stride * width), generator=generator).to(dtype)
        weight = torch.randn((1, 9 * channels, 2 // stride, width), generator=generator).to(dtype)

        def results(backend: str, *inputs: Tensor) -> list[Tensor]:
            def call(a: Tensor, b: Tensor) -> Tensor:
                return spatially_varying_conv2d(a, b, stride=stride, backend=backend)
            return [call(*inputs), *gradients(call, inputs)]

        truth = results("reference", x.double(), weight.double())
        for layout in ("contiguous", "channels_last"):
            inputs = with_memory_format(x, layout), with_memory_format(weight, layout)
            with poisoned_empty():
                found = results("cuda", *inputs)
            for got, exact in zip(found, truth, strict=True):
                assert max_error(got, exact) < 5 * BOUND[dtype]


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8, 9])
def test_crops_of_planes_are_those_of_labels(channels: int) -> None:
    """The gradient of pixels under no mask is not read, whatever it holds."""
    generator = torch.Generator().manual_seed(channels)
    labels = torch.randint(0, 3, (2, 9, 41), generator=generator)
    planes = torch.nn.functional.one_hot(labels, 5).permute(0, 3, 1, 2).float().contiguous()
    image = torch.randn((2, channels, 9, 41), generator=generator) + 3
    for size in ((9, 41), (5, 7), (60, 100)):  # 60 x 100: ranges that a whole warp sums
        found = [gradients(lambda x, s=s, kind=kind, size=size: class_crops(
            x, s, 5, size=size, backend=kind), (image,))[0]
                 for s, kind in ((labels, "cuda"), (planes, "cuda"), (planes, "reference"))]
        assert torch.equal(found[0], found[1])
        close(found[1], found[2], 100)


def test_host_waits() -> None:
    x, ids = torch.randn((1, 3, 8, 9)), torch.arange(72).view(1, 8, 9) // 5
    for waits, call in (
        (1, lambda: number_windows(ids.int() + 1, 99, backend="cuda")),
        (1, lambda: number_vectors(x, 99, backend="cuda")),
        (0, lambda: number_levels(ids.int() + 1, [(4, 4), (8, 9)], [9, 99], backend="cuda")),
        (0, lambda: number_labels(ids, None, 15, backend="cuda")),
        (1, lambda: instance_means_op("cuda", x, ids)),
        (0, lambda: instance_pool_op("cuda", x, ids)),
        (0, lambda: class_crops(x, ids, 15, backend="cuda")),
        (0, lambda: instance_edges(ids, backend="cuda")),
        (0, lambda: spatially_varying_conv2d(x, torch.randn((1, 27, 8, 9)), backend="cuda")),
    ):
        before = DEVICE.waits
        call()
        assert DEVICE.waits - before == waits
