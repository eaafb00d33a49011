"""SPADE's generator, and the image encoder that turns it into a VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import SPADE, LabelLayout
from smis_kernels.modulation.choice import prepare_map

from .blocks import SPADEResBlock, check_maps, conv, fast_format
from .presets import SPADEPreset

# Widths of the blocks' outputs in units of ngf.
_WIDTHS = {"head_0": 16, "G_middle_0": 16, "G_middle_1": 16,
           "up_0": 8, "up_1": 4, "up_2": 2, "up_3": 1}
_ENCODED = 256  # the encoder reads images of this height and width


class SPADEGenerator(nn.Module):
    """SPADE's generator: a label map, and with ``vae`` a latent code, to an image.

    ``fc`` makes the first features: a 3x3 conv of the semantics resized by nearest, or with
    ``vae`` a linear layer of the code. Then residual blocks with nearest x2 upsampling between
    them -> LeakyReLU -> ``conv_img`` -> tanh.

    Args:
        preset: classes, widths, image size, upsampling ("normal" five times, "more" six, "most"
            seven with one more block), ``vae``.

    Shapes: semantics (N, classes [+ edge], any, any) or its layout; z (N, latent_channels) with
        ``vae``, else None -> image (N, 3, *image_size) in [-1, 1].

    Raises:
        ValueError: semantics or z of another rank, channel count or batch size; a missing z, or
            one that the generator has no use for.

    Paper: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019.

    Example:
        >>> generator = create_model("spade_coco", part="generator")
        >>> image = generator(semantics)
    """

    def __init__(self, preset: SPADEPreset) -> None:
        super().__init__()
        self.preset = preset
        height, width = preset.latent_size
        channels = _WIDTHS["head_0"] * preset.ngf
        self.fc: nn.Linear | nn.Conv2d = (
            nn.Linear(preset.latent_channels, channels * height * width) if preset.vae
            else conv(preset.semantic_channels, channels, what="fc")
        )
        widths = {name: factor * preset.ngf for name, factor in _WIDTHS.items()}
        if preset.upsampling == "most":
            widths["up_4"] = preset.ngf // 2
        for name, out in widths.items():
            self.add_module(name, SPADEResBlock(channels, out, self._norm, what=name))
            channels = out
        self.conv_img = conv(channels, 3)
        held = {"head_0"} if preset.upsampling != "normal" else {"head_0", "G_middle_1"}
        self._upsample = {name: name not in held for name in widths}

    def _norm(self, channels: int) -> SPADE:
        preset = self.preset
        return SPADE(channels, preset.semantic_channels, preset.hidden, norm=preset.norm)

    def sample_latent(self, batch: int, generator: torch.Generator | None = None) -> Tensor | None:
        """``batch`` codes from N(0, 1), drawn on the CPU; None without ``vae``."""
        if not self.preset.vae:
            return None
        z = torch.randn((batch, self.preset.latent_channels), generator=generator)
        return z.to(self.fc.weight)

    def forward(self, semantics: Tensor | LabelLayout, z: Tensor | None = None) -> Tensor:
        preset = self.preset
        check_maps("semantics", semantics, preset.semantic_channels, "one channel per class"
                   + (" and the edge plane" if preset.instance_edge else ""))
        segmap = prepare_map(semantics, self.fc.weight)
        x = fast_format(self._start(semantics, z))
        for name, upsample in self._upsample.items():
            x = self.get_submodule(name)(x, segmap, upsample=upsample)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))

    def _start(self, semantics: Tensor | LabelLayout, z: Tensor | None) -> Tensor:
        """The first features, (N, 16·ngf, h, w)."""
        preset = self.preset
        if preset.vae:
            expected = (semantics.shape[0], preset.latent_channels)
            if z is None or tuple(z.shape) != expected:
                got = None if z is None else tuple(z.shape)
                raise ValueError(
                    f"z: expected {expected}, the semantics' batch size and the latent channels; "
                    f"got {got}; sample_latent(batch) draws one"
                )
            features: Tensor = self.fc(z)
            return features.view(len(z), -1, *preset.latent_size)
        if z is not None:
            raise ValueError(
                f"z: expected None, for without vae the picture follows from the semantics; got "
                f"{tuple(z.shape)}"
            )
        if isinstance(semantics, LabelLayout):
            small = semantics.dense(preset.latent_size, self.fc.weight.dtype)
        else:
            small = F.interpolate(semantics, preset.latent_size, mode="nearest")
        start: Tensor = self.fc(small)
        return start


class SPADEEncoder(nn.Module):
    """SPADE's image encoder: mean and log variance of the latent code of a whole image.

    The image is resized to 256x256 (bilinear); six convs 3x3, stride 2, spectral and instance
    normalised, LeakyReLU(0.2); then two linear heads.

    Args:
        preset: options; ``ngf`` is the width of the first conv.

    Shapes: x (N, 3, H, W) in [-1, 1] -> mu, logvar (N, latent_channels) each.

    Raises:
        ValueError: another number of channels.

    Paper: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019.

    Example:
        >>> encoder = create_model("spade_coco_vae", part="encoder")
        >>> z = reparameterize(*encoder(image))
    """

    def __init__(self, preset: SPADEPreset) -> None:
        super().__init__()
        channels = 3
        for i, factor in enumerate((1, 2, 4, 8, 8, 8)):
            out = factor * preset.ngf
            layer = conv(channels, out, stride=2, bias=False, spectral=True)
            self.add_module(f"layer{i + 1}", nn.Sequential(layer, nn.InstanceNorm2d(out)))
            channels = out
        flat = channels * (_ENCODED // 64) ** 2
        self.fc_mu = nn.Linear(flat, preset.latent_channels)
        self.fc_var = nn.Linear(flat, preset.latent_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_maps("x", x, 3, "an image")
        if tuple(x.shape[2:]) != (_ENCODED, _ENCODED):
            x = F.interpolate(x, (_ENCODED, _ENCODED), mode="bilinear", align_corners=False)
        for i in range(6):
            x = F.leaky_relu(self.get_submodule(f"layer{i + 1}")(x), 0.2)
        x = x.flatten(1)
        return self.fc_mu(x), self.fc_var(x)
