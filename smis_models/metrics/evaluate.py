"""All that is measured of a model on a set of scenes, and what it takes to repeat it."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import SceneClassifier, SceneDataset
from ..data.preprocess import LABEL_FILTER
from ..io.files import file_hash
from ..io.images import read_labels, scene_name
from ..io.provenance import commit, versions
from ..synthesis.features import FeatureClusters
from ..synthesis.scene import Layout, draw_input
from .distance import Distance
from .diversity import diversities
from .fid import Extractor, as_bytes, fid_of_features
from .protocols import Protocol
from .sampling import LayoutSampler, derived_seed
from .segmentation import LabelRule, SegmentationScore, Segmenter, predict

Step = Callable[[str], None]


class Scenes:
    """Layouts, and where there are photographs those, read when asked for.

    Args:
        source: a data set, or layouts that were read before.
        facts: what the result says of where they come from.

    Example:
        >>> scenes = Scenes(GeneratedScenes(4, 64, "test"), {"dataset": "scenes"})
        >>> scenes.layout(0).present
    """

    def __init__(self, source: SceneDataset | Sequence[Layout], facts: dict[str, Any]) -> None:
        self._source, self._facts = source, facts
        self.photographed = isinstance(source, SceneDataset)

    def __len__(self) -> int:
        return len(self._source)

    def layout(self, index: int) -> Layout:
        """Labels and instances of one scene."""
        if not isinstance(self._source, SceneDataset):
            return self._source[index]
        sample = self._source[index]
        ids = sample.get("instances")
        return Layout(sample["name"], sample["labels"].numpy().astype(np.int64),
                      None if ids is None else ids.numpy().astype(np.int64))

    def image(self, index: int) -> Tensor:
        """The photograph, (1, 3, H, W) in [-1, 1]."""
        assert isinstance(self._source, SceneDataset)
        return self._source[index]["image"][None]

    def used(self) -> dict[str, Any]:
        """What a protocol may promise of them: data set, split, count, how they are resized."""
        split = self._facts.get("split")
        preprocess = getattr(self._source, "preprocess", None)
        filters = {} if preprocess is None else preprocess.filters
        if not self.photographed:
            filters = {"label_filter": LABEL_FILTER}
        return {"dataset": self._facts.get("dataset"), "scenes": len(self), **filters,
                "split": "held out" if split in ("val", "test") else split}

    def facts(self) -> dict[str, Any]:
        """Where they come from, how many, and a hash of all label maps and names."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            layout = self.layout(i)
            digest.update(layout.name.encode() + str(layout.labels.shape).encode())
            digest.update(layout.labels.tobytes())
        return {**self._facts, "scenes": len(self), "labels_sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Judges:
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


def paint(model: Any, scenes: Scenes, seed: int,
          clusters: FeatureClusters | None = None) -> Iterator[Tensor]:
    """One picture (1, 3, H, W) of each scene, by a code or features of its own."""
    sampler = LayoutSampler(model, 1)
    for i in range(len(scenes)):
        layout = scenes.layout(i)
        z = draw_input(model, layout, derived_seed(seed, i), clusters)
        yield sampler.load(layout).picture(z)


def _judge_pictures(model: Any, scenes: Scenes, judges: Judges, seed: int,
                    clusters: FeatureClusters | None, step: Step) -> dict[str, Any]:
    """FID and mIoU, from one pass over the scenes."""
    score = SegmentationScore(model.preset.classes, judges.rule)
    real, fake = [], []
    reads = judges.segmenter is not None
    if judges.extractor is not None or reads:
        for i, picture in enumerate(paint(model, scenes, seed, clusters)):
            step(f"picture {i + 1} of {len(scenes)}")
            if judges.segmenter is not None:
                score.add(scenes.layout(i).labels[None], predict(judges.segmenter, picture))
            if judges.extractor is not None:
                fake.append(judges.extractor(as_bytes(picture)))
                real.append(judges.extractor(as_bytes(scenes.image(i))))
    if judges.predictions is not None:
        _add_predictions(score, scenes, judges.predictions, judges.rule)
        reads = True
    results: dict[str, Any] = {}
    if judges.extractor is not None:
        results["fid"] = {**fid_of_features(torch.cat(real), torch.cat(fake)),
                          **_facts(judges.extractor)}
    if reads:
        judge = judges.segmenter if judges.predictions is None else None
        results["segmentation"] = {**score.result(), **_facts(judge)}
    return results


def _used(scenes: Scenes, judges: Judges, promised: str | None) -> dict[str, Any]:
    """What was really used of what a protocol promises."""
    used = scenes.used()
    names = [distance.name for distance in judges.distances]
    if names:
        used["distance"] = promised if promised in names else ", ".join(names)
    if judges.extractor is not None:
        used["fid_features"] = _facts(judges.extractor).get("network", "a network of the caller")
    return used


def _facts(judge: Any) -> dict[str, Any]:
    facts: dict[str, Any] = judge.facts() if hasattr(judge, "facts") else {}
    return facts


def _add_predictions(score: SegmentationScore, scenes: Scenes, folder: Path,
                     rule: LabelRule) -> None:
    """Count label maps on disk, matched by scene and resized by nearest."""
    if not folder.is_dir():
        raise FileNotFoundError(f"predictions: {folder} is no folder of label maps")
    files = {scene_name(path): path for path in sorted(folder.iterdir()) if path.is_file()}
    known = score.classes if rule.meaning is None else len(rule.meaning)
    for i in range(len(scenes)):
        layout = scenes.layout(i)
        name = next((n for n in (layout.name, scene_name(Path(layout.name + ".png")))
                     if n in files), None)
        if name is None:
            raise FileNotFoundError(f"predictions: no map of scene {layout.name!r} in {folder}")
        size = (layout.labels.shape[0], layout.labels.shape[1])
        score.add(layout.labels, read_labels(files[name], known, size), str(files[name]))


def model_facts(model: Any, checkpoint: Path | None, seed: int) -> dict[str, Any]:
    """Name, options and weights of a model."""
    facts: dict[str, Any] = {"name": model.name, "options": asdict(model.preset)}
    if checkpoint is None:
        return {**facts, "weights": f"random, seed {seed}"}
    files = sorted(p for p in checkpoint.iterdir() if p.is_file()) if checkpoint.is_dir() else [
        checkpoint]
    return {**facts, "weights": str(checkpoint),
            "weights_sha256": {path.name: file_hash(path) for path in files}}


def evaluate(model: Any, scenes: Scenes, judges: Judges, protocol: Protocol, *,
             checkpoint: Path | None = None, seed: int = 0,
             clusters: FeatureClusters | None = None,
             step: Step = lambda what: None) -> dict[str, Any]:
    """Measure a model; plain values with everything needed to measure the same again.

    Args:
        model: of the zoo, in eval mode.
        scenes: label maps, and photographs where ``judges.extractor`` is given.
        judges: what is measured.
        protocol: counts, masks, size.
        checkpoint: where the weights come from, for the record.
        seed: of all codes.
        clusters: instance features, where the model reads them.
        step: called with a few words, for a progress bar.

    Raises:
        ValueError: scenes of another size than the protocol's, too few of them, or nothing to
            measure.

    Example:
        >>> result = evaluate(model, scenes, Judges([PixelDistance()]), protocol("n100-m19"))
        >>> result["results"]["diversity"]["pixel L1"]["mcsd"]
    """
    size = tuple(model.preset.image_size)
    if protocol.size is not None and size != tuple(protocol.size):
        raise ValueError(f"protocol: {protocol.name} is of pictures {protocol.size}, this model "
                         f"paints {size}; choose n100-m19, which takes the model's own size")
    if judges.extractor is not None and not scenes.photographed:
        raise ValueError("fid: expected scenes with photographs, got label maps alone; give a "
                         "--dataset")
    start = time.perf_counter()
    results: dict[str, Any] = {}
    if judges.distances:
        count = min(len(scenes), protocol.diversity.layouts)
        layouts = [scenes.layout(i) for i in range(count)]
        found = diversities(model, layouts, judges.distances, protocol.diversity, seed=seed,
                            step=step)
        results["diversity"] = {
            distance.name: {**each.to_json(), "distance": distance.facts()}
            for distance, each in zip(judges.distances, found, strict=True)
        }
    results |= _judge_pictures(model, scenes, judges, seed, clusters, step)
    if not results:
        raise ValueError("metrics: nothing to measure; give a distance, Inception weights or a "
                         "segmenter")
    return {
        "results": results, "model": model_facts(model, checkpoint, seed),
        "data": scenes.facts(), "seed": seed,
        "protocol": protocol.facts(_used(scenes, judges, protocol.distance)),
        "device": str(next(model.parameters()).device), "versions": versions(),
        "commit": commit(), "command": sys.argv[1:],
        "seconds": round(time.perf_counter() - start, 3),
    }
