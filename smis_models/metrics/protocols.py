"""How a number was measured, pinned by name: sizes, filters, reference sets, counts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..data.preprocess import LABEL_FILTER, PICTURE_FILTER
from ..io.choices import unknown_name
from .fid import INCEPTION

MaskMode = Literal["zero", "spatial"]
MASK_MODES = ("zero", "spatial")
_PAIRINGS = ("consecutive", "random")


@dataclass(frozen=True, kw_only=True)
class DiversityProtocol:
    """How mCSD, mOCD and the diversity by LPIPS are sampled.

    The paper says "n = 100, m = 19" after BicycleGAN and MUNIT, where n counts inputs and m the
    pairs of each; its own sentence can also be read as n images of one layout, of which m pairs are
    drawn. The first reading is the protocol ``n100-m19``, the second ``one-layout-n100-m19``.

    Args:
        layouts: label maps that are sampled.
        samples: pictures of each layout and class.
        pairs: pairs of them that are compared.
        pairing: "consecutive" (1-2, 2-3, ...) or "random" (distinct, drawn by the seed).
        mask_mode: "zero": both pictures are zeroed outside the area (mid-grey) before the network
            and the distance is the mean over the whole picture, so it grows with the area;
            "spatial": the map of distances of the whole pictures is averaged inside the area. The
            paper's figures (mCSD 0.026, mOCD 0.003 beside an LPIPS of 0.23) fit "zero".

    Raises:
        ValueError: a count below 1 (samples: 2), more pairs than there are, an unknown word.
    """

    layouts: int = 100
    samples: int = 20
    pairs: int = 19
    pairing: Literal["consecutive", "random"] = "consecutive"
    mask_mode: MaskMode = "zero"

    def __post_init__(self) -> None:
        for name, least in (("layouts", 1), ("samples", 2), ("pairs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name, known in (("pairing", _PAIRINGS), ("mask_mode", MASK_MODES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected {' or '.join(known)}; got {getattr(self, name)!r}")
        most = self.samples - 1
        if self.pairing == "random":
            most = self.samples * most // 2
        if self.pairs > most:
            raise ValueError(f"pairs: expected at most {most} {self.pairing} pairs of "
                             f"{self.samples} samples, got {self.pairs}")

    def indices(self, seed: int) -> list[tuple[int, int]]:
        """The pairs."""
        if self.pairing == "consecutive":
            return [(i, i + 1) for i in range(self.pairs)]
        every = list(itertools.combinations(range(self.samples), 2))
        chosen = np.random.default_rng(seed).choice(len(every), self.pairs, replace=False)
        return [every[i] for i in sorted(chosen)]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """An evaluation by name: what it promises. None promises nothing.

    Args:
        name: what results are filed under.
        size: (height, width) at which pictures are made and compared; None: the model's own.
        dataset: where label maps and photographs come from.
        split: "held out" from training.
        scenes: how many there are, all of which FID and mIoU are measured on.
        picture_filter: how photographs come to that size, whole.
        label_filter: the same for label maps.
        fid_features: the network of FID and its own resizing; its weights are told by their hash.
        distance: of mCSD, mOCD and diversity; its weights are told by their hash.
        dont_care: "ignore" leaves pixels without a class out of mIoU and accuracy; "count" takes
            them as a class.
        diversity: of mCSD, mOCD and LPIPS.
    """

    name: str
    size: tuple[int, int] | None = None
    dataset: str | None = None
    split: str | None = "held out"
    scenes: int | None = None
    picture_filter: str = PICTURE_FILTER
    label_filter: str = LABEL_FILTER
    fid_features: str = INCEPTION
    distance: str | None = "LPIPS (AlexNet)"
    dont_care: Literal["ignore", "count"] = "ignore"
    diversity: DiversityProtocol = field(default_factory=DiversityProtocol)

    def __post_init__(self) -> None:
        if self.dont_care not in ("ignore", "count"):
            raise ValueError(f"dont_care: expected ignore or count; got {self.dont_care!r}")

    def with_options(self, **options: Any) -> Protocol:
        """The same with the fields that are not None replaced, those of ``diversity`` too."""
        given = {name: value for name, value in options.items() if value is not None}
        inner = {name: given.pop(name) for name in list(given)
                 if name in DiversityProtocol.__dataclass_fields__}
        return replace(self, diversity=replace(self.diversity, **inner), **given)

    def facts(self, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What was done as plain values, and what of it differs from the protocol of its name.

        Args:
            measured: what was used of the data set and the networks, by the names above; what was
                not is left out. None: as promised.
        """
        pinned = asdict(PROTOCOLS[self.name])
        own = asdict(self)
        if measured is not None:
            own = {k: v for k, v in own.items() if k not in _MEASURED} | dict(measured)
        changed = {k: v for k, v in own.items()
                   if k != "diversity" and pinned[k] is not None and v != pinned[k]}
        changed |= {f"diversity.{k}": v for k, v in own["diversity"].items()
                    if v != pinned["diversity"][k]}
        return {**own, "changed": changed}


_MEASURED = ("dataset", "split", "scenes", "picture_filter", "label_filter", "fid_features",
             "distance")


_ONE_LAYOUT = DiversityProtocol(layouts=1, samples=100, pairing="random")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="n100-m19"),
        Protocol(name="one-layout-n100-m19", diversity=_ONE_LAYOUT),
        Protocol(name="deepfashion-256", size=(256, 256), dataset="deepfashion", scenes=2247),
        Protocol(name="cityscapes-256x512", size=(256, 512), dataset="cityscapes", scenes=500),
        Protocol(name="ade20k-256", size=(256, 256), dataset="ade20k", scenes=2000),
        Protocol(name="coco-256", size=(256, 256), dataset="coco_stuff", scenes=5000),
        Protocol(
            name="scenes-quick", dataset="scenes", distance=None,
            diversity=DiversityProtocol(layouts=4, samples=5, pairs=4),
        ),
    )
}
"""Name -> protocol; `smis evaluate --protocol NAME`."""


def protocol(name: str, **options: Any) -> Protocol:
    """A protocol by name, with single fields replaced; results list what was changed.

    Raises:
        ValueError: an unknown name, or an option that does not fit.

    Example:
        >>> protocol("n100-m19", layouts=10).facts()["changed"]
        {'diversity.layouts': 10}
    """
    if name not in PROTOCOLS:
        raise ValueError(unknown_name("protocol", PROTOCOLS, name))
    return PROTOCOLS[name].with_options(**options)
