"""content_digest: the definition's number, which every change moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smis_kernels.ops.content_digest import reference
from smis_kernels.ops.content_digest.op import content_digest
from smis_kernels.ops.content_digest.stamp import Stamp, content
from smis_kernels.runtime.backend import missing

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason="no native CPU library")


def values(count: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(count))
    return (10 * drawn).to(dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8,
                                   torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 5, 64, 1023, 1024, 1025, 2048, 16_383, 16_385, 65_536,
                                   200_001])
def test_the_kernel_is_the_definition(count: int, dtype: torch.dtype) -> None:
    x = values(count, dtype)
    found = content_digest(x, backend="cpu")
    assert found.dtype == torch.int64
    assert found.shape == ()
    assert torch.equal(found, content_digest(x, backend="reference"))


@needs_cpu
def test_threads_and_strides_do_not_matter() -> None:
    x = values(300_000, torch.float32).view(30, 100, 10, 10)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = content_digest(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(content_digest(x), single)
    assert torch.equal(content_digest(x.to(memory_format=torch.channels_last)), single)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("change", [
    lambda x: x.neg_(), lambda x: x.copy_(x.flip(0)), lambda x: x.copy_(x.roll(1)),
    lambda x: x[5:7].copy_(x[5:7].flip(0)), lambda x: x[-1:].add_(1e-6), lambda x: x.mul_(2),
    lambda x: x[0].fill_(float("nan")), lambda x: x.copy_(x.view(-1, 9).flip(1).flatten()),
], ids=["sign", "order", "shift", "exchange", "one", "exponent", "nan", "kernels"])
def test_every_change_is_seen(change: object, backend: str) -> None:
    x = values(9 * 128, torch.float32)
    before, version = content_digest(x, backend=backend), x._version
    change(x.data)  # type: ignore[operator]
    assert x._version == version
    assert not torch.equal(content_digest(x, backend=backend), before)


def test_every_word_has_a_factor_of_its_own() -> None:
    """An exchange of any two words of a run is seen, and one of the same place in two runs."""
    count = reference.RUN
    units = torch.eye(count + 1, dtype=torch.int32)
    found = {int(content_digest(unit, backend="reference")) for unit in units}
    assert len(found) == count + 1
    assert all(number % 2 for number in found)  # so every change of one word is seen


@needs_cpu
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 1, 0, 2), (1, 0, 2, 3)])
def test_a_stamp_reads_memory_as_it_lies(order: tuple[int, ...]) -> None:
    lying = values(360, torch.float32).view(3, 4, 5, 6)
    x = lying.permute([order.index(i) for i in range(4)])
    assert not x.is_contiguous()
    stamp = Stamp([x])
    with torch.profiler.profile() as profile:
        found = content(x)
    assert torch.equal(found, content_digest(lying))
    assert stamp.holds([x])
    names = {event.key for event in profile.key_averages()}
    assert "smis_kernels::content_digest" in names
    assert not names & {"aten::copy_", "aten::clone"}
    x.data[1, 2, 0, 1] += 1
    assert not stamp.holds([x])
    every = lying[:, ::2].expand(2, *lying[:, ::2].shape)  # neither dense nor without overlaps
    stamp = Stamp([every])
    assert stamp.holds([every])
    lying[1, 2, 0, 1] += 1
    assert not stamp.holds([every])
