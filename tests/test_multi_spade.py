"""Multi-SPADE: one pass equals the SPADEs applied one after the other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import LabelLayout, MultiSPADE, explain, use_backend, use_path
from smis_kernels.modules.multi_spade import compose
from smis_kernels.runtime.backend import missing

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
LABELS, OTHERS, PICTURE = 5, 3, 4
CONDITIONS = [(LABELS, 8), (OTHERS, 0), (PICTURE, 6)]
Condition = Tensor | LabelLayout | None


def make(conditions: list[tuple[int, int]] = CONDITIONS, **options: Any) -> MultiSPADE:
    torch.manual_seed(0)
    return MultiSPADE(6, conditions, **options).double()


def labels(classes: int, size: tuple[int, int], batch: int = 2) -> Tensor:
    coarse = torch.randint(classes, (batch, 1, 4, 4),
                           generator=torch.Generator().manual_seed(classes))
    return F.interpolate(coarse.double(), size)[:, 0].long()


def one_hot(classes: int, size: tuple[int, int]) -> Tensor:
    return F.one_hot(labels(classes, size), classes).permute(0, 3, 1, 2).double()


def inputs(size: tuple[int, int] = (16, 12)) -> tuple[Tensor, list[Condition]]:
    """Features, two label maps and a picture."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((2, 6, *size), generator=generator, dtype=torch.float64)
    picture = torch.randn((2, PICTURE, *size), generator=generator, dtype=torch.float64)
    return x, [one_hot(LABELS, (32, 24)), one_hot(OTHERS, size), picture]


def in_turn(norm: MultiSPADE, x: Tensor, *conditions: Condition, upsample: bool = False,
            activation: str | None = None) -> Tensor:
    """The definition: normalise once, then one modulation after the other."""
    if upsample:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    x = norm.param_free_norm(x)
    for spade, condition in zip(norm.spades, conditions, strict=True):
        if condition is None:
            continue
        planes = condition.dense(dtype=x.dtype) if isinstance(condition, LabelLayout) else condition
        hidden = F.interpolate(planes, x.shape[2:], mode="nearest")
        if spade.hidden:
            hidden = spade.mlp_shared(hidden)
        x = x * (1 + spade.mlp_gamma(hidden)) + spade.mlp_beta(hidden)
    return F.leaky_relu(x, 0.2) if activation else x


def as_layouts(conditions: list[Condition]) -> list[Condition]:
    """The two label maps compiled."""
    layouts = [LabelLayout.from_tensor(c) for c in conditions[:2] if isinstance(c, Tensor)]
    return [*layouts, *conditions[2:]]


FORMS: dict[str, Callable[[list[Condition]], list[Condition]]] = {
    "tensors": lambda c: c, "layouts": as_layouts,
    "labels alone": lambda c: [*as_layouts(c)[:2], None], "one label map": lambda c: [
        as_layouts(c)[0], None, None], "picture alone": lambda c: [None, None, c[2]],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "syncbatch", "instance", "none"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_equals_the_spades_in_turn(form: Callable[[list[Condition]], list[Condition]], norm: str,
                                   training: bool, backend: str) -> None:
    module, expected_module = make(norm=norm).train(training), make(norm=norm).train(training)
    x, conditions = inputs()
    conditions = form(conditions)
    with use_backend(backend):
        found = module(x, *conditions)
    torch.testing.assert_close(found, in_turn(expected_module, x, *conditions),
                               rtol=1e-10, atol=1e-10)
    assert found.is_contiguous()
    for buffer, expected in zip(module.buffers(), expected_module.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@needs_cpu
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("path", ["auto", "two_level"])
def test_gradients(form: Callable[[list[Condition]], list[Condition]], path: str) -> None:
    found = []
    for call in (MultiSPADE.__call__, in_turn):
        module = make().train()
        x, conditions = inputs()
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        conditions = form(conditions)
        if path != "auto":  # the picture has no tables
            conditions[2] = None
        if all(c is None for c in conditions):
            return
        with use_path(path):
            y = call(module, x, *conditions, upsample=True, activation="leaky_relu")
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
        leaves = [x, *module.parameters()]
        found.append([y, *torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@needs_cpu
def test_label_maps_are_composed_into_one_table() -> None:
    module = make([(LABELS, 8), (OTHERS, 0)]).eval()
    x, conditions = inputs((64, 64))
    layouts = as_layouts(conditions)[:2]
    with use_path("two_level"):
        ran = explain(module, x, *layouts)
    last = ran.choices[-1]
    assert last.op == "indexed_modulation"
    rows, pixels = last.numbers["rows"], 2 * 64 * 64
    separate = [c.numbers for c in ran.choices if "U" in c.numbers]
    assert max(n["U"] for n in separate) <= rows < pixels / 4


def test_noise_has_no_tables() -> None:
    module = make([(LABELS, 0), (OTHERS, 0)]).eval()
    x, _ = inputs((8, 8))
    noise = [torch.randn(2, k, 8, 8, dtype=torch.float64) for k in (LABELS, OTHERS)]
    assert explain(module, x, *noise).choices[-1].op == "modulation"
    torch.testing.assert_close(module(x, *noise), in_turn(module, x, *noise))


def test_compose_is_associative_and_exact() -> None:
    affines = [(torch.randn(3, 4).double(), torch.randn(3, 4).double()) for _ in range(4)]
    x = torch.randn(3, 4).double()
    expected = x
    for gamma, beta in affines:
        expected = expected * (1 + gamma) + beta
    gamma, beta = compose(affines)
    torch.testing.assert_close(x * (1 + gamma) + beta, expected)


def test_one_condition_is_spade() -> None:
    module = make([(LABELS, 8)]).eval()
    x, conditions = inputs()
    spade = copy.deepcopy(module.spades[0])
    spade.param_free_norm = copy.deepcopy(module.param_free_norm)
    torch.testing.assert_close(module(x, conditions[0]), spade(x, conditions[0]))


@needs_cpu
def test_compiles_without_a_graph_break_on_prepared_layouts() -> None:
    module = make().eval()
    x, conditions = inputs()
    conditions = as_layouts(conditions)
    with torch.no_grad():
        expected = module(x, *conditions)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, *conditions), expected)


def test_state_dict_and_pickle() -> None:
    module = make()
    keys = [k for k in module.state_dict() if "param_free" not in k]
    assert keys[:2] == ["spades.0.mlp_shared.0.weight", "spades.0.mlp_shared.0.bias"]
    assert not any(k.startswith("spades.1.mlp_shared") for k in keys)
    x, conditions = inputs()
    again = pickle.loads(pickle.dumps(module)).eval()
    torch.testing.assert_close(again(x, *conditions), module.eval()(x, *conditions))


def test_bad_input_is_named() -> None:
    module = make()
    x, conditions = inputs()
    for call, words in (
        (lambda: MultiSPADE(6, []), ("conditions", "at least one")),
        (lambda: MultiSPADE(6, [(5, 8)], norm="group"), ("norm", "'group'")),
        (lambda: MultiSPADE(6, [(5, 8)], kernel_size=2), ("kernel_size", "odd")),
        (lambda: module(x, *conditions[:2]), ("conditions: expected 3", "got 2")),
        (lambda: module(x, None, None, None), ("conditions", "None alone")),
        (lambda: module(x, conditions[1], None, None), ("segmap", "(N, 5, H, W)")),
    ):
        with pytest.raises(ValueError, match=words[0].split(":")[0]) as error:
            call()
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words)
