"""accelerate() on norms drawn at random: replaced and equal, or left with a reason.

SMIS_DRAWN=1000 pytest tests/test_accelerate_drawn.py --hypothesis-show-statistics
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from drawn_norms import Spec, build, call, inputs, specs
from hypothesis import HealthCheck, Phase, event, example, given, settings
from torch import Tensor, nn

from smis_kernels import accelerate

COUNT = os.environ.get("SMIS_DRAWN")
SCALES = (1e-3, 1.0, 1e3)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*is deprecated", "ignore:accelerate:UserWarning",
    "ignore:.*mkldnn.*:UserWarning", "ignore:Using padding='same'")


def step(spec: Spec, module: nn.Module, x: Tensor, scene: Tensor) -> dict[str, Tensor | None]:
    """The output, gradients of features, map and parameters, and the buffers afterwards."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    scene = scene.clone().requires_grad_(spec.map_gradient)
    y = call(spec, module, x, scene)
    leaves = {"features": x, **({"map": scene} if spec.map_gradient else {}),
              **{f"parameter {k}": p for k, p in module.named_parameters()}}
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True)
    buffers = {f"buffer {k}": b.clone() for k, b in module.named_buffers()}
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True)), **buffers}


# Below these sizes values are rounding: gradients of parameters that constant maps cancel, say.
LEAST = {"output": 1e-3, "features": 1e-3, "map": 1e-3, "parameter": 0.1}


def kind_of(key: str) -> str:
    """Buffers are judged one by one, parameters by the largest gradient of all."""
    return key if key.startswith("buffer") else key.split()[0]


def problem(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> str | None:
    """What differs by more than 1e-9 of the largest value of its kind."""
    assert found.keys() == expected.keys()
    sizes: dict[str, float] = {}
    for key, t in expected.items():
        kind = kind_of(key)
        largest = 0.0 if t is None else float(t.abs().nan_to_num(0.0, 0.0).max())
        sizes[kind] = max(sizes.get(kind, LEAST.get(kind, 0.0)), largest)
    for key, value in expected.items():
        other, size = found[key], sizes[kind_of(key)]
        if value is None or other is None:
            some = other if value is None else value
            if some is not None and bool(some.any()):
                return f"{key} is there on one side only"
        elif other.shape != value.shape or other.dtype != value.dtype:
            return f"{key}: {other.dtype} {tuple(other.shape)}"
        elif not torch.allclose(other.double(), value.double(), 0, 1e-9 * size, equal_nan=True):
            return f"{key} is off by {float((other - value).abs().max()):.1e} of {size:.1e}"
    return None


def examined(spec: Spec) -> Any:
    """The report's row of a norm after its results were compared at every scale and mode."""
    module, original = build(spec), build(spec)
    report = accelerate(module)
    module.double(), original.double()
    first = {k: v.clone() for k, v in original.state_dict().items()}
    row = next((r for r in report.rows if r.name == "" and r.kind == "norm"), None)
    for scale in SCALES:
        factors = {"running_mean": scale, "running_var": scale**2}
        state = {k: v * factors.get(k.rpartition(".")[2], 1) for k, v in first.items()}
        module.load_state_dict(state), original.load_state_dict(state)
        for i, training in enumerate((True, True, False)):
            x, scene = inputs(spec, i)
            module.train(training), original.train(training)
            expected = step(spec, original, scale * x, scene)
            wrong = problem(step(spec, module, scale * x, scene), expected)
            assert wrong is None, f"{wrong}; scale {scale}, training {training}: {spec}\n{report}"
    left = dict(report.calls_left)
    assert row is None or not row.replaced or not left, f"{left}: {spec}"
    return row


# Its padding is too wide for the probe's features, but not for the map in their place.
@example(spec=Spec(kernel=7, padding="mirror", odd=(("kernel", 7),)))
@example(spec=Spec(norm="positional", kernel=7, padding="mirror", odd=(("kernel", 7),)))
@given(spec=specs())
@settings(max_examples=int(COUNT or 30), deadline=None, derandomize=COUNT is None,
          phases=set(Phase) - {Phase.explain}, suppress_health_check=list(HealthCheck))
def test_a_drawn_norm_is_replaced_and_equal_or_left_with_a_reason(spec: Spec) -> None:
    row = examined(spec)
    replaced = row is not None and row.replaced
    event(f"{'served' if spec.served else 'odd'}: "
          f"{'replaced' if replaced else 'left' if row else 'not listed'}")
    if row is None:  # only what normalises has to be listed
        assert spec.norm == "none" and not spec.served, f"not listed: {spec}"
        return
    assert row.replaced or row.note, spec
    assert row.replaced or not spec.served, f"{row.note}: {spec}"
