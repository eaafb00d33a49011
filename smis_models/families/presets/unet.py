"""The options of BicycleGAN and DSCGAN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .base import Preset

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


BICYCLEGAN = UNetPreset(classes=8, image_size=(256, 256), ngf=64)
DSCGAN = replace(BICYCLEGAN, objective="dscgan")
