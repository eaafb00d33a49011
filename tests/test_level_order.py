"""Pixels and windows of a resolution are sorted once for all its norms, and never stale."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smis_kernels import (
    SPADE,
    CGNorm,
    ConditionalNorm2d,
    LabelLayout,
    MultiSPADE,
    indexed_modulation,
    modulate_pair,
    use_backend,
    use_path,
    window_embedding,
    window_table,
)
from smis_kernels.layout import label_layout
from smis_kernels.ops import segments
from smis_kernels.ops.segments import (
    PIECE,
    Pieces,
    Segments,
    in_pieces,
    sorted_rows,
    window_index,
)
from smis_kernels.runtime.backend import triton_interpreted
from smis_kernels.testing import max_error

SIZE, CLASSES, CHANNELS = (13, 11), 5, 6
interpreted = pytest.mark.skipif(not triton_interpreted(), reason="of the interpreter")


class Sorts(TorchDispatchMode):
    """How often torch sorts."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().partition("::")[2].startswith(("sort", "argsort", "_unique"))
        return func(*args, **(kwargs or {}))


def blocks(seed: int = 0, images: int = 2, size: tuple[int, int] = SIZE,
           cells: tuple[int, int] = (4, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(CLASSES, (images, 1, *cells), generator=generator).double()
    return F.interpolate(coarse, size, mode="nearest")[:, 0].long()


def compiled(seed: int = 0, images: int = 2) -> LabelLayout:
    layout = LabelLayout.from_labels(blocks(seed, images), CLASSES)
    layout.level(SIZE)
    return layout


def given_by(order: Any) -> Any:
    assert order is not None
    return order()


def of(layout: LabelLayout) -> list[Tensor]:
    """All that a layout tells of the order of a level."""
    level = layout.level(SIZE)
    orders = (layout.pixel_order(level.index3), layout.pixel_order(level.index5),
              *(layout.window_order(level.windows3, reach) for reach in (1, 2)),
              layout.window_order(level.windows5, 2))
    return [t for order in orders for t in given_by(order)]


def members(rows: Tensor, count: int) -> list[list[int]]:
    """The elements of each row."""
    return [(rows == row).nonzero().flatten().tolist() for row in range(count)]


def check(layout: LabelLayout) -> None:
    """The order of each index map and of the windows, against looking for every row."""
    level = layout.level(SIZE)
    for index, windows in ((level.index3, level.windows3), (level.index5, level.windows5)):
        pixels: Pieces = given_by(layout.pixel_order(index))
        starts = pixels.pieces[pixels.firsts.long()].tolist()
        found = [pixels.elements[a:b].tolist() for a, b in pairwise(starts)]
        assert found == members(index.flatten(), len(windows))
    for windows, reach, rows in ((level.windows3, 1, len(layout.vectors)),
                                 (level.windows3, 2, len(layout.vectors)),
                                 (level.windows5, 2, len(level.windows3))):
        order: Segments = given_by(layout.window_order(windows, reach))
        starts = order.bounds.tolist()
        found = [order.elements[a:b].tolist() for a, b in pairwise(starts)]
        for tap in range(9):
            taken = members(windows[1:, tap], rows)
            assert found[tap::9] == [[window + 1 for window in row] for row in taken]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=4),
       st.integers(0, 9))
def test_one_sort_orders_several_indices(sizes: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = [(torch.randint(rows, (count,), generator=generator, dtype=torch.int32), rows)
               for count, rows in sizes]
    with Sorts() as sorts:
        found = sorted_rows(indices)
    assert sorts.count == 1
    for (index, rows), (elements, bounds) in zip(indices, found, strict=True):
        starts = bounds.tolist()
        assert (starts[0], starts[-1], len(starts)) == (0, index.numel(), rows + 1)
        got = [elements[a:b].tolist() for a, b in pairwise(starts)]
        assert got == members(index, rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(PIECE - 1, PIECE + 1),
                          st.integers(0, 5 * PIECE)), min_size=1, max_size=9))
def test_pieces_are_short_and_of_one_row(counts: list[int]) -> None:
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    total = int(bounds[-1])
    with Sorts() as sorts:
        elements, pieces, firsts = in_pieces(Segments(torch.arange(total).int(), bounds))
    assert sorts.count == 0
    assert elements.tolist() == [*range(total)]
    starts = pieces.tolist()
    assert starts == sorted(starts) and (starts[0], starts[-1]) == (0, total)
    assert max((b - a for a, b in pairwise(starts)), default=0) <= PIECE
    assert [starts[first] for first in firsts.tolist()] == bounds.tolist()
    assert firsts[-1] == len(starts) - 1


@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_its_maps(seed: int) -> None:
    check(compiled(seed))


def test_all_of_a_level_is_sorted_once_for_each_reach() -> None:
    layout = compiled()
    with Sorts() as sorts:
        first = of(layout)
        again = of(layout)
    assert sorts.count == 2
    assert all(a is b for a, b in zip(first, again, strict=True))


def written(layout: LabelLayout, other: LabelLayout) -> None:
    """As a static layout is loaded with an edited map of as many windows."""
    level, new = layout.level(SIZE), other.level(SIZE)
    for name in ("index3", "index5", "windows3", "windows5"):
        getattr(level, name).copy_(getattr(new, name))


def replaced(layout: LabelLayout, other: LabelLayout) -> None:
    vars(layout.level(SIZE)).update(vars(other.level(SIZE)))


def exchanged(layout: LabelLayout, other: LabelLayout) -> None:
    layout._levels[SIZE] = other.level(SIZE)


@pytest.mark.parametrize("change", [written, replaced, exchanged])
def test_a_changed_level_is_sorted_anew(change: Any) -> None:
    layout, other = compiled(), compiled()
    level = other.level(SIZE)
    level.index3, level.index5 = (t.flip(1, 2).contiguous() for t in (level.index3, level.index5))
    for windows in (level.windows3, level.windows5):
        windows[1:] = windows[1:].flip(0).clone()
    before = [t.clone() for t in of(layout)]
    change(layout, other)
    check(layout)
    assert not all(torch.equal(a, b) for a, b in zip(of(layout), before, strict=True))


@pytest.mark.parametrize("name", ["index3", "index5", "windows3", "windows5"])
def test_a_single_write_is_seen(name: str) -> None:
    layout = compiled()
    of(layout)
    map = getattr(layout.level(SIZE), name)
    map.view(-1)[-1] = 1 if map.view(-1)[-1] != 1 else 0
    check(layout)


def test_more_symbols_are_seen() -> None:
    layout = compiled()
    of(layout)
    layout._vectors = torch.cat([layout.vectors, layout.vectors[-1:]])
    check(layout)


def test_maps_of_others_have_no_order_here() -> None:
    layout, other = compiled(), compiled(1)
    layout.level((7, 5))
    level = layout.level(SIZE)
    for index in (other.level(SIZE).index5, level.index5.clone(), level.symbols):
        assert layout.pixel_order(index) is None
    for windows in (other.level(SIZE).windows5, level.windows5[:-1]):
        assert layout.window_order(windows, 2) is None
    check(layout)
    assert given_by(layout.pixel_order(layout.level((7, 5)).index5)).sizes[0] == 2 * 7 * 5


def test_it_is_not_asked_for_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = compiled()
    level = layout.level(SIZE)

    def absent() -> bool:
        return layout.pixel_order(level.index5) is layout.window_order(level.windows3, 2) is None

    with torch.no_grad():
        assert absent()
    with torch.inference_mode():
        assert absent()
        made = compiled(1)
    assert made.pixel_order(made.level(SIZE).index5) is not None  # it holds no inference tensors
    with monkeypatch.context() as capture:
        capture.setattr(label_layout, "capturing", lambda map: True)
        assert absent()
    assert not absent() and not layout._orders


def test_copies_have_an_order_of_their_own() -> None:
    layout = compiled()
    first = of(layout)
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), layout.to("cpu")):
        assert not other._orders
        check(other)
        assert not {t.data_ptr() for t in of(other)} & {t.data_ptr() for t in first}
    assert all(a is b for a, b in zip(of(layout), first, strict=True))


def test_an_old_pickle_has_none_yet() -> None:
    layout = compiled()
    state = layout.__getstate__()
    del state["_orders"]
    old = LabelLayout.__new__(LabelLayout)
    old.__setstate__(state)
    check(old)


def test_mapped_layouts_share_it() -> None:
    layout = compiled()
    mapped = layout.map_vectors(lambda vectors: vectors * 2)
    with Sorts() as sorts:
        assert all(a is b for a, b in zip(of(layout), of(mapped), strict=True))
    assert sorts.count == 2


def test_it_is_released_with_the_layout() -> None:
    layout = compiled()
    held = [weakref.ref(t) for t in of(layout)]
    assert all(ref() is not None for ref in held)
    del layout
    assert not any(ref() is not None for ref in held)


def test_it_takes_the_memory_that_is_stated() -> None:
    labels = blocks(0, 1, (96, 80))
    layout = LabelLayout.from_labels(labels, CLASSES)
    level = layout.level((96, 80))
    given_by(layout.pixel_order(level.index5))
    (found,) = layout._orders.values()
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in found.order.tensors}.values())
    v, u = level.counts
    pieces = labels.numel() / PIECE + 36 * len(layout.vectors)
    assert held <= 4 * labels.numel() + 44 * u + 72 * v + 4 * pieces + 200
    assert held > 4 * labels.numel() + 40 * u


def test_threads_find_the_same_order() -> None:
    for _ in range(20):
        layout = compiled()
        start, found = threading.Barrier(4), []

        def ask(layout: LabelLayout = layout, start: threading.Barrier = start,
                found: list[list[Tensor]] = found) -> None:
            start.wait()
            found.append(of(layout))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
        check(layout)


def test_another_stream_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = compiled()
    expected = of(layout)
    waited: list[object] = []
    recorded: list[tuple[int, object]] = []

    class Stream:
        def wait_event(self, event: object) -> None:
            waited.append(event)

    own, other = Stream(), Stream()
    for found in layout._orders.values():
        found._stream, found._made = own, "made"
    monkeypatch.setattr(Tensor, "record_stream",
                        lambda t, stream: recorded.append((id(t), stream)))
    for stream, waits in ((own, 0), (other, 5)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        assert all(a is b for a, b in zip(of(layout), expected, strict=True))
        assert waited == ["made"] * waits
    assert {id(t) for t in expected} <= {t for t, _ in recorded}
    assert {stream for _, stream in recorded} == {other}


@pytest.mark.triton
@interpreted
def test_an_order_of_other_sizes_is_refused() -> None:
    layout, level = compiled(), compiled().level(SIZE)
    vectors = layout.vectors.double()
    weight = torch.randn(4, CLASSES, 3, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(len(level.windows5), 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, *SIZE, dtype=torch.float64)
    own = layout.level(SIZE)
    calls = [
        lambda: indexed_modulation(x, level.index5, table, backend="triton",
                                   order=layout.pixel_order(own.index3)),
        lambda: window_embedding(vectors, weight, None, level.windows3, backend="triton",
                                 order=layout.window_order(own.windows5, 2)),
        lambda: window_table(table, *(torch.randn(4, 8, 3, 3).double(),
                                      torch.zeros(4).double()) * 2, level.windows5,
                             backend="triton", order=layout.window_order(own.windows3, 2)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"order: expected that of \d+ elements and \d+ rows"):
            call()


class Network(nn.Module):
    """Norms of both reaches at two sizes: alone, as a pair, in groups, of several conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shortcut = SPADE(CHANNELS, CLASSES, 8), SPADE(CHANNELS, CLASSES, 8)
        self.second = CGNorm(CHANNELS, CLASSES, 6, groups=3, shared_groups=1)
        self.single = SPADE(CHANNELS, CLASSES, 0)
        self.several = MultiSPADE(CHANNELS, [(CLASSES, 4)])
        self.last = SPADE(CHANNELS, CLASSES, 4, norm="instance")

    def forward(self, x: Tensor, layout: Any) -> Tensor:
        x, aside = modulate_pair(self.first, self.shortcut, x, layout)
        x = self.second(x, layout, activation="relu") + aside
        x = self.several(self.single(x, layout), layout)
        return self.last(x, layout, upsample=True)


class Short(Network):
    """Three of them: the interpreter is slow."""

    def forward(self, x: Tensor, layout: Any) -> Tensor:
        x = self.second(self.first(x, layout), layout, activation="relu")
        return self.last(x, layout, upsample=True)


LEVELS = 3  # sorts of Network: both reaches of one size, one of the other


@pytest.fixture
def network() -> Iterator[Network]:
    torch.manual_seed(0)
    with use_path("two_level"):
        yield Network().double()


@pytest.fixture
def short() -> Iterator[Short]:
    torch.manual_seed(0)
    with use_path("two_level"):
        yield Short().double()


def start(seed: int = 0, images: int = 2) -> tuple[Tensor, LabelLayout]:
    generator = torch.Generator().manual_seed(seed)
    # Few cells: the interpreter runs a program for each tap of each window.
    layout = LabelLayout.from_labels(blocks(seed, images, (8, 8), (2, 2)), CLASSES)
    layout = LabelLayout(layout.symbols, layout.vectors.double())
    return torch.randn(images, CHANNELS, 4, 4, generator=generator, dtype=torch.float64), layout


def step(network: nn.Module, x: Tensor, layout: LabelLayout, backend: str,
         *, second: bool = False) -> list[Tensor]:
    """Gradients of a training step, or of a penalty on them."""
    parameters = list(network.parameters())
    x = x.clone().requires_grad_()
    with use_backend(backend), use_path("auto" if backend == "reference" else "two_level"):
        y = network(x, layout)
        weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
        grads = torch.autograd.grad((y.square() * weights).sum(), [x, *parameters],
                                    create_graph=second, materialize_grads=True)
        if second:
            penalty = sum((g.square().sum() for g in grads), x.new_zeros(()))
            grads = torch.autograd.grad(penalty, [x, *parameters], materialize_grads=True)
    return list(grads)


def agree(found: list[Tensor], expected: list[Tensor], bound: float = 1e-10) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        # a bias before a batch norm has none
        assert max_error(a, b) < bound or float((a - b).abs().max()) < 1e-10, f"gradient {i}"


@pytest.mark.triton
@interpreted
def test_a_step_sorts_once_for_each_level(network: Network) -> None:
    x, layout = start()
    expected = step(network, x, start()[1], "reference")
    for sorts_expected in (LEVELS, 0):  # a second step on the same layout has them
        with Sorts() as sorts:
            found = step(network, x, layout, "triton")
        assert sorts.count == sorts_expected
        agree(found, expected)


@pytest.mark.triton
@interpreted
def test_without_a_layout_each_backward_sorts(network: Network,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LabelLayout, "_place", lambda *_: None)
    x, layout = start()
    with Sorts() as sorts:
        found = step(network, x, layout, "triton")
    # five passes; of five norms a table and its embedding, of one two embeddings
    assert sorts.count == 5 + 2 * 5 + 2
    agree(found, step(network, x, start()[1], "reference"))


@pytest.mark.triton
@interpreted
def test_layouts_of_other_maps_and_batches_are_not_mixed(short: Short) -> None:
    for seed, images in ((0, 2), (1, 2), (0, 1), (0, 2)):
        x, layout = start(seed, images)
        agree(step(short, x, layout, "triton"), step(short, x, layout, "reference"))


@pytest.mark.triton
@interpreted
def test_an_edit_in_place_is_seen_in_the_next_step(short: Short) -> None:
    x, layout = start()
    step(short, x, layout, "triton")
    for level in layout._levels.values():
        for name in ("symbols", "index3", "index5"):  # rows of the same windows elsewhere
            getattr(level, name).copy_(getattr(level, name).flip(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelLayout, "_place", lambda *_: None)
        expected = step(short, x, layout, "triton")
    agree(step(short, x, layout, "triton"), expected, 1e-13)


@pytest.mark.triton
@interpreted
def test_a_stale_order_would_be_seen(short: Short, monkeypatch: pytest.MonkeyPatch) -> None:
    x, layout = start()
    expected = step(short, x, layout, "reference")
    step(short, x, layout, "triton")
    for found in layout._orders.values():  # of another map of as many pixels and windows
        elements = found.order.pixels.elements
        elements.copy_(elements.roll(1))
    errors = [max_error(a, b) for a, b in
              zip(step(short, x, layout, "triton"), expected, strict=True)]
    assert max(errors) > 1e-3


@pytest.mark.triton
@interpreted
def test_second_derivatives_are_those_of_the_definition(network: Network) -> None:
    x, layout = start()
    found = step(network, x, layout, "triton", second=True)
    agree(found, step(network, x, layout, "reference", second=True), 1e-9)


@pytest.mark.triton
@interpreted
def test_checkpointed_norms_sort_once_too(network: Network) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, layout: LabelLayout) -> Any:
            return checkpoint(self.network, x, layout, use_reentrant=False)

    x, layout = start()
    with Sorts() as sorts:
        found = step(Checkpointed(), x, layout, "triton")
    assert sorts.count == LEVELS
    agree(found, step(network, x, layout, "reference"))


@pytest.mark.triton
@interpreted
def test_conditions_of_an_image_are_not_sorted() -> None:
    norm = ConditionalNorm2d(CHANNELS, 3).double()
    x, condition = torch.randn(3, CHANNELS, 9, 8).double(), torch.randn(3, 3).double()

    def gradients(backend: str) -> list[Tensor]:
        leaves = [condition.clone().requires_grad_(), *norm.parameters()]
        with use_backend(backend):
            y = norm(x, leaves[0], activation="relu")
        return list(torch.autograd.grad(y.square().sum(), leaves))

    with Sorts() as sorts:
        found = gradients("triton")
    assert sorts.count == 0
    agree(found, gradients("reference"))


def test_it_is_not_asked_for_without_gradients_or_a_gpu() -> None:
    def never() -> Any:
        raise AssertionError

    leaf = torch.zeros(1, requires_grad=True)
    assert segments.order_for_gradients(never, "cpu", (1, 1), leaf) is None
    assert segments.order_for_gradients(never, "triton", (1, 1), leaf.detach(), None) is None
    assert segments.order_for_gradients(None, "triton", (1, 1), leaf) is None
    with torch.no_grad():
        assert segments.order_for_gradients(never, "triton", (1, 1), leaf) is None
    with pytest.raises(AssertionError):
        segments.order_for_gradients(never, "triton", (1, 1), None, leaf)


def test_a_tap_of_no_row_is_in_no_segment() -> None:
    windows = torch.zeros(3, 9, dtype=torch.int32)
    windows[1] = torch.tensor([1, 2, -1, 4, 477218590, 3, -2**31, 2**31 - 1, 0])
    windows[2] = 1
    (found,) = sorted_rows([window_index(windows, 4)])
    for row in range(4):
        for tap in range(9):
            begin, end = found.bounds[9 * row + tap], found.bounds[9 * row + tap + 1]
            reads = [9 * (v - 1) + tap for v in (1, 2) if windows[v, tap] == row]
            assert found.elements[begin:end].tolist() == reads, (row, tap)
