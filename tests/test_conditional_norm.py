"""SPADE's special cases: conditional BatchNorm and AdaIN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import SPADE, ConditionalNorm2d, adain, use_backend
from smis_kernels.testing import assert_as_accurate

CLASSES, SHAPE = 4, (3, 5, 7, 6)


def features(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def make(norm: str = "batch") -> ConditionalNorm2d:
    torch.manual_seed(0)
    return ConditionalNorm2d(SHAPE[1], CLASSES, norm=norm).double()


def spade_of(module: ConditionalNorm2d, norm: str) -> SPADE:
    """SPADE with the same weights: single 1x1 convs of the condition."""
    spade = SPADE(SHAPE[1], CLASSES, 0, norm=norm, kernel_size=1).double()
    with torch.no_grad():
        for name in ("mlp_gamma", "mlp_beta"):
            linear, conv = getattr(module, name), getattr(spade, name)
            conv.weight.copy_(linear.weight[:, :, None, None])
            conv.bias.copy_(linear.bias)
    return spade


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "syncbatch", "instance", "none"])
def test_is_spade_on_a_map_that_does_not_vary(norm: str, training: bool, backend: str) -> None:
    module = make(norm).train(training)
    spade = spade_of(module, norm).train(training)
    x, classes = features(), torch.tensor([2, 0, 2])
    maps = F.one_hot(classes, CLASSES).double()[:, :, None, None].expand(-1, -1, 14, 12)
    options: dict[str, Any] = {"activation": "leaky_relu", "upsample": True}
    with use_backend(backend):
        found, expected = module(x, classes, **options), spade(x, maps, **options)
    torch.testing.assert_close(found, expected)
    for buffer, other in zip(module.buffers(), spade.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


def test_is_conditional_batch_norm() -> None:
    """Gain and offset picked by the class, behind torch's own batch normalisation."""
    module = make().train()
    x, classes = features(), torch.tensor([1, 3, 0])
    gain = 1 + module.mlp_gamma.weight.T[classes] + module.mlp_gamma.bias
    offset = module.mlp_beta.weight.T[classes] + module.mlp_beta.bias
    normalized = F.batch_norm(x, None, None, training=True)
    expected = normalized * gain[:, :, None, None] + offset[:, :, None, None]
    torch.testing.assert_close(module(x, classes), expected)


def test_classes_are_unit_vectors() -> None:
    module, classes = make().eval(), torch.tensor([1, 3, 0])
    vectors = F.one_hot(classes, CLASSES).double()
    torch.testing.assert_close(module(features(), classes), module(features(), vectors))


@pytest.mark.parametrize("classes", [True, False])
def test_gradients_of_every_weight(classes: bool) -> None:
    condition = torch.tensor([1, 3, 0]) if classes else torch.randn(3, CLASSES).double()
    found = []
    for backend in ("auto", "reference"):
        module, x = make().train(), features().requires_grad_()
        with use_backend(backend):
            y = module(x, condition, activation="relu")
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
        found.append(torch.autograd.grad((y * cotangent).sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*found)
    assert all(gradient.any() for gradient in found[0])


def definition(x: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """The paper's formula, plainly."""
    def moments(t: Tensor) -> tuple[Tensor, Tensor]:
        mean = t.mean((2, 3), keepdim=True)
        return mean, ((t - mean).square().mean((2, 3), keepdim=True) + eps).sqrt()

    (mean, spread), (style_mean, style_spread) = moments(x), moments(style)
    return style_spread * (x - mean) / spread + style_mean


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adain(layout: torch.memory_format, backend: str) -> None:
    x = features().contiguous(memory_format=layout)
    style = 3 * torch.randn(3, 5, 9, 4, generator=torch.Generator().manual_seed(1)).double() + 2
    with use_backend(backend):
        y = adain(x, style)
    torch.testing.assert_close(y, definition(x, style))
    if backend == "auto":  # torch's own instance norm answers contiguous
        assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y.mean((2, 3)), style.mean((2, 3)))


def test_adain_is_spade_with_the_style_s_moments() -> None:
    """Gamma = spread - 1 and beta = mean, on instance-normalised features."""
    x, style = features(), torch.rand(3, 5, 4, 4, dtype=torch.float64)
    spade = SPADE(5, 10, 0, norm="instance", kernel_size=1).double()
    with torch.no_grad():
        for conv, first in ((spade.mlp_gamma, 0), (spade.mlp_beta, 5)):
            conv.weight.zero_()
            conv.bias.zero_()
            conv.weight[:, first : first + 5, 0, 0] = torch.eye(5)
    var, mean = torch.var_mean(style, (2, 3), correction=0)
    condition = torch.cat([(var + 1e-5).sqrt() - 1, mean], 1)[:, :, None, None]
    torch.testing.assert_close(adain(x, style), spade(x, condition.expand(-1, -1, 7, 6)))


def test_adain_gradients() -> None:
    style = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    x = features().requires_grad_()
    assert torch.autograd.gradcheck(adain, (x, style))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    x, style = features(dtype), torch.randn(3, 5, 4, 4).to(dtype)
    exact = definition(x.double(), style.double())
    assert_as_accurate(adain(x, style), definition(x, style), exact)


def test_bad_input_is_named() -> None:
    module, x = make(), features()
    for call, words in (
        (lambda: module(x, torch.tensor([1, 2])), ("condition", "(3,)", "(3, 4)", "(2,)")),
        (lambda: module(x, torch.rand(3, 5)), ("condition", "(3, 5) of float32")),
        (lambda: adain(x, x[:2]), ("style", "(3, 5)", "(2, 5)")),
        (lambda: adain(x, x.float()), ("style", "float32")),
        (lambda: adain(x[0], x), ("input", "(N, C, H, W)")),
    ):
        with pytest.raises((TypeError, ValueError), match=words[0]) as error:
            call()
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words)
