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


def test_ccfpse_asks_for_half_of_its_reference() -> None:
    layout, _ = launches.count_layout("ccfpse_coco", Maps(None))
    reference, ours = (launches.count_forward("ccfpse_coco", layout, way)
                       for way in ("reference", "auto"))
    assert 2 * ours.launches.total() <= reference.launches.total()
    # of seven blocks one conv, one embedding and one pass each
    assert ours.names["conditions", "indexed_relu_kernel"] == 7
    assert ours.names["conditions", "level_embedding_kernel"] == 8  # and the pyramid's first
    assert ours.names["conditions", "convolution"] == 7 + 15
    assert not any("batch_norm" in name for part, name in ours.names if part == "conditions")


@pytest.mark.parametrize("generator", launches.GENERATORS)
def test_a_layout_is_compiled_without_the_host(generator: str) -> None:
    counts = launches.count_layout(generator, Maps(None))[1]
    assert counts["launches"] <= 25
    assert counts["waits"] == 0
    assert counts["waits_to_use"] <= 2  # for its labels' range and for all its counts


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
