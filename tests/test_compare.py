"""The comparison: one step of each system, resumed, its tables; sizes matched; mistakes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from examples.compare import SYSTEMS, Settings, compare, found_order, markdown, small_preset
from examples.compare.__main__ import app
from examples.compare.systems import parameters
from examples.compare.train import train_system
from smis_kernels import use_backend
from smis_models import cli, create_model
from smis_models.data import GeneratedScenes
from smis_models.data.scene_classifier import SceneClassifier
from smis_models.io.seeds import derived_seed
from smis_models.metrics import PixelDistance
from smis_models.metrics.sampling import sample_codes
from smis_models.synthesis.codes import drawn_code
from smis_models.training import NonFiniteLoss, Trainer

TINY = {"width": 4, "ndf": 4, "batch": 2, "workers": 0, "layouts": 1, "samples": 2, "pairs": 1,
        "pictures": 2, "seconds": 0.0}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """All systems, one step each."""
    folder = tmp_path_factory.mktemp("compared")
    steps = []
    result = compare(Settings(minutes=0, **TINY), folder, [PixelDistance()],
                     report=lambda name, progress, left: steps.append((name, progress.step)))
    return folder, result, steps


def test_one_step_of_each(compared):
    folder, result, steps = compared
    assert steps == [(name, 1) for name in SYSTEMS]
    assert json.loads((folder / "comparison.json").read_text())["systems"].keys() == SYSTEMS.keys()
    for name, row in result["systems"].items():
        assert (row["steps"], row["images"]) == (1, 2), name
        assert row["fps"] > 0 and row["fps_reference"] > 0
        assert row["training_memory"] > row["memory"] > 0
        found = row["diversity"]["pixel L1"]
        assert found["class_codes"] == (name not in ("VSPADE", "BicycleGAN", "DSCGAN"))
        assert "fid" not in row


def painted(model, labels, codes):
    """Pictures of one layout, by the plain generator on one-hot planes."""
    with torch.no_grad(), use_backend("reference"):
        return model(model.semantics(labels[None]).repeat(len(codes), 1, 1, 1), codes)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_measures_are_of_the_weights_in_the_folder(compared, name):
    """The distance of two pictures, and mIoU of scikit-learn's confusion matrix."""
    folder, result, _ = compared
    (weights,) = (folder / name).glob("*.safetensors")
    model = create_model(checkpoint=weights).eval()
    scenes = GeneratedScenes(2, 64, "test", 0)
    first, second = painted(model, scenes[0]["labels"],
                            sample_codes(model, 2, derived_seed(0, 0)))
    found = result["systems"][name]
    assert found["diversity"]["pixel L1"]["diversity"] == pytest.approx(
        float((first - second).abs().mean()) / 2, rel=1e-4, abs=1e-7)
    matrix = np.zeros((8, 8))
    for i in range(2):
        picture = painted(model, scenes[i]["labels"], drawn_code(model, derived_seed(0, i)))
        read = SceneClassifier.shipped().read(picture).labels
        matrix += confusion_matrix(scenes[i]["labels"].flatten(), read.flatten(),
                                   labels=range(8))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    expected = (matrix.diagonal()[union > 0] / union[union > 0]).mean()
    assert found["segmentation"]["miou"] == pytest.approx(expected, abs=2e-3)


def test_the_report_says_what_it_is_of(compared):
    folder, result, _ = compared
    text = (folder / "comparison.md").read_text()
    assert text == markdown(result)
    for words in ("0 minutes", "SHE is a study with people and left out", "FID is left out",
                  "No distance above is LPIPS", "perceptual loss off", "mCSD, pixel L1"):
        assert words in text
    assert all(f"| {name} |" in text for name in SYSTEMS)


def test_the_order_is_the_one_found(compared):
    _, result, _ = compared
    found, published = found_order(result)["mCSD"]
    values = [result["systems"][name]["diversity"]["pixel L1"]["mcsd"] for name in found]
    assert values == sorted(values, reverse=True)
    assert published[:2] == ["BicycleGAN", "VSPADE"]
    assert found_order(result)["mOCD"][1][0] == "GroupNet"
    swapped = json.loads(json.dumps(result))
    rows = swapped["systems"]
    rows[found[0]]["diversity"], rows[found[-1]]["diversity"] = (
        rows[found[-1]]["diversity"], rows[found[0]]["diversity"])
    assert found_order(swapped)["mCSD"][0][0] == found[-1]


def test_a_comparison_goes_on_where_it_stopped(compared, tmp_path):
    config = Settings(minutes=0, **TINY).config("GroupDNet")
    first = train_system(config, tmp_path / "run", 0)
    again = train_system(config, tmp_path / "run", 0)  # no time is left: nothing is trained
    assert (first.steps, again.steps) == (1, 1)
    assert again.seconds == pytest.approx(first.seconds, abs=0.01)
    longer = train_system(config, tmp_path / "run", (first.seconds + 0.01) / 60)
    assert longer.steps > 1
    assert longer.seconds > first.seconds
    spent = (tmp_path / "run/spent.csv").read_text().splitlines()
    assert int(spent[0].split(",")[0]) == 1


def test_a_loss_that_becomes_nan_ends_one_system_at_its_checkpoint(compared, tmp_path, monkeypatch):
    config = Settings(minutes=0, **TINY).config("GroupDNet")
    first = train_system(config, tmp_path / "run", 0)

    def fail(*_):
        raise NonFiniteLoss("losses.gan: became nan in step 2")

    monkeypatch.setattr(Trainer, "step", fail)
    ended = train_system(config, tmp_path / "run", 1)
    assert (ended.steps, ended.failure) == (first.steps, "losses.gan: became nan in step 2")
    with pytest.raises(NonFiniteLoss):
        train_system(config, tmp_path / "other", 1)
    _, result, _ = compared
    broken = json.loads(json.dumps(result))
    broken["systems"]["GroupDNet"] |= {"failure": ended.failure}
    assert "GroupDNet ended before its time, after 1 steps: losses.gan" in markdown(broken)


def test_the_command_prints_what_it_found(compared, monkeypatch, capsys):
    folder, *_ = compared
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    options = {name: value for name, value in TINY.items() if name != "seconds"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", [
        "compare", "--minutes-per-model", "0", "--only", "GroupDNet", "--distance", "pixel",
        "--speed-seconds", "0", "--out", str(folder), *words])
    with pytest.raises(SystemExit) as end:
        cli.main(app)
    out = capsys.readouterr().out
    assert not end.value.code
    assert "mCSD, best first: GroupDNet (published: GroupDNet)" in out
    assert "SHE is a study with people" in out


def test_a_folder_of_another_comparison_is_refused(compared):
    folder, *_ = compared
    with pytest.raises(ValueError, match=r"out: .* holds a comparison with width 4, not 8"):
        compare(Settings(minutes=0, **{**TINY, "width": 8}), folder, [])


@pytest.mark.parametrize("name", SYSTEMS)
def test_parameters_keep_the_published_ratio(name):
    ours, reference = (parameters(small_preset(n, 64, 20, 32)) for n in (name, "GroupDNet"))
    published = SYSTEMS[name].published.parameters / SYSTEMS["GroupDNet"].published.parameters
    assert ours / reference == pytest.approx(published, rel=0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes-per-model", "-1"), r"minutes-per-model|Invalid value"),
        (("--minutes-per-model", "0", "--only", "SPADE"), r"only: expected of MulNet"),
        (("--minutes-per-model", "0", "--size", "70"), r"size: expected a multiple of 32"),
        (("--minutes-per-model", "0", "--distance", "vgg"), r"distance: expected one of"),
        (("--minutes-per-model", "0", "--inception-weights", "no.pth"), r"no\.pth is no file"),
    ],
)
def test_a_mistake_is_named_before_any_work(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setattr("sys.argv", ["compare", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main(app)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
