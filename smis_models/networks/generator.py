"""What the generators of SPADE's family share: they paint upwards from small first features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import LabelLayout
from smis_kernels.interface import prepare_map

from .blocks import check_semantics, conv
from .preset import CodePreset, LatentPreset

# The blocks in order, and the widths of their outputs in units of ngf.
WIDTHS = {"head_0": 16, "G_middle_0": 16, "G_middle_1": 16,
          "up_0": 8, "up_1": 4, "up_2": 2, "up_3": 1}


class UpwardGenerator(nn.Module):
    """First features -> blocks with nearest x2 upsampling between them -> LeakyReLU -> ``conv_img``
    -> tanh; the base of SPADE's, GroupDNet's and CC-FPSE's generators.
    """

    preset: LatentPreset
    conv_img: nn.Conv2d

    def _segmap(self, semantics: Tensor | LabelLayout) -> Tensor | LabelLayout:
        """The semantics, checked, and compiled where tables may serve."""
        check_semantics(semantics, self.preset)
        return prepare_map(semantics, self.conv_img.weight)

    def _upsamples(self, name: str) -> bool:
        """Whether the features are upsampled before the block."""
        same_size = ("head_0", "G_middle_1") if self.preset.upsampling == "normal" else ("head_0",)
        return name not in same_size

    def _picture(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


def resized(semantics: Tensor | LabelLayout, size: tuple[int, int], like: Tensor) -> Tensor:
    """The planes of a map or its layout at ``size``, by nearest, in the dtype of ``like``."""
    if isinstance(semantics, LabelLayout):
        return semantics.dense(size, like.dtype)
    if tuple(semantics.shape[2:]) == tuple(size):
        return semantics
    return F.interpolate(semantics, size, mode="nearest")


class CodeGenerator(UpwardGenerator):
    """The start of SPADE and CC-FPSE: ``fc`` is a linear layer of one code for the whole picture
    with ``vae``, else a 3x3 conv of the semantics resized by nearest.
    """

    preset: CodePreset

    def __init__(self, preset: CodePreset) -> None:
        super().__init__()
        self.preset = preset
        height, width = preset.latent_size
        channels = WIDTHS["head_0"] * preset.ngf
        self.fc: nn.Linear | nn.Conv2d = (
            nn.Linear(preset.latent_channels, channels * height * width) if preset.vae
            else conv(preset.semantic_channels, channels, what="fc")
        )

    def sample_latent(self, batch: int, generator: torch.Generator | None = None) -> Tensor | None:
        """``batch`` codes from N(0, 1), drawn on the CPU; None without ``vae``."""
        if not self.preset.vae:
            return None
        z = torch.randn((batch, self.preset.latent_channels), generator=generator)
        return z.to(self.fc.weight)

    def _start(self, semantics: Tensor | LabelLayout, z: Tensor | None) -> Tensor:
        """The first features, (N, 16·ngf, h, w)."""
        preset = self.preset
        if preset.vae:
            check_code(z, semantics.shape[0], preset.latent_channels)
            features: Tensor = self.fc(z)
            return features.view(features.shape[0], -1, *preset.latent_size)
        if z is not None:
            raise ValueError(
                f"z: expected None, for without vae the picture follows from the semantics; got "
                f"{tuple(z.shape)}"
            )
        return self.fc(resized(semantics, preset.latent_size, self.fc.weight))


def check_code(z: Tensor | None, batch: int, channels: int) -> None:
    """Refuse what is no code of whole pictures, (N, channels)."""
    if z is None or tuple(z.shape) != (batch, channels):
        got = None if z is None else tuple(z.shape)
        raise ValueError(
            f"z: expected {(batch, channels)}, the semantics' batch size and the latent channels; "
            f"got {got}; sample_latent(batch) draws one"
        )
