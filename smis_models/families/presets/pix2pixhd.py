"""pix2pixHD's published options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from .base import Preset


@dataclass(frozen=True, kw_only=True)
class Pix2pixHDPreset(Preset):
    """Options of one pix2pixHD (Wang et al., "High-Resolution Image Synthesis and Semantic
    Manipulation with Conditional GANs", CVPR 2018).

    ``enhancers`` local enhancers, with ``local_blocks`` residual blocks each, lie around a global
    generator of ``blocks`` blocks and width ngf·2^enhancers; 0: the global generator alone. With
    ``features`` the generator reads ``feature_channels`` planes of instance features too.
    """

    init_rule: ClassVar[Literal["xavier", "normal"]] = "normal"

    enhancers: int = 0
    downsamplings: int = 4
    blocks: int = 9
    local_blocks: int = 3
    features: bool = False
    feature_channels: int = 3
    nef: int = 16
    encoder_downsamplings: int = 4
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("downsamplings", "nef", "encoder_downsamplings", "feature_channels"):
            self._check_positive(name)
        for name in ("enhancers", "blocks", "local_blocks"):
            self._check_positive(name, 0)

    @property
    def size_step(self) -> int:
        return int(2 ** (self.downsamplings + self.enhancers))

    @property
    def has_encoder(self) -> bool:
        return self.features

    @property
    def input_channels(self) -> int:
        """Channels that the generator reads: semantics, and features where it takes them."""
        return self.semantic_channels + (self.feature_channels if self.features else 0)


PIX2PIXHD_CITYSCAPES = Pix2pixHDPreset(
    classes=35, image_size=(512, 1024), ngf=64, instance_edge=True,
)
PIX2PIXHD_CITYSCAPES_FEATURES = replace(PIX2PIXHD_CITYSCAPES, features=True)
PIX2PIXHD_CITYSCAPES_1024 = replace(
    PIX2PIXHD_CITYSCAPES, image_size=(1024, 2048), ngf=32, enhancers=1, discriminator_scales=3,
)
