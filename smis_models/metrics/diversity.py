"""mCSD, mOCD and diversity by LPIPS: how far pictures of one scene differ, and where."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io.seeds import derived_seed
from ..synthesis.codes import drawn_code
from ..synthesis.scene import Scene
from .distance import Distance, Features
from .protocols import DiversityProtocol
from .sampling import BATCH, Draw, LayoutSampler, has_class_codes, sample_codes


@dataclass(frozen=True)
class Diversity:
    r"""How varied a model's pictures are.

    .. math:: \mathrm{mCSD} = \frac{1}{C} \sum_c L_c, \quad
              \mathrm{mOCD} = \frac{1}{C} \sum_c L_{\ne c}

    :math:`L_c` is the mean distance of pairs of pictures in the area of class c where the code of
    c alone was drawn anew, :math:`L_{\ne c}` that of all other areas; both are means over the
    scenes in which c has a pixel. A model with one code for the whole picture draws that.

    Attributes:
        mcsd, mocd: as above.
        diversity: mean distance of whole pictures whose codes were all drawn anew: LPIPS, where
            that is the distance.
        by_class: class -> (:math:`L_c`, :math:`L_{\ne c}`).
        class_codes: whether the model has a code for each class.
        seconds: of sampling and of measuring.
        pictures: how many were drawn.
    """

    mcsd: float
    mocd: float
    diversity: float
    by_class: dict[int, tuple[float, float]]
    class_codes: bool
    seconds: dict[str, float]
    pictures: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        classes = {str(c): {"csd": own, "ocd": other} for c, (own, other) in self.by_class.items()}
        return {"mcsd": self.mcsd, "mocd": self.mocd, "diversity": self.diversity,
                "by_class": classes, "class_codes": self.class_codes, "seconds": self.seconds,
                "pictures": self.pictures}


@contextmanager
def _timed(clock: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock[what] = clock.get(what, 0.0) + time.perf_counter() - start


def _pair_means(distance: Distance, features: Features, pairs: Sequence[tuple[int, int]],
                ) -> float:
    """The mean distance of pairs of whole pictures."""
    first, second = ([layer[[p[i] for p in pairs]] for layer in features] for i in (0, 1))
    return float(distance.between(first, second).mean())


def area_distances(pictures: Tensor, masks: Sequence[Tensor], distance: Distance,
                   pairs: Sequence[tuple[int, int]], mask_mode: str) -> list[tuple[float, float]]:
    """The mean distance of the pairs inside and outside of each mask.

    Args:
        pictures: (N, 3, H, W) in [-1, 1].
        masks: (H, W) bool each, with at least one pixel.
        distance: of pictures.
        pairs: indices of pictures.
        mask_mode: of :class:`DiversityProtocol`. Where a mask covers all, the outside is 0.
    """
    found = []
    if mask_mode == "zero":
        for mask in masks:
            inside, outside = (
                _pair_means(distance, distance.features(pictures * area), pairs)
                if bool(area.any()) else 0.0
                for area in (mask.to(pictures.device), ~mask.to(pictures.device))
            )
            found.append((inside, outside))
        return found
    features = distance.features(pictures)
    size = (pictures.shape[2], pictures.shape[3])
    first, second = ([layer[[p[i] for p in pairs]] for layer in features] for i in (0, 1))
    mean = distance.spatial(first, second, size).mean(0)
    for mask in masks:
        area = mask.to(mean.device)
        inside, outside = (float(mean[a].mean()) if bool(a.any()) else 0.0 for a in (area, ~area))
        found.append((inside, outside))
    return found


LayoutDiversity = tuple[dict[int, tuple[float, float]], float]
"""{class: (L_c, L_other)} and LPIPS of one scene; see :class:`Diversity`."""


def scene_diversity(
    model: Any, scene: Scene, draw: Draw, distances: Sequence[Distance],
    protocol: DiversityProtocol, seed: int = 0, step: Callable[[str], None] = lambda what: None,
    clock: dict[str, float] | None = None,
) -> list[LayoutDiversity]:
    """One scene's diversity by each distance, all from the same pictures.

    Args:
        model: whose codes are drawn.
        scene: the label map.
        draw: what makes pictures of codes: :class:`LayoutSampler`, or any other path.
        distances, protocol: how pictures are compared.
        seed: of the codes and of random pairs.
        step: called once for each set of pictures.
        clock: seconds are added to its "sampling" and "measuring".
    """
    clock = {} if clock is None else clock
    labels = torch.from_numpy(scene.labels)
    masks = {c: labels == c for c in scene.present}
    pairs = protocol.indices(derived_seed(seed, 1))

    def sample(index: int | None) -> Tensor:
        step(f"{scene.name}: " + ("all codes" if index is None else f"class {index}"))
        with _timed(clock, "sampling"):
            pictures = draw(sample_codes(model, protocol.samples, seed, index))
            if pictures.is_cuda:
                torch.cuda.synchronize(pictures.device)
        return pictures

    by_class: list[dict[int, tuple[float, float]]] = [{} for _ in distances]

    def compare(pictures: Tensor, classes: Sequence[int]) -> None:
        areas = [masks[c] for c in classes]
        with _timed(clock, "measuring"):
            for found, distance in zip(by_class, distances, strict=True):
                values = area_distances(pictures, areas, distance, pairs, protocol.mask_mode)
                found.update(zip(classes, values, strict=True))

    with torch.no_grad():
        pictures = sample(None)
        with _timed(clock, "measuring"):
            whole = [_pair_means(d, d.features(pictures), pairs) for d in distances]
        if not has_class_codes(model):
            compare(pictures, list(masks))
        else:
            for c in masks:
                compare(sample(c), [c])
    return list(zip(by_class, whole, strict=True))


class DiversityMeter:
    """:func:`diversities` of scenes that come one after another, each looked at once.

    Args:
        model, distances, protocol, seed, step, batch: as of :func:`diversity`.
        count: how many scenes there will be.

    Raises:
        ValueError: fewer scenes than the protocol's; a model that reads no code.

    Example:
        >>> from smis_models import create_model
        >>> from smis_models.data import GeneratedScenes
        >>> from smis_models.metrics import PixelDistance, Scenes
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> short = DiversityProtocol(layouts=1, samples=2, pairs=1)
        >>> meter = DiversityMeter(model, [PixelDistance()], short, 1)
        >>> meter.add(Scenes(GeneratedScenes(1, 128), {}).scene(0)[0])
        >>> (found,) = meter.result()
    """

    def __init__(self, model: Any, distances: Sequence[Distance], protocol: DiversityProtocol,
                 count: int, *, seed: int = 0, step: Callable[[str], None] = lambda what: None,
                 batch: int = BATCH) -> None:
        if count < protocol.layouts:
            raise ValueError(f"layouts: expected {protocol.layouts} of them, got {count}; give "
                             "more label maps, or fewer with --layouts")
        try:
            drawn_code(model, seed)
        except ValueError as error:  # before anything is read
            raise ValueError(f"{error}; --distance none measures the rest") from error
        self._model, self._distances, self._protocol = model, distances, protocol
        self._seed, self._step = seed, step
        self._clock: dict[str, float] = {}
        self._draw = LayoutSampler(model, batch)
        self._found: list[list[LayoutDiversity]] = []

    def add(self, scene: Scene) -> None:
        """Sample a scene and compare its pictures."""
        with _timed(self._clock, "sampling"):
            self._draw.load(scene)
        self._found.append(scene_diversity(
            self._model, scene, self._draw, self._distances, self._protocol,
            derived_seed(self._seed, len(self._found)), self._step, self._clock))

    def result(self) -> list[Diversity]:
        """What each distance found."""
        classes = has_class_codes(self._model)
        sets = sum(1 + len(first[0]) * classes for first, *_ in self._found)
        return [_summary(self._model, list(of_distance), self._clock, self._protocol.samples * sets)
                for of_distance in zip(*self._found, strict=True)]


def diversities(model: Any, scenes: Sequence[Scene], distances: Sequence[Distance],
                protocol: DiversityProtocol | None = None, *, seed: int = 0,
                step: Callable[[str], None] = lambda what: None,
                batch: int = BATCH) -> list[Diversity]:
    """What :func:`diversity` measures, by each of several distances, from the same pictures."""
    protocol = DiversityProtocol() if protocol is None else protocol
    meter = DiversityMeter(model, distances, protocol, len(scenes), seed=seed, step=step,
                           batch=batch)
    for scene in scenes[: protocol.layouts]:
        meter.add(scene)
    return meter.result()


def _summary(model: Any, found: Sequence[LayoutDiversity], clock: dict[str, float],
             pictures: int) -> Diversity:
    values = defaultdict(list)
    for by_class, _ in found:
        for c, pair in by_class.items():
            values[c].append(pair)
    means = {c: (float(np.mean([own for own, _ in pairs])),
                 float(np.mean([other for _, other in pairs])))
             for c, pairs in sorted(values.items())}
    mcsd, mocd = (float(np.mean([value[i] for value in means.values()])) for i in (0, 1))
    return Diversity(mcsd, mocd, float(np.mean([whole for _, whole in found])), means,
                     has_class_codes(model), dict(clock), pictures)


def diversity(model: Any, scenes: Sequence[Scene], distance: Distance,
              protocol: DiversityProtocol | None = None, *, seed: int = 0,
              step: Callable[[str], None] = lambda what: None, batch: int = BATCH) -> Diversity:
    """mCSD, mOCD and LPIPS of a model; each scene is compiled once for all its samples.

    Args:
        model: of the zoo, in eval mode, with a latent code.
        scenes: label maps; the first ``protocol.layouts`` are taken.
        distance: from :func:`create_distance`.
        protocol: counts, pairs and masks; :class:`DiversityProtocol`'s by default.
        seed: of the codes.
        step: called with a few words for each set of pictures.
        batch: pictures made at once.

    Raises:
        ValueError: too few scenes, or a model that draws nothing.

    Paper: Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020, section 4.3; no code
    of theirs was published, see :class:`DiversityProtocol` for the readings.

    Example:
        >>> from smis_models import create_model
        >>> from smis_models.data import GeneratedScenes
        >>> from smis_models.metrics import DiversityProtocol, PixelDistance, Scenes
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> scene = Scenes(GeneratedScenes(1, 128), {}).scene(0)[0]
        >>> short = DiversityProtocol(layouts=1, samples=2, pairs=1)
        >>> found = diversity(model, [scene], PixelDistance(), short)
        >>> found.mcsd > 0
        True
    """
    return diversities(model, scenes, [distance], protocol, seed=seed, step=step, batch=batch)[0]
