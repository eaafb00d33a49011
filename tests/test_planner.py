"""The planner's rates: the key by which they are found, and what a fixed cost changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from smis_kernels import SPADE, LabelLayout
from smis_kernels.layout import planner
from smis_kernels.layout.table_cache import TableCache
from smis_kernels.runtime import tuned


class Level(NamedTuple):
    counts: tuple[int, int]
    repeats: bool = True


class Input(NamedTuple):
    """What the rates are asked for: there may be no GPU to make a tensor on."""

    device: torch.device
    dtype: torch.dtype


GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def best(costs: dict[str, float]) -> str:
    return min(costs, key=lambda path: costs[path])


def rates(dtype: torch.dtype) -> planner.Rates:
    return planner.rates_of(Input(GPU, dtype))  # type: ignore[arg-type]


def test_float32_products_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_trials", {"rates": {}})
    torch.backends.cudnn.allow_tf32 = True
    assert planner.products_key(torch.float32) == "float32"
    fast, half = rates(torch.float32), rates(torch.bfloat16)
    torch.backends.cudnn.allow_tf32 = False
    assert planner.products_key(torch.float32) == "float32 without tf32"
    assert planner.products_key(torch.bfloat16) == "bfloat16"
    slow = rates(torch.float32)
    assert rates(torch.bfloat16) == half
    assert slow.dense == fast.dense / 8 and slow[1:] == fast[1:]
    # Nearly as many windows as pixels: TF32 convs win, and convs without tensor cores lose.
    norm, level = SPADE(128, 183), Level((14000, 14000))
    assert best(planner.costs(norm, level, 16384, fast)) == "dense"  # type: ignore[arg-type]
    assert best(planner.costs(norm, level, 16384, slow)) != "dense"  # type: ignore[arg-type]


@pytest.mark.parametrize("allowed", [False, True])
def test_the_key_is_the_same_under_compile(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed

    def mark(x: torch.Tensor) -> torch.Tensor:
        return x + len(planner.products_key(x.dtype))

    x = torch.zeros(1)
    assert torch.equal(torch.compile(mark, backend="eager", fullgraph=True)(x), mark(x))


def test_measured_rates_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cudnn.allow_tf32 = False
    old = {"dense": 1.0, "two_level": 2.0, "one_level": 3.0, "sums": 4.0}
    table: dict[str, Any] = {"float32": {**old, "fixed_dense": 5.0},
                             "float32 without tf32": {**old, "fixed_two_level": 6.0}}
    with tuned.trial("rates", table):
        assert rates(torch.float32) == planner.Rates(1, 2, 3, 4, fixed_two_level=6.0)
        torch.backends.cudnn.allow_tf32 = True
        assert rates(torch.float32) == planner.Rates(1, 2, 3, 4, fixed_dense=5.0)
        assert planner.rates_of(torch.zeros(1)) == planner.CPU_RATES


def test_a_fixed_cost_decides_small_maps_only() -> None:
    slopes = planner.Rates(dense=1000.0, two_level=500.0, one_level=500.0, sums=100.0)
    fixed = slopes._replace(fixed_dense=10e3, fixed_two_level=120e3, fixed_one_level=90e3)
    norm = SPADE(256, 183)
    small, large = (Level((16, 20)), 64), (Level((600, 1500)), 65536)
    for rates, expected in ((slopes, "two_level"), (fixed, "dense")):
        assert best(planner.costs(norm, *small, rates)) == expected  # type: ignore[arg-type]
        assert best(planner.costs(norm, *large, rates)) == "two_level"  # type: ignore[arg-type]
    for level, pixels in (small, large):
        plain, more = (planner.costs(norm, level, pixels, r)  # type: ignore[arg-type]
                       for r in (slopes, fixed))
        assert {path: more[path] - plain[path] for path in plain} == pytest.approx(
            {"dense": 10e3, "one_level": 90e3, "two_level": 120e3})
    single = SPADE(256, 183, hidden=0)
    plain, more = (planner.costs(single, small[0], 64, r)  # type: ignore[arg-type]
                   for r in (slopes, fixed))
    assert {path: more[path] - plain[path] for path in plain} == pytest.approx(
        {"dense": 10e3, "one_level": 90e3})


def test_costs_are_those_worked_out_by_hand() -> None:
    rates = planner.Rates(dense=2.0, two_level=3.0, one_level=5.0, sums=7.0)
    v, u, pixels, symbols, c, k, hidden = 11, 13, 1000, 4, 6, 3, 8
    level = Level((v, u))
    last, first = 2 * c * hidden * 9, hidden * k * 9
    embedding = symbols * first / 5 + v * 9 * hidden / 7
    found = planner.costs(SPADE(c, k, hidden), level, pixels, rates,  # type: ignore[arg-type]
                          symbols=symbols)
    assert found == pytest.approx({
        "dense": pixels * (last + first) / 2, "one_level": embedding + u * last / 5,
        "two_level": embedding + v * last / 3 + u * 18 * c / 7})
    found = planner.costs(SPADE(c, k, 0), level, pixels, rates,  # type: ignore[arg-type]
                          symbols=symbols)
    last = 2 * c * k * 9
    assert found == pytest.approx({"dense": pixels * last / 2,
                                   "one_level": symbols * last / 5 + v * 18 * c / 7})


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("of", ["planes", "layout"])
def test_a_batch_of_no_images_passes(of: str, kept: bool) -> None:
    norm, x = SPADE(16, 4, 8).eval(), torch.randn(0, 16, 12, 10)
    segmap = torch.zeros(0, 4, 24, 20)
    if of == "layout":
        segmap = LabelLayout.from_labels(torch.zeros(0, 24, 20).long(), 4)
        segmap.tables = TableCache() if kept else None
    for upsample in (False, True):
        assert norm(x, segmap, upsample=upsample).shape == (
            0, 16, 12 << upsample, 10 << upsample)
    with pytest.raises(ValueError, match="input: expected at least one pixel"):
        norm(x[:, :, :0], segmap)


def test_the_cpu_s_choice_has_no_fixed_cost() -> None:
    assert tuple(planner.CPU_RATES) == (130.0, 170.0, 175.0, 16.0, 0.0, 0.0, 0.0)


def test_settings_of_a_file_replace_the_launchers_own(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu, own = torch.device("cpu"), {"warps": 4, "stages": 2}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"settings": {"norm": {"wide": {"warps": 8}}}, "rates": {"a": 1}}))
    try:
        for name, wide, rates_of_file in ((str(path), {"warps": 8, "stages": 2}, {"a": 1}),
                                          ("none", own, None)):
            monkeypatch.setenv(tuned.ENVIRONMENT, name)
            tuned.forget()
            assert tuned.setting("norm", "wide", own, cpu) == wide
            assert tuned.setting("norm", "narrow", own, cpu) == own
            assert tuned.setting("conv", "wide", own, cpu) == own
            assert tuned.measured("rates", cpu) == rates_of_file
            with tuned.trial("norm", {"stages": 1}):
                assert tuned.setting("norm", "wide", own, cpu) == {"warps": 4, "stages": 1}
    finally:
        tuned.forget()
