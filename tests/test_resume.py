"""Runs that go on, and what a run leaves: options, places, saved states, errors in the middle."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SMALL_TRAINING
from torch import Tensor
from typer.testing import CliRunner

from smis_models import cli, create_model
from smis_models.data import Collate, GeneratedScenes
from smis_models.io.checkpoint import (
    CheckpointError,
    read_checkpoint,
    read_metadata,
    save_checkpoint,
)
from smis_models.io.files import file_hash
from smis_models.io.images import write_indices, write_png
from smis_models.training import NonFiniteLoss, Run, TrainConfig, continued, from_dict, train
from smis_models.training.batches import Order, Place
from smis_models.training.checkpoints import TRAINING, keep, load_state, read_state, save_state
from smis_models.training.distributed import Processes
from smis_models.training.loggers import Clock, LossTable, WandB, memory
from smis_models.training.objective import Objective
from smis_models.training.options import to_dict, to_json

pytest.importorskip("jsonargparse")
MACHINE = ("images_per_second", "waiting", "memory")


def tiny(*arguments: str) -> TrainConfig:
    """8 steps of 2 pictures, 4 an epoch."""
    return from_dict({
        **SMALL_TRAINING,
        "losses": {"perceptual": 0.0, "pixel": 10.0},
        "schedule": {"epochs": 1, "decay_epochs": 1},
        "log": {"every": 1, "checkpoint_every": 100, "grid_every": 0, "tensorboard": False},
    }, arguments)


def rows(folder: Path) -> list[dict[str, str]]:
    """losses.csv without what depends on the machine."""
    with (folder / "losses.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MACHINE} for row in csv.DictReader(file)]


def saved(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


def facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_metadata(path)[TRAINING])
    return found


def content(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors of a weights file, whose order varies."""
    state = read_checkpoint(path)
    return read_metadata(path), {name: value.numpy().tobytes() for name, value in state.items()}


def until(config: TrainConfig, folder: Path, step: int, resume: Any = False) -> Run:
    """A run that was stopped after ``step``."""
    run = Run(config, folder, resume=resume)
    run(stop=lambda: run.trainer.step_count == step)
    return run


# Options


@pytest.fixture
def smis(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    (tmp_path / "tiny.json").write_text(to_json(tiny()))

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, [
            "train", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "run"), *arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return 2, str(done.exception)
        return done.exit_code, " ".join(done.output.split())

    return run


def test_what_was_given_at_the_start_holds(smis: Any, tmp_path: Path) -> None:
    given = ("--optimizer.generator", "3e-4", "--losses.pixel", "5", "--data.count", "12")
    assert smis(*given, "--minutes", "0")[0] == 0  # one step
    first = (tmp_path / "run/config.json").read_text()
    code, said = smis("--resume")
    assert code == 0
    for option in ("optimizer.generator 0.0003 (not 0.0001)", "losses.pixel 5.0 (not 10.0)",
                   "data.count 12 (not 8)"):
        assert option in said
    assert "resume: the run keeps its own options" in said and " was " not in said
    assert (tmp_path / "run/config.json").read_text() == first
    found = rows(tmp_path / "run")
    assert len(found) == 12
    assert {row["rate_generator"] for row in found[:7]} == {"0.0003"}
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert (record["losses"]["pixel"], record["changes"]) == (5.0, [])


def test_what_is_given_on_the_way_is_told_and_recorded(smis: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    smis("--losses.pixel", "5", "--minutes", "0")
    before = rows(run)
    code, said = smis("--resume", "--optimizer.discriminator", "1e-3", "--losses.kl", "0")
    assert code == 0
    assert "resume: optimizer.discriminator was 0.0004 up to step 1 and is 0.001 from here" in said
    assert "resume: losses.kl was 0.0125 up to step 1 and is 0.0 from here" in said
    assert "optimizer.generator was" not in said and "losses.pixel was" not in said
    found = rows(run)
    assert found[0] == before[0] and len(found) == 8
    assert [row["rate_discriminator"] for row in found[:4]] == ["0.0004", *["0.001"] * 3]
    assert found[0]["kl"] and not found[1]["kl"]
    record = json.loads((run / "record.json").read_text())
    assert record["changes"] == facts(run / "model.safetensors")["changes"] == [{
        "step": 1, "changed": {"losses.kl": [0.0125, 0.0],
                               "optimizer.discriminator": [0.0004, 0.001]}}]
    assert "kl" not in record["losses"]
    config = continued(run)
    assert (config.losses.kl, config.losses.pixel) == (0.0, 5.0)
    assert json.loads((run / "config.json").read_text()) == to_dict(config)


def test_what_was_changed_before_stays_in_the_record(tmp_path: Path) -> None:
    until(tiny(), tmp_path, 1)
    changed = tiny("--losses.kl", "0")
    with pytest.warns(UserWarning, match=r"losses\.kl was"):
        until(changed, tmp_path, 2, True)
    until(changed, tmp_path, 3, True)
    assert facts(tmp_path / "model.safetensors")["changes"] == [
        {"step": 1, "changed": {"losses.kl": [0.0125, 0.0]}}]


def test_other_decays_reach_the_optimizers(tmp_path: Path) -> None:
    until(tiny(), tmp_path, 1)
    with pytest.warns(UserWarning, match=r"optimizer\.betas was \[0\.0, 0\.9\] up to step 1"):
        trainer = Run(tiny("--optimizer.betas", "[0.5,0.99]"), tmp_path, resume=True).trainer
    for optimizer in (trainer._optimizer_g, trainer._optimizer_d):
        assert [tuple(group["betas"]) for group in optimizer.param_groups] == [(0.5, 0.99)]
        assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_auto_starts_and_goes_on_with_one_line(smis: Any, tmp_path: Path) -> None:
    line = ("--resume", "auto", "--minutes", "0")
    assert "1 of 8 steps; --resume goes on" in smis(*line)[1]
    assert "2 of 8 steps" in smis(*line)[1]
    code, said = smis("--resume", "auto")
    assert code == 0 and "8 of 8 steps; weights" in said
    assert "8 of 8 steps; weights" in smis("--resume", "auto")[1]
    assert [row["step"] for row in rows(tmp_path / "run")] == list("12345678")


def test_what_cannot_go_on_is_one_line(smis: Any, tmp_path: Path) -> None:
    code, said = smis("--resume")
    assert code == 2 and "resume: no checkpoint.pt in" in said
    assert not (tmp_path / "run").exists()
    smis("--minutes", "0")
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    for arguments, message in (
            ((), "holds a run; --resume goes on with it"),
            (("--resume", "--network.ngf", "4"), "resume: network.ngf differ"),
            (("--resume", "--seed", "4"), "resume: seed differ"),
            (("--resume", "--optimizer.ema", "0.9"), "optimizer.ema was 0.0"),
            (("--resume=sometimes",), "expected auto or nothing behind --resume")):
        code, said = smis(*arguments)
        assert code == 2 and message in said and "\n" not in said
    (tmp_path / "tiny.json").write_text(to_json(from_dict({"recipe": "spade_coco"})))
    assert "config: " in smis("--resume")[1]
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_a_stopped_run_goes_on_when_called_again(tmp_path: Path) -> None:
    config = tiny("--schedule.decay_epochs", "0")
    expected = train(config, tmp_path / "whole").folder
    run = until(config, tmp_path / "run", 2)
    run()
    assert rows(tmp_path / "run") == rows(expected)


def test_a_run_goes_on_without_the_file_that_it_started_from(tmp_path: Path) -> None:
    until(tiny("--seed", "5"), tmp_path / "first", 1)
    start = tmp_path / "first/model.safetensors"
    config = tiny("--init", str(start))
    until(config, tmp_path / "run", 1)
    start.unlink()
    found = Run(config, tmp_path / "run", resume=True).trainer.model.state_dict()
    expected = saved(tmp_path / "run")["model"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# Places


def pictures(place: Place, batch: int, count: int, length: int = 11) -> list[list[int]]:
    order = iter(Order(length, batch, 1, 3, place, Processes()))
    return [[draw.index for draw in next(order)] for _ in range(count)]


def test_another_batch_goes_on_where_the_order_was() -> None:
    epoch = [i for batch in pictures(Place(1, 0), 1, 11) for i in batch]
    assert sorted(epoch) == list(range(11))
    found = pictures(Place(1, 4), 3, 3)
    assert found[:2] == [epoch[4:7], epoch[7:10]]
    assert found[2] == pictures(Place(2, 0), 3, 1)[0]
    assert pictures(Place(1, 4), 2, 4) == [epoch[4:6], epoch[6:8], epoch[8:10],
                                           pictures(Place(2, 0), 2, 1)[0]]
    assert Place(1, 4).after(11, 3) == (1, 7) and Place(1, 7).after(11, 3) == (2, 0)
    assert Place(1, 9).settled(11, 3) == (2, 0) and Place(1, 8).settled(11, 3) == (1, 8)
    assert Place.of(5, 11, 3) == (1, 6)
    assert [Place(0, 0).left(2, 11, 3), Place(0, 6).left(2, 11, 3), Place(1, 4).left(2, 11, 3),
            Place(2, 0).left(2, 11, 3), Place(3, 0).left(2, 11, 3)] == [6, 4, 2, 0, 0]


def test_epochs_are_those_of_the_pictures(tmp_path: Path) -> None:
    """Epoch and schedule do not move where the steps of an epoch become others."""
    until(tiny(), tmp_path, 5)  # the first epoch, and two pictures of the second
    assert saved(tmp_path)["place"] == [1, 2]
    with pytest.warns(UserWarning, match="resume: ") as told:
        run = Run(tiny("--data.batch", "3", "--data.count", "12", "--schedule.decay_epochs", "2"),
                  tmp_path, resume=True)
    assert {str(w.message).split(" was ")[0] for w in told} == {
        "resume: data.batch", "resume: data.count", "resume: data (pictures)",
        "resume: schedule.decay_epochs"}
    assert run.steps == 5 + 3 + 4  # three batches of three are left of ten pictures
    run()
    assert [int(row["epoch"]) for row in rows(tmp_path)] == [0] * 4 + [1] * 4 + [2] * 4
    assert [float(row["rate_generator"]) for row in rows(tmp_path)][-8:] == (
        [1e-4] * 4 + [pytest.approx(0.5e-4)] * 4)


def test_less_than_a_batch_of_an_epoch_is_left_out(tmp_path: Path) -> None:
    until(tiny(), tmp_path, 3)  # two of eight pictures are left
    with pytest.warns(UserWarning, match=r"resume: data\.batch was 2"):
        run = Run(tiny("--data.batch", "4"), tmp_path, resume=True)
    assert (run.place, run.steps) == (Place(1, 0), 3 + 2)


# What is saved


@pytest.mark.parametrize("lost", ["missing", "old", "damaged", "record", "torn record"])
def test_a_finished_run_gets_its_weights_back(lost: str, tmp_path: Path) -> None:
    """The kill fell between the files of a save."""
    weights = tmp_path / "model.safetensors"
    until(tiny(), tmp_path, 2)
    old = weights.read_bytes()
    until(tiny(), tmp_path, 8, True)
    expected, whole = content(weights), weights.read_bytes()
    assert facts(weights)["step"] == 8
    if lost == "missing":
        weights.unlink()
    elif lost == "record":
        (tmp_path / "record.json").unlink()
    elif lost == "torn record":
        (tmp_path / "record.json").write_text("")
    else:
        weights.write_bytes(old if lost == "old" else whole[:1000])
    outcome = train(tiny(), tmp_path, resume=True)
    assert outcome.finished and outcome.weights == weights
    assert content(weights) == expected
    assert json.loads((tmp_path / "record.json").read_text())["step"] == 8


def test_half_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    until(tiny("--log.keep", "2"), tmp_path, 2)
    left = [tmp_path / f"{name}.smis-abcd123_" for name in (
        ".checkpoint.pt", ".model.safetensors", ".config.json", ".record.json", ".losses.csv",
        ".best.safetensors", "kept/.step_0000002.pt", "grids/.0000002.png")]
    others = [tmp_path / name for name in (
        ".checkpoint.pt.old", ".notes.txt.abcd1234", "checkpoint.pt.abcd1234", ".gitignore")]
    (tmp_path / "grids").mkdir()
    for path in (*left, *others):
        path.write_bytes(b"half")
    Run(tiny("--log.keep", "2"), tmp_path, resume=True)
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in others)


def test_the_last_states_and_those_of_epochs_stay(tmp_path: Path) -> None:
    config = tiny("--log.checkpoint_every", "1", "--log.keep", "3", "--log.keep_epochs", "2",
                  "--schedule.epochs", "5", "--data.count", "4", "--schedule.decay_epochs", "0")
    train(config, tmp_path)  # ten steps, two an epoch
    kept = tmp_path / "kept"
    names = [f"step_{step:07d}" for step in (8, 9, 10)] + ["epoch_0002", "epoch_0004"]
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        name + end for name in names for end in (".pt", ".safetensors"))
    for name, step in zip(names, (8, 9, 10, 4, 8), strict=True):
        state = torch.load(kept / f"{name}.pt", weights_only=True)
        assert state["step"] == step == facts(kept / f"{name}.safetensors")["step"]
        weights = read_checkpoint(kept / f"{name}.safetensors")
        assert torch.equal(weights["generator.conv_img.weight"],
                           state["model"]["generator.conv_img.weight"])
    # One of them takes the place of the last, and its run goes on as before.
    expected = rows(tmp_path)
    shutil.copy(kept / "epoch_0002.pt", tmp_path / "checkpoint.pt")
    train(config, tmp_path, resume=True)
    assert rows(tmp_path) == expected


def test_epochs_alone_stay(tmp_path: Path) -> None:
    train(tiny("--log.keep_epochs", "1"), tmp_path)  # although no checkpoint was due
    assert sorted(path.name for path in (tmp_path / "kept").glob("*.pt")) == [
        "epoch_0001.pt", "epoch_0002.pt"]
    assert facts(tmp_path / "kept/epoch_0001.safetensors")["step"] == 4


def test_one_state_alone_is_kept_by_default(tmp_path: Path) -> None:
    train(tiny("--log.checkpoint_every", "2"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt", "model.safetensors", "config.json", "record.json", "losses.csv"}


def test_fewer_states_stay_where_fewer_are_asked_for(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the option that changes
        for keep, step, steps in ((3, 3, (1, 2, 3)), (2, 4, (3, 4)), (1, 5, ())):
            until(tiny("--log.checkpoint_every", "1", "--log.keep", str(keep)), tmp_path, step,
                  "auto")
            assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(
                f"step_{k:07d}{end}" for k in steps for end in (".pt", ".safetensors"))


def test_what_is_written_after_which_steps(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def saving(folder: Path, state: dict[str, Any], config: TrainConfig) -> Path:
        written.append(state["step"])
        return save_state(folder, state, config)

    monkeypatch.setattr("smis_models.training.run.save_state", saving)
    train(tiny("--log.every", "3", "--log.checkpoint_every", "3"), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "3", "6"]
    assert written == [3, 6, 8]


def test_the_best_weights_stay(tmp_path: Path) -> None:
    config = tiny("--log.checkpoint_every", "1", "--log.keep", "8", "--log.best", "pixel",
                  "--log.best_scenes", "3", "--optimizer.generator", "3e-2", "--init_gain", "1")
    until(config, tmp_path, 3)
    until(config, tmp_path, 7, "auto")
    run = Run(config, tmp_path, resume=True)
    with torch.no_grad():
        run.trainer.model.generator.conv_img.bias.fill_(9)  # white pictures are the worst
    run.trainer.step_count = 8
    run.save()
    from smis_models.data import Collate, GeneratedScenes

    held_out = GeneratedScenes(3, 64, "val")
    batch = Collate(config.network)([held_out[i] for i in range(3)])
    found = []
    for path in sorted((tmp_path / "kept").glob("*.safetensors")):
        model = create_model(checkpoint=path).eval()
        with torch.no_grad():
            z, _ = model.encoder.encode(batch["image"], batch["labels"])
            picture = model.generator(batch["layout"], z)
        found.append(float((picture - batch["image"]).abs().mean()))
    assert len(found) == 8 and found[7] == max(found)  # or the last would do too
    best = facts(tmp_path / "best.safetensors")
    assert best["step"] == found.index(min(found)) + 1
    seen = hashlib.sha256(b"".join(
        held_out[i][key].numpy().tobytes() for i in range(3) for key in ("image", "labels")))
    assert best["best"] == {"metric": "pixel", "scenes": 3, "split": "val",
                            "scenes_sha256": seen.hexdigest(),
                            "value": pytest.approx(min(found), rel=1e-4)}


def test_best_is_of_one_measure(tmp_path: Path) -> None:
    """Another measure, other scenes or another split start anew; worse weights change nothing."""
    def best(*options: str, worse: bool = False) -> tuple[Any, ...]:
        given = ("--log.best", "pixel", "--log.best_scenes", "2", *options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the options that change
            run = Run(tiny(*given), tmp_path, resume="auto")
        if worse:
            with torch.no_grad():
                run.trainer.model.generator.conv_img.bias.fill_(9)  # white pictures
            run.trainer.step_count = 7
        run.save()
        found = facts(tmp_path / "best.safetensors")
        return found["step"], *(found["best"][key] for key in ("scenes", "split", "value"))

    step, *first = best()
    assert (step, first[:2]) == (0, [2, "val"])
    assert best(worse=True) == (0, *first)
    assert best("--log.grid_split", "test")[:3] == (7, 2, "test")  # although those are worse
    white = best("--log.grid_split", "test", "--log.best_scenes", "3")
    assert white[:3] == (7, 3, "test") and white[3] > first[2]
    path = tmp_path / "best.safetensors"
    told = facts(path)
    del told["best"]["split"]  # as 0.1 wrote it
    save_file(load_file(path), path, {**read_metadata(path), TRAINING: json.dumps(told)})
    best_of_then = path.read_bytes()
    with pytest.raises(KeyError):  # it has not been written again
        best("--log.grid_split", "test", "--log.best_scenes", "3", worse=True)
    assert path.read_bytes() == best_of_then


def test_best_is_of_these_scenes_and_this_measure(tmp_path: Path) -> None:
    """Other pictures of the same number, or another perceptual network, start anew."""
    path = tmp_path / "run/best.safetensors"

    def step_of_best(grey: int, worse: bool = True) -> int:
        write_png(tmp_path / "data/images/0.png", np.full((64, 64, 3), grey, np.uint8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Run(tiny("--data.name", "folder", "--data.root", str(tmp_path / "data"),
                           "--log.best", "pixel", "--log.best_scenes", "2"), tmp_path / "run",
                      resume="auto")
        with torch.no_grad():
            for parameter in run.trainer.model.generator.conv_img.parameters():
                parameter.zero_()
            run.trainer.model.generator.conv_img.bias.fill_(9 if worse else 0)  # white or grey
        run.trainer.step_count += 1
        run.save()
        return int(facts(path)["step"])

    for i in range(2):
        write_png(tmp_path / f"data/images/{i}.png", np.full((64, 64, 3), 128, np.uint8))
        write_indices(tmp_path / f"data/labels/{i}.png", np.zeros((64, 64), np.int64))
    assert step_of_best(128, worse=False) == 1
    assert step_of_best(128) == 1
    assert step_of_best(90) == 3
    told = facts(path)
    assert "vgg_sha256" not in told["best"]


@pytest.mark.parametrize("left", ["best.safetensors", "kept/epoch_0001.pt"])
def test_a_new_run_begins_beside_no_weights_of_another(left: str, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_bytes(b"hours of another run")
    with pytest.raises(ValueError, match=r"out: .* of an earlier run without its checkpoint\.pt"):
        Run(tiny(), tmp_path, resume="auto")
    assert (tmp_path / left).read_bytes() == b"hours of another run"


def test_the_best_are_judged_by_the_micro_batch(tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """For more pictures at once there may not be the memory."""
    run = Run(tiny("--data.batch", "4", "--optimizer.accumulate", "2", "--log.best", "pixel",
                   "--log.best_scenes", "5"), tmp_path)
    seen: list[int] = []
    plain = Objective.reconstruct
    monkeypatch.setattr(Objective, "reconstruct", lambda self, batch: (
        seen.append(len(batch)), plain(self, batch))[1])
    run.save()
    assert seen == [2, 2, 1]


def test_the_record_tells_what_a_run_began_with(tmp_path: Path) -> None:
    config = tiny("--seed", "7")
    model = create_model(config.model, **vars(config.network))
    save_checkpoint(model, tmp_path / "w.safetensors")
    began = {"file": str(tmp_path / "w.safetensors"),
             "sha256": {"w.safetensors": file_hash(tmp_path / "w.safetensors")}}
    config = tiny("--seed", "7", "--init", str(tmp_path / "w.safetensors"))
    until(config, tmp_path / "run", 1)
    (tmp_path / "w.safetensors").unlink()
    until(config, tmp_path / "run", 2, resume=True)
    record = json.loads((tmp_path / "run/record.json").read_text())
    for told in (record, facts(tmp_path / "run/model.safetensors")):
        assert (told["init"], told["whiten"], told["seed"]) == (began, False, 7)


def test_files_of_a_user_among_the_kept_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/step_of_mine.pt").touch()
    for name in ("checkpoint.pt", "model.safetensors"):
        (tmp_path / name).touch()
    for step in (1, 2, 3):
        keep(tmp_path, step, None, 2)
    assert sorted(path.name for path in (tmp_path / "kept").glob("*.pt")) == [
        "step_0000002.pt", "step_0000003.pt", "step_of_mine.pt"]


def test_best_by_another_measure_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    run = Run(tiny("--log.best", "pixel", "--log.best_scenes", "2"), tmp_path)
    run.save()
    told = facts(path)
    told["best"] |= {"metric": "perceptual", "value": 0.0}
    save_file(load_file(path), path, {**read_metadata(path), TRAINING: json.dumps(told)})
    run.save()
    assert facts(path)["best"]["metric"] == "pixel" and facts(path)["best"]["value"] > 0


def test_more_scenes_are_held_out_than_an_epoch_has(tmp_path: Path) -> None:
    """``data.count`` is of the pictures that are trained on; best_scenes and rows count others."""
    run = Run(tiny("--data.count", "2", "--log.best", "pixel", "--log.best_scenes", "3",
                   "--log.grid_every", "1", "--log.rows", "4"), tmp_path)
    run.save()
    assert facts(tmp_path / "best.safetensors")["best"]["scenes"] == 3
    assert run._shown is not None and len(run._shown) == 4


def test_of_more_held_out_pictures_the_first_are_looked_at(tmp_path: Path) -> None:
    for split, greys in (("train", (0, 0)), ("val", (255, 200, 120, 0, 0))):
        for i, grey in enumerate(greys):
            write_png(tmp_path / f"data/{split}/images/{i}.png",
                      np.full((64, 64, 3), grey, np.uint8))
            write_indices(tmp_path / f"data/{split}/labels/{i}.png", np.zeros((64, 64), np.int64))
    run = Run(tiny("--data.name", "folder", "--data.root", str(tmp_path / "data"), "--log.best",
                   "pixel", "--log.best_scenes", "3", "--log.grid_every", "1", "--log.rows", "2"),
              tmp_path / "run")
    with torch.no_grad():  # grey pictures, whatever the code
        for parameter in run.trainer.model.generator.conv_img.parameters():
            parameter.zero_()
    run.save()
    best = facts(tmp_path / "run/best.safetensors")["best"]
    apart = [abs(grey / 127.5 - 1) for grey in (255, 200, 120)]
    assert (best["scenes"], best["value"]) == (3, pytest.approx(sum(apart) / 3, abs=1e-5))
    assert run._shown is not None and len(run._shown) == 2


def test_best_needs_scenes_of_its_split_at_the_start(tmp_path: Path) -> None:
    for split in ("", "train"):
        for i in range(4):
            place = tmp_path / f"data{split}" / split
            write_png(place / f"images/{i}.png", np.zeros((64, 64, 3), np.uint8))
            write_indices(place / f"labels/{i}.png", np.zeros((64, 64), np.int64))

    def given(root: str, split: str = "val") -> TrainConfig:
        return tiny("--data.name", "folder", "--data.root", str(tmp_path / root), "--log.best",
                    "pixel", "--log.grid_split", split)

    with pytest.raises(FileNotFoundError, match="no pictures of 'val'"):
        Run(given("datatrain"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.warns(UserWarning, match=r"log\.best: .*one set for every split; the best weights"):
        Run(given("data"), tmp_path / "shared")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="log.best")
        Run(given("data", "train"), tmp_path / "asked")  # as was asked for


# Errors in the middle


def broken_at(call: int, method: str, monkeypatch: pytest.MonkeyPatch,
              harm: Callable[[dict[str, Tensor]], None]) -> None:
    """Let the objective's ``call``-th loss dictionary come to harm."""
    plain, calls = getattr(Objective, method), []

    def harmed(self: Objective, *arguments: Any) -> Any:
        made = plain(self, *arguments)
        calls.append(0)
        if len(calls) == call:
            harm(made[0] if method == "generator" else made)
        return made

    monkeypatch.setattr(Objective, method, harmed)


def test_a_loss_that_is_no_number_loses_no_step(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(tiny(), tmp_path / "whole").folder
    with monkeypatch.context() as patched:
        broken_at(6, "generator", patched, lambda made: made.update(kl=made["kl"] * float("nan")))
        with pytest.raises(NonFiniteLoss, match=r"losses\.kl: became nan in step 6"), pytest.warns(
                UserWarning, match="train: saved at step 5; --resume goes on from there"):
            train(tiny(), tmp_path / "run")
    assert saved(tmp_path / "run")["step"] == 5
    assert facts(tmp_path / "run/model.safetensors")["step"] == 5
    train(tiny(), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(expected)
    states = [saved(folder)["model"] for folder in (expected, tmp_path / "run")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("side", "term"), [("generator", "kl"), ("discriminator", "real")])
def test_an_infinite_gradient_of_a_finite_loss_is_seen(
        side: str, term: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(made: dict[str, Tensor]) -> None:
        value = made[term]
        made[term] = value + (value - value.detach()).sqrt()  # 0, with a slope of infinity

    broken_at(3, side, monkeypatch, harm)
    run = Run(tiny(), tmp_path)
    with pytest.raises(NonFiniteLoss, match="a gradient became infinite or NaN in step 3") as error:
        run()
    assert "\n" not in str(error.value)
    assert saved(tmp_path)["step"] == 2
    assert all(bool(p.isfinite().all()) for p in run.trainer.model.parameters())


def test_a_failing_discriminator_leaves_the_generators_half(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(3, "discriminator", monkeypatch,
              lambda made: made.update(real=made["real"] * float("inf")))
    run = Run(tiny(), tmp_path)
    with pytest.raises(NonFiniteLoss, match=r"losses\.real: became inf"), pytest.warns(
            UserWarning, match="saved at step 2, with the generator's half of the next"):
        run()
    assert saved(tmp_path)["step"] == 2
    (change,) = facts(tmp_path / "model.safetensors")["changes"]
    assert change["step"] == 2 and "generator" in change["changed"]


def test_an_error_within_an_update_keeps_the_earlier_state(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = until(tiny(), tmp_path, 2)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(run.trainer._optimizer_g, "step", failing)
    run.trainer.step_count = 3  # one step since the checkpoint
    with pytest.raises(RuntimeError, match="fell off"), pytest.warns(
            UserWarning, match="1 steps since the last checkpoint are lost: it came in the middle"):
        run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("error", [NonFiniteLoss, RuntimeError, KeyboardInterrupt])
def test_an_error_puts_running_statistics_back(
        error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = until(tiny(), tmp_path, 2)
    before = {name: b.clone() for name, b in run.trainer.model.named_buffers()}
    def harm(made: dict[str, Tensor]) -> None:  # when the forward has moved them
        assert any(not torch.equal(b, before[n]) for n, b in run.trainer.model.named_buffers())
        if error is not NonFiniteLoss:
            raise error("out of memory")
        made.update(kl=made["kl"] * float("nan"))

    broken_at(1, "generator", monkeypatch, harm)
    with pytest.raises(error):
        run.trainer.step(run.batches.step(), 0)
    assert all(torch.equal(b, before[name]) for name, b in run.trainer.model.named_buffers())


def test_all_processes_see_the_same_losses(tmp_path: Path) -> None:
    """What is no number in one process stops all of them, before any update."""
    class Two(Processes):
        def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
            return module

        def mean(self, values: Tensor) -> Tensor:
            return (values + float("nan")) / 2  # the other's

    run = Run(tiny(), tmp_path)
    run.trainer.processes = Two(1, 2)
    before = {name: p.clone() for name, p in run.trainer.model.named_parameters()}
    with pytest.raises(NonFiniteLoss):
        run.trainer.step(run.batches.step(), 0)
    assert all(torch.equal(p, before[name]) for name, p in run.trainer.model.named_parameters())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_bad_picture_loses_no_step(workers: str, tmp_path: Path) -> None:
    data, random = tmp_path / "data", np.random.default_rng(0)
    for i in range(8):
        picture = random.integers(0, 256, (64, 64, 3), np.uint8)
        write_png(data / f"images/{i}.png", picture)
        write_indices(data / f"labels/{i}.png", random.integers(0, 8, (64, 64)))
    config = tiny("--data.name", "folder", "--data.root", str(data), "--data.workers", workers)
    train(config, tmp_path / "whole")
    last = next(iter(Order(8, 2, 1, 0, Place(0, 6), Processes())))[1].index  # of the fourth step
    bad, good = data / f"images/{last}.png", (data / f"images/{last}.png").read_bytes()
    bad.write_bytes(good[:100])
    with pytest.raises(ValueError, match=rf"{last}\.png: cannot be read") as error, pytest.warns(
            UserWarning, match="train: saved at step 3; --resume"):
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    bad.write_bytes(good)
    assert len(rows(tmp_path / "run")) == saved(tmp_path / "run")["step"] == 3
    train(config, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_full_disk_under_the_log_loses_no_step(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = LossTable.add

    def full(self: LossTable, row: dict[str, float]) -> None:
        if row["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", "losses.csv")
        add(self, row)

    monkeypatch.setattr(LossTable, "add", full)
    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="step 4"):
        train(tiny(), tmp_path)
    assert saved(tmp_path)["step"] == facts(tmp_path / "model.safetensors")["step"] == 4


def test_an_epoch_that_an_error_ends_is_kept(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = LossTable.add

    def full(self: LossTable, row: dict[str, float]) -> None:
        if row["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", "losses.csv")
        add(self, row)

    config = tiny("--log.keep_epochs", "1")
    with monkeypatch.context() as patched:
        patched.setattr(LossTable, "add", full)
        with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="4"):
            train(config, tmp_path)
    train(config, tmp_path, resume=True)
    for epoch, step in ((1, 4), (2, 8)):
        kept = torch.load(tmp_path / f"kept/epoch_{epoch:04d}.pt", weights_only=True)
        assert kept["step"] == step


def test_a_kept_state_survives_what_is_copied_over_the_last(tmp_path: Path) -> None:
    config = tiny("--log.keep_epochs", "1", "--log.keep", "3", "--log.checkpoint_every", "2")
    train(config, tmp_path)
    shutil.copy(tmp_path / "kept/epoch_0001.pt", tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "kept/epoch_0002.pt", weights_only=True)["step"] == 8
    until(config, tmp_path, 6, True)
    steps = sorted(path.stem for path in (tmp_path / "kept").glob("step_*.pt"))
    assert steps[-1] == "step_0000006"  # those of the course that was left are gone
    weights = sorted(path.stem for path in (tmp_path / "kept").glob("step_*.safetensors"))
    assert weights == steps


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    run = until(tiny(), tmp_path, 2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        run.trainer.model.generator.conv_img.weight[0] = float("inf")
    run.trainer.step_count += 1
    with pytest.raises(NonFiniteLoss, match=r"weights: generator\.conv_img\.weight is not finite"):
        run.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_an_average_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    run = Run(tiny("--optimizer.ema", "0.9"), tmp_path)
    assert run.trainer.ema is not None
    with torch.no_grad():
        next(run.trainer.ema.averaged.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"weights: module\..* is not finite after step 0"):
        run.save()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_damaged_state_names_the_kept_ones(tmp_path: Path) -> None:
    until(tiny("--log.keep", "2"), tmp_path, 2)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK half")
    with pytest.raises(CheckpointError, match=r"cannot be read .*kept has earlier ones"):
        Run(tiny(), tmp_path, resume=True)


def test_a_state_is_read_without_its_code(tmp_path: Path) -> None:
    state = {"format": 2, "config": {}, "code": partial(print, "run")}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)
    for other in ({"format": 1, "config": {}}, [1, 2]):
        torch.save(other, tmp_path / "checkpoint.pt")
        with pytest.raises(CheckpointError, match="is no training state of this version"):
            read_state(tmp_path)


@pytest.mark.parametrize(("option", "value"), [
    ("schedule.freeze_global_epochs", "3"), ("seed", "1"), ("network.ngf", "8"),
    ("init_gain", "1"), ("whiten", "true"),
])
def test_what_saved_tensors_depend_on_is_fixed(option: str, value: str, tmp_path: Path) -> None:
    name = {"recipe": "pix2pixhd_cityscapes_1024"}
    save_state(tmp_path, {"average": None}, from_dict(name))
    with pytest.raises(CheckpointError, match=rf"resume: {option} differ"):
        load_state(tmp_path, from_dict(name, [f"--{option}", value]))
    free = ["--schedule.epochs", "60", "--data.batch", "2", "--precision", "bf16", "--losses.gan",
            "hinge", "--log.every", "3", "--init", "w.pth", "--optimizer.generator", "1e-3"]
    assert load_state(tmp_path, from_dict(name, free))["average"] is None


@pytest.mark.parametrize(("then", "now"), [("0", "0.9"), ("0.9", "0")])
def test_an_average_neither_begins_nor_ends_midway(then: str, now: str, tmp_path: Path) -> None:
    average = None if then == "0" else {"n_averaged": torch.ones(())}
    save_state(tmp_path, {"average": average}, tiny("--optimizer.ema", then))
    with pytest.raises(CheckpointError, match=rf"optimizer\.ema was {float(then)} in .*midway"):
        load_state(tmp_path, tiny("--optimizer.ema", now))
    for kept in {then, "0.5" if average else "0"}:  # another decay goes on with it
        assert load_state(tmp_path, tiny("--optimizer.ema", kept))["average"] == average


def test_saved_files_are_on_the_disk_before_they_take_their_place(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    save_state(tmp_path, {"average": None}, tiny())
    save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "w.safetensors")
    assert synced == [(tmp_path / name).stat().st_size
                      for name in ("checkpoint.pt", "w.safetensors")]


def test_the_record_tells_average_and_precision(tmp_path: Path) -> None:
    run = Run(tiny("--optimizer.ema", "0.5", "--precision", "bf16"), tmp_path)
    run.trainer.step_count, run.place = 5, Place(1, 2)
    run.save()
    record = json.loads((tmp_path / "record.json").read_text())
    assert {key: record[key] for key in ("step", "epoch", "ema", "precision")} == {
        "step": 5, "epoch": 1, "ema": 0.5, "precision": "bf16"}


def test_the_record_tells_pictures_processes_and_source(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures that there are, not data.count, and the source that is loaded, whatever is
    pulled meanwhile."""
    for i in range(6):
        write_png(tmp_path / f"data/images/{i}.png", np.zeros((64, 64, 3), np.uint8))
        write_indices(tmp_path / f"data/labels/{i}.png", np.zeros((64, 64), np.int64))
    monkeypatch.setattr("smis_models.training.run.commit", lambda: "as loaded")
    run = Run(tiny("--data.name", "folder", "--data.root", str(tmp_path / "data")),
              tmp_path / "run")
    monkeypatch.setattr("smis_models.training.run.commit", lambda: "pulled meanwhile")
    run.processes = Processes(0, 2)
    run._export()
    record = json.loads((tmp_path / "run/record.json").read_text())
    expected = {"pictures": 6, "processes": 2, "commit": "as loaded", "step": 0, "losses": {},
                "model": "groupdnet_deepfashion", "device": "cpu"}
    assert {key: record[key] for key in expected} == expected
    assert record["versions"]["torch"] == torch.__version__


# Progress and logs


def test_minutes_are_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, run = [0.0], Run(tiny(), tmp_path)
    monkeypatch.setattr("smis_models.training.run.time",
                        SimpleNamespace(monotonic=lambda: now[0]))

    def slow(*_: Any) -> dict[str, float]:
        now[0] += 7
        run.trainer.step_count += 1
        return {"kl": 0.0}

    monkeypatch.setattr(run.trainer, "step", slow)
    assert run(minutes=0.5).step == 5  # after 35 seconds


def test_losses_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("step,kl\n1,0.5\n", encoding="utf-8-sig")
    LossTable(path, 1)
    assert path.read_bytes() == b"step,kl\n1,0.5\n"
    for text in ("step;kl\n1;0,5\n", "step,kl\n1.0,0.5\n", "kl\n0.5\n"):
        path.write_text(text, encoding="utf-8-sig")
        with pytest.warns(UserWarning, match=r"losses: .* it is kept as .*losses_aside\.csv"):
            LossTable(path, 1).add({"step": 2, "kl": 0.125})
        assert path.read_text() == "step,kl\n2,0.125\n"
        assert (tmp_path / "losses_aside.csv").read_text(encoding="utf-8-sig") == text


def test_half_a_row_of_losses_goes(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("step,kl\n1,0.5\n2,0.25\n3")
    LossTable(path, 3).add({"step": 3, "kl": 0.125})
    assert path.read_text() == "step,kl\n1,0.5\n2,0.25\n3,0.125\n"


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes there, bytes elsewhere")
def test_memory_is_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=3_000_000))
    assert memory(torch.device("cpu")) == 3000
    monkeypatch.setattr("sys.platform", "darwin")  # which counts bytes
    assert memory(torch.device("cpu")) == 3


def test_speed_is_of_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("smis_models.training.loggers.time.perf_counter", lambda: now[0])
    clock = Clock()
    for _ in range(3):
        with clock.waiting():
            now[0] += 1
        now[0] += 3
        clock.count(4)
    assert clock.look() == {"images_per_second": 1.0, "waiting": 0.25}
    now[0] += 2
    clock.count(4)
    assert clock.look() == {"images_per_second": 2.0, "waiting": 0.0}


def test_progress_tells_epoch_and_time_left(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("smis_models.training.run.time",
                        SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("smis_models.training.loggers.time",
                        SimpleNamespace(perf_counter=lambda: now[0]))
    config = tiny("--optimizer.accumulate", "2")
    until(config, tmp_path, 2)
    run = Run(config, tmp_path, resume=True)
    step, fetch = run.trainer.step, run.batches.step

    def slow(*arguments: Any) -> dict[str, float]:
        now[0] += 7
        return step(*arguments)

    def late() -> Any:
        now[0] += 3
        return fetch()

    monkeypatch.setattr(run.trainer, "step", slow)
    monkeypatch.setattr(run.batches, "step", late)
    told: list[Any] = []
    run(told.append)
    assert [(p.step, p.steps, p.epoch, p.epochs) for p in told] == [
        (s, 8, 1 if s <= 4 else 2, 2) for s in range(3, 9)]
    assert [p.left for p in told] == [pytest.approx(10 * (8 - p.step)) for p in told]
    for progress in told:
        assert progress.values["images_per_second"] == pytest.approx(2 / 10)  # both pictures
        assert progress.values["waiting"] == pytest.approx(0.3)
        assert progress.values["memory"] > 50


class FakeWandB(ModuleType):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told: list[Any] = []
        self.Image = lambda picture: ("picture", picture.shape)

    def init(self, **options: Any) -> Any:
        self.told.append(("init", options))
        return SimpleNamespace(
            log=lambda values: self.told.append(("log", values)),
            define_metric=lambda *names, **of: self.told.append(("metric", names, of)),
            finish=lambda: self.told.append(("finish",)))


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("--log.wandb", "true", "--log.grid_every", "2", "--log.rows", "1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb") as error:
        Run(config, tmp_path / "none")
    assert "\n" not in str(error.value)
    first, second = FakeWandB(), FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", first)
    until(config, tmp_path / "run", 2)
    monkeypatch.setitem(sys.modules, "wandb", second)
    until(config, tmp_path / "run", 3, True)
    begun, again = (fake.told[0][1] for fake in (first, second))
    assert begun["id"] == again["id"] and begun["resume"] == "allow"
    assert begun["config"] == to_dict(config)
    assert first.told[1] == ("metric", ("*",), {"step_metric": "step"})
    logged = [values for kind, *rest in first.told if kind == "log" for values in rest]
    assert [values["step"] for values in logged] == [1, 1, 2, 2, 2]
    table = rows(tmp_path / "run")
    assert logged[0]["losses/kl"] == float(table[0]["kl"])
    assert {"run/images_per_second", "run/memory", "run/waiting"} <= set(logged[1])
    assert logged[4]["samples"] == ("picture", (84 - 4, 6 * 68 - 4, 3))
    assert first.told[-1] == second.told[-1] == ("finish",)
    WandB(tmp_path / "run", 0, {})  # a run that begins anew is another there
    assert second.told[-2][1]["id"] != begun["id"]


def test_the_best_are_judged_by_the_average(tmp_path: Path) -> None:
    run = Run(tiny("--optimizer.ema", "0.5", "--log.best", "pixel", "--log.best_scenes", "2",
                   "--optimizer.generator", "3e-2", "--init_gain", "1"), tmp_path)
    for _ in range(3):
        run.trainer.step(run.batches.step(), 0)
    run.save()
    model = create_model(checkpoint=tmp_path / "best.safetensors").eval()
    scenes = GeneratedScenes(2, 64, "val")
    batch = Collate(model.preset)([scenes[0], scenes[1]])
    with torch.no_grad():
        z, _ = model.encoder.encode(batch["image"], batch["labels"])
        apart = (model.generator(batch["layout"], z) - batch["image"]).abs().mean()
    judged = facts(tmp_path / "best.safetensors")["best"]["value"]
    assert judged == pytest.approx(float(apart), rel=1e-4)
