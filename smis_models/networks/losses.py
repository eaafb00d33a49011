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


_MODES: dict[str, Callable[[Tensor, bool, bool], Tensor]] = {
    "hinge": _hinge,
    "ls": lambda x, real, _: (x - float(real)).square().mean(),
    "original": lambda x, real, _: F.softplus(-x if real else x).mean(),
    "w": lambda x, real, _: -x.mean() if real else x.mean(),
}


def wide(x: Tensor) -> Tensor:
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
        >>> feature, prediction = torch.rand(1, 4, 8, 8), torch.randn(1, 1, 8, 8)
        >>> pred_fake, pred_real = [[feature, prediction]], [[2 * feature, 1 - prediction]]
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
    terms = [_MODES[mode](wide(x), target_is_real, discriminator) for x in last]
    total = torch.stack(terms).sum()
    return total / len(terms) if reduction == "mean" else total


def feature_matching_loss(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]],
                          weight: float = 10.0, *, weighting: str = "spade") -> Tensor:
    r"""L1 between the discriminator's features of fake and real images, real ones detached.

    .. math:: \frac{\lambda w}{S} \sum_s \sum_{i < \text{last}} \mathrm{mean} |f_{s,i} - r_{s,i}|

    with :math:`w = 1` in SPADE and :math:`w = 4 / K` in pix2pixHD for K features a scale (one more
    than its ``n_layers``): the same for the published four.

    Args:
        fake, real: per scale the features and, last, the prediction, which is left out.
        weight: λ; 10 in pix2pixHD, SPADE and GroupDNet.
        weighting: "spade" or "pix2pixhd".

    Returns:
        A scalar; fp32 for 16-bit features.

    Raises:
        ValueError: no scales, scales that differ in number or in their features, or an unknown
            weighting.

    Paper: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with Conditional
    GANs", CVPR 2018.

    Example:
        >>> feature, prediction = torch.rand(1, 4, 8, 8), torch.randn(1, 1, 8, 8)
        >>> pred_fake, pred_real = [[feature, prediction]], [[2 * feature, 1 - prediction]]
        >>> loss = feature_matching_loss(pred_fake, pred_real)
    """
    if weighting not in ("spade", "pix2pixhd"):
        raise ValueError(f"weighting: expected 'spade' or 'pix2pixhd'; got {weighting!r}")
    if len(fake) != len(real) or not fake:
        raise ValueError(f"real: expected as many scales as fake ({len(fake)}), got {len(real)}")
    counts = [len(scale) for scale in (*fake, *real)]
    if min(counts) < 2 or min(counts) != max(counts):
        raise ValueError("fake, real: expected the same features of every scale, and last the "
                         f"prediction; got {min(counts)} to {max(counts)} tensors a scale")
    terms = [
        F.l1_loss(wide(f), wide(r.detach()))
        for fake_scale, real_scale in zip(fake, real, strict=True)
        for f, r in zip(fake_scale[:-1], real_scale[:-1], strict=True)
    ]
    each = 1.0 if weighting == "spade" else 4.0 / (counts[0] - 1)
    return torch.stack(terms).sum() * (weight * each / len(fake))


def class_l1_loss(fake: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    r"""L1 by classes: every class that an image shows counts as much as the others.

    .. math:: \frac{1}{N} \sum_n \frac{1}{|C_n|} \sum_{c \in C_n}
        \mathrm{mean}_{p: y_{np} = c} |f_{np} - r_{np}|

    with the classes :math:`C_n` of image n. Sums in fp32 at least.

    Args:
        fake, real: (N, C, H, W), any floating dtype and memory format.
        labels: (N, H, W), integers from 0 on.

    Raises:
        ValueError: fake and real of different shapes; labels of another size, floats or negative.

    Source: this package; the papers average over pixels.

    Example:
        >>> fake, image = torch.rand(2, 1, 3, 16, 16)
        >>> labels = torch.randint(4, (1, 16, 16))
        >>> loss = 10 * class_l1_loss(fake, image, labels)
    """
    if fake.shape != real.shape:
        raise ValueError(f"fake: expected the shape of real, {tuple(real.shape)}; "
                         f"got {tuple(fake.shape)}")
    n, _, h, w = fake.shape
    if labels.shape != (n, h, w):
        raise ValueError(f"labels: expected {(n, h, w)}, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels: expected integers, got {labels.dtype}; convert with .long()")
    y = labels.flatten(1).long()
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0:
        raise ValueError(f"labels: expected classes from 0 on, got {low}; map unlabelled pixels "
                         "to a class of their own")
    pixels = y.new_zeros(n, high + 1).scatter_add_(1, y, torch.ones_like(y))
    shown = (pixels > 0).sum(1, keepdim=True)
    share = 1 / (n * pixels.gather(1, y) * shown).to(wide(fake).dtype)  # [N, H*W]
    distance = (wide(fake) - wide(real)).abs().mean(1).flatten(1)
    return (distance * share).sum()


def kl_loss(mu: Tensor, logvar: Tensor, *, reduction: str = "sum") -> Tensor:
    r"""KL divergence of N(mu, exp(logvar)) from N(0, 1), summed over batch, channels and pixels.

    .. math:: \frac{1}{2} \sum (\mu^2 + \sigma^2 - 1 - \log \sigma^2)

    As published ("sum") it grows with the batch; GroupDNet weighs it with 0.05. "mean" is the mean
    over all values, "batchmean" the sum over the number of images.

    Shapes: mu and logvar, equal -> a scalar, fp32 for 16-bit inputs.

    Raises:
        ValueError: shapes that differ, or an unknown reduction.

    Paper: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014.

    Example:
        >>> mu, logvar = torch.randn(2, 1, 16)
        >>> loss = 0.05 * kl_loss(mu, logvar)
    """
    if mu.shape != logvar.shape:
        raise ValueError(f"logvar: expected mu's shape {tuple(mu.shape)}, got "
                         f"{tuple(logvar.shape)}")
    parts = {"sum": 1, "mean": mu.numel(), "batchmean": len(mu)}
    if reduction not in parts:
        raise ValueError(f"reduction: expected one of {', '.join(parts)}; got {reduction!r}")
    mu, logvar = wide(mu), wide(logvar)
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum() / parts[reduction]


def latent_regression_loss(mean: Tensor, z: Tensor) -> Tensor:
    r"""L1 between a drawn code and the one that the encoder finds in its picture.

    .. math:: \mathrm{mean} |\mu(G(m, z)) - z|

    BicycleGAN weighs it with 0.5, and its gradient moves the generator alone, not the encoder.

    Shapes: mean (the encoder's, of the picture painted from z) and z, equal -> a scalar, fp32 for
    16-bit inputs.

    Raises:
        ValueError: shapes that differ.

    Paper: Zhu et al., "Toward Multimodal Image-to-Image Translation", NeurIPS 2017.

    Example:
        >>> z = torch.randn(1, 16)
        >>> read = z + 0.1  # what the encoder reads off the picture of z
        >>> loss = 0.5 * latent_regression_loss(read, z)
    """
    if mean.shape != z.shape:
        raise ValueError(f"z: expected the mean's shape {tuple(mean.shape)}, got {tuple(z.shape)}")
    return F.l1_loss(wide(mean), wide(z.detach()))


def diversity_loss(image_0: Tensor, image_1: Tensor, z_0: Tensor, z_1: Tensor, *,
                   bound: float = 10.0) -> Tensor:
    r"""Minus how far two pictures of one layout differ, relative to their codes, up to a bound.

    .. math:: -\frac{1}{N} \sum_n \min\left(
              \frac{\mathrm{mean} |x_{0,n} - x_{1,n}|}{\mathrm{mean} |z_{0,n} - z_{1,n}|},
              \tau\right)

    Added to the generator's loss it keeps codes from being ignored; weights published: 8 with
    BicycleGAN's networks (DSCGAN), 10 with pix2pixHD's.

    Args:
        image_0, image_1: (N, 3, H, W), painted from the codes. The published code detaches one.
        z_0, z_1: (N, ...), equal shapes.
        bound: τ; 10 as published.

    Returns:
        A scalar; fp32 for 16-bit inputs. No gradient to the codes.

    Raises:
        ValueError: shapes that differ.

    Paper: Yang et al., "Diversity-Sensitive Conditional Generative Adversarial Networks", ICLR
    2019.

    Example:
        >>> z_0, z_1 = torch.randn(2, 1, 16)
        >>> images = torch.rand(2, 1, 3, 16, 16)  # of the two codes
        >>> loss = 8 * diversity_loss(*images, z_0, z_1)
    """
    for name, x, like in (("image_1", image_1, image_0), ("z_1", z_1, z_0)):
        if x.shape != like.shape:
            raise ValueError(
                f"{name}: expected the other's shape {tuple(like.shape)}, got {tuple(x.shape)}"
            )
    if len(z_0) != len(image_0):
        raise ValueError(f"z_0: expected batch size {len(image_0)} as the images, got {len(z_0)}")
    pictures = (wide(image_0) - wide(image_1)).abs().flatten(1).mean(1)
    codes = (wide(z_0) - wide(z_1)).detach().abs().flatten(1).mean(1)
    return -(pictures / (codes + 1e-5)).clamp(max=bound).mean()
