"""Codes, seeds and splits: what a step draws, what repeats, and which pictures it sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SMALL_TRAINING
from torch import Tensor
from typer.testing import CliRunner

from smis_kernels import LabelLayout, use_backend
from smis_models import cli, create_model
from smis_models.data import Batch, FileScenes, GeneratedScenes, Preprocess, build_dataset
from smis_models.families import DEEPFASHION
from smis_models.io.images import write_indices, write_png
from smis_models.io.seeds import derived_seed
from smis_models.training import Run, TrainConfig, from_dict
from smis_models.training.batches import Batches, MicroBatch, Order, Place, dataset
from smis_models.training.distributed import Processes
from smis_models.training.trainer import Trainer, _first_pictures

pytest.importorskip("jsonargparse")
CPU = torch.device("cpu")


def tiny(*arguments: str) -> TrainConfig:
    return from_dict({
        **SMALL_TRAINING,
        "data": {"name": "scenes", "batch": 4, "workers": 0, "count": 12},
        "losses": {"perceptual": 0.0}, "log": {"grid_every": 1, "rows": 2, "tensorboard": False},
    }, arguments)


def steps(config: TrainConfig, count: int, processes: Processes | None = None,
          start: int = 0) -> list[list[MicroBatch]]:
    made = Batches(dataset(config, "train"), config, processes or Processes(), CPU, start)
    return [made.step() for _ in range(count)]


def drawn(batches: list[list[MicroBatch]]) -> list[Tensor]:
    """Every code of these steps, one row each, of two draws."""
    like = torch.empty(1, 5, 3)
    return [batch.noise(like, draw) for step in batches for batch in step for draw in (0, 1)]


def test_no_code_comes_twice() -> None:
    config = tiny("--optimizer.accumulate", "2")
    rows = torch.cat(drawn(steps(config, 4))).flatten(1)
    assert len(rows) == 4 * 2 * 2 * 2
    assert len(rows.unique(dim=0)) == len(rows)
    many = steps(config, 1)[0][0].noise(torch.empty(1, 500, 100))
    assert abs(float(many.mean())) < 0.01 and abs(float(many.std()) - 1) < 0.01


def test_codes_follow_seed_and_step_alone() -> None:
    config, other = tiny(), tiny("--seed", "1")
    first = drawn(steps(config, 3))
    assert all(map(torch.equal, first, drawn(steps(config, 3))))
    for step, draw in ((0, 0), (2, 1)):  # of runs that go on
        random = torch.Generator().manual_seed(derived_seed(derived_seed(0, step, 0), draw))
        assert torch.equal(first[2 * step + draw], torch.randn((4, 5, 3), generator=random))
    assert all(map(torch.equal, first[2:], drawn(steps(config, 2, start=1))))
    assert not any(map(torch.equal, first, drawn(steps(other, 3))))
    shares = [drawn(steps(config, 3, Processes(rank, 2))) for rank in range(2)]
    assert all(torch.equal(torch.cat(pair), whole)
               for pair, whole in zip(zip(*shares, strict=True), first, strict=True))


def test_a_class_of_one_pixel_is_shown() -> None:
    labels = torch.zeros(2, 4, 5, dtype=torch.uint8)
    labels[0, 3, 4], labels[1, 1, 0] = 2, 3
    found = MicroBatch(torch.empty(2, 3, 4, 5), labels).shown(4)
    assert found.tolist() == [[True, False, True, False], [True, False, False, True]]


def test_the_generator_reads_a_layout_and_the_reference_planes() -> None:
    found = {}
    for backend in ("auto", "reference"):
        with use_backend(backend):
            ((batch,),) = steps(tiny(), 1)
        found[backend] = batch.semantics
    assert isinstance(found["auto"], LabelLayout)
    assert isinstance(found["reference"], Tensor)
    assert torch.equal(found["auto"].dense(), found["reference"])


def test_a_derived_seed_stays_what_it_was() -> None:
    """Of runs that go on, and of samples that are painted again."""
    assert [derived_seed(*numbers) for numbers in ((0,), (0, 1), (1, 0), (3, 1, 4, 1, 5))] == [
        7896617691693857887, 2918264622725855778, 3717377837946358015, 1287521189320880938]
    every = {derived_seed(*numbers) for numbers in np.ndindex(6, 6, 6)}
    assert len(every) == 6**3 and max(every) < 2**63


def test_every_epoch_has_an_order_of_its_own() -> None:
    """Permutations of torch's own generator, by seed and epoch."""
    def indices(place: Place, steps: int) -> list[int]:
        order = iter(Order(12, 4, 1, 7, place, Processes()))
        return [draw.index for _ in range(steps) for draw in next(order)]

    orders = [indices(Place(epoch, 0), 3) for epoch in range(3)]
    assert orders == [
        torch.randperm(12, generator=torch.Generator().manual_seed(derived_seed(7, k))).tolist()
        for k in range(3)]
    assert len(set(map(tuple, orders))) == 3
    assert indices(Place(0, 0), 9) == [index for order in orders for index in order]


def test_every_step_seeds_torch_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, float]] = []
    config = tiny()
    for rank in (0, 1):
        trainer = Trainer(config)
        objective = trainer.objective
        plain = objective.generator

        def looking(batch: MicroBatch, plain=plain) -> object:
            seeds.append((torch.initial_seed(), float(torch.rand(()))))
            return plain(batch)

        monkeypatch.setattr(objective, "generator", looking)
        trainer.processes = Processes(rank, 1)
        for batches in steps(config, 3):
            trainer.step(batches, 0)
    assert len({seed for seed, _ in seeds}) == len({value for _, value in seeds}) == 6
    assert [seed for seed, _ in seeds[:3]] == [derived_seed(0, step, 0) for step in range(3)]


def test_generated_pictures_are_of_their_split(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("--seed", "3")
    run = Run(config, tmp_path)
    train = GeneratedScenes(12, 64, "train", seed=3)
    known = {train[i]["image"].numpy().tobytes() for i in range(12)}
    seen = [image.numpy().tobytes() for _ in range(3) for batch in run.batches.step()
            for image in batch.image]
    assert set(seen) == known  # an epoch shows each once
    assert len(dataset(config, "val", 20)) == 20  # not the 12 of an epoch
    held_out = GeneratedScenes(2, 64, "val", seed=3)
    assert run._shown is not None
    for i in range(2):
        assert torch.equal(run._shown.image[i], held_out[i]["image"])
    monkeypatch.setattr("smis_models.training.trainer._WHITENED", 12)
    whitening = [image for batch in _first_pictures(config, CPU) for image in batch.image]
    assert {image.numpy().tobytes() for image in whitening} == known
    other = Run(tiny("--seed", "3", "--log.grid_split", "test"), tmp_path / "other")
    assert other._shown is not None
    assert torch.equal(other._shown.image[0], GeneratedScenes(2, 64, "test", seed=3)[0]["image"])


@pytest.mark.parametrize(("there", "taken"), [(700, 512), (300, 300)])
def test_whitening_looks_at_so_many_pictures(
        there: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones, in batches of the training's size, of which the last may have fewer."""
    asked: list[tuple[str, int]] = []

    def pictures(config: TrainConfig, split: str, count: int) -> list[int]:
        asked.append((split, count))
        return list(range(there))

    monkeypatch.setattr("smis_models.training.trainer.dataset", pictures)
    monkeypatch.setattr("smis_models.training.batches.Collate", lambda preset: list)
    monkeypatch.setattr(MicroBatch, "of", lambda batch, device: batch)
    batches: list[list[int]] = list(_first_pictures(tiny("--data.batch", "100"), CPU))  # type: ignore
    assert [i for batch in batches for i in batch] == list(range(taken))
    assert {len(batch) for batch in batches[:-1]} == {100} and asked == [("train", 512)]


GREY = {"train": 50, "val": 200, "test": 120}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Splits of one grey level each."""
    for split, grey in GREY.items():
        for i in range(4):
            write_png(tmp_path / f"{split}/images/{i}.png", np.full((64, 64, 3), grey, np.uint8))
            write_indices(tmp_path / f"{split}/labels/{i}.png", np.zeros((64, 64), np.int64))
    return tmp_path


def test_pictures_on_disk_are_of_their_split(folder: Path, tmp_path: Path) -> None:
    for split, grey in GREY.items():
        found = build_dataset("folder", folder, DEEPFASHION, split)[0]["image"]
        assert int(((found[0, 0, 0] + 1) * 127.5).round()) == grey
    run = Run(tiny("--data.name", "folder", "--data.root", str(folder)), tmp_path / "run")
    for batches in (run.batches.step(), [run._shown]):
        grey = GREY["train" if batches[0] is not run._shown else "val"]
        assert all(bool((((b.image + 1) * 127.5).round() == grey).all()) for b in batches)


def test_options_of_the_data_reach_the_pictures(folder: Path) -> None:
    here = ("--data.name", "folder", "--data.root", str(folder))
    config = tiny(*here, "--data.mode", "scale_width_and_crop", "--data.load", "[80,96]",
                  "--data.flip", "false", "--data.unknown", "3", "--seed", "6")
    given = Preprocess("scale_width_and_crop", (64, 64), (80, 96), flip=False)
    for split in ("train", "val"):
        found = dataset(config, split)
        assert isinstance(found, FileScenes)
        assert found.preprocess == replace(given, augment=split == "train")
        assert (found.unknown, found.seed, found.option) == (3, 6, "--data.unknown")
    first = dataset(tiny(*here, "--data.unknown", "0"), "train")  # a class as any other
    assert isinstance(first, FileScenes) and first.unknown == 0
    plain = dataset(tiny(*here), "train")
    assert isinstance(plain, FileScenes) and plain.unknown is None
    assert plain.preprocess == Preprocess("resize_and_crop", (64, 64), (72, 72))


def test_evaluation_takes_the_held_out_split(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                             tmp_path: Path) -> None:
    asked: list[tuple[str, bool | None]] = []
    evaluating = import_module("smis_models.cli.evaluate")

    def asking(name: str, root: object, preset: object, split: str, **options: object) -> object:
        asked.append((split, options["augment"]))
        return build_dataset(name, root, preset, split, **options)

    monkeypatch.setattr(evaluating, "build_dataset", asking)
    network = create_model("groupdnet_deepfashion", ngf=8, nef=8, image_size=(64, 64),
                           upsampling="normal").eval()
    monkeypatch.setattr(cli.common.Chosen, "load", lambda _: network)
    command = ["evaluate", "--model", "groupdnet_deepfashion", "--dataset", "folder", "--root",
               str(folder), "--out", str(tmp_path / "r.json"), "--distance", "pixel"]
    CliRunner().invoke(cli.app, command)
    assert asked == [("val", False)]
    CliRunner().invoke(cli.app, [*command, "--split", "train"])
    assert asked[-1] == ("train", False)



def test_batches_come_where_signals_are_not_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("signal.pthread_sigmask")
    monkeypatch.delattr("signal.SIGCHLD")
    assert len(steps(tiny(), 1)[0]) == 1


@pytest.mark.parametrize("error", [
    EOFError(), ConnectionResetError(104, "Connection reset by peer"), FileNotFoundError(2, "none"),
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
], ids=repr)
def test_a_worker_that_ended_is_told_of(error: Exception) -> None:
    """Whichever of them the training process meets first: its pipe, its socket or its end."""
    assert "a worker ended" in str(met(error, "2"))
    if not isinstance(error, RuntimeError):
        assert met(error, "0") is error  # nothing but the data set raises without workers


@pytest.mark.parametrize("kind", [EOFError, OSError, RuntimeError, TypeError])
def test_what_a_data_set_raises_in_a_worker_stays_what_it_is(kind: type[Exception]) -> None:
    error = kind("Caught an error in DataLoader worker process 0.\nOriginal Traceback ...")
    assert met(error, "2") is error


def met(error: Exception, workers: str) -> Exception:
    """What a step raises where the next batch's coming raises ``error``."""
    def broken() -> Iterator[Batch]:
        raise error
        yield

    config = tiny("--data.workers", workers)
    batches = Batches(dataset(config, "train"), config, Processes(), CPU)
    batches._iterator = broken()
    with pytest.raises(type(error) if workers == "0" else Exception) as raised:
        batches.step()
    return raised.value
