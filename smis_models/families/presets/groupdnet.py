"""GroupDNet's published options, and those of the systems that it was compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from .base import LatentPreset


@dataclass(frozen=True)
class NormWidths:
    """Sizes of the convs that predict gamma and beta in one CG-Norm."""

    hidden: int
    groups: int
    shared_groups: int


@dataclass(frozen=True, kw_only=True)
class GroupDNetPreset(LatentPreset):
    """Options of one GroupDNet (Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020).

    ``widths`` and ``groups`` are those of the blocks after ``head_0`` (``G_middle_0``,
    ``G_middle_1``, ``up_0``, ...), widths in units of ``ngf``; a seventh, ``up_4``, is called with
    upsampling "most" alone; ``head_0`` has 16 channels per class where ``head_per_class``, else
    16·ngf. ``start_groups`` (of ``fc`` and ``head_0``) and ``encoder_groups`` (of every layer of
    the encoder) are one per class where None, as published;
    ``encoder_depth``, the encoder's number of strided convs, leads to the size at which the
    generator starts (the published code has six from 256 pixels on, else five, which fits there).
    ``fusion`` says how the last features become a picture: "conv" as published, or "masks", for
    which they are as many groups as classes, and each class's group is kept where the class is.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6, "most": 7}

    nef: int
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    modulation: Literal["fixed", "per_class", "shared_per_class"]
    head_per_class: bool = False
    start_groups: int | None = None
    encoder_groups: int | None = None
    encoder_depth: int | None = None
    fusion: Literal["conv", "masks"] = "conv"
    latent_channels: int = 8
    upsampling: Literal["normal", "more", "most"] = "more"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("nef")
        for name in ("start_groups", "encoder_groups", "encoder_depth"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        if len(self.widths) != len(self.groups) or len(self.widths) not in (6, 7):
            raise ValueError(
                "widths, groups: expected one entry each for G_middle_0, G_middle_1, up_0, ..., "
                f"up_3 (and up_4); got {len(self.widths)} and {len(self.groups)}"
            )
        if self.upsampling == "most" and len(self.widths) != 7:
            raise ValueError(
                "upsampling: 'most' expected widths and groups with a seventh entry, of up_4; "
                f"got {len(self.widths)}"
            )
        if self.fusion not in ("conv", "masks"):
            raise ValueError(f"fusion: expected conv or masks; got {self.fusion!r}")
        if self.fusion == "masks" and self.last_width % self.classes:
            raise ValueError(
                f"fusion: 'masks' expected a last width divisible by the {self.classes} classes, "
                f"got {self.last_width}; change ngf"
            )

    @property
    def head_channels(self) -> int:
        """Width of ``fc`` and ``head_0``."""
        return 16 * (self.classes if self.head_per_class else self.ngf)

    @property
    def called(self) -> int:
        """How many blocks after ``head_0`` are called: up_4 is with upsampling "most" alone."""
        return 7 if self.upsampling == "most" else 6

    @property
    def last_width(self) -> int:
        """Width of the last block that is called."""
        return self.widths[self.called - 1] * self.ngf

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
    classes=151, image_size=(256, 256), ngf=64, nef=604, dont_care=150, unlabelled=0,
    head_per_class=True, widths=(32, 16, 16, 8, 4, 2, 1), groups=(16, 16, 8, 4, 2, 1, 1),
    modulation="shared_per_class",
)
# Small enough to be trained on a CPU and to ship: DeepFashion's schedule of groups on the scenes
# that the package draws. One code for the whole of a class, not one for each part of the picture.
SCENES = GroupDNetPreset(
    classes=8, image_size=(128, 128), ngf=16, nef=64, ndf=16,
    widths=(16, 16, 8, 4, 2, 1, 1), groups=(8, 4, 4, 2, 2, 1, 1), modulation="fixed",
    upsampling="most",
)

# The systems of the paper's table whose networks are GroupDNet's under another schedule of groups.
# Where the paper leaves a width open, it is the one that gives the table's parameter count.
#
# GroupNet: as many groups as classes everywhere; only the last conv sees all classes (97.69 M of
# the table's 97.7).
GROUPNET = replace(DEEPFASHION, ngf=192, groups=(8,) * 6)
# MulNet: a network of its own for each class. Side by side they are the groups of one network; each
# paints from its own code and its own class's mask, its features are kept where its class is, and
# the last conv reads their sum (104.48 M of 105.1).
MULNET = replace(GROUPNET, ngf=200, fusion="masks")
# GroupEnc: GroupDNet's encoder, and a decoder without groups (105.56 M of 105.5).
GROUPENC = replace(DEEPFASHION, ngf=64, start_groups=1, groups=(1,) * 6)
# GroupDec: GroupDNet's decoder, and an encoder without groups that reads the same class crops
# (111.33 M of 111.3).
GROUPDEC = replace(DEEPFASHION, nef=96, encoder_groups=1)
