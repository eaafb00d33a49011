"""norm_act against its definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import explain, modulation
from smis_kernels.modules.norm_act import InstanceNormAct2d
from smis_kernels.ops.indexed_modulation.op import indexed_modulation
from smis_kernels.ops.norm_act import reference
from smis_kernels.ops.norm_act.op import norm_act
from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.runtime.check import FLOATS
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    poisoned_empty,
    with_memory_format,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
BACKENDS = (pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=pytest.mark.triton))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((1, 1, 2, 1), (2, 5, 3, 7), (1, 67, 9, 5), (2, 3, 40, 41))
ACTIVATIONS = (None, "relu", "leaky_relu")


def _place(backend: str) -> str:
    return DEVICE if backend == "triton" and not triton_interpreted() else "cpu"


def _tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, r = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (2 * x + 1).to(dtype), r.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, ...], layout: str, added: bool, activation: str | None,
                 backend: str) -> None:
    x, r = (with_memory_format(t.to(_place(backend)), layout) for t in _tensors(shape))
    r = r if added else None
    options = {"norm": "instance", "activation": activation}
    expected = reference.norm_act(x, r, **options)
    truth = reference.norm_act(x.double(), None if r is None else r.double(), **options)
    with poisoned_empty():
        found = norm_act(x, r, **options, backend=backend)
    assert_as_accurate(found, expected, truth, factor=4)
    assert found.is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", ["instance", "batch", "group", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes_norms_and_gradients(layout: str, norm: str, dtype: torch.dtype) -> None:
    x, r = (with_memory_format(t, layout) for t in _tensors((2, 6, 11, 13), dtype))
    options = {"norm": norm, "num_groups": 3, "activation": "leaky_relu", "training": True}

    def run(backend: str, *tensors: Tensor) -> list[Tensor]:
        def call(x: Tensor, r: Tensor) -> Tensor:
            return norm_act(x, r, **options, backend=backend)

        return [call(*tensors), *gradients(call, tensors)]

    with poisoned_empty():
        found = run("cpu", x, r)
    expected, truth = run("reference", x, r), run("reference", x.double(), r.double())
    for name, *three in zip(("y", "dx", "dr"), found, expected, truth, strict=True):
        floor = 8 * torch.finfo(dtype).eps
        assert_as_accurate(*three, what=name, factor=3, floor=floor)
        assert three[0].dtype == dtype


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_gradients(layout: str) -> None:
    x, r = (with_memory_format(t.to(_place("triton")), layout) for t in _tensors((2, 5, 6, 7)))
    for activation in ACTIVATIONS:
        found, expected = (
            gradients(partial(norm_act, activation=activation, backend=kind), (x, r))
            for kind in ("triton", "reference")
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_are_rounded_as_torch_rounds(layout: str, dtype: torch.dtype) -> None:
    """Every number of 16 bits: ties to even, subnormals, overflow, infinity and NaN."""
    every = torch.arange(1 - 2**15, 2**15).short().view(dtype).view(1, 255, 257, 1)
    order = torch.randperm(every.numel(), generator=torch.Generator().manual_seed(0))
    for other in (torch.zeros_like(every), every.flip(1, 2), every.roll(7, 2) / 2,
                  every.flatten()[order].view_as(every)):
        x, r = (with_memory_format(t, layout) for t in (every, other))
        found = norm_act(x, r, norm="none", backend="cpu")
        expected = (x.float() + r.float()).to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


@needs_cpu
@pytest.mark.parametrize(("layout", "bound"), [("contiguous", 1e-6), ("channels_last", 1e-5)])
@pytest.mark.parametrize("op", [norm_act, modulation, indexed_modulation])
def test_gradients_of_large_planes_keep_their_digits(op: Callable[..., Tensor], layout: str,
                                                     bound: float) -> None:
    """A constant gradient has no part that moves: its sums have to cancel it."""
    generator = torch.Generator().manual_seed(0)
    x = with_memory_format(torch.randn(1, 2, 1024, 1024, generator=generator), layout)
    given = {norm_act: (), modulation: (torch.zeros_like(x),) * 2, indexed_modulation: (
        torch.zeros(1, 1024, 1024, dtype=torch.int32), torch.zeros(1, 4))}
    y = op(x.requires_grad_(), *given[op], norm="instance", backend="cpu")
    (found,) = torch.autograd.grad(y, x, torch.full_like(y, 1 / 3))
    assert float(found.abs().max()) < bound


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_output_is_streamed(layout: str) -> None:
    x, r = (with_memory_format(t, layout) for t in _tensors((1, 33, 260, 261)))
    with poisoned_empty():
        found = norm_act(x, r, activation="relu", backend="cpu")
    truth = reference.norm_act(x.double(), r.double(), norm="instance", activation="relu")
    assert_as_accurate(found, truth.float(), truth)


@needs_cpu
def test_running_statistics() -> None:
    x, r = _tensors((2, 4, 5, 6))
    ours, theirs = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, affine=False)
    for training in (True, False):
        theirs.train(training)
        found = norm_act(x, r, norm="batch", running_mean=ours.running_mean,
                         running_var=ours.running_var, training=training, activation="relu",
                         backend="cpu")
        torch.testing.assert_close(found, theirs(x).relu() + r)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


@needs_cpu
def test_nan_survives() -> None:
    x, _ = _tensors((1, 2, 4, 4))
    x[0, 1, 2, 3] = float("nan")
    found = norm_act(x, activation="relu", backend="cpu")
    assert bool(found[0, 1].isnan().all())
    assert bool(found[0, 0].isfinite().all())


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, r: norm_act(x, r, activation="relu") * 2, fullgraph=True,
                             backend="aot_eager")
    for size in ((7, 9), (8, 11)):
        x, r = (with_memory_format(t, layout) for t in _tensors((1, 3, *size)))
        a, b = (x.clone().requires_grad_() for _ in range(2))
        found, expected = compiled(a, r), norm_act(b, r, activation="relu") * 2
        assert torch.equal(found, expected)
        (found.square().sum() + expected.square().sum()).backward()
        torch.testing.assert_close(a.grad, b.grad)


@needs_cpu
def test_module_is_torchs_own() -> None:
    x, r = _tensors((2, 5, 6, 7))
    ours, theirs = InstanceNormAct2d(5, activation="relu"), nn.InstanceNorm2d(5)
    assert isinstance(ours, nn.InstanceNorm2d)
    assert not ours.state_dict()
    torch.testing.assert_close(ours(x, r), theirs(x).relu() + r)
    leaky = InstanceNormAct2d(5, 0.5, activation="leaky_relu", negative_slope=0.05)
    expected = nn.functional.leaky_relu(nn.InstanceNorm2d(5, 0.5)(x), 0.05)
    torch.testing.assert_close(leaky(x), expected)
    (choice,) = explain(ours, x).choices
    assert (choice.op, choice.backend) == ("norm_act", "cpu")


X = torch.zeros((1, 3, 4, 5))


@pytest.mark.parametrize(
    ("x", "residual", "options", "message"),
    [
        (X[0], None, {}, r"input: expected \(N, C, H, W\)"),
        (X.int(), None, {}, "input: expected dtype float32"),
        (X, X[:, :2], {}, r"residual: expected shape \(1, 3, 4, 5\) to match input"),
        (X, X.double(), {}, "residual: expected dtype float32; got float64"),
        (X, X.to("meta"), {}, "residual: expected the device of input"),
        (X[..., :1, :1], None, {}, "input: expected more than one value"),
        (X, None, {"norm": "layer"}, "norm: expected one of batch, instance, group, none"),
        (X, None, {"activation": "gelu"}, "activation: expected None, 'relu' or 'leaky_relu'"),
        (X, None, {"backend": "cuda"}, "backend: norm_act has reference, cpu, triton; got 'cuda'"),
    ],
)
def test_bad_input(x: Tensor, residual: Tensor | None, options: dict[str, object],
                   message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        norm_act(x, residual, **options)
    assert len(str(caught.value).splitlines()) == 1
