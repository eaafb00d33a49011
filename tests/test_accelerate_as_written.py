"""accelerate() does what the code does that was given: edits in place, views, patches, copies."""

from __future__ import annotations

import copy
from typing import Any

import foreign
import foreign_blocks as fb
import pytest
import torch
import torch.nn.functional as F
from foreign_cases import LABELS, label_map, lively, norm_of, normal, stirred
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from smis_kernels import accelerate, restore
from smis_kernels.acceleration.swap import Accelerated
from smis_kernels.acceleration.views import may_view
from smis_kernels.testing import max_error

pytestmark = pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
LAST = torch.channels_last
X, PLANES = normal(2, 6, 8, 8), label_map(16)


def layers(*first: nn.Module, width: int = 32) -> list[nn.Module]:
    """Three convs, which pay for channels-last features."""
    def conv() -> nn.Module:
        return nn.Conv2d(width, width, 3, padding=1)

    return [*first, conv(), nn.InstanceNorm2d(width), nn.ReLU(True), conv(),
            nn.InstanceNorm2d(width), nn.ReLU(True), conv()]


class Skipping(nn.Module):
    def __init__(self, *first: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers(*first))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("first", [
    [nn.ReLU(True)], [nn.Identity(), nn.LeakyReLU(0.2, True)], [nn.Hardtanh(inplace=True)],
    [Doubling()], []], ids=["relu", "later", "hardtanh", "own", "none"])
@pytest.mark.parametrize("exchanged", [False, True])
def test_a_sequence_edits_the_features_that_it_was_given(first: list[nn.Module],
                                                         exchanged: bool) -> None:
    start: list[nn.Module] = [nn.Identity() for _ in first] if exchanged else first
    network = lively(Skipping(*start)).eval()
    original, x = copy.deepcopy(network), normal(2, 32, 16, 16)
    assert accelerate(network).replaced
    for m in (network, original):
        for i, layer in enumerate(first):
            m.body[i] = layer
    with torch.no_grad():
        given, expected = x.clone(), x.clone()
        assert max_error(network(given), original(expected)) < 1e-10
        assert torch.equal(given, expected)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(m(leaf * 1).square().sum(), leaf)[0]
             for m, leaf in zip((network, original), leaves, strict=True)]
    assert max_error(*grads) < 1e-8


def circular(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def squared(self: Any, x: Tensor) -> Tensor:
    return x.square()


def patched(module: nn.Module, name: str) -> None:
    for m in module.modules():
        if name == "_conv_forward" and isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3):
            m._conv_forward = circular.__get__(m)
        if name == "_apply_instance_norm" and isinstance(m, nn.InstanceNorm2d):
            m._apply_instance_norm = squared.__get__(m)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["_conv_forward", "_apply_instance_norm"])
@pytest.mark.parametrize("kind", ["sequence", "norm", "block"])
def test_methods_put_on_a_layer_are_called(kind: str, name: str, before: bool) -> None:
    def build() -> nn.Module:
        if kind == "sequence":
            return lively(nn.Sequential(*layers(width=64))).eval()
        if kind == "norm":
            return norm_of(norm=nn.InstanceNorm2d).eval()
        return stirred(foreign.Unit(6, 6, lambda c: foreign.LayoutNorm(
            c, LABELS, 8, norm=nn.InstanceNorm2d))).eval()

    network, original = build(), build()
    given = (normal(1, 64, 48, 48),) if kind == "sequence" else (X, PLANES)
    original.load_state_dict(network.state_dict())
    with torch.no_grad():
        plain = original(*given)
        if before:
            patched(network, name)
        accelerate(network)
        if not before:
            assert max_error(network(*given), plain) < 1e-9
            patched(network, name)
        patched(original, name)
        assert max_error(original(*given), plain) > 1e-3
        assert max_error(network(*given), original(*given)) < 1e-9


def test_a_class_with_a_conv_forward_of_its_own_keeps_it() -> None:
    class Circular(nn.Conv2d):
        _conv_forward = circular

    network = lively(nn.Sequential(*layers())).eval()
    for m in network:
        if isinstance(m, nn.Conv2d):
            m.__class__ = Circular
    original, x = copy.deepcopy(network), normal(1, 32, 24, 24)
    accelerate(network)
    with torch.no_grad():
        assert max_error(network(x), original(x)) < 1e-10


class SmallerMaps(foreign.LayoutNorm):
    """Maps smaller than the features, or of their size, are resized by another rule."""

    at = 0

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        if segmap.shape[2] < x.shape[2] + self.at:
            segmap = F.interpolate(segmap, size=x.shape[2:], mode="bilinear") * (1 + 0.1 * self.at)
        return super().forward(x, segmap)


class EqualMaps(SmallerMaps):
    at = 1


@pytest.mark.parametrize("cls", [SmallerMaps, EqualMaps])
def test_norms_that_treat_smaller_maps_differently_are_left(cls: type[nn.Module]) -> None:
    norm = norm_of(cls).eval()
    (row,) = accelerate(norm).rows
    assert not row.replaced
    assert "differs" in row.note


class Tuned:
    gain = 1.0


class Mixed(Tuned, foreign.LayoutNorm):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) * self.gain


def test_class_attributes_of_plain_mixins_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = norm_of(Mixed).eval()
    original = copy.deepcopy(module)
    assert accelerate(module).replaced
    assert max_error(module(X, PLANES), original(X, PLANES)) < 1e-10
    monkeypatch.setattr(Tuned, "gain", 3.0)
    assert max_error(module(X, PLANES), original(X, PLANES)) < 1e-10


class Scaled(foreign.LayoutNorm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.amount = 1.0

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) * self.amount


def test_a_shallow_copy_has_attributes_of_its_own() -> None:
    module = norm_of(Scaled).eval()
    original = copy.deepcopy(module)
    report = accelerate(module)
    module(X, PLANES)
    twin = copy.copy(module)
    assert isinstance(twin, Accelerated)
    twin.amount = 3.0
    assert max_error(twin(X, PLANES), 3 * original(X, PLANES)) < 1e-10
    assert set(report.calls_left) == {("", "it is a shallow copy of an accelerated one")}
    assert max_error(module(X, PLANES), original(X, PLANES)) < 1e-10
    replica = module._replicate_for_data_parallel()  # made anew for each call
    replica._modules, replica._parameters = dict(module._modules), dict(module._parameters)
    before = dict(report.calls_left)
    replica(X, PLANES)
    assert report.calls_left == before


def test_a_buffer_that_is_read_as_a_list_is_no_constant() -> None:
    class Listed(foreign.LayoutNorm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.register_buffer("gain", torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
            return super().forward(x, segmap) * self.gain.tolist()[1]

    module = norm_of(Listed).eval()
    (row,) = accelerate(module).rows
    assert not row.replaced
    assert "it asks for values (tolist)" in row.note


class Editing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = norm_of()

    def forward(self, x: Tensor, segmap: Tensor) -> tuple[Tensor, Tensor]:
        x.relu_()
        return self.norm(x, segmap), x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_edits_and_returns_its_own_input(mode: Any) -> None:
    network = Editing().eval()
    original = copy.deepcopy(network)
    accelerate(network)
    with mode():
        x, y, planes = X.clone(), X.clone(), PLANES.clone()
        out, same = network(x, planes)
        assert max_error(out, original(y, planes)[0]) < 1e-10
        assert same is x
        assert torch.equal(x, y)


@pytest.mark.parametrize("layer", [nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(
    32, 32, 4, 2, 1)], ids=["conv", "transposed"])
def test_one_image_without_a_batch_and_vmap(layer: nn.Module) -> None:
    network = lively(nn.Sequential(copy.deepcopy(layer), nn.InstanceNorm2d(32), nn.ReLU())).eval()
    original, x = copy.deepcopy(network), normal(3, 32, 12, 12)
    assert {row.kind for row in accelerate(network).replaced} == {"conv", "norm_act"}
    with torch.no_grad():
        assert max_error(network(x[0]), original(x[0])) < 1e-10
        for stacked in (x, x[:, None]):
            assert max_error(torch.vmap(network)(stacked), torch.vmap(original)(stacked)) < 1e-10


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("then", ["restore", "again", "deepcopy", "remove"])
@pytest.mark.parametrize("first", ["parametrized", "accelerated"])
def test_parametrizations_come_and_go_around_accelerate(first: str, then: str, wrap: Any) -> None:
    network = lively(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.InstanceNorm2d(32),
                                   nn.ReLU())).eval()
    conv, x = network[0], normal(1, 32, 16, 16).contiguous(memory_format=LAST)
    if first == "parametrized":
        wrap(conv)
    before = type(conv)
    accelerate(network)
    if first == "accelerated":
        wrap(conv)
    conv.eval()
    assert isinstance(conv, Accelerated)
    assert parametrize.is_parametrized(conv, "weight")
    with torch.no_grad():
        expected = F.relu(F.instance_norm(F.conv2d(x, conv.weight, conv.bias, padding=1)))
        assert max_error(network(x), expected) < 1e-10
        if then == "deepcopy":
            twin = copy.deepcopy(network)
            restore(network)
            assert isinstance(twin[0], Accelerated)
            assert max_error(twin(x), expected) < 1e-10
        elif then == "again":
            accelerate(network)
            assert isinstance(conv, Accelerated)
        elif then == "remove":
            parametrize.remove_parametrizations(conv, "weight")
            assert isinstance(conv, Accelerated)
        assert max_error(network(x), expected) < 1e-10
        restore(network)
        assert max_error(network(x), expected) < 1e-10
    if then == "remove":
        assert type(conv) is nn.Conv2d
    else:
        assert not isinstance(conv, Accelerated)
        assert first == "accelerated" or type(conv) is before
        parametrize.remove_parametrizations(conv, "weight")
        assert type(conv) is nn.Conv2d


def flat(x: Tensor) -> Tensor:
    return x.view(len(x), -1)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


class FlatByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return flat(x)


class Calm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@pytest.mark.parametrize("last", [Flat, FlatByFunction])
def test_layers_that_view_their_input_get_planes(last: type[nn.Module]) -> None:
    network = lively(nn.Sequential(*layers(), nn.InstanceNorm2d(32), nn.ReLU(), last())).eval()
    original, x = copy.deepcopy(network), normal(2, 32, 16, 16)
    accelerate(network)
    assert max_error(network(x), original(x)) < 1e-10
    assert may_view(last())
    assert not may_view(Calm())
    assert not may_view(nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("kind", ["sequence", "block"])
def test_features_that_hooks_keep_can_be_viewed(kind: str) -> None:
    network = lively(nn.Sequential(*layers())) if kind == "sequence" else stirred(
        foreign.Unit(6, 4, lambda c: foreign.LayoutNorm(c, LABELS, 8)))
    given = (normal(2, 32, 16, 16),) if kind == "sequence" else (X, PLANES)
    network = network.eval()
    original = copy.deepcopy(network)
    accelerate(network)
    seen: list[Tensor] = []
    for m in (network, original):
        for part in m.children():  # no hooks in the norms of a block, which then run as written
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    with torch.no_grad():
        assert max_error(network(*given), original(*given)) < 1e-9
    half = len(seen) // 2
    assert half > 0
    for a, b in zip(seen[:half], seen[half:], strict=True):
        assert a.view(-1).shape == b.view(-1).shape
        assert max_error(a, b) < 1e-9


class ConvFirst(nn.Module):
    """A block that ends in a norm and its activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_0, self.c_1 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.n_0, self.n_1 = fb.Norm(width, LABELS), fb.Norm(width, LABELS)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        x = F.leaky_relu(self.n_0(self.c_0(x), segmap), 0.2)
        return F.leaky_relu(self.n_1(self.c_1(x), segmap), 0.2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("ends", ["block", "sequence"])
def test_the_caller_may_write_to_an_activated_result(ends: str, memory_format: Any) -> None:
    module = stirred(ConvFirst(6)) if ends == "block" else lively(nn.Sequential(
        nn.Conv2d(6, 6, 3), nn.InstanceNorm2d(6), nn.LeakyReLU(0.2)))
    original = copy.deepcopy(module)
    kinds = {row.kind for row in accelerate(module).replaced}
    assert ("block" if ends == "block" else "norm_act") in kinds
    found = []
    for m in (module, original):
        x = X.contiguous(memory_format=memory_format).requires_grad_()
        y = m(x, PLANES) if ends == "block" else m(x)
        y += 1
        found.append(torch.autograd.grad(y.square().sum(), [x, *m.parameters()]))
        x.requires_grad_(False)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_another_default_device_does_not_keep_modules_from_being_known() -> None:
    """meta stands for a GPU: what is drawn there cannot come from a generator of the CPU."""
    modules = [norm_of(), lively(nn.Sequential(*layers())), foreign.Unit(6, 6, lambda c: (
        foreign.LayoutNorm(c, LABELS, 8)))]
    for module in modules:
        expected = [(row.kind, row.replaced) for row in accelerate(module).rows]
        restore(module)
        with torch.device("meta"):
            report = accelerate(module)
        assert [(row.kind, row.replaced) for row in report.rows] == expected
