"""Tables of CG-Norm groups that see few of a map's classes: numbered, multiplied, kept exactly."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smis_kernels import CGNorm, LabelLayout, explain, modulate_pair, use_backend, use_path
from smis_kernels.layout import planner
from smis_kernels.layout.static_layout import StaticLayout
from smis_kernels.layout.table_cache import TableCache
from smis_kernels.ops.label_windows.op import GroupWindows, group_windows, number_windows
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
GROUPS = (1, 2, 7)
COUNTS = (0, 1, 63, 64, 65)
# (channels, label channels, hidden, groups, shared groups): as many of both, more shared ones, and
# shared ones that lie across the borders of the others.
NORMS = [(12, 8, 16, 2, 2), (15, 10, 20, 5, 10), (12, 15, 60, 4, 15), (14, 14, 14, 7, 7)]


def blocky(n: int, h: int, w: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (n, 1, -(-h // 5), -(-w // 7)), generator=generator)
    return F.interpolate(coarse.double(), (h, w), mode="nearest")[:, 0].long()


def drawn(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64)


def drawn_windows(count: int, rows: int, seed: int = 0) -> Tensor:
    """(count + 1, 9), distinct ones as far as that can be."""
    generator = torch.Generator().manual_seed(seed + count)
    windows = torch.randint(0, rows, (count + 1, 9), generator=generator, dtype=torch.int32)
    windows[0] = 0
    return windows


def symbols(groups: int, each: int, count: int = 9, seed: int = 0) -> Tensor:
    """(count + 1, groups * each) of 0, 1 and -0; row 0 is zero, and another may be."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(0, 2, (count + 1, groups * each), generator=generator).double()
    vectors[0] = 0
    vectors[-1] = -0.0
    return vectors


def ranges_of(groups: int, each: int) -> list[tuple[int, int]]:
    return [(g * each, (g + 1) * each) for g in range(groups)]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[GroupWindows]:
    """Groups have their own windows wherever any of those are equal; the numberings found."""
    for name in ("NUMBERING", "NUMBERED", "RENAMED"):
        monkeypatch.setattr(planner, name, 0.0)
    monkeypatch.setattr(planner, "_products_of_rows", lambda norm, rates: 1e9)
    found: list[GroupWindows] = []
    own_windows = LabelLayout.group_windows

    def noting(self: LabelLayout, *arguments: Any) -> GroupWindows:
        made = own_windows(self, *arguments)
        found.append(made)
        return made

    monkeypatch.setattr(LabelLayout, "group_windows", noting)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("count", COUNTS)
def test_windows_have_one_number_where_a_group_sees_the_same(count: int, groups: int,
                                                             backend: str) -> None:
    vectors, windows = symbols(groups, 2), drawn_windows(count, 10)
    windows[-(count // 3) - 1:] = windows[: count // 3 + 1]  # some twice
    windows[0] = 0
    ranges = ranges_of(groups, 2)
    own = group_windows(vectors, windows, ranges, backend=backend)
    assert own.windows.shape[1] == 1 + int(own.counts.max())
    for g, (begin, end) in enumerate(ranges):
        kind = int(own.kinds[g])
        ids, seen = own.ids[kind], vectors[:, begin:end][windows.long()].flatten(1)
        assert ids[0] == 0 and (ids[1:] > 0).all()
        alike = (seen[1:, None] == seen[None, 1:]).all(2)
        assert torch.equal(ids[1:, None] == ids[None, 1:], alike)
        firsts = [i for i, number in enumerate(ids.tolist()) if number not in ids[:i].tolist()]
        assert ids[firsts].tolist() == list(range(len(firsts)))  # in order of appearance
        assert own.counts[kind] == len(firsts) - 1
        shown = vectors[:, begin:end][own.windows[kind].long()].flatten(1)
        assert torch.equal(shown[: len(firsts)], seen[firsts])
        assert not own.windows[kind][len(firsts):].any()


@needs_cpu
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.integers(0, 90),
       st.integers(0, 999), st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_any_numbering_equals_the_definition(groups: int, each: int, count: int, windows: int,
                                             seed: int, dtype: torch.dtype) -> None:
    vectors = symbols(groups, each, count, seed).to(dtype)
    chosen = drawn_windows(windows, count + 1, seed)
    pair = [group_windows(vectors, chosen, ranges_of(groups, each), backend=b)
            for b in ("cpu", "reference")]
    for name, a, b in zip(GroupWindows._fields, *pair, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_tell_the_same_apart_share_a_numbering(backend: str) -> None:
    vectors = torch.cat([torch.zeros(1, 12), torch.eye(12)[:3]])  # of the first groups alone
    own = group_windows(vectors, drawn_windows(40, 4), ranges_of(6, 2), backend=backend)
    assert own.kinds.tolist() == [0, 1, 2, 2, 2, 2]
    assert int(own.counts[2]) == 1  # nothing that these see


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_outside_is_no_window_and_nan_equals_itself_alone(backend: str) -> None:
    vectors = torch.zeros(4, 2)
    vectors[2:] = torch.nan
    windows = torch.tensor([[0] * 9, [0] * 9, [1] * 9, [2] * 9, [3] * 9], dtype=torch.int32)
    own = group_windows(vectors, windows, [(0, 2)], backend=backend)
    assert own.ids.tolist() == [[0, 1, 1, 2, 3]]


@pytest.mark.parametrize(("change", "words"), [
    ({"ranges": [(0, 5)]}, r"ranges: expected channels 0\.\.4 .*got \(0, 5\)"),
    ({"ranges": [(3, 2)]}, r"ranges: .*got \(3, 2\)"),
    ({"ranges": []}, "ranges: expected at least one group"),
    ({"windows": torch.zeros(3, 8, dtype=torch.int32)}, "windows: expected"),
    ({"windows": torch.zeros(3, 9)}, "windows: expected"),
    ({"vectors": torch.zeros(4)}, "vectors: expected"),
])
def test_bad_arguments_name_themselves(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"vectors": torch.zeros(3, 4), "windows": drawn_windows(2, 3),
                                 "ranges": [(0, 4)]}
    with pytest.raises((ValueError, TypeError), match=words):
        group_windows(**{**arguments, **change})


def test_tables_of_other_groups_are_refused() -> None:
    own = group_windows(symbols(2, 2), drawn_windows(5, 10), ranges_of(2, 2))
    weight, bias = drawn(9, 2, 3, 3), drawn(9)
    with pytest.raises(ValueError, match="windows: expected those of a divisor of 9 groups, got 2"):
        window_embedding(symbols(1, 2), weight, bias, own)
    hidden, weight = drawn(own.windows.shape[1], 6), drawn(9, 2, 3, 3)
    with pytest.raises(ValueError, match="own: expected the windows of 3 groups, got 2"):
        window_table(hidden, weight, bias, weight, bias, drawn_windows(5, 6), own=own, groups=3)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("count", COUNTS)
def test_tables_are_those_of_all_windows(count: int, groups: int, dtype: torch.dtype,
                                         one_level: bool) -> None:
    each, deep, wide = 2, 3, 11
    vectors, windows3 = symbols(groups, each).to(dtype), drawn_windows(count, 10)
    windows5 = drawn_windows(count, count + 1, seed=1)
    own = group_windows(vectors, windows3, ranges_of(groups, each))
    first = drawn(groups * deep, each, 3, 3).to(dtype), drawn(groups * deep).to(dtype)
    last = [t.to(dtype) for s in (1, 2) for t in (drawn(groups * wide, deep, 3, 3, seed=s),
                                                  drawn(groups * wide, seed=s))]

    def table(own: GroupWindows | None) -> Tensor:
        hidden = window_embedding(vectors, *first, windows3 if own is None else own,
                                  groups=groups)
        gamma, bias_gamma, beta, bias_beta = last
        return window_table(hidden, gamma, bias_gamma, beta, bias_beta, windows5, own=own,
                            groups=groups, one_level=one_level)

    found, expected = table(own), table(None)
    assert found.shape == expected.shape == (count + 1, 2 * groups * wide)
    assert max_error(found, expected) < (1e-12 if dtype == torch.float64 else 1e-4)


@needs_cpu
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("edges", [False, True])
def test_a_norm_with_own_tables_equals_its_definition(norm: tuple[int, ...], edges: bool,
                                                      eager: list[GroupWindows]) -> None:
    channels, planes, hidden, groups, shared = norm
    torch.manual_seed(0)
    made = CGNorm(channels, planes, hidden, groups=groups, shared_groups=shared).double()
    labels = blocky(2, 20, 28, planes)
    layout = LabelLayout.from_labels(labels, planes)
    if edges:  # two planes a class, of which one is the same to all groups
        edge = (torch.arange(20 * 28).view(1, 20, 28) % 5 == 0).expand(2, -1, -1)
        layout = LabelLayout.from_labels(labels % (planes // 2), planes // 2, edges=edge)
        layout = layout.map_vectors(lambda v: F.pad(torch.stack(
            [v[:, :-1], v[:, -1:].expand(-1, v.shape[1] - 1)], 2).flatten(1),
            (0, planes % 2)).double())
    x = drawn(2, channels, 20, 28)
    results = []
    for backend, path in (("cpu", "two_level"), ("reference", "auto")):
        leaves = [x.clone().requires_grad_(), *made.parameters()]
        with use_backend(backend), use_path(path):
            y = made(leaves[0], layout, activation="leaky_relu")
        results.append([y, *torch.autograd.grad((y * drawn(*y.shape, seed=3)).sum(), leaves)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert max_error(a, b) < 1e-10, i
    level = layout.level((20, 28))
    assert eager and all(int(own.counts.min()) < level.counts[0] for own in eager)


@needs_cpu
def test_rows_beyond_the_count_of_a_group_have_no_gradient() -> None:
    vectors = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()
    random = torch.Generator().manual_seed(0)
    symbols = torch.randint(1, 4, (1, 8, 8), generator=random, dtype=torch.int32)
    _, windows = number_windows(symbols, 64)
    own = group_windows(vectors, windows, [(0, 2), (2, 4)])
    assert own.counts[0] > own.counts[1]
    weight, bias = torch.randn(6, 2, 3, 3).double(), torch.randn(6).double()
    given = tuple(t.requires_grad_() for t in (weight, bias))
    found = []
    for backend in ("cpu", "reference"):
        rows = window_embedding(vectors, *given, own, groups=2, relu=False, backend=backend)
        found.append(torch.autograd.grad(rows.sum(), given))
    torch.testing.assert_close(*found)


@needs_cpu
def test_second_derivatives_through_own_tables(eager: list[GroupWindows]) -> None:
    torch.manual_seed(0)
    made = CGNorm(6, 6, 6, groups=3).double()
    layout = LabelLayout.from_labels(blocky(1, 10, 7, 6), 6)
    x = drawn(1, 6, 10, 7)
    found = []
    for backend, path in (("auto", "two_level"), ("reference", "auto")):
        leaves = [x.clone().requires_grad_(), *made.parameters()]
        with use_backend(backend), use_path(path):
            y = made(leaves[0], layout)
            grads = torch.autograd.grad((y**2).sum(), leaves, create_graph=True)
            squares = torch.cat([g.flatten() for g in grads]).pow(2).sum()
            twice = torch.autograd.grad(squares, leaves)
        found.append(twice)
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert max_error(a, b) < 1e-9 * max(1, float(b.abs().max())), i
    assert eager


@needs_cpu
@pytest.mark.parametrize("path", ["auto", "two_level", "one_level"])
def test_edits_of_kept_tables(path: str, eager: list[GroupWindows]) -> None:
    torch.manual_seed(0)
    norm_0, norm_s = (CGNorm(12, 8, 16, groups=4).double().eval() for _ in "0s")
    labels, x = blocky(1, 24, 30, 8), drawn(1, 12, 24, 30)
    tables = None
    for seed in range(4):
        labels = labels.clone()
        labels[:, 5 * seed:5 * seed + 4, 3:9] = seed  # one class grows
        layout = LabelLayout.from_labels(labels, 8)
        layout.tables = tables = TableCache(tables)
        with torch.no_grad(), use_path(path):
            found = modulate_pair(norm_0, norm_s, x, layout)
            again = modulate_pair(norm_0, norm_s, x, layout)
        with torch.no_grad(), use_backend("reference"):
            expected = modulate_pair(norm_0, norm_s, x, layout)
        for a, b, c in zip(found, again, expected, strict=True):
            assert torch.equal(a, b)
            assert max_error(a, c) < 1e-10
    assert bool(eager) == (path != "one_level")


@needs_cpu
def test_a_numbering_belongs_to_the_vectors_of_its_layout() -> None:
    layout = LabelLayout.from_labels(blocky(1, 20, 20, 6), 6)
    windows3, ranges = layout.level((20, 20)).windows3, ((0, 3), (3, 6))
    own = layout.group_windows(windows3, ranges)
    assert layout.group_windows(windows3, ranges) is own
    other = layout.map_vectors(lambda v: v.roll(1, 1))  # shares the windows
    assert other.level((20, 20)).windows3 is windows3
    shifted = other.group_windows(windows3, ranges)
    assert not torch.equal(shifted.ids, own.ids)
    assert not torch.equal(layout.group_windows(windows3, ((0, 2), (2, 6))).ids, own.ids)
    copy = pickle.loads(pickle.dumps(layout))
    again = copy.group_windows(copy.level((20, 20)).windows3, ranges)
    assert all(map(torch.equal, again, own))


@needs_cpu
def test_a_numbering_ends_where_another_map_is_loaded(eager: list[GroupWindows]) -> None:
    """Of one set of vectors, into the memory of the windows."""
    norm, x = CGNorm(8, 8, 8, groups=4).double().eval(), drawn(1, 8, 16, 16)
    labels = blocky(1, 16, 16, 8)
    first, second = (LabelLayout.from_labels(m, 8) for m in (labels, labels.flip(1)))
    for layout in (first, second):
        layout.level((16, 16))
    assert torch.equal(first.vectors, second.vectors)
    static = StaticLayout(first)
    assert static.fits(second)
    with torch.no_grad(), use_path("two_level"):
        norm(x, static.layout)
        static.load(second)
        torch.testing.assert_close(norm(x, static.layout), norm(x, second))
    assert len(eager) == 3


@needs_cpu
def test_numbered_in_inference_and_then_trained(eager: list[GroupWindows]) -> None:
    made, layout = CGNorm(8, 8, 8, groups=4), LabelLayout.from_labels(blocky(1, 16, 16, 8), 8)
    layout.level((16, 16))
    x = torch.randn(1, 8, 16, 16)
    with torch.inference_mode(), use_path("two_level"):
        made(x, layout)
    with use_path("two_level"):
        made(x.requires_grad_(), layout).sum().backward()
    assert x.grad is not None and eager


@needs_cpu
def test_gradients_of_vectors_reach_their_own_symbols(eager: list[GroupWindows]) -> None:
    """A group finds symbols equal that differ in their gradients."""
    torch.manual_seed(0)
    made = CGNorm(12, 8, 16, groups=4).double()
    layout, x = LabelLayout.from_labels(blocky(1, 20, 24, 8), 8), drawn(1, 12, 20, 24)
    found = []
    for backend, path in (("cpu", "two_level"), ("reference", "auto")):
        delta = torch.zeros(layout.vectors.shape, dtype=torch.float64, requires_grad=True)
        given = layout.map_vectors(lambda v, d=delta: v.double() + d)  # type: ignore[misc]
        with use_backend(backend), use_path(path):
            y = made(x, given)
        found.append(torch.autograd.grad((y * drawn(*y.shape, seed=3)).sum(), delta)[0][1:])
    assert max_error(*found) < 1e-10


@needs_cpu
@pytest.mark.parametrize("how", ["in place", "by data"])
def test_a_numbering_ends_with_the_values_it_was_made_of(how: str,
                                                         eager: list[GroupWindows]) -> None:
    torch.manual_seed(0)
    made = CGNorm(12, 8, 16, groups=4).double()
    layout, x = LabelLayout.from_labels(blocky(1, 20, 24, 8), 8), drawn(1, 12, 20, 24)
    layout = layout.map_vectors(torch.Tensor.double)
    with torch.no_grad(), use_path("two_level"):
        made(x, layout)
        (layout.vectors if how == "in place" else layout.vectors.data)[2, :4] += 0.5
        y = made(x, layout)
    with torch.no_grad(), use_backend("reference"):
        assert max_error(y, made(x, layout)) < 1e-10
    assert len(eager) >= 2


class Counted:
    """What the planner reads of a norm, with as many products as GroupDNet's have."""

    channels = label_channels = 64
    hidden, backend, reach, no_tables = 64, "auto", 2, ""
    ranges: tuple[tuple[int, int], ...] = tuple((8 * g, 8 * g + 8) for g in range(8))

    def __init__(self, products: int) -> None:
        self.products = products, 9 * 64 * 8


@needs_cpu
def test_groups_have_tables_of_their_own_where_counted_cheaper() -> None:
    labels = blocky(1, 64, 64, 6) * 10  # six classes in six groups
    layout = LabelLayout.from_labels(labels, 64)
    level = layout.level((64, 64))
    v, u = level.counts

    def own(norm: Counted, of: LabelLayout = layout) -> GroupWindows | None:
        return planner.own_windows(norm, of, of.level((64, 64)).windows3,  # type: ignore[arg-type]
                                   of.level((64, 64)).counts[1])

    many, few = Counted(2 * 64 * 9 * 1024), Counted(64)
    found = own(many)
    assert found is not None
    assert own(few) is None  # so few products that numbering costs more
    costs = [planner.costs(many, level, 4096, symbols=6, own=own)  # type: ignore[arg-type]
             for own in (None, found)]
    rows = float(found.counts[found.kinds.long()].double().mean())
    assert rows < v / 2
    saved = costs[0]["two_level"] - costs[1]["two_level"]
    per_row = 9 * 64 / planner.CPU_RATES.sums + many.products[0] / planner.CPU_RATES.two_level
    paid = planner.NUMBERING + len(found.counts) * (v * planner.NUMBERED + u * planner.RENAMED)
    assert saved == pytest.approx((v - rows) * per_row - paid / planner.CPU_RATES.two_level)
    assert {k: costs[0][k] for k in ("dense", "one_level")} == {
        k: costs[1][k] for k in ("dense", "one_level")}
    # Every group sees every class: no window is equal to another.
    seen = layout.map_vectors(lambda x: x @ torch.randn(64, 64))
    assert own(many, seen) is None
    many.ranges = ()
    assert own(many) is None


@needs_cpu
def test_the_choice_names_the_rows_of_groups() -> None:
    norm = CGNorm(256, 32, 256, groups=4).eval()
    layout = LabelLayout.from_labels(blocky(1, 64, 64, 4) * 8, 32)
    with torch.no_grad():
        report = explain(norm, torch.randn(1, 256, 64, 64), layout)
    (choice,) = [c for c in report.choices if c.op == "CGNorm"]
    assert choice.path == "two_level"
    assert 0 < choice.numbers["rows_of_a_group"] < choice.numbers["V"]
