"""Files and calls as people have them: one writer a folder, class names, runs as checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smis_kernels import SPADE, LabelLayout, class_crops, instance_avg_pool2d, modulation, norm_act
from smis_models import CheckpointError, cli, create_model, save_checkpoint
from smis_models.data import build_dataset, list_scenes
from smis_models.data.classes import class_colours, class_index, class_names, class_note
from smis_models.data.doctor import examine, find_splits
from smis_models.data.write import write_scenes
from smis_models.families import list_models
from smis_models.io import animation, provenance
from smis_models.io.files import (
    LOCK,
    UNFINISHED,
    file_hash,
    locked,
    remove_partial,
    replacing,
    unfinished,
)
from smis_models.io.images import write_indices, written_here
from smis_models.io.names import map_files
from smis_models.io.sheet import captioned, legend
from smis_models.synthesis.edits import painted, parse_takes, relabelled
from smis_models.synthesis.features import FeatureClusters
from smis_models.synthesis.scene import Scene
from smis_models.synthesis.shapes import exchange_shape
from smis_models.training import RECIPES, load_config, to_json

SMALL = {"ngf": 8, "nef": 8}


@pytest.fixture
def smis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line; its exit code, stdout and stderr."""
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)

    def run(*arguments: Any) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["smis", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A landscape's label map."""
    labels = np.arange(128)[:, None].repeat(128, 1) // 16
    write_indices(tmp_path / "map.png", labels)
    return tmp_path / "map.png"


class _Killed(BaseException):
    pass


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """A folder as `smis train` leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint(create_model("groupdnet_scenes", seed=3, init_gain=1.0, **SMALL),
                    folder / "model.safetensors")
    (folder / "config.json").write_text(to_json(load_config(
        "groupdnet_scenes_codes", ["--network.ngf", "8", "--network.nef", "8"])))
    return folder


# One writer a folder.

def test_a_second_process_is_refused_by_the_firsts_number(tmp_path: Path, smis: Any,
                                                          layout: Path) -> None:
    code = ("import sys, time; from smis_models.io.files import locked\n"
            "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        status, _, error = smis("synthesize", "--model", "groupdnet_scenes", "--labels", layout,
                                "--out", tmp_path / "out")
        assert (status, error.count("\n")) == (2, 1)
        assert f"process {first.pid} is writing to" in error
        first.communicate("")
    assert smis("synthesize", "--model", "groupdnet_scenes", "--labels", layout, "--out",
                tmp_path / "out")[0] == 0
    assert LOCK not in os.listdir(tmp_path / "out")


@pytest.mark.parametrize("command", [
    ("mix", "--images", "x", "--image-labels", "x"), ("edit", "--relabel", "0=1"), ("morph",),
    ("resample", "--class", "0"), ("synthesize",), ("demo",)])
def test_every_painting_command_takes_the_lock(command: tuple[str, ...], tmp_path: Path, smis: Any,
                                               layout: Path) -> None:
    with locked(tmp_path / "out"):
        code, _, error = smis(*command, "--model", "groupdnet_scenes", "--labels", layout, "--out",
                              tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert f"process {os.getpid()} is writing to" in error


@pytest.mark.parametrize("command", [
    ("scenes",), ("convert-labels", "data"), ("benchmark",), ("train",)])
def test_every_other_writer_takes_the_lock(command: tuple[str, ...], tmp_path: Path, smis: Any,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_indices("data/a.png", np.zeros((4, 4), np.int64))
    given: dict[str, list[Any]] = {
        "benchmark": ["--set", "modulation", "--out", "out"],
        "train": ["groupdnet_scenes_codes", "--network.ngf", "8", "--network.nef", "8",
                  "--data.count", "2", "--out", "out"]}
    with locked("out"):
        code, _, error = smis(*command, *given.get(command[0], ["out"]))
    assert (code, error.count("\n")) == (2, 1)
    assert "is writing to" in error


def test_the_lock_leaves_nothing_and_removes_what_killed_runs_left(tmp_path: Path) -> None:
    with locked(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a").exists()
    out = tmp_path / "out"
    out.mkdir()
    (out / ".grid.png.smis-ab12cd_9").touch()
    (out / ".x.json.smis-ab12cd_9").mkdir()
    mine = [".grid.png.ab12cd_9", ".settings.json.template", ".vscode.settings", "mine.png"]
    for name in mine:
        (out / name).touch()
    with locked(out):
        pass
    assert sorted(os.listdir(out)) == mine


def test_what_is_half_written_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with replacing(tmp_path / "new" / "a.json") as partial:
        kept = partial.with_name(partial.name)
        partial.write_text("{}")
        (tmp_path / "new" / ".b").touch()
        names = os.listdir(tmp_path / "new")
        remove_partial(tmp_path / "new", "*.json")  # as another process would, of a killed one
        assert not kept.exists() and ".b" in names
        partial.write_text("{}")
    assert (tmp_path / "new" / "a.json").read_text() == "{}"


def test_a_file_is_whole_on_the_disk_and_as_readable_as_others(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, synced, fsync = bytes(range(256)) * 8192 + b"tail", [], os.fsync

    def counting(handle: int) -> None:
        synced.append(os.fstat(handle).st_size)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counting)
    (tmp_path / "plain").touch()
    for sync in (False, True):
        with replacing(tmp_path / "made", sync=sync) as partial:
            partial.write_bytes(content)
        assert synced == [len(content)] * sync
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert file_hash(tmp_path / "made") == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_tells_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "smis_models/io/provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(place))
    place.parent.mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    found = provenance.commit.__wrapped__
    assert found() == head.stdout[:12]
    (tmp_path / "pyproject.toml").write_text("changed")
    assert found() == f"{head.stdout[:12]}-dirty"
    (tmp_path / "pyproject.toml").unlink()  # an installed copy inside somebody's repository
    assert found() == "unknown"


def test_a_record_tells_kinds_of_one_name_apart():
    core = "model name\t: AMD EPYC\ncpu family\t: {}\nmodel\t\t: 2\n\n"
    old, new = (provenance._processor_of(2 * core.format(family)) for family in (25, 26))
    assert (old, new) == ("AMD EPYC (family 25 model 2), 2 cores",
                          "AMD EPYC (family 26 model 2), 2 cores")
    assert provenance._processor_of("model name : M1\n") == "M1, 1 cores"
    assert provenance._processor_of("").endswith(", unknown cores")


def test_what_is_read_is_never_written_over(tmp_path: Path, smis: Any, layout: Path) -> None:
    other = layout.with_name("edit_1.png")
    other.write_bytes(layout.read_bytes())
    code, _, error = smis("edit", "--model", "groupdnet_scenes", "--labels", layout, "--to", other,
                          "--out", tmp_path)
    assert (code, error.count("\n")) == (2, 1) and "edit_1.png is read" in error
    code, _, error = smis("synthesize", "--model", "groupdnet_scenes", "--labels", tmp_path,
                          "--out", tmp_path)
    assert (code, error.count("\n")) == (2, 1) and "folder of the label maps" in error
    pictures, labels = tmp_path / "pictures", tmp_path / "labels"
    for name in ("morph_0", "exchange_1"):
        for folder in (pictures, labels):
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.png").write_bytes(layout.read_bytes())
    given = ("--model", "groupdnet_scenes", "--labels", layout)
    encoded = ("--images", pictures, "--image-labels", labels)
    for words in (("mix", *encoded), ("morph", *encoded), ("resample", "--class", 1, *encoded),
                  ("edit", "--relabel", "1=2", *encoded),
                  ("edit", "--exchange", 1, "--library", labels)):
        out = labels if "--library" in words else pictures
        code, _, error = smis(*words, *given, "--out", out)
        assert (code, error.count("\n")) == (2, 1) and "is read, and would be" in error, words
    grids = tmp_path / "grids"
    grids.mkdir()
    for name in ("grid", "0"):
        (grids / f"{name}.png").write_bytes(layout.read_bytes())
    for words in (("synthesize", "--labels", grids / "grid.png"), ("demo", "--labels", grids)):
        code, _, error = smis(*words, "--model", "groupdnet_scenes", "--out", grids)
        assert (code, error.count("\n")) == (2, 1) and "is read, and would be" in error, words
    for words, name in (
        (("synthesize", "--labels", layout, "--instances"), "grid"),
        (("edit", "--relabel", "1=2", "--labels", layout, "--instances"), "edit_1"),
        (("edit", "--labels", layout, "--to", layout, "--to-instances"), "edit_1"),
        (("edit", "--labels", layout, "--exchange", 1, "--library", labels,
          "--library-instances"), "exchange_1"),
    ):
        ids = grids / f"{name}.png"
        ids.write_bytes(layout.read_bytes())
        code, _, error = smis(*words, ids, "--model", "pix2pixhd_cityscapes", "--out", grids)
        assert (code, error.count("\n")) == (2, 1) and "is read, and would be" in error, words
    for folder in (pictures, labels, grids):
        assert all(path.read_bytes() == layout.read_bytes() for path in folder.glob("*.png"))
    grey = tmp_path / "grey.png"
    Image.new("RGB", (4, 4), (1, 1, 1)).save(grey)
    before = grey.read_bytes()
    for source, out in ((grey, tmp_path), (tmp_path, tmp_path)):
        code, _, error = smis("convert-labels", source, out)
        assert (code, error.count("\n")) == (2, 1) and "over itself" in error
    assert grey.read_bytes() == before
    assert other.read_bytes() == layout.read_bytes()


def test_one_map_is_never_converted_over_another(tmp_path: Path, smis: Any) -> None:
    source, below = tmp_path / "maps", tmp_path / "maps/below"
    for folder, index in ((source, 1), (below, 2)):
        write_indices(folder / "a.png", np.full((4, 4), index))
    (tmp_path / "link").symlink_to(source)
    before = (below / "a.png").read_bytes()
    for given, out in ((source, below), (source, tmp_path / "link/below"), (below, source),
                       (tmp_path / "link", source), (source / "a.png", tmp_path / "link")):
        code, _, error = smis("convert-labels", given, out)
        assert (code, error.count("\n")) == (2 if given != below else 0, given != below), error
        assert given == below or "written over" in error
        write_indices(source / "a.png", np.full((4, 4), 1))
    assert (below / "a.png").read_bytes() == before
    assert sorted(os.listdir(source)) == ["a.png", "below"]


def test_a_file_that_is_written_is_none_that_is_read(tmp_path: Path, smis: Any,
                                                    layout: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_checkpoint(create_model("groupdnet_scenes", **SMALL), weights)
    (tmp_path / "link").symlink_to(tmp_path)
    clusters = FeatureClusters({0: np.zeros((1, 3), np.float32)}).save(tmp_path / "c.npz")
    data, = write_scenes(tmp_path / "data", {"train": 2}, 256)
    listed, = list_scenes("folder", data, "train").records[:1]
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    (predicted / layout.name).write_bytes(layout.read_bytes())
    measured = ("evaluate", "--checkpoint", weights, "--distance", "none")
    maps, scenes = ("--labels", layout), ("--dataset", "folder", "--root", data, "--split",
                                            "train")
    linked = tmp_path / "link" / weights.name
    for path, words in (
        (layout, (*measured, *maps)), (weights, (*measured, *maps)), (linked, (*measured, *maps)),
        (predicted / layout.name, (*measured, *maps, "--predictions", predicted)),
        *((Path(path), (*measured, *scenes)) for path in (listed.labels, listed.image)),
        (clusters, ("features", "--convert", clusters)),
    ):
        before = path.read_bytes()
        code, _, error = smis(*words, "--out", path)
        assert (code, error.count("\n")) == (2, 1) and "is read, and would be" in error, words
        assert path.read_bytes() == before
    before = weights.read_bytes()
    for source, out in ((weights, weights), (weights, linked), (tmp_path, weights)):
        code, _, error = smis("convert", source, out)
        assert (code, error.count("\n")) == (2, 1) and "is read, and would be" in error
    assert weights.read_bytes() == before


def test_a_map_that_was_drawn_is_never_removed(tmp_path: Path, smis: Any, layout: Path) -> None:
    out = tmp_path / "out"
    for name in ("edit.png", "edit_7.png"):
        write_indices(out / name, np.ones((8, 8), np.int64))
    code, _, error = smis("edit", "--model", "groupdnet_scenes", "--labels", layout, "--relabel",
                          "1=2", "--out", out)
    assert code == 0, error
    assert {"edit.png", "edit_7.png", "edit.gif", "edit_1.png"} <= set(os.listdir(out))


def test_maps_of_a_stopped_command_are_refused(tmp_path: Path) -> None:
    write_indices(tmp_path / "maps/a.png", np.zeros((4, 4), np.int64))
    with pytest.raises(_Killed), unfinished(tmp_path / "maps", {"command": "smis convert-labels"}):
        raise _Killed
    with pytest.raises(ValueError, match=r"labels: .* is not complete: smis convert-labels was"):
        map_files("labels", tmp_path / "maps")


def test_exchanged_shapes_keep_the_colours() -> None:
    labels = np.zeros((32, 32), np.int64)
    labels[8:20, 8:20] = 3
    scene = Scene("a", labels, None, class_names=class_names("groupdnet_scenes", 8))
    other = exchange_shape(scene, 3, np.ones((4, 9), bool))
    assert not np.array_equal(other.labels, labels)
    assert np.array_equal(other.colours(8), scene.colours(8))


# Nothing stale.

def test_frames_and_samples_of_an_earlier_run_go(tmp_path: Path, smis: Any, layout: Path) -> None:
    given = ("--model", "groupdnet_scenes", "--labels", layout, "--out", tmp_path / "out")
    assert smis("morph", *given, "--steps", 4, "--animation", "apng")[0] == 0
    assert smis("synthesize", *given, "--samples", 3)[0] == 0
    for name in ("map_7.png", "morph_9.png", "morph.webp"):  # not of an earlier run
        Image.new("RGB", (8, 8)).save(tmp_path / "out" / name)
    (tmp_path / "out/mine_3.png").touch()
    (tmp_path / "out/morph_notes.png").touch()
    assert smis("morph", *given, "--steps", 2)[0] == 0
    assert smis("synthesize", *given, "--samples", 1)[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "grid.png", "map_0.png", "map_7.png", "mine_3.png", "morph.gif", "morph.webp",
        "morph_0.png", "morph_1.png", "morph_9.png", "morph_grid.png", "morph_notes.png"]


@pytest.mark.parametrize("kind", animation.FORMATS)
def test_written_animations_are_known(kind: str, tmp_path: Path) -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[1] = 255
    path = animation.write_animation(tmp_path / "a", frames, kind)
    assert written_here(path)
    with Image.open(path) as image:
        image.seek(1)
        other = tmp_path / "b.png"
        Image.fromarray(np.array(image.convert("RGB"))).save(other)
    assert not written_here(other)


# A set that was stopped.

def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}


def test_killed_scenes_are_known_and_go_on(tmp_path: Path) -> None:
    counts = {"train": 4, "val": 2}
    write_scenes(tmp_path / "whole", counts, 32)
    seen: list[str] = []

    def kill(name: str) -> None:
        seen.append(name)
        if len(seen) == 3:
            raise _Killed

    out = tmp_path / "out"
    with pytest.raises(_Killed):
        write_scenes(out, counts, 32, step=kill)
    (out / "train/images/.train_000003.png.smis-abcd1234").touch()
    for root in (out, out / "train"):
        problems = examine(find_splits("folder", root)).problems
        assert any("not complete" in p.message and not p.note for p in problems), problems
    preset = create_model("groupdnet_scenes", device="meta").preset
    with pytest.raises(ValueError, match="not complete"):
        build_dataset("folder", out, preset)
    with pytest.raises(ValueError, match="unfinished set"):
        write_scenes(out, counts, 32, seed=1)
    with pytest.raises(ValueError, match="unfinished set"):
        write_scenes(out, counts, 64)
    write_scenes(out, counts, 32)
    assert _files(out) == _files(tmp_path / "whole")
    assert not any("not complete" in p.message
                   for p in examine(find_splits("folder", out)).problems)
    with pytest.raises(ValueError, match="new or empty"):
        write_scenes(out, counts, 32)


@pytest.mark.parametrize("end", [OSError, KeyboardInterrupt, SystemExit])
def test_what_ends_in_the_middle_leaves_what_was_there(tmp_path: Path, end: type[BaseException],
                                                       ) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("earlier")

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise end

    with pytest.raises(end):
        write()
    assert os.listdir(tmp_path) == ["notes.txt"] and path.read_text() == "earlier"


def test_what_is_unfinished_tells_its_task(tmp_path: Path) -> None:
    with pytest.raises(_Killed), unfinished(tmp_path, {"command": "x"}):
        raise _Killed
    assert json.loads((tmp_path / UNFINISHED).read_text()) == {"command": "x"}
    with unfinished(tmp_path, {"command": "y"}) as before:
        assert before == {"command": "x"}
    assert not (tmp_path / UNFINISHED).exists()


# A run's folder is a checkpoint, and tells its model.

def test_a_run_needs_neither_a_files_name_nor_a_models(small_run: Path, smis: Any, layout: Path,
                                                       tmp_path: Path) -> None:
    for k, place in enumerate((small_run, small_run / "model.safetensors")):
        assert create_model(checkpoint=place).preset.ngf == 8
        code, out, _ = smis("synthesize", "--checkpoint", place, "--labels", layout, "--out",
                            tmp_path / f"o{k}")
        assert code == 0 and "random" not in out.lower()
    assert (tmp_path / "o0/map_0.png").read_bytes() == (tmp_path / "o1/map_0.png").read_bytes()
    code, _, error = smis("synthesize", "--labels", layout, "--out", tmp_path / "o")
    assert code == 2 and "model: expected --model NAME" in error
    (small_run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected one of model\.safetensors"):
        create_model("groupdnet_scenes", small_run)


def test_the_record_of_a_run_names_the_weights(small_run: Path, smis: Any, tmp_path: Path) -> None:
    code, *_ = smis("evaluate", "--checkpoint", small_run, "--dataset", "scenes", "--count", 1,
                    "--layouts", 1, "--samples", 2, "--pairs", 1, "--distance", "pixel", "--out",
                    tmp_path / "e.json")
    assert code == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert list(found["model"]["weights_sha256"]) == ["model.safetensors"]
    values = found["results"]["diversity"]["pixel L1"]
    assert "lpips" not in values and values["diversity"] > 0


@pytest.mark.parametrize(("given", "meant"), [
    ("groupdnet_scene", "groupdnet_scenes"), ("spade-coco", "spade_coco"),
    ("SPADE_ADE20K", "spade_ade20k")])
def test_a_models_name_is_guessed(given: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean '{meant}'\?"):
        create_model(given)


def test_every_recipe_stands_by_itself() -> None:
    for name, made in RECIPES.items():
        assert not made().whiten, f"{name} cannot start: whiten needs init"


# Checkpoints in one line.

def _generator() -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = create_model(
        "groupdnet_scenes", part="generator", **SMALL).state_dict()
    return state


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, r"expected floats under '.*int8"),
    (lambda s: {k: v.to(torch.complex64) for k, v in s.items()}, r"expected floats.*complex64"),
    (lambda s: {**s, "epoch": torch.tensor(3)}, r"1 unexpected \(epoch\); all else fits"),
    (lambda s: {**{f"generator.{k}": v for k, v in s.items()}, "epoch": torch.tensor(3)},
     r"got 'epoch' among"),
])
def test_what_is_wrong_in_a_checkpoint_is_named(change: Any, message: str, tmp_path: Path) -> None:
    torch.save(change(_generator()), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        create_model("groupdnet_scenes", tmp_path / "x.pth", **SMALL)


def test_the_state_of_a_run_is_not_taken_for_its_weights(tmp_path: Path) -> None:
    torch.save({"format": 2, "config": {}, "place": [0, 0], "model": _generator(),
                "average": None}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"give its folder, whose model\.safetensors"):
        create_model("groupdnet_scenes", tmp_path / "checkpoint.pt", **SMALL)


def test_half_weights_with_their_counters_are_taken(tmp_path: Path) -> None:
    torch.save({k: v.half() for k, v in _generator().items()}, tmp_path / "x.pth")
    model = create_model("groupdnet_scenes", tmp_path / "x.pth", **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("protocol", range(5))
def test_code_in_a_pickle_is_called_code(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"f": os.getcwd}, protocol))
    with pytest.raises(CheckpointError, match="holds pickled code, which is never run"):
        create_model("groupdnet_scenes", tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"f": [1.5] * 400}, max(protocol, 2))[:-50])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        create_model("groupdnet_scenes", tmp_path / "x.pth")


# Options in one line.

@pytest.mark.parametrize(("text", "message"), [
    ("data: null", "options .* under data, got null"), ("data: [1]", "under data, got list"),
    ("losses: 3", "under losses, got int"), ("network: null", "under network, got null"),
    ("seed: 2026-13-45", r"c\.yaml is no YAML or JSON: month must be in 1"),
    ("seed: 100000000000000000000000", r"seed: expected 0 to"), ("seed: -1", "seed: expected 0"),
])
def test_a_wrong_section_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"recipe: groupdnet_scenes_codes\n{text}\n")
    with pytest.raises(ValueError, match=message) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("words", "message"), [
    (("--seed", "9" * 30), "seed: expected 0 to"), (("--seed", -1), "seed: expected 0 to"),
    (("--seconds", "1e9"), "seconds: expected 0.01 to 30"),
    (("--seconds", "nan"), "seconds: expected 0.01 to 30"),
    (("--seconds", "0"), "seconds: expected 0.01 to 30"),
    (("--class", "skye"), "did you mean 'sky'"), (("--class", "8"), r"a class 0\.\.7, got 8"),
    (("--instances", "map.png"), "this model reads no instance maps"),
    (("--unknown", "moon"), "unknown: expected a class"),
    (("--image-labels", "map.png"), "image-labels: no --images are given"),
])
def test_a_wrong_option_is_one_line(words: tuple[Any, ...], message: str, smis: Any, layout: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout.parent)
    given = ("morph", "--model", "groupdnet_scenes", "--labels", layout, "--out", "out")
    code, _, error = smis(*given, *words)
    assert (code, error.count("\n")) == (2, 1)
    assert re.search(message, error), error
    assert not Path("out").exists()


@pytest.mark.parametrize(("words", "option"), [
    (("--labels", "map.png", "--segmenter-input", "unit"), "segmenter-input"),
    (("--dataset", "scenes", "--segmenter", "scenes", "--segmenter-input", "unit"),
     "segmenter-input"),
    (("--labels", "map.png", "--root", "."), "root"), (("--labels", "map.png", "--count", "3"),
                                                       "count"),
    (("--labels", "map.png", "--split", "test"), "split"),
    (("--dataset", "scenes", "--instances", "."), "instances"),
    (("--dataset", "scenes", "--root", "."), "root"),
    (("--labels", "map.png", "--label-rule", "ade20k"), "label-rule"),
    (("--labels", "map.png", "--distance", "pixel", "--lpips-heads", "x"), "lpips-heads"),
    (("--labels", "map.png", "--features", "x.npz"), "features"),
])
def test_evaluate_refuses_what_it_would_not_read(words: tuple[str, ...], option: str, smis: Any,
                                                 layout: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout.parent)
    distance = () if "--distance" in words else ("--distance", "pixel")
    code, _, error = smis("evaluate", "--model", "groupdnet_scenes", "--out", "e.json", *words,
                          *distance)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: {option}: ")


# Kernels in one line.

@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_kernels_refuse_by_value_error(backend: str) -> None:
    x, labels = torch.randn(1, 4, 8, 8), torch.full((1, 8, 8), 9)
    for label in (9, -1):
        with pytest.raises(ValueError, match=rf"semantics: expected labels 0\.\.4, got {label}"):
            class_crops(x, torch.full((1, 8, 8), label), 5, backend=backend)
    with pytest.raises(ValueError, match=r"instance_map: expected ids 0\.\."):
        instance_avg_pool2d(x, -labels, backend=backend)
    for eps in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps: expected a number of at least 0"):
            modulation(x, x, x, training=True, eps=eps, backend=backend)
        with pytest.raises(ValueError, match="eps: expected a number of at least 0"):
            norm_act(x, eps=eps, backend=backend)


def test_integer_labels_in_a_norm_are_told_of_the_layout() -> None:
    norm, x = SPADE(4, 5, hidden=4), torch.randn(1, 4, 8, 8)
    for labels in (torch.zeros(1, 8, 8).long(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"LabelLayout\.from_labels"):
            norm(x, labels)
    assert norm(x, LabelLayout.from_labels(torch.zeros(1, 8, 8).long(), 5)).shape == x.shape


def test_a_fresh_model_says_eval() -> None:
    model = create_model("groupdnet_scenes", **SMALL)
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        model(model.semantics(torch.zeros(1, 128, 128).long()))


# Names of classes, by the numbers that the data sets' own pages list.
CITYSCAPES = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
              19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
              24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
              32: "motorcycle", 33: "bicycle"}
# COCO's categories, whose ids are one more.
COCO = {number - 1: name for number, name in {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train",
    8: "truck", 9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign",
    14: "parking meter", 15: "bench", 16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep",
    21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe", 27: "backpack",
    28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove",
    41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass",
    47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple",
    54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza",
    60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote",
    76: "keyboard", 77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink",
    82: "refrigerator", 84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear",
    89: "hair drier", 90: "toothbrush", 92: "banner", 157: "sky-other", 182: "wood"}.items()}
ADE20K = {1: "wall", 2: "building", 3: "sky", 4: "floor", 5: "tree", 6: "ceiling", 7: "road",
          8: "bed", 9: "windowpane", 10: "grass", 11: "cabinet", 12: "sidewalk", 13: "person",
          20: "chair", 21: "car", 22: "water", 27: "sea", 61: "river", 62: "bridge",
          63: "bookcase", 67: "flower", 77: "boat", 81: "bus", 91: "airplane", 110: "swimming pool",
          115: "tent", 127: "animal", 128: "bicycle", 129: "lake", 137: "traffic light",
          146: "shower", 149: "clock", 150: "flag"}


def test_names_are_of_the_data_sets() -> None:
    for info in list_models():
        preset = create_model(info.name, part="generator", device="meta").preset
        names = class_names(info.name, preset.classes)
        assert len(names) == len(set(names)) == preset.classes
        assert (names[0] == "class 0") == info.name.endswith("deepfashion")
        note = class_note(info.name, preset.classes)
        assert (note is None) == (names[0] != "class 0")
        assert note is None or "no list tells which number is which" in note
    for model, count, published in (("spade_coco", 183, COCO), ("groupdnet_ade20k", 151, ADE20K),
                                    ("pix2pixhd_cityscapes_1024", 35, CITYSCAPES)):
        names = class_names(model, count)
        assert {number: names[number] for number in published} == published
    assert class_names("groupdnet_scenes", 7)[0] == "class 0"


def test_a_class_is_found_by_name_or_number() -> None:
    names = class_names("groupdnet_scenes", 8)
    assert [class_index("x", text, names) for text in ("Sky", "tree", "7")] == [0, 5, 7]
    for text in ("8", "sk", "-1", ""):
        with pytest.raises(ValueError, match="x: expected"):
            class_index("x", text, names)


def test_edits_speak_of_classes() -> None:
    names = class_names("groupdnet_scenes", 8)
    scene = Scene("s", np.zeros((16, 16), np.int64), None, names, (32, 32))
    edited = relabelled(painted(scene, "tree:0,0,4,4", 8), "sky=water", 8)
    assert (edited.present, edited.class_names, edited.source_size) == ([2, 5], names, (32, 32))
    assert parse_takes(["sky=b", "5=0"], ["a", "b"], names) == {0: 1, 5: 0}
    assert np.array_equal(scene.picture(8)[0, 0], class_colours(names)[0])
    assert dict(zip(names, class_colours(names).tolist(), strict=True)) == {
        "sky": [115, 178, 245], "mountain": [110, 102, 107], "water": [20, 64, 128],
        "ground": [97, 163, 51], "building": [140, 51, 41], "tree": [31, 128, 26],
        "car": [250, 209, 20], "person": [214, 20, 158]}


def test_captions_and_legends_have_their_sizes_and_ink() -> None:
    picture = np.full((32, 48, 3), 128, np.uint8)
    shown = captioned(picture, "a caption that is far too long for this picture")
    assert shown.shape == (48, 48, 3)
    assert np.array_equal(shown[:32], picture)
    assert shown[32:].min() < 100
    names = [(f"class {k}", (255, 0, 0)) for k in range(9)]
    key = legend(names, (64, 64))
    assert key.shape == (64, 64, 3)
    red = (key == (255, 0, 0)).all(2)
    assert red[:48].any() and not red[48:].any()  # the last line counts those without room
    apart = [("sky", (0, 0, 255)), ("sea", (0, 255, 0)), ("sand", (255, 255, 0)),
             ("rock", (255, 0, 255))]  # as many as there is room for
    key = legend(apart, (64, 64))
    for row, (_, colour) in enumerate(apart):
        assert (key[16 * row + 3 : 16 * row + 12, 3:12] == colour).all()
    for width in range(1, 48):  # of which the narrowest have no room for a letter
        narrow = captioned(picture[:, :width], "a caption")
        assert np.array_equal(narrow[:32], picture[:, :width]) and narrow.shape == (48, width, 3)
        assert legend(names, (32, width)).shape == (32, width, 3)
    many = Scene("s", np.array([[4, 4, 4, 2, 2, 7]]), None)
    assert many.present == [4, 2, 7]  # largest first


def test_a_resized_map_is_told_by_every_command(smis: Any, tmp_path: Path) -> None:
    write_indices(tmp_path / "m.png", np.zeros((64, 256), np.int64))
    Image.new("RGB", (256, 64)).save(tmp_path / "p.png")
    given = ("--model", "groupdnet_scenes", "--labels", tmp_path / "m.png", "--out",
             tmp_path / "out")
    for command in (("synthesize",), ("resample", "--class", "sky", "--samples", 1),
                    ("mix", "--images", tmp_path / "p.png", "--image-labels", tmp_path / "m.png")):
        code, out, error = smis(*command, *given)
        assert code == 0, error
        assert out.count("its shape is stretched") == (2 if command[0] == "mix" else 1)


def test_samples_of_a_model_without_a_code_are_refused(smis: Any, tmp_path: Path) -> None:
    model = create_model("spade_celebamask", ngf=4, hidden=8, image_size=(32, 32))
    save_checkpoint(model, tmp_path / "spade.safetensors")
    write_indices(tmp_path / "m.png", np.zeros((32, 32), np.int64))
    given = ("synthesize", "--checkpoint", tmp_path / "spade.safetensors", "--labels",
             tmp_path / "m.png", "--out", tmp_path / "out")
    code, _, error = smis(*given, "--samples", 2)
    assert (code, error.count("\n")) == (2, 1) and error.startswith("error: samples: ")
    assert smis(*given)[0] == 0


def test_evaluate_tells_of_resized_maps_and_removes_what_a_killed_run_left(
        smis: Any, tmp_path: Path) -> None:
    write_indices(tmp_path / "maps/m.png", np.zeros((64, 64), np.int64))
    write_indices(tmp_path / "read/m.png", np.zeros((32, 32), np.int64))
    (tmp_path / ".e.json.smis-abcd_123").touch()
    code, out, error = smis(
        "evaluate", "--model", "groupdnet_scenes", "--labels", tmp_path / "maps", "--layouts", 1,
        "--samples", 2, "--pairs", 1, "--distance", "none", "--predictions", tmp_path / "read",
        "--out", tmp_path / "e.json")
    assert code == 0, error
    assert "m, 64x64, to 128x128" in out and "m, 32x32, to 128x128" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.json", "maps", "read"]


# Of SceneParsing's objectInfo150, from 1 on.
MORE_OF_ADE20K = {14: "earth", 15: "door", 16: "table", 17: "mountain", 18: "plant", 19: "curtain",
                  23: "painting", 24: "sofa", 25: "shelf", 26: "house", 28: "mirror", 29: "rug",
                  30: "field", 31: "armchair", 32: "seat", 33: "fence", 34: "desk", 35: "rock",
                  36: "wardrobe", 37: "lamp", 38: "bathtub", 39: "railing", 40: "cushion"}


def test_more_names_of_ade20k() -> None:
    names = class_names("groupdnet_ade20k", 151)
    assert {number: names[number] for number in MORE_OF_ADE20K} == MORE_OF_ADE20K
