"""accelerate(inference=True): weights are constants until they change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import foreign
import foreign_layers
import pytest
import torch
from foreign_cases import accelerated_painter, label_map, lively, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from smis_kernels import accelerate, restore
from smis_kernels.modules.spectral_norm import FusedSpectralNorm
from smis_kernels.testing import max_error


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts computations of a spectrally normalised weight."""
    calls: list[int] = []
    compute = FusedSpectralNorm.__call__

    def counting(*args: Any) -> None:
        calls.append(1)
        compute(*args)

    monkeypatch.setattr(FusedSpectralNorm, "__call__", counting)
    return calls


def test_inference_computes_spectral_norm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, planes, expected = accelerated_painter()
    calls = computed(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            assert max_error(network(planes), expected) < 1e-10
        assert len(calls) == 18
        network.up_1.conv_0.weight_orig.mul_(-1)  # sigma changes its sign, too: no difference
        network.up_2.conv_0.weight_v.mul_(2)
        changed = network(planes)
        assert len(calls) == 20
    assert max_error(changed, expected) > 1e-3
    network(planes).sum().backward()  # a gradient is wanted: nothing is constant
    assert len(calls) == 38
    assert network.up_0.conv_0.weight_orig.grad is not None
    network.train()
    u = network.up_0.conv_0.weight_u.clone()
    with torch.no_grad():
        network(planes)
        assert not torch.equal(network.up_0.conv_0.weight_u, u)
        reference = copy.deepcopy(network)
        restore(reference)
        assert max_error(network.eval()(planes), reference.eval()(planes)) < 1e-10
    assert restore(network) > 0
    assert not any(type(h) is not SpectralNorm for m in network.modules()
                   for h in m._forward_pre_hooks.values())


def test_inference_folds_batch_norm_into_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = lively(foreign_layers.label_encoder(5, 6)).eval()
    x = normal(2, 5, 8, 8)
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    expected = encoder(x).detach()
    assert {row.kind for row in accelerate(encoder).replaced} == {"spectral_norm"}
    report = accelerate(encoder, inference=True)
    assert {row.kind for row in report.replaced} == {"norm_act", "spectral_norm"}
    normalised: list[int] = []
    for _ in range(2):
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(nn.BatchNorm2d, "forward", lambda *_: normalised.append(1))
            assert max_error(encoder(x), expected) < 1e-10
    assert not normalised
    with torch.no_grad():
        encoder[1][0][1].running_var.mul_(4)  # a buffer that is written to is seen
        assert max_error(encoder(x), expected) > 1e-3
        encoder.load_state_dict(state)
        assert max_error(encoder(x), expected) < 1e-10
        assert max_error(copy.deepcopy(encoder)(x), expected) < 1e-10
    out = encoder(x)
    out.sum().backward()
    assert encoder[0][0][1].weight.grad is not None
    restore(encoder)
    assert torch.equal(encoder(x).detach(), expected)


def test_inference_folds_the_spectral_norm_of_parametrizations() -> None:
    conv = lively_parametrized()
    x = normal(1, 3, 6, 6)
    with torch.no_grad():
        expected = conv(x)
        assert len(accelerate(conv, inference=True).replaced) == 1
        assert torch.equal(conv(x), expected)
        assert conv.weight is conv.weight
        conv.parametrizations.weight.original.mul_(1.5)
        conv.parametrizations.weight[0]._u.mul_(2)
        assert max_error(conv(x), expected) > 0.1
        assert restore(conv) == 1
        assert conv.weight is not conv.weight


@pytest.mark.parametrize("name", ["weight_orig", "weight_u", "weight_v",
                                  "parametrizations.weight.original",
                                  "parametrizations.weight.0._u", "parametrizations.weight.0._v"])
def test_each_tensor_of_a_folded_spectral_norm_is_watched(name: str) -> None:
    torch.manual_seed(0)
    conv = (nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)).double().eval() if name[0] == "w"
            else lively_parametrized())
    original, x = copy.deepcopy(conv), normal(1, 3, 6, 6)
    accelerate(conv, inference=True)
    with torch.no_grad():
        assert max_error(conv(x), original(x)) < 1e-12
        before = original(x)
        for module in (conv, original):
            module.state_dict(keep_vars=True)[name].data[1:].mul_(2)
        assert max_error(original(x), before) > 1e-3
        assert max_error(conv(x), original(x)) < 1e-12


@pytest.mark.parametrize("place", [0, 1], ids=["conv", "batch norm"])
@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_hooks_on_folded_layers_are_obeyed(kind: str, place: int) -> None:
    network = lively(nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6))).eval()
    original, x = copy.deepcopy(network), normal(2, 5, 8, 8)
    accelerate(network, inference=True)
    with torch.no_grad():
        before = network(x)
        for m in (network, original):
            if kind == "hook":
                m[place].register_forward_hook(lambda _, __, out: 2 * out)
            else:
                m[place].register_forward_pre_hook(lambda _, args: (2 * args[0],))
        assert max_error(original(x), before) > 1e-3
        assert max_error(network(x), original(x)) < 1e-10


def test_a_batch_norm_in_training_is_not_folded() -> None:
    """Its convs may be in eval mode meanwhile."""
    network = lively(nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6))).eval()
    original, x = copy.deepcopy(network), normal(2, 5, 8, 8)
    accelerate(network, inference=True)
    with torch.no_grad():
        for m in (network, original):
            m[1].train()
        assert max_error(network(x), original(x)) < 1e-10
    assert max_error(network[1].running_mean, original[1].running_mean) < 1e-12


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_batch_norm_of_another_width_is_refused_as_before(outputs: int) -> None:
    network = nn.Sequential(nn.Conv2d(5, outputs, 3), nn.BatchNorm2d(6)).eval()
    accelerate(network, inference=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="running_mean"):
        network(torch.randn(2, 5, 8, 8))


class Raised(nn.BatchNorm2d):
    """A batch norm of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_batch_norm_of_ones_own_is_not_folded() -> None:
    network = lively(nn.Sequential(nn.Conv2d(5, 6, 3), Raised(6), nn.Conv2d(6, 4, 3),
                                   nn.BatchNorm2d(4))).eval()
    original, x = copy.deepcopy(network), normal(2, 5, 8, 8)
    assert accelerate(network, inference=True).replaced
    with torch.no_grad():
        assert max_error(network(x), original(x)) < 1e-10


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, parametrizations.spectral_norm],
                         ids=["hook", "parametrization"])
def test_a_folded_weight_that_is_written_to_is_computed_anew(
        spectral_norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    conv, x = spectral_norm(nn.Conv2d(3, 4, 3)).double().eval(), normal(1, 3, 6, 6)
    accelerate(conv, inference=True)
    with torch.no_grad():
        expected = conv(x)
        for _ in range(2):
            conv.weight.mul_(2)  # what the hook makes, not what it makes it of
            assert max_error(conv(x), expected) < 1e-12


def doubled(*given: Any) -> Any:
    return 2 * given[-1]


def test_hooks_on_a_folded_parametrization_are_obeyed() -> None:
    conv = lively_parametrized()
    with torch.no_grad():
        accelerate(conv, inference=True)
        before = conv.weight.clone()
        conv.parametrizations.weight[0].register_forward_hook(doubled)
        assert torch.equal(conv.weight, 2 * before)


class Noisy(nn.Module):
    """A parametrization that gives another weight in every call."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def test_spectral_norm_beside_another_parametrization_is_not_kept() -> None:
    conv = lively_parametrized()
    nn.utils.parametrize.register_parametrization(conv, "weight", Noisy())
    with torch.no_grad():
        assert not accelerate(conv, inference=True).replaced
        assert not torch.equal(conv.weight, conv.weight)


class Halved(SpectralNorm):
    """Spectral norm of somebody's own: sigma is twice as large."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        return super().compute_weight(module, do_power_iteration) / 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_a_spectral_norm_of_ones_own_is_left(inference: bool, training: bool) -> None:
    torch.manual_seed(0)
    conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)).double().train(training)
    (hook,) = conv._forward_pre_hooks.values()
    hook.__class__ = Halved
    original, x = copy.deepcopy(conv), normal(1, 3, 6, 6)
    accelerate(conv, inference=inference)
    with torch.no_grad():
        assert torch.equal(conv(x), original(x))


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, parametrizations.spectral_norm],
                         ids=["hook", "parametrization"])
def test_weights_under_vmap_are_their_own(
        spectral_norm: Callable[[nn.Module], nn.Module]) -> None:
    """Several weights at once are no constant."""
    torch.manual_seed(0)
    conv, x = spectral_norm(nn.Conv2d(3, 4, 3)).double().eval(), normal(1, 3, 6, 6)
    key = next(name for name, _ in conv.named_parameters() if name != "bias")
    weights = conv.get_parameter(key).detach() * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    with torch.no_grad():
        expected = conv(x)
        accelerate(conv, inference=True)
        conv(x)
        found = torch.func.vmap(lambda w: torch.func.functional_call(conv, {key: w}, (x,)))(weights)
        for one in found:  # sigma changes its sign, too: no difference
            assert max_error(one, expected) < 1e-12
        assert max_error(conv(x), expected) < 1e-12


def lively_parametrized() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).double()
    return parametrizations.spectral_norm(conv).eval()


def test_a_spectrally_normalised_map_conv_is_not_skipped() -> None:
    norm = foreign.LayoutNorm(6, 7, 8)
    nn.utils.spectral_norm(norm.mlp_gamma)
    lively(norm).eval()
    x, planes = normal(2, 6, 8, 8), label_map(16)
    expected = norm(x, planes)
    accelerate(norm)
    with torch.no_grad():
        norm.mlp_gamma.weight_orig.mul_(2)  # sigma doubles with it
        assert max_error(norm(x, planes), expected) < 1e-10
