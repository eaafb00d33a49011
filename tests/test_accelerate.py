"""accelerate(): foreign networks give the same results; look-alikes are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import foreign
import foreign_layers
import pytest
import torch
from foreign_cases import LABELS, NETWORKS, block_of, label_map, lively, norm_of, normal
from torch import Tensor, nn

from smis_kernels import accelerate, restore
from smis_kernels.acceleration.swap import Accelerated, Fused
from smis_kernels.testing import max_error


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}


def trained(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of float inputs and parameters with the buffers afterwards."""
    leaves = [x.clone().requires_grad_(x.is_floating_point() and i == 0)
              for i, x in enumerate(inputs)]
    out = module(*leaves)
    parameters = dict(module.named_parameters())
    wanted = {"input": leaves[0], **parameters}
    gradients = torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(),
                                    list(wanted.values()), allow_unused=True)
    found = {k: g for k, g in zip(wanted, gradients, strict=True) if g is not None}
    return out, found | buffers(module)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_it_did(name: str, training: bool) -> None:
    build, inputs, kinds = NETWORKS[name]
    network = build().train(training)
    original = copy.deepcopy(network)
    report = accelerate(network)
    assert {row.kind for row in report.replaced} == kinds
    assert not report.left, str(report)
    for _ in range(2):  # buffers have moved on in training
        expected, expected_rest = trained(original, inputs)
        out, rest = trained(network, inputs)
        assert max_error(out, expected) < 1e-10
        assert out.is_contiguous()
        assert rest.keys() == expected_rest.keys()
        for key, value in expected_rest.items():
            # Biases before a norm have no gradient but rounding.
            assert torch.allclose(rest[key], value, rtol=1e-7, atol=1e-8), key


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_state_stays_and_restore_undoes(name: str, inference: bool) -> None:
    build, inputs, _ = NETWORKS[name]
    network = build().eval()
    classes = [type(m) for m in network.modules()]
    state = {k: v.clone() for k, v in network.state_dict().items()}
    tensors = [*network.parameters(), *network.buffers()]
    places = [t.data_ptr() for t in tensors]
    with torch.no_grad():
        before = network(*inputs)
        report = accelerate(network, inference=inference)
        after = network(*inputs)
        again = accelerate(network, inference=inference)
    assert again.rows == report.rows
    assert max_error(after, before) < 1e-10
    now = network.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[k], state[k]) for k in state)
    assert all(a is b for a, b in zip(tensors, [*network.parameters(), *network.buffers()],
                                      strict=True))
    assert [t.data_ptr() for t in tensors] == places  # nor were their values moved or copied
    assert any(isinstance(m, Accelerated) for m in network.modules())
    assert restore(network) > 0
    assert [type(m) for m in network.modules()] == classes
    assert restore(network) == 0
    with torch.no_grad():
        assert torch.equal(network(*inputs), before)


@pytest.mark.parametrize(("build", "kind", "word"), [
    (lambda: norm_of(foreign.Rectified), "norm", "relu of features"),
    (lambda: norm_of(foreign.Clamped), "norm", "clamp of features"),
    (lambda: norm_of(foreign.SmoothResize), "norm", "resized by bilinear"),
    (lambda: norm_of(foreign.StopGradient), "norm", "gradient"),
    (lambda: block_of(foreign.HalfTrainedUnit), "block", "detach beside its norms and convs"),
    (lambda: lively(foreign_layers.MeanKernels(4)), "pixel_conv", "output differs"),
    (lambda: lively(foreign_layers.MaxEncoder()), "instance_pool", "output differs"),
], ids=["relu", "extra_op", "resize", "detached", "block", "pixel_conv", "pooling"])
@pytest.mark.parametrize("gain", [1.0, 1e-4])
def test_look_alikes_are_left_alone(build: Callable[[], nn.Module], kind: str, word: str,
                                    gain: float) -> None:
    module = build()
    with torch.no_grad():  # small weights hide no difference
        for p in module.parameters():
            p.mul_(gain)
    report = accelerate(module)
    (row,) = [r for r in report.rows if r.kind == kind]
    assert not row.replaced
    assert word in row.note
    assert not isinstance(module, Fused)


@pytest.mark.parametrize("options", [
    {"size": 1}, {"size": 5}, {"norm": nn.InstanceNorm2d}, {"norm": foreign.UncountedBatchNorm},
    {"norm": nn.SyncBatchNorm}, {"groups": 2}, {"shared_groups": 1, "hidden_": 4},
    {"norm": partial(nn.BatchNorm2d, momentum=None)}, {"padding_mode_": "circular"},
], ids=str)
def test_norms_of_other_settings_are_fused(options: dict[str, Any]) -> None:
    plain = {k: v for k, v in options.items() if k[-1] != "_"}
    norm = lively(foreign.LayoutNorm(6, LABELS, options.get("hidden_", 8), **plain))
    norm.mlp_gamma.padding_mode = norm.mlp_beta.padding_mode = options.get("padding_mode_", "zeros")
    original = copy.deepcopy(norm)
    assert len(accelerate(norm).replaced) == 1
    x, planes = normal(2, 6, 8, 8), label_map(32)
    for training in (True, False):
        norm.train(training), original.train(training)
        assert max_error(norm(x, planes), original(x, segmap=planes)) < 1e-10
        assert all(torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b)
                   for a, b in zip(norm.buffers(), original.buffers(), strict=True))
