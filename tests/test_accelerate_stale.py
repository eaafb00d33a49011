"""accelerate() and Synthesizer: whatever the result depends on may change afterwards."""

from __future__ import annotations

import copy
import io
import pickle
import types
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import foreign
import foreign_layers
import numpy as np
import pytest
import torch
from foreign_cases import LABELS, block_of, label_map, lively, norm_of, normal, small_painter
from torch import Tensor, nn

from smis_kernels import accelerate, restore
from smis_kernels.testing import max_error
from smis_models import create_model
from smis_models.synthesis.synthesizer import Synthesizer

pytestmark = pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
X, PLANES = normal(2, 6, 8, 8), label_map(16)


def times(x: Tensor, by: float) -> Tensor:
    return x * by


class Slotted:
    """A plain object without a dict, which can be called."""

    __slots__ = ("by",)

    def __init__(self) -> None:
        self.by = 1.0

    def times(self, x: Tensor) -> Tensor:
        return x * self.by

    __call__ = times


class Adjustable(foreign.LayoutNorm):
    """What its forward reads: numbers, a container, an object, a part, a method."""

    strength = 1.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain, self.gains = 1.0, [1.0, {"inner": 1.0}]
        self.options = types.SimpleNamespace(gain=1.0)
        self.last = nn.Identity()
        self.plain = torch.ones((), dtype=torch.float64)
        self.array, self.choices = np.ones(2), {1.0}
        self.unregistered = [nn.Dropout(1.0)]
        self.slotted, self.called, self.bound = Slotted(), Slotted(), Slotted().times
        self.turns, self.portion = deque([1.0]), partial(times, by=1.0)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        y = super().forward(x, segmap) * self.gain * self.gains[0] * self.gains[1]["inner"]
        y = self.portion(self.bound(self.called(y))) * self.slotted.by * self.turns[0]
        y = y * float(self.array[1]) * max(self.choices) * self.unregistered[0].p
        return self.last(y * self.options.gain * self.strength * self.plain)


class ActiveUnit(foreign.Unit):
    """A block whose activation is a module."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.activation = nn.LeakyReLU(0.2)

    def active(self, x: Tensor) -> Tensor:
        return self.activation(x)


def adjustable() -> nn.Module:
    return norm_of(Adjustable)


def active_unit() -> nn.Module:
    return block_of(ActiveUnit)


def plain_norm() -> nn.Module:
    return norm_of()


def plain_unit() -> nn.Module:
    return block_of(foreign.Unit)


def doubled(*_: Any) -> Any:
    return 2 * _[-1]


def put(name: str, value: Any) -> Callable[[nn.Module], Any]:
    return lambda m: setattr(m, name, value)


def patch_class(m: nn.Module) -> None:
    """A class of its own first, so that no other test sees it."""
    original = Adjustable.blend
    cls: Any = next(c for c in type(m).__mro__ if c.__name__ == "Adjustable")
    cls.blend = lambda self, x, gamma, beta: original(self, x, gamma, beta) + 1


# What is built, and what is done to it after accelerate().
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "attribute": (adjustable, put("gain", 3.0)),
    "list": (adjustable, lambda m: m.gains.__setitem__(0, 3.0)),
    "dict": (adjustable, lambda m: m.gains[1].update(inner=3.0)),
    "object": (adjustable, lambda m: setattr(m.options, "gain", 3.0)),
    "tensor": (adjustable, lambda m: m.plain.data.fill_(3.0)),
    "array": (adjustable, lambda m: m.array.__setitem__(1, 3.0)),
    "array_dtype": (adjustable, lambda m: setattr(m, "array", m.array.view(">f8"))),
    "slots": (adjustable, lambda m: setattr(m.slotted, "by", 3.0)),
    "callable_object": (adjustable, lambda m: setattr(m.called, "by", 3.0)),
    "object_of_a_bound_method": (adjustable, lambda m: setattr(m.bound.__self__, "by", 3.0)),
    "keywords_of_a_partial": (adjustable, lambda m: m.portion.keywords.update(by=3.0)),
    "deque": (adjustable, lambda m: m.turns.__setitem__(0, 3.0)),
    "set": (adjustable, lambda m: (m.choices.clear(), m.choices.add(3.0))),
    "module_in_a_list": (adjustable, lambda m: setattr(m.unregistered[0], "p", 0.5)),
    "part": (adjustable, put("last", nn.Tanh())),
    "instance_shadows_class": (adjustable, put("strength", 3.0)),
    "child_forward": (adjustable, lambda m: setattr(m.last, "forward", torch.tanh)),
    "forward": (adjustable, lambda m: setattr(m, "forward", lambda x, s: x)),
    "child_hook": (adjustable, lambda m: m.last.register_forward_hook(doubled)),
    "child_pre_hook": (adjustable, lambda m: m.last.register_forward_pre_hook(
        lambda _, args: (2 * args[0],))),
    "conv_hook": (plain_norm, lambda m: m.mlp_gamma.register_forward_hook(doubled)),
    "eps": (plain_norm, lambda m: setattr(m.param_free_norm, "eps", 1.0)),
    "norm_replaced": (plain_norm, put("param_free_norm", nn.InstanceNorm2d(6))),
    "padding_mode": (plain_norm, lambda m: setattr(m.mlp_gamma, "padding_mode", "circular")),
    "dilation": (plain_norm, lambda m: (setattr(m.mlp_beta, "dilation", (2, 2)),
                                        setattr(m.mlp_beta, "padding", (2, 2)))),
    "no_bias": (plain_norm, lambda m: m.mlp_gamma.register_parameter("bias", None)),
    "slope": (active_unit, lambda m: setattr(m.activation, "negative_slope", 0.9)),
    "activation": (active_unit, put("activation", nn.ReLU())),
    "activation_hook": (active_unit, lambda m: m.activation.register_forward_hook(doubled)),
    "activation_forward": (active_unit, lambda m: setattr(m.activation, "forward", torch.tanh)),
    "conv_1_pre_hook": (plain_unit, lambda m: m.conv_1.register_forward_pre_hook(
        lambda _, args: (2 * args[0],))),
    "conv_1_hook": (plain_unit, lambda m: m.conv_1.register_forward_hook(doubled)),
    "conv_1_forward": (plain_unit, lambda m: setattr(m.conv_1, "forward", lambda x: x.mean(
        1, keepdim=True).expand(-1, 4, -1, -1))),
    "conv_0_pre_hook": (plain_unit, lambda m: m.conv_0.register_forward_pre_hook(
        lambda _, args: (2 * args[0],))),
    "norm_hook": (plain_unit, lambda m: m.norm_1.register_forward_hook(doubled)),
    "norm_forward": (plain_unit, lambda m: setattr(m.norm_1, "forward", lambda x, s: x)),
    "norm_eps": (plain_unit, lambda m: setattr(m.norm_0.param_free_norm, "eps", 1.0)),
    "learned": (plain_unit, put("learned", False)),
    "method": (plain_unit, put("active", torch.tanh)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("twin", ["itself", "deepcopy", "changed, then deepcopy"])
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changes_after_accelerate_are_seen(name: str, twin: str, training: bool) -> None:
    build, change = CHANGES[name]
    module, original = build().train(training), build().train(training)
    if name == "learned":  # the shortcut is x itself then
        module, original = (lively(foreign.Unit(6, 6, lambda c: foreign.LayoutNorm(c, LABELS, 8)))
                            .train(training) for _ in range(2))
        change = put("active", lambda x: x)
    report = accelerate(module)
    assert report.replaced
    assert not [r for r in report.left if r.kind in ("norm", "block")], str(report)
    expected = original(X, PLANES)
    assert max_error(module(X, PLANES), expected) < 1e-10
    if twin == "deepcopy":
        module = copy.deepcopy(module)
    change(module), change(original)
    if twin == "changed, then deepcopy":
        if name in ("forward", "child_forward", "activation_forward", "norm_forward",
                    "conv_1_forward", "method"):
            pytest.skip("functions put on an instance are of the original in any copy")
        module = copy.deepcopy(module)
    changed = original(X, PLANES)
    assert max_error(changed, expected) > 1e-3
    assert max_error(module(X, PLANES), changed) < 1e-10


@pytest.mark.parametrize("depth", range(5))
@torch.no_grad()
def test_what_does_not_change_is_served_at_any_depth(depth: int) -> None:
    module: Any = norm_of(Adjustable)
    held: Any = [types.SimpleNamespace(by=1.0), Slotted(), Slotted().times, nn.Dropout(),
                 deque([1.0]), partial(times, by=1.0), partialmethod(times, by=1.0), np.ones(2),
                 {1.0}, times]
    for _ in range(depth):
        held = [held]
    module.held = held
    accelerate(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which says that the original forward runs
        for _ in range(3):
            module(X, PLANES)


class Trained(foreign.LayoutNorm):
    """With a number that is trained, and no parameter."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alpha = torch.ones((), dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) * self.alpha


@pytest.mark.parametrize("late", [False, True])
def test_a_plain_number_that_is_trained_gets_its_gradient(late: bool) -> None:
    gradients = []
    for fast in (True, False):
        module: Any = norm_of(Trained).train()
        module.alpha.requires_grad_(not late)
        if fast:
            accelerate(module)
        module.alpha.requires_grad_()
        module(X, PLANES).square().sum().backward()
        gradients.append(module.alpha.grad)
    assert gradients[0] is not None and max_error(*gradients) < 1e-10


def test_a_class_that_is_patched_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module, original = adjustable().eval(), adjustable().eval()
    accelerate(module)
    module(X, PLANES)
    monkeypatch.setattr(Adjustable, "strength", 3.0)
    assert max_error(module(X, PLANES), original(X, PLANES)) < 1e-10
    monkeypatch.setattr(Adjustable, "strength", 1.0)
    monkeypatch.setattr(foreign.LayoutNorm, "blend", lambda _, x, gamma, beta: x)
    assert max_error(module(X, PLANES), original(X, PLANES)) < 1e-10


def test_a_pickle_remembers_what_was_probed() -> None:
    module, original = adjustable().eval(), adjustable().eval()
    accelerate(module)
    module.gain = original.gain = 3.0
    twin = pickle.loads(pickle.dumps(module))
    assert max_error(twin(X, PLANES), original(X, PLANES)) < 1e-10
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert max_error(torch.load(file, weights_only=False)(X, PLANES), original(X, PLANES)) < 1e-10


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_hooks_of_all_modules_are_called(kind: str) -> None:
    module, seen = plain_unit().eval(), []
    expected = sum(1 for _ in module.modules())
    accelerate(module)
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda m, *_: seen.append(m))
    try:
        module(X, PLANES)
    finally:
        handle.remove()
    assert {id(m) for m in seen} == {id(m) for m in module.modules()}
    assert len(seen) == expected


def test_attributes_that_forward_writes_are_written() -> None:
    class Noting(foreign.LayoutNorm):
        def blend(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            self.noted = gamma
            return super().blend(x, gamma, beta)

    norm = norm_of(Noting).eval()
    (row,) = accelerate(norm).rows
    assert not row.replaced
    assert "writes attributes: it has another noted" in row.note
    norm(X, PLANES)
    assert norm.noted.shape == (2, 6, 8, 8)


def test_backward_hooks_of_the_second_conv_see_its_own_gradients() -> None:
    module, original = plain_unit(), plain_unit()
    accelerate(module)
    seen: list[Any] = []
    for m in (module, original):
        m.conv_1.register_full_backward_hook(lambda *a: seen.append(a[1:]))
        m(X.clone().requires_grad_(), PLANES).square().sum().backward()
    (got, _), (expected, _) = seen
    assert len(got) == len(expected) == 1
    assert max_error(got[0], expected[0]) < 1e-7


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_gradients_are_called(kind: str, everywhere: bool) -> None:
    module, seen = plain_unit(), []
    accelerate(module)
    conv = module.norm_1.mlp_gamma
    owner, name = (nn.modules.module, "module_") if everywhere else (conv, "")
    handle = getattr(owner, f"register_{name}{kind}")(lambda m, *_: seen.append(m))
    try:
        module(X.clone().requires_grad_(), PLANES).sum().backward()
    finally:
        handle.remove()
    assert any(m is conv for m in seen)


def test_calls_that_are_left_are_counted_and_warned_of_once() -> None:
    module = adjustable().eval()
    report = accelerate(module)
    assert not report.calls_left
    module.gain = 3.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            module(X, PLANES)
    assert [str(w.message) for w in caught] == [
        "accelerate: Adjustable runs its original forward: it has another gain since accelerate()"]
    assert report.calls_left == {("", "it has another gain since accelerate()"): 3}
    assert "3 calls" in str(report)


# Constants of inference: what is written, by ways that move a version or do not.
def fused_adam(m: nn.Module) -> None:
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(m.parameters(), lr=0.3, fused=True).step()


def data_average(m: nn.Module) -> None:
    for p in m.parameters():
        p.data.mul_(0.3).add_(torch.ones_like(p), alpha=0.7)


def numpy_write(m: nn.Module) -> None:
    for p in m.parameters():
        p.detach().numpy()[...] *= 1.5
        p.detach().numpy().flat[0] += 1


def one_element(m: nn.Module) -> None:
    for p in m.parameters():
        p.data.view(-1)[-1] += 5


def update_bn(m: nn.Module) -> None:
    torch.optim.swa_utils.update_bn([normal(2, 5, 8, 8, seed=3) * 3 + 1], m)
    m.eval()


def training_forward(m: nn.Module) -> None:
    """It moves running statistics, no weight and no version."""
    m.train()
    with torch.no_grad():
        m(normal(2, 5, 8, 8, seed=3) * 3 + 1)
    m.eval()


def statistics_by_data(m: nn.Module) -> None:
    for n in m.modules():
        if isinstance(n, nn.BatchNorm2d):
            n.running_var.data.mul_(4)


def other_eps(m: nn.Module) -> None:
    for n in m.modules():
        if isinstance(n, nn.BatchNorm2d):
            n.eps = 1.0


def frozen_adam(m: nn.Module) -> None:
    """Training with frozen statistics."""
    m.train()
    for n in m.modules():
        if isinstance(n, nn.BatchNorm2d):
            n.eval()
    m(normal(2, 5, 8, 8)).square().sum().backward()
    torch.optim.Adam(m.parameters(), lr=0.3, fused=True).step()
    m.eval()


def assigned(m: nn.Module) -> None:
    m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True)


WRITES = [fused_adam, data_average, numpy_write, one_element, update_bn, training_forward,
          statistics_by_data, other_eps, frozen_adam, assigned]


def batch_norm_network() -> nn.Module:
    return lively(nn.Sequential(
        nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        *foreign_layers.label_encoder(6, 6), nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4, affine=False)))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_constants_of_inference_follow_every_write(write: Callable[[nn.Module], None],
                                                   trainable: bool) -> None:
    network, original = batch_norm_network().eval(), batch_norm_network().eval()
    accelerate(network, inference=True)
    if not trainable and write is not frozen_adam:
        network.requires_grad_(False)
    x = normal(2, 5, 8, 8)
    with torch.no_grad():
        before = original(x)
        for _ in range(2):
            assert max_error(network(x), before) < 1e-10
    for m in (network, original):
        write(m)
    with torch.no_grad():
        expected = original(x)
        assert max_error(expected, before) > 1e-3
        for _ in range(2):
            assert max_error(network(x), expected) < 1e-10


@pytest.mark.parametrize("write", [fused_adam, data_average, one_element])
def test_spectral_norm_of_both_kinds_follows_every_write(
        write: Callable[[nn.Module], None]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(5, 4, 3))
        return nn.Sequential(conv, nn.utils.spectral_norm(nn.Conv2d(4, 3, 3))).double().eval()

    network, original = build(), build()
    assert len(accelerate(network, inference=True).replaced) == 2
    x = normal(2, 5, 8, 8)
    with torch.no_grad():
        before = network(x)
        write(network), write(original)
        assert max_error(original(x), before) > 1e-3
        assert max_error(network(x), original(x)) < 1e-10


def test_another_parametrization_is_seen() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(5, 4, 3)).double().eval()
    accelerate(conv, inference=True)
    with torch.no_grad():
        before = conv.weight.clone()
        conv.parametrizations.weight.append(Twice())
        assert max_error(conv.weight, 2 * before) < 1e-12


def test_a_network_follows_a_moving_average_through_data() -> None:
    network, original = small_painter().eval(), small_painter().eval()
    accelerate(network, inference=True)
    planes = label_map(64)
    with torch.no_grad():
        before = network(planes)
        for m in (network, original):
            for p in m.parameters():
                p.data.mul_(0.5).add_(p.data.flip(0), alpha=0.5)
        assert max_error(original(planes), before) > 1e-3
        assert max_error(network(planes), original(planes)) < 1e-9
        restore(network)
        assert max_error(network(planes), original(planes)) < 1e-9


@pytest.mark.parametrize("change", [
    fused_adam, data_average, one_element, numpy_write,
    lambda m: m.buffers().__next__().data.add_(1),
    lambda m: next(n for n in m.modules() if isinstance(n, nn.BatchNorm2d)).register_forward_hook(
        doubled),
    lambda m: setattr(next(n for n in m.modules() if isinstance(n, nn.BatchNorm2d)), "eps", 1.0),
], ids=["fused_adam", "data", "one_element", "numpy", "buffer", "hook", "eps"])
def test_a_synthesizer_notices_what_it_was_made_from(change: Callable[[nn.Module], Any]) -> None:
    model = create_model("spade_coco", ngf=4, image_size=(64, 64))
    labels = torch.randint(7, (1, 64, 64))
    s = Synthesizer(model.eval(), labels, labels)
    s.sample()
    model.train(), model.eval()
    s.sample()
    change(model.generator)
    with pytest.raises(RuntimeError, match=r"model: .* since this Synthesizer was made"):
        s.sample()


def test_statistics_that_are_no_longer_tracked_stay() -> None:
    module = plain_norm().train()
    twin = copy.deepcopy(module)
    accelerate(module)
    before = {key: value.clone() for key, value in twin.state_dict().items()}
    for network in (module, twin):
        (norm,) = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        norm.track_running_stats = False
    for _ in range(2):
        torch.testing.assert_close(module(X, PLANES), twin(X, PLANES))
    for network in (module, twin):
        torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
