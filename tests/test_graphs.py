"""Pictures as CUDA graphs: on a CPU the graph is a trace of ATen calls, which is as rigid.

``make_fx`` records the very tensors that a call reads, as a CUDA graph records their addresses, and
refuses what a capture refuses: values that steer Python.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from smis_kernels import LabelLayout, use_path
from smis_kernels.layout.label_layout import nearest_source
from smis_kernels.runtime.backend import missing
from smis_models import Synthesizer, create_model
from smis_models.benchmark import timing
from smis_models.data.scenes import sample_scene
from smis_models.synthesis import graphs
from smis_models.synthesis.graphs import GraphedGenerator, StaticLayout, capacity

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
MODELS: dict[str, dict[str, Any]] = {
    "groupdnet_deepfashion": {"ngf": 8, "image_size": (64, 64)},
    "groupdnet_cityscapes": {"ngf": 70, "image_size": (64, 128)},
    "spade_coco": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
    "spade_coco_vae": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
    "ccfpse_coco": {"ngf": 4, "hidden": 8, "image_size": (64, 64)},
}


class Recorder:
    """Stands for :func:`~smis_models.synthesis.graphs.capture`; counts what it records."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        self.recorded += 1
        out, graph = call(), make_fx(lambda: call())()
        return lambda: out.copy_(graph())


def graphed(name: str) -> tuple[Synthesizer, Synthesizer, Recorder]:
    """A Synthesizer that replays, and one that does not, of one model."""
    generator = create_model(name, part="generator", init_gain=1.0, **MODELS[name]).double().eval()
    made = [Synthesizer(generator, *maps(generator.preset, 0)) for _ in range(2)]
    recorder = Recorder()
    made[0]._record = recorder
    return made[0], made[1], recorder


def maps(preset: Any, seed: int) -> tuple[Tensor, Tensor | None]:
    scene = sample_scene("street", *preset.image_size, preset.classes, seed)
    labels, ids = (torch.from_numpy(m.astype("int64"))[None]
                   for m in (scene.labels, scene.instances))
    return labels, ids if preset.instance_edge else None


@pytest.mark.parametrize("name", MODELS)
def test_replays_are_the_model(name: str) -> None:
    fast, plain, recorder = graphed(name)
    for seed in (0, 1, 2):
        torch.testing.assert_close(fast.sample(seed=seed), plain.sample(seed=seed))
    assert recorder.recorded == 1


@pytest.mark.parametrize("name", ["groupdnet_cityscapes", "spade_coco", "ccfpse_coco"])
def test_an_edit_is_loaded_into_the_same_graph(name: str) -> None:
    fast, plain, recorder = graphed(name)
    fast.sample(seed=0)
    labels, ids = maps(fast._preset, 0)
    labels[0, 20:30, 10:40] = int(labels[0, 0, 0])
    for made in (fast, plain):
        made.update(labels, ids)
    for seed in (0, 1):
        torch.testing.assert_close(fast.sample(seed=seed), plain.sample(seed=seed))
    assert recorder.recorded == 1


def test_what_does_not_fit_is_captured_anew() -> None:
    fast, plain, recorder = graphed("spade_coco")
    fast.sample()
    labels = torch.randint(183, (1, 64, 64), generator=torch.Generator().manual_seed(0))
    ids = maps(fast._preset, 0)[1]
    for made in (fast, plain):
        made.update(labels, ids)
    for seed in (0, 1):
        torch.testing.assert_close(fast.sample(seed=seed), plain.sample(seed=seed))
    assert recorder.recorded == 2


def test_pictures_are_not_overwritten_by_later_ones() -> None:
    fast, plain, _ = graphed("groupdnet_deepfashion")
    kept = [fast.sample(seed=seed) for seed in (0, 1, 2)]
    for seed, image in enumerate(kept):
        torch.testing.assert_close(image, plain.sample(seed=seed))
    frames = fast.morph(fast.code(0), fast.code(1), steps=3)
    torch.testing.assert_close(frames, plain.morph(plain.code(0), plain.code(1), steps=3))


def test_a_code_of_another_shape_is_refused() -> None:
    fast, _, _ = graphed("spade_coco_vae")
    fast.sample()
    with pytest.raises(ValueError, match=r"z: expected \(1, 256\), got \(1, 1\)"):
        fast.sample(torch.zeros(1, 1, dtype=torch.float64))


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


def test_a_capture_minds_its_own_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the global mode another thread's allocation breaks a capture."""
    modes: list[str] = []

    class Context:
        def __init__(self, *_: Any, capture_error_mode: str = "global", **__: Any) -> None:
            if type(self) is Capture:
                modes.append(capture_error_mode)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...
        def wait_stream(self, _: Any) -> None: ...
        def replay(self) -> None: ...

    class Capture(Context): ...

    for name in ("device", "stream", "Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Context)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    calls: list[int] = []
    assert graphs.capture(lambda: calls.append(1) or 7, torch.device("cuda", 0))() == 7
    assert len(calls) == graphs.WARM_UPS + 1
    timing.graphed([lambda: calls.append(2)])()
    assert modes == ["thread_local"] * 2
    root = Path(graphs.__file__).parents[2]
    for path in (p for top in ("smis_kernels", "smis_models", "benchmarks", "tests/gpu")
                 for p in (root / top).rglob("*.py")):
        for line in path.read_text().splitlines():
            if "torch.cuda.graph(" in line:
                assert "thread_local" in line, path
