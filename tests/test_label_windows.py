"""number_vectors and number_windows: equal to torch.unique, and no hash is trusted."""

from __future__ import annotations

import struct

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smis_kernels import BackendError
from smis_kernels.ops.label_windows.op import number_vectors, number_windows
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import MEMORY_FORMATS, poisoned_empty, with_memory_format

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
SHAPES = [(1, 1, 1), (2, 1, 7), (3, 5, 1), (2, 13, 17), (1, 64, 128), (4, 31, 33)]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_ID = 2**21 - 1  # three ids share one key


def random_map(shape: tuple[int, ...], ids: int, block: int = 3, seed: int = 0) -> Tensor:
    """Blocks of one id each, as regions of a label map, with some pixels of their own."""
    n, h, w = shape
    random = torch.Generator().manual_seed(seed + n * h * w)
    coarse = torch.randint(1, ids + 1, (n, h // block + 1, w // block + 1), generator=random)
    fine = coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w].clone()
    spots = torch.rand(shape, generator=random) < 0.05
    fine[spots] = torch.randint(1, ids + 1, shape, generator=random)[spots]
    return fine.int()


def one_hot(map: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.one_hot(map.long() % classes, classes).permute(0, 3, 1, 2).to(dtype)


def interleaved(map: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[class 0, edge, class 1, edge, ...]: what GroupDNet feeds its norms on Cityscapes."""
    planes = one_hot(map, classes, dtype)
    edge = F.pad((map[:, :, 1:] != map[:, :, :-1]), (0, 1)).to(dtype)[:, None].expand_as(planes)
    return torch.stack([planes, edge], 2).flatten(1, 2)


def window_columns(map: Tensor, radius: int = 1) -> Tensor:
    """(pixels, window) of a map, zeros outside."""
    size = 2 * radius + 1
    columns = F.unfold(map.double()[:, None], size, padding=radius)
    return columns.transpose(1, 2).reshape(-1, size * size).int()


def assert_equal(pair: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(pair, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


def check_vectors(input: Tensor, count: int | None = None) -> None:
    limit = input[:, 0].numel()
    symbols, vectors = number_vectors(input, limit, backend="cpu")
    assert_equal((symbols, vectors), number_vectors(input, limit, backend="reference"))
    assert torch.equal(vectors[symbols.long()].permute(0, 3, 1, 2), input)
    assert count is None or len(vectors) == count + 1
    assert not vectors[0].any()


@needs_cpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_equal_reference(shape: tuple[int, ...]) -> None:
    for ids, block in ((1, 1), (3, 3), (60, 4), (100_000, 1)):
        map = random_map(shape, ids, block)
        for symbols in (map, map.transpose(1, 2), map.flip(0)[:, ::2]):
            limit = symbols.numel()
            index, windows = number_windows(symbols, limit, backend="cpu")
            expected = number_windows(symbols, limit, backend="reference")
            assert_equal((index, windows), expected)
            assert torch.equal(windows[index.flatten().long()], window_columns(symbols))
            assert len(windows) - 1 == len(torch.unique(window_columns(symbols), dim=0))


@needs_cpu
def test_windows_of_windows_are_the_5x5_windows() -> None:
    map = random_map((2, 23, 29), 5)
    index3, _ = number_windows(map, map.numel())
    index5, windows5 = number_windows(index3, map.numel())
    _, inverse = torch.unique(window_columns(map, 2), dim=0, return_inverse=True)
    pairs = torch.unique(torch.stack([index5.flatten().long(), inverse]), dim=1)
    assert pairs.shape[1] == len(windows5) - 1 == int(inverse.max()) + 1


@needs_cpu
def test_windows_of_a_batch_are_numbered_together() -> None:
    one = random_map((1, 12, 14), 4)
    index, windows = number_windows(torch.cat([one, one]), 1000)
    alone, alone_windows = number_windows(one, 1000)
    assert torch.equal(index, torch.cat([alone, alone]))
    assert torch.equal(windows, alone_windows)


@needs_cpu
def test_windows_that_differ_in_one_row_stay_apart_and_cheap() -> None:
    # noise, constant, constant, ...: many keys that share all but their first id
    map = torch.ones(1, 513, 512, dtype=torch.int32)
    map[:, ::3] = torch.randint(1, 1000, (1, 171, 512), dtype=torch.int32)
    index, windows = number_windows(map, map.numel(), backend="cpu")
    assert torch.equal(windows[index.flatten().long()], window_columns(map))
    assert len(windows) - 1 == len(torch.unique(window_columns(map), dim=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend: str) -> None:
    map = random_map((2, 9, 11), 4)
    count = len(torch.unique(window_columns(map), dim=0))
    assert len(number_windows(map, count, backend=backend)[1]) == count + 1
    for limit in (count - 1, 1, 0):
        assert number_windows(map, limit, backend=backend)[1].shape == (0, 9)
    for planes in (one_hot(map, 4), torch.rand(2, 3, 9, 11)):
        distinct = len(torch.unique(planes.permute(0, 2, 3, 1).flatten(0, 2), dim=0))
        assert len(number_vectors(planes, distinct, backend=backend)[1]) == distinct + 1
        for limit in (distinct - 1, 1, 0):
            vectors = number_vectors(planes, limit, backend=backend)[1]
            assert vectors.shape == (0, planes.shape[1])


@needs_cpu
def test_ids_that_do_not_fit_a_key_are_refused() -> None:
    map = random_map((1, 5, 6), 3)
    map[0, 2, 2] = MAX_ID
    assert_equal(number_windows(map, 100), number_windows(map, 100, backend="reference"))
    map[0, 2, 2] = MAX_ID + 1
    assert number_windows(map, 100)[1].shape == (0, 9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0, -1, -(2**31)])
@pytest.mark.parametrize("size", [1, 40])
def test_ids_below_1_are_refused(size: int, value: int, backend: str) -> None:
    map = torch.ones((1, size, size), dtype=torch.int32)
    map[0, -1, -1] = value
    with pytest.raises((ValueError, RuntimeError)) as error:
        number_windows(map, 9, backend=backend)
    assert str(error.value) == (f"map: expected ids from 1, got {value}; 0 stands for the pixels "
                                "outside the image: number from 1")


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
def test_vectors_of_any_kind_equal_reference(layout: str, dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1), (2, 7, 5), (1, 40, 37)):
        map = random_map(shape, 9)
        random = torch.Generator().manual_seed(1)
        edge = (torch.rand((shape[0], 1, *shape[1:]), generator=random) < 0.3).to(dtype)
        soft = torch.rand((9, 6), generator=random, dtype=torch.float64).to(dtype)
        for planes in (
            one_hot(map, 9, dtype),
            torch.cat([one_hot(map, 9, dtype), edge], 1),
            interleaved(map, 35, dtype),                              # 36 ones where the edge is
            soft[map.long() - 1].permute(0, 3, 1, 2) - 0.5,
            one_hot(map, 9, dtype) * 255,
            one_hot(map * 33, 300, dtype),                            # too wide for exact keys
            edge,
            torch.zeros_like(edge),
        ):
            check_vectors(with_memory_format(planes, layout))


@needs_cpu
def test_sets_of_two_channels_are_told_apart() -> None:
    # 0 + 3 = 1 + 2: neither a sum nor a count of the channels is enough
    pairs = torch.combinations(torch.arange(255), 2)
    planes = torch.zeros(len(pairs) + 256, 255)
    planes[torch.arange(len(pairs))[:, None], pairs] = 1
    planes[torch.arange(255) + len(pairs), torch.arange(255)] = 1
    check_vectors(planes.T[None, :, None], len(planes))


@needs_cpu
def test_sets_of_three_channels_have_no_exact_key() -> None:
    # 0 + 4 + 5 = 1 + 2 + 6, and the sums of their squares are equal, too
    planes = torch.zeros(1, 7, 1, 2)
    planes[0, [0, 4, 5], 0, 0] = planes[0, [1, 2, 6], 0, 1] = 1
    for layout in MEMORY_FORMATS:
        check_vectors(with_memory_format(planes, layout), 2)


@needs_cpu
def test_the_planes_of_cityscapes() -> None:
    map = random_map((2, 64, 48), 1000)
    planes = interleaved(map, 35)
    assert planes.shape[1] == 70
    assert int(planes.sum(1).max()) == 36
    check_vectors(planes, 70)


@needs_cpu
@pytest.mark.parametrize("values", [(0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_is_zero(dtype: torch.dtype, values: tuple[float, float]) -> None:
    planes = torch.tensor(values).repeat(6)[:12].view(1, 2, 2, 3).to(dtype)
    signed = planes.clone()
    signed[0, :, :, 2] = 0.0
    zeros = signed == 0
    signed[zeros] = -0.0
    plain = signed + 0.0
    for backend in ("cpu", "reference"):
        symbols, vectors = number_vectors(signed, 10, backend=backend)
        expected = number_vectors(plain, 10, backend=backend)
        assert_equal((symbols, vectors), expected)
    mixed = torch.tensor([0.0, -0.0, values[1]]).view(1, 1, 1, 3).to(dtype)
    assert number_vectors(mixed, 10)[0].tolist() == [[[1, 1, 2]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_no_label_map(backend: str) -> None:
    map = random_map((2, 9, 11), 5)
    for planes in (one_hot(map, 5), torch.rand(2, 6, 9, 11), one_hot(map * 60, 300)):
        planes[1, 3, 8, 10] = float("nan")
        assert number_vectors(planes, 10_000, backend=backend)[1].shape == (0, planes.shape[1])


@needs_cpu
def test_infinity_is_a_value() -> None:
    planes = torch.zeros(1, 2, 2, 2)
    planes[0, 0, 0, 0], planes[0, 0, 1, 1] = float("inf"), float("-inf")
    symbols, vectors = number_vectors(planes, 10)
    assert symbols.tolist() == [[[1, 2], [2, 3]]]
    assert vectors[:, 0].tolist() == [0, float("inf"), 0, float("-inf")]


def unmixed(key: int) -> float:
    """The float64 whose hash, as the only channel, is ``key``."""
    mask = 2**64 - 1
    product = key ^ key >> 29 ^ key >> 58
    bits = (product * pow(0x9E3779B97F4A7C15, -1, 2**64)) & mask ^ 0x243F6A8885A308D3
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


@needs_cpu
def test_colliding_hashes_are_detected() -> None:
    # the lowest bit of a hash is not kept: two vectors for every key
    for key in range(2, 200, 2):
        a, b = unmixed(key), unmixed(key + 1)
        if a == a and b == b and 0 not in (a, b):
            break
    assert a != b
    alone = torch.tensor([a, a, 7.0], dtype=torch.float64).view(1, 1, 1, 3)
    assert len(number_vectors(alone, 10, backend="cpu")[1]) == 3
    both = torch.tensor([a, b, 7.0], dtype=torch.float64).view(1, 1, 1, 3)
    assert len(number_vectors(both, 10, backend="reference")[1]) == 4
    assert len(number_vectors(both, 10, backend="cpu")[1]) == 0  # taken for no label map


@needs_cpu
def test_every_element_is_written() -> None:
    map = random_map((2, 33, 65), 7)
    with poisoned_empty():
        check_vectors(one_hot(map, 7))
        check_vectors(interleaved(map, 7))
        assert_equal(number_windows(map, map.numel(), backend="cpu"),
                     number_windows(map, map.numel(), backend="reference"))


@needs_cpu
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3), h=st.integers(1, 12), w=st.integers(1, 12), k=st.integers(1, 6),
       ids=st.integers(1, 5), block=st.integers(1, 4), kind=st.sampled_from(("hot", "soft")),
       layout=st.sampled_from(MEMORY_FORMATS), seed=st.integers(0, 1000))
def test_any_map(n: int, h: int, w: int, k: int, ids: int, block: int, kind: str, layout: str,
                 seed: int) -> None:
    map = random_map((n, h, w), ids, block, seed)
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 2 if kind == "hot" else 4, (ids, k), generator=random).float()
    check_vectors(with_memory_format(rows[map.long() - 1].permute(0, 3, 1, 2), layout))
    assert_equal(number_windows(map, map.numel(), backend="cpu"),
                 number_windows(map, map.numel(), backend="reference"))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: number_vectors(torch.zeros(1, 2, 3), 1), "input: expected (N, K, H, W), got shape"),
    (lambda: number_vectors(torch.zeros(1, 2, 3, 4).int(), 1), "input: expected dtype float32"),
    (lambda: number_vectors([1], 1), "input: expected a tensor"),
    (lambda: number_windows(torch.zeros(2, 3).int(), 1), "map: expected (N, H, W), got shape"),
    (lambda: number_windows(torch.zeros(1, 2, 3).long(), 1), "map: expected dtype int32"),
])
def test_bad_arguments_name_themselves(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_explicit_backend_never_falls_back() -> None:
    for call in (lambda: number_vectors(torch.zeros(1, 1, 1, 1), 1, backend="triton"),
                 lambda: number_windows(torch.ones(1, 1, 1).int(), 1, backend="triton")):
        with pytest.raises(BackendError):
            call()
