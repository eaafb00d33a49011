"""Networks against numbers that the published code gives (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_builders import BUILDERS
from parity_rules import cotangent, fill, fingerprint, make_input
from torch import Tensor

from smis_kernels import use_backend

NETWORKS: dict[str, dict[str, Any]] = {}
LOSSES: dict[str, dict[str, Any]] = {}
OPS: dict[str, dict[str, Any]] = {}
GOLDEN: dict[str, np.ndarray] = {}
for _family in ("groupdnet", "spade", "pix2pixhd", "ccfpse"):
    _file = dict(np.load(Path(__file__).parent / "golden" / f"{_family}.npz"))
    _meta = json.loads(str(_file.pop("meta")))
    NETWORKS |= _meta["networks"]
    LOSSES |= _meta["losses"]
    OPS |= _meta.get("ops", {})
    GOLDEN |= _file
RUN = [name for name in NETWORKS if "inputs" in NETWORKS[name]]
# The other encoders and discriminators have no choice of backend.
CHOICE = ("_G_", "pix2pixhd", "ccfpse_coco_D", "ccfpse_cityscapes_D")
EVAL = [(name, backend) for name in RUN for backend in ("reference", "auto")
        if backend == "auto" or any(part in name for part in CHOICE)]
# A training step in fp64 takes seconds: one of each network.
TRAIN = [(name, backend) for name, backend in EVAL if "grad_strides" in NETWORKS[name]]


def flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flatten(part)]


def decode(argument: Any) -> Any:
    if isinstance(argument, list):
        return [decode(entry) for entry in argument]
    return torch.from_numpy(make_input(argument["name"], argument["rng"]))


def relative_error(result: Tensor, stride: int, golden: np.ndarray) -> float:
    sampled = result.detach().double().reshape(-1)[::stride].numpy()
    assert sampled.shape == golden.shape
    return float(np.abs(sampled - golden).max() / np.abs(golden).max())


def make_inputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    recipes = NETWORKS[name]["inputs"]
    inputs = {key: torch.from_numpy(make_input(f"{name}/{key}", recipe))
              for key, recipe in recipes.items()}
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_is_the_published_one(name: str) -> None:
    assert fingerprint(BUILDERS[name](NETWORKS[name])) == NETWORKS[name]["fingerprint"]


@pytest.mark.parametrize(("name", "backend"), EVAL)
def test_eval_outputs(name: str, backend: str) -> None:
    golden = NETWORKS[name]
    module = BUILDERS[name](golden).eval()
    fill(module, golden["gains"])
    inputs = make_inputs(name, torch.float32)
    with torch.no_grad(), use_backend(backend):
        outputs = flatten(module(*(inputs[key] for key in golden["call"])))
    assert [list(out.shape) for out in outputs] == [out["shape"] for out in golden["outputs"]]
    for i, out in enumerate(outputs):
        stride = golden["outputs"][i]["stride"]
        assert relative_error(out, stride, GOLDEN[f"{name}/eval{i}"]) <= 2e-4


@pytest.mark.parametrize(("name", "backend"), TRAIN)
def test_training_step(name: str, backend: str) -> None:
    golden = NETWORKS[name]
    module = BUILDERS[name](golden).double().train()
    fill(module, golden["gains"])
    inputs = make_inputs(name, torch.float64)
    for key in golden["grad_wrt"]:
        inputs[key].requires_grad_()
    with use_backend(backend):
        outputs = flatten(module(*(inputs[key] for key in golden["call"])))
        torch.stack([(out * cotangent(name, i, out.shape)).sum()
                     for i, out in enumerate(outputs)]).sum().backward()
    for i, out in enumerate(outputs):
        stride = golden["outputs"][i]["stride"]
        assert relative_error(out, stride, GOLDEN[f"{name}/train{i}"]) <= 2e-6
    for key in golden["grad_wrt"]:
        gradient, stride = inputs[key].grad, golden["grad_strides"][key]
        assert gradient is not None
        assert relative_error(gradient, stride, GOLDEN[f"{name}/grad_{key}"]) <= 1e-5

    parameters = dict(module.named_parameters())
    norms = [0.0 if parameters[key].grad is None else float(parameters[key].grad.norm())
             for key in sorted(parameters)]
    expected = np.nan_to_num(GOLDEN[f"{name}/param_norms"])
    np.testing.assert_allclose(norms, expected, rtol=1e-4, atol=1e-9 * expected.max())
    buffers = dict(module.named_buffers())
    norms = [float(buffers[key].norm()) for key in sorted(buffers)
             if buffers[key].is_floating_point()]
    np.testing.assert_allclose(norms, GOLDEN[f"{name}/buffer_norms"], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    case = LOSSES[name]
    found = flatten(BUILDERS[case.get("ops", "ops_smis")](None)[name](*decode(case["args"])))
    assert [float(x) for x in found] == pytest.approx(np.atleast_1d(case["value"]), rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, backend: str) -> None:
    family, _, case = name.partition("/")
    with use_backend(backend):
        found = flatten(BUILDERS[family](None)[case](*decode(OPS[name]["args"])))
    assert [list(x.shape) for x in found] == [x["shape"] for x in OPS[name]["outputs"]]
    for i, x in enumerate(found):
        stride = OPS[name]["outputs"][i]["stride"]
        assert relative_error(x, stride, GOLDEN[f"{name}/out{i}"]) <= 1e-5
