"""The VGG19 loss against its definition, layer by layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_models.networks.perceptual import PerceptualLoss

# torchvision's numbers of the convs, a pooling between the rows, and the published weights.
CONVS = ((0, 2), (5, 7), (10, 12, 14, 16), (19, 21, 23, 25), (28,))
WIDTHS = (64, 128, 256, 512, 512)
WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    random, channels, found = torch.Generator().manual_seed(0), 3, {}
    for numbers, width in zip(CONVS, WIDTHS, strict=True):
        for number in numbers:
            shape, scale = (width, channels, 3, 3), (2 / (9 * channels)) ** 0.5
            found[f"features.{number}.weight"] = scale * torch.randn(shape, generator=random)
            found[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=random)
            channels = width
    return found


def taps(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """After the first ReLU of each row."""
    found = []
    for row, numbers in enumerate(CONVS):
        x = F.max_pool2d(x, 2) if row else x
        for i, number in enumerate(numbers):
            weight, bias = (state[f"features.{number}.{name}"] for name in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, padding=1).relu()
            if i == 0:
                found.append(x)
    return found


def pictures() -> tuple[Tensor, Tensor]:
    fake, real = torch.rand((2, 2, 3, 32, 48), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return fake, real


def test_layers_weigh_as_published(state: dict[str, Tensor]) -> None:
    fake, real = pictures()
    terms = [(f - r).abs().mean() for f, r in zip(taps(state, fake), taps(state, real),
                                                  strict=True)]
    expected = torch.stack([w * t for w, t in zip(WEIGHTS, terms, strict=True)]).sum()
    for held in (state, {k.removeprefix("features."): v for k, v in state.items()}):
        torch.testing.assert_close(PerceptualLoss(held)(fake, real), expected)


def test_only_the_fake_picture_gets_a_gradient(state: dict[str, Tensor]) -> None:
    loss = PerceptualLoss(state)
    fake, real = (picture.requires_grad_() for picture in pictures())
    loss(fake, real).backward()
    assert fake.grad is not None and fake.grad.abs().max() > 0
    assert real.grad is None
    assert not loss.state_dict() and not list(loss.parameters())
    assert not any(weight.requires_grad for weight in loss._network[0].parameters())


def test_bad_input(state: dict[str, Tensor]) -> None:
    fake, real = pictures()
    loss = PerceptualLoss(state)
    assert float(loss(fake[..., :16], real[..., :16])) > 0
    for call, message in (
        (lambda: loss(fake[:, :1], real[:, :1]), r"fake: expected \(N, 3, H, W\)"),
        (lambda: loss(fake[..., :15], real[..., :15]), "at least 16"),
        (lambda: loss(fake, real[:1]), "real: expected fake's shape"),
        (lambda: PerceptualLoss({}), "state: expected tensors of torchvision's vgg19"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_features_are_in_fp32(state, dtype):
    loss = PerceptualLoss(state).to(dtype)
    fake, real = (picture.to(dtype) for picture in pictures())
    found = loss(fake, real)
    assert found.dtype == torch.float32
    terms = [w * (f.float() - r.float()).abs().mean() for w, f, r in zip(
        WEIGHTS, loss.features(fake), loss.features(real), strict=True)]
    torch.testing.assert_close(found, torch.stack(terms).sum(), rtol=1e-5, atol=0)
