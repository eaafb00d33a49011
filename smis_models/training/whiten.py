"""From an autoencoder to codes like N(0, 1): whitening."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..families import GroupDNetPreset, SynthesisModel
from .batches import MicroBatch

_SMALLEST = 1e-2  # variance along a direction, of the largest: below it there is only noise


def check_whitened(preset: object, init: str | None) -> None:
    """Refuse what :func:`whiten_codes` cannot do."""
    if not isinstance(preset, GroupDNetPreset) or preset.latent_size != (1, 1) or not (
            preset.encoder_groups is preset.start_groups is None):
        raise ValueError("whiten: expected a GroupDNet with one code of 1x1 for every class; "
                         "choose image_size and upsampling so, or leave whiten out")
    if init is None:
        raise ValueError("whiten: expected init, the weights whose codes are whitened; got None")


def _seen(model: SynthesisModel, batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
    """Codes (P, classes, L) of the pictures, and which classes they show (P, classes)."""
    codes, shown = [], []
    for batch in batches:
        mu = model.encoder.encode(batch.image, batch.labels)[0]
        codes.append(mu.flatten(1).unflatten(1, (model.preset.classes, -1)))
        shown.append(batch.shown(model.preset.classes))
    return torch.cat(codes).double(), torch.cat(shown)


@torch.no_grad()
def whiten_codes(model: SynthesisModel, batches: Iterable[MicroBatch], noise: float = 0.3) -> None:
    """Give the codes of every class mean 0 and covariance 1; pictures of mean codes stay the same.

    With the mean m and covariance U diag(s) Uᵀ of a class's codes, the encoder's head becomes

    .. math:: \\mu' = \\mathrm{diag}(s)^{-1/2} U^T (\\mu - m)

    and ``fc`` undoes it. Directions with less than a hundredth of the largest variance are not
    stretched further. The posterior's deviation is set to ``noise``.

    Args:
        model: a GroupDNet whose codes are 1x1, in eval mode.
        batches: pictures to take mean and covariance of.
        noise: standard deviation of the codes around their mean, at the start.
    """
    codes, shown = _seen(model, batches)
    encoder, fc = model.encoder, model.generator.fc
    classes, latent = codes.shape[1:]
    outs = fc.out_channels // classes
    encoder.fc_var.weight.zero_()
    encoder.fc_var.bias.fill_(2 * math.log(noise))
    for c in range(classes):
        found = codes[shown[:, c], c]
        if len(found) <= latent:
            raise ValueError(f"whiten: expected more than {latent} pictures that show class {c}, "
                             f"got {len(found)}")
        mean = found.mean(0)
        variance, directions = torch.linalg.eigh(found.T.cov())
        scale = variance.clamp_min(_SMALLEST * variance[-1].item()).clamp_min(1e-12).sqrt()
        forth, back = directions.T / scale[:, None], directions * scale  # inverse of one another
        rows, reads = slice(c * latent, (c + 1) * latent), slice(c * outs, (c + 1) * outs)
        head_weight, head_bias = encoder.fc_mu.weight[rows], encoder.fc_mu.bias[rows]
        head_bias.copy_(forth @ (head_bias.double() - mean))
        head_weight.copy_(torch.einsum("jk,kihw->jihw", forth, head_weight.double()))
        weight = fc.weight[reads].double()
        fc.bias[reads].add_((weight[:, :, 1, 1] @ mean).to(fc.bias))  # one pixel meets one tap
        fc.weight[reads] = torch.einsum("okhw,kj->ojhw", weight, back).to(fc.weight)
