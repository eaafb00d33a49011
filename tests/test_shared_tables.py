"""Norms of a level share the launches of their tables: never a table of other weights or maps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_prepared import CHANGES, CHANNELS, CLASSES, with_statistics
from test_prepared import inputs as small_inputs
from torch import Tensor, nn

from smis_kernels import SPADE, CGNorm, LabelLayout, modulate_pair, use_backend, use_path
from smis_kernels.acceleration.prepared import Prepared
from smis_kernels.layout import shared_tables
from smis_kernels.layout.table_cache import TableCache
from smis_kernels.ops.level_tables.op import level_tables
from smis_kernels.testing import max_error


class Network(nn.Module):
    """A block with a learned shortcut at one size, and a norm of groups at twice that size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SPADE(CHANNELS, CLASSES, 8)
        self.shortcut = SPADE(CHANNELS, CLASSES, 8)
        self.second = CGNorm(CHANNELS, CLASSES, 12, groups=3, shared_groups=1)
        self.last = SPADE(CHANNELS, CLASSES, 8, norm="instance")

    def forward(self, x: Tensor, layout: LabelLayout) -> Tensor:
        x, aside = modulate_pair(self.first, self.shortcut, x, layout)
        x = self.second(x, layout, activation="relu") + aside
        return self.last(x, layout, upsample=True)


def drawn() -> Network:
    torch.manual_seed(0)
    return with_statistics(Network()).double()


@pytest.fixture
def network() -> Network:
    return drawn()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How many tables were made at each request, and weak references to them."""
    calls: list[Any] = []
    def counted(*args: Any, **options: Any) -> list[Tensor]:
        tables = level_tables(*args, **options)
        calls.append([weakref.ref(t) for t in tables])
        return tables

    monkeypatch.setattr(shared_tables, "level_tables", counted)
    return calls


def counts(made: list[Any]) -> list[int]:
    found = [len(tables) for tables in made]
    made.clear()
    return found


@pytest.fixture(autouse=True)
def sharing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, with the kernels' steps spelled in torch."""
    monkeypatch.setattr(shared_tables, "SHARING", ("cpu",))
    with use_backend("cpu"), use_path("one_level"), torch.no_grad():
        yield


def inputs(seed: int = 0) -> tuple[Tensor, LabelLayout]:
    x, layout = small_inputs()
    if seed:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (2, 12, 12), generator=generator)
        layout = LabelLayout.from_labels(labels, CLASSES)
    return x.double(), LabelLayout(layout.symbols, layout.vectors.double())


def exact(network: nn.Module, x: Tensor, layout: LabelLayout) -> Tensor:
    with use_backend("reference"), use_path("auto"):
        found: Tensor = copy.deepcopy(network)(x, layout)
    return found


def test_the_second_call_makes_the_tables_of_a_level_together(network: Network,
                                                              made: list[Any]) -> None:
    prepared = Prepared(network)
    for expected in ([], [3], [3]):
        with prepared.vouched():
            y = network(*inputs())
        assert max_error(y, exact(network, *inputs())) < 1e-10
        assert not any(ref() is not None for tables in made for ref in tables)
        assert counts(made) == expected


def test_calls_inside_one_scope_share_too(network: Network, made: list[Any]) -> None:
    with Prepared(network).vouched():
        for seed in (0, 1, 1, 0):
            x, layout = inputs(seed)
            assert max_error(network(x, layout), exact(network, x, layout)) < 1e-10
    assert counts(made) == [3, 3, 3]


def test_without_a_scope_nothing_is_shared(network: Network, made: list[Any]) -> None:
    for _ in range(3):
        network(*inputs())
    assert not made


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_a_change_between_calls_is_seen(change: Callable[[Network], None],
                                        network: Network, made: list[Any]) -> None:
    if change.__name__ in ("_trained", "_sgd", "_fused_adam"):
        network.float()
    prepared, (x, layout) = Prepared(network), inputs()
    for _ in range(2):
        with prepared.checked():
            network(x.to(network.first.mlp_beta.weight.dtype), layout)
    with torch.enable_grad():
        change(network)
    network.shortcut.param_free_norm.eps = network.first.param_free_norm.eps  # as a pair's are
    x = x.to(network.first.mlp_beta.weight.dtype)
    made.clear()
    for _ in range(2):
        with prepared.checked():
            y = network(x, layout)
        truth = exact(copy.deepcopy(network).double(), x.double(), layout)
        assert max_error(y.double(), truth) < (1e-10 if x.dtype == torch.float64 else 1e-4)
    assert made


@pytest.mark.parametrize("tensor", ["mlp_shared.0.weight", "mlp_shared.0.bias",
                                    "mlp_gamma.weight", "mlp_gamma.bias", "mlp_beta.weight",
                                    "mlp_beta.bias"])
@pytest.mark.parametrize("how", ["write", "replace"])
def test_a_change_inside_a_call_is_seen(tensor: str, how: str, network: Network) -> None:
    """Where the norm's table has been made and waits."""
    prepared, given = Prepared(network), inputs()
    for _ in range(2):
        with prepared.vouched():
            network(*given)

    def change(norm: nn.Module, _: Any) -> None:
        owner, _, leaf = tensor.rpartition(".")
        layer = norm.get_submodule(owner)
        old = layer.get_parameter(leaf)
        if how == "write":
            old.mul_(-1.5)
        else:
            setattr(layer, leaf, nn.Parameter(-1.5 * old, requires_grad=False))

    handle = network.second.register_forward_pre_hook(change)
    with prepared.vouched():
        y = network(*given)
    handle.remove()
    assert max_error(y, exact(network, *given)) < 1e-10  # with the changed weights


def test_vectors_changed_inside_a_call_are_seen(network: Network) -> None:
    prepared, (x, layout) = Prepared(network), inputs()
    for _ in range(2):
        with prepared.vouched():
            network(x, layout)
    def enlarge(_: nn.Module, given: Any) -> None:  # for the norms from here on
        given[1].vectors[1:].mul_(3)

    handle = network.second.register_forward_pre_hook(enlarge)
    with prepared.vouched():
        y = network(x, layout)
    with use_backend("reference"), use_path("auto"):
        assert max_error(y, network(*inputs())) < 1e-10
    handle.remove()


def test_another_map_of_the_same_vectors_inside_a_call(network: Network) -> None:
    """Where the norm's table for the first map has been made and waits."""
    prepared, (x, layout), (_, other) = Prepared(network), inputs(), inputs(1)
    other = LabelLayout(other.symbols, layout.vectors)
    for _ in range(2):
        with prepared.vouched():
            network(x, layout)
    handle = network.second.register_forward_pre_hook(lambda _, given: (given[0], other))
    with prepared.vouched():
        y = network(x, layout)
    with use_backend("reference"), use_path("auto"):
        assert max_error(y, network(x, layout)) < 1e-10
    handle.remove()


def test_two_maps_in_one_call(network: Network, made: list[Any]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, a: LabelLayout, b: LabelLayout) -> Tensor:
            first, second = network.first(x, a), network.second(x, b)
            return first + 2 * second + 3 * network.shortcut(x, a) + 4 * network.last(x, b)

    two, prepared = Two().eval(), Prepared(network)
    (x, a), (_, b) = inputs(0), inputs(1)
    with use_backend("reference"), use_path("auto"):
        truth = two(x, a, b)
    for expected in ([], None, None):
        with prepared.vouched():
            assert max_error(two(x, a, b), truth) < 1e-10
        found = counts(made)
        assert expected in (None, found)
        assert sum(found) <= 8  # no more than once for each map and norm


def test_a_norm_called_twice(network: Network, made: list[Any]) -> None:
    prepared, (x, layout) = Prepared(network), inputs()

    def call() -> Tensor:
        y = network.first(x, layout)
        y = network.first(y, layout)
        return network.second(y, layout)

    with use_backend("reference"), use_path("auto"):
        truth = call()
    for _ in range(4):
        with prepared.vouched():
            assert max_error(call(), truth) < 1e-10
    assert counts(made)[-1] == 2


def test_gradients_flow_as_without_sharing(network: Network, made: list[Any]) -> None:
    prepared, (x, layout) = Prepared(network), inputs()
    for _ in range(2):
        with prepared.vouched():
            network(x, layout)
    made.clear()
    weight = torch.randn((2, CHANNELS, 24, 24), dtype=torch.float64)
    with torch.enable_grad(), prepared.vouched():
        (network(x, layout) * weight).sum().backward()
    assert not made
    found = [p.grad for p in network.parameters()]
    network.zero_grad()
    with torch.enable_grad(), use_backend("reference"), use_path("auto"):
        (network(x, layout) * weight).sum().backward()
    for got, p in zip(found, network.parameters(), strict=True):
        assert got is not None and p.grad is not None
        assert (got - p.grad).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_in_training_nothing_is_shared(dtype: torch.dtype, network: Network,
                                       made: list[Any]) -> None:
    prepared, (x, layout) = Prepared(network.to(dtype)), inputs()
    network.train()
    for _ in range(2):
        with prepared.checked():
            network(x.to(dtype), layout)
    assert not made


def test_kept_tables_are_made_together_once(network: Network, made: list[Any]) -> None:
    prepared, (x, layout) = Prepared(network), inputs()
    with prepared.vouched():
        network(x, layout)
    made.clear()
    layout.tables = TableCache()
    for expected in ([3], [], []):
        with prepared.vouched():
            y = network(x, layout)
        assert counts(made) == expected
        assert max_error(y, exact(network, x, layout)) < 1e-10
    assert len(dict(layout.tables.items())) == 4


def test_rows_of_an_edit_are_made_together(network: Network, made: list[Any]) -> None:
    """Those of windows that are new: a Synthesizer's update, and its next map."""
    prepared, (x, layout) = Prepared(network), inputs()
    layout.tables = TableCache()
    with prepared.vouched():
        network(x, layout)
    assert counts(made) == []
    for seed, expected in ((1, [3]), (2, [3]), (2, [])):
        (_, edited), before = inputs(seed), layout
        edited.tables = TableCache(before.tables)
        with prepared.vouched():
            y = network(x, edited)
        assert counts(made) == expected
        assert max_error(y, exact(network, x, edited)) < 1e-10
        layout = edited


def test_nothing_is_packed_before_norms_are_known_to_share(
    network: Network, monkeypatch: pytest.MonkeyPatch,
) -> None:
    packs: list[int] = []
    pack = shared_tables.pack
    monkeypatch.setattr(shared_tables, "pack",
                        lambda convs: (packs.append(len(convs)), pack(convs))[1])
    prepared, (x, layout) = Prepared(network), inputs()
    layout.tables = TableCache()
    for _ in range(3):
        with prepared.vouched():
            network(x, layout)
    assert packs == []
    layout.tables = None
    for _ in range(2):
        with prepared.vouched():
            network(x, layout)
    assert packs == [3]


def test_a_call_that_fails_teaches_nothing(network: Network, made: list[Any]) -> None:
    prepared, given = Prepared(network), inputs()
    for _ in range(2):
        with prepared.vouched():
            network(*given)
    handle = network.last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), prepared.vouched():
        network(*given)
    handle.remove()
    made.clear()
    with prepared.vouched():
        network(*given)
    assert counts(made) == [3]


def test_a_copy_learns_for_itself(network: Network, made: list[Any]) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.prepared = network, Prepared(network)

    holder, given = Holder(), inputs()
    for _ in range(2):
        with holder.prepared.vouched():
            network(*given)
    other = copy.deepcopy(holder)
    other.network.second.get_parameter("mlp_beta.bias").add_(1)
    for one in (other, holder, other):
        with one.prepared.vouched():
            y = one.network(*given)
        assert max_error(y, exact(one.network, *given)) < 1e-10


def test_low_precision_weights_under_autocast_and_without(network: Network,
                                                          made: list[Any]) -> None:
    """A table has the dtype of its weights: a change of it is another level."""
    prepared, (x, layout) = Prepared(network.float()), inputs()
    truth = exact(copy.deepcopy(network).double(), x, layout)
    for _ in range(2):
        with prepared.checked():
            network(x.float(), layout)
    counts(made)
    with prepared.checked(), torch.autocast("cpu", torch.bfloat16):
        y = network(x.bfloat16(), layout)
    assert counts(made) == [3] and max_error(y.double(), truth) < 0.2
    network.bfloat16()
    for expected in ([], [3]):
        with prepared.checked():
            y = network(x.bfloat16(), layout)
        assert y.dtype == torch.bfloat16 and counts(made) == expected
        assert max_error(y.double(), truth) < 0.2
