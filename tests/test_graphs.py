"""Pictures as CUDA graphs: on a CPU the graph is a trace of ATen calls, which is as rigid.

``make_fx`` records the very tensors that a call reads, as a CUDA graph records their addresses, and
refuses what a capture refuses: values that steer Python.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smis_kernels import SPADE, LabelLayout, explain, use_backend, use_path
from smis_kernels.acceleration.prepared import Prepared
from smis_kernels.layout import shared_tables
from smis_kernels.layout.levels import nearest_source
from smis_kernels.layout.static_layout import StaticLayout, capacity
from smis_kernels.runtime import constants, graphs
from smis_kernels.runtime.backend import missing
from smis_models import Synthesizer, create_model
from smis_models.benchmark import timing
from smis_models.data.scenes import sample_scene
from smis_models.synthesis.graphs import GraphedGenerator, PictureReplays

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
MODELS: dict[str, dict[str, Any]] = {
    "groupdnet_deepfashion": {"ngf": 8, "image_size": (64, 64)},
    "groupdnet_cityscapes": {"ngf": 70, "image_size": (64, 128)},
    "spade_coco": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
    "spade_coco_vae": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
    "ccfpse_coco": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
}


class Recorder:
    """Stands for :func:`~smis_kernels.runtime.graphs.capture`; counts captures and replays."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def __call__(self, call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        self.recorded += 1
        out, graph = call(), make_fx(lambda: call())()

        def replay() -> Tensor:
            self.replays += 1
            return out.copy_(graph())

        return replay


def graphed(name: str) -> tuple[Synthesizer, Synthesizer, Recorder]:
    """A Synthesizer that replays, and one that does not, of one model."""
    generator = create_model(name, part="generator", init_gain=1.0, **MODELS[name]).double().eval()
    fast, plain = (Synthesizer(generator, *maps(generator.preset, 0), prediction_bytes=0)
                   for _ in range(2))
    recorder = Recorder()
    fast._replays = PictureReplays(recorder)
    return fast, plain, recorder


def agree(fast: Synthesizer, plain: Synthesizer, seeds: range) -> None:
    for seed in seeds:
        torch.testing.assert_close(fast.sample(seed=seed), plain.sample(seed=seed))


def maps(preset: Any, seed: int) -> tuple[Tensor, Tensor | None]:
    scene = sample_scene("street", *preset.image_size, preset.classes, seed)
    labels, ids = (torch.from_numpy(m.astype("int64"))[None]
                   for m in (scene.labels, scene.instances))
    return labels, ids if preset.instance_edge else None


@pytest.mark.parametrize("name", MODELS)
def test_replays_are_the_model(name: str) -> None:
    fast, plain, recorder = graphed(name)
    agree(fast, plain, range(1))
    assert recorder.recorded == 0  # a layout that is painted once pays for nothing
    agree(fast, plain, range(1, 2))
    compared = recorder.replays
    assert compared == (1 if plain.code(0) is None else 2)
    agree(fast, plain, range(2, 5))
    assert (recorder.recorded, recorder.replays) == (1, compared + 3)
    assert fast._replays is not None and fast._replays.failed is None


@pytest.mark.parametrize("name", ["groupdnet_cityscapes", "spade_coco", "ccfpse_coco"])
def test_an_edit_is_loaded_into_the_same_graph(name: str) -> None:
    fast, plain, recorder = graphed(name)
    agree(fast, plain, range(3))
    labels, ids = maps(fast._preset, 0)
    labels[0, 20:30, 10:40] = (int(labels[0, 25, 25]) + 1) % fast._preset.classes
    for made in (fast, plain):
        made.update(labels, ids)
    before = recorder.replays
    agree(fast, plain, range(4))
    assert (recorder.recorded, recorder.replays) == (1, before + 3)  # compared, and two


def test_what_does_not_fit_is_captured_anew() -> None:
    fast, plain, recorder = graphed("spade_coco")
    agree(fast, plain, range(2))
    labels = torch.randint(183, (1, 64, 64), generator=torch.Generator().manual_seed(0))
    ids = maps(fast._preset, 0)[1]
    for made in (fast, plain):
        made.update(labels, ids)
    agree(fast, plain, range(3))
    assert recorder.recorded == 2


def test_pictures_are_not_overwritten_by_later_ones() -> None:
    fast, plain, _ = graphed("groupdnet_deepfashion")
    kept = [fast.sample(seed=seed) for seed in range(5)]
    for seed, image in enumerate(kept):
        torch.testing.assert_close(image, plain.sample(seed=seed))
    frames = fast.morph(fast.code(0), fast.code(1), steps=3)
    torch.testing.assert_close(frames, plain.morph(plain.code(0), plain.code(1), steps=3))


def test_a_graph_writes_to_no_code_that_is_given() -> None:
    fast, _, recorder = graphed("spade_coco_vae")
    codes = [fast.code(seed) for seed in range(3)]
    before = [code.clone() for code in codes]
    for code in codes:
        fast.sample(code)
    assert recorder.replays > 1
    assert all(torch.equal(a, b) for a, b in zip(codes, before, strict=True))


def test_a_code_of_another_shape_is_refused() -> None:
    fast, plain, _ = graphed("spade_coco_vae")
    agree(fast, plain, range(3))
    code = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"z: expected \(1, 256\), .* got \(1, 1\)"):
        fast.sample(code)
    assert fast._replays is not None and fast._replays._graphed is not None
    with pytest.raises(ValueError, match=r"z: expected \(1, 256\), got \(1, 1\)"):
        fast._replays._graphed(code)


def test_a_model_on_the_cpu_is_refused() -> None:
    generator = create_model("spade_coco", part="generator", **MODELS["spade_coco"])
    with pytest.raises(ValueError, match="cuda_graph: expected a model on a GPU, got one on cpu"):
        Synthesizer(generator, *maps(generator.preset, 0), cuda_graph=True)


@pytest.mark.parametrize("path", ["one_level", "two_level", "dense"])
def test_buffers_hold_every_path(path: str) -> None:
    generator = create_model("spade_coco", part="generator", **MODELS["spade_coco"]).double()
    with use_path(path), torch.no_grad():
        made = Synthesizer(generator, *maps(generator.preset, 0))
        expected = made.sample()
        recorder = Recorder()
        fast = GraphedGenerator(made._generator, made.layout, None, recorder)
        torch.testing.assert_close(fast(None), expected)
        assert StaticLayout(made.layout).fits(made.layout)


def test_buffers_of_a_layout_take_other_vectors() -> None:
    pixels = torch.arange(400).view(1, 20, 20)
    few, other, many = (LabelLayout.from_labels(pixels % count + first, 400)
                        for count, first in ((2, 0), (2, 7), (400, 0)))
    assert not StaticLayout(few).fits(many)
    for layout in (few, other):
        layout.level((20, 20))
    static = StaticLayout(few)
    assert static.fits(other)
    exact = LabelLayout(other.symbols, other.vectors.double() / 3)
    exact.level((20, 20))
    assert not static.fits(exact)  # whose values would be rounded
    static.load(other)
    assert torch.equal(static.layout.dense(), other.dense())


def test_buffers_have_room_for_edits() -> None:
    assert all(n < capacity(n) and capacity(n) % 64 == 0 for n in (1, 63, 64, 1000, 12345))


@pytest.mark.parametrize(("size", "source"), [(7, 5), (256, 256), (8, 256), (100, 37), (3, 1000)])
def test_nearest_source_is_interpolate(size: int, source: int) -> None:
    x = torch.arange(source, dtype=torch.float32).view(1, 1, 1, source)
    expected = torch.nn.functional.interpolate(x, (1, size), mode="nearest").flatten().long()
    assert torch.equal(nearest_source(size, source, torch.device("cpu")), expected)


def test_a_layout_can_be_resized_inside_a_capture() -> None:
    layout = LabelLayout.from_labels(torch.arange(64).view(1, 8, 8) // 9, 8)
    graph = make_fx(lambda: layout.dense((3, 5)))()
    assert torch.equal(graph(), layout.dense((3, 5)))


class Context:
    """Stands for what a capture asks torch.cuda for."""

    modes: ClassVar[list[str]] = []
    streams: ClassVar[list[Any]] = []  # that were made current by hand

    def __init__(self, *_: Any, capture_error_mode: str = "global", **__: Any) -> None:
        if isinstance(self, Capture):
            self.modes.append(capture_error_mode)

    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def replay(self) -> None: ...


class Capture(Context):
    fails = False

    def __exit__(self, *_: Any) -> None:
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[Context]:
    for name in ("device", "stream", "Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Context)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_stream", Context.streams.append)
    Context.modes.clear(), Context.streams.clear()
    return Context


def test_a_capture_minds_its_own_thread_only(cuda: type[Context]) -> None:
    """In the global mode another thread's allocation breaks a capture."""
    calls: list[int] = []
    assert graphs.capture(lambda: calls.append(1) or 7, torch.device("cuda", 0))() == 7
    assert len(calls) == graphs.WARM_UPS + 1
    timing.graphed([lambda: calls.append(2)])()
    assert cuda.modes == ["thread_local"] * 2
    root = Path(graphs.__file__).parents[2]
    for path in (p for top in ("smis_kernels", "smis_models", "benchmarks", "tests/gpu")
                 for p in (root / top).rglob("*.py")):
        for line in path.read_text().splitlines():
            if "torch.cuda.graph(" in line:
                assert "thread_local" in line, path


def test_a_capture_that_fails_leaves_the_stream_as_it_was(
        cuda: type[Context], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not, where the end of a capture raises; its allocator goes on asking the graph."""
    monkeypatch.setattr(Capture, "fails", True)
    monkeypatch.setattr(graphs, "_broken", broken := [])
    current = Context()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.capture(lambda: 1, torch.device("cuda", 0))
    assert cuda.streams == [current] and len(broken) == 1
    monkeypatch.setattr(Capture, "fails", False)
    assert graphs.capture(lambda: 1, torch.device("cuda", 0))() == 1  # nothing is held


def test_calls_inside_a_capture_are_not_replayed(cuda: type[Context]) -> None:
    found: list[Any] = []
    with torch.no_grad():
        cpu = torch.device("cpu")
        graphs.capture(lambda: found.append(graphs.circumstances(cpu)), torch.device("cuda", 0))
        assert found == [None] * (graphs.WARM_UPS + 1)
        assert graphs.circumstances(cpu) is not None


def test_circumstances_tell_what_decides_how_a_call_runs() -> None:
    cpu = torch.device("cpu")
    assert graphs.circumstances(cpu) is None  # gradients
    with torch.no_grad():
        usual = graphs.circumstances(cpu)
        assert usual is not None and usual == graphs.circumstances(cpu)
        hash(usual)
        cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
        settings: list[tuple[Callable[[Any], Any], Any, Any]] = [
            (torch.set_default_dtype, torch.float64, torch.get_default_dtype()),
            (torch.use_deterministic_algorithms, True, False),
            (cuda.enable_flash_sdp, False, True), (cuda.enable_mem_efficient_sdp, False, True),
            (cuda.enable_math_sdp, False, True),
            *((partial(setattr, matmul, name), value, getattr(matmul, name)) for name, value in (
                ("fp32_precision", "tf32"), ("allow_fp16_reduced_precision_reduction", False),
                ("allow_bf16_reduced_precision_reduction", False),
                ("allow_fp16_accumulation", True)))]
        others: list[Any] = []
        for around in (use_backend("reference"), use_path("dense"), torch.inference_mode(),
                       torch.device("cpu"), torch.backends.cudnn.flags(enabled=False),
                       torch.backends.cudnn.flags(benchmark=True),
                       torch.backends.cudnn.flags(deterministic=True)):
            with around:
                others.append(graphs.circumstances(cpu))
        for change, value, before in settings:
            try:
                change(value)
                others.append(graphs.circumstances(cpu))
            finally:
                change(before)
        assert None not in others and usual not in others
        assert len(set(others)) == len(others)
        with torch.autocast("cpu", torch.bfloat16):
            assert graphs.circumstances(cpu) is None
        seen: list[Any] = []

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function: Any, _: Any, args: Any = (),
                                   kwargs: Any = None) -> Any:
                return function(*args, **(kwargs or {}))

        with Mode():
            seen.append(graphs.circumstances(cpu))
        make_fx(lambda x: (seen.append(graphs.circumstances(cpu)), x + 1)[1])(torch.ones(1))
        torch.vmap(lambda x: (seen.append(graphs.circumstances(cpu)), x)[1])(torch.ones(2))
        explain(lambda: (seen.append(graphs.circumstances(cpu)), torch.ones(1))[1])
        assert seen == [None] * 4
        assert graphs.circumstances(cpu) == usual


def test_what_a_replay_may_differ_by() -> None:
    x = torch.tensor([1.0, float("nan"), 3.0])

    def never() -> list[Tensor]:
        raise AssertionError

    assert graphs.difference([x.clone()], [x], never) is None
    assert graphs.difference([x[:0]], [x[:0]], never) is None
    close, far = x + torch.tensor([1e-6, 0, 0]), x + torch.tensor([1e-3, 0, 0])
    assert graphs.difference([close], [x], lambda: [x]) is not None
    assert graphs.difference([close], [x], lambda: [close]) is None  # as two calls do
    assert graphs.difference([far], [x], lambda: [close]) is not None
    number = x.nan_to_num(nan=2.0)
    for a, b in ((number, x), (x, number)):
        assert graphs.difference([a], [b], lambda: [a]) is not None  # noqa: B023
    assert graphs.difference([x.double()], [x], lambda: [x]) is not None
    assert graphs.difference([x[:2]], [x], lambda: [x]) is not None
    assert graphs.difference([torch.tensor([1, 2])], [torch.tensor([1, 3])],
                             lambda: [torch.tensor([1, 3])]) is not None


def stale(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A replay of what the capture read: no later code or map reaches it."""
    first = call().clone()
    return lambda: first


def fails(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(("record", "why"), [
    (stale, "a replay is .* from the call"),
    (fails, "operation not permitted when stream is capturing$")])
def test_a_graph_that_is_none_is_told_once(record: Any, why: str) -> None:
    fast, plain, _ = graphed("groupdnet_deepfashion")
    fast._replays = PictureReplays(record)
    agree(fast, plain, range(1))
    with pytest.warns(UserWarning, match=f"Synthesizer: no CUDA graph from now on: {why}"):
        agree(fast, plain, range(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(fast, plain, range(5))
    assert fast._replays.failed is not None and fast._replays._graphed is None


def test_an_edit_that_does_not_reach_the_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain, recorder = graphed("spade_coco")
    agree(fast, plain, range(3))
    labels, ids = maps(fast._preset, 0)
    labels[0, 20:30, 10:40] = (int(labels[0, 25, 25]) + 1) % fast._preset.classes
    for made in (fast, plain):
        made.update(labels, ids)
    monkeypatch.setattr(StaticLayout, "load", lambda *_: None)
    agree(fast, plain, range(1))
    with pytest.warns(UserWarning, match="no CUDA graph from now on: a replay is"):
        agree(fast, plain, range(1))
    agree(fast, plain, range(3))
    assert recorder.recorded == 1


def test_other_circumstances_are_painted_without_the_graph() -> None:
    fast, plain, recorder = graphed("groupdnet_deepfashion")
    agree(fast, plain, range(3))
    count = recorder.replays
    for around in (use_backend("reference"), torch.autocast("cpu", torch.bfloat16)):
        with around:
            torch.testing.assert_close(fast.sample(seed=7), plain.sample(seed=7))
    found: list[Tensor] = []
    assert fast._replays is not None
    with fast._replays._lock:  # as while another thread's picture is made
        thread = threading.Thread(target=lambda: found.append(fast.sample(seed=7)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], plain.sample(seed=7))
    assert recorder.replays == count
    agree(fast, plain, range(2))
    assert recorder.replays > count and recorder.recorded == 1


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda m: m.conv_img.bias.data.add_(1), lambda m: m.load_state_dict(m.state_dict()),
    lambda m: m.conv_img.register_forward_hook(lambda *_: None),
    lambda m: setattr(m.conv_img, "weight", torch.nn.Parameter(m.conv_img.weight + 1)),
], ids=["data", "loaded", "hook", "exchanged"])
def test_no_replay_outlives_the_weights(change: Callable[[Any], Any]) -> None:
    fast, plain, _ = graphed("groupdnet_deepfashion")
    agree(fast, plain, range(4))
    change(fast._source)
    with pytest.raises(RuntimeError, match="since this Synthesizer was made"):
        fast.sample(seed=1)


def test_copies_make_graphs_of_their_own() -> None:
    fast, plain, recorder = graphed("groupdnet_deepfashion")
    agree(fast, plain, range(3))
    held = fast._replays
    assert held is not None and held._graphed is not None
    for twin in (copy.deepcopy(held), pickle.loads(pickle.dumps(held)), copy.copy(held)):
        assert twin._graphed is None and twin._lock is not held._lock
    other = copy.deepcopy(fast)
    with pytest.raises(RuntimeError, match="since this Synthesizer was made"):
        other.sample()
    assert recorder.recorded == 1


def test_predictions_are_kept_in_place_of_a_graph() -> None:
    name = "ccfpse_coco"
    generator = create_model(name, part="generator", init_gain=1.0, **MODELS[name]).double().eval()
    fast, plain = (Synthesizer(generator, *maps(generator.preset, 0)) for _ in range(2))
    recorder = Recorder()
    fast._replays = PictureReplays(recorder)
    agree(fast, plain, range(4))
    assert recorder.recorded == 0 and fast._replays.failed is None


def test_a_cpu_has_no_graphs() -> None:
    generator = create_model("spade_coco", part="generator", **MODELS["spade_coco"])
    for options in ({}, {"cuda_graph": False}):
        assert Synthesizer(generator, *maps(generator.preset, 0), **options)._replays is None


def test_a_constant_that_a_capture_makes_is_in_its_graph_alone(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no value before a replay; and of weights written since the warm-up it is made anew."""
    weight = torch.nn.Parameter(torch.ones(3))
    store, made = constants.Store([weight]), []

    def doubled() -> Tensor:
        return constants.constant("doubled", lambda: made.append(1) or 2 * weight, weight)

    with torch.no_grad(), constants.using(store):
        for _ in range(2):
            doubled()
        assert len(made) == 1 and constants.kept("doubled", weight)
        weight.mul_(5)
        assert not constants.kept("doubled", weight)
        with monkeypatch.context() as capture:
            capture.setattr(constants, "capturing", lambda _: True)
            for _ in range(2):
                assert torch.equal(doubled(), torch.full((3,), 10.0))
            assert len(made) == 3 and not constants.kept("doubled", weight)
        for _ in range(2):
            assert torch.equal(doubled(), torch.full((3,), 10.0))
        assert len(made) == 4 and constants.kept("doubled", weight)


@pytest.mark.parametrize("change", ["nothing", "between"])
def test_weights_written_between_warm_up_and_capture(change: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing reads numbers of the host: in a capture each norm makes its own table."""
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SPADE(6, 5, 8), SPADE(6, 5, 8)

        def forward(self, x: Tensor, layout: LabelLayout) -> Tensor:
            return self.second(self.first(x, layout), layout)

    torch.manual_seed(0)
    network = Two().double().eval()
    layout = LabelLayout.from_labels(torch.arange(64).view(1, 8, 8) // 13, 5)
    layout = LabelLayout(layout.symbols, layout.vectors.double())
    x, prepared, packs = torch.randn(1, 6, 8, 8).double(), Prepared(network), []
    pack = shared_tables.pack
    monkeypatch.setattr(shared_tables, "SHARING", ("cpu",))
    monkeypatch.setattr(shared_tables, "pack", lambda c: (packs.append(len(c)), pack(c))[1])
    with torch.no_grad(), use_backend("cpu"), use_path("one_level"):
        for _ in range(3):
            with prepared.vouched():
                network(x, layout)
        assert packs == [2]
        if change == "between":
            network.first.mlp_gamma.weight.mul_(3)
        with monkeypatch.context() as capture:
            capture.setattr(shared_tables, "capturing", lambda _: True)
            capture.setattr(constants, "capturing", lambda _: True)
            with prepared.vouched():
                found = network(x, layout)
        assert packs == [2]
        with use_backend("reference"), use_path("auto"):
            torch.testing.assert_close(found, network(x, layout))
