"""Every op is differentiated twice as its definition is, or says that it cannot be."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from smis_kernels import LabelLayout, ops, use_backend
from smis_kernels.ops.class_crops.op import class_crops
from smis_kernels.ops.conditional_attention.op import conditional_attention
from smis_kernels.ops.conditional_conv.op import conditional_conv2d
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.instance_pool.op import instance_avg_pool2d
from smis_kernels.ops.modulation.op import modulation, modulation_pair
from smis_kernels.ops.narrow_conv.op import narrow_conv2d
from smis_kernels.ops.norm_act.op import norm_act
from smis_kernels.ops.polyphase_conv.op import polyphase_conv2d, polyphase_conv_transpose2d
from smis_kernels.ops.reformat.op import reformat
from smis_kernels.ops.spatially_varying_conv.op import spatially_varying_conv2d
from smis_kernels.ops.spectral_weight.op import spectral_weight
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.ops.winograd_conv.op import winograd_conv2d
from smis_kernels.runtime.backend import missing

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason="no native CPU library")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


LEVEL = LabelLayout.from_labels(
    torch.randint(3, (2, 6, 5), generator=torch.Generator().manual_seed(1)), 3).level((6, 5))
MEAN, VAR = normal(4, seed=5), normal(4, seed=6).square() + 0.5
X, TABLE, TABLE_S = normal(2, 4, 6, 5), normal(9, 8, seed=1), normal(9, 8, seed=2)
INDEX = torch.randint(1, 9, (2, 6, 5), generator=torch.Generator().manual_seed(3)).int()
WIDE_INDEX = INDEX.repeat_interleave(2, 1).repeat_interleave(2, 2)
DENSE = tuple(normal(2, 4, 6, 5, seed=i) for i in range(1, 5))
WIDE = tuple(normal(2, 4, 12, 10, seed=i) for i in range(1, 3))
FIXED: dict[str, Any] = {"running_mean": MEAN, "running_var": VAR}
LEAKY: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": 0.3}

# The autograd.Function that serves it, the call, and what it is differentiated by.
Case = tuple[str, Callable[..., Any], tuple[Tensor, ...]]
CASES: dict[str, Case] = {
    "modulation_batch": ("_Modulation", lambda *t, **b: modulation(
        *t, training=True, **LEAKY, **b), (X, *DENSE[:2])),
    "modulation_fixed": ("_Modulation", lambda *t, **b: modulation(
        *t, activation="relu", **FIXED, **b), (X, *DENSE[:2])),
    "modulation_instance": ("_Modulation", lambda *t, **b: modulation(
        *t, norm="instance", **b), (X, *DENSE[:2])),
    "modulation_group": ("_Modulation", lambda *t, **b: modulation(
        *t, norm="group", num_groups=2, **LEAKY, **b), (X, *DENSE[:2])),
    "modulation_none": ("_Modulation", lambda *t, **b: modulation(
        *t, norm="none", **LEAKY, **b), (X, *DENSE[:2])),
    "modulation_upsample": ("_Modulation", lambda *t, **b: modulation(
        *t, training=True, upsample=True, **LEAKY, **b), (X, *WIDE)),
    "modulation_pair": ("_Modulation", lambda *t, **b: modulation_pair(
        *t, training=True, **b), (X, *DENSE)),
    "modulation_pair_fixed": ("_Modulation", lambda *t, **b: modulation_pair(
        *t, **FIXED, running_mean_s=VAR, running_var_s=VAR + 1, **b), (X, *DENSE)),
    "norm_act": ("_NormAct", lambda x, **b: norm_act(x, **LEAKY, **b), (X,)),
    "norm_act_relu": ("_NormAct", lambda x, r, **b: norm_act(
        x, r, norm="batch", training=True, activation="relu", **b), (X, DENSE[0])),
    "norm_act_fixed": ("_NormAct", lambda x, **b: norm_act(
        x, norm="batch", **FIXED, **LEAKY, **b), (X,)),
    "indexed_modulation": ("_Modulation", lambda x, t, **b: indexed_modulation(
        x, INDEX, t, training=True, **LEAKY, **b), (X, TABLE)),
    "indexed_modulation_fixed": ("_Modulation", lambda x, t, **b: indexed_modulation(
        x, INDEX, t, activation="relu", **FIXED, **b), (X, TABLE)),
    "indexed_modulation_upsample": ("_Modulation", lambda x, t, **b: indexed_modulation(
        x, WIDE_INDEX, t, norm="instance", upsample=True, **b), (X, TABLE)),
    "indexed_modulation_pair": ("_Modulation", lambda x, *t, **b: indexed_modulation_pair(
        x, INDEX, *t, training=True, **b), (X, TABLE, TABLE_S)),
    "window_embedding": ("_WindowSum", lambda v, w, c, **b: window_embedding(
        v, w, c, LEVEL.windows3, **b), (normal(4, 3), normal(6, 3, 3, 3, seed=1), normal(6))),
    "window_embedding_linear": ("_WindowSum", lambda v, w, **b: window_embedding(
        v, w, None, LEVEL.windows3, relu=False, groups=3, **b),
        (normal(4, 3), normal(6, 1, 3, 3, seed=1))),
    "window_table": ("_WindowTable", lambda h, g, c, d, e, **b: window_table(
        h, g, c, d, e, LEVEL.windows5, groups=2, **b),
        (normal(len(LEVEL.windows3), 6), normal(4, 3, 3, 3, seed=1), normal(4, seed=2),
         normal(4, 3, 3, 3, seed=3), normal(4, seed=4))),
    "winograd_conv2d": ("_WinogradConv", lambda x, w, c, r, **b: winograd_conv2d(
        x, w, c, residual=r, groups=2, **b),
        (X, normal(6, 2, 3, 3, seed=1), normal(6), normal(2, 6, 6, 5, seed=2))),
    "narrow_conv2d": ("_NarrowConv", lambda x, w, c, **b: narrow_conv2d(x, w, c, padding=1, **b),
                      (X, normal(3, 4, 3, 3, seed=1), normal(3))),
    "polyphase_conv2d": ("_PolyphaseConv", lambda x, w, c, **b: polyphase_conv2d(
        x, w, c, stride=1, padding=(2, 1), groups=2, **b),
        (X, normal(6, 2, 4, 4, seed=1), normal(6))),
    "polyphase_conv_transpose2d": ("_PolyphaseConv", lambda x, w, c, **b: (
        polyphase_conv_transpose2d(x, w, c, padding=(0, 1), output_padding=(1, 0), groups=2, **b)),
        (X, normal(4, 3, 3, 3, seed=1), normal(6))),
    "conditional_conv2d": ("_ConditionalConv", conditional_conv2d,
                           (X, normal(2, 3, 6, 5, seed=1), normal(36, 3, 3, 3), normal(36))),
    "conditional_conv2d_plain": ("_ConditionalConv", conditional_conv2d,
                                 (X, normal(2, 3, 6, 5, seed=1), normal(36, 3, 3, 3))),
    "conditional_attention": ("_ConditionalAttention", conditional_attention, (X, DENSE[0])),
    "spatially_varying_conv2d": ("_VaryingConv", lambda x, w, **b: spatially_varying_conv2d(
        x, w, stride=2, **b), (X, normal(2, 2, 9, 3, 3))),
    "spectral_weight": ("_SpectralWeight", lambda w, **b: spectral_weight(
        w, MEAN, normal(6, seed=8), **b), (normal(4, 2, 3, seed=9),)),
    "reformat": ("_Reformat", lambda x, **b: reformat(x, torch.channels_last, **b), (X,)),
    "class_crops": ("_ClassCrops", lambda x, **b: class_crops(
        x, INDEX[:, :6, :5].long() % 3, 3, size=(5, 7), **b), (X,)),
    "instance_avg_pool2d": ("_InstancePool", lambda x, **b: instance_avg_pool2d(
        x, INDEX % 3, **b), (X,)),
}


def outputs(call: Callable[..., Any], inputs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    found = call(*inputs, backend=backend)
    return list(found) if isinstance(found, tuple) else [found]


def second(call: Callable[..., Any], values: tuple[Tensor, ...], backend: str,
           square: bool) -> list[Tensor]:
    """Gradients of a penalty on the gradients; unless ``square`` the outer gradient is constant."""
    leaves = [v.clone().requires_grad_() for v in values]
    inputs = tuple(2 * leaf for leaf in leaves)  # not leaves: as inside of a network
    found = outputs(call, inputs, backend)
    loss = sum(((y.square() if square else y) * normal(*y.shape, seed=40)).sum() for y in found)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum((g.square() * normal(*g.shape, seed=50)).sum() for g in first)
    if not penalty.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(penalty, leaves, materialize_grads=True))


@pytest.mark.parametrize("square", [False, True], ids=["constant", "moving"])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_those_of_the_definition(name: str, square: bool) -> None:
    _, call, values = CASES[name]
    expected = second(call, values, "reference", square)
    found = second(call, values, "auto", square)
    linear = name in ("class_crops", "instance_avg_pool2d", "norm_act_fixed", "reformat")
    assert any(bool(e.any()) for e in expected) != (linear and not square)
    for a, b in zip(found, expected, strict=True):
        # Row 0 of a table stands for the outside: what it would learn is never used.
        a, b = (t[1:] if t.dim() == 2 and len(t) != 4 else t for t in (a, b))
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max() + 1e-30))


def test_autocast_rounds_no_second_derivative() -> None:
    """Where the kernel does not round, neither does the definition that takes its place."""
    _, call, values = CASES["winograd_conv2d"]
    narrow = tuple(v.float() for v in values)
    expected = second(call, narrow, "auto", True)
    with torch.autocast("cpu", torch.bfloat16):
        found = second(call, narrow, "auto", True)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["modulation_batch", "conditional_attention"])
def test_inputs_that_follow_from_each_other(name: str) -> None:
    """What one gets of the other is the graph's to add, once."""
    _, call, values = CASES[name]
    found = []
    for backend in ("auto", "reference"):
        x = X.clone().requires_grad_()
        given = 2 * x
        inputs = (given, *(given.sin() * v for v in values[1:]))
        loss = (outputs(call, inputs, backend)[0] * DENSE[3]).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), x)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max()))


def test_fixed_statistics_are_not_rounded_to_the_dtype_of_the_features() -> None:
    x, mean = (100 + normal(2, 4, 6, 5)).bfloat16(), torch.full((4,), 100.3)
    gamma, beta = torch.zeros(2, 2, 4, 6, 5, dtype=torch.bfloat16).requires_grad_().unbind()
    y = modulation(x, gamma, beta, running_mean=mean, running_var=torch.ones(4))
    (found,) = torch.autograd.grad(y.sum(), gamma, create_graph=True)  # x-hat
    assert torch.allclose(found.double(), x.double() - 100.3, rtol=1e-2)


def graph_names(output: Tensor) -> set[str]:
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return {type(n).__name__.removesuffix("Backward") for n in seen}


def functions_of_the_library() -> Iterator[str]:
    for info in pkgutil.walk_packages(ops.__path__, "smis_kernels.ops."):
        if info.name.endswith(".op"):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                    yield value.__name__


def test_no_op_is_forgotten() -> None:
    for function, call, values in CASES.values():
        leaves = tuple(v.clone().requires_grad_() for v in values)
        assert function in graph_names(outputs(call, leaves, "auto")[0])
    own_adjoint = {"_ClassCropsGradient"}
    assert {function for function, _, _ in CASES.values()} == {
        *functions_of_the_library()} - own_adjoint


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_that_of_the_definition(name: str) -> None:
    _, call, values = CASES[name]
    if name in ("class_crops", "instance_avg_pool2d"):
        pytest.skip("their definitions write in place")
    tangents = []
    for backend in ("auto", "reference"):
        with forward_ad.dual_level():
            duals = tuple(forward_ad.make_dual(v, normal(*v.shape, seed=60)) for v in values)
            tangents.append([forward_ad.unpack_dual(y).tangent
                             for y in outputs(call, duals, backend)])
    for a, b in zip(*tangents, strict=True):
        assert torch.equal(a, b)
        assert bool(a.any())


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_refuses_forward_mode(name: str) -> None:
    _, call, values = CASES[name]
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(v, torch.ones_like(v)) for v in values)
        with pytest.raises((RuntimeError, NotImplementedError)):
            outputs(call, duals, "cpu")


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forward_mode_of_a_gradient_is_right_or_refused(name: str, transform: bool) -> None:
    _, call, values = CASES[name]

    def tangents(backend: str) -> list[Tensor]:
        leaves = tuple(v.clone().requires_grad_() for v in values)
        made = outputs(call, leaves, backend)
        grads = tuple(normal(*y.shape, seed=7) for y in made)

        def gradient(*grads: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(made, leaves, grads, materialize_grads=True)

        if transform:
            return list(torch.func.jvp(gradient, grads, grads)[1])
        with forward_ad.dual_level():
            found = gradient(*(forward_ad.make_dual(g, g) for g in grads))
            return [forward_ad.unpack_dual(d).tangent for d in found]

    try:
        found = tangents("auto")
    except RuntimeError:
        return
    for a, b in zip(found, tangents("reference"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_right_or_refused(name: str) -> None:
    _, call, values = CASES[name]
    stacked = tuple(torch.stack([v, v]) for v in values)
    try:
        found = torch.vmap(lambda *t: tuple(outputs(call, t, "auto")))(*stacked)
    except (RuntimeError, ValueError):
        return
    for a, b in zip(found, outputs(call, values, "reference"), strict=True):
        assert torch.allclose(a[1], b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("call", [
    lambda x: modulation(x, DENSE[0][:1], DENSE[1][:1], training=True),
    lambda x: modulation(x, DENSE[0][:1], DENSE[1][:1], training=True, norm="instance"),
    lambda x: norm_act(x),
], ids=["batch", "instance", "norm_act"])
def test_one_image_in_channels_last(call: Callable[[Tensor], Tensor]) -> None:
    """torch's norms err where gradients come in another format than features of odd strides."""
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        x = X[:1].contiguous(memory_format=form).requires_grad_()
        y = call(x)
        (first,) = torch.autograd.grad(y, x, normal(*y.shape, seed=9), create_graph=True)
        found.append((first, *torch.autograd.grad(first.pow(3).sum(), x)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10 * float(a.abs().max()))


@pytest.mark.parametrize("call", [
    lambda x: modulation(x, *DENSE[:2], training=True, activation="relu"),
    lambda x: indexed_modulation(x, INDEX, TABLE, norm="instance"),
    lambda x: norm_act(x, activation="leaky_relu"),
], ids=["modulation", "indexed_modulation", "norm_act"])
def test_compiled_transforms_are_those_of_the_definition(call: Callable[[Tensor], Tensor]) -> None:
    """A kernel would be a constant to them, whose missing derivative nobody is told of."""
    transforms: list[Callable[[Tensor], Tensor]] = [
        torch.func.grad(lambda x: call(x).square().sum()),
        lambda x: torch.func.jvp(call, (x,), (x.sin(),))[1],
        call,
    ]
    for transform in transforms:
        torch._dynamo.reset()
        found = torch.compile(transform, backend="aot_eager")(X)
        with use_backend("reference"):
            expected = transform(X)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
