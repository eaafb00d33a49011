"""BicycleGAN's U-Net and residual encoder, which DSCGAN shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import LabelLayout, WinogradConv2d, WinogradConvTranspose2d, norm_act

from ..networks.blocks import check_maps, check_semantics, fast_format
from ..networks.encoder import CodeEncoder
from ..networks.generator import check_code, resized
from ..networks.preset import Preset
from .registry import ADAM_OF_PIX2PIX, Recipe, network, register_model

_DEEPEST = 8


def _halvings(size: int) -> int:
    """How often ``size`` can be halved."""
    return (size & -size).bit_length() - 1


@dataclass(frozen=True, kw_only=True)
class UNetPreset(Preset):
    """Options of BicycleGAN (Zhu et al., "Toward Multimodal Image-to-Image Translation", NeurIPS
    2017) and DSCGAN (Yang et al., "Diversity-Sensitive Conditional Generative Adversarial
    Networks", ICLR 2019): the same networks under another ``objective``.

    The U-Net halves the image until a side is odd, eight times at most: 1x1 at 256x256, as the
    published U-Net-256; the published U-Net-128 follows at 128x128. ``nef`` is the width of the
    encoder's first conv.
    """

    nef: int = 64
    latent_channels: int = 8
    objective: Literal["bicyclegan", "dscgan"] = "bicyclegan"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nef", "latent_channels"):
            self._check_positive(name)
        if self.objective not in ("bicyclegan", "dscgan"):
            raise ValueError(
                f"objective: expected bicyclegan or dscgan; got {self.objective!r}"
            )

    @property
    def size_step(self) -> int:
        return 32

    @property
    def depth(self) -> int:
        """How often the U-Net halves the image."""
        return min(_DEEPEST, *(_halvings(size) for size in self.image_size))


def _recipe(latent: float = 0.0, diversity: float = 0.0) -> Recipe:
    """Least squares on encoded and drawn codes alike, L1, no perceptual term.

    The published loop encodes half of its two pictures, and weighs the KL of that half with 0.01;
    here both are encoded. Its two discriminators, for encoded and for drawn codes, are one.
    """
    return {
        "data": {"name": "deepfashion", "batch": 2},
        "losses": {"gan": "ls", "scales": "sum", "feature_matching": 0.0, "perceptual": 0.0,
                   "pixel": 10.0, "kl": 0.01 / 2, "prior": 1.0, "latent": latent,
                   "diversity": diversity},
        "optimizer": ADAM_OF_PIX2PIX,
        "schedule": {"epochs": 100, "decay_epochs": 100, "falls": "before"},
    }


BICYCLEGAN = register_model(
    "bicyclegan_deepfashion",
    "BicycleGAN for DeepFashion: a U-Net with a latent code and its encoder, 256x256",
    UNetPreset(classes=8, image_size=(256, 256), ngf=64), _recipe(latent=0.5),
)
# BicycleGAN's training with the diversity term of DSCGAN in place of the code's regression. This
# deviates from the public DSGAN, whose codes are all drawn: no encoder and no KL, L1 between the
# drawn picture and the photograph, batches of 8, the discriminator updated before the generator,
# rates that fall with every step. GroupDNet's comparison, which this serves, encodes the codes of
# its pictures; its code for DSCGAN was not published.
DSCGAN = register_model(
    "dscgan_deepfashion",
    "DSCGAN for DeepFashion: BicycleGAN's networks, trained for diversity, 256x256",
    replace(BICYCLEGAN, objective="dscgan"), _recipe(diversity=8.0),
)


_WIDEST = 8  # times ngf
_ENCODER_WIDEST = 4  # times nef
_SLOPE = 0.2


def _halving(channels: int, out_channels: int) -> nn.Conv2d:
    return WinogradConv2d(channels, out_channels, 4, stride=2, padding=1)


@network("generator", UNetPreset)
class UNetGenerator(nn.Module):
    """U-Net of 4x4 convs, stride 2, that reads the latent code at every halving.

    Down: LeakyReLU(0.2) -> conv -> instance norm; up: ReLU -> transposed conv -> instance norm,
    concatenated with the features of the same size on the way down; tanh. The first conv has
    neither norm nor activation before it, the innermost no norm. The code is repeated over the
    pixels and concatenated with every conv's input ("U-Net-256, nz added to all layers").

    Args:
        preset: classes, image size, ``ngf``, ``latent_channels``.

    Shapes: semantics (N, classes [+ edge], any, any) or its layout, z (N, latent_channels) ->
        image (N, 3, *image_size) in [-1, 1].

    Raises:
        ValueError: semantics or z of another rank, channel count or batch size.

    Paper: Zhu et al., "Toward Multimodal Image-to-Image Translation", NeurIPS 2017.

    Example:
        >>> from smis_models import create_model
        >>> generator = create_model("bicyclegan_deepfashion", part="generator", ngf=8)
        >>> image = generator(torch.rand(1, 8, 256, 256), generator.sample_latent(1))
    """

    def __init__(self, preset: UNetPreset) -> None:
        super().__init__()
        self.preset = preset
        widths = [preset.ngf * min(2**i, _WIDEST) for i in range(preset.depth)]
        channels = preset.semantic_channels
        for i, width in enumerate(widths):
            self.add_module(f"down{i}", _halving(channels + preset.latent_channels, width))
            channels = width
        for i in reversed(range(preset.depth)):
            out = widths[i - 1] if i else 3
            layer = WinogradConvTranspose2d(channels, out, 4, stride=2, padding=1)
            self.add_module(f"up{i}", layer)
            channels = 2 * out

    def sample_latent(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """``batch`` codes from N(0, 1), drawn on the CPU: one seed, one picture on every device."""
        z = torch.randn((batch, self.preset.latent_channels), generator=generator)
        return z.to(next(self.parameters()))

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)

    def forward(self, semantics: Tensor | LabelLayout, z: Tensor) -> Tensor:
        preset, last = self.preset, self.preset.depth - 1
        check_semantics(semantics, preset)
        check_code(z, semantics.shape[0], preset.latent_channels)
        x = fast_format(resized(semantics, preset.image_size, z))
        code, kept = z[:, :, None, None], []
        for i in range(preset.depth):
            x = self._conv(f"down{i}", torch.cat([x, code.expand(-1, -1, *x.shape[2:])], 1))
            if i == 0:
                x, code = F.leaky_relu(x, _SLOPE), F.leaky_relu(code, _SLOPE)
            elif i < last:
                x = norm_act(x, activation="leaky_relu", negative_slope=_SLOPE)
            kept.append(F.relu(x))  # which of a LeakyReLU's output is that of its input
        x = kept.pop()
        for i in range(last, 0, -1):
            x = norm_act(self._conv(f"up{i}", x), activation="relu")
            x = torch.cat([x, kept.pop()], 1)
        return torch.tanh(self._conv("up0", x))


class _ResidualBlock(nn.Module):
    """Instance norm -> LeakyReLU -> conv 3x3, twice, halved by averaging; plus a halved 1x1."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_0 = WinogradConv2d(channels, channels, 3, padding=1)
        self.conv_1 = WinogradConv2d(channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in (self.conv_0, self.conv_1):
            h = layer(norm_act(h, activation="leaky_relu", negative_slope=_SLOPE))
        shortcut: Tensor = self.shortcut(F.avg_pool2d(x, 2))
        return F.avg_pool2d(h, 2) + shortcut


@network("encoder", UNetPreset)
class ResNetEncoder(CodeEncoder):
    """Residual image encoder: mean and log variance of the latent code of a whole image.

    Conv 4x4, stride 2; residual blocks that halve down to 8x8; LeakyReLU(0.2); the mean over the
    image; two linear heads.

    Args:
        preset: ``nef``, ``latent_channels``, and the image size, which sets the number of blocks:
            four at 256x256, as the published resnet_256.

    Shapes: x (N, 3, H, W) in [-1, 1] -> mu, logvar (N, latent_channels) each.

    Raises:
        ValueError: another number of channels.

    Paper: Zhu et al., "Toward Multimodal Image-to-Image Translation", NeurIPS 2017.

    Example:
        >>> from smis_models import create_model, reparameterize
        >>> encoder = create_model("bicyclegan_deepfashion", part="encoder", nef=8)
        >>> z = reparameterize(*encoder(torch.rand(1, 3, 256, 256)))
    """

    def __init__(self, preset: UNetPreset) -> None:
        super().__init__()
        width = preset.nef
        layers: list[nn.Module] = [_halving(3, width)]
        for n in range(1, preset.depth - 3):
            out = preset.nef * min(n + 1, _ENCODER_WIDEST)
            layers.append(_ResidualBlock(width, out))
            width = out
        self.layers = nn.Sequential(*layers)
        self.add_heads(width, preset.latent_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_maps("x", x, 3, "an image")
        x = F.leaky_relu(self.layers(fast_format(x)), _SLOPE).mean((2, 3))
        return self.fc_mu(x), self.fc_var(x)
