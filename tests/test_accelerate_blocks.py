"""accelerate() on blocks: wrapped parts, other orders, this library's norms; small calls; gains."""

from __future__ import annotations

import copy
import cProfile
import pstats
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import foreign
import foreign_blocks as fb
import numpy as np
import pytest
import torch
from foreign_cases import LABELS, label_map, norm_of, normal, stirred
from test_accelerate_families import assert_equal, assert_equal_in_use, step
from torch import Tensor, nn

from smis_kernels import SPADE, CGNorm, accelerate, explain, use_backend, use_path
from smis_kernels.acceleration import norms, swap
from smis_kernels.acceleration.watch import Settings
from smis_kernels.modules.spade import modulate_pair
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason="no native CPU library")
X, IMAGE, PLANES = normal(2, 6, 8, 8), normal(2, 3, 8, 8), label_map(16)


@pytest.fixture
def as_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls are small, unlike in all other tests."""
    monkeypatch.setattr(swap._sizes, "any", False)


def own_norm(width: int, planes: int, norm: str = "batch") -> nn.Module:
    return SPADE(width, planes, 8, norm=norm)


def stack(block: Callable[..., nn.Module] = fb.Block, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return stirred(fb.Stack(LABELS, block, **options))


def unit(cls: Callable[..., nn.Module] = foreign.Unit,
         norm: Callable[[int], nn.Module] = lambda c: foreign.LayoutNorm(c, LABELS, 8),
         ) -> nn.Module:
    torch.manual_seed(1)  # spectral norm starts at random
    return stirred(cls(6, 4, norm))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: partial(stack, cls) for cls in (
        fb.Block, fb.Growing, fb.Weighed, fb.After, fb.MapFirst, fb.Dense, fb.Resizing)},
    "relu_in_place": lambda: stack(act=nn.ReLU(True)),
    "leaky_relu_in_place": lambda: stack(act=nn.LeakyReLU(0.3, True)),
    "prelu": lambda: stack(act=nn.PReLU()),
    **{cls.__name__: partial(stack, norm=cls) for cls in (
        fb.Squashed, fb.Bounded, fb.Twice, fb.Levels, fb.Parametrized)},
    "own_norms": lambda: stack(norm=own_norm),
    "own_instance_norms": lambda: stack(norm=partial(own_norm, norm="instance")),
    "damped": lambda: unit(foreign.DampedUnit),
    "from_config": lambda: unit(
        norm=lambda c: SPADE.from_config("spadebatch3x3", c, LABELS)),
}


def inputs_for(name: str) -> tuple[Tensor, Tensor]:
    return (X if name in ("damped", "from_config") else IMAGE), PLANES


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_fused_whatever_its_parts_are_wrapped_in(name: str) -> None:
    network, original = BLOCKS[name](), BLOCKS[name]()
    report = accelerate(network)
    blocks = [row for row in report.rows if row.kind == "block"]
    assert len(blocks) == (1 if isinstance(network, foreign.Unit) else 2)
    assert all(row.replaced for row in blocks), str(report)
    assert {row.note for row in report.left} <= {"it is fused already"}
    assert_equal_in_use(network, original, inputs_for(name))
    assert not report.calls_left


@pytest.mark.parametrize(("block", "reason"), [
    (fb.Noisy, "ones_like beside its norms and convs"),
    (fb.Dropping, "in training it computes something else than in eval mode"),
])
def test_a_block_of_another_kind_is_listed_and_its_norms_are_fused(
        block: type[nn.Module], reason: str) -> None:
    network, original = stack(block), stack(block)
    report = accelerate(network)
    assert {(row.kind, row.note) for row in report.left} == {("block", reason)}
    assert sum(row.kind == "norm" for row in report.replaced) == 4
    assert_equal_in_use(network, original, (IMAGE, PLANES))


@pytest.mark.parametrize(("norm", "words"), [
    (fb.NearestExact, "resized by nearest-exact"), (fb.Strided, "cut to another size"),
    (fb.Pooled, "adaptive_max_pool2d"), (fb.Residual, "normalised in two ways"),
    (fb.Checkpointed, "buffer plain.running_mean differs"),
])
def test_norms_of_neighbouring_kinds_are_listed(norm: type[nn.Module], words: str) -> None:
    network, original = stirred(norm(6, LABELS)), stirred(norm(6, LABELS))
    original.load_state_dict(network.state_dict())
    (row,) = accelerate(network).rows
    assert not row.replaced
    assert words in row.note
    assert_equal_in_use(network, original, (X, PLANES))


def test_a_norm_that_two_blocks_share_counts_once_for_each_call() -> None:
    def shared() -> nn.Module:
        network = stack()
        network.blocks[1].n_0 = network.blocks[0].n_0
        return network

    network, original = shared(), shared()
    assert sum(row.kind == "block" for row in accelerate(network).replaced) == 2
    assert_equal_in_use(network, original, (IMAGE, PLANES))
    assert int(network.blocks[0].n_0.plain.num_batches_tracked) == 4


@pytest.mark.parametrize("kind", ["forward", "pre"])
@pytest.mark.parametrize("where", ["blocks.0", "blocks.0.c_1", "blocks.0.c_1.inside",
                                   "blocks.0.c_0", "blocks.0.n_1", "blocks.0.n_1.factor",
                                   "blocks.0.act"])
@pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
def test_hooks_inside_a_wrapped_block_are_obeyed(where: str, kind: str) -> None:
    network, original = stack(), stack()
    accelerate(network)
    network(IMAGE, PLANES), original(IMAGE, PLANES)
    before = original.eval()(IMAGE, PLANES)
    for m in (network, original):
        part = m.get_submodule(where)
        if kind == "forward":
            part.register_forward_hook(lambda _, __, out: 1.5 * out)
        else:
            part.register_forward_pre_hook(lambda _, args: (1.5 * args[0], *args[1:]))
    assert max_error(original(IMAGE, PLANES), before) > 1e-4
    assert_equal_in_use(network, original, (IMAGE, PLANES))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "wrapped_activation": lambda m: setattr(m.blocks[0].c_0, "act", nn.Tanh()),
    "weight": lambda m: m.blocks[0].weight.data.fill_(2.0),
    "wrapped_conv": lambda m: setattr(m.blocks[0].c_1, "inside", stirred(nn.Conv2d(6, 6, 1))),
    "norm": lambda m: setattr(m.blocks[0], "n_1", m.blocks[1].n_1),
    "own_norm": lambda m: setattr(m.blocks[0], "n_1", stirred(own_norm(6, LABELS))),
    "slope": lambda m: setattr(m.blocks[0].act, "negative_slope", 0.9),
    "eps": lambda m: setattr(m.blocks[1].n_0.plain, "eps", 1.0),
    "forward": lambda m: setattr(m.blocks[0].c_0, "forward", lambda x: x),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
def test_changes_inside_a_wrapped_block_are_seen(name: str) -> None:
    network, original = (stack(fb.Weighed, act=nn.LeakyReLU(0.2)) for _ in range(2))
    accelerate(network)
    network.eval()(IMAGE, PLANES)
    before = original.eval()(IMAGE, PLANES)
    for m in (network, original):
        CHANGES[name](m)
        m.eval()
    assert max_error(original(IMAGE, PLANES), before) > 1e-5
    for training in (True, False):
        network.train(training), original.train(training)
        assert_equal(step(network, (IMAGE, PLANES)), step(original, (IMAGE, PLANES)))


def test_convs_without_tables_leave_blocks_alone_on_a_cpu() -> None:
    report = accelerate(unit(norm=lambda c: foreign.LayoutNorm(c, LABELS, 8, size=5)))
    (row,) = [row for row in report.rows if row.kind == "block"]
    assert not row.replaced
    assert row.note == "norm_0 has no tables: on a CPU its parts are faster one by one"


def ran_as_written(module: nn.Module, *inputs: Tensor) -> list[str]:
    return [choice.op for choice in explain(module, *inputs).choices
            if choice.reason == "so small that it is faster as it was written"]


@needs_cpu
@pytest.mark.usefixtures("as_in_use")
def test_small_calls_run_as_they_were_written_and_larger_ones_do_not() -> None:
    """64 channels of 3x3 convs over 64: 50 million multiply-adds are 435 pixels."""
    norm = foreign.LayoutNorm(64, 35, 64).eval()
    original = copy.deepcopy(norm)
    report = accelerate(norm)
    per_pixel = 9 * (2 * 64 * 64 + 35 * 64)
    for size in (4, 16, 22, 24, 32):
        x, planes = torch.randn(1, 64, size, size), label_map(size, batch=1, labels=35).float()
        small = size * size * per_pixel < norms.SMALL
        assert small == (size < 24)
        assert ran_as_written(norm, x, planes) == (["AcceleratedLayoutNorm"] if small else [])
        with torch.no_grad():
            y = norm(x, planes)
            assert torch.equal(y, original(x, planes)) if small else torch.allclose(
                y, original(x, planes), atol=1e-4)
        assert ran_as_written(norm, x.repeat(3, 1, 1, 1), planes.repeat(3, 1, 1, 1)) == (
            ["AcceleratedLayoutNorm"] if 3 * size * size * per_pixel < norms.SMALL else [])
    assert not report.calls_left  # a choice, not a failure


@needs_cpu
@pytest.mark.usefixtures("as_in_use")
def test_a_norm_without_tables_runs_as_written_until_its_passes_pay() -> None:
    norm = foreign.LayoutNorm(64, 7, 4, size=5).eval()
    accelerate(norm)
    for size, small in ((64, True), (127, True), (128, False)):
        x, planes = torch.randn(1, 64, size, size), label_map(128, batch=1).float()
        assert ran_as_written(norm, x, planes) == (["AcceleratedLayoutNorm"] if small else [])
    with use_path("dense"):  # which was asked for
        assert not ran_as_written(norm, torch.randn(1, 64, 64, 64), planes)


@needs_cpu
@pytest.mark.usefixtures("as_in_use")
def test_a_block_is_small_where_a_norm_of_it_is() -> None:
    block = foreign.Unit(64, 32, lambda c: foreign.LayoutNorm(c, 35, 64)).eval()
    accelerate(block)
    x, planes = torch.randn(1, 64, 16, 16), label_map(16, batch=1, labels=35).float()
    assert ran_as_written(block, x, planes) == ["AcceleratedUnit", *["AcceleratedLayoutNorm"] * 3]
    wide = torch.randn(1, 64, 48, 48)
    assert not ran_as_written(block, wide, label_map(48, batch=1, labels=35).float())


@pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
@pytest.mark.usefixtures("as_in_use")
def test_a_small_call_follows_what_has_changed() -> None:
    norm, original = norm_of(), norm_of()
    accelerate(norm)
    for m in (norm, original):
        m.param_free_norm.eps = 1.0
        m.mlp_gamma.register_forward_hook(lambda _, __, out: 2 * out)
    assert torch.equal(norm(X, PLANES), original(X, PLANES))


def calls_of(function: Callable[[], Any]) -> int:
    """How many Python and C functions a call takes, once all is warm."""
    for _ in range(3):
        function()
    profile = cProfile.Profile()
    profile.runcall(function)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@needs_cpu
@pytest.mark.parametrize(("small", "most"), [(True, 40), (False, 640)])
@torch.no_grad()
def test_what_a_replaced_norm_costs_beside_its_kernels_stays_small(
        small: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions called more than by the original; times are no test."""
    monkeypatch.setattr(swap._sizes, "any", not small)
    norm = norm_of().eval()
    original = copy.deepcopy(norm)
    accelerate(norm)
    with use_path("dense" if not small else "auto"):
        more = calls_of(lambda: norm(X, PLANES)) - calls_of(lambda: original(X, PLANES))
    assert more < most


def test_the_report_tells_expected_and_measured_gains() -> None:
    network = stack()
    assert accelerate(network).gain is None
    assert "measured" not in str(accelerate(network))
    report = accelerate(network, verify=(IMAGE, PLANES))
    assert report.gain is not None and report.gain > 0
    text = str(report).splitlines()
    assert any(line.startswith("expected: 4 norms by tables") for line in text)
    assert f"measured: {report.gain:.2f} times as fast, the faster of two calls each" in text
    mirrored = stirred(foreign.LayoutNorm(6, LABELS, 8, size=5))
    assert "0 norms by tables" in str(accelerate(mirrored))
    assert "1 with their convs" in str(accelerate(mirrored))
    assert "expected" not in str(accelerate(nn.Sequential(nn.InstanceNorm2d(4), nn.ReLU())))


def test_a_slower_model_measures_a_gain_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured gain is time before over time after."""
    seconds = iter([0.0, 6.0, 10.0, 14.0, 20.0, 28.0, 40.0, 50.0])
    monkeypatch.setattr("smis_kernels.acceleration.model.perf_counter", lambda: next(seconds))
    assert accelerate(stack(), verify=(IMAGE, PLANES)).gain == 4.0 / 8.0


def test_own_norms_of_a_block_are_never_replaced_themselves() -> None:
    network = stack(norm=own_norm)
    report = accelerate(network)
    assert [row.note for row in report.rows if row.kind == "norm"] == ["it is fused already"] * 4
    assert all(type(m) is SPADE for m in network.modules() if isinstance(m, CGNorm))
    with use_backend("reference"), torch.no_grad():
        original = stack(norm=own_norm)
        assert torch.equal(network.eval()(IMAGE, PLANES), original.eval()(IMAGE, PLANES))


@pytest.mark.parametrize("change", [
    lambda norm: norm.eval(), lambda norm: setattr(norm.param_free_norm, "eps", 1.0),
], ids=["frozen", "eps"])
def test_own_norms_of_one_input_keep_settings_of_their_own(
        change: Callable[[Any], Any]) -> None:
    """One read serves both only while they are set alike."""
    network, original = BLOCKS["from_config"]().train(), BLOCKS["from_config"]().train()
    accelerate(network)
    before = original(X, PLANES)
    assert isinstance(network, swap.Fused) and max_error(network(X, PLANES), before) < 1e-10
    for block in (network, original):
        change(block.norm_s)
    expected = original(X, PLANES)
    assert max_error(expected, before) > 1e-3
    assert max_error(network(X, PLANES), expected) < 1e-10


@needs_cpu
@pytest.mark.parametrize("hidden", [(16, 0), (0, 16)])
def test_norms_of_different_reach_pick_from_their_own_tables(hidden: tuple[int, int]) -> None:
    """5x5 windows are more than 3x3 ones: an index of the former is outside the latter's table."""
    torch.manual_seed(0)
    pair = [stirred(SPADE(8, LABELS, h)).eval() for h in hidden]
    x, planes = normal(2, 8, 24, 24), label_map(24)
    with use_path("two_level"):
        made = modulate_pair(*pair, x, planes)
        alone = pair[0](x, planes, activation="leaky_relu"), pair[1](x, planes)
    with use_backend("reference"):
        written = pair[0](x, planes, activation="leaky_relu"), pair[1](x, planes)
    for a, b, c in zip(made, alone, written, strict=True):
        assert torch.equal(a, b)
        assert max_error(a, c) < 1e-9


class Shifted(nn.Module):
    """A block whose last sum is with a parameter, a number or a pixel: no residual of its conv."""

    def __init__(self, shift: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(foreign.LayoutNorm(64, LABELS, 8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.shift = shift

    def forward(self, x: Tensor, planes: Tensor) -> Tensor:
        h = self.convs[0](torch.relu(self.norms[0](x, planes)))
        return x + (self.convs[1](torch.relu(self.norms[1](h, planes))) + self.shift)


@needs_cpu
@pytest.mark.parametrize("shift", [0.5, nn.Parameter(torch.full((1, 64, 1, 1), 0.25))])
def test_what_is_no_feature_map_is_added_as_it_was_written(shift: Any) -> None:
    torch.manual_seed(0)
    block = stirred(Shifted(copy.deepcopy(shift))).eval()
    x, planes = normal(1, 64, 64, 64), label_map(64)[:1]
    expected = block(x, planes)
    accelerate(block)
    assert max_error(block(x, planes), expected) < 1e-9


class Damped(Shifted):
    def forward(self, x: Tensor, planes: Tensor) -> Tensor:
        h = self.convs[0](torch.relu(self.norms[0](x, planes)))
        return torch.add(x, self.convs[1](torch.relu(self.norms[1](h, planes))), alpha=self.shift)


@needs_cpu
def test_a_weighed_sum_is_no_plain_one() -> None:
    torch.manual_seed(0)
    block = stirred(Damped(0.1)).eval()
    x, planes = normal(1, 64, 32, 32), label_map(32)[:1]
    expected = block(x, planes)
    accelerate(block)
    assert max_error(block(x, planes), expected) < 1e-9


@pytest.mark.parametrize("kind", ["attribute", "class attribute"])
def test_what_goes_while_something_else_comes_is_seen(kind: str) -> None:
    """As many names as before, and the missing one was None or may have been changed in place."""
    class Kept(nn.Module):
        table: ClassVar[Any] = [1]

        def __init__(self) -> None:
            super().__init__()
            self.scale = None

    module = Kept()
    noted = Settings(module)
    assert noted.change() is None
    if kind == "attribute":
        del module.scale
        module.other = 5
    else:
        del Kept.table
        Kept.other = [1]  # type: ignore[attr-defined]
    assert noted.change() is not None


def test_numbers_are_told_apart_as_they_are_written() -> None:
    module: Any = nn.Identity()
    for before, after in ((0.0, -0.0), (float("nan"), 1.0), (1, True), (1, 1.0), (0j, -0j)):
        module.scale = before
        noted = Settings(module)
        assert noted.change() is None  # NaN is itself
        module.scale = after
        assert noted.change() == "it has another scale"


class Gained(foreign.LayoutNorm):
    """A norm with a number that is a tensor, neither parameter nor buffer."""

    def __init__(self, gain: float) -> None:
        super().__init__(6, LABELS, 8)
        self.gain = torch.tensor(gain, dtype=torch.float64)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) * self.gain


class Weighted(foreign.LayoutNorm):
    """A norm with an array whose repr does not tell the entry that counts."""

    def __init__(self, gain: float) -> None:
        super().__init__(6, LABELS, 8)
        self.gains = np.ones(2000)
        self.gains[1000] = gain

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) * float(self.gains[1000])


class Arrayed(foreign.LayoutNorm):
    """A norm with an array that is none of numpy's."""

    def __init__(self, gain: float) -> None:
        super().__init__(6, LABELS, 8)
        self.gains = array("d", [gain])

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) * self.gains[0]


@pytest.mark.parametrize("norm", [Gained, Weighted, Arrayed])
def test_norms_that_differ_in_one_number_alone_keep_their_own(
        norm: Callable[[float], nn.Module]) -> None:
    norms_of_gains = stirred(nn.ModuleList(map(norm, (2.0, 3.0, 2.0))))
    originals = copy.deepcopy(norms_of_gains)
    assert len(accelerate(norms_of_gains).replaced) == 3
    for fused, original in zip(norms_of_gains, originals, strict=True):
        assert max_error(fused(X, PLANES), original(X, PLANES)) < 1e-10
