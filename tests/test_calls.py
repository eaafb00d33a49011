"""What is kept of a call that was made before: its checks and choices, never a number."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import calls
from smis_kernels import (
    SPADE,
    CGNorm,
    ConditionalNorm2d,
    InstanceNormAct2d,
    LabelLayout,
    MultiSPADE,
    explain,
    modulation,
    norm_act,
    use_backend,
    use_path,
)
from smis_kernels.layout import planner
from smis_kernels.layout.table_cache import TableCache
from smis_kernels.modules.spade import modulate_pair
from smis_kernels.ops.indexed_modulation.op import indexed_modulation
from smis_kernels.ops.modulation import op as modulation_op
from smis_kernels.ops.norm_act import op as norm_act_op
from smis_kernels.ops.normalization import fixed_statistics
from smis_kernels.runtime import checked, library
from smis_kernels.runtime.backend import BackendError, missing
from smis_kernels.runtime.checked import Checked

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
CHANNELS, CLASSES = 6, 4


def features(n: int = 2, size: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n * size)
    return torch.randn((n, CHANNELS, size, size), generator=generator).to(dtype)


def a_layout(n: int = 2) -> LabelLayout:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(CLASSES, (n, 3, 3), generator=generator).repeat_interleave(4, 1)
    return LabelLayout.from_labels(labels.repeat_interleave(4, 2), CLASSES)


class Pair(nn.Module):
    """Two norms that share a read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SPADE(CHANNELS, CLASSES, 8), SPADE(CHANNELS, CLASSES, 8)

    def forward(self, x: Tensor, layout: LabelLayout) -> Tensor:
        return torch.cat(modulate_pair(self.first, self.second, x, layout), 1)


class Multi(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = MultiSPADE(CHANNELS, [(CLASSES, 8), (CLASSES, 0)])

    def forward(self, x: Tensor, layout: LabelLayout) -> Tensor:
        return self.norm(x, layout, layout)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ConditionalNorm2d(CHANNELS, CLASSES)

    def forward(self, x: Tensor, layout: LabelLayout) -> Tensor:
        return self.norm(x, torch.tensor([3, 1]))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: SPADE(CHANNELS, CLASSES, 8),
    "instance": lambda: SPADE(CHANNELS, CLASSES, 8, norm="instance"),
    "grouped": lambda: CGNorm(CHANNELS, CLASSES, 8, groups=2, shared_groups=1),
    "single": lambda: SPADE(CHANNELS, CLASSES, 0),
    "pair": Pair, "multi": Multi, "conditional": Conditional,
}


def _optimizer(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(module.parameters(), lr=0.1).step()
    module.zero_grad()


def _data(module: nn.Module) -> None:
    for t in module.state_dict().values():  # which share their memory with the module's
        if t.is_floating_point():
            t.data.mul_(1.5).add_(0.25)


def _numpy(module: nn.Module) -> None:
    for t in module.state_dict().values():
        if t.is_floating_point():
            t.numpy()[...] += 0.25


def _loaded(module: nn.Module) -> None:
    module.load_state_dict({k: v + 0.5 if v.is_floating_point() else v
                            for k, v in module.state_dict().items()})


def _assigned(module: nn.Module) -> None:
    module.load_state_dict({k: v + 0.5 if v.is_floating_point() else v
                            for k, v in module.state_dict().items()}, assign=True)


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point():
                t.add_(0.5)


def _trained(module: nn.Module) -> None:
    if not any(name.endswith("running_mean") for name, _ in module.named_buffers()):
        return _in_place(module)
    module.train()
    with torch.no_grad():
        module(3 * features().double() + 1, a_layout())
    module.eval()
    return None


def _eps(module: nn.Module) -> None:
    part: Any
    for part in module.modules():
        if hasattr(part, "eps"):
            part.eps = 0.5


CHANGES = (_optimizer, _data, _numpy, _loaded, _assigned, _in_place, _trained, _eps)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("name", NORMS)
def test_a_change_is_seen_by_the_next_call(name: str, change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    module, x, layout = NORMS[name]().double().eval(), features().double(), a_layout()
    with torch.no_grad():
        before = [module(x, layout) for _ in range(3)][-1]
        change(module)
        found = module(x, layout)
        with use_backend("reference"):
            expected = module(x, layout)
    torch.testing.assert_close(found, expected)
    assert (found - before).abs().max() > 1e-3


OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"negative_slope": 0.4}, {"eps": 0.5}, {"num_groups": 3}, {"activation": "relu"},
    {"norm": "batch"}, {"norm": "batch", "momentum": 0.5}, {"norm": "batch", "training": False})


@pytest.mark.parametrize("op", [modulation, indexed_modulation, norm_act])
def test_another_option_is_seen_by_the_next_call(op: Callable[..., Tensor]) -> None:
    x, gamma, beta = torch.randn(3, 2, CHANNELS, 12, 12, dtype=torch.float64).unbind()
    level = a_layout().level((12, 12))
    rows = torch.randn(len(level.windows3), 2 * CHANNELS, dtype=torch.float64)
    given = {modulation: (gamma, beta), indexed_modulation: (level.index3, rows),
             norm_act: (gamma,)}[op]
    for change in OPTIONS * 2:
        found = []
        for backend in ("auto", "reference"):
            running = [torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()]
            options = {"norm": "group", "num_groups": 2, "training": True, "momentum": 0.1,
                       "activation": "leaky_relu", "running_mean": running[0],
                       "running_var": running[1], **change}
            found.append((op(x, *given, backend=backend, **options), *running))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("change", [_data, _numpy, _loaded, _in_place, _eps],
                         ids=lambda f: f.__name__[1:])
def test_statistics_are_no_part_of_kept_tables(change: Callable[[nn.Module], None]) -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    layout.tables = TableCache()
    with torch.no_grad():
        before = [norm(x, layout) for _ in range(3)][-1]
        kept = copy.deepcopy(norm)
        change(norm.param_free_norm)
        found = norm(x, layout)
        kept.param_free_norm = norm.param_free_norm
        with use_backend("reference"):
            expected = kept(x, a_layout())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-3


class Operators(TorchDispatchMode):
    """Names of the library's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == library.NAMESPACE:
            self.names.append(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


def ran(call: Callable[[], object]) -> set[str]:
    with Operators() as operators:
        call()
    return set(operators.names)


def test_what_is_asked_for_holds_for_calls_that_were_made_before() -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    layout.tables = TableCache()

    def call() -> Tensor:
        return norm(x, layout)

    with torch.no_grad():
        call()
        assert ran(call) == {"fixed_statistics", "indexed_modulation_apply"}
        with use_backend("reference"):
            assert ran(call) == set()
        with use_path("dense"):
            assert {"modulation_apply"} <= ran(call)
            assert "indexed_modulation_apply" not in ran(call)
        norm.backend = "reference"
        assert ran(call) == set()
        norm.backend = None
        assert ran(call) == {"fixed_statistics", "indexed_modulation_apply"}
        norm.train()
        assert "channel_moments" in ran(call)
        norm.eval()
        norm.param_free_norm = nn.InstanceNorm2d(CHANNELS)
        assert ran(call) == {"channel_moments", "indexed_modulation_apply"}
        if missing("triton") is not None or not torch.cuda.is_available():
            with use_backend("cuda"), pytest.raises(BackendError):
                call()


def test_sizes_of_a_layout_have_paths_of_their_own() -> None:
    norm, layout = SPADE(16, CLASSES, 64).eval(), a_layout(1)
    paths = []
    for size in ((96, 96), (3, 3)) * 2:
        x = torch.randn(1, 16, *size)
        paths.append(planner.choose((norm,), x, layout, size).path)
        assert paths[-1] == planner._choose((norm,), x, layout, size, "cpu").path
    assert len(set(paths)) == 2


def test_a_conv_of_another_size_is_not_served_by_tables() -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 0).eval(), features(), a_layout()
    layout.tables = TableCache()
    with torch.no_grad():
        assert "indexed_modulation_apply" in ran(lambda: norm(x, layout))
        norm.mlp_gamma = nn.Conv2d(CLASSES, CHANNELS, 5, padding=2)
        norm.mlp_beta = nn.Conv2d(CLASSES, CHANNELS, 5, padding=2)
        found = norm(x, layout)
        with use_backend("reference"):
            torch.testing.assert_close(found, norm(x, layout))


def test_tables_that_are_kept_from_now_on_change_the_choice(
        monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    free = planner.CPU_RATES._replace(dense=1e12)
    monkeypatch.setattr(planner, "CPU_RATES", free)
    with torch.no_grad():
        for _ in range(2):
            assert "modulation_apply" in ran(lambda: norm(x, layout))
        layout.tables = TableCache()
        assert "indexed_modulation_apply" in ran(lambda: norm(x, layout))
        layout.tables = None
        assert "modulation_apply" in ran(lambda: norm(x, layout))
        monkeypatch.setattr(planner, "CPU_RATES", free._replace(dense=1e-6))
        assert "indexed_modulation_apply" in ran(lambda: norm(x, layout))


def test_reasons_are_given_of_calls_that_were_made_before() -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    first = explain(norm, x, layout)
    with torch.no_grad():
        norm(x, layout)
    assert explain(norm, x, layout) == first
    assert first.choices[0].reason


def test_checks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    activated = InstanceNormAct2d(CHANNELS)
    layout.tables = TableCache()
    expected = norm(x, layout), activated(x)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("checked again")

    for module in (modulation_op, norm_act_op):
        monkeypatch.setattr(module, "check_input", refuse)
    monkeypatch.setattr(planner, "_choose", refuse)
    assert torch.equal(norm(x, layout), expected[0])
    assert torch.equal(activated(x), expected[1])
    with pytest.raises(AssertionError, match="checked again"):
        activated(features(size=11))


def test_bad_arguments_are_refused_after_good_ones() -> None:
    x = features()
    table, index = torch.randn(3, 2 * CHANNELS), torch.zeros((2, 12, 12), dtype=torch.int32)
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    stats: dict[str, Any] = {"running_mean": mean, "running_var": var}
    for _ in range(2):
        modulation(x, x, x, **stats)
        indexed_modulation(x, index, table, **stats)
        norm_act(x, x, norm="batch", **stats)
    with pytest.raises(ValueError, match="gamma: expected shape"):
        modulation(x, x[:, :, 1:], x, **stats)
    with pytest.raises(TypeError, match="beta: expected dtype"):
        modulation(x, x, x.double(), **stats)
    with pytest.raises(TypeError, match="beta: expected a tensor"):
        modulation(x, x, 1.0, **stats)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps"):
        modulation(x, x, x, eps=-1.0, **stats)
    with pytest.raises(ValueError, match="norm: expected"):
        modulation(x, x, x, norm=["batch"], **stats)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation"):
        modulation(x, x, x, activation="gelu", **stats)
    with pytest.raises(ValueError, match="negative_slope"):
        modulation(x, x, x, activation="leaky_relu", negative_slope=2.0, **stats)
    with pytest.raises(ValueError, match="running_mean: expected shape"):
        modulation(x, x, x, running_mean=mean[1:], running_var=var)
    with pytest.raises(ValueError, match="both or neither"):
        modulation(x, x, x, running_mean=mean)
    with pytest.raises(ValueError, match="index: expected shape"):
        indexed_modulation(x, index[:1], table, **stats)
    with pytest.raises(ValueError, match="table: expected shape"):
        indexed_modulation(x, index, table[:, 1:], **stats)
    with pytest.raises(ValueError, match="residual"):
        norm_act(x, x[:1], norm="batch", **stats)
    norm, layout = SPADE(CHANNELS, CLASSES, 8).eval(), a_layout()
    with torch.no_grad():
        norm(x, layout)
        with pytest.raises(ValueError, match="batch size"):
            norm(x[:1], layout)
        norm.label_channels = 9
        with pytest.raises(ValueError, match="segmap"):
            norm(x, layout)


def test_what_autocast_casts_is_refused_without_it() -> None:
    x, wide = features(dtype=torch.bfloat16), features()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = modulation(x, wide, wide, training=True)
            z = norm_act(x, wide)
        assert y.dtype == z.dtype == torch.bfloat16
        with pytest.raises(TypeError, match="gamma: expected dtype"):
            modulation(x, wide, wide, training=True)
        with pytest.raises(TypeError, match="residual: expected dtype"):
            norm_act(x, wide)
    modulation(wide, wide, wide, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert modulation(wide, wide, wide, training=True).dtype == torch.float32


@pytest.mark.parametrize("name", NORMS)
def test_gradients_after_calls_without(name: str) -> None:
    module, x, layout = NORMS[name]().eval().double(), features().double(), a_layout()

    def gradients() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        wanted = [leaf, *module.parameters()]
        return list(torch.autograd.grad(module(leaf, layout).square().sum(), wanted))

    with torch.no_grad():
        for _ in range(2):
            assert not module(x, layout).requires_grad
    found = gradients()
    with torch.no_grad():
        assert not module(x, layout).requires_grad
    with use_backend("reference"):
        expected = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_after_plain_calls() -> None:
    x, gamma = features().double(), features(size=12).double().roll(1, 0)

    def call(t: Tensor) -> Tensor:
        return norm_act(modulation(t, gamma, gamma, training=True, activation="relu"))

    def exact(t: Tensor) -> Tensor:
        with use_backend("reference"):
            return call(t)

    for _ in range(2):
        call(x)
    tangent = torch.ones_like(x).cumsum(3)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent)))
    assert dual.tangent is not None
    torch.testing.assert_close(dual.tangent, torch.func.jvp(exact, (x,), (tangent,))[1])
    torch.testing.assert_close(torch.func.jvp(call, (x,), (tangent,))[1], dual.tangent)
    several = torch.stack([x, 2 * x + 1, x.flip(3)])
    torch.testing.assert_close(torch.func.vmap(call)(several), torch.stack([*map(exact, several)]))
    torch.testing.assert_close(torch.func.grad(lambda t: call(t).square().sum())(x),
                               torch.func.grad(lambda t: exact(t).square().sum())(x))
    call(x)
    with use_backend("cpu"), pytest.raises(RuntimeError), forward_ad.dual_level():
        call(forward_ad.make_dual(x, tangent))  # a kernel has no tangent: refused, never dropped


class Tagged(Tensor):
    """A subclass that computes as a tensor does."""


def test_subclasses_are_checked_every_time() -> None:
    x, kept = features(), len(modulation_op._checked._known)
    expected = modulation(x, x, x, training=True)
    assert len(modulation_op._checked._known) <= kept + 1
    kept = len(modulation_op._checked._known)
    tagged = x.as_subclass(Tagged)
    for _ in range(2):
        torch.testing.assert_close(
            modulation(tagged, x, x, training=True).as_subclass(Tensor), expected)
    assert len(modulation_op._checked._known) == kept
    parameter = nn.Parameter(x)
    assert modulation(parameter, x, x, training=True).requires_grad


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["copied", "pickled"])
def test_copies_are_modules_of_their_own(twin_of: Callable[[Any], Any]) -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    size = len(pickle.dumps((norm, layout)))
    with torch.no_grad():
        layout.level((12, 12))
        compiled = len(pickle.dumps((norm, layout)))
        expected = [norm(x, layout) for _ in range(3)][-1]
        assert len(pickle.dumps((norm, layout))) == compiled > size
        twin, other = twin_of((norm, layout))
        assert torch.equal(twin(x, other), expected)
        _in_place(twin)
        found = twin(x, other)
        assert torch.equal(norm(x, layout), expected)
        assert not torch.equal(found, expected)
        with use_backend("reference"):
            torch.testing.assert_close(found, twin(x, other), rtol=1e-3, atol=1e-3)


def test_hooks_run_at_every_call() -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    with torch.no_grad():
        plain = [norm(x, layout) for _ in range(2)][-1]
        handles = [norm.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:])),
                   norm.register_forward_hook(lambda m, args, y: 2 * y)]
        moved = norm(x - 1, layout)
        torch.testing.assert_close(moved, 2 * plain)
        for handle in handles:
            handle.remove()
        assert torch.equal(norm(x, layout), plain)


def test_compiled_in_one_graph_after_plain_calls() -> None:
    norm, x, layout = SPADE(CHANNELS, CLASSES, 8).eval(), features(), a_layout()
    layout.tables = TableCache()
    activated = InstanceNormAct2d(CHANNELS, activation="relu").eval()

    def call(t: Tensor) -> Tensor:
        return activated(norm(t, layout, activation="leaky_relu"))

    with torch.no_grad():
        expected = [call(x) for _ in range(2)][-1]
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        norm.get_buffer("param_free_norm.running_mean").add_(1)
        torch.testing.assert_close(compiled(x), call(x))
    leaf = x.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    other = x.clone().requires_grad_()
    call(other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    torch._dynamo.reset()


def test_layouts_and_modules_are_not_kept_alive() -> None:
    norm, layout = SPADE(CHANNELS, CLASSES, 8).eval(), a_layout()
    with torch.no_grad():
        norm(features(), layout)
    watched = weakref.ref(norm), weakref.ref(layout)
    del norm, layout
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_few_kinds_of_call_are_known_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "_LIMIT", 3)
    known: Checked[int] = Checked()
    for i in range(10):
        assert known.keep(("call", i), i) == i
        assert known.find(("call", i)) == i
        assert len(known._known) <= 3
    assert known.keep(None, 7) == 7
    assert known.find(None) is None
    assert known.keep(([],), 7) == 7
    assert known.find(([],)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fixed_statistics_are_those_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for channels in (1, 2, 17, 130):
        mean, var = torch.rand((2, channels, 3), generator=generator, dtype=dtype)[..., 1].unbind(0)
        for dense in (mean, mean.contiguous()):
            found = fixed_statistics("cpu", dense, var, 1e-5)
            assert torch.equal(found[0], mean[None])
            assert torch.equal(found[1], torch.rsqrt(var + 1e-5)[None])
            assert all(t.is_contiguous() for t in found)
    special = torch.tensor([0.0, torch.inf, torch.nan, -1.0, 1e-30], dtype=dtype)
    found = fixed_statistics("cpu", torch.zeros(5, dtype=dtype), special, 0.0)[1][0]
    torch.testing.assert_close(found, torch.rsqrt(special), equal_nan=True, rtol=0, atol=0)
    with pytest.raises(ValueError, match="running_var"):
        fixed_statistics("cpu", torch.zeros(5, dtype=dtype), torch.ones(4, dtype=dtype), 0.0)
    with pytest.raises(RuntimeError, match="running_mean"):
        fixed_statistics("cpu", torch.zeros(5).half(), torch.ones(5).half(), 0.0)


def test_fixed_statistics_pass_opcheck() -> None:
    for dtype in (torch.float32, torch.float64):
        mean, var = torch.rand(2, 5, dtype=dtype).unbind(0)
        torch.library.opcheck(fixed_statistics.overload, (mean, var, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64],
                         ids=str)
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64], ids=str)
def test_running_statistics_of_any_dtype(stored: torch.dtype, dtype: torch.dtype) -> None:
    x = features(dtype=dtype)
    mean, var = torch.linspace(-1, 1, CHANNELS), torch.linspace(0.5, 2, CHANNELS)
    stats: dict[str, Any] = {"running_mean": mean.to(stored), "running_var": var.to(stored)}
    found = norm_act(x, norm="batch", **stats)
    wide = {name: t.double() for name, t in stats.items()}
    expected = norm_act(x.double(), norm="batch", backend="reference", **wide)
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps,
                               atol=4 * torch.finfo(dtype).eps)


def test_every_call_of_the_benchmark_is_measured() -> None:
    found = calls.measure(rounds=1, each=1)
    assert {"x + x", "SPADE, batch, tables kept", "InstanceNormAct2d"} <= set(found)
    assert all(spent >= 0 for spent in found.values())


def test_an_option_that_is_a_tensor_is_read_at_every_call() -> None:
    x, slope = features(), torch.tensor(0.2)
    for value in (0.2, 0.7):
        slope.fill_(value)
        found = norm_act_op.norm_act(x, activation="leaky_relu", negative_slope=slope)  # type: ignore[arg-type]
        assert torch.equal(found, norm_act_op.norm_act(x, activation="leaky_relu",
                                                       negative_slope=value))


def test_a_call_that_fails_spoils_no_later_one() -> None:
    x = features(3)
    with pytest.raises(ValueError, match="num_groups"):
        norm_act_op.norm_act(x, norm="group", num_groups=2.0)  # type: ignore[arg-type]
    found = norm_act_op.norm_act(x, norm="group", num_groups=2)
    torch.testing.assert_close(found, torch.nn.functional.group_norm(x, 2))
