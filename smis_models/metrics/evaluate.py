"""All that is measured of a model on a set of scenes, and what it takes to repeat it."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import FileScenes, SceneClassifier, SceneDataset
from ..data.preprocess import LABEL_FILTER
from ..io.files import file_hashes
from ..io.images import as_bytes, read_labels
from ..io.names import map_files
from ..io.provenance import commit, versions
from ..io.seeds import derived_seed
from ..synthesis.features import FeatureClusters
from ..synthesis.scene import LazyScenes, Scene, draw_input
from .distance import Distance
from .diversity import DiversityMeter
from .fid import Extractor, fid_of_features
from .protocols import Protocol
from .sampling import LayoutSampler, has_class_codes
from .segmentation import LabelRule, SegmentationScore, Segmenter, label_rule, predict

Step = Callable[[str], None]


class Scenes:
    """Layouts, and where there are photographs those, read when asked for.

    Args:
        source: a data set, or scenes that were read before.
        facts: what the result says of where they come from.

    Example:
        >>> from smis_models.data import GeneratedScenes
        >>> scenes = Scenes(GeneratedScenes(4, 64, "test"), {"dataset": "scenes"})
        >>> scene, photograph = scenes.scene(0)
        >>> scene.labels.shape
        (64, 64)
    """

    def __init__(self, source: SceneDataset | Sequence[Scene], facts: dict[str, Any]) -> None:
        self._source, self._facts = source, facts
        self.photographed = isinstance(source, SceneDataset)
        self.files = isinstance(source, (LazyScenes, FileScenes))

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[tuple[Scene, Tensor | None]]:
        """Each scene with its photograph (1, 3, H, W) in [-1, 1], read once."""
        for i in range(len(self)):
            yield self.scene(i)

    def scene(self, index: int) -> tuple[Scene, Tensor | None]:
        """One scene, and its photograph where there is one."""
        if not isinstance(self._source, SceneDataset):
            return self._source[index], None
        sample = self._source[index]
        ids = sample.get("instances")
        scene = Scene(sample["name"], sample["labels"].numpy().astype(np.int64),
                        None if ids is None else ids.numpy().astype(np.int64))
        return scene, sample["image"][None]

    def names(self) -> list[str]:
        """The scenes' names where they are known before the scenes are read; else none."""
        if isinstance(self._source, LazyScenes):
            return [files.name for files in self._source.files]
        if isinstance(self._source, FileScenes):
            return [files.name for files in self._source.records]
        return []

    def check(self, step: Step, also: Callable[[Scene], object]) -> None:
        """Read all files once and ask ``also`` of each scene: hours later a bad one costs all.

        Raises:
            FileNotFoundError, ImageError: a file is missing or bad; the message names it.
        """
        if self.files:
            for i in range(len(self)):
                step(f"checking scene {i + 1} of {len(self)}")
                also(self.scene(i)[0])

    def used(self) -> dict[str, Any]:
        """What a protocol may promise of them: data set, split, count, how they are resized."""
        split = self._facts.get("split")
        preprocess = getattr(self._source, "preprocess", None)
        filters = {} if preprocess is None else preprocess.filters
        if not self.photographed:
            filters = {"label_filter": LABEL_FILTER}
        return {"dataset": self._facts.get("dataset"), "scenes": len(self), **filters,
                "split": "held out" if split in ("val", "test") else split}

    def facts(self, digest: str) -> dict[str, Any]:
        """Where they come from, how many, and a hash of all label maps and names."""
        return {**self._facts, "scenes": len(self), "labels_sha256": digest}


@dataclass(frozen=True)
class Metrics:
    """What pictures are compared and read with; what is None is not measured.

    Attributes:
        distances: of mCSD, mOCD and LPIPS.
        extractor: of FID.
        segmenter: of mIoU; or
        predictions: a folder with one label map for each scene, made by a segmentation model from
            earlier pictures.
        rule: which labels count.
    """

    distances: Sequence[Distance] = ()
    extractor: Extractor | None = None
    segmenter: Segmenter | None = None
    predictions: Path | None = None
    rule: LabelRule = LabelRule("same", frozenset())  # noqa: RUF009 (frozen)


def scene_labels(pictures: Tensor) -> Tensor:
    """What the generated scenes' own pixel classifier reads off pictures: a ``segmenter``."""
    return SceneClassifier.shipped().read(pictures.cpu()).labels


class _PictureScores:
    """FID and mIoU, from the scenes one after another."""

    def __init__(self, metrics: Metrics, classes: int, names: Sequence[str]) -> None:
        self._metrics = metrics
        self._score = SegmentationScore(classes, metrics.rule)
        self._real: list[Tensor] = []
        self._fake: list[Tensor] = []
        folder = metrics.predictions
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"predictions: {folder} is no folder of label maps")
        self._files = None if folder is None else map_files("predictions", folder)
        self._scene_of: dict[Path, str] = {}
        self._maps = hashlib.sha256()
        for name in names:  # now, and not after hours
            self._prediction(name)

    @property
    def paints(self) -> bool:
        """Whether pictures are wanted."""
        return self._metrics.extractor is not None or self._metrics.segmenter is not None

    def add(self, scene: Scene, photograph: Tensor | None, picture: Tensor) -> None:
        """Judge a picture of a scene."""
        if self._metrics.segmenter is not None:
            self._score.add(scene.labels[None], predict(self._metrics.segmenter, picture))
        if self._metrics.extractor is not None:
            assert photograph is not None
            self._fake.append(self._metrics.extractor(as_bytes(picture)))
            self._real.append(self._metrics.extractor(as_bytes(photograph)))

    def predicted(self, scene: Scene) -> NDArray[np.int64] | None:
        """The label map on disk, resized by nearest, that was predicted for a scene."""
        path = self._prediction(scene.name)
        if path is None:
            return None
        rule = self._metrics.rule
        known = self._score.classes if rule.meaning is None else len(rule.meaning)
        height, width = scene.labels.shape
        return read_labels(path, known, (height, width))

    def read(self, scene: Scene) -> None:
        """Count the predicted label map."""
        labels = self.predicted(scene)
        if labels is not None:
            self._score.add(scene.labels, labels, str(self._prediction(scene.name)))
            _digest(self._maps, scene.name, labels)

    def _prediction(self, name: str) -> Path | None:
        """The map that was predicted for a scene; None where none are read."""
        if self._files is None:
            return None
        path = self._files.get(name) or self._files.get(name.rpartition("/")[2])
        if path is None:
            raise FileNotFoundError(f"predictions: no map of scene {name!r} in "
                                    f"{self._metrics.predictions}")
        other = self._scene_of.setdefault(path, name)
        if other != name:
            raise ValueError(f"predictions: {path} would be of two scenes, {other} and {name}; put "
                             "the maps into folders as the scenes are")
        return path

    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What was measured, by name."""
        metrics = self._metrics
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        if metrics.extractor is not None:
            found["fid"] = lambda: {
                **fid_of_features(torch.cat(self._real), torch.cat(self._fake)),
                **_facts(metrics.extractor)}
        if metrics.segmenter is not None or self._files is not None:
            judge = _facts(metrics.segmenter) if self._files is None else {
                "predictions": str(metrics.predictions), "maps": len(self._scene_of),
                "maps_sha256": self._maps.hexdigest()}
            found["segmentation"] = lambda: {**self._score.result(), **judge}
        return found


class _Plan:
    """How many steps there will be: at first each scene may have all classes."""

    def __init__(self, model: Any, scenes: Scenes, layouts: int, paints: bool,
                 expect: Callable[[int], None]) -> None:
        self._classes = model.preset.classes if has_class_codes(model) else 0
        self._sets: dict[str, int] = {}
        self._layouts, self._expect = layouts, expect
        self._others = len(scenes) * (scenes.files + paints)
        self._tell()

    def see(self, scene: Scene) -> None:
        """A scene, whose classes are known now."""
        if scene.name in self._sets or len(self._sets) < self._layouts:
            self._sets[scene.name] = 1 + (len(scene.present) if self._classes else 0)
            self._tell()

    def _tell(self) -> None:
        unseen = self._layouts - len(self._sets)
        self._expect(self._others + sum(self._sets.values()) + unseen * (1 + self._classes))


def _used(scenes: Scenes, metrics: Metrics, protocol: Protocol, preset: Any) -> dict[str, Any]:
    """What was really used of what a protocol promises."""
    used, promised = scenes.used(), protocol.distance
    if metrics.segmenter is not None or metrics.predictions is not None:
        used["dont_care"] = _dont_care(metrics.rule, preset, protocol.dont_care)
    names = [distance.name for distance in metrics.distances]
    if names:
        used["distance"] = promised if promised in names else ", ".join(names)
    if metrics.extractor is not None:
        used["fid_features"] = _facts(metrics.extractor).get("network", "a network of the caller")
    return used


def _dont_care(rule: LabelRule, preset: Any, promised: str) -> str:
    """What the rule does with pixels without a class; as promised where there are none."""
    try:
        plain = label_rule(rule.name, preset)
    except ValueError:
        return "a rule of the caller"
    if not plain.ignored and not rule.ignored:
        return promised
    return "ignore" if rule.ignored == plain.ignored else "count" if not rule.ignored else (
        "a rule of the caller")


def _source(clusters: FeatureClusters | None) -> dict[str, Any]:
    """Where the instance features that were painted from come from."""
    return {} if clusters is None else dict(clusters.source or {"features": "of the caller"})


def _facts(judge: Any) -> dict[str, Any]:
    return judge.facts() if hasattr(judge, "facts") else {}


def _digest(digest: Any, name: str, labels: NDArray[np.integer[Any]]) -> None:
    """Add a label map, and its name as it is on the disk, to a hash."""
    digest.update(name.encode(errors="surrogateescape") + str(labels.shape).encode())
    digest.update(np.ascontiguousarray(labels, np.int64).tobytes())


def model_facts(model: Any, checkpoint: Path | None, seed: int,
                hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Name, options and weights of a model; ``hashes``: of the files when they were loaded."""
    facts: dict[str, Any] = {"name": model.name, "options": asdict(model.preset)}
    if checkpoint is None:
        return {**facts, "weights": f"random, seed {seed}"}
    return {**facts, "weights": str(checkpoint),
            "weights_sha256": dict(file_hashes(checkpoint) if hashes is None else hashes)}


def evaluate(model: Any, scenes: Scenes, metrics: Metrics, protocol: Protocol, *,
             checkpoint: Path | None = None, hashes: Mapping[str, str] | None = None,
             seed: int = 0, clusters: FeatureClusters | None = None,
             step: Step = lambda what: None,
             expect: Callable[[int], None] = lambda total: None) -> dict[str, Any]:
    """Measure a model; plain values with everything needed to measure the same again.

    Args:
        model: of the zoo, in eval mode.
        scenes: label maps, and photographs where ``metrics.extractor`` is given.
        metrics: what is measured.
        protocol: counts, masks, size.
        checkpoint: where the weights come from, for the record.
        hashes: of its files, taken before the model was loaded; without them those of now.
        seed: of all codes.
        clusters: instance features, where the model reads them.
        step: called with a few words, for a progress bar.
        expect: called with how many times ``step`` will be, as well as it is known by then.

    Raises:
        ValueError: scenes of another size than the protocol's, too few of them, or nothing to
            measure.
        FileNotFoundError, ImageError: a file of any scene, before anything is measured.

    Example:
        >>> from smis_models import create_model
        >>> from smis_models.data import GeneratedScenes
        >>> from smis_models.metrics import PixelDistance, protocol
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> scenes = Scenes(GeneratedScenes(1, 128, "test"), {"dataset": "scenes"})
        >>> short = protocol("n100-m19", layouts=1, samples=2, pairs=1)
        >>> result = evaluate(model, scenes, Metrics([PixelDistance()]), short)
        >>> result["results"]["diversity"]["pixel L1"]["mcsd"] > 0
        True
    """
    size = tuple(model.preset.image_size)
    if protocol.size is not None and size != tuple(protocol.size):
        raise ValueError(f"protocol: {protocol.name} is of pictures {protocol.size}, this model "
                         f"paints {size}; choose n100-m19, which takes the model's own size")
    if not (metrics.distances or metrics.extractor or metrics.segmenter or metrics.predictions):
        raise ValueError("metrics: nothing to measure; give a distance, Inception weights or a "
                         "segmenter")
    if metrics.extractor is not None and not scenes.photographed:
        raise ValueError("fid: expected scenes with photographs, got label maps alone; give a "
                         "--dataset")
    if metrics.extractor is not None and len(scenes) < 2:
        raise ValueError(f"fid: expected at least 2 scenes with photographs, got {len(scenes)}; "
                         "give more, or leave --inception-weights out")
    start = time.perf_counter()
    # Before anything is measured: a run may write other weights meanwhile.
    facts, source = model_facts(model, checkpoint, seed, hashes), commit()
    scores = _PictureScores(metrics, model.preset.classes, scenes.names())
    sampler = LayoutSampler(model, 1)
    meter = DiversityMeter(model, metrics.distances, protocol.diversity, len(scenes), seed=seed,
                           step=step) if metrics.distances else None
    plan = _Plan(model, scenes, protocol.diversity.layouts if meter else 0, scores.paints, expect)

    def check(scene: Scene) -> None:
        plan.see(scene)
        scores.predicted(scene)

    scenes.check(step, check)
    digest = hashlib.sha256()
    for i, (scene, photograph) in enumerate(scenes):
        _digest(digest, scene.name, scene.labels)
        if meter is not None and i < protocol.diversity.layouts:
            plan.see(scene)
            meter.add(scene)
        scores.read(scene)
        if scores.paints:
            step(f"picture {i + 1} of {len(scenes)}")
            z = draw_input(model, scene, derived_seed(seed, i), clusters)
            scores.add(scene, photograph, sampler.load(scene).picture(z))
    parts = scores.parts()
    if meter is not None:
        parts = {"diversity": lambda: {
            distance.name: {**each.to_json(), "distance": distance.facts()}
            for distance, each in zip(metrics.distances, meter.result(), strict=True)
        }} | parts
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, part in parts.items():  # one that fails does not cost the others
        try:
            results[name] = part()
        except ValueError as error:
            if len(failed) == len(parts) - 1:
                raise
            failed[name] = str(error)
    return {
        "results": results, **({"failed": failed} if failed else {}), "model": facts,
        "data": {**scenes.facts(digest.hexdigest()), **_source(clusters)}, "seed": seed,
        "protocol": protocol.facts(_used(scenes, metrics, protocol, model.preset)),
        "device": str(next(model.parameters()).device), "versions": versions(),
        "commit": source, "command": sys.argv[1:],
        "seconds": round(time.perf_counter() - start, 3),
    }
