"""The counts of ``python -m benchmarks.launches``: against the record, and how they are made."""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("counts launches of compiled kernels", allow_module_level=True)

from benchmarks import launches
from smis_kernels import modulation
from smis_models.benchmark.case import Maps


@pytest.mark.parametrize("generator", launches.GENERATORS)
def test_no_count_has_risen_since_the_record(generator: str) -> None:
    found = launches.measure(Maps(None), (generator,))
    assert not launches.risen(found, launches.last_record())


@pytest.mark.parametrize("generator", launches.GENERATORS)
def test_a_layout_is_compiled_without_the_host(generator: str) -> None:
    counts = launches.count_layout(generator, Maps(None))[1]
    assert counts["launches"] <= 25
    assert counts["waits"] == 0
    assert counts["waits_to_use"] <= 2  # for its labels' range and for all its counts


@pytest.mark.parametrize("generator", ["spade_coco", "groupdnet_ade20k"])
@pytest.mark.parametrize("way", ["auto", "kept"])
def test_a_blocks_shortcut_is_upsampled_in_the_sum(generator: str, way: str) -> None:
    layout, _ = launches.count_layout(generator, Maps(None))
    names = launches.count_forward(generator, layout, way).names
    assert names["tail", "add"] == 7  # one a block
    assert not names["tail", "upsample_nearest2d"]
    if way == "kept":
        assert names.total() <= 45


def test_what_rose_is_named() -> None:
    before = {"a": {"layout": {"launches": 9, "waits": 1},
                    "auto": {"launches": {"norms": 2, "total": 5}}}}
    now = {"a": {"layout": {"launches": 9, "waits": 2},
                 "auto": {"launches": {"norms": 4, "total": 5}},
                 "kept": {"launches": {"total": 3}}}}
    assert launches.risen(now, before) == [
        "a/layout/waits: 2, before 1", "a/kept/launches/total: 3, before nothing"]
    assert not launches.risen(before, before)


def test_a_launcher_is_counted_by_its_kernels() -> None:
    with launches.without_a_gpu(), FakeTensorMode(), torch.no_grad():
        x, gamma, beta = (torch.empty((2, 8, 6, 6), device="cuda") for _ in range(3))
        with launches.Count() as count:
            y = modulation(x, gamma, beta, norm="instance", backend="triton")
    assert y.shape == x.shape
    assert dict(count.names) == {
        ("tail", "channel_moments_kernel"): 1, ("tail", "merge_moments_kernel"): 1,
        ("tail", "add"): 1, ("tail", "rsqrt"): 1, ("tail", "modulation_apply_kernel"): 1}
    assert (count.operations.total(), count.launches.total()) == (4, 5)


def test_copies_inside_a_launcher_are_counted() -> None:
    with launches.without_a_gpu(), FakeTensorMode(), torch.no_grad():
        x, gamma, beta = (torch.empty((2, 8, 6, 6), device="cuda") for _ in range(3))
        gamma = gamma.to(memory_format=torch.channels_last)  # the input is not
        with launches.Count() as count:
            modulation(x, gamma, beta, norm="none", backend="triton")
    assert count.names["tail", "clone"] == 1 and count.names["tail", "modulation_apply_kernel"] == 1
