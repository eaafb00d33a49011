"""accelerate() in modes, transforms and traces, differentiated twice; near-equal norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import foreign
import foreign_layers
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from foreign_cases import LABELS, NETWORKS, block_of, label_map, lively, norm_of, normal
from torch import Tensor, nn

from smis_kernels import accelerate
from smis_kernels.testing import max_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
X, PLANES = normal(2, 6, 8, 8), label_map(16)


def encoder() -> nn.Module:
    return lively(foreign_layers.label_encoder(5, 6))


def spectral_pair() -> nn.Module:
    torch.manual_seed(0)
    new = nn.utils.parametrizations.spectral_norm(nn.Conv2d(5, 4, 3))
    return nn.Sequential(new, nn.utils.spectral_norm(nn.Conv2d(4, 3, 3))).double()


@pytest.mark.parametrize("inside", [False, True], ids=["built outside", "built inside"])
@pytest.mark.parametrize("build", [encoder, spectral_pair])
def test_inference_mode_comes_first_and_gradients_after(build: Callable[[], nn.Module],
                                                        inside: bool) -> None:
    with torch.inference_mode(inside):
        network = build().eval()
        original = copy.deepcopy(network)
        accelerate(network, inference=True)
    network.requires_grad_(False), original.requires_grad_(False)
    x = normal(2, 5, 8, 8)
    with torch.inference_mode():
        expected = original(x)
        for _ in range(2):
            assert max_error(network(x), expected) < 1e-10
    if inside:
        return  # torch itself saves no inference tensor for a backward
    grads = [torch.autograd.grad(m(leaf).square().sum(), leaf)[0]
             for m in (network, original) for leaf in [x.clone().requires_grad_()]]
    assert max_error(*grads) < 1e-9


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["spade", "relu_block", "groupdnet", "ccfpse", "pix2pixhd",
                                  "style_encoder"])
def test_gradient_penalties(name: str, training: bool) -> None:
    build, inputs, _ = NETWORKS[name]
    network = build().train(training)
    original = copy.deepcopy(network)
    accelerate(network)
    found = []
    for m in (network, original):
        leaf = inputs[0].clone().requires_grad_()
        weights = list(m.parameters())
        (first,) = torch.autograd.grad((m(leaf, *inputs[1:]) * 1.5).sum(), leaf, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), weights,
                                                  materialize_grads=True)])
    scale = max(float(g.abs().max()) for g in found[1])
    assert any(bool(g.any()) for g in found[1][1:])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("build", [norm_of, lambda: block_of(foreign.Unit)])
def test_forward_mode_and_transforms_run_the_original(build: Callable[[], nn.Module]) -> None:
    module = build().eval()
    original = copy.deepcopy(module)
    report = accelerate(module)
    direction = normal(*X.shape, seed=7)
    tangents = []
    for m in (module, original):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(
                m(forward_ad.make_dual(X, direction), PLANES)).tangent)
    assert tangents[1] is not None
    assert max_error(*tangents) < 1e-12
    with torch.no_grad():
        stacked, maps = X[:, None], PLANES[:, None]
        assert max_error(torch.vmap(module)(stacked, maps), torch.vmap(original)(stacked, maps)
                         ) < 1e-12
    grads = [torch.func.grad(lambda x, m=m: m(x, PLANES).square().sum())(X)
             for m in (module, original)]
    assert max_error(*grads) < 1e-12
    assert {r for _, r in report.calls_left} == {
        "forward-mode differentiation", "a transform of torch.func (vmap, grad, jvp)"}


def test_a_trace_holds_for_other_maps_and_sizes() -> None:
    network = NETWORKS["spade"][0]().eval()
    original = copy.deepcopy(network)
    accelerate(network)
    with torch.no_grad():
        traced = torch.jit.trace(network, label_map(64), check_trace=False)
        other = label_map(64, seed=9)
        assert max_error(traced(other), original(other)) < 1e-9


def test_features_may_be_viewed_between_blocks() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (block_of(foreign.Unit), lively(
                foreign.Unit(4, 4, lambda c: foreign.LayoutNorm(c, LABELS, 8))))

        def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
            y = self.a(x, segmap)
            return self.b(y.view(len(y), -1).view(y.shape), segmap)

    module = Viewing().eval()
    expected = module(X, PLANES)
    assert len([r for r in accelerate(module).replaced if r.kind == "block"]) == 2
    assert max_error(module(X, PLANES), expected) < 1e-10


class OtherEps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            with torch.no_grad():
                n, step = x.numel() / x.shape[1], self.step().to(x.dtype)
                self.running_mean.lerp_(mean, step)
                self.running_var.lerp_(var * n / (n - 1), step)
                self.num_batches_tracked += 1
        else:
            var, mean = self.running_var, self.running_mean
        return (x - mean.view(1, -1, 1, 1)) * self.inverse(var).view(1, -1, 1, 1)

    def step(self) -> Tensor:
        return torch.tensor(self.momentum, dtype=torch.float64)

    def inverse(self, var: Tensor) -> Tensor:
        return 1 / (var.sqrt() + self.eps)


class ClampedVariance(OtherEps):
    def inverse(self, var: Tensor) -> Tensor:
        return var.clamp_min(self.eps).rsqrt()


class EpsTwice(OtherEps):
    def inverse(self, var: Tensor) -> Tensor:
        return (var + 2 * self.eps).rsqrt()


class SameAsTorch(OtherEps):
    def inverse(self, var: Tensor) -> Tensor:
        return (var + self.eps).rsqrt()


class Slightly(OtherEps):
    def inverse(self, var: Tensor) -> Tensor:
        return (var + self.eps).rsqrt() * (1 + 1e-6)


class Late(SameAsTorch):
    """Its running statistics take another way from the second step on."""

    def step(self) -> Tensor:
        return self.momentum * torch.where(self.num_batches_tracked > 0, 0.5, 1.0).double()


@pytest.mark.parametrize(("norm", "dtype"), [
    *((norm, dtype) for norm in (OtherEps, ClampedVariance, EpsTwice, Late)
      for dtype in (torch.float32, torch.float64)),
    (Slightly, torch.float64),  # of float32 it is a rounding error
])
def test_near_equal_is_not_equal(norm: type[nn.Module], dtype: torch.dtype) -> None:
    (row,) = accelerate(norm_of(norm=norm).to(dtype)).rows
    assert not row.replaced, row
    assert "differs" in row.note


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_written_out_is_replaced_and_equal(training: bool, scale: float) -> None:
    module = norm_of(norm=SameAsTorch).train(training)
    original = copy.deepcopy(module)
    assert accelerate(module).replaced
    for _ in range(2):
        assert max_error(module(scale * X, PLANES), original(scale * X, PLANES)) < 1e-9
    for a, b in zip(module.buffers(), original.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_statistics_by_the_mode_of_the_whole_are_left() -> None:
    class Whole(foreign.LayoutNorm):
        def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
            self.param_free_norm.train(self.training)
            return super().forward(x, segmap)

    module = norm_of(Whole)
    original = copy.deepcopy(module)
    accelerate(module)
    for m in (module, original):
        m.train(), m.param_free_norm.eval()
    assert max_error(module(X, PLANES), original(X, PLANES)) < 1e-10


def test_defaults_may_be_given() -> None:
    class Third(foreign.LayoutNorm):
        def forward(self, x: Tensor, segmap: Tensor, extra: Any = None) -> Tensor:
            y = super().forward(x, segmap)
            return y if extra is None else y + extra

    module = norm_of(Third).eval()
    expected = module(X, PLANES)
    report = accelerate(module)
    for call in (lambda: module(X, PLANES, None), lambda: module(X, segmap=PLANES, extra=None)):
        assert max_error(call(), expected) < 1e-10
    assert not report.calls_left
    with pytest.warns(UserWarning, match="called with other arguments"):
        assert max_error(module(X, PLANES, 1.0), expected + 1) < 1e-10


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.weight_norm,
                                  nn.utils.parametrizations.spectral_norm,
                                  nn.utils.parametrizations.weight_norm])
def test_weights_that_are_made_are_served(wrap: Any, training: bool) -> None:
    def build() -> nn.Module:
        norm = norm_of()
        for name in ("mlp_gamma", "mlp_beta"):
            torch.manual_seed(0)
            wrap(getattr(norm, name))
        return norm.train(training)

    module, original = build(), build()
    report = accelerate(module)
    assert "norm" in {r.kind for r in report.replaced}, str(report)
    for _ in range(2):
        assert max_error(module(X, PLANES), original(X, PLANES)) < 1e-9
    assert not report.calls_left
    for a, b in zip(module.buffers(), original.buffers(), strict=True):  # u and v: one iteration
        assert torch.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixel_kernels_keep_their_dtype_under_autocast(dtype: torch.dtype) -> None:
    network = foreign_layers.PixelKernels(4).eval()
    fused = copy.deepcopy(network)
    accelerate(fused)
    x, weight = normal(2, 4, 6, 6).to(dtype), normal(2, 36, 6, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x, weight), network(x, weight)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


def test_pixel_kernels_of_another_dtype_are_applied_as_before() -> None:
    network = foreign_layers.PixelKernels(4).eval()
    fused = copy.deepcopy(network)
    assert accelerate(fused).replaced
    x, weight = normal(2, 4, 6, 6).float(), normal(2, 36, 6, 6)
    y = fused(x, weight)
    assert y.dtype == torch.float64  # torch promotes
    torch.testing.assert_close(y, network(x, weight))


class StrongerKernels(foreign_layers.PixelKernels):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return 1.002 * super().forward(x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_thousandths_are_a_difference(dtype: torch.dtype) -> None:
    (row,) = accelerate(StrongerKernels(4).to(dtype)).rows
    assert not row.replaced and "differs by 2.0e-03" in row.note
