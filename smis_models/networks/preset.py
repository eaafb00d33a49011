"""Options that every family has: frozen dataclasses that check themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar, Literal, TypeVar


def is_whole(value: Any) -> bool:
    """Whether an option is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options of every family.

    ``classes`` counts every one-hot channel, don't-care class included; ``image_size`` is (height,
    width). Pixels that a file labels 255 get the class ``dont_care``. ``unlabelled`` is the class
    that stands for pixels without one in the data set's own files, where it is another: ADE20K's
    maps are read raw, 0 unlabelled and 1..150 the classes, for the published shift by one never
    takes effect.
    """

    init_rule: ClassVar[Literal["xavier", "normal"]] = "xavier"
    """How the family's weights start: see :func:`smis_models.networks.blocks.init_weights`."""

    classes: int
    image_size: tuple[int, int]
    ngf: int
    instance_edge: bool = False
    dont_care: int | None = None
    unlabelled: int | None = None
    ndf: int = 64
    discriminator_scales: int = 2
    discriminator_layers: int = 4

    def __post_init__(self) -> None:
        step, size = self.size_step, self.image_size
        pair = isinstance(size, (tuple, list)) and len(size) == 2
        if not pair or not all(is_whole(s) and s >= step and s % step == 0 for s in size):
            raise ValueError(
                f"image_size: expected (height, width), both multiples of {step}{self._size_rule}; "
                f"got {self.image_size}"
            )
        for name in ("classes", "ngf", "ndf", "discriminator_scales", "discriminator_layers"):
            self._check_positive(name)
        for name in ("dont_care", "unlabelled"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and 0 <= value < self.classes):
                raise ValueError(
                    f"{name}: expected a class 0..{self.classes - 1} or None, got {value!r}"
                )

    def _check_positive(self, name: str, least: int = 1) -> None:
        value = getattr(self, name)
        if not is_whole(value) or value < least:
            raise ValueError(f"{name}: expected at least {least}, a whole number; got {value!r}")

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
class CodePreset(LatentPreset):
    """Options of the generators that can start from one code for the whole picture.

    With ``vae`` the generator starts from a latent code, which an image encoder of width ``ngf``
    gives; else from the semantics at the size of the first features. ``hidden`` is the width of
    the layer from which modulation (and CC-FPSE's kernels and gates) are predicted.
    """

    vae: bool = False
    latent_channels: int = 256
    hidden: int = 128
    upsampling: Literal["normal", "more", "most"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("hidden")

    @property
    def has_encoder(self) -> bool:
        return self.vae


P = TypeVar("P", bound=Preset)


def with_options(preset: P, options: Mapping[str, Any], model: str) -> P:
    """``preset`` with ``options`` replaced; an unknown name raises a TypeError with the known."""
    known = [field.name for field in fields(preset)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{model}: unknown option {unknown[0]!r}; expected {', '.join(known)}")
    return replace(preset, **options)
