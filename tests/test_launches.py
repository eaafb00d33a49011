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
from smis_kernels import CGNorm, LabelLayout, modulation, use_path
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


def test_sorts_and_sums_that_sort_are_counted() -> None:
    with launches.without_a_gpu(), FakeTensorMode(), torch.no_grad():
        x, index = (torch.empty(40, device="cuda", dtype=d) for d in (torch.float32, torch.int64))
        with launches.Count() as count:
            x.sort()
            x.argsort()
            torch.ops.aten.index_put(x, [index], x, False)
            assert count.sorts == 2
            torch.ops.aten.index_put(x, [index], x, True)
    assert count.sorts == 3


@pytest.mark.parametrize("generator", launches.TRAINED)
def test_a_step_sorts_once_for_each_level(generator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, _ = launches.count_layout(generator, Maps(None))
    count, kept = launches.count_training(generator, layout, "auto")
    assert 1 <= count.sorts <= len(layout._levels)
    assert count.waits == 0
    stated = sum(4 * level.symbols.numel() + 72 * level.counts[0] + 44 * level.counts[1] + 2000
                 for level in layout._levels.values() if level.repeats)
    assert 0 < kept < 1.05 * stated
    monkeypatch.setattr(LabelLayout, "_place", lambda *_: None)
    alone, none = launches.count_training(generator, layout, "auto")
    assert alone.sorts > 3 * count.sorts and none == 0


def test_a_step_under_autocast_is_of_its_dtype() -> None:
    with launches.without_a_gpu(), FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        x, weight = (torch.empty((4, 4, 3, 3), device="cuda") for _ in range(2))
        assert torch.nn.functional.conv2d(x, weight).dtype == torch.bfloat16


def test_gradients_node_by_node_are_those_of_the_engine() -> None:
    norm = CGNorm(6, 4, 8, groups=2)
    layer = torch.nn.utils.spectral_norm(torch.nn.Conv2d(6, 3, 3))
    labels = (torch.arange(64).view(1, 8, 8) // 9) % 4
    x = torch.randn(1, 6, 4, 4)
    for path in ("dense", "two_level"):
        with use_path(path):
            y = layer(norm(x, LabelLayout.from_labels(labels, 4), upsample=True)).tanh() * 2
        parameters = [*norm.parameters(), *layer.parameters()]
        expected = torch.autograd.grad(y, parameters, torch.ones_like(y), retain_graph=True)
        with torch.no_grad():
            launches._differentiate(y, torch.ones_like(y))
        for parameter, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
