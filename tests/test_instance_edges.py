"""instance_edges against the slice comparisons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smis_kernels import explain
from smis_kernels.modules.edges import InstanceEdges
from smis_kernels.ops.instance_edges.op import instance_edges
from smis_kernels.runtime.backend import missing
from smis_kernels.runtime.check import INTEGERS
from smis_kernels.testing import MEMORY_FORMATS, poisoned_empty, with_memory_format

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
BACKENDS = ("reference", pytest.param("cpu", marks=needs_cpu))
IDS = (*INTEGERS, torch.uint16, torch.uint32, torch.uint64)
OUTPUTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8)
SHAPES = ((1, 1, 1), (2, 1, 6), (1, 7, 1), (2, 2, 2), (2, 13, 17), (1, 64, 97), (1, 257, 300))


def _ids(n: int, h: int, w: int) -> Tensor:
    generator = torch.Generator().manual_seed(h * w)
    coarse = torch.randint(0, 100, (n, (h + 3) // 4, (w + 4) // 5), generator=generator)
    return coarse.repeat_interleave(4, 1).repeat_interleave(5, 2)[:, :h, :w].contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    ids = torch.tensor([[[5, 5, 5, 5], [5, 5, 5, 5], [5, 5, 9, 5], [5, 5, 5, 5]]])
    assert instance_edges(ids, dtype=torch.uint8, backend=backend).tolist() == [
        [[[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]]
    ]


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_slices(shape: tuple[int, int, int], layout: str) -> None:
    ids = with_memory_format(_ids(*shape).unsqueeze(1), layout)
    expected = instance_edges(ids, backend="reference")
    with poisoned_empty():
        found = instance_edges(ids, backend="cpu")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    for map in (ids[:, 0], ids[:, 0].repeat_interleave(2, 2)[..., ::2]):
        assert torch.equal(instance_edges(map, backend="cpu"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids_dtype", IDS)
@pytest.mark.parametrize("dtype", OUTPUTS)
def test_dtypes(backend: str, ids_dtype: torch.dtype, dtype: torch.dtype) -> None:
    ids = _ids(1, 11, 23)
    expected = instance_edges(ids, backend="reference")
    with poisoned_empty():
        found = instance_edges(ids.to(ids_dtype), dtype=dtype, backend=backend)
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", IDS[2:])
def test_every_bit_of_an_id_counts(backend: str, dtype: torch.dtype) -> None:
    bits = 8 * torch.empty(0, dtype=dtype).element_size()
    for bit in range(bits - 1):
        ids = torch.tensor([[[0, 1 << bit]]]).to(dtype)
        assert instance_edges(ids, backend=backend).tolist() == [[[[1, 1]]]]


@needs_cpu
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_map(data: st.DataObject) -> None:
    n, h, w = (data.draw(st.integers(1, m)) for m in (2, 9, 40))
    values = st.sampled_from([0, 1, 255, 33000, -1, 2**31, 2**32, 2**63 - 1])
    flat = data.draw(st.lists(values, min_size=n * h * w, max_size=n * h * w))
    ids = torch.tensor(flat, dtype=torch.int64).view(n, h, w)
    assert torch.equal(instance_edges(ids, backend="cpu"), instance_edges(ids, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(backend: str, shape: tuple[int, int, int]) -> None:
    edges = instance_edges(torch.zeros(shape, dtype=torch.int32), backend=backend)
    assert edges.shape == (shape[0], 1, *shape[1:])


@needs_cpu
def test_compile() -> None:
    compiled = torch.compile(
        lambda x: instance_edges(x, dtype=torch.float16) + 1, fullgraph=True, backend="aot_eager"
    )
    for h, w in ((7, 9), (8, 11), (6, 5)):
        ids = _ids(1, h, w)
        assert torch.equal(compiled(ids), instance_edges(ids, dtype=torch.float16) + 1)


@needs_cpu
def test_explain() -> None:
    (choice,) = explain(InstanceEdges(), _ids(1, 4, 4)).choices
    assert (choice.op, choice.backend) == ("instance_edges", "cpu")


MAP = torch.zeros((1, 4, 5), dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("instance_map", "options", "message"),
    [
        (MAP[0], {}, r"instance_map: expected \(N, H, W\) or \(N, 1, H, W\), got shape \(4, 5\)"),
        (MAP.expand(1, 2, 4, 5), {}, r"instance_map: expected .* got shape \(1, 2, 4, 5\)"),
        (MAP.float(), {}, "instance_map: expected dtype uint8, .* got float32; cast it first"),
        ([[1]], {}, "instance_map: expected a tensor"),
        (MAP, {"dtype": torch.int64}, "dtype: expected one of float32, .*; got torch.int64"),
        (MAP, {"backend": "triton"}, "backend: instance_edges has reference, cpu, cuda"),
        (MAP, {"backend": "cuda"}, "needs a cuda tensor, got one on cpu"),
    ],
)
def test_bad_input(backend: str, instance_map: Tensor, options: dict[str, object],
                   message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        instance_edges(instance_map, **{"backend": backend, **options})
    assert len(str(caught.value).splitlines()) == 1


def test_module() -> None:
    ids = _ids(1, 8, 9)
    module = InstanceEdges(dtype=torch.uint8)
    assert torch.equal(module(ids), instance_edges(ids, dtype=torch.uint8))
    assert not module.state_dict()
    assert repr(module) == "InstanceEdges(dtype=torch.uint8)"
