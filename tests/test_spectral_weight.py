"""spectral_weight against its definition, and spectral_norm against torch's."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import WinogradConv2d, explain, spectral_norm, spectral_weight, use_backend
from smis_kernels.modules.spectral_norm import FusedSpectralNorm, release_weights
from smis_kernels.ops.spectral_weight.op import _backward
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    max_error,
    poisoned_empty,
    rms_error,
    with_memory_format,
)

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
SHAPES = ((2, 1, 1, 1), (5, 7, 3, 3), (16, 65, 3, 3), (3, 130, 4, 4), (7, 6, 5, 2), (4, 1, 3, 3),
          (2, 3, 9, 9), (7, 66, 5, 2), (64, 33), (3, 129))
FORMATS = (torch.contiguous_format, torch.channels_last)


def _tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
             draw: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(shape) + 1000 * draw)
    wide = {"generator": g, "dtype": torch.float64}  # of digits that float32 has not
    weight = torch.randn(shape, **wide)
    u, v = (torch.nn.functional.normalize(torch.rand(n, **wide) + 0.1, dim=0)
            for n in (shape[0], weight[0].numel()))
    weight += torch.outer(u, v).view(shape)  # so that sigma is not near zero
    return [t.to(dtype) for t in (weight, u, v)]


def _call(u: Tensor, v: Tensor, backend: str, form: torch.memory_format,
          ) -> Callable[[Tensor], Tensor]:
    return lambda w: spectral_weight(w, u, v, memory_format=form, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], form: torch.memory_format,
                            dtype: torch.dtype) -> None:
    if len(shape) != 4 and form == torch.channels_last:
        pytest.skip("only 4-d weights have channels-last memory")
    for layout in MEMORY_FORMATS if len(shape) == 4 else ("contiguous",):
        errors: dict[str, list[list[float]]] = {"value": [], "gradient": []}
        for draw in range(1 if dtype == torch.float64 else 8):
            weight, u, v = _tensors(shape, dtype, draw)
            exact = [t.double() for t in (weight, u, v)]
            w = with_memory_format(weight, layout) if len(shape) == 4 else weight
            with poisoned_empty():
                found = [_call(u, v, "cpu", form)(w), *gradients(_call(u, v, "cpu", form), (w,))]
            ours = _call(u, v, "reference", form)
            expected = [ours(w), *gradients(ours, (w,))]
            wide = _call(*exact[1:], "reference", form)
            truth = [wide(exact[0]), *gradients(wide, (exact[0],))]
            assert found[0].is_contiguous(memory_format=form)
            for name, *three in zip(errors, found, expected, truth, strict=True):
                if dtype == torch.float64:
                    torch.testing.assert_close(three[0], three[1], rtol=1e-12, atol=1e-12)
                else:
                    assert_as_accurate(*three, factor=8, what=name)
                    errors[name].append([measure(side, three[2]) for side in three[:2]
                                         for measure in (max_error, rms_error)])
        # Every element has the errors of two sums, whose size in one draw is luck: the bounds of
        # assert_as_accurate hold for the geometric mean of several.
        eps = torch.finfo(dtype).eps
        for name, rows in errors.items():
            if rows:
                largest, mean, allowed, allowed_mean = (
                    torch.tensor(rows, dtype=torch.float64).clamp_min(1e-12).log().mean(0).exp())
                assert largest <= 1.5 * allowed + 2 * eps, name
                assert mean <= 1.5 * allowed_mean + eps / 2, name


@pytest.mark.parametrize("layout", [*MEMORY_FORMATS, "channels of more"])
@pytest.mark.parametrize("shape", [(9, 70, 3, 3), (3, 130, 4, 4), (7, 66, 5, 2)], ids=str)
def test_gradients_of_any_layout(shape: tuple[int, ...], layout: str) -> None:
    weight, u, v = _tensors(shape, torch.float64)
    sigma = torch.dot(u, torch.mv(weight.flatten(1), v))
    grad = torch.randn(shape, dtype=torch.float64)
    plain = grad / sigma - (grad * weight).sum() / sigma**2 * torch.outer(u, v).view(shape)
    if layout == "channels of more":
        grad = torch.cat([grad, grad], 1).contiguous(memory_format=FORMATS[1])[:, shape[1]:]
    else:
        grad = with_memory_format(grad, layout)
    spaced = (t.repeat_interleave(2)[::2] for t in (u, v))
    found = _backward("cpu", grad, weight, *spaced, sigma)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)


def test_long_rows_keep_their_digits() -> None:
    weight, grad = torch.rand(2, 2, 2**18, generator=torch.Generator().manual_seed(0)) + 0.5
    u, v, sigma = torch.tensor([0.6, 0.8]), torch.ones(2**18), torch.tensor(512.0)
    wide = [t.double() for t in (weight, grad, u, v, sigma)]
    outer = (wide[1] * wide[0]).sum() / wide[4] ** 2 * torch.outer(*wide[2:4])
    found = _backward("cpu", grad, weight, u, v, sigma)
    torch.testing.assert_close(found.double(), wide[1] / wide[4] - outer, rtol=5e-7, atol=0)


def test_the_same_whatever_the_threads() -> None:
    weight, u, v = _tensors((300, 200, 3, 3))
    sigma = torch.tensor(3.0)
    grad = torch.randn(weight.shape)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_backward("cpu", grad, weight, u, v, sigma))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_and_sixteen_bits() -> None:
    assert spectral_weight(torch.empty(0, 3), torch.empty(0), torch.empty(3)).shape == (0, 3)
    half = [t.bfloat16() for t in _tensors((5, 7, 3, 3))]
    assert spectral_weight(*half).dtype == torch.bfloat16
    assert "32 and 64 bits" in str(explain(spectral_weight, *half))


@pytest.mark.parametrize(("change", "message"), [
    ({"weight": torch.randn(5)}, r"weight: expected .*\(C', ...\)"),
    ({"weight": torch.ones(5, 7, 3, 3, dtype=torch.int32)}, "weight: expected"),
    ({"u": torch.randn(4)}, r"u: expected shape \(5,\)"),
    ({"v": torch.randn(62)}, r"v: expected shape \(63,\)"),
    ({"u": torch.randn(5).double()}, "u: expected .*float32"),
    ({"sigma": torch.ones(1)}, "sigma: expected"),
    ({"sigma": torch.tensor(1.0).bfloat16()}, "sigma: expected .*float32"),
    ({"memory_format": torch.preserve_format}, "memory_format: expected"),
    ({"weight": torch.randn(5, 63), "memory_format": torch.channels_last},
     "memory_format: expected"),
], ids=lambda value: value if isinstance(value, str) else "".join(value))
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    weight, u, v = _tensors((5, 7, 3, 3))
    given: dict[str, object] = {"weight": weight, "u": u, "v": v, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        spectral_weight(given.pop("weight"), given.pop("u"), given.pop("v"), **given)


def _pair(**options: object) -> tuple[nn.Module, nn.Module]:
    """torch's and ours around equal convs."""
    torch.manual_seed(0)
    theirs = torch.nn.utils.spectral_norm(nn.Conv2d(12, 20, 3, padding=1), **options)
    ours = spectral_norm(WinogradConv2d(12, 20, 3, padding=1), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_eps_is_the_least_length_as_in_torch() -> None:
    theirs, ours = (layer.double() for layer in _pair(eps=2.0))
    x = torch.randn(2, 12, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert all(float(getattr(ours, name).norm()) < 0.9 for name in ("weight_u", "weight_v"))
    for name in ("weight_u", "weight_v"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_hook_is_torchs_over_steps(layout: str, rounds: int) -> None:
    theirs, ours = _pair(n_power_iterations=rounds)
    x = with_memory_format(torch.randn(2, 12, 9, 8), layout)
    pair = theirs, ours
    optimizers = [torch.optim.SGD(layer.parameters(), 0.5) for layer in pair]
    for training in (True, True, False, True):
        losses = []
        for layer, optimizer in zip(pair, optimizers, strict=True):
            layer.train(training)
            # two forwards before the backward: the second moves u and v, which the first needs
            loss = layer(x).square().mean() + layer(x + 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        assert theirs.state_dict().keys() == ours.state_dict().keys()
        for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_hook_runs_where_it_should() -> None:
    _, ours = _pair()
    x = torch.randn(1, 12, 6, 6)

    def ops() -> list[str]:
        return [choice.op for choice in explain(ours, x).choices]

    assert "spectral_weight" in ops()
    with use_backend("reference"):
        assert "spectral_weight" not in ops()
    with torch.autocast("cpu", torch.bfloat16):
        assert "spectral_weight" not in ops()
        assert ours(x).dtype == torch.bfloat16
    other = spectral_norm(nn.ConvTranspose2d(4, 6, 3))  # its outputs are on axis 1
    assert other(torch.randn(1, 4, 5, 5)).shape == (1, 6, 7, 7)


def test_the_weight_is_stored_as_its_conv_reads_it() -> None:
    layer = spectral_norm(WinogradConv2d(64, 64, 3, padding=1))
    for size, layout, last in ((4, "channels_last", True), (4, "contiguous", False),
                               (64, "channels_last", False)):
        layer(with_memory_format(torch.randn(1, 64, size, size), layout))
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) == last


def test_a_penalty_on_gradients_reaches_the_weight() -> None:
    found = []
    for layer in _pair():
        x = torch.randn(2, 12, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append(layer.weight_orig.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_it_is_removed_copied_and_pickled() -> None:
    theirs, ours = _pair()
    x = torch.randn(2, 12, 5, 5)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        hooks = list(again._forward_pre_hooks.values())
        assert [type(hook) for hook in hooks] == [FusedSpectralNorm]
        torch.testing.assert_close(again(x), copy.deepcopy(theirs)(x))
    for layer in (theirs, ours):
        torch.nn.utils.remove_spectral_norm(layer)
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours(x), theirs(x))


def test_compile_is_one_graph() -> None:
    theirs, ours = _pair()
    x = torch.randn(2, 12, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found, expected = compiled(x), theirs(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.weight_orig.grad, theirs.weight_orig.grad,
                                   rtol=1e-4, atol=1e-5)


def test_released_weights_go_while_gradients_come():
    net = nn.Sequential(*(spectral_norm(nn.Conv2d(64, 64, 3, padding=1)) for _ in range(2)))
    x = torch.randn(1, 64, 8, 8)
    kept = [tensor.clone() for tensor in net.state_dict().values()]
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    net.load_state_dict(dict(zip(net.state_dict(), kept, strict=True)))
    loss = net(x).square().sum()
    weights = [weakref.ref(conv.weight) for conv in net]
    release_weights(net)
    assert all(conv.weight.data_ptr() == conv.weight_orig.data_ptr() for conv in net)
    found = torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    del loss
    assert [weight() for weight in weights] == [None, None]  # nothing else holds them
    second = net(x)  # made anew
    assert all(conv.weight.data_ptr() != conv.weight_orig.data_ptr() for conv in net)
    assert second.isfinite().all()
