"""modulation and modulation_pair against their definition: values, gradients, layouts, errors."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smis_kernels
from smis_kernels import SPADE, BackendError, CGNorm, modulate_pair, modulation, modulation_pair
from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    max_error,
    poisoned_empty,
    with_memory_format,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
SHAPES = [(2, 6, 5, 7), (1, 16, 8, 8), (3, 4, 1, 1), (2, 3, 1, 5), (1, 1, 4, 3), (1, 17, 20, 37)]
NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = (None, "relu", "leaky_relu")


class Case:
    """Inputs of one call and the outputs, running statistics and gradients of any backend."""

    def __init__(self, shape: tuple[int, ...], layout: str, *, pair: bool = False,
                 dtype: torch.dtype = torch.float64, **options: object) -> None:
        n, c, h, w = shape
        up = 2 if options.get("upsample") else 1
        generator = torch.Generator().manual_seed(n * c * h * w)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        self.pair, self.options = pair, options
        self.x = with_memory_format(draw(*shape) + 3, layout)
        self.affine = [with_memory_format(draw(n, c, h * up, w * up), layout) for _ in range(4)]
        self.running = [draw(c), draw(c).abs() + 0.5, draw(c), draw(c).abs() + 0.5]
        if options.get("norm") == "group":
            options["num_groups"] = c

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        kept = (self.x, *self.affine[: 4 if self.pair else 2])
        return kept if dtype is None else tuple(t.to(dtype) for t in kept)

    def run(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        names = ("running_mean", "running_var", "running_mean_s", "running_var_s")
        used = names if self.pair else names[:2]
        state: dict[str, Tensor] = {}

        def call(*tensors: Tensor) -> Tensor:
            state.update({k: v.to(tensors[0].dtype, copy=True)
                          for k, v in zip(used, self.running, strict=False)})
            if self.pair:
                return torch.cat(
                    modulation_pair(*tensors, backend=backend, **state, **self.options), 1)
            return modulation(*tensors, backend=backend, **state, **self.options)

        grads = gradients(call, self.tensors(dtype))
        return [call(*self.tensors(dtype)), *state.values(), *grads]

    def compare(self, backend: str, bound: float = 1e-11) -> None:
        for i, (a, b) in enumerate(zip(self.run(backend), self.run("reference"), strict=True)):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert max_error(a, b) < bound, f"result {i}: {max_error(a, b)}"


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_reference(shape: tuple[int, ...], layout: str) -> None:
    # Each activation meets all the rest: another one for each shape and format.
    first = SHAPES.index(shape) + MEMORY_FORMATS.index(layout)
    options = itertools.product(NORMS, *[(False, True)] * 3)
    for i, (norm, training, upsample, pair) in enumerate(options, first):
        if shape[2] * shape[3] == 1 and norm in ("instance", "group"):
            continue
        Case(shape, layout, pair=pair, norm=norm, training=training, upsample=upsample,
             activation=ACTIVATIONS[i % len(ACTIVATIONS)]).compare("cpu")


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype, layout: str) -> None:
    for training, upsample in itertools.product((False, True), repeat=2):
        case = Case((2, 19, 33, 17), layout, dtype=dtype, training=training, upsample=upsample,
                    activation="leaky_relu", pair=True)
        truth = case.run("reference", torch.float64)
        reference = case.run("reference")
        for i, (a, b, t) in enumerate(zip(case.run("cpu"), reference, truth, strict=True)):
            assert a.dtype == b.dtype
            assert_as_accurate(a, b, t, what=f"result {i}")


@needs_cpu
def test_streamed_output_equals_the_cached_one() -> None:
    # at 8 MiB the kernel starts to write past the caches
    for layout, up in itertools.product(("contiguous", "channels_last"), (False, True)):
        size = (1, 37, 121, 127) if up else (1, 37, 243, 251)
        Case(size, layout, upsample=up, activation="relu", dtype=torch.float32).compare("cpu", 3e-5)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_element_is_written(layout: str) -> None:
    with poisoned_empty():
        for upsample in (False, True):
            case = Case((2, 5, 7, 3), layout, upsample=upsample, training=True, pair=True)
            assert all(torch.isfinite(t).all() for t in case.run("cpu"))


@needs_cpu
@pytest.mark.parametrize("upsample", [False, True])
def test_output_keeps_dtype_and_memory_format(upsample: bool) -> None:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    g = torch.randn(2, 8, 12, 12) if upsample else torch.randn(2, 8, 6, 6)
    y = modulation(x, g, g, training=True, upsample=upsample)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert modulation(x.contiguous(), g, g, training=True, upsample=upsample).is_contiguous()


@needs_cpu
def test_nan_and_infinity_pass() -> None:
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 2], x[0, 1, 0, 0], x[0, 1, 0, 1] = float("nan"), float("inf"), float("-inf")
    ones = torch.ones(1, 2, 4, 4)
    for activation in ACTIVATIONS:
        fused = modulation(x, ones, ones, norm="none", activation=activation, backend="cpu")
        expected = modulation(x, ones, ones, norm="none", activation=activation,
                              backend="reference")
        torch.testing.assert_close(fused, expected, equal_nan=True)
    statistics = modulation(x, ones, ones, training=True, backend="cpu")
    assert torch.isnan(statistics).all()


@needs_cpu
def test_statistics_survive_a_large_mean() -> None:
    x = torch.randn(2, 3, 64, 64) + 10_000
    zero = torch.zeros_like(x)
    truth = F.batch_norm(x.double(), None, None, training=True)
    for t in (x, x.to(memory_format=torch.channels_last)):
        fused = modulation(t, zero, zero, training=True, backend="cpu")
        assert max_error(fused, truth) < 2e-3  # 10000 has 2^-10 of resolution in fp32


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixel", [(0, 0), (0, 63), (8, 0), (16, 0), (20, 30)])
def test_statistics_survive_an_outlier(pixel: tuple[int, int], layout: str) -> None:
    # the variance is that pixel's alone: differences to it would cancel. Planes differ, for one
    # plane has two values, whose rounding is a matter of luck.
    generator = torch.Generator().manual_seed(0)
    level, outlier = torch.rand(2, 2, 40, 1, generator=generator)
    x = level[..., None].expand(2, 40, 64, 64).clone()
    x[:, :, pixel[0], pixel[1]] = 50 + 100 * outlier[..., 0]
    truth = F.instance_norm(x.double())
    zero = torch.zeros_like(x)
    fused = modulation(with_memory_format(x, layout), zero, zero, norm="instance", backend="cpu")
    assert_as_accurate(fused, F.instance_norm(x), truth)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_without_a_graph_break(layout: str) -> None:
    norm_0, norm_s = SPADE(6, 3, 8), CGNorm(6, 3, 9, groups=3)
    x = with_memory_format(torch.randn(2, 6, 8, 8), layout).requires_grad_()
    seg = torch.randn(2, 3, 32, 32)

    def call(x: Tensor) -> Tensor:
        y, y_s = modulate_pair(norm_0, norm_s, x, seg, upsample=True)
        return (y * y_s).sum() + norm_0(x, seg, activation="relu").square().sum()

    state = {k: v.clone() for k, v in norm_0.state_dict().items()}
    expected = torch.autograd.grad(call(x), x)[0]
    after = {k: v.clone() for k, v in norm_0.state_dict().items()}
    norm_0.load_state_dict(state)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x), x)[0]
    torch.testing.assert_close(actual, expected)
    for key, value in norm_0.state_dict().items():
        torch.testing.assert_close(value, after[key])


@needs_cpu
def test_autocast_casts_gamma_and_beta_to_the_input() -> None:
    x = torch.randn(1, 4, 8, 8)
    g, b = torch.randn(2, 1, 4, 8, 8, dtype=torch.bfloat16).unbind(0)
    with pytest.raises(TypeError, match="gamma"):
        modulation(x, g, b, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = modulation(x, g, b, training=True)
        module = SPADE(4, 3)(x, torch.randn(1, 3, 8, 8))
    assert y.dtype == module.dtype == torch.float32
    torch.testing.assert_close(y, modulation(x, g.float(), b.float(), training=True))


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("upsample", [False, True])
def test_triton_equals_reference(layout: str, upsample: bool) -> None:
    for norm, training, pair in (("batch", True, True), ("batch", False, False),
                                 ("instance", True, False), ("group", True, True)):
        Case((2, 5, 7, 6), layout, norm=norm, training=training, upsample=upsample, pair=pair,
             activation="leaky_relu").compare("triton")
    Case((1, 3, 40, 41), layout, training=True, upsample=upsample,
         activation="relu").compare("triton")


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("programs", [1, 512])  # all of a plane, and a tile or two
def test_triton_moments_of_several_tiles(layout: str, programs: int,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from smis_kernels.ops.modulation import triton as kernels

    monkeypatch.setattr(kernels, "MOMENT_PROGRAMS", programs)
    for shape in ((2, 2, 91, 97), (1, 40, 23, 31), (1, 3, 5, 3)):
        x = with_memory_format(torch.randn(shape, dtype=torch.float64) + 50, layout)
        mean, var = kernels.channel_moments(x)
        assert max_error(mean, x.mean((2, 3))) < 1e-14
        assert max_error(var, x.var((2, 3), unbiased=False)) < 1e-12


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("programs", [1, 512])
def test_triton_moments_survive_an_outlier_and_a_large_mean(
    layout: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smis_kernels.ops.modulation import triton as kernels

    monkeypatch.setattr(kernels, "MOMENT_PROGRAMS", programs)
    level, outlier = torch.rand(2, 1, 40, 1, generator=torch.Generator().manual_seed(0))
    for pixel in ((0, 0), (0, 63), (20, 30), (63, 63)):
        x = level[..., None].expand(1, 40, 64, 64).clone()
        x[:, :, pixel[0], pixel[1]] = 50 + 100 * outlier[..., 0]
        mean, var = kernels.channel_moments(with_memory_format(x, layout))
        true_var, true_mean = torch.var_mean(x.double(), (2, 3), correction=0)
        assert float(((mean - true_mean) / true_var.sqrt()).abs().max()) < 3e-6
        assert float((var / true_var - 1).abs().max()) < 1e-5  # 256 sums, one after another
    x = torch.randn(1, 40, 64, 64, generator=torch.Generator().manual_seed(1)) + 10_000
    mean, var = kernels.channel_moments(with_memory_format(x, layout))
    true_var, true_mean = torch.var_mean(x.double(), (2, 3), correction=0)
    assert float((mean - true_mean).abs().max()) < 1e-3  # a unit in the last place of 10000
    assert float((var / true_var - 1).abs().max()) < 1e-4


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="a limit that no GPU has")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_batches_beyond_the_grid(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smis_kernels.runtime.triton_support.GRID_LIMIT", 2)
    Case((5, 3, 2, 3), layout, norm="instance", training=True, upsample=True,
         pair=True).compare("triton")


@pytest.mark.triton
@pytest.mark.parametrize("channels", [17, 40, 130, 280])
def test_triton_channels_that_fill_no_block(channels: int) -> None:
    Case((2, channels, 3, 5), "channels_last", training=True, pair=True,
         activation="leaky_relu").compare("triton")


def test_explain_names_backend_and_path() -> None:
    x = torch.randn(1, 4, 8, 8)
    text = str(smis_kernels.explain(SPADE(4, 3), x, torch.randn(1, 3, 8, 8)))
    assert "modulation" in text
    assert "dense" in text
    with smis_kernels.use_backend("reference"):
        (choice,) = smis_kernels.explain(modulation, x, x, x, training=True).choices
    assert choice.backend == "reference"


def test_an_explicit_backend_never_falls_back() -> None:
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(BackendError, match="cuda"):
        modulation(x, x, x, training=True, backend="cuda")
    with pytest.raises(ValueError, match="expected one of"):
        modulation(x, x, x, training=True, backend="fast")
    with smis_kernels.use_backend("cuda"), pytest.raises(BackendError):
        modulation(x, x, x, training=True)


X = torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize(("change", "words"), [
    ({"input": X[0]}, "input: expected (N, C, H, W), got shape (4, 6, 6)"),
    ({"input": X.int()}, "input: expected dtype"),
    ({"input": 3.0}, "input: expected a tensor"),
    ({"gamma": X[:, :3]}, "gamma: expected shape (2, 4, 6, 6)"),
    ({"beta": X.double()}, "beta: expected dtype float32; got float64"),
    ({"gamma": X.to("meta")}, "gamma: expected the device of input (cpu), got meta"),
    ({"upsample": True}, "twice the input's H and W"),
    ({"running_mean": torch.zeros(3), "running_var": torch.ones(3)}, "running_mean: expected"),
    ({"running_mean": torch.zeros(4)}, "running_mean, running_var: expected both"),
    ({"norm": "layer"}, "norm: expected one of batch"),
    ({"norm": "group", "num_groups": 3}, "num_groups: expected a divisor of the 4"),
    ({"activation": "gelu"}, "activation: expected None"),
    *(({"activation": "leaky_relu", "negative_slope": slope}, "negative_slope: expected")
      for slope in (-1, 0, 1.0, 2)),
    ({"norm": "group", "num_groups": 4, "input": X[:1, :, :1, :1], "gamma": X[:1, :, :1, :1],
      "beta": X[:1, :, :1, :1]}, "more than one value"),
    ({"input": X[:1, :, :1, :1], "gamma": X[:1, :, :1, :1], "beta": X[:1, :, :1, :1]},
     "more than one value"),
])
def test_bad_arguments_name_themselves(change: dict[str, object], words: str) -> None:
    arguments = {"input": X, "gamma": X, "beta": X, "training": True, **change}
    with pytest.raises((ValueError, TypeError)) as error:
        modulation(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_running_statistics_are_given_for_both_outputs_or_neither() -> None:
    given = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    for running in (given, {f"{name}_s": value for name, value in given.items()}):
        with pytest.raises(ValueError, match=r"running_mean_s: expected .* for both outputs"):
            modulation_pair(X, X, X, X, X, **running)


@pytest.mark.parametrize("shape", [(0, 4, 6, 6), (2, 4, 0, 6), (2, 4, 6, 0)], ids=str)
def test_empty_input_gives_empty_output(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert modulation(x, x, x, training=True, activation="relu").shape == shape


def test_modules_match_their_definition_and_keys() -> None:
    norm = CGNorm(8, 6, 12, groups=4, shared_groups=2, norm="batch").double().eval()
    assert list(norm.state_dict()) == [
        "param_free_norm.running_mean", "param_free_norm.running_var",
        "param_free_norm.num_batches_tracked", "mlp_shared.0.weight", "mlp_shared.0.bias",
        "mlp_gamma.weight", "mlp_gamma.bias", "mlp_beta.weight", "mlp_beta.bias",
    ]
    x, seg = torch.randn(2, 8, 10, 6).double(), torch.randn(2, 6, 33, 17).double()
    hidden = F.relu(norm.mlp_shared[0](F.interpolate(seg, (10, 6))))
    expected = norm.param_free_norm(x) * (1 + norm.mlp_gamma(hidden)) + norm.mlp_beta(hidden)
    torch.testing.assert_close(norm(x, seg), expected)
    plain = SPADE.from_config("spectralspadesyncbatch5x5", 8, 6)
    assert plain.synchronized
    assert plain.mlp_gamma.weight.shape == (8, 128, 5, 5)
    for text in ("spadelayer3x3", "spadebatch3x5", "batch"):
        with pytest.raises(ValueError, match="config_text"):
            SPADE.from_config(text, 8, 6)
    with pytest.raises(ValueError, match="segmap: expected"):
        plain(x.float(), seg[:, :2].float())
    with pytest.raises(ValueError, match="groups: expected a divisor of 8"):
        CGNorm(8, 6, 12, groups=3)
    with pytest.raises(ValueError, match="norm_s: expected the settings"):
        modulate_pair(plain, SPADE(8, 6, norm="instance"), x.float(), seg.float())
    with pytest.raises(ValueError, match=r"segmap: expected \(N, 5, H, W\)"):
        modulate_pair(plain, SPADE(8, 5, norm="syncbatch"), x.float(), seg.float())
    for few in (seg[:1], torch.cat([seg, seg])):
        with pytest.raises(ValueError, match="segmap: expected the batch size 2"):
            norm(x, few)


def _gradients(data: dict[str, Any], batch: slice, training: bool, backend: str,
               group: Any = None) -> tuple[Tensor, ...]:
    """The input's gradient by the kernels, and that of a penalty on it."""
    x = data["x"][batch].detach().requires_grad_()
    cot, (gamma, beta) = data["x"][batch].detach(), data["cot"][batch, :, :, :4].split(5, 2)

    def weighted() -> Tensor:
        y = modulation(x, gamma, beta, training=bool(training), activation="leaky_relu",
                       process_group=group, backend=backend)
        return (y * cot).sum()

    plain, = torch.autograd.grad(weighted(), x)
    first, = torch.autograd.grad(weighted(), x, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), x)
    return plain, first.detach(), second


def _process(rank: int, directory: str) -> None:
    import torch.distributed as dist

    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    data = torch.load(f"{directory}/data.pt", weights_only=True)
    batch = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares
    results = {}
    for backend in ("cpu", "reference") if missing("cpu") is None else ("reference",):
        norm_0, norm_s = (SPADE(6, 3, norm="syncbatch", backend=backend).double() for _ in "ab")
        norm_0.load_state_dict(data["state"])
        norm_s.load_state_dict(data["state"])
        x = data["x"][batch].requires_grad_()
        y, y_s = modulate_pair(norm_0, norm_s, x, data["seg"][batch], upsample=True)
        ((y * data["cot"][batch]).sum() + y_s.square().sum()).backward()
        results[backend] = {"y": y.detach(), "grad": x.grad, "state": norm_s.state_dict()}
        single = SPADE(6, 3, norm="syncbatch", backend=backend).double()
        single.load_state_dict(data["state"])
        one = slice(rank, rank + 1)  # a single value in each process
        results[backend]["one"] = single(data["x"][one, :, :1, :1], data["seg"][one]).detach()
        results[backend]["penalty"], results[backend]["local"] = (
            _gradients(data, batch, training, backend, dist.group.WORLD) for training in (1, 0))
    groups = [dist.new_group([r]) for r in range(2)]
    alone, local = SPADE(6, 3, norm="syncbatch").double(), SPADE(6, 3).double()
    alone.param_free_norm = nn.SyncBatchNorm(6, affine=False, process_group=groups[rank]).double()
    alone.load_state_dict(data["state"])
    local.load_state_dict(data["state"])
    given = data["x"][batch], data["seg"][batch]
    results["own group"] = torch.stack([alone(*given), local(*given)]).detach()
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.barrier()
    # Threads of gloo may still run when the interpreter is torn down, which aborts the process.
    os._exit(0)


def test_synchronized_statistics_equal_one_process(tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    torch.manual_seed(0)
    module = SPADE(6, 3).double()
    data = {"x": torch.randn(4, 6, 5, 4).double() + 2, "seg": torch.randn(4, 3, 10, 8).double(),
            "cot": torch.randn(4, 6, 10, 8).double(), "state": module.state_dict()}
    torch.save(data, tmp_path / "data.pt")
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    twin = SPADE(6, 3).double()
    twin.load_state_dict(data["state"])
    module.load_state_dict({k: v.clone() for k, v in data["state"].items()})
    x = data["x"].requires_grad_()
    y, y_s = modulate_pair(module, twin, x, data["seg"], upsample=True)
    ((y * data["cot"]).sum() + y_s.square().sum()).backward()
    for rank in ranks:
        torch.testing.assert_close(*rank.pop("own group"))
    single = SPADE(6, 3).double()
    single.load_state_dict({k: v.clone() for k, v in data["state"].items()})
    one = single(data["x"][:2, :, :1, :1].detach(), data["seg"][:2]).detach()
    for backend in ranks[0]:
        got = [r[backend] for r in ranks]
        joined = tuple(map(torch.cat, zip(*(g["penalty"] for g in got), strict=True)))
        torch.testing.assert_close(joined, _gradients(data, slice(0, 4), True, "reference"))
        for g, batch in zip(got, (slice(0, 1), slice(1, 4)), strict=True):  # eval: its own values
            torch.testing.assert_close(g["local"], _gradients(data, batch, False, "reference"))
        torch.testing.assert_close(torch.cat([g["one"] for g in got]), one)
        torch.testing.assert_close(torch.cat([g["y"] for g in got]), y.detach())
        torch.testing.assert_close(torch.cat([g["grad"] for g in got]), x.grad)
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(got[1]["state"][key], value)
