"""LabelLayout and the table paths of SPADE and CG-Norm against the dense definition."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import smis_kernels
from smis_kernels import (
    SPADE,
    CGNorm,
    LabelLayout,
    layout_scope,
    modulate_pair,
    share_layouts,
    use_backend,
    use_path,
)
from smis_kernels.layout import label_layout as layout_module
from smis_kernels.layout import levels, planner, scope
from smis_kernels.layout.scope import layout_of
from smis_kernels.layout.static_layout import StaticLayout
from smis_kernels.layout.table_cache import TableCache, match_windows
from smis_kernels.ops.label_windows import op as label_windows
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
TABLES = ("one_level", "two_level")


def blocky(n: int, h: int, w: int, classes: int, seed: int = 0) -> Tensor:
    """Labels in rectangles: windows repeat."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (n, 1, -(-h // 5), -(-w // 7)), generator=generator)
    return F.interpolate(coarse.double(), (h, w), mode="nearest")[:, 0].long()


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.one_hot(labels, classes).permute(0, 3, 1, 2).to(dtype)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often windows were compiled."""
    calls: list[int] = []
    compile_level = layout_module.compile_level

    def counting(symbols: Tensor, unlimited: bool = False) -> object:
        calls.append(symbols.numel())
        return compile_level(symbols, unlimited)

    monkeypatch.setattr(layout_module, "compile_level", counting)
    monkeypatch.setattr(scope._known, "latest", None)
    return calls


@pytest.mark.parametrize(("h", "w"), [(256, 256), (97, 61), (64, 101), (1, 1), (3, 200)])
def test_resizing_is_that_of_interpolate(h: int, w: int) -> None:
    labels = torch.randint(0, 9, (2, h, w))
    layout = LabelLayout.from_labels(labels, 9)
    planes = one_hot(labels, 9, torch.float32)
    for size in [(h, w), (7, 5), (49, 30), (33, 77), (13, 1), (64, 64), (h * 2, w * 3)]:
        expected = F.interpolate(planes, size=size, mode="nearest")
        assert torch.equal(layout.dense(size), expected), size


def test_labels_edges_and_tensors_give_the_same_layout() -> None:
    labels, instances = blocky(2, 33, 29, 6), blocky(2, 33, 29, 40, seed=1)
    edges = smis_kernels.instance_edges(instances)
    planes = torch.cat([one_hot(labels, 8, torch.float32), edges], 1)
    by_instances = LabelLayout.from_labels(labels, 8, instances=instances)
    by_edges = LabelLayout.from_labels(labels[:, None], 8, edges=edges.bool())
    by_halves = LabelLayout.from_labels(labels[:, None], 8, edges=0.5 * edges.float())
    by_tensor = LabelLayout.from_tensor(planes)
    assert by_tensor is not None
    for layout in (by_instances, by_edges, by_halves, by_tensor):
        assert torch.equal(layout.dense(), planes)
        assert layout.shape == (2, 9, 33, 29)
    assert by_instances.level((33, 29)).counts == by_tensor.level((33, 29)).counts


def test_windows_determine_their_surroundings() -> None:
    layout = LabelLayout.from_labels(blocky(2, 23, 17, 5), 5)
    level = layout.level((23, 17))
    padded = F.pad(level.symbols, (2, 2, 2, 2))
    patches = layout.patches((23, 17))[level.index5.long()]
    for k in range(25):
        y, x = divmod(k, 5)
        assert torch.equal(patches[..., k], padded[:, y : y + 23, x : x + 17])


def test_layouts_move_pickle_and_report() -> None:
    layout = LabelLayout.from_labels(blocky(1, 32, 32, 5), 5)
    layout.level((32, 32))
    layout.level((8, 8))
    layout.tables = TableCache()
    again = pickle.loads(pickle.dumps(layout))
    assert again.tables is None  # of modules that are not those of the copy
    moved = again.to("cpu")
    for other in (again, moved):
        assert torch.equal(other.level((8, 8)).index5, layout.level((8, 8)).index5)
    assert "32x32" in layout.summary()
    noise = LabelLayout.from_labels(torch.randint(0, 5, (1, 128, 128)), 5)
    assert not noise.level((128, 128)).repeats
    assert "nothing repeats" in noise.summary()


@pytest.mark.parametrize(("arguments", "words"), [
    ({"labels": torch.full((1, 4, 4), 255)}, "expected labels 0..4, got 255"),
    ({"labels": torch.full((1, 4, 4), -1)}, "expected labels 0..4, got -1"),
    ({"labels": torch.full((1, 4, 4), 5)}, "expected labels 0..4, got 5"),
    ({"labels": torch.zeros(1, 4, 4)}, "labels: expected dtype"),
    ({"labels": torch.zeros(4, 4, dtype=torch.long)}, "labels: expected (N, H, W)"),
    ({"instances": torch.zeros(1, 4, 5, dtype=torch.long)}, "instances: expected shape (1, 4, 4)"),
    ({"edges": torch.zeros(2, 4, 4)}, "edges: expected shape (1, 4, 4)"),
    ({"edges": torch.zeros(1, 4, 4), "instances": torch.zeros(1, 4, 4, dtype=torch.long)},
     "edges: expected instances or edges"),
    ({"labels": torch.zeros(1, 3, 4, 4, dtype=torch.long)}, "labels: expected (N, H, W) or (N, 1"),
    ({"labels": torch.zeros(1, 0, 4, dtype=torch.long)}, "labels: expected maps of at least one"),
    ({"labels": torch.zeros(1, 4, 4, dtype=torch.long).to_sparse()},
     "labels: expected a dense tensor, got torch.sparse_coo"),
    ({"labels": [[0]]}, "labels: expected a tensor"),
    ({"edges": torch.zeros(1, 4, 4).numpy()}, "edges: expected a tensor (N, H, W) or (N, 1, H, W)"),
    ({"instances": [[1]]}, "instances: expected a tensor (N, H, W)"),
    ({"instances": torch.zeros(1, 4, 4)}, "instances: expected dtype"),
    ({"num_classes": 5.0}, "num_classes: expected a positive integer, got 5.0"),
    ({"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
])
def test_bad_maps_name_themselves(arguments: dict[str, Tensor], words: str) -> None:
    labels = arguments.pop("labels", torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises((ValueError, TypeError)) as error:
        LabelLayout.from_labels(labels, **{"num_classes": 5, **arguments})
    assert words in str(error.value) and "\n" not in str(error.value)


PLANES, FINE = torch.zeros(1, 5, 4, 4), LabelLayout.from_labels(torch.zeros(1, 4, 4).long(), 5)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: LabelLayout.from_tensor(PLANES.numpy()), "conditioning: expected a tensor (N, K, H, "),
    (lambda: LabelLayout.from_tensor(PLANES.long()), "conditioning: expected dtype float32"),
    (lambda: LabelLayout.from_tensor(PLANES.to_sparse()), "conditioning: expected a dense tensor"),
    (lambda: LabelLayout.from_tensor(PLANES[:, :, :0]), "conditioning: expected maps of at least"),
    (lambda: FINE.level([4, 4]), "size: expected a tuple (h, w) of integers from 1, got [4, 4]"),
    (lambda: FINE.level((0, 4)), "size: expected a tuple (h, w) of integers from 1, got (0, 4)"),
    (lambda: FINE.level((4,)), "size: expected a tuple (h, w)"),
    (lambda: FINE.dense([2, 2]), "size: expected a tuple (h, w)"),
    (lambda: FINE.dense((2.0, 2)), "size: expected a tuple (h, w)"),
    (lambda: FINE.to(torch.float64), "device: expected a device such as 'cpu', got torch.float64"),
    *[(lambda m=m: SPADE(4, 5)(torch.zeros(2, 4, 4, 4), m), words) for m, words in (
        (PLANES.numpy(), "segmap: expected a tensor (N, 5, H, W) or a LabelLayout, got ndarray"),
        (PLANES.to_sparse(), "segmap: expected a dense tensor, got torch.sparse_coo"),
        (PLANES.bool().expand(2, -1, -1, -1), "segmap: expected dtype float32"),
        (PLANES[:, :, :0].expand(2, -1, -1, -1), "segmap: expected at least one pixel"),
    )],
])
def test_bad_arguments_name_themselves(call: Callable[[], object], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


# Hidden widths and groups of GroupDNet's data sets (scaled down), SPADE, and a single conv.
NORMS = {
    "spade": lambda: SPADE(24, 7, 10),
    "single conv": lambda: SPADE(24, 7, 0),
    "deepfashion": lambda: CGNorm(24, 8, 12, groups=4),
    "cityscapes": lambda: CGNorm(28, 14, 21, groups=7),
    "ade20k": lambda: CGNorm(24, 12, 24, groups=4, shared_groups=12),
    "batch of widths": lambda: CGNorm(70, 7, 35, groups=1, shared_groups=7),
}


def gradients_of(norms: list[CGNorm], x: Tensor, segmap: Tensor | LabelLayout,
                 **options: object) -> list[Tensor]:
    x = x.detach().requires_grad_()
    outs = (modulate_pair(norms[0], norms[1], x, segmap, **options) if len(norms) > 1
            else (norms[0](x, segmap, **options),))
    loss = sum((y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)).sum()
               for y in outs)
    parameters = [p for norm in norms for p in norm.parameters()]
    return [*(y.detach() for y in outs), *torch.autograd.grad(loss, [x, *parameters])]


@needs_cpu
@pytest.mark.parametrize("path", TABLES)
@pytest.mark.parametrize("name", NORMS)
def test_tables_equal_the_dense_reference(name: str, path: str) -> None:
    torch.manual_seed(0)
    norm, twin = NORMS[name]().double(), NORMS[name]().double()
    labels = blocky(2, 26, 22, norm.label_channels)
    segmap = one_hot(labels, norm.label_channels)
    for training, upsample, norms in ((True, False, [norm]), (True, True, [norm, twin]),
                                      (False, True, [norm]), (False, False, [norm, twin])):
        for n in norms:
            n.train(training)
        scale = 2 if upsample else 1
        x = torch.randn(2, norm.channels, 26 // scale, 22 // scale, dtype=torch.float64)
        for memory in (torch.contiguous_format, torch.channels_last):
            with use_backend("reference"):
                expected = gradients_of(norms, x, segmap, upsample=upsample)
            with use_path(path):
                found = gradients_of(norms, x.to(memory_format=memory), segmap, upsample=upsample)
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert max_error(a, b) < 1e-10, f"result {i}"


@needs_cpu
@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 20), w=st.integers(1, 20), n=st.integers(1, 2), seed=st.integers(0, 99),
       classes=st.integers(1, 6), groups=st.sampled_from((1, 2, 3)), hidden=st.sampled_from((0, 6)),
       path=st.sampled_from((*TABLES, "auto")), noise=st.booleans(), kernel=st.sampled_from((1, 3)))
def test_any_map(h: int, w: int, n: int, seed: int, classes: int, groups: int, hidden: int,
                 path: str, noise: bool, kernel: int) -> None:
    torch.manual_seed(seed)
    planes = classes * groups
    norm = CGNorm(6, planes, hidden, groups=groups, kernel_size=kernel).double().eval()
    labels = torch.randint(0, planes, (n, h, w)) if noise else blocky(n, h, w, planes, seed)
    x, segmap = torch.randn(n, 6, 9, 11, dtype=torch.float64), one_hot(labels, planes)
    with use_backend("reference"):
        expected = norm(x, segmap)
    with use_path("auto" if kernel == 1 else path):
        assert max_error(norm(x, segmap), expected) < 1e-10
        assert max_error(norm(x, LabelLayout.from_labels(labels, planes)), expected) < 1e-10


@needs_cpu
def test_multi_hot_and_interleaved_planes_need_no_case() -> None:
    norm = SPADE(8, 5, 6).double().eval()
    palette = torch.rand(7, 5, dtype=torch.float64)  # soft, but few distinct vectors
    segmap = palette[blocky(1, 40, 40, 7)].permute(0, 3, 1, 2)
    x = torch.randn(1, 8, 40, 40, dtype=torch.float64)
    with use_backend("reference"):
        expected = norm(x, segmap)
    with use_path("two_level"):
        assert max_error(norm(x, segmap), expected) < 1e-10


@needs_cpu
def test_the_choice_is_explained() -> None:
    norm, x = SPADE(64, 9).eval(), torch.randn(1, 64, 64, 64)
    labels = blocky(1, 64, 64, 9)
    segmap = one_hot(labels, 9, torch.float32)

    def choice(segmap: Tensor | LabelLayout, x: Tensor = x, norm: CGNorm = norm) -> object:
        choices = smis_kernels.explain(norm, x, segmap).choices
        return next(c for c in choices if c.op == type(norm).__name__)

    chosen = choice(segmap)
    assert chosen.path in TABLES
    assert {"V", "U", "pixels", "expected_gain"} <= set(chosen.numbers)
    both = choice(torch.cat([segmap] * 2), torch.cat([x] * 2))
    assert (chosen.numbers["pixels"], both.numbers["pixels"]) == (64 * 64, 2 * 64 * 64)
    soft = choice(torch.rand(1, 9, 128, 128))
    assert (soft.path, soft.reason) == ("dense", "the map's vectors do not repeat (or hold NaN)")
    nan = segmap.clone()
    nan[0, 0, 0, 0] = float("nan")
    assert choice(nan).path == "dense"
    noise = choice(one_hot(torch.randint(0, 9, (1, 128, 128)), 9, torch.float32),
                   torch.randn(1, 64, 128, 128))
    assert (noise.path, noise.reason) == ("dense", "the map's windows do not repeat")
    five = choice(segmap, norm=SPADE(64, 9, kernel_size=5).eval())
    assert (five.path, five.reason) == ("dense", "kernel_size is 5, tables are for 3")
    graded = choice(segmap.clone().requires_grad_())
    assert (graded.path, graded.reason) == ("dense", "the map requires a gradient")


@needs_cpu
@pytest.mark.parametrize("path", TABLES)
def test_a_forced_path_runs_or_raises(path: str) -> None:
    norm, x = SPADE(4, 3), torch.randn(1, 4, 8, 8)
    segmap = one_hot(blocky(1, 8, 8, 3), 3, torch.float32)
    with use_path(path):
        with pytest.raises(ValueError, match="requires a gradient"):
            norm(x, segmap.requires_grad_())
        with pytest.raises(ValueError, match="do not repeat"):
            norm(torch.randn(1, 4, 128, 128), torch.rand(1, 3, 128, 128))
        with pytest.raises(ValueError, match="kernel_size is 5"):
            SPADE(4, 3, kernel_size=5)(x, segmap.detach())
    with pytest.raises(ValueError, match="path: expected one of"), use_path("fast"):
        pass
    with pytest.raises(ValueError, match=r"segmap: expected \(N, 3, H, W\)"):
        norm(x, LabelLayout.from_labels(blocky(1, 8, 8, 3), 4))
    with pytest.raises(ValueError, match="segmap: expected the batch size 1"):
        norm(x, LabelLayout.from_labels(blocky(2, 8, 8, 3), 3))


class Stack(nn.Module):
    """A network as published code writes it: a float map handed to every norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(SPADE(6, 4, 5) for _ in range(3))

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x, segmap)
        return x


@needs_cpu
def test_a_network_compiles_its_map_once_per_forward(counted: list[int]) -> None:
    network, x = Stack().eval(), torch.randn(1, 6, 12, 12)
    undo = share_layouts(network)
    numbered: list[int] = []
    original = layout_module.number_vectors

    def counting(conditioning: Tensor, limit: int, **options: str) -> tuple[Tensor, Tensor]:
        numbered.append(1)
        return original(conditioning, limit, **options)

    layout_module.number_vectors = counting
    try:
        with use_path("two_level"):
            for seed in range(3):
                network(x, one_hot(blocky(1, 24, 24, 4, seed), 4, torch.float32))
            assert len(numbered) == len(counted) == 3
            undo()
            network(x, one_hot(blocky(1, 24, 24, 4, 3), 4, torch.float32))
            assert len(numbered) == 6  # a norm on its own numbers the pixels each time
            assert len(counted) == 4  # but not the windows
    finally:
        layout_module.number_vectors = original


class Late(levels.Reading):
    """Numbers that arrive once the host has asked for them; ``waits`` counts how often it did."""

    waits = 0

    def numbers(self) -> object:
        Late.waits += not self.done
        return super().numbers()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Layouts go a GPU's way, by the definition of its kernels; the sizes numbered in each go."""
    goes: list[list[tuple[int, int]]] = []
    original = layout_module.number_levels

    def counting(map: Tensor, sizes: list[tuple[int, int]], limits: list[int],
                 **options: str) -> object:
        goes.append(list(sizes))
        return original(map, sizes, limits, **options)

    monkeypatch.setattr(layout_module, "device_kernels", lambda map: True)
    monkeypatch.setattr(layout_module, "Reading", Late)
    monkeypatch.setattr(layout_module, "number_levels", counting)
    monkeypatch.setattr(Late, "waits", 0)
    layout_module.sizes_asked.cache_clear()
    return goes


@needs_cpu
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("edge", [False, True])
def test_a_device_compiles_as_the_cpu_does(edge: bool, noise: bool, request: pytest.FixtureRequest,
                                           ) -> None:
    sizes = [(128, 128), (1, 1), (31, 45), (200, 64)]
    labels = torch.randint(5, (2, 128, 128)) if noise else blocky(2, 128, 128, 5) + 2
    ids = labels // 2 if edge else None

    def compiled() -> tuple[list[Tensor], list[tuple[bool, ...]]]:
        layout = LabelLayout.from_labels(labels, 9, instances=ids)
        found, repeat = [layout.symbols, layout.vectors, layout.dense((9, 9))], []
        for size in sizes:
            level = layout.level(size)
            repeat.append((level.repeats, layout.level(size, unlimited=True).repeats))
            level = layout.level(size)
            found += [level.symbols, level.windows3, level.index3, level.windows5, level.index5]
        return found, repeat

    expected, repeat = compiled()
    goes = request.getfixturevalue("device")
    for again in range(2):
        got, repeats = compiled()
        assert repeats == repeat
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        again_unlimited = [[size] for size, r in zip(sizes, repeat, strict=True) if not r[0]]
        first = [[size] for size in sizes]
        if again:  # all in one go, when the labels were
            assert goes == [sizes, *again_unlimited]
        else:
            assert [go for go in goes if go not in again_unlimited] == [
                go for go in first if go not in again_unlimited]
        goes.clear()


def test_the_host_waits_once_for_all_sizes(device: list[list[tuple[int, int]]]) -> None:
    labels = blocky(1, 40, 40, 5)
    sizes = [(40, 40), (20, 20), (10, 10)]
    LabelLayout.from_labels(labels, 5).level((40, 40))
    Late.waits = 0
    layout = LabelLayout.from_labels(labels, 5)
    layout.prepare([*sizes, *sizes])
    mapped = layout.map_vectors(lambda vectors: 2 * vectors)
    assert device[1:] == [[(40, 40)], [(20, 20), (10, 10)]]
    assert Late.waits == 0  # nothing was asked yet
    layout = LabelLayout.from_labels(labels, 5)
    layout.dense((20, 20))
    assert Late.waits == 1  # the labels' range
    layout.level((40, 40))
    assert Late.waits == 2
    for size in sizes:
        mapped.level(size)
    assert Late.waits == 5  # another layout: its labels, and two goes
    many = [(1, w) for w in range(1, 41)]
    device.clear()
    layout.prepare(many)
    assert [len(go) for go in device] == [16, 16, 8]


def test_labels_on_a_device_are_refused_at_the_first_use(
        device: list[list[tuple[int, int]]]) -> None:
    for value in (255, 5, -1):
        labels = torch.zeros((1, 8, 8), dtype=torch.int16)
        labels[0, 3, 4] = value
        words = f"labels: expected labels 0..4, got {value}; remap unknown pixels"
        layout = LabelLayout.from_labels(labels, 5)
        mapped = layout.map_vectors(torch.clone)
        for use in (lambda x: x.level((4, 4)), lambda x: x.symbols, lambda x: x.vectors,
                    lambda x: x.dense(), lambda x: x.dense((2, 2)), lambda x: x.resized((2, 2)),
                    pickle.dumps, lambda x: x.to("cpu"), repr):
            for each in (layout, mapped):
                with pytest.raises(ValueError, match=words.replace(".", r"\.")):
                    use(each)
    fine = LabelLayout.from_labels(labels.clamp(min=0), 5)
    assert fine.vectors.shape == (2, 5)


@needs_cpu
def test_a_capture_takes_the_dense_path_where_counts_are_not_read(
        device: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = SPADE(6, 5, 5).eval(), torch.randn(1, 6, 16, 16)
    labels = blocky(1, 16, 16, 5)
    expected = norm(x, LabelLayout.from_labels(labels, 5))
    captured = LabelLayout.from_labels(labels, 5)
    read = LabelLayout.from_labels(labels, 5)
    read.level((16, 16))
    Late.waits = 0
    monkeypatch.setattr(layout_module, "capturing", lambda map: True)
    monkeypatch.setattr(levels, "capturing", lambda map: True)
    assert captured.countable((16, 16)) is False and read.countable((16, 16)) is True
    plan = smis_kernels.explain(norm, x, captured)
    assert [c.path for c in plan.choices if c.op == "SPADE"] == ["dense"]
    torch.testing.assert_close(norm(x, captured), expected)
    with use_path("one_level"):
        norm(x, read)
        with pytest.raises(ValueError, match="a CUDA graph is captured"):
            norm(x, captured)
    assert Late.waits == 0
    with pytest.raises(RuntimeError, match="make it before the capture"):
        levels.Reading(torch.zeros(1)).numbers()


@needs_cpu
def test_a_level_is_not_begun_during_a_capture(device: list[list[tuple[int, int]]],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    labels = blocky(1, 16, 16, 5)
    LabelLayout.from_labels(labels, 5).level((16, 16))
    layout = LabelLayout.from_labels(labels, 5)
    assert layout.symbols is not None
    with monkeypatch.context() as capture:
        capture.setattr(layout_module, "capturing", lambda map: True)
        for size in ((16, 16), (8, 8)):
            with pytest.raises(RuntimeError, match="cannot be counted while a CUDA graph"):
                layout.level(size)
    for size in ((16, 16), (8, 8)):  # and is no worse for it afterwards
        assert torch.equal(layout.level(size).symbols, layout.resized(size))


def test_two_threads_read_numbers_at_once() -> None:
    """The second is waiting for the device while the first reads them."""
    reading = levels.Reading(torch.tensor([3, 4]))

    class Event:
        entered = False

        def synchronize(self) -> None:
            if not Event.entered:
                Event.entered = True
                assert reading.numbers() == [3, 4]  # another thread, meanwhile

    reading._sent = Event()  # type: ignore[assignment]
    assert reading.numbers() == [3, 4]


@needs_cpu
def test_room_for_windows_is_not_kept(device: list[list[tuple[int, int]]],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LabelLayout.from_labels(blocky(1, 128, 128, 5), 5)
    tensors = [layout.symbols, layout.vectors, *vars(layout.level((128, 128))).values()]
    needed = sum(4 * t.numel() for t in tensors)
    assert sum(t.untyped_storage().nbytes() for t in tensors) > needed + 200_000
    assert len(pickle.dumps(layout)) < needed + 10_000
    copy = pickle.loads(pickle.dumps(layout))
    assert torch.equal(copy.level((128, 128)).windows5, layout.level((128, 128)).windows5)
    monkeypatch.setattr(levels, "MOST_SPARE", 0)
    layout = LabelLayout.from_labels(blocky(1, 128, 128, 5), 5)
    level = layout.level((128, 128))
    assert level.windows3.untyped_storage().nbytes() == level.windows3.numel() * 4


def test_layouts_of_0_2_are_read() -> None:
    layout = LabelLayout.from_labels(blocky(1, 16, 16, 5), 5)
    state = layout.__getstate__()
    for name in ("_own", "_prepared", "_labels"):
        del state[name]
    state["symbols"], state["vectors"] = state.pop("_symbols"), state.pop("_vectors")
    old = LabelLayout.__new__(LabelLayout)
    old.__setstate__(state)
    assert torch.equal(old.vectors, layout.vectors)
    assert torch.equal(old.level((8, 8)).symbols, layout.level((8, 8)).symbols)


def test_many_classes_take_room_for_those_that_occur() -> None:
    labels = torch.tensor([[[7, 90_000], [7, 3]]])
    for edges, rows in ((None, 4), (torch.tensor([[[0, 1], [2, 0]]]), 5)):
        layout = LabelLayout.from_labels(labels, 100_000, edges=edges)
        assert layout.vectors.untyped_storage().nbytes() == rows * layout.vectors.shape[1] * 4
        assert layout.dense().argmax(1).equal(labels)


@needs_cpu
def test_edits_of_any_kind_are_seen() -> None:
    norm, x = SPADE(6, 4, 5).eval(), torch.randn(1, 6, 16, 16)

    def check(segmap: Tensor) -> None:
        with use_backend("reference"):
            expected = norm(x, segmap)
        with use_path("two_level"):
            assert max_error(norm(x, segmap), expected) < 1e-5

    with torch.no_grad():
        for seed in range(20):  # new tensors in a loop: memory is reused at once
            check(one_hot(blocky(1, 16, 16, 4, seed), 4, torch.float32))
        segmap = one_hot(blocky(1, 16, 16, 4), 4, torch.float32).contiguous()
        check(segmap)
        segmap[:, :, :5] = segmap[:, :, 6:7]
        check(segmap)
        segmap.data[:, :, 9:] = segmap.data[:, :, 2:3]
        check(segmap)
        segmap.numpy()[:, [0, 1]] = segmap.numpy()[:, [1, 0]]
        check(segmap)
    with torch.inference_mode():
        for seed in range(3):
            check(one_hot(blocky(1, 16, 16, 4, seed), 4, torch.float32))
        with layout_scope():
            segmap = one_hot(blocky(1, 16, 16, 4), 4, torch.float32)
            check(segmap)
            segmap.fill_(0)
            check(segmap)
    with layout_scope(), torch.no_grad():
        segmap = one_hot(blocky(1, 16, 16, 4), 4, torch.float32)
        check(segmap)
        segmap[:, :, :5] = segmap[:, :, 6:7]
        check(segmap)


@needs_cpu
def test_two_threads_do_not_mix_their_layouts() -> None:
    norm, x = SPADE(6, 4, 5).eval(), torch.randn(1, 6, 16, 16)
    maps = [one_hot(blocky(1, 16, 16, 4, seed), 4, torch.float32) for seed in range(2)]
    with use_backend("reference"), torch.no_grad():
        expected = [norm(x, m) for m in maps]
    errors: list[float] = []

    def work(i: int) -> None:
        for _ in range(30):
            with torch.no_grad(), layout_scope():
                errors.append(max_error(norm(x, maps[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 60
    assert max(errors) < 1e-5


def test_a_layout_has_the_dtype_of_its_map() -> None:
    planes = F.one_hot(blocky(1, 8, 8, 3), 3).permute(0, 3, 1, 2)
    for dtype in (torch.float32, torch.float64, torch.float32):
        layout = layout_of(planes.to(dtype))
        assert layout is not None and layout.vectors.dtype == dtype


def test_layouts_are_found_again_only_inside_a_scope() -> None:
    segmap = one_hot(blocky(1, 16, 16, 4), 4, torch.float32)
    with layout_scope():
        first = layout_of(segmap)
        assert layout_of(segmap) is first
        assert layout_of(segmap.clone()) is first  # the same pixels: the windows are kept
    assert not scope._known.scope


def test_windows_of_an_edited_map_are_matched() -> None:
    labels = blocky(1, 40, 40, 5)
    edited = labels.clone()
    edited[:, 10:20, 10:20] = 4
    old, new = (LabelLayout.from_labels(m, 6) for m in (labels, edited))
    for reach, windows in ((2, lambda x: x.patches((40, 40))),
                           (1, lambda x: x.level((40, 40)).windows3)):
        row = match_windows(old, new, (40, 40), reach=reach)
        vectors = [x.vectors[windows(x).long()].flatten(1) for x in (old, new)]
        assert (row >= 0).sum() > 1
        for i, r in enumerate(row.tolist()):
            if r >= 0:
                assert torch.equal(vectors[0][r], vectors[1][i])
            else:
                assert not (vectors[0] == vectors[1][i]).all(1)[1:].any()


def test_symbols_of_equal_vectors_are_one_to_a_match() -> None:
    old = LabelLayout.from_labels(torch.tensor([[[0, 1], [1, 0]]]), 3)
    new = LabelLayout.from_labels(torch.tensor([[[1, 2], [0, 1]]]), 3)
    assert (match_windows(old, new, (2, 2), reach=1)[1:] == -1).all()
    weights = torch.tensor([[1.0], [0.0], [1.0]])  # classes 0 and 2 become the same
    merged = [x.map_vectors(lambda vectors: vectors @ weights) for x in (old, new)]
    row = match_windows(*merged, (2, 2), reach=1)
    vectors = [x.vectors[x.level((2, 2)).windows3.long()].flatten(1) for x in merged]
    assert row.tolist() == [0, -1, -1, -1, -1]
    again = match_windows(merged[0], merged[0], (2, 2), reach=1)
    assert torch.equal(vectors[0][again], vectors[0])
    turned = LabelLayout.from_labels(torch.tensor([[[2, 1], [1, 2]]]), 3).map_vectors(
        lambda vectors: vectors @ weights)
    assert torch.equal(match_windows(merged[0], turned, (2, 2), reach=1), torch.arange(5))


@needs_cpu
@pytest.mark.parametrize("path", TABLES)
def test_mapped_vectors_leave_the_outside_zero(path: str) -> None:
    """As a conv of the mapped planes pads them, whatever the function makes of zero."""
    norm, weights = SPADE(6, 3, 5).double().eval(), torch.randn(4, 3, dtype=torch.float64)
    labels = blocky(1, 9, 11, 4)
    layout = LabelLayout.from_labels(labels, 4)
    mapped = layout.map_vectors(lambda vectors: (vectors.double() @ weights).cos())
    planes = (one_hot(labels, 4).permute(0, 2, 3, 1) @ weights).cos().permute(0, 3, 1, 2)
    x = torch.randn(1, 6, 9, 11, dtype=torch.float64)
    with use_backend("reference"):
        expected = norm(x, planes)
    with use_path(path):
        assert max_error(norm(x, mapped), expected) < 1e-12


def test_norms_on_vectors_that_differ_otherwise_share_no_match() -> None:
    """What one norm cannot tell apart another can."""
    labels = torch.randint(3, (1, 16, 16), generator=torch.Generator().manual_seed(0))
    edited = labels.clone()
    edited[0, 2:9, 3:8] = 2
    merge = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    norms = [SPADE(8, 2, 8).eval(), SPADE(8, 3, 8).eval()]
    x = torch.randn(1, 8, 16, 16)

    def painted(layout: LabelLayout) -> list[Tensor]:
        blind = layout.map_vectors(lambda vectors: vectors @ merge)
        return [norm(x, of) for norm, of in zip(norms, (blind, layout), strict=True)]

    before, after = (LabelLayout.from_labels(m, 3) for m in (labels, edited))
    before.tables = TableCache()
    with torch.no_grad(), use_path("one_level"):
        painted(before)
        after.tables = TableCache(before.tables)
        for found, expected in zip(painted(after), painted(LabelLayout.from_labels(edited, 3)),
                                   strict=True):
            assert torch.equal(found, expected)


@needs_cpu
def test_compiles_without_a_graph_break_on_a_prepared_layout() -> None:
    norm_0, norm_s = SPADE(6, 4, 5), CGNorm(6, 4, 8, groups=2)
    layout = LabelLayout.from_labels(blocky(1, 16, 16, 4), 4)
    layout.level((16, 16))
    x = torch.randn(1, 6, 8, 8, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        with use_path("two_level"):
            y, y_s = modulate_pair(norm_0, norm_s, x, layout, upsample=True)
        return (y * y_s).sum()

    expected = torch.autograd.grad(call(x), x)[0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_kept_tables_of_norms_that_see_differently_far() -> None:
    """After an edit each takes over rows of its own windows: 5x5, or 3x3 without a hidden conv."""
    labels = torch.randint(4, (1, 16, 16), generator=torch.Generator().manual_seed(0))
    edited = labels.clone()
    edited[0, 3:6, 4:9] = 1
    norms = [SPADE(8, 4, hidden, norm="instance").eval() for hidden in (8, 0)]
    x = torch.randn(1, 8, 16, 16)
    before, after = (LabelLayout.from_labels(m, 4) for m in (labels, edited))
    before.tables = TableCache()
    with torch.no_grad(), use_path("one_level"):
        for norm in norms:
            norm(x, before)
        after.tables = TableCache(before.tables)
        for norm in norms:
            found = norm(x, after)
            assert torch.equal(found, norm(x, LabelLayout.from_labels(edited, 4)))


def test_dense_planes_are_those_of_the_compiled_symbols() -> None:
    layout = LabelLayout.from_labels(blocky(2, 23, 31, 6), 6)
    whole = layout.dense()
    for size in ((23, 31), (9, 17)):
        expected = F.interpolate(whole, size, mode="nearest")
        for dtype in (None, torch.bfloat16):
            before = layout.dense(size, dtype)
            level = layout.level(size)
            found = layout.dense(size, dtype)
            assert found.dtype == (dtype or torch.float32)
            assert torch.equal(found.float(), expected) and torch.equal(before, found)
            assert found.is_contiguous(memory_format=torch.channels_last)
        level.symbols = torch.ones_like(level.symbols)  # it is read, not resized anew
        assert torch.equal(layout.dense(size)[:, :, 0, 0], layout.vectors[1].expand(2, -1))


@needs_cpu
@pytest.mark.parametrize("labels", [blocky(1, 32, 32, 5),
                                    torch.randint(5, (1, 96, 96),
                                                  generator=torch.Generator().manual_seed(0))],
                         ids=["repeating", "unique"])
def test_kept_tables_are_taken_where_convs_are_cheaper_once(labels: Tensor) -> None:
    norm = SPADE(8, 5, 16).eval()
    x = torch.randn(1, 8, *labels.shape[1:])
    layout = LabelLayout.from_labels(labels, 5)
    free = smis_kernels.layout.planner.CPU_RATES._replace(dense=1e9)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(smis_kernels.layout.planner, "CPU_RATES", free)
        once = smis_kernels.explain(norm, x, layout)
        assert [c.path for c in once.choices if c.op == "SPADE"] == ["dense"]
        layout = LabelLayout.from_labels(labels, 5)
        layout.tables = TableCache()
        kept = smis_kernels.explain(norm, x, layout)
        assert next(c.path for c in kept.choices if c.op == "SPADE") in TABLES
        assert len(list(layout.tables.items())) == 1
        with use_backend("reference"):
            expected = norm.double()(x.double(), LabelLayout.from_labels(labels, 5))
        norm.float()
        assert max_error(norm(x, layout), expected) < 1e-5


def _copied(layout: LabelLayout) -> LabelLayout:
    return copy.copy(layout)  # which has the tensors in common


@needs_cpu
@pytest.mark.parametrize("same", [
    None, _copied, copy.deepcopy, lambda x: x.to("cpu"), lambda x: pickle.loads(pickle.dumps(x)),
    lambda x: x.map_vectors(lambda vectors: 1 * vectors)])
@pytest.mark.parametrize("kept", [False, True])
def test_writes_into_symbols_are_seen(kept: bool, same: Callable[[LabelLayout], LabelLayout] | None,
                                      ) -> None:
    norms = [SPADE(6, 4, hidden).double().eval() for hidden in (5, 0)]
    layout = LabelLayout.from_tensor(one_hot(blocky(1, 32, 32, 4), 4))
    assert layout is not None
    if kept:
        layout.tables = TableCache()
    sizes = ((32, 32), (12, 20))

    def check(layout: LabelLayout) -> None:
        for size in sizes:
            for norm in norms:
                x = torch.randn(1, 6, *size, dtype=torch.float64)
                with use_backend("reference"):
                    expected = norm(x, layout.vectors[layout.symbols.long()].permute(0, 3, 1, 2))
                assert max_error(norm(x, layout), expected) < 1e-10
                with use_path("dense"):
                    assert max_error(norm(x, layout), expected) < 1e-10

    with torch.no_grad():
        check(layout)
        other = layout if same is None else same(layout)
        for write in (lambda x: x.symbols[:, :16].fill_(1), lambda x: x.symbols.copy_(
                torch.randint(1, 5, (1, 32, 32))), lambda x: x.vectors[1].fill_(0.5)):
            with torch.inference_mode():
                write(layout)
            check(other)
            check(layout)
            write(other)
            check(layout)
            check(other)
        before = other.level((32, 32)), len(other.levels)
        assert other.level((32, 32)) is before[0] and len(other.levels) == before[1] == 2


@needs_cpu
def test_a_write_changes_the_choice() -> None:
    """Windows that no longer repeat have no tables."""
    norm, x = SPADE(64, 9).eval(), torch.randn(1, 64, 128, 128)
    layout = LabelLayout.from_labels(blocky(1, 128, 128, 9), 9)
    assert planner.choose((norm,), x, layout, (128, 128)).path in TABLES
    layout.symbols.copy_(torch.randint(1, 10, (1, 128, 128)))
    assert planner.choose((norm,), x, layout, (128, 128)).path == "dense"


def test_prepared_levels_of_symbols_written_to_are_forgotten(
        device: list[list[tuple[int, int]]]) -> None:
    LabelLayout.from_labels(blocky(1, 16, 16, 5), 5).level((8, 8))
    layout = LabelLayout.from_labels(blocky(1, 16, 16, 5), 5)  # which prepares that size
    layout.symbols[:, :8] = 1
    assert torch.equal(layout.level((8, 8)).symbols, layout.resized((8, 8)))


def test_mapping_writes_into_no_vectors_of_the_layout() -> None:
    layout = LabelLayout.from_labels(blocky(1, 16, 16, 4), 4)
    before = layout.state
    for function in (lambda v: v, lambda v: v[:, :2]):
        layout.map_vectors(function).vectors.fill_(3)
    assert layout.state == before and layout.vectors.max() == 1


def test_tables_of_a_layout_written_to_are_no_start_for_an_edit() -> None:
    """Nor is what is predicted of it kept."""
    labels, owner = blocky(1, 16, 16, 4), nn.Identity()
    edited = labels.clone()
    edited[0, 3:6, 4:9] = 1
    norm, x = SPADE(8, 4, 8).eval(), torch.randn(1, 8, 16, 16)
    before, after = (LabelLayout.from_labels(m, 4) for m in (labels, edited))
    before.tables = TableCache(budget=8)
    predicted = [before.tables.prediction(owner, 4, object) for _ in range(3)]
    with torch.no_grad(), use_path("one_level"):
        norm(x, before)
        after.tables = TableCache(before.tables, budget=8)
        before.symbols[:, :9] = 1
        expected = norm(x, LabelLayout.from_labels(edited, 4))
        torch.testing.assert_close(norm(x, after), expected)
    before.tables = cache = TableCache(budget=8)
    predicted = [cache.prediction(owner, 4, object) for _ in range(3)]
    assert predicted[0] is None and predicted[1] is predicted[2] is not None
    before.symbols[:, :3] = 2
    assert before.tables is cache
    again = [before.tables.prediction(owner, 4, object) for _ in range(2)]
    assert again[0] is again[1] is not None and again[0] is not predicted[1]


MAKERS: dict[str, Callable[[Tensor], LabelLayout | Tensor]] = {
    "planes": lambda labels: one_hot(labels, 4),
    "from_tensor": lambda labels: layout_of(one_hot(labels, 4)),
    "from_labels": lambda labels: LabelLayout.from_labels(labels, 4).map_vectors(Tensor.double),
    "copy": lambda labels: copy.deepcopy(LabelLayout(
        LabelLayout.from_labels(labels, 4).symbols + 0, LabelLayout.from_labels(
            labels, 4).vectors.double())),
}


@needs_cpu
@pytest.mark.parametrize("path", ["dense", *TABLES])
@pytest.mark.parametrize("made", ["inference", "used in inference"])
@pytest.mark.parametrize("name", MAKERS)
def test_what_inference_mode_made_serves_gradients(name: str, made: str, path: str) -> None:
    norm, labels = SPADE(6, 4, 5).double(), blocky(1, 16, 16, 4)
    for layout_kept in (False, True):
        x = torch.randn(1, 6, 12, 12, dtype=torch.float64, requires_grad=True)
        norm.train(not layout_kept).requires_grad_(not layout_kept)
        with use_path(path):
            with torch.inference_mode() if made == "inference" else nullcontext():
                segmap = MAKERS[name](labels)
                if isinstance(segmap, LabelLayout) and layout_kept:
                    segmap.tables = TableCache()
            with torch.inference_mode():
                norm(x.detach(), segmap)
            if isinstance(segmap, Tensor):
                segmap = segmap.clone()
            found = torch.autograd.grad(norm(x, segmap).square().sum(), x)[0]
        with use_backend("reference"):
            expected = torch.autograd.grad(norm(x, one_hot(labels, 4)).square().sum(), x)[0]
        assert max_error(found, expected) < 1e-8


@needs_cpu
def test_a_static_layout_of_inference_mode_is_loaded_outside() -> None:
    labels, norm = blocky(1, 16, 16, 4), SPADE(6, 4, 5).eval()
    x = torch.randn(1, 6, 16, 16)
    with torch.no_grad(), use_path("two_level"):
        first, second = (LabelLayout.from_labels(m, 4) for m in (labels, labels.flip(1)))
        with torch.inference_mode():
            first.level((16, 16))
            static = StaticLayout(first)
        second.level((16, 16))
        assert static.fits(second)
        level = static.layout.level((16, 16))
        static.load(second)
        assert static.layout.level((16, 16)) is level  # in the same memory
        torch.testing.assert_close(norm(x, static.layout), norm(x, second))


@needs_cpu
@pytest.mark.parametrize("default", ["meta"])
def test_another_default_device_changes_nothing(default: str) -> None:
    labels, x = blocky(1, 16, 16, 4), torch.randn(1, 6, 16, 16)
    edited = labels.clone()
    edited[0, 3:6, 4:9] = 1
    norms = [SPADE(6, 4, 5).eval(), CGNorm(8, 4, 32, groups=4).eval()]
    segmap = one_hot(labels, 4, torch.float32)
    symbols = labels.int() + 1

    def found() -> list[Tensor]:
        layouts = [LabelLayout.from_labels(m, 4, edges=m == 2) for m in (labels, edited)]
        vectors, windows = layouts[0].vectors, layouts[0].level((16, 16)).windows3
        every = [layouts[0].dense((7, 5)), layouts[0].patches((16, 16)),
                 match_windows(*layouts, (16, 16), reach=2)]
        with use_path("two_level"):
            every += [norms[0](x, segmap), norms[1](torch.cat([x, x], 1)[:, :8], segmap)]
        for backend in ("cpu", "reference"):
            every += label_windows.group_windows(vectors, windows, [(0, 2), (2, 4)],
                                                 backend=backend)
            for map in (segmap, segmap * float("nan")):
                every += label_windows.number_vectors(map, 9, backend=backend)
            every += label_windows.number_windows(symbols, 256, backend=backend)
        levels, counts = label_windows.number_levels(symbols, [(8, 8)], [64], backend="reference")
        return [*every, *levels[0], counts]

    with torch.no_grad():
        expected = found()
        with torch.device(default):
            for a, b in zip(found(), expected, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


@needs_cpu
def test_compiles_a_mapping_and_kept_tables_without_a_graph_break() -> None:
    norm, x = SPADE(6, 4, 5).eval().requires_grad_(False), torch.randn(1, 6, 16, 16)
    layout = LabelLayout.from_labels(blocky(1, 16, 16, 4), 4)
    layout.tables = TableCache()

    def call(x: Tensor) -> Tensor:
        with use_path("two_level"):
            return norm(x, layout) + norm(x, layout.map_vectors(torch.clone))

    expected = call(x)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x),
                               expected)
