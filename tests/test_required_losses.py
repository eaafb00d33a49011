"""A loss that was asked for is computed, or training does not start; records say which it was."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from small_models import SMALL_TRAINING
from torch import Tensor

from smis_models.io.checkpoint import CheckpointError, read_metadata
from smis_models.io.files import file_hash, published_hash
from smis_models.networks import perceptual
from smis_models.training import Run, TrainConfig, from_dict
from smis_models.training.checkpoints import TRAINING
from smis_models.training.objective import objective

pytest.importorskip("jsonargparse")


def tiny(*arguments: str) -> TrainConfig:
    return from_dict({
        **SMALL_TRAINING,
        "data": {"name": "scenes", "batch": 2, "workers": 0, "count": 4},
        "schedule": {"epochs": 1, "decay_epochs": 0},
        "log": {"every": 1, "checkpoint_every": 1, "grid_every": 0, "tensorboard": False},
    }, arguments)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """VGG19 with drawn weights."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = perceptual.build_trunk(perceptual._LAYERS).state_dict()
    path = tmp_path / "vgg.pth"
    torch.save({f"features.{key}": value for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("given", [(), ("--losses.vgg", "absent.pth")])
def test_without_its_weights_training_does_not_start(
        given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"losses\.perceptual: expected .*vgg19-dcbb9e9d\.pth"
                       r".*--losses\.vgg.*--losses\.perceptual 0") as caught:
        Run(tiny(*given), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    Run(tiny("--losses.perceptual", "0"), tmp_path / "run")


def test_no_objective_drops_the_term(tmp_path: Path) -> None:
    run = Run(tiny("--losses.perceptual", "0"), tmp_path)
    batch = run.batches.step()[0]
    asked = objective(run.trainer.model, tiny())
    with pytest.raises(ValueError, match="perceptual: expected the VGG19 loss"):
        asked.generator(batch)


def test_other_weights_are_told_from_torchvisions(
        weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = file_hash(weights)
    assert published_hash(perceptual.FILE) == "dcbb9e9d"
    with pytest.warns(UserWarning, match=f"is not torchvision's file.*{digest[:8]}"):
        loss = perceptual.load_perceptual_loss(weights)
    assert loss.facts == {"vgg": "vgg.pth", "vgg_sha256": digest, "torchvision_weights": False}
    monkeypatch.setattr(perceptual, "FILE", f"vgg19-{digest[:8]}.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perceptual.load_perceptual_loss(weights).facts["torchvision_weights"]


def test_records_say_what_was_computed(weights: Path, tmp_path: Path) -> None:
    def recorded(name: str, *given: str) -> dict[str, object]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Run(tiny("--losses.vgg", str(weights), *given), tmp_path / name)
        run(stop=lambda: run.trainer.step_count == 1)
        record = json.loads((tmp_path / name / "record.json").read_text())
        of_weights = json.loads(read_metadata(tmp_path / name / "model.safetensors")[TRAINING])
        assert of_weights.items() <= record.items()
        return record

    record = recorded("with", "--losses.perceptual", "3", "--losses.feature_matching", "7",
                      "--losses.adversarial", "2", "--losses.discriminator", "0.5")
    assert record["losses"] == {"kl": 0.0125, "gan": 2.0, "feature_matching": 7.0,
                                "perceptual": 3.0, "fake": 0.5, "real": 0.5}
    assert record["perceptual"] == {"vgg": "vgg.pth", "vgg_sha256": file_hash(weights),
                                    "torchvision_weights": False}
    assert (record["step"], record["pictures"], record["processes"]) == (1, 4, 1)
    record = recorded("without", "--losses.perceptual", "0", "--losses.kl", "0")
    assert set(record["losses"]) == {"gan", "feature_matching", "fake", "real"}  # type: ignore
    assert record["perceptual"] is None


def test_a_record_claims_no_loss_before_the_first_step(weights: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(tiny("--losses.vgg", str(weights)), tmp_path / "run")
    run.save()
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert (record["step"], record["losses"], record["perceptual"]) == (0, {}, None)


def test_the_best_by_the_perceptual_loss(weights: Path, tmp_path: Path) -> None:
    """Its mean over all held-out scenes, of which the last batch has fewer."""
    from smis_models.data import Collate, GeneratedScenes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(tiny("--losses.vgg", str(weights), "--log.best", "perceptual",
                       "--log.best_scenes", "3"), tmp_path / "run")
    run.save()
    model, loss = run.trainer.model.eval(), run.trainer.objective.perceptual
    assert loss is not None
    each = []
    with torch.no_grad():
        for scene in GeneratedScenes(3, 64, "val"):
            batch = Collate(model.preset)([scene])
            mean, _ = model.encoder.encode(batch["image"], batch["labels"])
            each.append(float(loss(model.generator(batch["layout"], mean), batch["image"])))
    best = json.loads(read_metadata(tmp_path / "run/best.safetensors")[TRAINING])["best"]
    assert best.pop("vgg_sha256") == file_hash(weights)
    assert len(best.pop("scenes_sha256")) == 64
    assert best == {"metric": "perceptual", "scenes": 3, "split": "val",
                    "value": pytest.approx(sum(each) / 3, rel=1e-3)}
