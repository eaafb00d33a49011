"""GroupDNet's encoder: every class to its own latent code, in one grouped network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import class_crops

from .blocks import conv
from .presets import GroupDNetPreset


class GroupDNetEncoder(nn.Module):
    """Class-wise encoder: the crop of a class gives mean and log variance of its latent code.

    Five or six (from 256 pixels of the longer side up) convs 3x3, stride 2, grouped by class,
    spectral and instance normalised, LeakyReLU(0.2); then two heads, grouped by class.

    Args:
        preset: options; ``nef`` is the width of the first conv over all classes.

    Shapes: x (N, 3·classes, H, W), class-major -> mu, logvar (N, 8·classes, h, w) each;
        channels 8c..8c+7 belong to class c.

    Raises:
        ValueError: another number of channels.

    Paper: Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020, section 3.2.

    Example:
        >>> encoder = create_model("groupdnet_deepfashion", part="encoder")
        >>> mu, logvar = encoder.encode(image, labels)
        >>> z = reparameterize(mu, logvar)
    """

    def __init__(self, preset: GroupDNetPreset) -> None:
        super().__init__()
        self.classes = preset.classes
        self.image_size = preset.image_size
        self.depth = 6 if max(preset.image_size) >= 256 else 5
        width, groups = 3 * preset.classes, preset.classes
        for i in range(self.depth):
            out = preset.nef * min(2**i, 8)
            layer = conv(width, out, groups=groups, stride=2, bias=False, spectral=True,
                         what=f"layer{i + 1}")
            self.add_module(f"layer{i + 1}", nn.Sequential(layer, nn.InstanceNorm2d(out)))
            width = out
        latent = preset.latent_channels * preset.classes
        self.fc_mu = conv(width, latent, groups=groups, what="fc_mu")
        self.fc_var = conv(width, latent, groups=groups, what="fc_var")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[1] != 3 * self.classes:
            raise ValueError(
                f"x: expected (N, {3 * self.classes}, H, W), three channels per class; got "
                f"{tuple(x.shape)}; encode(image, labels) makes the class crops"
            )
        for i in range(self.depth):
            x = F.leaky_relu(self.get_submodule(f"layer{i + 1}")(x), 0.2)
        return self.fc_mu(x), self.fc_var(x)

    def encode(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of ``image`` (N, 3, H, W) in [-1, 1] with ``labels`` (N, H, W), integers."""
        return self(class_crops(image, labels, self.classes, size=self.image_size))


def reparameterize(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of the latent code: ``z = mu + exp(logvar / 2) * noise``, noise from N(0, 1)."""
    noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    return mu + noise * torch.exp(0.5 * logvar)
