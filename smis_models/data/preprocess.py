"""Resize, crop and flip, as the published loaders do: one plan for the picture and its maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ..io.images import resize_nearest, resize_picture

T = TypeVar("T", bound=np.generic)

Mode = Literal[
    "resize", "resize_and_crop", "crop", "scale_width", "scale_width_and_crop",
    "scale_shortside", "scale_shortside_and_crop", "fixed", "none",
]
MODES: tuple[str, ...] = get_args(Mode)
PICTURE_FILTER, LABEL_FILTER = "bicubic", "nearest, pixel centres (Pillow NEAREST)"


@dataclass(frozen=True)
class Transform:
    """What happens to every file of a scene: resized, cut to a box (top, left, height, width),
    mirrored."""

    resized: tuple[int, int]
    box: tuple[int, int, int, int] | None
    flip: bool

    def _cut(self, pixels: NDArray[T]) -> NDArray[T]:
        if self.box is not None:
            top, left, height, width = self.box
            pixels = pixels[top:top + height, left:left + width]
        return np.ascontiguousarray(pixels[:, ::-1] if self.flip else pixels)

    def picture(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, resized bicubically."""
        return self._cut(resize_picture(picture, self.resized))

    def indices(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """(H, W) labels or ids, resized by :func:`smis_models.io.images.resize_nearest`."""
        return self._cut(resize_nearest(indices, self.resized).astype(np.int32))


@dataclass(frozen=True)
class Preprocess:
    """The published preprocess modes of pix2pixHD, SPADE, CC-FPSE and SMIS.

    ============================ ===================================================
    ``resize``                   to ``load``, aspect ratio ignored
    ``resize_and_crop``          to ``load``, aspect ratio ignored; crop ``size``
    ``crop``                     crop ``size``
    ``scale_width``              to the width of ``load``, aspect ratio kept
    ``scale_width_and_crop``     the same; crop ``size``
    ``scale_shortside``          the shorter side to that of ``load``, aspect kept
    ``scale_shortside_and_crop`` the same; crop ``size``
    ``fixed``                    to ``size``, aspect ratio ignored
    ``none``                     each side to the nearest multiple of ``multiple``
    ============================ ===================================================

    Pictures are resized bicubically, labels and ids by nearest. Where ``augment``, the place of the
    crop is drawn uniformly and the scene is mirrored with probability 1/2 (if ``flip``); otherwise
    the crop is central and nothing is mirrored.

    Args:
        mode: see above.
        size: (height, width) of the crop, and of ``fixed``.
        load: (height, width) to resize to; by default ``size``.
        augment: whether crop and flip are drawn.
        flip: whether scenes are mirrored when augmented.
        multiple: of ``none``: 32 in SPADE, 16 in pix2pixHD's global generator.

    Raises:
        ValueError: an unknown mode, a size below 1, a crop larger than what it is cut from.

    Example:
        >>> r = np.random.default_rng(0)
        >>> plan = Preprocess("resize_and_crop", (256, 256), (286, 286)).plan((480, 640), r)
        >>> plan.indices(np.zeros((480, 640), np.uint8)).shape
        (256, 256)
    """

    mode: Mode
    size: tuple[int, int]
    load: tuple[int, int] | None = None
    augment: bool = True
    flip: bool = True
    multiple: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected {', '.join(MODES)}; got {self.mode!r}")
        for name in ("size", "load"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or min(value) < 1):
                raise ValueError(f"{name}: expected (height, width) of at least 1, got {value}")
        if self.multiple < 1:
            raise ValueError(f"multiple: expected at least 1, got {self.multiple}")
        if self.mode == "resize_and_crop":
            self._check_crop(self.load or self.size)

    @property
    def keeps_size(self) -> bool:
        """Whether pixels are cut out as they are: picture and maps must have one size then."""
        return self.mode == "crop"

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every result, or None where it depends on the scene."""
        if self.mode == "resize":
            return self.load or self.size
        return self.size if self.mode == "fixed" or self.mode.endswith("crop") else None

    def _check_crop(self, resized: tuple[int, int]) -> None:
        if resized[0] < self.size[0] or resized[1] < self.size[1]:
            raise ValueError(
                f"size: the crop {self.size[0]}x{self.size[1]} is larger than the scene "
                f"({resized[0]}x{resized[1]} after resizing); choose a smaller crop, a larger "
                "load size, or a mode that resizes"
            )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        load = self.load or self.size
        if self.mode.startswith("resize"):
            return load
        if self.mode.startswith("scale_width"):
            return load[1] * height // width, load[1]
        if self.mode.startswith("scale_shortside"):
            short = min(load)
            return ((short, int(short * width / height)) if height <= width
                    else (int(short * height / width), short))
        if self.mode == "fixed":
            return self.size
        if self.mode == "none":
            h, w = (max(1, round(s / self.multiple)) * self.multiple for s in (height, width))
            return h, w
        return height, width

    @property
    def filters(self) -> dict[str, str]:
        """How pictures and label maps come to their size, for records."""
        whole = self.mode in ("resize", "fixed", "none") or (
            self.mode == "resize_and_crop" and self.load in (None, self.size))
        cut = "" if whole else ", cropped"
        return {"picture_filter": PICTURE_FILTER + cut, "label_filter": LABEL_FILTER + cut}

    def plan(self, size: tuple[int, int], r: np.random.Generator) -> Transform:
        """The plan for a scene of ``size`` (height, width), with draws from ``r``."""
        height, width = self._resized(*size)
        flip = self.augment and bool(r.random() < 0.5) and self.flip
        if not self.mode.endswith("crop"):
            return Transform((height, width), None, flip)
        self._check_crop((height, width))
        spare = height - self.size[0], width - self.size[1]
        if self.augment:
            top, left = (int(r.integers(0, s + 1)) for s in spare)
        else:
            top, left = (s // 2 for s in spare)
        return Transform((height, width), (top, left, *self.size), flip)
