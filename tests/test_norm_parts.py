"""A norm's parts obey what was done to them: frozen, cumulative statistics, hooks on convs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune, weight_norm

from smis_kernels import SPADE, CGNorm, ConditionalNorm2d, LabelLayout, MultiSPADE, modulation
from smis_kernels import spectral_norm as own_spectral_norm
from smis_kernels.modules.spade import modulate_pair
from smis_kernels.ops.modulation.reference import modulation as definition
from smis_kernels.ops.winograd_conv.grouped import FORMS, conv_in_form
from smis_kernels.runtime.backend import triton_interpreted
from smis_kernels.runtime.check import valueless

C, K = 6, 4
Made = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def labels(n: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(1)
    coarse = torch.randint(K, (n, 4, 4), generator=random)
    return coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)


def planes(n: int = 2) -> Tensor:
    return F.one_hot(labels(n), K).movedim(-1, 1).double()


def features(seed: int = 0) -> Tensor:
    return torch.randn(2, C, 8, 8, generator=torch.Generator().manual_seed(seed)).double() + 2


MODULES: dict[str, Made] = {
    "SPADE": lambda: (SPADE(C, K, 8), (planes(),)),
    "SPADE on a layout": lambda: (SPADE(C, K, 8), (LabelLayout.from_labels(labels(), K),)),
    "SPADE, synchronised": lambda: (SPADE(C, K, 8, norm="syncbatch"), (planes(),)),
    "CGNorm": lambda: (CGNorm(C, K, 8, groups=2), (planes(),)),
    "MultiSPADE": lambda: (MultiSPADE(C, [(K, 8), (K, 0)]), (planes(), planes())),
    "ConditionalNorm2d": lambda: (ConditionalNorm2d(C, K), (torch.tensor([1, 3]),)),
}


def made(name: str) -> tuple[Any, tuple[Any, ...]]:
    torch.manual_seed(0)
    module, conditions = MODULES[name]()
    norm: Any = module.param_free_norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return module.double(), conditions


def affine(module: Any, conditions: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """1 + gamma and beta, read off outputs in eval, where they are all that varies."""
    mode = module.training
    module.eval()
    norm = module.param_free_norm
    zero, one = (v.view(1, -1, 1, 1).expand(2, -1, 8, 8) for v in (
        norm.running_mean, norm.running_mean + (norm.running_var + norm.eps).sqrt()))
    with torch.no_grad():
        beta = module(zero.clone(), *conditions)
        gamma = module(one.clone(), *conditions) - beta
    module.train(mode)
    return gamma, beta


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_norm_keeps_its_own_mode_and_momentum(backend: str, name: str, frozen: bool,
                                                      momentum: float | None) -> None:
    module, conditions = made(name)
    for part in (module, *getattr(module, "spades", ())):
        part.backend = backend
    gamma, beta = affine(module, conditions)
    twin = nn.BatchNorm2d(C, affine=False, momentum=momentum).double()
    twin.load_state_dict(module.param_free_norm.state_dict())
    module.param_free_norm.momentum = momentum
    module.train()
    module.param_free_norm.train(not frozen)
    twin.train(not frozen)
    for step in range(3):
        x = features(step).requires_grad_()
        x_twin = x.detach().clone().requires_grad_()
        y, expected = module(x, *conditions), twin(x_twin) * gamma + beta
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, x_twin.grad)
        torch.testing.assert_close(module.param_free_norm.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", MODULES)
def test_statistics_that_are_not_tracked_stay(name: str) -> None:
    module, conditions = made(name)
    gamma, beta = affine(module, conditions)
    twin = nn.BatchNorm2d(C, affine=False).double()
    twin.load_state_dict(module.param_free_norm.state_dict())
    for training in (True, False):
        for norm in (module.param_free_norm, twin):
            norm.track_running_stats = False
        module.train(training)
        twin.train(training)
        torch.testing.assert_close(module(features(), *conditions),
                                   twin(features()) * gamma + beta)
        torch.testing.assert_close(module.param_free_norm.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", MODULES)
def test_a_norm_with_weights_of_its_own_is_refused(name: str) -> None:
    module, conditions = made(name)
    for norm in (nn.BatchNorm2d(C).double(), nn.InstanceNorm2d(C, affine=True).double()):
        module.param_free_norm = norm
        with pytest.raises(ValueError, match=r"param_free_norm: .* give affine=False$"):
            module(features(), *conditions)


def test_a_pair_of_which_one_tracks_its_statistics() -> None:
    pairs = [[made("SPADE")[0].train() for _ in "ab"] for _ in "ab"]
    for _, second in pairs:
        second.param_free_norm.track_running_stats = False
    (norm_0, norm_s), (twin_0, twin_s) = pairs
    y, y_s = modulate_pair(norm_0, norm_s, features(), planes())
    torch.testing.assert_close(y, twin_0(features(), planes(), activation="leaky_relu"))
    torch.testing.assert_close(y_s, twin_s(features(), planes()))
    torch.testing.assert_close(norm_0.state_dict(), twin_0.state_dict())


def test_a_pair_of_which_one_is_frozen() -> None:
    pairs = [[made("SPADE")[0] for _ in "ab"] for _ in "ab"]
    x, seg = features(), planes()
    for first, second in pairs:
        first.train()
        second.train()
        second.param_free_norm.eval()
    (norm_0, norm_s), (twin_0, twin_s) = pairs
    y, y_s = modulate_pair(norm_0, norm_s, x, seg, upsample=True)
    torch.testing.assert_close(y, twin_0(x, seg, activation="leaky_relu", upsample=True))
    torch.testing.assert_close(y_s, twin_s(x, seg, upsample=True))
    torch.testing.assert_close(norm_0.state_dict(), twin_0.state_dict())
    torch.testing.assert_close(norm_s.state_dict(), twin_s.state_dict())
    assert int(norm_s.param_free_norm.num_batches_tracked) == 0


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


WRAPS: dict[str, Callable[[nn.Module], object]] = {
    "spectral_norm": nn.utils.spectral_norm,
    "our spectral_norm": own_spectral_norm,
    "weight_norm": weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", _Doubled()),
    "forward hook": lambda layer: layer.register_forward_hook(lambda _, __, out: 3 * out),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, given: (-given[0],)),
}


def _subclass(layer: nn.Module) -> None:
    class Doubled(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.__class__ = Doubled


def _own_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: type(layer).forward(layer, -x)  # type: ignore[method-assign]


WRAPS |= {"a forward of its own": _own_forward, "a subclass": _subclass,
          "no bias": lambda layer: layer.register_parameter("bias", None)}
CONVS: dict[str, Callable[[Any], object]] = {
    "padded by reflection": lambda layer: setattr(layer, "padding_mode", "reflect"),
    "dilated": lambda layer: vars(layer).update(dilation=(2, 2), padding=(2, 2)),
    "dilated, padded to the same": lambda layer: vars(layer).update(dilation=(2, 2),
                                                                    padding="same"),
}
PARTS = {"SPADE": ("mlp_gamma", "mlp_beta", "mlp_shared.0"),
         "SPADE on a layout": ("mlp_gamma", "mlp_beta", "mlp_shared.0"),
         "CGNorm": ("mlp_gamma", "mlp_shared.0"),
         "ConditionalNorm2d": ("mlp_gamma", "mlp_beta")}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("name", "part", "wrap"), [
    (n, p, w) for n, parts in PARTS.items() for p in parts
    for w in (*WRAPS, *(() if n == "ConditionalNorm2d" else CONVS))])
def test_what_convs_do_beside_their_weights_is_done(name: str, part: str, wrap: str) -> None:
    module, conditions = made(name)
    module.eval()
    module(features(), *conditions)  # a choice is kept of a layout whose norm had no hooks
    {**WRAPS, **CONVS}[wrap](module.get_submodule(part))
    with torch.no_grad():
        for own in module.get_submodule(part).parameters():
            own.mul_(1.5).add_(0.01)
    plain = {"SPADE on a layout": (planes(),),
             "ConditionalNorm2d": (F.one_hot(torch.tensor([1, 3]), K).double(),)}

    def run(backend: str) -> list[Tensor]:
        module.backend = backend
        given = plain.get(name, conditions) if backend == "reference" else conditions
        y = module(features(), *given)
        module.zero_grad()
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    found, expected = run("auto"), run("reference")
    assert len(found) == len(expected) == len([*module.parameters()]) + 1
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


class _NegatedConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return -super()._conv_forward(input, weight, bias)


def _wrap_gamma(norm: Any) -> None:
    norm.mlp_gamma = nn.Sequential(norm.mlp_gamma, nn.Tanh())


EXCHANGES: dict[str, Callable[[Any], object]] = {
    "gamma wrapped": _wrap_gamma,
    "another activation": lambda norm: norm.mlp_shared.__setitem__(1, nn.LeakyReLU(0.3)),
    "one layer more": lambda norm: norm.mlp_shared.append(nn.Tanh()),
    "activation with a hook": lambda norm: norm.mlp_shared[1].register_forward_hook(
        lambda _, __, out: 3 * out),
    "both with a hook": lambda norm: norm.mlp_shared.register_forward_hook(
        lambda _, __, out: 3 * out),
    "beta of another size": lambda norm: setattr(
        norm, "mlp_beta", nn.Conv2d(8, C, 5, padding=2).double()),
    "another conv": lambda norm: setattr(norm.mlp_beta, "__class__", _NegatedConv),
}


@pytest.mark.parametrize(("name", "exchange"), [
    ("ConditionalNorm2d", "gamma wrapped"), ("CGNorm", "gamma wrapped"),
    *((name, e) for name in ("SPADE", "SPADE on a layout") for e in EXCHANGES)])
def test_parts_may_be_other_modules(name: str, exchange: str) -> None:
    module, conditions = made(name)
    module(features(), *conditions)
    EXCHANGES[exchange](module)
    found = []
    for backend in ("auto", "reference"):
        module.backend = backend
        given = (planes(),) if backend == "reference" and name.endswith("layout") else conditions
        found.append(module.eval()(features(), *given))
    torch.testing.assert_close(*found)


def test_a_class_that_there_is_not_is_refused_under_hooks() -> None:
    module, _ = made("ConditionalNorm2d")
    module.mlp_gamma.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"condition: expected labels 0\.\.3, got 4"):
        module(features(), torch.tensor([1, 4]))


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_upsampled_pixel_has_statistics(norm: str, backend: str) -> None:
    x, gamma, beta = (torch.randn(1, C, s, s).double() for s in (1, 2, 2))
    runnings = [[torch.zeros(C).double(), torch.ones(C).double()] for _ in "ab"]
    mean, var = runnings[0] if norm == "batch" else (None, None)
    y = modulation(x, gamma, beta, norm=norm, training=True, upsample=True, backend=backend,
                   running_mean=mean, running_var=var)
    mean_2, var_2 = runnings[1] if norm == "batch" else (None, None)
    expected = definition(F.interpolate(x, scale_factor=2, mode="nearest"), gamma, beta, norm=norm,
                          training=True, running_mean=mean_2, running_var=var_2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(runnings[0], runnings[1])


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=[
    pytest.mark.triton, pytest.mark.skipif(not triton_interpreted(), reason="interpreter")])])
@pytest.mark.parametrize("grad", [False, True])
def test_running_statistics_may_be_slices(backend: str, grad: bool) -> None:
    x, gamma, beta = (torch.randn(2, C, 4, 4) for _ in range(3))
    both = torch.stack([torch.randn(C), torch.rand(C) + 1], 1)
    mean, var = both[:, 0].requires_grad_(grad), both[:, 1]
    y = modulation(x, gamma, beta, running_mean=mean, running_var=var, backend=backend)
    expected = definition(x, gamma, beta, running_mean=mean.detach().contiguous(),
                          running_var=var.contiguous())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_fake_tensors_are_not_looked_at() -> None:
    module = ConditionalNorm2d(C, K)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(2, C, 4, 4))
        classes = mode.from_tensor(torch.tensor([1, 3]))
        assert module(x, classes).shape == x.shape
    assert valueless(classes)  # outside of the mode too
    assert not valueless(torch.tensor([1]))


@pytest.mark.parametrize("form", FORMS)
def test_a_conv_under_autocast_has_its_dtype(form: str) -> None:
    x, weight, bias = torch.randn(1, 8, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_in_form(form, x, weight, bias, 1, 2)
        expected = F.conv2d(x, weight, bias, padding=1, groups=2)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=5e-2)
