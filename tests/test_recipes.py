"""Recipes: the published hyper-parameters and learning rates as tables, and what Adam is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SMALL_TRAINING
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from validation import agree

from smis_models import create_model
from smis_models.training import RECIPES, Run, TrainConfig, from_dict
from smis_models.training.batches import Batches, dataset
from smis_models.training.distributed import Processes
from smis_models.training.optimizers import EMA, adam
from smis_models.training.options import to_dict
from smis_models.training.trainer import Trainer

pytest.importorskip("jsonargparse")

# The papers' options, spelled out: Adam's rates and decays, the schedule, the losses' weights.
TTUR = {"generator": 1e-4, "discriminator": 4e-4, "betas": [0.0, 0.9], "ema": 0.0,
        "accumulate": 1, "reuse_fake": False}
EQUAL = {**TTUR, "generator": 2e-4, "discriminator": 2e-4, "betas": [0.5, 0.999],
         "reuse_fake": True}
HINGE = {"gan": "hinge", "adversarial": 1.0, "scales": "mean", "discriminator": 1.0,
         "feature_matching": 10.0, "perceptual": 10.0, "kl": 0.0, "code_noise": 1.0, "pixel": 0.0,
         "pixel_mean": "pixels", "prior": 0.0, "latent": 0.0, "diversity": 0.0,
         "diversity_bound": 10.0}
# The published code sums the KL term of each device's images and takes the devices' mean.
ON_4, ON_8, ON_16 = ({**HINGE, "kl": 0.05 / devices} for devices in (4, 8, 16))
LEAST_SQUARES = {**HINGE, "gan": "ls", "scales": "sum", "discriminator": 0.5}
U_NET = {**HINGE, "gan": "ls", "scales": "sum", "feature_matching": 0.0, "perceptual": 0.0,
         "kl": 0.005, "pixel": 10.0, "prior": 1.0}
CODES = {**HINGE, "adversarial": 0.0, "feature_matching": 0.0, "perceptual": 0.0,
         "code_noise": 0.0, "pixel": 10.0, "pixel_mean": "classes"}
SCENES = {**HINGE, "adversarial": 0.5, "feature_matching": 2.0, "perceptual": 0.0, "kl": 1e-3,
          "pixel": 10.0, "pixel_mean": "classes", "prior": 0.5}
# What is written, and how often.
LOG = {"every": 50, "checkpoint_every": 500, "keep": 1, "keep_epochs": 0, "best": None,
       "best_scenes": 32, "grid_every": 500, "grid_split": "val", "rows": 4, "samples": 3,
       "tensorboard": True, "wandb": False}
LOG_OF_SCENES = {**LOG, "every": 20, "checkpoint_every": 100, "grid_every": 100, "samples": 5,
                 "tensorboard": False}
COUNTS = {"groupdnet_scenes": 3200, "groupdnet_scenes_codes": 6400}
# Name: data set, batch, epochs with constant and with falling rates, epochs with the global
# generator frozen, optimizer, losses.
PUBLISHED: dict[str, tuple[str, int, int, int, int, dict[str, Any], dict[str, Any]]] = {
    "groupdnet_deepfashion": ("deepfashion", 8, 60, 40, 0, TTUR, ON_4),
    "groupdnet_cityscapes": ("cityscapes", 4, 100, 100, 0, TTUR, ON_4),
    "groupdnet_ade20k": ("ade20k", 4, 100, 100, 0, TTUR, ON_4),
    "groupdnet_scenes_codes": ("scenes", 16, 3, 0, 0, {
        **TTUR, "generator": 2e-3, "betas": [0.5, 0.99], "ema": 0.99, "reuse_fake": True}, CODES),
    "groupdnet_scenes": ("scenes", 16, 3, 0, 0, {
        **TTUR, "generator": 5e-4, "discriminator": 5e-4, "ema": 0.99, "reuse_fake": True}, SCENES),
    "spade_coco": ("coco_stuff", 32, 100, 0, 0, TTUR, HINGE),
    "spade_coco_vae": ("coco_stuff", 32, 100, 0, 0, TTUR, ON_8),
    "spade_ade20k": ("ade20k", 32, 100, 100, 0, TTUR, HINGE),
    "spade_cityscapes": ("cityscapes", 32, 100, 100, 0, TTUR, HINGE),
    "spade_celebamask": ("folder", 32, 50, 0, 0, TTUR, HINGE),
    "ccfpse_coco": ("coco_stuff", 16, 100, 100, 0, TTUR, {**ON_16, "feature_matching": 20.0}),
    "ccfpse_ade20k": ("ade20k", 16, 100, 100, 0, TTUR, {**ON_16, "feature_matching": 20.0}),
    "ccfpse_cityscapes": ("cityscapes", 16, 100, 100, 0, TTUR,
                          {**ON_16, "feature_matching": 20.0}),
    "pix2pixhd_cityscapes": ("cityscapes", 1, 100, 100, 0, EQUAL, LEAST_SQUARES),
    "pix2pixhd_cityscapes_features": ("cityscapes", 1, 100, 100, 0, EQUAL, LEAST_SQUARES),
    "pix2pixhd_cityscapes_1024": ("cityscapes", 1, 50, 50, 10, EQUAL, LEAST_SQUARES),
    **dict.fromkeys(
        ("vspade_deepfashion", "groupenc_deepfashion", "groupdec_deepfashion",
         "groupnet_deepfashion", "mulnet_deepfashion"),
        ("deepfashion", 8, 60, 40, 0, TTUR, ON_4)),
    "bicyclegan_deepfashion": ("deepfashion", 2, 100, 100, 0, EQUAL, {**U_NET, "latent": 0.5}),
    "dscgan_deepfashion": ("deepfashion", 2, 100, 100, 0, EQUAL, {**U_NET, "diversity": 8.0}),
}


U_NETS = ("bicyclegan_deepfashion", "dscgan_deepfashion")


def test_every_recipe_has_a_row() -> None:
    assert set(PUBLISHED) == set(RECIPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name: str) -> None:
    data, batch, epochs, decay, frozen, optimizer, losses = PUBLISHED[name]
    config = to_dict(RECIPES[name]())
    network = create_model(name.removesuffix("_codes"), part="generator", device="meta").preset
    expected = {
        "model": name.removesuffix("_codes"), "network": to_dict(network), "losses": losses,
        "optimizer": optimizer, "precision": "fp32", "seed": 0, "init": None,
        "init_gain": 1.0 if "scenes" in name else 0.02, "whiten": False,
        "log": LOG_OF_SCENES if name in COUNTS else LOG,
        "schedule": {"epochs": epochs, "decay_epochs": decay, "freeze_global_epochs": frozen,
                     "falls": "before" if name in U_NETS else "after"},
    }
    for group, values in expected.items():
        found = config[group]
        if isinstance(values, dict):
            found = {key: found[key] for key in values}
        assert found == values, group
    found = {key: config["data"][key] for key in ("name", "batch", "mode", "load", "flip")}
    faces = name == "spade_celebamask"  # whose classes tell left from right
    assert (config["data"]["count"], config["data"]["workers"], config["data"]["unknown"]) == (
        COUNTS.get(name, 2048), 0 if name in COUNTS else 2, None)
    assert found == {"name": data, "batch": batch, "mode": "fixed" if faces else None,
                     "load": None, "flip": not faces}


# 1-based epoch: factor of the rates, as the published loop leaves them: from epoch niter + 1 on it
# subtracts lr / niter_decay at each epoch's end.
LATE = {
    (60, 40): {1: 1.0, 60: 1.0, 61: 1.0, 62: 0.975, 81: 0.5, 100: 0.025},
    (100, 100): {1: 1.0, 100: 1.0, 101: 1.0, 102: 0.99, 151: 0.5, 200: 0.01},
    (50, 50): {1: 1.0, 50: 1.0, 51: 1.0, 52: 0.98, 76: 0.5, 100: 0.02},
    (100, 0): {1: 1.0, 50: 1.0, 100: 1.0}, (50, 0): {1: 1.0, 50: 1.0},
    (3, 0): {1: 1.0, 3: 1.0},
}
# BicycleGAN's: with LambdaLR, and a divisor of one more than the epochs that fall.
LATE_U_NET = {1: 1.0, 100: 1.0, 101: 100 / 101, 102: 99 / 101, 151: 50 / 101, 200: 1 / 101}


def published_factor(epochs: int, decay: int, epoch: int) -> float:
    """The published loop, step by step."""
    rate = 1.0
    for past in range(1, epoch):
        if past > epochs:
            rate -= 1 / decay
    return rate


def test_the_table_is_the_published_loop() -> None:
    for (epochs, decay), row in LATE.items():
        for epoch, factor in row.items():
            assert published_factor(epochs, decay, epoch) == pytest.approx(factor)
    weight = nn.Parameter(torch.zeros(1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.Adam([weight], 1.0),
        lambda past: 1.0 - max(0, past + 1 - 100) / float(100 + 1))  # past: epochs that ended
    for epoch in range(1, 201):
        if epoch in LATE_U_NET:
            agree("learning rate, table in the tests", "torch's LambdaLR over the published rule",
                  LATE_U_NET[epoch], schedule.get_last_lr()[0], rtol=1e-6)
        schedule.optimizer.step()
        schedule.step()


@pytest.fixture
def given_rates() -> Iterator[list[tuple[float, ...]]]:
    """The distinct learning rates of each optimizer step, as the optimizer sees them."""
    seen: list[tuple[float, ...]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append(tuple(sorted({float(group["lr"]) for group in optimizer.param_groups})))

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


class _Parts(nn.Module):
    """What a trainer trains, at no cost: its losses are those of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(1, 1), nn.Linear(1, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_reach_both_optimizers(
        name: str, given_rates: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, epochs, decay, frozen, optimizer, losses = PUBLISHED[name]
    monkeypatch.setattr("smis_models.training.trainer._start", lambda *_: _Parts())
    monkeypatch.setattr("smis_models.training.trainer.objective", _Objective)
    monkeypatch.setattr("smis_models.training.trainer.EMA", lambda model, decay: _Nothing())
    monkeypatch.setattr("smis_models.training.trainer.load_perceptual_loss", lambda path: None)
    trainer = Trainer(from_dict({"recipe": name}))
    late = LATE_U_NET if name in U_NETS else LATE[epochs, decay]
    for epoch, factor in late.items():
        given_rates.clear()
        trainer.step([object()], epoch - 1)  # type: ignore[list-item]
        expected = [(optimizer["generator"] * factor,), (optimizer["discriminator"] * factor,)]
        judged = losses["adversarial"] > 0
        assert given_rates == [pytest.approx(rate) for rate in expected[: 1 + judged]], epoch
        assert trainer.rates(epoch - 1) == pytest.approx([rate for (rate,) in expected])
    assert frozen < epochs


class _Nothing:
    def update(self) -> None:
        pass


class _Objective:
    coded_by_class = False

    def __init__(self, model: _Parts, *_: Any) -> None:
        self.model = model

    def generator(self, batch: object) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        return {"gan": self.model.generator.weight.sum()}, []

    def repaint(self, batch: object, fakes: object) -> object:
        return fakes

    def discriminator(self, batch: object, fakes: object) -> dict[str, torch.Tensor]:
        return {"real": self.model.discriminator.weight.sum()}


def tiny(*arguments: str) -> TrainConfig:
    return from_dict({
        **SMALL_TRAINING,
        "data": {"name": "scenes", "batch": 2, "workers": 0, "count": 4},
        "losses": {"perceptual": 0.0},
    }, arguments)


def test_a_run_gives_every_epoch_its_rates(
        tmp_path: Path, given_rates: list[tuple[float, ...]]) -> None:
    """Two steps an epoch, to both optimizers, over a break in the middle of an epoch."""
    config = tiny("--schedule.epochs", "1", "--schedule.decay_epochs", "3", "--log.grid_every",
                  "0", "--log.tensorboard", "false")
    run = Run(config, tmp_path)
    run(stop=lambda: run.trainer.step_count == 5)
    Run(config, tmp_path, resume=True)()
    factors = [1, 1, 1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3]
    assert given_rates == [pytest.approx((rate * factor,)) for factor in factors
                           for rate in (1e-4, 4e-4)]


def test_adam_is_the_configured_one() -> None:
    config = tiny("--optimizer.betas", "[0.25,0.75]")
    trainer = Trainer(config)
    for optimizer, rate in ((trainer._optimizer_g, 1e-4), (trainer._optimizer_d, 4e-4)):
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam
        assert (group["lr"], tuple(group["betas"])) == (rate, (0.25, 0.75))
        assert group["eps"] == 1e-8
        assert group["weight_decay"] == 0
        assert not group["amsgrad"]
    parts = {name: {id(p) for p in part.parameters()}
             for name, part in trainer.model.named_children()}
    held = {id(p) for p in trainer._optimizer_g.param_groups[0]["params"]}
    assert held == parts["generator"] | parts["encoder"]
    held = {id(p) for p in trainer._optimizer_d.param_groups[0]["params"]}
    assert held == parts["discriminator"]


def test_an_update_is_adams() -> None:
    """Two steps of Adam by hand, of one number with two gradients."""
    config = tiny("--optimizer.betas", "[0.5,0.9]").optimizer
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = adam([weight], 0.1, config)
    expected, first, second = 1.0, 0.0, 0.0
    for step, gradient in enumerate((2.0, -0.5), 1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        first = 0.5 * first + 0.5 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        root = (second / (1 - 0.9**step)) ** 0.5
        expected -= 0.1 * first / (1 - 0.5**step) / (root + 1e-8)
        agree("step of the optimizer", "Adam by hand", weight, [expected], rtol=1e-5)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_average_keeps_its_share(decay: float) -> None:
    """The first weights as they are, then decay of the average and the rest of the new ones."""
    model = create_model("groupdnet_deepfashion", ngf=8, nef=8, ndf=4, image_size=(64, 64),
                         upsampling="normal")
    average = EMA(model, decay)
    parameters = {f"{part}.{name}": p for part in ("generator", "encoder")
                  for name, p in getattr(model, part).named_parameters()}
    buffers = {f"{part}.{name}": b for part in ("generator", "encoder")
               for name, b in getattr(model, part).named_buffers()}
    expected: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(0)
    for step in range(4):
        with torch.no_grad():
            for tensor in (*parameters.values(), *buffers.values()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=random))
                else:
                    tensor.add_(1)
        average.update()
        for name, value in parameters.items():
            new = value.detach().double()
            expected[name] = new if step == 0 else decay * expected[name] + (1 - decay) * new
    painted = average.model.state_dict()
    assert set(painted) == set(parameters) | set(buffers)
    for name, value in expected.items():
        agree("average of the weights", "its recursion by hand, float64", painted[name], value,
              rtol=1e-5, atol=1e-6)
    for name, value in buffers.items():
        assert torch.equal(painted[name], value), name


def test_the_average_is_updated_once_a_step() -> None:
    config = tiny("--optimizer.ema", "0.75", "--optimizer.accumulate", "2")
    trainer = Trainer(config)
    assert trainer.ema is not None
    calls, update = [], trainer.ema.update

    def counting() -> None:
        calls.append(trainer.model.generator.fc.weight.detach().clone())
        update()

    trainer.ema.update = counting  # type: ignore[method-assign]
    batches = Batches(dataset(config, "train"), config, Processes(), torch.device("cpu"))
    for step in range(2):
        before = trainer.model.generator.fc.weight.detach().clone()
        trainer.step(batches.step(), 0)
        assert len(calls) == step + 1
        assert not torch.equal(calls[-1], before)  # after the generator's step
        assert torch.equal(calls[-1], trainer.model.generator.fc.weight)
