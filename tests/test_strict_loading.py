"""Checkpoints load exactly: a surplus, missing or misshapen entry is refused, values arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smis_models import CheckpointError, create_model, read_checkpoint
from smis_models.io.checkpoint import load_state

TINY: dict[str, Any] = {"ngf": 8, "nef": 16, "ndf": 8, "image_size": (64, 64)}
NAME = "groupdnet_deepfashion"


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    model = create_model(NAME, seed=3, **TINY)
    return {"generator": dict(model.generator.state_dict()),
            "encoder": dict(model.encoder.state_dict()), "": dict(model.state_dict())}


@pytest.mark.parametrize("part", ["generator", "encoder", ""])
@pytest.mark.parametrize("change", ["surplus", "missing", "shape", "buffer", "bias"])
def test_other_keys_are_refused(states: dict[str, dict[str, torch.Tensor]], part: str,
                                change: str) -> None:
    state = dict(states[part])
    biases = [k for k in state if k.endswith("bias")]
    buffers = [k for k in state if k.endswith(("weight_u", "running_mean"))]
    if change == "surplus":
        state["extra.weight"], words = torch.zeros(2), r"1 unexpected \(extra\.weight\)"
    elif change == "missing":
        words = r"1 keys missing \(" + biases[-1].replace(".", r"\.")
        del state[biases[-1]]
    elif change == "bias":
        state[biases[0]] = torch.zeros(len(state[biases[0]]) + 1)
        words = r"1 of another shape \("
    elif change == "shape":
        state[biases[0]] = state[biases[0]][None]
        words = r"1 of another shape \("
    else:
        words = r"1 keys missing \(" + buffers[-1].replace(".", r"\.")
        del state[buffers[-1]]
    module = create_model(NAME, device="meta", **({"part": part} if part else {}), **TINY)
    with pytest.raises(CheckpointError, match=words):
        load_state(module, state, source="weights.pth", model=NAME)


def test_only_the_counter_of_batches_may_be_absent(
        states: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    state = {k: v for k, v in states["generator"].items() if "num_batches_tracked" not in k}
    assert len(state) < len(states["generator"])
    torch.save(state, tmp_path / "old.pth")
    model = create_model(NAME, tmp_path / "old.pth", part="generator", **TINY)
    for key, value in model.state_dict().items():
        assert torch.equal(value, torch.zeros_like(value) if "tracked" in key else state[key]), key


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapper_s_prefix_is_of_all_keys_or_none(
        states: dict[str, dict[str, torch.Tensor]], prefix: str, tmp_path: Path) -> None:
    state = states["encoder"]
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "wrapped.pth")
    assert set(read_checkpoint(tmp_path / "wrapped.pth")) == set(state)
    first = next(iter(state))
    torch.save({**{prefix + k: v for k, v in state.items() if k != first}, first: state[first]},
               tmp_path / "mixed.pth")
    module = create_model(NAME, device="meta", part="encoder", **TINY)
    with pytest.raises(CheckpointError, match="keys missing"):
        load_state(module, read_checkpoint(tmp_path / "mixed.pth"), source="mixed.pth", model=NAME)
