"""Numbers that stand for no row, class or instance: refused where they are looked at; on a GPU,
which is not made to wait, the answer that the op tells, and nothing read or written elsewhere."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_level_tables import norm_convs, one_hot
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from smis_kernels import ConditionalNorm2d
from smis_kernels.modules.conditional_norm import _picked
from smis_kernels.ops.indexed_modulation import op as indexed
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.instance_pool.op import _pooled_by_sorting
from smis_kernels.ops.label_windows.op import GroupWindows, group_windows
from smis_kernels.ops.level_tables.op import level_tables
from smis_kernels.ops.window_table import op as tables
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.runtime import check
from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.testing import MEMORY_FORMATS, max_error, with_memory_format

triton = pytest.mark.triton
needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
DEVICE = "cpu" if triton_interpreted() or not torch.cuda.is_available() else "cuda"
REFUSING = ["reference", pytest.param("cpu", marks=needs_cpu)]
BAD = (-1, 4, 2**31 - 1, -2**31)  # of four rows
ROWS, CHANNELS, SHAPE = 4, 5, (2, 5, 6, 7)


def draw(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float64)


def picked(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(7)
    return torch.randint(ROWS, shape, generator=random, dtype=torch.int32)


@pytest.mark.parametrize("backend", REFUSING)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 5, 6)])
def test_rows_that_a_table_has_not_are_refused(backend: str, bad: int, layout: str,
                                               place: tuple[int, int, int]) -> None:
    x, table, index = with_memory_format(draw(*SHAPE), layout), draw(ROWS, 10), picked(2, 6, 7)
    index[place] = bad
    refused = rf"^index: expected rows 0\.\.3, got {bad};"
    with pytest.raises(ValueError, match=refused):
        indexed_modulation(x, index, table, norm="none", backend=backend)
    with pytest.raises(ValueError, match=refused):
        indexed_modulation_pair(x, index, table, table, norm="none", backend=backend)
    if backend == "cpu":  # whose gradient would write there
        m = torch.ones(1, 5, dtype=torch.float64)
        with pytest.raises(ValueError, match=refused):
            indexed._backward("cpu", x, x, x, m, m, index, table, *(None,) * 5, 0.2, 1.0, False,
                              False)


@pytest.mark.parametrize("backend", REFUSING)
def test_tables_of_a_pair_have_equally_many_rows(backend: str) -> None:
    x, table, index = draw(*SHAPE), draw(ROWS, 10), picked(2, 6, 7)
    with pytest.raises(ValueError, match=r"^table_s: expected shape \(4, 10\) as table, got \(3"):
        indexed_modulation_pair(x, index, table, table[:3], norm="none", backend=backend)


def windows_with(bad: int) -> Tensor:
    windows = picked(6, 9)
    windows[0] = 0
    windows[3, 8] = bad
    return windows


def convs() -> dict[str, Tensor]:
    return {"weight_gamma": draw(3, CHANNELS, 3, 3), "bias_gamma": draw(3),
            "weight_beta": draw(3, CHANNELS, 3, 3, seed=1), "bias_beta": draw(3, seed=1)}


def rows_of(channels: int = CHANNELS) -> Tensor:
    return torch.cat([torch.zeros(1, channels).double(), draw(ROWS - 1, channels)])


@pytest.mark.parametrize("backend", REFUSING)
@pytest.mark.parametrize("bad", BAD)
def test_windows_of_rows_that_there_are_not_are_refused(backend: str, bad: int) -> None:
    rows, windows = rows_of(), windows_with(bad)
    norm = norm_convs(torch.Generator().manual_seed(0), 3, 4, 8)
    fine = windows.where(windows != bad, 0)
    weight = draw(4, CHANNELS, 3, 3)
    own = GroupWindows(torch.zeros(1).int(), fine[None, :, 0], windows[None],
                       torch.tensor([5]).int())
    calls: dict[str, Callable[[], Any]] = {
        "windows": lambda: window_embedding(rows, weight, None, windows, backend=backend),
        "windows of groups": lambda: window_embedding(rows, weight, None, own, backend=backend),
        "windows, one level": lambda: window_table(rows, **convs(), windows=windows,
                                                   one_level=True, backend=backend),
        "windows, two levels": lambda: window_table(rows, **convs(), windows=windows,
                                                    backend=backend),
        "windows, numbered": lambda: group_windows(rows, windows, [(0, 2)], backend=backend),
        "windows3": lambda: level_tables(one_hot(3), windows, fine, [norm], backend=backend),
        "windows5": lambda: level_tables(one_hot(3), fine[:4], windows, [norm], backend=backend),
    }
    if backend == "cpu":
        calls["windows, gradient"] = lambda: tables._window_scatter(
            "cpu", draw(6, CHANNELS), windows, ROWS)
    for what, call in calls.items():
        name = what.partition(",")[0].partition(" ")[0]
        with pytest.raises(ValueError, match=rf"^{name}: expected rows 0\.\.3, got {bad};"):
            call()


@pytest.mark.parametrize("backend", REFUSING)
def test_windows_of_groups_are_looked_at(backend: str) -> None:
    rows, windows = rows_of(4), windows_with(0)
    ids = torch.tensor([[0, 1, 2, 3]]).int()
    own = GroupWindows(torch.zeros(2).int(), ids, windows[None], torch.tensor([3]).int())
    weights = {"weight_gamma": draw(2, 2, 3, 3), "bias_gamma": draw(2),
               "weight_beta": draw(2, 2, 3, 3), "bias_beta": draw(2)}

    def table(windows: Tensor, own: GroupWindows) -> Tensor:
        return window_table(rows, **weights, windows=windows, own=own, groups=2, backend=backend)

    assert table(windows, own).isfinite().all()
    with pytest.raises(ValueError, match=r"^windows: expected rows 0\.\.3, got 4;"):
        table(windows_with(4), own)
    with pytest.raises(ValueError, match=r"^own: expected rows 0\.\.3, got -1;"):
        table(windows, own._replace(ids=ids - 1))


@triton
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("pair", [False, True])
def test_a_gpu_makes_nan_of_a_row_that_the_table_has_not(layout: str, upsample: bool,
                                                         pair: bool) -> None:
    up = 2 if upsample else 1
    x = with_memory_format(draw(*SHAPE), layout).to(DEVICE)
    affine = [draw(ROWS, 10, seed=k).to(DEVICE) for k in range(1 + pair)]
    fine = picked(2, 6 * up, 7 * up).to(DEVICE)
    index, bad = fine.clone(), torch.zeros(fine.shape, dtype=torch.bool, device=DEVICE)
    for k, number in enumerate(BAD):
        index[k % 2, k, 2 * k] = number
        bad[k % 2, k, 2 * k] = True
    shown = ~bad[:, None]
    weights = [draw(2, 5, 6 * up, 7 * up, seed=9 + k).to(DEVICE) for k in range(1 + pair)]

    def run(index: Tensor, backend: str) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.clone().requires_grad_() for t in (x, *affine)]
        call: Any = indexed_modulation_pair if pair else indexed_modulation
        found = call(leaves[0], index, *leaves[1:], norm="none", activation="leaky_relu",
                     upsample=upsample, backend=backend)
        outputs = list(found) if pair else [found]
        kept = [(y * w).where(shown, 0).sum() for y, w in zip(outputs, weights, strict=True)]
        return outputs, list(torch.autograd.grad(torch.stack(kept).sum(), leaves))

    (outputs, (dx, *dtables)), (expected, (dx_expected, *dtables_expected)) = (
        run(index, "triton"), run(fine, "reference"))
    for y, want in zip(outputs, expected, strict=True):
        assert torch.equal(y.isnan(), ~shown.expand_as(y))
        assert max_error(y.where(shown, 0), want.where(shown, 0)) < 1e-12
    for d, want in zip(dtables, dtables_expected, strict=True):
        assert max_error(d, want) < 1e-12
    below = shown.unflatten(2, (6, up)).unflatten(4, (7, up)).all(5).all(3)  # of all it feeds
    assert torch.equal(dx.isnan(), ~below.expand_as(dx))
    assert max_error(dx.where(below, 0), dx_expected.where(below, 0)) < 1e-12


@triton
@pytest.mark.parametrize("bad", BAD)
def test_a_gpu_counts_a_tap_of_no_row_as_outside(bad: int) -> None:
    rows, windows = rows_of().to(DEVICE), windows_with(bad).to(DEVICE)
    outside = windows.where(windows != bad, 0)
    assert not torch.equal(windows, outside)
    weights = {name: t.to(DEVICE) for name, t in convs().items()}
    for one_level in (False, True):
        got, expected = (window_table(rows, **weights, windows=taken, one_level=one_level,
                                      backend=backend)
                         for taken, backend in ((windows, "triton"), (outside, "reference")))
        assert max_error(got, expected) < 1e-12
    weight = draw(4, CHANNELS, 3, 3).to(DEVICE)
    found = []
    for taken, backend in ((windows, "triton"), (outside, "reference")):
        leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
        hidden = window_embedding(*leaves, None, taken, backend=backend)
        dvectors, dweight = torch.autograd.grad(hidden.square().sum(), leaves)
        found.append((hidden, dvectors[1:], dweight))  # row 0 is no vector
    for got, expected in zip(*found, strict=True):
        assert max_error(got, expected) < 1e-12
    norm = norm_convs(torch.Generator().manual_seed(0), 3, 4, 8)
    norm = norm._replace(**{name: t.to(DEVICE) for name, t in
                            zip(norm._fields, norm.tensors, strict=False)})
    vectors = one_hot(3).to(DEVICE)
    for reach in range(2):
        given, plain = ([w[:4] if not reach else outside[:4], outside if not reach else w]
                        for w in (windows, outside))
        with torch.no_grad():
            (got,) = level_tables(vectors, *given, [norm], backend="triton")
        (expected,) = level_tables(vectors, *plain, [norm], backend="reference")
        assert max_error(got, expected) < 1e-12


@triton
def test_a_gpu_refuses_too_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table, index = draw(*SHAPE), draw(ROWS, 10), picked(2, 6, 7)
    index[1, 1, 1] = 9
    given = [t.to(DEVICE) for t in (x, index, table)]
    assert indexed_modulation(*given, norm="none", backend="triton").isnan().any()
    monkeypatch.setattr(check, "VALUES_CHECKED", True)
    with pytest.raises(ValueError, match=r"^index: expected rows 0\.\.3, got 9;"):
        indexed_modulation(*given, norm="none", backend="triton")
    with pytest.raises(ValueError, match=r"^windows: expected rows 0\.\.3, got 9;"):
        window_embedding(rows_of().to(DEVICE), draw(4, CHANNELS, 3, 3).to(DEVICE), None,
                         windows_with(9).to(DEVICE), backend="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # that the module is known already
@pytest.mark.parametrize(("text", "asked"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch, text: str | None,
                                     asked: bool) -> None:
    monkeypatch.delenv("SMIS_CHECK", raising=False)
    if text is not None:
        monkeypatch.setenv("SMIS_CHECK", text)
    assert runpy.run_module("smis_kernels.runtime.check")["VALUES_CHECKED"] is asked


@pytest.mark.parametrize(("kind", "always", "where_asked"), [
    ("reference", True, True), ("cpu", False, False), ("triton", False, True),
    ("cuda", False, True)])
def test_who_is_looked_at(monkeypatch: pytest.MonkeyPatch, kind: str, always: bool,
                          where_asked: bool) -> None:
    for asked, expected in ((False, always), (True, where_asked)):
        monkeypatch.setattr(check, "VALUES_CHECKED", asked)
        assert check.looked_at(torch.zeros(1), kind) is expected


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_classes_of_a_conditional_norm_are_refused(bad: int) -> None:
    norm, x = ConditionalNorm2d(4, 3), torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match=rf"^condition: expected labels 0\.\.2, got {bad};"):
        norm(x, torch.tensor([1, bad]))
    assert norm(x, torch.tensor([1, 2], dtype=torch.uint8)).isfinite().all()
    with pytest.raises(TypeError, match=r"^condition: expected dtype uint8, .*; got bool"):
        norm(x, torch.tensor([True, False]))


def test_a_gpu_makes_nan_of_an_image_of_no_class() -> None:
    norm = ConditionalNorm2d(4, 3)
    layers = norm.mlp_gamma, norm.mlp_beta
    classes = torch.tensor([1, -1, 3, 0, 2**40])
    known = torch.tensor([True, False, False, True, False])
    for found, layer in zip(_picked(classes, layers), layers, strict=True):
        assert torch.equal(found.isnan(), ~known[:, None].expand(5, 4))
        assert torch.equal(found[known], layer.weight.T[[1, 0]] + layer.bias)
        (weight,) = torch.autograd.grad(found[known].sum(), layer.weight)
        assert torch.equal(weight, torch.tensor([1.0, 1.0, 0.0]).expand(4, 3))


def test_ids_out_of_range_are_nobody_elses() -> None:
    x = torch.tensor([[[[100.0, 1.0]]], [[[2.0, 4.0]]]])
    ids = torch.tensor([[[2**32 + 5, 7]], [[5, 5]]])  # the first reads as 5 of the second image
    pooled = _pooled_by_sorting(x, ids)
    assert pooled[0, 0, 0, 0].isnan()
    assert pooled.flatten()[1:].tolist() == [1.0, 3.0, 3.0]


def test_what_has_no_values_is_not_looked_at() -> None:
    norm = ConditionalNorm2d(8, 4).to("meta").eval()
    x, condition = (torch.empty(shape, device="meta") for shape in ((1, 8, 4, 4), (1, 4)))
    assert norm(x, condition).shape == x.shape
    with FakeTensorMode():
        index, table = torch.zeros(1, 4, 4, dtype=torch.int32), torch.zeros(3, 16)
        y = indexed_modulation(torch.zeros(1, 8, 4, 4), index, table, norm="none",
                               backend="reference")
    assert y.shape == x.shape


@triton
def test_branches_of_two_dtypes_lose_nothing() -> None:
    """A table of float32 hidden rows whose convs are of two dtypes is that of wide ones."""
    hidden = torch.cat([torch.zeros(1, 16), draw(3, 16).float()]).to(DEVICE)
    gamma, beta = (draw(32, 16, 3, 3, seed=k).float().to(DEVICE) for k in range(2))
    bias, windows = torch.zeros(32, device=DEVICE), picked(5, 9).to(DEVICE)
    with torch.no_grad():
        found = window_table(hidden, gamma.bfloat16(), bias.bfloat16(), beta, bias, windows,
                             backend="triton")
    expected = window_table(hidden.double(), gamma.bfloat16().double(), bias.double(),
                            beta.double(), bias.double(), windows, backend="reference")
    assert found.dtype == torch.float32 and max_error(found[1:], expected[1:]) < 1e-5
