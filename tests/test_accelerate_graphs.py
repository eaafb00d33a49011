"""accelerate(inference=True) by CUDA graphs: on a CPU the graph is a trace of ATen calls.

``make_fx`` records the very tensors that a call reads, as a CUDA graph records their addresses, and
refuses what a capture refuses: values that steer Python.
"""

from __future__ import annotations

import copy
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from foreign_cases import LABELS, block_of, label_map, lively, normal
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from smis_kernels import accelerate, explain, layout_scope, restore, use_backend
from smis_kernels.acceleration import graphed
from smis_kernels.acceleration.graphed import CallReplays, GraphedNetwork
from smis_kernels.acceleration.prepared import Prepared
from smis_kernels.acceleration.swap import REPLAYS
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
X = normal(2, 6, 8, 8)


class Recorder:
    """Stands for :func:`~smis_kernels.runtime.graphs.capture`; counts captures and replays."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def __call__(self, call: Callable[[], list[Tensor]],
                 device: torch.device) -> Callable[[], list[Tensor]]:
        self.recorded += 1
        out, graph = call(), make_fx(lambda: call())()

        def replay() -> list[Tensor]:
            self.replays += 1
            for target, value in zip(out, graph(), strict=True):
                target.copy_(value)
            return out

        return replay


class Scene(nn.Module):
    """A network of one block, whose features and picture are made of other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(6, 6, 1)
        self.unit = block_of(foreign.Unit)
        self.register_buffer("shift", torch.ones(4, 1, 1).double())
        self.gain = 1.0

    def forward(self, x: Tensor, segmap: Tensor, scale: float = 1.0,
                extra: Tensor | None = None) -> Any:
        y = self.unit(self.start(x), segmap) * self.gain * scale + self.shift
        return y if extra is None else {"picture": y + extra, "scale": scale}


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU."""
    monkeypatch.setattr(graphed, "_on_gpu", lambda given: any(
        isinstance(value, Tensor) for value in given))
    with torch.no_grad():
        yield


def made(network: nn.Module | None = None) -> tuple[nn.Module, nn.Module, Recorder]:
    """A network that replays its third call, its original, and what counts."""
    network = (lively(Scene()) if network is None else network).eval()
    original = copy.deepcopy(network)
    accelerate(network, inference=True, cuda_graph=True, modules=["norm", "block", "conv"])
    assert isinstance(network, GraphedNetwork)
    recorder = Recorder()
    vars(network)[REPLAYS] = CallReplays(recorder)
    return network, original, recorder


def planes(seed: int = 0, size: int = 16) -> Tensor:
    return label_map(size, seed=seed)


def agree(network: nn.Module, original: nn.Module, seeds: range = range(4), **more: Any) -> None:
    for seed in seeds:
        x = normal(2, 6, 8, 8, seed=seed)
        assert max_error(network(x, planes(seed), **more),
                         original(x, planes(seed), **more)) < 1e-10


def failed(network: nn.Module) -> str | None:
    found: str | None = vars(network)[REPLAYS].failed
    return found


def test_replays_are_the_network() -> None:
    network, original, recorder = made()
    agree(network, original, range(2))
    assert (recorder.recorded, recorder.replays) == (1, 2)  # compared twice
    agree(network, original, range(2, 6))
    assert (recorder.recorded, recorder.replays) == (1, 6) and failed(network) is None


def test_results_are_memory_of_their_own() -> None:
    network, original, _ = made()
    agree(network, original)
    first = network(X, planes())
    second = network(2 * X, planes(1))
    assert max_error(first, original(X, planes())) < 1e-10
    second.mul_(0)
    assert max_error(network(X, planes()), first) < 1e-10


def test_maps_are_brought_in_with_their_layouts() -> None:
    """Other windows in the same memory, and more than it has room for."""
    network, original, recorder = made()
    agree(network, original, range(2))
    rows = torch.arange(16).view(1, 1, 16, 1)
    stripes = (rows // 2 % LABELS == torch.arange(LABELS).view(1, -1, 1, 1)).double()
    few = stripes.expand(2, -1, -1, 16).contiguous()
    many = torch.nn.functional.one_hot(torch.randint(
        LABELS, (2, 16, 16), generator=torch.Generator().manual_seed(0)), LABELS)
    many = many.permute(0, 3, 1, 2).double().contiguous()
    soft = normal(2, LABELS, 16, 16).softmax(1)  # nothing repeats
    before = recorder.replays
    assert max_error(network(X, few), original(X, few)) < 1e-10
    assert recorder.replays == before + 1
    for given in (soft, few, many, few):
        assert max_error(network(X, given), original(X, given)) < 1e-10
    assert failed(network) is None


def step(m: nn.Module) -> None:
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def moved(m: nn.Module) -> dict[str, Tensor]:
    return {k: v + 0.25 if v.is_floating_point() else v for k, v in m.state_dict().items()}


def data(m: nn.Module) -> None:
    for p in m.parameters():
        p.data = p.data * 1.5


def one_element(m: Any) -> None:
    m.start.bias.data[3] += 1


def by_numpy(m: Any) -> None:
    m.start.weight.detach().numpy()[...] *= 2


def trained(m: nn.Module) -> None:
    m.train()
    m(3 * X, planes(5))
    m.eval()


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "step": step, "loaded": lambda m: m.load_state_dict(moved(m)), "one_element": one_element,
    "numpy": by_numpy, "trained": trained, "buffer": lambda m: m.shift.data.add_(2),
    "statistics": lambda m: m.unit.norm_0.param_free_norm.running_mean.add_(1),
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "data": data, "assigned": lambda m: m.load_state_dict(moved(m), assign=True),
    "turned": lambda m: setattr(m.start.weight, "data", m.start.weight.data.transpose(0, 1)),
    "replaced": lambda m: setattr(m.start, "weight", nn.Parameter(m.start.weight * 2)),
    "part": lambda m: setattr(m, "start", nn.Identity()),
    "attribute": lambda m: setattr(m, "gain", 3.0),
    "eps": lambda m: setattr(m.unit.norm_1.param_free_norm, "eps", 0.5),
    "hook": lambda m: m.start.register_forward_hook(lambda *found: 2 * found[-1]),
    "inner_hook": lambda m: m.unit.conv_1.register_forward_hook(lambda *found: 2 * found[-1]),
    "forward": lambda m: setattr(m.start, "forward", lambda x: 2 * x),
    "training": lambda m: m.train(),
    "training_of_a_part": lambda m: m.unit.norm_0.train(),
}


@pytest.mark.filterwarnings("ignore:accelerate. .* runs its original forward")
@pytest.mark.parametrize("name", [*IN_PLACE, *OTHERS])
def test_what_changes_after_the_capture_is_seen(name: str) -> None:
    network, original, recorder = made()
    agree(network, original)
    before = original(X, planes())
    change = IN_PLACE.get(name) or OTHERS[name]
    change(network), change(original)
    assert max_error(original(X, planes()), before) > 1e-3
    if name.startswith("training"):
        network.load_state_dict(original.state_dict())  # one call ahead
    agree(network, original)
    if name in IN_PLACE:
        assert recorder.recorded == 1  # replays read weights where they lie
    elif name in ("data", "assigned", "replaced", "turned"):
        assert recorder.recorded == 2
    assert failed(network) is None


def test_a_hook_that_is_gone_makes_room_for_replays() -> None:
    network, original, recorder = made()
    agree(network, original)
    handle = network.start.register_forward_hook(lambda *found: 2 * found[-1])
    count = recorder.replays
    network(X, planes())
    assert recorder.replays == count
    handle.remove()
    agree(network, original)
    assert recorder.replays > count


AROUND: dict[str, Callable[[], Any]] = {
    "gradients": torch.enable_grad, "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "backend": lambda: use_backend("reference"), "inference": torch.inference_mode,
    "scope": layout_scope, "device": lambda: torch.device("cpu"),
    "constants": lambda: Prepared(nn.Identity()).vouched(),
}


@pytest.mark.parametrize("name", AROUND)
def test_other_circumstances_are_another_call(name: str) -> None:
    network, original, recorder = made()
    agree(network, original)
    for _ in range(3):
        with AROUND[name]():
            found, expected = network(X, planes()), original(X, planes())
        assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad
        error = max_error(found.detach(), expected.detach())
        assert error < (0.05 if name == "autocast" else 1e-10)
    assert failed(network) is None
    count = recorder.replays
    agree(network, original)
    assert recorder.replays > count


def test_kinds_of_calls_have_graphs_of_their_own() -> None:
    network, original, recorder = made()
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: m(X, planes()), lambda m: m(X.to(memory_format=torch.channels_last), planes()),
        lambda m: m(X, segmap=planes()), lambda m: m(X, planes(), 2.0),
        lambda m: m(X[:1], planes()[:1]), lambda m: m(X, planes(size=32)),
    ]
    for call in calls:
        for _ in range(3):
            found, expected = call(network), call(original)
            assert max_error(found, expected) < 1e-10
    assert recorder.recorded == len(calls)
    assert len(vars(network)[REPLAYS]._graphs) == graphed.MOST_GRAPHS
    for extra in (X[:, :4].contiguous(), X[:, :4]):  # of a view with gaps there is no copy
        count = recorder.replays
        for _ in range(3):
            found = network(X, planes(), 3.0, extra)
            expected = original(X, planes(), 3.0, extra)
            assert max_error(found["picture"], expected["picture"]) < 1e-10
            assert found["scale"] == 3.0
        assert (recorder.replays > count) == extra.is_contiguous()
    assert failed(network) is None


def test_arguments_are_told_apart_by_their_names() -> None:
    class Named(Scene):
        def forward(self, x: Tensor, segmap: Tensor, added: Any = 0.0,  # type: ignore[override]
                    factor: Any = 1.0) -> Any:
            return super().forward(x, segmap) * factor + added

    network, original, recorder = made(lively(Named()))
    given = normal(2, 4, 8, 8, seed=3)
    for name in ("added", "factor"):
        for _ in range(3):
            found, expected = (m(X, planes(), **{name: given}) for m in (network, original))
            assert max_error(found, expected) < 1e-10
    assert recorder.recorded == 2


def test_a_tensor_that_is_given_twice() -> None:
    class Twice(Scene):
        def forward(self, x: Tensor, segmap: Tensor, again: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, segmap) + (1 if again is segmap else 2)

    network, original, recorder = made(lively(Twice()))
    for seed in range(4):
        m = planes(seed)
        for other in (m, m.clone()):
            assert max_error(network(X, m, other), original(X, m, other)) < 1e-10
    assert recorder.recorded == 2


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_has_graphs_of_its_own(twin: Callable[[nn.Module], nn.Module]) -> None:
    network, original, _ = made()
    agree(network, original)
    assert vars(network)[REPLAYS]._graphs
    # what stands for a capture in this test is copied too, its graphs are not
    other = twin(network)
    assert not vars(other)[REPLAYS]._graphs
    agree(other, original)
    IN_PLACE["one_element"](other)
    agree(network, original)
    IN_PLACE["one_element"](original)
    agree(other, original)


def test_a_shallow_copy_runs_eagerly() -> None:
    network, original, recorder = made()
    agree(network, original)
    count, other = recorder.replays, copy.copy(network)
    agree(other, original)
    assert recorder.replays == count


def test_a_second_thread_meanwhile_runs_the_network_itself() -> None:
    network, original, recorder = made()
    agree(network, original)
    count, found = recorder.replays, []

    def call() -> None:
        with torch.no_grad():
            found.append(network(X, planes()))

    with vars(network)[REPLAYS]._lock:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert recorder.replays == count
    assert max_error(found[0], original(X, planes())) < 1e-10


def test_explain_sees_the_kernels() -> None:
    network, original, _ = made()
    agree(network, original)
    assert "modulation" in str(explain(network, X, planes()))


def test_threads_that_call_at_once() -> None:
    network, original, _ = made()
    agree(network, original)
    expected = {seed: original(X, planes(seed)) for seed in range(3)}
    errors: list[float] = []

    def call(seed: int) -> None:
        with torch.no_grad():
            errors.extend(max_error(network(X, planes(seed)), expected[seed]) for _ in range(5))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 15 and max(errors) < 1e-10


class Stale:
    """A replay that misses what it is told to."""

    def __init__(self, misses: str) -> None:
        self._misses = misses

    def __call__(self, call: Callable[[], list[Tensor]],
                 device: torch.device) -> Callable[[], list[Tensor]]:
        first, again = [t.clone() for t in call()], []

        def replay() -> list[Tensor]:
            if self._misses == "inputs":
                return first
            again[:] = [t * (1 + 1e-12) for t in call()]
            return again

        return replay


def fails(call: Any, device: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(("record", "why"), [
    (Stale("inputs"), "a replay is"), (Stale("a bit"), "a replay is"),
    (fails, ".* not permitted .* capturing$")])
def test_a_graph_that_is_none_is_told_once(record: Any, why: str) -> None:
    network, original, _ = made()
    vars(network)[REPLAYS] = CallReplays(record)
    agree(network, original, range(1))
    with pytest.warns(UserWarning, match=f"Scene has no CUDA graph from now on: {why}"):
        agree(network, original, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(network, original)
    assert not vars(network)[REPLAYS]._graphs


def test_a_layout_that_is_not_brought_in_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    network, original, _ = made()
    agree(network, original, range(1))
    monkeypatch.setattr(graphed.StaticLayout, "load", lambda *_: None)
    x, m = normal(2, 6, 8, 8), planes()
    monkeypatch.setattr(graphed, "layout_of", lambda t: wrong if torch.equal(t, m) else None)
    wrong = graphed.LabelLayout.from_tensor(planes(3))
    assert wrong is not None
    monkeypatch.setattr(graphed.StaticLayout, "__init__", _of(wrong, graphed.StaticLayout.__init__))
    with pytest.warns(UserWarning, match="no CUDA graph from now on: a replay is .* output"):
        assert max_error(network(x, m), original(x, m)) < 1e-10
    agree(network, original)


def _of(wrong: Any, original: Any) -> Any:
    """StaticLayout of another layout than the call's."""
    def init(self: Any, used: Any) -> None:
        for size in used._levels:
            wrong.level(size)
        original(self, wrong)

    return init


class Noisy(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, segmap) + torch.randn(1, dtype=torch.float64)


class Counting(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        self.shift.data.add_(1)
        return super().forward(x, segmap)


class Writing(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x.mul_(2), segmap)


class Returning(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, segmap), x


class Steered(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        y = super().forward(x, segmap)
        return y if y.mean() > 1e6 else 2 * y


class Resizing(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, segmap[..., ::2, ::2].contiguous())


class Shuffling(Scene):
    """Random numbers of others than torch, whose state a replay would leave as it was."""

    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        np.random.rand()
        return super().forward(x, segmap)


class Choosing(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        random.random()
        return super().forward(x, segmap)


class Naming(Scene):
    def forward(self, x: Tensor, segmap: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, segmap), self


@pytest.mark.parametrize(("cls", "why"), [
    (Noisy, "it draws random numbers"), (Shuffling, "it draws random numbers"),
    (Choosing, "it draws random numbers"), (Counting, "it writes to its weights or buffers"),
    (Writing, "it writes to its inputs"), (Returning, "it returns memory of its inputs or weights"),
    (Steered, ""), (Resizing, "it makes label maps of its own"),
    (Naming, "it returns other things than tensors and plain values"),
])
def test_what_cannot_be_replayed_runs_as_it_is(cls: type[Scene], why: str) -> None:
    network, original, recorder = made(lively(cls()))
    for i in range(4):
        given = [normal(2, 6, 8, 8, seed=i) for _ in range(2)]
        context = pytest.warns(UserWarning, match=why) if i == 1 else nullcontext()
        torch.manual_seed(i)
        with context:
            found = network(given[0], planes(i))
        torch.manual_seed(i)
        expected = original(given[1], planes(i))
        found, expected = (v[0] if isinstance(v, tuple) else v for v in (found, expected))
        assert max_error(found, expected) < 1e-10
        assert torch.equal(given[0], given[1])  # inputs are written to, or are not
    assert torch.equal(network.shift, original.shift)
    assert recorder.replays == 0 and failed(network) is not None


def test_a_network_of_ever_new_calls_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "MOST_CAPTURES", 3)
    network, original, recorder = made()
    for i in range(3):
        agree(network, original, range(3), scale=float(i))
    with pytest.warns(UserWarning, match="3 were captured, for ever new kinds of calls"):
        agree(network, original, range(3), scale=4.0)
    assert recorder.recorded == 3


def test_attributes_that_change_again_and_again() -> None:
    network, original, recorder = made()

    def change() -> None:
        for i in range(2 * graphed.MOST_CHANGES + 2):
            network.gain = original.gain = float(i)
            agree(network, original, range(1))

    with pytest.warns(UserWarning, match="another gain again and again"):
        change()
    assert recorder.recorded == 0


def test_weights_on_another_device_are_numbers_of_the_host() -> None:
    """A CPU's scalar among a GPU's weights would stay in the graph as it was."""
    network = lively(Scene())
    network.register_buffer("elsewhere", torch.empty((), device="meta"))
    network, original, recorder = made(network)
    agree(network, original)
    assert recorder.recorded == 0 and failed(network) is None


def test_plain_values_are_told_apart() -> None:
    network, original, recorder = made()
    for scale in (0.0, -0.0, 1, True, 1.0):
        for _ in range(3):
            found, expected = network(X, planes(), scale), original(X, planes(), scale)
            assert max_error(found, expected) < 1e-10
    assert recorder.recorded == 5


def test_an_error_of_the_network_is_its_own() -> None:
    network, original, recorder = made()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="channels"):
            network(normal(2, 5, 8, 8), planes())
    agree(network, original)
    assert recorder.recorded == 1


def test_it_can_be_left_out_and_is_taken_out() -> None:
    network, original, _ = made()
    agree(network, original)
    assert restore(network) > 0
    assert REPLAYS not in vars(network) and type(network) is Scene
    for options in ({"inference": True}, {"cuda_graph": True}):
        accelerate(network, **options)
        assert not isinstance(network, GraphedNetwork)


def test_a_cpu_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    network = lively(Scene()).eval()
    accelerate(network, inference=True, cuda_graph=True)
    assert isinstance(network, GraphedNetwork)
    for _ in range(3):
        network(X, planes())
    assert REPLAYS not in vars(network)


def test_a_picture_that_overflows_is_replayed_too() -> None:
    network, original, recorder = made()
    x = X.clone()
    x[0, 0, 3, 4] = torch.inf
    for _ in range(4):
        found, expected = network(x, planes()), original(x, planes())
        assert not expected.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert failed(network) is None and recorder.replays > 0
