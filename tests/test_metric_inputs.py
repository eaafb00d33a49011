"""What metrics and encoders take: floats in [-1, 1], and nothing that only looks like a picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smis_models import create_model, metrics
from smis_models.data import Draw, GeneratedScenes, Sample, SceneDataset
from smis_models.io.images import ImageError, PictureSpan, as_bytes, to_pictures, write_indices
from smis_models.metrics.segmentation import LabelRule, SegmentationScore, predict
from smis_models.synthesis import applications

Measure = Callable[[Tensor], object]


def _features(pictures: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)


def _pictures() -> Tensor:
    return torch.rand((4, 3, 48, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1


def _distance(name: str) -> Measure:
    return lambda x: metrics.create_distance(name)(x, x.flip(3))


MEASURES: dict[str, Measure] = {
    "fid, real": lambda x: metrics.fid([x], [_pictures()], _features),
    "fid, fake": lambda x: metrics.fid([_pictures()], [x], _features),
    "alex": _distance("random-alex"), "vgg": _distance("random-vgg"), "pixel": _distance("pixel"),
    "segmenter": lambda x: predict(lambda p: p.argmax(1), x),
    "bytes": as_bytes, "written": to_pictures,
    "encoder": lambda x: applications.encode(
        create_model("groupdnet_deepfashion", ngf=8, nef=16, image_size=(64, 64),
                     upsampling="normal").eval(),
        x, torch.zeros((4, 48, 48), dtype=torch.long)),
}
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "bytes": (lambda x: ((x + 1) * 127.5).round().byte(), "torch.uint8"),
    "integers": (lambda x: ((x + 1) * 127.5).long(), "torch.int64"),
    "0..255": (lambda x: ((x + 1) * 127.5).round(), r"of 0\.\.255 give"),
    "a little more": (lambda x: x.where(x < 0.999, x + 0.01), r"in \[-1, 1\]"),
    "a little less": (lambda x: x.where(x > -0.999, x - 0.01), r"in \[-1, 1\]"),
    "not finite": (lambda x: x.where(x < 0.999, x * float("nan")), "finite"),
    "three channels last": (lambda x: x.permute(0, 2, 3, 1), r"\(N, 3, H, W\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("measure", MEASURES)
def test_pictures_of_another_range_give_no_number(measure: str, wrong: str) -> None:
    form, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        MEASURES[measure](form(_pictures()))


UNIT = [name for name in MEASURES if name not in ("segmenter", "bytes", "written")]


@pytest.mark.parametrize("measure", UNIT)
def test_pictures_in_0_to_1_are_told(measure: str) -> None:
    """They pass for pictures in [-1, 1]; LPIPS of them is lower, and looks better."""
    with pytest.warns(UserWarning, match=r"none below 0; of pictures in 0\.\.1 give 2 \* x - 1"):
        MEASURES[measure]((_pictures() + 1) / 2)


def test_black_in_pictures_of_0_to_1_is_no_value_below_0() -> None:
    span = PictureSpan(torch.zeros(1, 3, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        span.tell()  # of one value nothing can be said
    span.add(torch.ones(1, 3, 2, 2))
    with pytest.warns(UserWarning, match="none below 0"):
        span.tell()


@pytest.mark.parametrize("measure", UNIT)
@pytest.mark.parametrize("like", ["pictures", "one value"])
def test_pictures_in_range_are_not_told(measure: str, like: str) -> None:
    x = _pictures() if like == "pictures" else torch.zeros(4, 3, 48, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MEASURES[measure](x)


def test_a_set_is_told_of_as_a_whole() -> None:
    """One batch of bright pictures is none in 0..1."""
    x = _pictures()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.fid([x, x.abs()], [x.abs(), x], _features)


@pytest.mark.parametrize(("found", "message"), [
    (lambda x: _features(x)[:, :, None, None], r"features \(4, F\) .* \(4, 12, 1, 1\)"),
    (lambda x: [_features(x)], "features .* got list"),
    (lambda x: _features(x)[:2], r"got \(2, 12\)"),
])
def test_an_extractor_gives_a_row_for_each_picture(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.fid([_pictures()], [_pictures()], found)


def test_an_extractor_may_have_weights_that_learn() -> None:
    linear = torch.nn.Linear(12, 4)
    result = metrics.fid([_pictures()], [_pictures().flip(3)], lambda x: linear(_features(x)))
    assert np.isfinite(result["fid"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ends_of_the_range_and_other_floats_are_taken(dtype: torch.dtype) -> None:
    ends = torch.tensor([-1.0, 1.0], dtype=dtype).repeat(1, 3, 40, 20)
    assert sorted(set(as_bytes(ends).flatten().tolist())) == [0, 255]


class _Counted(SceneDataset):
    """Generated scenes that note which of them are read."""

    def __init__(self, count: int) -> None:
        self._scenes = GeneratedScenes(count, 128, "val")
        self.classes, self.size, self.seed = self._scenes.classes, self._scenes.size, 0
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self._scenes)

    def sample(self, index: int, r: np.random.Generator) -> Sample:
        self.read.append(index)
        return self._scenes[Draw(index)]


def test_an_evaluation_reads_each_scene_once() -> None:
    """All of it: diversity of the first two, FID, mIoU and the hash of all four."""
    from smis_models import shipped_weights

    model = create_model(checkpoint=shipped_weights("groupdnet_scenes")).eval()
    source = _Counted(4)
    measured = metrics.Metrics([metrics.create_distance("pixel")], _features, metrics.scene_labels)
    protocol = metrics.protocol("n100-m19", layouts=2, samples=2, pairs=1)
    found = metrics.evaluate(model, metrics.Scenes(source, {}), measured, protocol)
    assert source.read == [0, 1, 2, 3]
    assert set(found["results"]) == {"diversity", "fid", "segmentation"}
    assert (found["results"]["fid"]["real"], found["data"]["scenes"]) == (4, 4)
    layouts = [metrics.Scenes(_Counted(4), {}).scene(i)[0] for i in range(2)]
    alone = metrics.diversity(model, layouts, measured.distances[0], protocol.diversity)
    assert found["results"]["diversity"]["pixel L1"]["mcsd"] == alone.mcsd


@pytest.mark.parametrize("late", ["label map", "prediction"])
def test_a_bad_file_is_told_before_anything_is_painted(
        late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last scene: an hour later it would cost the whole evaluation."""
    from smis_models import shipped_weights
    from smis_models.metrics.sampling import LayoutSampler
    from smis_models.synthesis.scene import read_scenes

    model = create_model(checkpoint=shipped_weights("groupdnet_scenes")).eval()
    for folder, bad in (("labels", late == "label map"), ("predicted", late == "prediction")):
        for i in range(3):
            value = 99 if bad and i == 2 else 1
            write_indices(tmp_path / folder / f"{i}.png", np.full((128, 128), value))
    painted: list[object] = []
    monkeypatch.setattr(LayoutSampler, "load", lambda self, layout: painted.append(layout))
    scenes = metrics.Scenes(read_scenes(tmp_path / "labels", None, model.preset), {})
    measured = metrics.Metrics([metrics.create_distance("pixel")],
                               predictions=tmp_path / "predicted")
    short = metrics.protocol("n100-m19", layouts=1, samples=2, pairs=1)
    folder = "labels" if late == "label map" else "predicted"
    with pytest.raises(ImageError, match=rf"{folder}/2\.png: expected labels 0\.\.7, got 99"):
        metrics.evaluate(model, scenes, measured, short)
    assert not painted


_MAP = np.array([[[0, 1, 2, 7]]])


@pytest.mark.parametrize(("labels", "predictions", "message"), [
    (np.array([[[0, 1, 2, 255]]]), _MAP, r"labels: expected 0\.\.7, got 255 in a; relabel"),
    (np.array([[[0, 1, 2, -1]]]), _MAP, r"labels: expected 0\.\.7, got -1"),
    (np.array([[[0, 1, 2, 8]]]), _MAP, r"labels: expected 0\.\.7, got 8"),
    (_MAP + 0.5, _MAP, "labels: expected integers, got float64"),
    (_MAP, _MAP * np.nan, "predictions: expected integers, got float64 in a"),
    (_MAP, _MAP + 1, r"predictions: expected 0\.\.7"),
    (_MAP, _MAP[:, :, :2], "predictions: expected the labels' shape"),
])
def test_maps_that_are_none_of_the_classes_are_named(labels: Any, predictions: Any,
                                                     message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationScore(8, LabelRule("same", frozenset())).add(labels, predictions, "a")


def test_labels_that_are_left_out_may_be_any() -> None:
    score = SegmentationScore(8, LabelRule("same", frozenset({255, -1})))
    score.add(np.array([[[0, 1, 255, -1]]]), np.array([[[0, 1, 2, 7]]]))
    score.add(np.zeros((0, 2, 2), int), np.zeros((0, 2, 2), int))
    score.add(torch.tensor([[[3]]], dtype=torch.uint8), torch.tensor([[[3]]]))
    assert score.result()["miou"] == 1.0
    assert score.result()["pixels"] == 3


@pytest.mark.parametrize(("out", "message"), [
    (torch.full((4, 8, 6, 6), float("nan")), "segmenter: expected scores, got NaN"),
    (torch.zeros(4, 48, 48), r"integer labels \(4, 48, 48\), got float32 \(4, 48, 48\)"),
])
def test_a_segmenter_that_says_nothing_is_refused(out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(lambda x: out, _pictures())
