"""accelerate() knows a conditional norm by what it computes, not by what its parts are called."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign_cases import LABELS, label_map, lively, normal
from foreign_norms import width_list
from torch import Tensor, nn

from smis_kernels import accelerate, use_path
from smis_kernels.acceleration.swap import PLAN

NORMS = width_list(6, LABELS)
WITHOUT_TABLES = {"separate", "reflected"}
SAME_SIZE = {"summed", "chunked", "chunked_no_bias", "unnormalised"}


def inputs_of(name: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    x, planes = scale * normal(2, 6, 8, 8), label_map(8 if name in SAME_SIZE else 20)
    return (planes, x) if name == "map_first" else (x, planes)


def everything(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Output, gradients of features and parameters, buffers."""
    leaves = [x.clone().requires_grad_(x.dtype == torch.float64 and not bool(
        ((x == 0) | (x == 1)).all())) for x in inputs]
    out = module(*leaves)
    wanted = {f"input {i}": x for i, x in enumerate(leaves) if x.requires_grad}
    wanted |= dict(module.named_parameters())
    grads = torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), list(wanted.values()),
                                materialize_grads=True)
    return {"output": out, **dict(zip(wanted, grads, strict=True)),
            **{f"buffer {k}": b.clone() for k, b in module.named_buffers()}}


@pytest.mark.parametrize("name", NORMS)
def test_whatever_computes_a_norm_is_replaced_and_equal(name: str) -> None:
    module = lively(NORMS[name]())
    original = copy.deepcopy(module)
    report = accelerate(module)
    row = next(r for r in report.rows if r.kind == "norm")
    assert row.replaced, row.note
    form = vars(module)[PLAN].form
    assert bool(form.no_tables) == (name in WITHOUT_TABLES), form.no_tables
    paths = ["dense"] if form.no_tables else ["dense", "one_level", "two_level"]
    for path in ("auto", *paths):
        for training in (True, False):
            for scale in (1e-3, 1.0, 1e3):
                module.train(training), original.train(training)
                with use_path(path):
                    got = everything(module, inputs_of(name, scale))
                expected = everything(original, inputs_of(name, scale))
                for key, value in expected.items():
                    bound = 1e-9 * max(1.0, float(value.abs().max()))
                    error = float((got[key] - value).abs().max())
                    assert error < bound, (path, training, scale, key)
    assert not report.calls_left
