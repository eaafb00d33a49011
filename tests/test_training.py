"""Training: options, order, steps of every recipe, exact resume, processes, bad input."""

from __future__ import annotations

import csv
import math
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_models import SMALL_TRAINING
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from smis_models import create_model
from smis_models.data import Collate, Draw, GeneratedScenes
from smis_models.families import GroupDNetPreset, Pix2pixHDPreset, SynthesisModel
from smis_models.io.checkpoint import CheckpointError, save_checkpoint
from smis_models.networks import losses
from smis_models.training import (
    RECIPES,
    DataConfig,
    LogConfig,
    LossConfig,
    NonFiniteLoss,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TrainConfig,
    from_dict,
    load_config,
    to_json,
    train,
)
from smis_models.training.batches import Batches, MicroBatch, Order, dataset
from smis_models.training.distributed import Processes, process_group, unsynchronized
from smis_models.training.loggers import TensorBoard
from smis_models.training.trainer import Trainer
from smis_models.training.whiten import whiten_codes

pytest.importorskip("jsonargparse")

TINY = {
    **SMALL_TRAINING,
    "losses": {"perceptual": 0.0, "pixel": 10.0},
    "schedule": {"epochs": 1, "decay_epochs": 1},
    "log": {"every": 1, "checkpoint_every": 3, "grid_every": 0, "tensorboard": False},
}


def tiny(*arguments: str) -> TrainConfig:
    """A small GroupDNet on generated scenes: 8 steps of 2 pictures."""
    return from_dict(TINY, arguments)


def small(name: str, *arguments: str) -> TrainConfig:
    """A recipe with few channels, on generated scenes."""
    given: dict[str, object] = {**TINY, "recipe": name}
    widths: dict[str, object] = {"ngf": 2, "ndf": 4, "image_size": [64, 64], "classes": 8}
    network = RECIPES[name]().network
    widths |= {"dont_care": None}
    for option, value in (("nef", 8), ("hidden", 32), ("upsampling", "normal")):
        if hasattr(network, option):
            widths[option] = value
    if isinstance(network, GroupDNetPreset):
        widths |= {"ngf": 8, "nef": 8, "groups": [math.gcd(8, count) for count in network.groups]}
    if isinstance(network, Pix2pixHDPreset):
        widths |= {"blocks": 1, "local_blocks": 1}
    frozen = min(1, RECIPES[name]().schedule.freeze_global_epochs)
    schedule = {"epochs": 1, "decay_epochs": 1, "freeze_global_epochs": frozen}
    return from_dict({**given, "network": widths, "losses": {"perceptual": 0.0},
                      "schedule": schedule, "whiten": False}, arguments)


def curve(folder: Path) -> list[dict[str, str]]:
    """losses.csv without what depends on the machine."""
    with (folder / "losses.csv").open(newline="") as file:
        return [{k: v for k, v in row.items()
                 if k not in ("images_per_second", "waiting", "memory")}
                for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_of_every_recipe(name: str, tmp_path: Path) -> None:
    config = small(name)
    run = Run(config, tmp_path)
    before = {k: v.clone() for k, v in run.trainer.model.state_dict().items()}
    values = run.trainer.step(run.batches.step(), 0)
    weights = config.losses
    expected = ({"gan", "fake", "real"} if weights.adversarial > 0 else set()) | {
        term for term in ("feature_matching", "kl", "pixel", "prior", "latent", "diversity")
        if getattr(weights, term) > 0
    }
    assert set(values) == expected
    after = run.trainer.model.state_dict()
    for part, module in run.trainer.model.named_children():
        trained = [n for n, p in module.named_parameters() if p.grad is not None]
        if part == "discriminator" and weights.adversarial == 0:
            continue
        assert any(not torch.equal(before[f"{part}.{n}"], after[f"{part}.{n}"]) for n in trained)
    run.save()
    assert create_model(checkpoint=tmp_path / "model.safetensors").preset == config.network


def test_published_recipes() -> None:
    deepfashion = RECIPES["groupdnet_deepfashion"]()
    assert deepfashion.data.batch == 8 and deepfashion.schedule.total == 100
    assert deepfashion.optimizer.generator == 1e-4 and deepfashion.optimizer.discriminator == 4e-4
    # Four devices, each of which summed the KL of its own two images.
    assert deepfashion.losses.kl == pytest.approx(0.05 / 4)
    enhanced = RECIPES["pix2pixhd_cityscapes_1024"]()
    assert enhanced.schedule.freeze_global_epochs == 10 and enhanced.losses.gan == "ls"
    assert enhanced.optimizer.betas == (0.5, 0.999) and enhanced.optimizer.reuse_fake
    assert RECIPES["ccfpse_coco"]().losses.feature_matching == 20


def test_without_an_adversary_the_discriminator_rests(tmp_path: Path) -> None:
    run = Run(tiny("--losses.adversarial", "0", "--losses.feature_matching", "0"), tmp_path)
    before = {k: v.clone() for k, v in run.trainer.model.discriminator.state_dict().items()}
    assert set(run.trainer.step(run.batches.step(), 0)) == {"kl", "pixel"}
    after = run.trainer.model.discriminator.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_without_noise_pictures_are_of_the_mean_code(tmp_path: Path) -> None:
    run = Run(tiny("--losses.code_noise", "0"), tmp_path)
    (batch,) = run.batches.step()
    model = run.trainer.model.eval()
    with torch.no_grad():
        painted = run.trainer.objective.paint(batch, {})
        mean = model.generator(batch.semantics, model.encoder.encode(batch.image, batch.labels)[0])
    assert torch.equal(painted, mean)


def test_pixels_are_weighed_by_class(tmp_path: Path) -> None:
    run = Run(tiny("--losses.pixel", "1", "--losses.pixel_mean", "classes"), tmp_path)
    (batch,) = run.batches.step()
    fake = torch.rand_like(batch.image)
    by_class = []
    for picture, real, labels in zip(fake, batch.image, batch.labels, strict=True):
        apart = (picture - real).abs().mean(0)
        by_class.append(sum(apart[labels == c].mean() for c in labels.unique())
                        / len(labels.unique()))
    found = run.trainer.objective.distance(fake, batch)
    torch.testing.assert_close(found, sum(by_class) / len(fake))


def test_whitened_codes_paint_the_same_pictures(tmp_path: Path) -> None:
    model = create_model("groupdnet_scenes", ngf=8, nef=8, init_gain=1.0).double().eval()
    pictures = GeneratedScenes(48, 128, "train")
    collated = Collate(model.preset)([pictures[i] for i in range(48)])
    collated["image"] = collated["image"].double()
    batch = MicroBatch.of(collated, torch.device("cpu"))

    def look() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            mu, logvar = model.encoder.encode(batch.image, batch.labels)
            return model.generator(batch.semantics, mu), mu.view(48, 8, 8), logvar

    before, codes, _ = look()
    whiten_codes(model, [batch], noise=0.5)
    after, white, logvar = look()
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(logvar.exp().sqrt(), torch.full_like(logvar, 0.5))
    for c in range(8):
        shown = (batch.labels == c).flatten(1).any(1)
        found, first = white[shown, c], codes[shown, c]
        torch.testing.assert_close(found.mean(0), torch.zeros(8, dtype=torch.float64))
        # Rotated to their main directions; the strong ones have variance 1.
        spectrum = torch.linalg.eigvalsh(first.T.cov())
        least = (spectrum / (0.01 * spectrum[-1])).clamp_max(1.0)
        torch.testing.assert_close(found.T.cov(), least.diag())


def test_weights_start_from_the_seed_or_a_file(tmp_path: Path) -> None:
    config = tiny("--seed", "5", "--init_gain", "0.7")
    options = {field.name: getattr(config.network, field.name) for field in fields(config.network)}

    def same(config: TrainConfig, expected: SynthesisModel) -> None:
        found, wanted = Trainer(config).model.state_dict(), expected.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())

    same(config, create_model(config.model, seed=5, init_gain=0.7, **options))
    other = create_model(config.model, seed=9, init_gain=0.3, **options)
    save_checkpoint(other, tmp_path / "w.safetensors")
    same(replace(config, init=str(tmp_path / "w.safetensors")), other)


def test_a_part_that_starts_at_random_is_told(tmp_path: Path) -> None:
    config = tiny("--seed", "5")
    options = {field.name: getattr(config.network, field.name) for field in fields(config.network)}
    own, other = (create_model(config.model, seed=seed, **options) for seed in (5, 9))
    for part, absent in (("generator", "encoder"), ("encoder", "generator")):
        torch.save(other.get_submodule(part).state_dict(), tmp_path / f"{part}.pth")
        with pytest.warns(UserWarning, match=rf"init: .*{part}\.pth holds no {absent}, which") as (
                told):
            found = Trainer(replace(config, init=str(tmp_path / f"{part}.pth"))).model
        assert len(told) == 1
        for name, expected in ((part, other), (absent, own), ("discriminator", own)):
            state = found.get_submodule(name).state_dict()
            for key, value in expected.get_submodule(name).state_dict().items():
                assert torch.equal(state[key], value), key


def test_a_run_starts_from_whitened_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("groupdnet_scenes", ngf=8, nef=8, ndf=4, latent_channels=2, init_gain=1.0)
    save_checkpoint(model, tmp_path / "w.safetensors")
    config = from_dict({
        "recipe": "groupdnet_scenes", "network": {"ngf": 8, "nef": 8, "ndf": 4,
                                                  "latent_channels": 2},
        "data": {"batch": 8, "workers": 0, "count": 12}, "whiten": True,
        "init": str(tmp_path / "w.safetensors")})
    monkeypatch.setattr("smis_models.training.trainer._WHITENED", 12)
    trained = Trainer(config).model
    pictures = GeneratedScenes(12, 128, "train")
    batch = MicroBatch.of(Collate(model.preset)([pictures[i] for i in range(12)]),
                          torch.device("cpu"))
    whiten_codes(model.eval(), [batch])
    assert all(module.training for module in trained.modules())
    found = trained.state_dict()
    deviation = (found["encoder.fc_var.bias"] / 2).exp()
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.3))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
    monkeypatch.setattr("smis_models.training.trainer._WHITENED", 2)  # no more than a code's values
    with pytest.raises(ValueError, match="expected more than 2 pictures that show class 0, got 2"):
        Trainer(config)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--whiten", "true"), "one code of 1x1"),
    (("--whiten", "true", "--network.upsampling", "more"), "expected init"),
])
def test_only_codes_of_one_pixel_are_whitened(arguments: tuple[str, ...], message: str,
                                              tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Run(tiny(*arguments), tmp_path)


def test_learning_rates_fall_linearly_by_epoch() -> None:
    schedule = replace(tiny().schedule, epochs=2, decay_epochs=4)
    assert [schedule.factor(e) for e in range(6)] == [1, 1, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("content", "arguments", "message"), [
    ({"recipe": "nothing"}, [], "config: expected .* got 'nothing'"),
    ({}, [], "config: expected a recipe or a model"),
    ({"recipe": "spade_coco", "losses": {"kll": 1}}, [], "does not accept option 'kll'"),
    (TINY, ["--losses.kll", "1"], "unrecognized arguments: --losses.kll"),
    (TINY, ["--data.batch", "two"], 'key "data.batch": Expected a <class \'int\'>'),
    (TINY, ["--data.batch", "0"], "data.batch: expected at least 1, got 0"),
    (TINY, ["--optimizer.accumulate", "2", "--data.batch", "3"], "data.batch: expected a multiple"),
    (TINY, ["--optimizer.ema", "1"], "optimizer.ema: expected a decay below 1"),
    (TINY, ["--optimizer.betas", "[0.5,1]"], "optimizer.betas: expected two numbers in"),
    (TINY, ["--losses.adversarial", "0"], "losses.feature_matching: expected 0 where"),
    (TINY, ["--losses.pixel_mean", "images"], 'key "losses.pixel_mean"'),
    (TINY, ["--precision", "fp8"], 'key "precision"'),
    (TINY, ["--model", "spade_coco"], "model: the configuration is of groupdnet_deepfashion"),
    (TINY, ["--network.image_size", "[64,65]"], "image_size: expected"),
    (TINY, ["--schedule.freeze_global_epochs", "1"], "only a pix2pixHD"),
    (TINY, ["--schedule.epochs", "0", "--schedule.decay_epochs", "0"], "at least one epoch"),
    ({"recipe": "bicyclegan_deepfashion"}, ["--losses.latent", "0", "--losses.diversity", "8"],
     "network.objective: 'bicyclegan' expected losses.latent above 0, got 0 with losses.diversity"),
    ({"recipe": "bicyclegan_deepfashion"}, ["--network.objective", "dscgan"],
     "network.objective: 'dscgan' expected losses.diversity above 0, got 0 with losses.latent 0.5"),
    ({"recipe": "dscgan_deepfashion"}, ["--network.objective", "bicyclegan"],
     "network.objective: 'bicyclegan' expected losses.latent above 0, got 0 with losses.diversity"),
])
def test_bad_options_are_one_line(content: dict[str, object], arguments: list[str],
                                  message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(content, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "least", "names"), [
    (LossConfig, 0, "adversarial discriminator feature_matching perceptual kl code_noise pixel "
                    "prior latent diversity diversity_bound"),
    (OptimizerConfig, 0, "generator discriminator ema"), (OptimizerConfig, 1, "accumulate"),
    (ScheduleConfig, 0, "epochs decay_epochs freeze_global_epochs"),
    (DataConfig, 1, "batch count"), (DataConfig, 0, "workers"),
    (LogConfig, 1, "every checkpoint_every rows samples keep best_scenes"),
    (LogConfig, 0, "grid_every keep_epochs"),
])
def test_options_have_a_least_value(kind: Any, least: int, names: str) -> None:
    needed: dict[str, Any] = {"feature_matching": 0} if kind is LossConfig else (
        {"epochs": 1, "decay_epochs": 1} if kind is ScheduleConfig else {})
    for name in names.split():
        with pytest.raises(ValueError, match=rf"\.{name}: expected at least {least}, got"):
            kind(**{**needed, name: least - 1})
        assert getattr(kind(**{**needed, name: least}), name) == least


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": 2**63}, "seed: expected 0 to"), ({"seed": -1}, "seed: expected 0 to"),
    ({"precision": "fp8"}, "precision: expected fp32, bf16 or fp16"),
    ({"log": LogConfig(best="perceptual"), "losses": LossConfig(perceptual=0)}, "log.best"),
    ({"schedule": ScheduleConfig(epochs=1, decay_epochs=1, freeze_global_epochs=2)},
     "schedule.freeze_global_epochs: expected fewer than all epochs"),
    ({"optimizer": OptimizerConfig(accumulate=3), "data": DataConfig(batch=4)}, "data.batch"),
])
def test_options_fit_each_other(changes: dict[str, Any], message: str) -> None:
    config = RECIPES["pix2pixhd_cityscapes_1024"]()
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_options_that_contradict_the_model_or_the_data(tmp_path: Path) -> None:
    for config, message in (
        (small("spade_coco", "--losses.kl", "1"), "losses.kl: expected 0, for spade_coco"),
        (tiny("--data.batch", "10"), "data.batch: expected at most 8"),
        (tiny("--data.name", "nothing"), "data set: expected"),
        (tiny("--data.name", "cityscapes"), "root: expected the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(config, tmp_path)
    assert not (tmp_path / "losses.csv").exists()


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = tiny("--losses.kl", "0.5", "--network.ngf", "4")
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_config(tmp_path / "config.json") == config
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is no YAML"):
        load_config(tmp_path / "bad.yaml")


def test_order_is_shared_and_goes_on_anywhere() -> None:
    def places(start: int, processes: Processes, count: int) -> list[list[Draw]]:
        order = iter(Order(11, 4, 2, 3, start, processes))
        return [next(order) for _ in range(count)]

    whole = places(0, Processes(), 8)  # two steps an epoch, of two micro-batches
    assert whole[4:] == places(2, Processes(), 4)
    epoch = [draw.index for batch in whole[:4] for draw in batch]
    assert len(set(epoch)) == 8 and {draw.epoch for draw in whole[4]} == {1}
    shares = [places(0, Processes(rank, 2), 8) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole


def test_batches_are_those_of_a_worker() -> None:
    made = []
    for workers in ("0", "1"):
        config = tiny("--data.workers", workers)
        batches = Batches(dataset(config, "train"), config, Processes(), torch.device("cpu"), 2)
        made.append(batches.step()[0])
    assert torch.equal(made[0].image, made[1].image)
    assert torch.equal(made[0].planes, made[1].planes)
    assert made[1].layout._levels.keys() == {(2 << k, 2 << k) for k in range(6)}
    like = torch.empty(2, 3, 4)
    assert torch.equal(made[0].noise(like), made[1].noise(like))
    assert not torch.equal(made[0].noise(like), made[0].noise(like, 1))


def test_one_extra_runs_the_tour() -> None:
    toml = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extra = toml.loads(text)["project"]["optional-dependencies"]["models"]
    assert {"jsonargparse", "pyyaml"} <= {re.split("[<>=]", each)[0] for each in extra}
    assert not RECIPES["groupdnet_scenes_codes"]().log.tensorboard  # the tour's recipe


def test_training_learns(tmp_path: Path) -> None:
    config = tiny("--data.count", "2", "--schedule.epochs", "30", "--init_gain", "0.5",
                  "--optimizer.generator", "2e-3", "--losses.feature_matching", "0",
                  "--log.checkpoint_every", "100")
    train(config, tmp_path)
    rows = curve(tmp_path)
    assert float(rows[-1]["pixel"]) < 0.7 * float(rows[0]["pixel"])


_KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[3]))
from smis_models.training import load_config, train

def report(progress):
    if progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

train(load_config(sys.argv[1]), sys.argv[2], report=report)
"""


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    config = tiny("--optimizer.ema", "0.9", "--optimizer.accumulate", "2", "--losses.prior", "0.5",
                  "--losses.latent", "0.5", "--losses.diversity", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(config, whole)
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "config.json"), str(broken),
               str(torch.get_num_threads())]
    killed = subprocess.run(command, timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(curve(broken)) == 5  # two of them after the last checkpoint
    with pytest.raises(ValueError, match="holds a run; --resume"):
        train(config, broken)
    outcome = train(config, broken, resume=True)
    assert outcome.finished and expected.finished
    assert curve(broken) == curve(whole)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, broken)]
    for key in ("model", "average"):
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name]), name
    with pytest.raises(CheckpointError, match=r"network\.ngf differ"):
        train(tiny("--optimizer.ema", "0.9", "--network.ngf", "4"), broken, resume=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint\.pt"):
        train(config, tmp_path / "nowhere", resume=True)
    (broken / "checkpoint.pt").write_bytes((broken / "checkpoint.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(config, broken, resume=True)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    run = Run(tiny(), tmp_path)
    run.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run.trainer.step(run.batches.step(), 0)
    with largest_file(100_000), pytest.raises(
            CheckpointError, match=r"checkpoint\.pt cannot be written: .*kept") as caught:
        run.save()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))  # no half-written file is left
    assert Run(tiny(), tmp_path, resume=True).trainer.step_count == 0


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run = Run(tiny(), tmp_path)
    run.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    weights = {k: v.clone() for k, v in run.trainer.model.encoder.state_dict().items()}
    with torch.no_grad():
        run.trainer.model.encoder.fc_mu.weight[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"losses\.kl: became nan in step 1") as caught:
        run()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert torch.equal(run.trainer.model.encoder.fc_mu.bias, weights["fc_mu.bias"])


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()
            if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for rounding, which is all that biases before a norm have."""
    largest = max(float(gradient.norm()) for gradient in expected.values())
    assert found.keys() == expected.keys() and largest > 0.1
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        assert error < 1e-3 * float(gradient.norm()) + 1e-5 * largest, (name, error, largest)


_PROCESS = """
import os, sys
import torch
import torch.distributed as dist
from smis_models.training import load_config
from smis_models.training.distributed import Processes
from smis_models.training.batches import dataset
from smis_models.training.run import Run
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
run = Run(load_config(f"{folder}/config.json"), f"{folder}/pair", processes=Processes(rank, 2))
losses = [run.processes.mean(torch.tensor(list(run.trainer.step(run.batches.step(), 0).values())))
          for _ in range(2)]
grads = {n: p.grad for n, p in run.trainer.model.named_parameters() if p.grad is not None}
if rank == 0:
    buffers = dict(run.trainer.model.named_buffers())
    torch.save({"losses": losses, "grads": grads, "buffers": buffers}, f"{folder}/pair.pt")
dist.barrier()
# Threads of gloo may still run when the interpreter is torn down, which aborts the process.
os._exit(0)
"""


@pytest.mark.parametrize("recipe", ["groupdnet_scenes", "ccfpse_ade20k"])
def test_two_processes_equal_one_with_both_batches(recipe: str, tmp_path: Path) -> None:
    still = "--data.batch", "4", "--optimizer.generator", "0", "--optimizer.discriminator", "0"
    config = small(recipe, *still) if recipe == "ccfpse_ade20k" else tiny(
        *still, "--losses.prior", "0.5", "--losses.latent", "2")
    (tmp_path / "config.json").write_text(to_json(config))
    ranks = [subprocess.Popen([sys.executable, "-c", _PROCESS, str(tmp_path), str(rank)])
             for rank in range(2)]
    run = Run(config, tmp_path / "one")
    expected = [list(run.trainer.step(run.batches.step(), 0).values()) for _ in range(2)]
    assert [process.wait(timeout=900) for process in ranks] == [0, 0]
    pair = torch.load(tmp_path / "pair.pt", weights_only=True)
    # The rates are zero, but running statistics and spectral norms move from step to step.
    for losses_of_pair, losses_of_one in zip(pair["losses"], expected, strict=True):
        torch.testing.assert_close(losses_of_pair, torch.tensor(losses_of_one), rtol=1e-4,
                                   atol=1e-5)
    assert_same_gradients(pair["grads"], _gradients(run.trainer))
    for name, buffer in run.trainer.model.named_buffers():
        if "running_" in name:
            torch.testing.assert_close(pair["buffers"][name], buffer, rtol=1e-4, atol=1e-5)


def test_a_group_of_processes_ends_where_it_was_begun(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own stays; that of torchrun's environment ends with the training."""
    cpu, begin = torch.device("cpu"), dist.init_process_group
    begun: list[str] = []

    def beginning(backend: str) -> None:
        begun.append(backend)
        begin(backend, init_method=f"file://{tmp_path}/{len(begun)}", rank=0, world_size=1)

    monkeypatch.setattr(dist, "init_process_group", beginning)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with process_group(cpu) as found:
        assert found == (Processes(0, 1), cpu) and not begun
    with monkeypatch.context() as torchrun:
        torchrun.setenv("LOCAL_RANK", "1")
        with process_group(cpu) as found:
            assert found == (Processes(1, 2), cpu) and begun == ["gloo"]
        assert not dist.is_initialized()
    beginning("gloo")
    try:
        with process_group(cpu) as found:
            assert found == (Processes(1, 2), cpu) and len(begun) == 2
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_the_worst_of_the_processes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(value: Tensor, op: object) -> None:  # whose number is 1
        most = op == torch.distributed.ReduceOp.MAX
        value.copy_(torch.tensor((max if most else min)(int(value), 1)))

    run = Run(tiny(), tmp_path)
    run.processes = Processes(0, 2)
    monkeypatch.setattr("torch.distributed.all_reduce", with_another)
    assert [run._worst(state) for state in (0, 1, 2)] == [1, 1, 2]


def test_micro_batches_sum_up(tmp_path: Path) -> None:
    """Without batch statistics two micro-batches of 2 give the gradients of one batch of 4."""
    found = []
    for accumulate in ("1", "2"):
        config = tiny("--data.batch", "4", "--optimizer.accumulate", accumulate,
                      "--network.norm", "instance", "--optimizer.reuse_fake", "true",
                      "--losses.latent", "2",
                      "--optimizer.generator", "0", "--optimizer.discriminator", "0")
        run = Run(config, tmp_path / accumulate)
        for module in run.trainer.model.modules():  # each forward moves the spectral norms
            for hook in list(module._forward_pre_hooks.values()):
                if hasattr(hook, "n_power_iterations"):
                    hook.n_power_iterations = 0
        batches = run.batches.step()
        for batch in batches:  # the same codes, however the batch is split
            batch.noise = lambda like, draw=0: torch.zeros_like(like)  # type: ignore[method-assign]
        found.append((run.trainer.step(batches, 0), _gradients(run.trainer)))
        assert all(module.weight.data_ptr() == module.weight_orig.data_ptr()  # none is held on
                   for module in run.trainer.model.modules() if hasattr(module, "weight_orig"))
        shares = [batch.share for batch in batches]
        assert sum(shares) == pytest.approx(len(batches))
        assert (len(set(shares)) == 1) == (accumulate == "1")  # they show unequal numbers
    (losses_1, grads_1), (losses_2, grads_2) = found
    assert losses_1 == pytest.approx(losses_2, rel=1e-4)
    assert_same_gradients(grads_2, grads_1)


def test_a_picture_is_judged_beside_its_own_map(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of micro-batches, all of which are painted before the first is judged."""
    run = Run(tiny("--optimizer.accumulate", "2", "--optimizer.reuse_fake", "true",
                   "--init_gain", "1"), tmp_path)
    objective = run.trainer.objective
    paint, judge = objective.generator, objective.discriminator
    painted: list[tuple[Tensor, Tensor]] = []
    judged: list[tuple[Tensor, Tensor]] = []

    def painting(batch: MicroBatch) -> Any:
        made = paint(batch)
        painted.append((batch.labels, made[1][0].detach()))
        return made

    def judging(batch: MicroBatch, fakes: Any) -> Any:
        judged.append((batch.labels, fakes[0]))
        return judge(batch, fakes)

    monkeypatch.setattr(objective, "generator", painting)
    monkeypatch.setattr(objective, "discriminator", judging)
    run.trainer.step(run.batches.step(), 0)
    assert len(painted) == len(judged) == 2 and not torch.equal(painted[0][1], painted[1][1])
    for labels, fake in judged:
        (own,) = (picture for of, picture in painted if torch.equal(of, labels))
        assert torch.equal(fake, own)


def test_gradients_are_shared_after_the_last_micro_batch(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    run = Run(tiny("--optimizer.accumulate", "2"), tmp_path)
    monkeypatch.setattr("smis_models.training.trainer.unsynchronized",
                        lambda module, last: told.append(last) or nullcontext())
    run.trainer.step(run.batches.step(), 0)
    assert told == [False, True] * 2
    wrapped = object.__new__(DistributedDataParallel)
    wrapped.__dict__["require_backward_grad_sync"] = True
    for last in (False, True):
        with unsynchronized(wrapped, last):
            assert wrapped.require_backward_grad_sync is last


def test_the_loss_scale_moves_and_goes_on(tmp_path: Path) -> None:
    run = Run(tiny("--precision", "fp16"), tmp_path)
    run.trainer._scaler.load_state_dict({**run.trainer._scaler.state_dict(), "scale": 8.0})
    for step in (1, 2):
        run.trainer.step(run.batches.step(), 0)
        scale = run.trainer._scaler.state_dict()
        assert (scale["scale"], scale["_growth_tracker"]) == (8.0, step)
    run.save()
    resumed = Run(tiny("--precision", "fp16"), tmp_path, resume=True)
    assert resumed.trainer._scaler.state_dict() == scale


def test_a_step_that_overflows_changes_no_weight(tmp_path: Path) -> None:
    """Of fp16: the scale is halved, both updates are left out, and training goes on."""
    run = Run(tiny("--precision", "fp16"), tmp_path)
    trainer = run.trainer
    trainer._scaler.load_state_dict({**trainer._scaler.state_dict(), "scale": 2.0**127})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step(run.batches.step(), 0)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    scale = trainer._scaler.state_dict()
    assert (scale["scale"], scale["_growth_tracker"], trainer.step_count) == (2.0**126, 0, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(precision: str, tmp_path: Path) -> None:
    run = Run(tiny("--precision", precision), tmp_path / precision)
    exact = Run(tiny(), tmp_path / "fp32")
    computed: dict[Run, set[torch.dtype]] = {run: set(), exact: set()}
    for each, dtypes in computed.items():
        each.trainer.model.generator.fc.register_forward_hook(
            lambda _, __, out, dtypes=dtypes: dtypes.add(out.dtype))
    values, truth = (r.trainer.step(r.batches.step(), 0) for r in (run, exact))
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert computed == {run: {low}, exact: {torch.float32}}
    assert run.trainer._scaler.is_enabled() == (precision == "fp16")
    for name, value in truth.items():
        assert values[name] == pytest.approx(value, rel=0.1, abs=0.02), name
    for name, tensor in run.trainer.model.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64), name
        assert bool(torch.isfinite(tensor).all()), name


def test_average_follows_and_is_what_is_exported(tmp_path: Path) -> None:
    run = Run(tiny("--optimizer.ema", "0.5"), tmp_path)
    name = "generator.conv_img.weight"
    expected = run.trainer.model.state_dict()[name].clone()
    for step in range(3):
        run.trainer.step(run.batches.step(), 0)
        new = run.trainer.model.state_dict()[name]
        expected = new.clone() if step == 0 else expected.lerp(new, 0.5)
    torch.testing.assert_close(run.trainer.painter.state_dict()[name], expected)
    run.save()
    model = create_model(checkpoint=tmp_path / "model.safetensors").eval()
    assert isinstance(model, SynthesisModel)
    assert torch.equal(model.state_dict()[name], run.trainer.painter.state_dict()[name])


def test_the_global_generator_thaws_with_a_new_optimizer(tmp_path: Path) -> None:
    config = small("pix2pixhd_cityscapes_1024", "--schedule.epochs", "2",
                   "--schedule.decay_epochs", "0", "--schedule.freeze_global_epochs", "1",
                   "--log.checkpoint_every", "4")
    inner = create_model("pix2pixhd_cityscapes", part="generator", seed=5, **{
        **vars(replace(config.network, enhancers=0)), "ngf": 2 * config.network.ngf})
    torch.save(inner.state_dict(), tmp_path / "g1.pth")
    config = replace(config, init=str(tmp_path / "g1.pth"))
    run = Run(config, tmp_path / "run")
    weight = run.trainer.model.generator.model[1].weight
    assert torch.equal(weight, inner.model[1].weight)
    begin, first = weight.clone(), run.trainer._optimizer_g
    run(stop=lambda: run.trainer.step_count == 4)
    assert torch.equal(weight, begin) and run.trainer._optimizer_g is first
    resumed = Run(config, tmp_path / "run", resume=True)
    for each in (run, resumed):
        each.trainer.step(each.batches.step(), 1)
    assert run.trainer._optimizer_g is not first and not torch.equal(weight, begin)
    assert torch.equal(resumed.trainer.model.generator.model[1].weight, weight)


def test_a_thawed_run_goes_on(tmp_path: Path) -> None:
    """Its saved moments are of the global generator too."""
    config = small("pix2pixhd_cityscapes_1024", "--data.count", "4", "--schedule.epochs", "2",
                   "--schedule.decay_epochs", "0")
    run = Run(config, tmp_path)
    run(stop=lambda: run.trainer.step_count == 3)  # two steps an epoch, the first one frozen
    resumed = Run(config, tmp_path, resume=True)
    for each in (run, resumed):
        each.trainer.step(each.batches.step(), 1)
    weights = resumed.trainer.model.state_dict()
    for name, value in run.trainer.model.state_dict().items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("enhancers", [1, 2])
def test_enhancers_start_from_the_file_of_a_whole_model(enhancers: int, tmp_path: Path) -> None:
    """Of the global generator, or of one with fewer enhancers."""
    config = small("pix2pixhd_cityscapes_1024", "--network.enhancers", str(enhancers),
                   "--network.image_size", "[128,128]")
    inner = create_model("pix2pixhd_cityscapes", seed=5, **{
        **vars(replace(config.network, enhancers=enhancers - 1)), "ngf": 2 * config.network.ngf})
    save_checkpoint(inner, tmp_path / "inner.safetensors")
    found = Trainer(replace(config, init=str(tmp_path / "inner.safetensors"))).model.generator
    assert torch.equal(found.model[1].weight, inner.generator.model[1].weight)
    if enhancers == 2:
        assert torch.equal(found.model1_1[1].weight, inner.generator.model1_1[1].weight)


def test_enhancers_start_with_the_encoder_of_their_file(tmp_path: Path) -> None:
    config = small("pix2pixhd_cityscapes_1024", "--network.features", "true")
    network = {**vars(replace(config.network, enhancers=0)), "ngf": 2 * config.network.ngf}
    whole = create_model("pix2pixhd_cityscapes", seed=5, **network)
    given = replace(config, init=str(tmp_path / "model.safetensors"))
    save_checkpoint(whole, tmp_path / "model.safetensors")
    for init in (given.init, str(tmp_path)):  # a run's folder too
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = Trainer(replace(config, init=init)).model
        for part in (found.encoder, found.generator):
            of_file = whole.encoder if part is found.encoder else whole.generator
            assert torch.equal(part.model[1].weight, of_file.model[1].weight)
    other = create_model("pix2pixhd_cityscapes", **{**network, "nef": 4})
    save_checkpoint(other, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"part encoder: .* of another shape"):
        Trainer(given)
    torch.save(whole.generator.state_dict(), tmp_path / "G.pth")
    with pytest.warns(UserWarning, match=r"init: .*G\.pth holds no encoder"):
        Trainer(replace(config, init=str(tmp_path / "G.pth")))


def test_the_tutorials_line_for_other_classes_makes_a_model() -> None:
    text = (Path(__file__).parents[1] / "docs/tutorials/train.md").read_text()
    line = text[text.index("smis train groupdnet_deepfashion"):].partition("\ntorchrun")[0]
    words = line.replace("\\\n", " ").split()
    options = words[words.index("--network.classes"):words.index("--data.batch")]
    assert "12" in options
    config = load_config("groupdnet_deepfashion", options)
    create_model(config.model, device="meta", **vars(config.network))
    for classes in ("12", "13"):
        with pytest.raises(ValueError, match=rf"modulation 'per_class', with ngf and nef multiples "
                                             rf"of {classes}"):
            load_config("groupdnet_deepfashion", ["--network.classes", classes])


def test_a_single_picture_at_a_1x1_start_is_told_of_the_batch() -> None:
    for given in (("--data.batch", "1"), ("--data.batch", "2", "--optimizer.accumulate", "2")):
        with pytest.raises(ValueError, match=r"data\.batch: expected at least 2 pictures for each"):
            load_config("groupdnet_scenes", given)
    assert tiny("--data.batch", "1").data.batch == 1  # starts at 2x2


def test_grids_and_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    config = tiny("--log.grid_every", "2", "--log.rows", "2", "--log.samples", "2",
                  "--log.tensorboard", "true", "--schedule.decay_epochs", "0")
    states = []
    outcome = train(config, tmp_path, report=lambda progress: states.append(progress.values))
    assert outcome.step == 4 and len(states) == 4
    assert {"images_per_second", "waiting", "memory", "kl"} <= set(states[0])
    from PIL import Image

    assert Image.open(tmp_path / "grids" / "0000004.png").size == (5 * 68 - 4, 2 * 84 - 4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    names = {name for name in states[0] if not name.startswith("rate_")}
    speed = {"images_per_second", "waiting", "memory"}
    assert set(written.Tags()["scalars"]) == {
        f"run/{name}" if name in speed else f"losses/{name}" for name in names}
    for name in names - speed:
        assert [(p.step, p.value) for p in written.Scalars(f"losses/{name}")] == [
            (step, pytest.approx(values[name])) for step, values in enumerate(states, 1)]
    assert [(image.step, image.width, image.height) for image in written.Images("samples")] == [
        (step, 5 * 68 - 4, 2 * 84 - 4) for step in (2, 4)]
    asked: dict[str, object] = {}
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter",
                        lambda folder, **options: asked.update(options))
    TensorBoard(tmp_path, 5)  # what a run wrote beyond its checkpoint goes
    assert asked == {"purge_step": 6}


def test_grids_show_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out scenes by the average, in eval mode, of their own code and of seeds."""
    run = Run(tiny("--optimizer.ema", "0.5", "--log.grid_every", "1", "--log.rows", "2",
                   "--log.samples", "2", "--init_gain", "1", "--optimizer.generator", "3e-2"),
              tmp_path)
    for _ in range(2):
        run.trainer.step(run.batches.step(), 0)
    shown: list[list[list[tuple[str, np.ndarray]]]] = []
    monkeypatch.setattr("smis_models.training.run.captioned_grid",
                        lambda rows: shown.append(rows) or np.zeros((4, 4, 3), np.uint8))
    run._draw()
    run.save()
    model = create_model(checkpoint=tmp_path / "model.safetensors").eval()
    held_out = GeneratedScenes(2, 64, "val")
    batch = Collate(model.preset)([held_out[i] for i in range(2)])
    with torch.no_grad():
        mean, _ = model.encoder.encode(batch["image"], batch["labels"])
        codes = [mean, *(model.generator.sample_latent(2, torch.Generator().manual_seed(seed))
                         for seed in range(2))]
        columns = [batch["image"], *(model.generator(batch["layout"], z) for z in codes)]
    (rows,) = shown
    assert [caption for caption, _ in rows[1]] == [
        "layout", "picture", "of its code", "drawn code 0", "drawn code 1"]
    for i, row in enumerate(rows):
        of_class = {(int(label), tuple(colour)) for label, colour in zip(
            batch["labels"][i].flatten(), row[0][1].reshape(-1, 3).tolist(), strict=True)}
        assert len(of_class) == len(batch["labels"][i].unique())  # a colour for each class
        for (_, picture), column in zip(row[1:], columns, strict=True):
            expected = (column[i].permute(1, 2, 0) + 1) * 127.5
            assert np.abs(picture - expected.numpy()).max() <= 1.5
        assert np.abs(row[3][1].astype(int) - row[4][1]).max() > 8


def test_looking_at_pictures_ends_no_training_mode(tmp_path: Path) -> None:
    run = Run(tiny("--log.grid_every", "1", "--log.rows", "1", "--log.best", "pixel",
                   "--log.best_scenes", "2"), tmp_path)
    for look in (run._draw, run.save):
        look()
        assert all(module.training for module in run.trainer.model.modules())


def test_the_found_code_moves_the_generator_alone(tmp_path: Path) -> None:
    run = Run(tiny("--losses.latent", "1"), tmp_path)
    batch = run.batches.step()[0]
    found: dict[str, Tensor] = {}
    run.trainer.objective._drawn(batch, found)
    found["latent"].backward()
    assert all(p.grad is None for p in run.trainer.model.encoder.parameters())
    assert any(p.grad is not None for p in run.trainer.model.generator.parameters())
    assert all(p.requires_grad for p in run.trainer.model.encoder.parameters())


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(to_json(tiny("--schedule.decay_epochs", "0")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-m", "smis_models.cli", "train", str(tmp_path / "tiny.json"), "--out",
         str(tmp_path / "run"), "--minutes", "60", "--losses.pixel", "5"],
        capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 steps; weights:" in done.stdout and "waiting for data" in done.stdout


def test_losses_are_the_published_ones(tmp_path: Path) -> None:
    """The objective of GroupDNet from its parts: hinge + 10 FM + KL summed over the images."""
    run = Run(tiny("--losses.pixel", "0"), tmp_path)
    objective, batch = run.trainer.objective, run.batches.step()[0]
    model = run.trainer.model.eval()  # no power iterations, so that forwards repeat
    values, (fake,) = objective.generator(batch)
    mu, logvar = model.encoder.encode(batch.image, batch.labels)
    z = mu + batch.noise(mu) * (0.5 * logvar).exp()
    torch.testing.assert_close(fake, model.generator(batch.planes, z), rtol=1e-4, atol=1e-5)
    of_fake, of_real = (model.discriminator(torch.cat([batch.planes, image], 1))
                        for image in (fake, batch.image))
    torch.testing.assert_close(values["gan"], -torch.stack(
        [scale[-1].mean() for scale in of_fake]).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["feature_matching"],
                               losses.feature_matching_loss(of_fake, of_real, 10.0))
    divergence = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
    torch.testing.assert_close(values["kl"], 0.0125 * divergence)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_picture_is_named_in_one_line(workers: str, tmp_path: Path) -> None:
    import numpy as np

    from smis_models.io.images import write_indices, write_png

    for name in "abcd":
        write_png(tmp_path / "data/images" / f"{name}.png", np.zeros((64, 64, 3), np.uint8))
        write_indices(tmp_path / "data/labels" / f"{name}.png", np.zeros((64, 64), np.int64))
    (tmp_path / "data/images/c.png").write_bytes(b"\x89PNG no picture")
    config = tiny("--data.name", "folder", "--data.root", str(tmp_path / "data"),
                  "--data.workers", workers)
    with pytest.raises(ValueError, match=r"c\.png: cannot be read as a picture") as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_the_perceptual_term_is_weighed(tmp_path: Path) -> None:
    from smis_models.networks.perceptual import _LAYERS, build_trunk

    torch.manual_seed(0)
    torch.save({f"features.{k}": v for k, v in build_trunk(_LAYERS).state_dict().items()},
               tmp_path / "vgg.pth")
    run = Run(tiny("--losses.perceptual", "3", "--losses.vgg", str(tmp_path / "vgg.pth")),
              tmp_path / "run")
    batch = run.batches.step()[0]
    values, (fake,) = run.trainer.objective.generator(batch)
    perceptual = run.trainer.objective.perceptual
    assert perceptual is not None
    torch.testing.assert_close(values["perceptual"], 3 * perceptual(fake, batch.image))
    assert not any("perceptual" in key for key in run.trainer.state()["model"])
