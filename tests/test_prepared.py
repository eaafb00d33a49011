"""Constants kept for a network: never stale, whatever way the weights were changed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import SPADE, LabelLayout, norm_act, use_path
from smis_kernels.acceleration.prepared import Prepared
from smis_kernels.runtime import constants
from smis_kernels.runtime.constants import Store, constant, using

CLASSES, CHANNELS = 5, 12
M = TypeVar("M", bound=nn.Module)


class Network(nn.Module):
    """Two norms, one of which tables serve, on one map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SPADE(CHANNELS, CLASSES, 8)
        self.second = SPADE(CHANNELS, CLASSES, 8, norm="instance")

    def forward(self, x: Tensor, layout: LabelLayout) -> Tensor:
        with use_path("dense"):
            x = self.first(x, layout, activation="leaky_relu")
        with use_path("two_level"):
            return self.second(x, layout)


def with_statistics(module: M) -> M:
    """A module in eval mode with running statistics of its own."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module.eval()


@pytest.fixture
def network() -> Network:
    return with_statistics(Network())


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, LabelLayout]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (2, 3, 3), generator=generator).repeat_interleave(4, 1)
    labels = labels.repeat_interleave(4, 2)
    x = torch.randn((2, CHANNELS, 12, 12), generator=generator)
    return x.to(dtype), LabelLayout.from_labels(labels, CLASSES)


def _sgd(network: Network) -> None:
    _step(network, torch.optim.SGD(network.parameters(), lr=0.1))


def _fused_adam(network: Network) -> None:
    _step(network, torch.optim.Adam(network.parameters(), lr=0.1, fused=True))


def _step(network: Network, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def _ema(network: Network) -> None:
    for p in network.parameters():
        p.data.mul_(0.9).add_(torch.ones_like(p.data), alpha=0.1)


def _numpy(network: Network) -> None:
    for p in network.parameters():
        p.detach().numpy()[...] += 0.25


def _loaded(network: Network) -> None:
    state = {k: v + 0.5 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(state)


def _assigned(network: Network) -> None:
    state = {k: v + 0.5 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(state, assign=True)


def _double(network: Network) -> None:
    network.to(torch.float64)


def _replaced(network: Network) -> None:
    network.first.mlp_gamma.weight = nn.Parameter(network.first.mlp_gamma.weight.detach() * 2)


def _one_bias(network: Network) -> None:
    network.first.mlp_beta.bias.data[3] += 1


def _trained(network: Network) -> None:
    network.train()
    with torch.no_grad():
        network(*inputs())
    network.eval()


def _running_mean(network: Network) -> None:
    network.first.param_free_norm.running_mean.data.add_(1)


def _eps(network: Network) -> None:
    network.first.param_free_norm.eps = 0.5


CHANGES = (_sgd, _fused_adam, _ema, _numpy, _loaded, _assigned, _double, _replaced, _one_bias,
           _trained, _running_mean, _eps)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_a_change_of_the_weights_is_seen(network: Network,
                                         change: Callable[[Network], None]) -> None:
    prepared = Prepared(network)
    with torch.no_grad():
        with prepared.checked():
            before = network(*inputs())
        change(network)
        at = inputs(next(network.parameters()).dtype)
        expected = network(*at)
        for _ in range(2):  # made anew, then kept
            with prepared.checked():
                assert torch.equal(network(*at), expected)
    assert not torch.equal(expected.to(before.dtype), before)


@pytest.mark.parametrize("change", [_sgd, _loaded, _assigned, _double, _replaced, _trained,
                                    _eps], ids=lambda f: f.__name__[1:])
def test_what_leaves_a_trace_is_seen_without_a_look_at_the_content(
        network: Network, change: Callable[[Network], None]) -> None:
    prepared = Prepared(network)
    with torch.no_grad():
        with prepared.vouched():
            network(*inputs())
        change(network)
        at = inputs(next(network.parameters()).dtype)
        with prepared.vouched():
            assert torch.equal(network(*at), network(*at))
            found = network(*at)
        assert torch.equal(found, network(*at))


@pytest.mark.parametrize("enter", ["checked", "vouched"])
def test_constants_are_made_once(network: Network, enter: str,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    find = Store.find

    def watched(self: Store, key: object, make: Callable[[], object],
                sources: tuple[Tensor, ...]) -> object:
        return find(self, key, lambda: (made.append(key), make())[1], sources)

    monkeypatch.setattr(constants.Store, "find", watched)
    prepared = Prepared(network)
    with torch.no_grad():
        plain = network(*inputs())
        with getattr(prepared, enter)():
            assert torch.equal(network(*inputs()), plain)
        first = list(made)
        for _ in range(2):
            with getattr(prepared, enter)():
                assert torch.equal(network(*inputs()), plain)
    assert made == first
    assert any(isinstance(key, tuple) and key[0] == "wide" for key in made)
    assert "gamma and beta" in made


def test_nothing_is_kept_outside_in_training_or_with_gradients(network: Network) -> None:
    prepared = Prepared(network)
    with torch.no_grad(), prepared.checked():
        pass
    with torch.no_grad():
        network(*inputs())
    store = prepared._store
    assert store is not None and len(store) == 0
    with prepared.checked():  # gradients are wanted
        network(*inputs())[0].sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    kept = [key[0] for key in store._kept]
    assert "gamma and beta" not in kept
    for part in (network, network.first.param_free_norm):  # all of it, and one part alone
        network.eval()
        part.train()
        with prepared.checked(), torch.no_grad():
            network(*inputs())
        assert prepared._store is None


def test_the_gradients_are_those_without(network: Network) -> None:
    def gradients() -> list[Tensor]:
        network.zero_grad()
        network(*inputs()).square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    prepared, plain = Prepared(network), gradients()
    with torch.no_grad(), prepared.checked():
        network(*inputs())
    with prepared.checked():
        found = gradients()
    assert len(found) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_tensors_that_nobody_vouches_for_are_no_sources() -> None:
    mine, other = torch.ones(3), torch.ones(3)
    with using(Store([mine])):
        for source in (mine, other):
            assert constant("twice", lambda s=source: s * 2, source).sum() == 6
            source.data.add_(1)  # without a trace
        assert constant("twice", lambda: mine * 2, mine).sum() == 6  # vouched for, so kept
        assert constant("twice", lambda: other * 2, other).sum() == 12


def test_neutral_statistics_are_of_one_dtype_and_width() -> None:
    with using(Store([])), torch.no_grad():
        for channels, dtype in ((3, torch.float32), (3, torch.float64), (5, torch.float64)):
            x = torch.randn(1, channels, 4, 5, dtype=dtype)
            for _ in range(2):
                assert torch.equal(norm_act(x, norm="none", activation="relu"), x.relu())


def test_fixed_statistics_are_of_one_eps_and_dtype() -> None:
    mean, var = torch.randn(3).bfloat16(), torch.rand(3).bfloat16()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with using(Store([mean, var])), torch.no_grad():
        for dtype, eps in ((torch.float32, 1e-5), (torch.float32, 0.5), (torch.float64, 0.5)):
            wide = [v.double().view(1, 3, 1, 1) for v in (mean, var)]
            expected = (x - wide[0]) / (wide[1] + eps).sqrt()
            for _ in range(2):
                y = norm_act(x.to(dtype), norm="batch", running_mean=mean, running_var=var, eps=eps)
                torch.testing.assert_close(y, expected.to(dtype))


def test_a_constant_that_is_written_to_is_made_anew() -> None:
    source = torch.ones(3)
    with using(Store([source])):
        constant("twice", lambda: source * 2, source).add_(1)
        assert constant("twice", lambda: source * 2, source).sum() == 6


def test_memory_that_is_read_in_another_order_is_seen() -> None:
    x = torch.arange(4.0).view(2, 2)
    with using(Store([x])):
        assert torch.equal(constant("key", x.clone, x), torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        x.data = x.data.T  # of one storage, shape and dtype, and no version moves
        assert torch.equal(constant("key", x.clone, x), torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


def test_memory_that_comes_to_lie_where_a_source_lay_is_seen() -> None:
    source = torch.zeros(3)
    with using(Store([source])):
        for value in range(1, 20):
            constant("twice", lambda: source * 2, source)
            source.data = torch.empty(3)
            source.data = torch.full((3,), float(value))
            assert constant("twice", lambda: source * 2, source).sum() == 6 * value


def test_nothing_is_kept_of_a_transform() -> None:
    source = torch.ones(3)
    store = Store([source])
    with using(store):
        torch.func.grad(lambda x: (constant("twice", lambda: source * 2, source) * x).sum())(source)
        assert len(store) == 0


def test_other_threads_keep_nothing() -> None:
    source, seen = torch.ones(3), []
    with using(Store([source])):
        constant("twice", lambda: source * 2, source)
        thread = threading.Thread(
            target=lambda: seen.append(constant("twice", lambda: source * 3, source)))
        thread.start()
        thread.join()
    assert seen[0].sum() == 9


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
                         ids=["copied", "pickled"])
def test_copies_start_without_constants(network: Network,
                                        twin_of: Callable[[Prepared], Prepared]) -> None:
    prepared = Prepared(network)
    with torch.no_grad(), prepared.vouched():
        network(*inputs())
    twin = twin_of(prepared)
    assert twin._store is None
    with torch.no_grad(), twin.vouched():
        assert torch.equal(twin._network(*inputs()), network(*inputs()))


def test_inference_mode_leaves_constants_that_gradients_can_use(network: Network) -> None:
    prepared = Prepared(network)
    with torch.inference_mode(), prepared.checked():
        expected = network(*inputs())
    x, layout = inputs()
    for p in network.parameters():
        p.requires_grad_(False)
    with prepared.checked():
        y = network(x.requires_grad_(), layout)
        y.sum().backward()
    assert torch.equal(y.detach(), expected) and x.grad is not None
