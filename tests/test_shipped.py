"""The model that ships, on scenes that it never saw."""

from __future__ import annotations

import copy
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smis_kernels import LabelLayout, explain
from smis_kernels.ops.winograd_conv import choice
from smis_kernels.runtime.backend import missing
from smis_models import cli, create_model, shipped_weights
from smis_models.app.demo import speed
from smis_models.data import Collate, GeneratedScenes
from smis_models.data.scene_classifier import SceneClassifier
from smis_models.data.scenes import LANDSCAPE
from smis_models.metrics.distance import PixelDistance
from smis_models.metrics.diversity import diversity
from smis_models.metrics.protocols import DiversityProtocol
from smis_models.synthesis.scene import Scene

SCENES, SAMPLES = 8, 8


@pytest.fixture(scope="module")
def model() -> Any:
    return create_model(checkpoint=shipped_weights("groupdnet_scenes")).eval()


@pytest.fixture(scope="module")
def held_out(model: Any) -> Any:
    scenes = GeneratedScenes(SCENES, model.preset.image_size, "test")
    return Collate(model.preset)([scenes[i] for i in range(SCENES)])


@pytest.fixture(scope="module")
def readings(model: Any, held_out: Any) -> Any:
    """What the scenes' own classifier reads off samples of every layout."""
    judge = SceneClassifier.shipped()
    codes = [model.generator.sample_latent(SCENES, torch.Generator().manual_seed(s))
             for s in range(SAMPLES)]
    with torch.no_grad():
        return [judge.read(model(held_out["layout"], z), held_out["labels"]) for z in codes]


def test_it_is_what_the_zoo_lists(model: Any) -> None:
    assert model.name == "groupdnet_scenes"
    assert model.preset == create_model("groupdnet_scenes", device="meta").preset
    assert model.preset.groups[-1] == 1 and model.preset.image_size == (128, 128)
    assert shipped_weights("groupdnet_deepfashion") is None
    path = shipped_weights("groupdnet_scenes")
    assert path is not None and path.stat().st_size < 8e6


def test_a_class_varies_and_the_rest_holds(model: Any, held_out: Any) -> None:
    layouts = [Scene(name, labels.numpy().astype(np.int64), None)
               for name, labels in zip(held_out["name"], held_out["labels"], strict=True)]
    found = diversity(model, layouts, PixelDistance(),
                      DiversityProtocol(layouts=SCENES, samples=4, pairs=3))
    assert found.mcsd > 5 * found.mocd


def test_the_layout_is_read_back(readings: Any, held_out: Any) -> None:
    labels = held_out["labels"]
    ious = []
    for c in range(len(LANDSCAPE)):
        asked = labels == c
        both = sum(((r.labels == c) & asked).sum().item() for r in readings)
        either = sum(((r.labels == c) | asked).sum().item() for r in readings)
        ious.append(both / either)
    assert sum(ious) / len(ious) > 0.5


@pytest.mark.parametrize("name", LANDSCAPE)
def test_samples_reach_half_of_the_modes(name: str, readings: Any) -> None:
    c = LANDSCAPE.index(name)
    modes = torch.cat([r.modes[:, c] for r in readings])
    sure = torch.cat([r.confidence[:, c] for r in readings]) > 0.3
    seen, counts = modes[sure].unique(return_counts=True)
    assert len(seen[counts >= 2]) >= 2, (seen.tolist(), counts.tolist())


def test_a_code_that_is_encoded_paints_the_same_modes(model: Any, held_out: Any) -> None:
    judge = SceneClassifier.shipped()
    with torch.no_grad():
        mu, _ = model.encoder.encode(held_out["image"], held_out["labels"])
        read = judge.read(model(held_out["layout"], mu), held_out["labels"])
    shown = read.modes >= 0
    right = (read.modes == held_out["modes"])[shown].float().mean()
    assert right > 0.5  # by chance 0.25


@pytest.fixture
def smis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["smis", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert not end.value.code, (arguments, printed.out, printed.err)
        return printed.out

    return run


def test_the_demo_shows_trained_pictures(smis: Any, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    out = smis("demo", "--out", str(tmp_path / "demo"), "--samples", "2", "--scenes", "1")
    assert "groupdnet_scenes.safetensors, trained" in out
    html = (tmp_path / "demo/index.html").read_text()
    assert "<strong>random</strong>" not in html
    assert re.search(rf"only ({'|'.join(LANDSCAPE)}) gets a new code", html)
    # What the page tells to try next is what it says.
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^(?:<pre><code>)?(smis .*?)(?:</code></pre>)?$", html, re.M)
    assert {line.split()[1] for line in lines} >= {"scenes", "synthesize", "resample", "edit"}
    for line in lines:
        if "train" not in line:  # README's tour does
            smis(*shlex.split(unescape(line))[1:])


@pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_in_every_conv_keeps_the_picture(model: Any, held_out: Any, tile: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    z = model.generator.sample_latent(SCENES, torch.Generator().manual_seed(0))[:1]
    layout = LabelLayout.from_labels(held_out["labels"][:1], model.preset.classes)
    with torch.no_grad():
        truth = copy.deepcopy(model.generator).double()(layout, z.double())
        monkeypatch.setattr(choice, "form", lambda *_, **__: tile)
        ran = explain(model.generator, layout, z).choices
        assert sum(c.numbers.get("tile") == tile for c in ran) > 10
        error = (model.generator(layout, z) - truth).abs().max() / truth.abs().max()
    assert error < 2e-5


def test_the_speed_table_times_what_it_names(model: Any, held_out: Any,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Scene("scene", held_out["labels"][0].numpy().astype(np.int64), None)
    z = model.generator.sample_latent(1, torch.Generator().manual_seed(0))
    encoded = []
    encode = type(model.encoder).encode
    monkeypatch.setattr(type(model.encoder), "encode", lambda *a: encoded.append(1) or encode(*a))
    stages = {s.name.split(",")[0].split(" (")[0]: s for s in speed(model, layout, z, 0.1)}
    assert len(encoded) >= 2 * 3  # as applications encode: present classes only
    whole, parts = stages["generator"], (stages["modulation"], stages["main convs"])
    for side in ("reference", "fused"):
        spent = [getattr(part, side) for part in parts]
        assert min(spent) > 0
        assert sum(spent) == pytest.approx(getattr(whole, side), rel=0.5)
