"""Published options of every network: a frozen dataclass per family, an instance per data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar


@dataclass(frozen=True)
class NormWidths:
    """Sizes of the convs that predict gamma and beta in one CG-Norm."""

    hidden: int
    groups: int
    shared_groups: int


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options of every family.

    ``classes`` counts every one-hot channel, don't-care class included; ``image_size`` is (height,
    width).
    """

    classes: int
    image_size: tuple[int, int]
    ngf: int
    instance_edge: bool = False
    dont_care: int | None = None
    ndf: int = 64
    discriminator_scales: int = 2
    discriminator_layers: int = 4

    def __post_init__(self) -> None:
        step = self.size_step
        if len(self.image_size) != 2 or any(s < step or s % step for s in self.image_size):
            raise ValueError(
                f"image_size: expected (height, width), both multiples of {step}{self._size_rule}; "
                f"got {self.image_size}"
            )
        for name in ("classes", "ngf", "ndf"):
            self._check_positive(name)
        if self.dont_care is not None and not 0 <= self.dont_care < self.classes:
            raise ValueError(
                f"dont_care: expected a class 0..{self.classes - 1} or None, got {self.dont_care}"
            )

    def _check_positive(self, name: str, least: int = 1) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @property
    def size_step(self) -> int:
        """What height and width must be multiples of."""
        raise NotImplementedError

    @property
    def _size_rule(self) -> str:
        """The option that fixes the step, for errors."""
        return ""

    @property
    def semantic_channels(self) -> int:
        """Channels of the generator's semantics: one-hot, and the edge plane where there is one."""
        return self.classes + self.instance_edge

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder belongs to the model."""
        return True


@dataclass(frozen=True, kw_only=True)
class LatentPreset(Preset):
    """Options of the families that paint from a small start, upwards by nearest x2 steps."""

    upsamplings: ClassVar[Mapping[str, int]]  # nearest x2 steps from the start to the image

    latent_channels: int
    upsampling: str
    norm: Literal["batch", "syncbatch", "instance"] = "syncbatch"

    def __post_init__(self) -> None:
        if self.upsampling not in self.upsamplings:
            raise ValueError(
                f"upsampling: expected {' or '.join(self.upsamplings)}; got {self.upsampling!r}"
            )
        super().__post_init__()
        self._check_positive("latent_channels")

    @property
    def size_step(self) -> int:
        return 2 ** self.upsamplings[self.upsampling]

    @property
    def _size_rule(self) -> str:
        return f" with upsampling={self.upsampling!r}"

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width at which the generator starts."""
        return self.image_size[0] // self.size_step, self.image_size[1] // self.size_step


@dataclass(frozen=True, kw_only=True)
class GroupDNetPreset(LatentPreset):
    """Options of one GroupDNet (Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020).

    ``widths`` and ``groups`` are those of the blocks after ``head_0`` (``G_middle_0``,
    ``G_middle_1``, ``up_0``, ...), widths in units of ``ngf``; ``head_0`` has 16 channels per class
    where ``head_per_class``, else 16·ngf, in ``classes`` groups.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6}

    nef: int
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    modulation: Literal["fixed", "per_class", "shared_per_class"]
    head_per_class: bool = False
    latent_channels: int = 8
    upsampling: Literal["normal", "more"] = "more"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("nef")
        if len(self.widths) != len(self.groups) or len(self.widths) not in (6, 7):
            raise ValueError(
                "widths, groups: expected one entry each for G_middle_0, G_middle_1, up_0, ..., "
                f"up_3 (and the unused up_4); got {len(self.widths)} and {len(self.groups)}"
            )

    @property
    def head_channels(self) -> int:
        """Width of ``fc`` and ``head_0``."""
        return 16 * (self.classes if self.head_per_class else self.ngf)

    def norm_widths(self, groups: int) -> NormWidths:
        """CG-Norm sizes inside a block of ``groups`` groups: one published rule per data set."""
        c = self.classes
        if self.modulation == "fixed":
            return NormWidths(hidden=128, groups=groups, shared_groups=groups)
        if self.modulation == "per_class":
            return NormWidths(hidden=c * groups, groups=c, shared_groups=c)
        hidden = 2 * c if c % groups == 0 else c * groups
        return NormWidths(hidden=hidden, groups=groups, shared_groups=c)


DEEPFASHION = GroupDNetPreset(
    classes=8, image_size=(256, 256), ngf=160, nef=256,
    widths=(16, 16, 8, 4, 2, 1), groups=(8, 4, 4, 2, 2, 1), modulation="fixed",
)
CITYSCAPES = GroupDNetPreset(
    classes=35, image_size=(256, 512), ngf=280, nef=350, instance_edge=True,
    widths=(16, 16, 8, 4, 2, 1), groups=(35, 20, 14, 10, 4, 1), modulation="per_class",
)
# The seventh block, up_4, lies in the published checkpoint but is never called.
ADE20K = GroupDNetPreset(
    classes=151, image_size=(256, 256), ngf=64, nef=604, dont_care=150, head_per_class=True,
    widths=(32, 16, 16, 8, 4, 2, 1), groups=(16, 16, 8, 4, 2, 1, 1), modulation="shared_per_class",
)



@dataclass(frozen=True, kw_only=True)
class SPADEPreset(LatentPreset):
    """Options of one SPADE (Park et al., "Semantic Image Synthesis with
    Spatially-Adaptive Normalization", CVPR 2019).

    With ``vae`` the generator starts from a latent code, which an image encoder of width ``ngf``
    gives; else from the semantics at the size of the first features. ``hidden`` is the width of
    ``mlp_shared`` in every norm.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6, "most": 7}

    vae: bool = False
    latent_channels: int = 256
    hidden: int = 128
    upsampling: Literal["normal", "more", "most"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("hidden")
        if self.upsampling == "most":  # whose last block has ngf / 2 channels
            self._check_positive("ngf", 2)

    @property
    def has_encoder(self) -> bool:
        return self.vae


SPADE_COCO = SPADEPreset(
    classes=183, image_size=(256, 256), ngf=64, instance_edge=True, dont_care=182,
)
SPADE_COCO_VAE = replace(SPADE_COCO, vae=True)
SPADE_ADE20K = SPADEPreset(classes=151, image_size=(256, 256), ngf=64, dont_care=150)
SPADE_CITYSCAPES = SPADEPreset(
    classes=35, image_size=(256, 512), ngf=64, instance_edge=True, upsampling="more",
)

@dataclass(frozen=True, kw_only=True)
class CCFPSEPreset(LatentPreset):
    """Options of one CC-FPSE (Liu et al., "Learning to Predict Layout-to-image Conditional
    Convolutions for Semantic Image Synthesis", NeurIPS 2019).

    With ``vae`` (as published) the generator starts from a latent code, which an image encoder of
    width ``ngf`` gives; else from the semantics at the size of the first features. ``hidden`` is
    the width of the layer from which kernels, gates and modulation are predicted.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6}

    vae: bool = True
    latent_channels: int = 256
    hidden: int = 128
    upsampling: Literal["normal", "more"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("hidden")

    @property
    def has_encoder(self) -> bool:
        return self.vae


CCFPSE_COCO = CCFPSEPreset(
    classes=183, image_size=(256, 256), ngf=64, instance_edge=True, dont_care=182,
)
CCFPSE_ADE20K = CCFPSEPreset(classes=151, image_size=(256, 256), ngf=64, dont_care=150)
CCFPSE_CITYSCAPES = CCFPSEPreset(
    classes=35, image_size=(256, 512), ngf=64, instance_edge=True, upsampling="more",
)

@dataclass(frozen=True, kw_only=True)
class Pix2pixHDPreset(Preset):
    """Options of one pix2pixHD (Wang et al., "High-Resolution Image Synthesis and Semantic
    Manipulation with Conditional GANs", CVPR 2018).

    ``enhancers`` local enhancers, with ``local_blocks`` residual blocks each, lie around a global
    generator of ``blocks`` blocks and width ngf·2^enhancers; 0: the global generator alone. With
    ``features`` the generator reads ``feature_channels`` planes of instance features too.
    """

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

P = TypeVar("P", bound=Preset)


def with_options(preset: P, options: Mapping[str, Any], model: str) -> P:
    """``preset`` with ``options`` replaced; an unknown name raises a TypeError with the known."""
    known = [field.name for field in fields(preset)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{model}: unknown option {unknown[0]!r}; expected {', '.join(known)}")
    return replace(preset, **options)
