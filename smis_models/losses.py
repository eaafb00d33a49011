"""Training losses of the SPADE family, with the published conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# Per scale: the prediction, or the features followed by the prediction.
Predictions: TypeAlias = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]


def _hinge(x: Tensor, real: bool, discriminator: bool) -> Tensor:
    if not discriminator:
        return -x.mean()
    return F.relu(1 - x if real else 1 + x).mean()


def _least_squares(x: Tensor, real: bool, discriminator: bool) -> Tensor:
    return (x - float(real)).square().mean()


def _original(x: Tensor, real: bool, discriminator: bool) -> Tensor:
    return F.softplus(-x if real else x).mean()


def _wasserstein(x: Tensor, real: bool, discriminator: bool) -> Tensor:
    return -x.mean() if real else x.mean()


_MODES: dict[str, Callable[[Tensor, bool, bool], Tensor]] = {
    "hinge": _hinge, "ls": _least_squares, "original": _original, "w": _wasserstein,
}


def _wide(x: Tensor) -> Tensor:
    """Losses are summed in fp32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def gan_loss(predictions: Predictions, target_is_real: bool, *, discriminator: bool = True,
             mode: str = "hinge", reduction: str = "mean") -> Tensor:
    r"""Adversarial loss, the mean (or sum) over the scales' predictions.

    ==========  ==============================  =============================  ==============
    mode        discriminator, real             discriminator, fake            generator
    ==========  ==============================  =============================  ==============
    hinge       mean max(0, 1 - x)              mean max(0, 1 + x)             -mean x
    ls          mean (x - 1)²                   mean x²                        mean (x - 1)²
    original    mean log(1 + exp(-x))           mean log(1 + exp(x))           as real
    w           -mean x                         mean x                         as real
    ==========  ==============================  =============================  ==============

    Args:
        predictions: one tensor, or a list over scales of predictions or of lists of features
            whose last entry is the prediction.
        target_is_real: what the discriminator should say; True for the generator's loss.
        discriminator: False for the generator's loss.
        mode: "hinge" (Lim & Ye, 2017; Miyato et al., 2018), "ls" (Mao et al., 2017),
            "original" (Goodfellow et al., 2014) or "w" (Arjovsky et al., 2017).
        reduction: over the scales: "mean" (SPADE, GroupDNet, CC-FPSE) or "sum" (pix2pixHD).

    Returns:
        A scalar; fp32 for 16-bit predictions.

    Raises:
        ValueError: an unknown mode or reduction, no predictions, or a generator loss with a fake
            target.

    Example:
        >>> loss_d = gan_loss(pred_fake, False) + gan_loss(pred_real, True)
        >>> loss_g = gan_loss(pred_fake, True, discriminator=False)
    """
    if mode not in _MODES:
        raise ValueError(f"mode: expected one of {', '.join(_MODES)}; got {mode!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum'; got {reduction!r}")
    if not discriminator and not target_is_real:
        raise ValueError("target_is_real: expected True for the generator's loss, got False")
    scales: list[Any] = [predictions] if isinstance(predictions, Tensor) else list(predictions)
    if not scales:
        raise ValueError("predictions: expected at least one, got an empty list")
    last = [scale if isinstance(scale, Tensor) else scale[-1] for scale in scales]
    terms = [_MODES[mode](_wide(x), target_is_real, discriminator) for x in last]
    total = torch.stack(terms).sum()
    return total / len(terms) if reduction == "mean" else total


def feature_matching_loss(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]],
                          weight: float = 10.0) -> Tensor:
    r"""L1 between the discriminator's features of fake and real images, real ones detached.

    .. math:: \frac{\lambda}{S} \sum_s \sum_{i < \text{last}} \mathrm{mean} |f_{s,i} - r_{s,i}|

    Args:
        fake, real: per scale the features and, last, the prediction, which is left out.
        weight: λ; 10 in SPADE and GroupDNet.

    Paper: Wang et al., pix2pixHD, CVPR 2018.

    Example:
        >>> loss = feature_matching_loss(pred_fake, pred_real)
    """
    if len(fake) != len(real) or not fake:
        raise ValueError(f"real: expected as many scales as fake ({len(fake)}), got {len(real)}")
    terms = [
        F.l1_loss(_wide(f), _wide(r.detach()))
        for fake_scale, real_scale in zip(fake, real, strict=True)
        for f, r in zip(fake_scale[:-1], real_scale[:-1], strict=True)
    ]
    return torch.stack(terms).sum() * (weight / len(fake))


def kl_loss(mu: Tensor, logvar: Tensor) -> Tensor:
    r"""KL divergence of N(mu, exp(logvar)) from N(0, 1), summed over batch, channels and pixels.

    .. math:: \frac{1}{2} \sum (\mu^2 + \sigma^2 - 1 - \log \sigma^2)

    As published it grows with the batch; GroupDNet weighs it with 0.05.

    Shapes: mu and logvar, equal -> a scalar, fp32 for 16-bit inputs.

    Paper: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014.

    Example:
        >>> loss = 0.05 * kl_loss(mu, logvar)
    """
    mu, logvar = _wide(mu), _wide(logvar)
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
