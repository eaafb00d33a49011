"""Parts of a norm that do more, or other, than their weights tell are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils import parametrizations

from smis_kernels import (
    SPADE,
    ConditionalNorm2d,
    LabelLayout,
    MultiSPADE,
    WinogradConv2d,
    modulation,
    norm_act,
    use_path,
    winograd_conv2d,
)
from smis_kernels.modules.spade import modulate_pair
from smis_kernels.testing import max_error

CHANNELS, CLASSES, SIZE = 16, 4, 64


def circular(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The usual patch for pictures whose borders meet."""
    wrapped = F.pad(input, (1, 1, 1, 1), mode="circular")
    return F.conv2d(wrapped, weight, bias, self.stride, 0, self.dilation, self.groups)


class Circular(nn.Conv2d):
    _conv_forward = circular


class WinogradCircular(WinogradConv2d):
    _conv_forward = circular


class Doubled(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = 2 * super().forward(input)
        return found


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def doubles(module: Any, *given: Any) -> Any:
    return 2 * given[-1] if isinstance(given[-1], Tensor) else (2 * given[-1][0],)


def _patch(norm: Any, name: str) -> None:
    conv = norm.get_submodule(name)
    conv._conv_forward = circular.__get__(conv)


def _subclass(norm: Any) -> None:
    norm.mlp_beta.__class__ = Circular


def _shared(norm: Any) -> None:
    norm.mlp_shared = Doubled(*norm.mlp_shared)


def _shared_forward(norm: Any) -> None:
    shared = norm.mlp_shared
    shared.forward = lambda t: 2 * nn.Sequential.forward(shared, t)


def _free(norm: Any, made: nn.Module) -> None:
    norm.param_free_norm = made.double().train(norm.training)


PARTS: dict[str, Callable[[Any], object]] = {
    "conv patched": lambda n: _patch(n, "mlp_gamma"),
    "first conv patched": lambda n: _patch(n, "mlp_shared.0"),
    "conv subclassed": _subclass,
    "activation's forward": lambda n: setattr(n.mlp_shared[1], "forward", torch.tanh),
    "sequence's forward": _shared_forward,
    "sequence subclassed": _shared,
}
NORMS: dict[str, Callable[[Any], object]] = {
    "hook": lambda n: n.param_free_norm.register_forward_hook(doubles),
    "pre-hook": lambda n: n.param_free_norm.register_forward_pre_hook(doubles),
    "subclassed": lambda n: _free(n, Shifted(CHANNELS, affine=False)),
    "group": lambda n: _free(n, nn.GroupNorm(4, CHANNELS, affine=False)),
    "instance's running statistics": lambda n: _free(
        n, nn.InstanceNorm2d(CHANNELS, track_running_stats=True)),
}


def expected(norm: SPADE, x: Tensor, planes: Tensor) -> Tensor:
    hidden = norm.mlp_shared(planes)
    return norm.param_free_norm(x) * (1 + norm.mlp_gamma(hidden)) + norm.mlp_beta(hidden)


def inputs() -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (2, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    planes = F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).double()
    return torch.randn(2, CHANNELS, SIZE, SIZE).double(), planes


def spade(change: Callable[[Any], object], training: bool = False) -> SPADE:
    norm = SPADE(CHANNELS, CLASSES, 32).double().train(training)
    change(norm)
    return norm


def copied(norm: SPADE) -> Iterator[Tensor]:
    return (b.clone() for b in norm.buffers())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "path"), [
    *((name, path) for name in PARTS for path in ("auto", "dense")),
    *((name, path) for name in NORMS for path in ("one_level", "two_level", "dense"))])
def test_a_norm_calls_its_parts(name: str, path: Any, training: bool) -> None:
    norm = spade({**PARTS, **NORMS}[name], training)
    x, planes = inputs()
    before = [*copied(norm)]
    truth, moved = expected(norm, x, planes), [*copied(norm)]
    for buffer, value in zip(norm.buffers(), before, strict=True):
        buffer.copy_(value)
    with use_path(path):
        found = norm(x, planes)
    assert max_error(found, truth) < 1e-12
    for buffer, value in zip(norm.buffers(), moved, strict=True):
        assert torch.allclose(buffer, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [*PARTS, *NORMS])
def test_a_pair_calls_its_parts(name: str) -> None:
    changed, plain = spade({**PARTS, **NORMS}[name]), spade(lambda n: None)
    x, planes = inputs()
    layout: Any = LabelLayout.from_tensor(F.interpolate(planes, scale_factor=2, mode="nearest"))
    wide, large = F.interpolate(x, scale_factor=2, mode="nearest"), layout.dense((128, 128))
    for norms in ((changed, plain), (plain, changed)):
        pair = modulate_pair(*norms, x, layout, activation=None, upsample=True)
        for norm, found in zip(norms, pair, strict=True):
            assert max_error(found, expected(norm, wide, large.double())) < 1e-12


@contextmanager
def everywhere(register: Callable[[Any], Any]) -> Iterator[None]:
    handle = register(lambda module, *given: doubles(module, *given) if isinstance(
        module, (nn.Conv2d, nn.BatchNorm2d)) else None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("register", [register_module_forward_hook,
                                      register_module_forward_pre_hook])
def test_hooks_of_all_modules_run(register: Callable[[Any], Any]) -> None:
    norm = spade(lambda n: None)
    x, planes = inputs()
    with everywhere(register):
        truth = expected(norm, x, planes)
        assert max_error(norm(x, planes), truth) < 1e-12
    assert max_error(norm(x, planes), truth) > 0.1


@pytest.mark.parametrize("name", NORMS)
def test_other_modules_call_their_norm(name: str) -> None:
    x, planes = inputs()
    several: Any = MultiSPADE(CHANNELS, [(CLASSES, 32)]).double().eval()
    one = spade(NORMS[name])
    NORMS[name](several)
    several.spades[0].load_state_dict(
        {k: v for k, v in one.state_dict().items() if k.startswith("mlp")})
    several.param_free_norm.load_state_dict(one.param_free_norm.state_dict())
    assert max_error(several(x, planes), expected(one, x, planes)) < 1e-12
    condition = ConditionalNorm2d(CHANNELS, CLASSES).double().eval()
    NORMS[name](condition)
    vectors = torch.rand(2, CLASSES).double()
    gamma, beta = (layer(vectors)[:, :, None, None]
                   for layer in (condition.mlp_gamma, condition.mlp_beta))
    truth = condition.param_free_norm(x) * (1 + gamma) + beta
    assert max_error(condition(x, vectors), truth) < 1e-12


@pytest.mark.parametrize("kind", ["patched", "subclassed"])
@pytest.mark.parametrize("channels", [64, 3])
def test_a_winograd_conv_calls_what_torchs_conv_calls(kind: str, channels: int) -> None:
    made = WinogradConv2d if kind == "patched" else WinogradCircular
    conv: Any = made(64, channels, 3, padding=1).double().eval()
    if kind == "patched":
        conv._conv_forward = circular.__get__(conv)
    x = torch.randn(1, 64, 48, 48).double()
    assert max_error(conv(x), circular(conv, x, conv.weight, conv.bias)) < 1e-12


@pytest.mark.parametrize("path", ["auto", "one_level", "two_level", "dense"])
@pytest.mark.parametrize("part", ["mlp_shared.0", "mlp_gamma", "mlp_beta"])
def test_a_parametrized_weight_is_made_once(part: str, path: Any) -> None:
    """Under spectral norm each reading is a power step."""
    norms = []
    for _ in range(2):
        torch.manual_seed(0)
        norm = spade(lambda n: None, training=True)
        parametrizations.spectral_norm(norm.get_submodule(part))
        norms.append(norm)
    x, planes = inputs()
    for _ in range(2):  # power steps go on from the last ones
        truth = expected(norms[0], x, planes)
        with use_path(path):
            assert max_error(norms[1](x, planes), truth) < 1e-12
    for a, b in zip(*(norm.get_submodule(part).buffers() for norm in norms), strict=True):
        assert max_error(a, b) < 1e-12


@pytest.mark.parametrize("several", [False, True])
def test_norms_together_make_a_parametrized_weight_once(several: bool) -> None:
    torch.manual_seed(0)
    one = spade(lambda n: None, training=True)
    x, planes = inputs()
    conv: Any = one.mlp_gamma
    parametrizations.spectral_norm(conv)
    made: list[int] = []
    conv.parametrizations.weight[0].register_forward_hook(lambda *_: made.append(1))
    if several:
        both = MultiSPADE(CHANNELS, [(CLASSES, 32)]).double()
        both.spades[0] = one
        one.param_free_norm = nn.Identity()
        both(x, planes)
    else:
        modulate_pair(one, spade(lambda n: None, training=True), x, planes)
    assert len(made) == 1


X: Any = torch.randn(1, 8, 8, 8)
MAP, ZERO = torch.rand(1, 4, 16, 16), torch.zeros(1, 8, 8, 8)
ONE: Any = [1]
NONE: Any = None
HALF: Any = 2.0
FLOAT: Any = 1.0
WORD: Any = "a"
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "features of three dimensions": (
        lambda: SPADE(8, 4)(X[0], MAP), r"input: expected \(N, C, H, W\)"),
    "numpy features": (lambda: SPADE(8, 4)(X.numpy(), MAP), "input: expected a tensor"),
    "numpy features of several": (
        lambda: MultiSPADE(8, [(4, 8)])(X.numpy(), MAP), "input: expected a tensor"),
    "a list of classes": (
        lambda: ConditionalNorm2d(8, 4)(X, ONE), "condition: expected a tensor"),
    "groups below zero": (
        lambda: modulation(X, ZERO, ZERO, norm="group", num_groups=-4), "num_groups: .* got -4"),
    "half a group": (lambda: modulation(X, ZERO, ZERO, norm="group", num_groups=HALF),
                     "num_groups: .* got 2.0"),
    "lists of statistics": (
        lambda: modulation(X, ZERO, ZERO, running_mean=ONE, running_var=ONE),
        "running_mean: expected a tensor"),
    "no eps": (lambda: modulation(X, ZERO, ZERO, norm="instance", eps=NONE), "eps: .* got None"),
    "no momentum": (lambda: modulation(X, ZERO, ZERO, training=True, momentum=NONE),
                    "momentum: expected a number, got None"),
    "a slope in words": (lambda: norm_act(X, activation="leaky_relu", negative_slope=WORD),
                         "negative_slope: .* got a"),
    "a conv's groups": (lambda: winograd_conv2d(X, torch.randn(8, 8, 3, 3), groups=FLOAT),
                        "groups: .* got 1.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_named(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()
