"""accelerate(): convs of sequences in the form with fewer multiplications compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign_cases import lively, normal
from foreign_families import global_generator
from foreign_layers import image_network
from torch import Tensor, nn

from smis_kernels import accelerate, explain, restore
from smis_kernels.acceleration.convs import FusedConv, FusedConvTranspose, conv_change
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
LAST = torch.channels_last
# One 3x3 conv of stride 2 and a transposed one, of 3 planes and 3 outputs.
WIDE = {"width": 64, "planes": 3}


def _network() -> nn.Module:
    network: nn.Module = lively(image_network(**WIDE)).eval()
    return network


def _ops(module: nn.Module, x: Tensor) -> set[str]:
    return {choice.op for choice in explain(module, x).choices}


@pytest.mark.parametrize("inference", [False, True])
def test_wide_convs_of_a_sequence_are_swapped(inference: bool) -> None:
    network, x = _network(), normal(1, 3, 192, 160)
    for module in network.modules():  # names that the classes that take over might use
        module._padding = module._plain = module._kept = 3
    original, before = copy.deepcopy(network), [type(m) for m in network.modules()]
    report = accelerate(network, inference=inference)
    assert {row.kind for row in report.replaced} == {"conv", "norm_act"}
    assert sum(isinstance(m, FusedConv) for m in network.modules()) == 1
    assert sum(isinstance(m, FusedConvTranspose) for m in network.modules()) == 1
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=LAST)):
            assert max_error(network(given), original(given)) < 1e-10
        assert {"polyphase_conv2d", "polyphase_conv_transpose2d"} <= _ops(
            network, x.contiguous(memory_format=LAST))
        assert accelerate(network, inference=inference).rows == report.rows
        assert max_error(copy.deepcopy(network)(x), original(x)) < 1e-10
    assert restore(network) > 0
    assert [type(m) for m in network.modules()] == before
    assert torch.equal(network(x), original(x))


def test_a_trained_sequence_has_the_gradients_that_it_had() -> None:
    network = _network().train()
    original = copy.deepcopy(network)
    accelerate(network)
    x = normal(2, 3, 96, 80).contiguous(memory_format=LAST)
    found = []
    for module in (network, original):
        given = x.clone(memory_format=LAST).requires_grad_()
        loss = module(given).square().sum()
        found.append(torch.autograd.grad(loss, [given, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_conv_takes_its_hooks_and_its_format_along() -> None:
    network, x = _network(), normal(1, 3, 192, 160)
    accelerate(network)
    seen: list[tuple[int, ...]] = []
    conv = next(m for m in network.modules() if isinstance(m, FusedConvTranspose))
    conv.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        network(x)
        assert seen == [(1, 64, 192, 160)]
        features = normal(1, 128, 48, 40)
        assert conv(features).is_contiguous()
        assert conv(features.contiguous(memory_format=LAST)).is_contiguous(memory_format=LAST)
        assert conv(features, output_size=[95, 79]).shape == (1, 64, 95, 79)


def test_a_norm_that_goes_into_its_conv_leaves_it_to_torch() -> None:
    def network() -> nn.Module:
        return lively(nn.Sequential(
            nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 4, 2, 1), nn.InstanceNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1))).eval()

    folded, other = network(), network()
    accelerate(folded, inference=True)
    accelerate(other)
    kinds = [[isinstance(m, FusedConv) for m in n.children() if isinstance(m, nn.Conv2d)]
             for n in (folded, other)]
    assert kinds == [[False, True, True], [True, True, True]]
    x = normal(1, 32, 64, 64).contiguous(memory_format=LAST)
    with torch.no_grad():
        assert max_error(folded(x), network()(x)) < 1e-10
        assert max_error(other(x), network()(x)) < 1e-10


class _Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _ConvTranspose(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return 2 * super().forward(x, output_size)


@pytest.mark.parametrize(("conv", "swapped"), [
    (nn.Conv2d(32, 32, 3, padding=1), True), (nn.Conv2d(32, 32, 4, 2), True),
    (nn.ConvTranspose2d(32, 32, 4, 2), True), (nn.Conv2d(64, 64, 3, groups=2), True),
    (nn.Conv2d(64, 64, 3, groups=4), False), (nn.Conv2d(31, 32, 3), False),
    (nn.Conv2d(32, 31, 3), False), (nn.Conv2d(32, 32, 5), False),
    (nn.Conv2d(32, 32, 3, dilation=2), False), (nn.ConvTranspose2d(32, 32, 2, 2), False),
    (_Conv(32, 32, 3), False), (_ConvTranspose(32, 32, 4, 2), False), (nn.Linear(32, 32), False),
], ids=str)
def test_which_convs_are_swapped(conv: nn.Module, swapped: bool) -> None:
    assert (conv_change(conv, 32) is not None) == swapped


def test_a_layer_that_is_called_twice_is_swapped_once() -> None:
    shared = nn.Conv2d(32, 32, 3, padding=1)
    network = lively(nn.Sequential(shared, nn.InstanceNorm2d(32), nn.ReLU(), shared,
                                   nn.InstanceNorm2d(32))).eval()
    original, x = copy.deepcopy(network), normal(1, 32, 48, 48).contiguous(memory_format=LAST)
    accelerate(network)
    with torch.no_grad():
        assert max_error(network(x), original(x)) < 1e-10
    restore(network)
    assert type(shared) is nn.Conv2d


def test_convs_of_residual_blocks_are_swapped_too() -> None:
    network = lively(global_generator(3, 32, 1, 2)).eval()
    original, x = copy.deepcopy(network), normal(1, 3, 64, 48)
    report = accelerate(network)
    assert {row.kind for row in report.replaced} == {"conv", "norm_act"}
    # a halving, two convs in each block; the transposed one
    assert sum(isinstance(m, FusedConv) for m in network.modules()) == 5
    assert sum(isinstance(m, FusedConvTranspose) for m in network.modules()) == 1
    with torch.no_grad():
        assert "winograd_conv2d" in _ops(network, x)
        assert max_error(network(x), original(x)) < 1e-10
