"""Published options of every network: a frozen dataclass per family, an instance per data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

UPSAMPLINGS = {"normal": 5, "more": 6}


@dataclass(frozen=True)
class NormWidths:
    """Sizes of the convs that predict gamma and beta in one CG-Norm."""

    hidden: int
    groups: int
    shared_groups: int


@dataclass(frozen=True)
class GroupDNetPreset:
    """Options of one GroupDNet (Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020).

    ``classes`` counts every one-hot channel, don't-care class included. ``widths`` and ``groups``
    are those of the blocks after ``head_0`` (``G_middle_0``, ``G_middle_1``, ``up_0``, ...), widths
    in units of ``ngf``; ``head_0`` has 16 channels per class where ``head_per_class``, else
    16·ngf, in ``classes`` groups.
    """

    classes: int
    image_size: tuple[int, int]
    ngf: int
    nef: int
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    modulation: Literal["fixed", "per_class", "shared_per_class"]
    head_per_class: bool = False
    instance_edge: bool = False
    dont_care: int | None = None
    latent_channels: int = 8
    upsampling: Literal["normal", "more"] = "more"
    norm: Literal["batch", "syncbatch", "instance"] = "syncbatch"
    ndf: int = 64
    discriminator_scales: int = 2
    discriminator_layers: int = 4

    def __post_init__(self) -> None:
        if self.upsampling not in UPSAMPLINGS:
            raise ValueError(
                f"upsampling: expected {' or '.join(UPSAMPLINGS)}; got {self.upsampling!r}"
            )
        step = 2 ** UPSAMPLINGS[self.upsampling]
        if len(self.image_size) != 2 or any(s < step or s % step for s in self.image_size):
            raise ValueError(
                f"image_size: expected (height, width), both multiples of {step} with "
                f"upsampling={self.upsampling!r}; got {self.image_size}"
            )
        if len(self.widths) != len(self.groups) or len(self.widths) not in (6, 7):
            raise ValueError(
                "widths, groups: expected one entry each for G_middle_0, G_middle_1, up_0, ..., "
                f"up_3 (and the unused up_4); got {len(self.widths)} and {len(self.groups)}"
            )
        for name in ("classes", "ngf", "nef", "ndf", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dont_care is not None and not 0 <= self.dont_care < self.classes:
            raise ValueError(
                f"dont_care: expected a class 0..{self.classes - 1} or None, got {self.dont_care}"
            )

    @property
    def semantic_channels(self) -> int:
        """Channels of the generator's semantics: one-hot, and the edge plane where there is one."""
        return self.classes + self.instance_edge

    @property
    def head_channels(self) -> int:
        """Width of ``fc`` and ``head_0``."""
        return 16 * (self.classes if self.head_per_class else self.ngf)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latent code."""
        step = 2 ** UPSAMPLINGS[self.upsampling]
        return self.image_size[0] // step, self.image_size[1] // step

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

P = TypeVar("P", bound=GroupDNetPreset)


def with_options(preset: P, options: Mapping[str, Any], model: str) -> P:
    """``preset`` with ``options`` replaced; an unknown name raises a TypeError with the known."""
    known = [field.name for field in fields(preset)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{model}: unknown option {unknown[0]!r}; expected {', '.join(known)}")
    return replace(preset, **options)
