"""Metrics: distances against their formulas, areas, pairs, FID, mIoU, protocols, smis evaluate."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn

from smis_kernels import use_backend
from smis_models import cli, create_model
from smis_models.data import GeneratedScenes
from smis_models.data.classes import class_names
from smis_models.data.scene_classifier import SceneClassifier
from smis_models.families import ADE20K, CITYSCAPES, DEEPFASHION, SPADE_COCO
from smis_models.io import images
from smis_models.io.checkpoint import save_checkpoint
from smis_models.io.files import file_hash
from smis_models.io.hub import metric_rows
from smis_models.io.seeds import derived_seed
from smis_models.metrics import (
    LPIPS,
    DiversityProtocol,
    FeatureStatistics,
    FileSegmenter,
    Inception,
    LabelRule,
    Metrics,
    PixelDistance,
    Scenes,
    SegmentationScore,
    create_distance,
    diversities,
    diversity,
    evaluate,
    fid,
    frechet_distance,
    label_rule,
    protocol,
)
from smis_models.metrics.diversity import area_distances, scene_diversity
from smis_models.metrics.fid import fid_of_features
from smis_models.metrics.lpips import TRUNKS
from smis_models.metrics.sampling import LayoutSampler, sample_codes
from smis_models.metrics.segmentation import predict
from smis_models.synthesis.codes import drawn_code
from smis_models.synthesis.features import FeatureClusters
from smis_models.synthesis.scene import read_scenes, sample_scenes, semantics

TINY = {"ngf": 8, "nef": 16, "image_size": (64, 64), "upsampling": "normal", "init_gain": 1.0}
QUICK = DiversityProtocol(layouts=2, samples=3, pairs=2)


@pytest.fixture(scope="module")
def model():
    return create_model("groupdnet_deepfashion", **TINY).eval()


@pytest.fixture(scope="module")
def layouts(model):
    return sample_scenes(model.preset, 2)


def _pictures(count=4, size=(40, 48), seed=0):
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Trunk and heads of each kind, drawn, in the published files' form."""
    folder, files = tmp_path_factory.mktemp("lpips"), {}
    for kind, trunk in TRUNKS.items():
        torch.manual_seed(3)
        state = {f"features.{k}": v for k, v in trunk.build().state_dict().items()}
        heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
                 for i, width in enumerate(trunk.widths)}
        torch.save({**state, "classifier.1.weight": torch.zeros(2)}, folder / f"{kind}.pth")
        torch.save(heads, folder / f"{kind}_heads.pth")
        files[kind] = folder / f"{kind}.pth", folder / f"{kind}_heads.pth"
    return files


# torchvision's AlexNet and VGG16 (index in its "features", stride, padding) by blocks; max pooling
# between those that say so. LPIPS reads the last ReLU of each: relu1 to relu5, relu1_2 to relu5_3.
_BLOCKS = {
    "alex": (((0, 4, 2),), "pool", ((3, 1, 2),), "pool", ((6, 1, 1),), ((8, 1, 1),), ((10, 1, 1),)),
    "vgg": (((0, 1, 1), (2, 1, 1)), "pool", ((5, 1, 1), (7, 1, 1)), "pool",
            ((10, 1, 1), (12, 1, 1), (14, 1, 1)), "pool", ((17, 1, 1), (19, 1, 1), (21, 1, 1)),
            "pool", ((24, 1, 1), (26, 1, 1), (28, 1, 1))),
}


def _published_features(kind, state, x):
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x, found = (x - shift) / scale, []
    for block in _BLOCKS[kind]:
        if block == "pool":
            x = F.max_pool2d(x, 3 if kind == "alex" else 2, 2)
            continue
        for index, stride, padding in block:
            weight, bias = (state[f"features.{index}.{name}"] for name in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, stride, padding).relu()
        found.append(x)
    return found


@pytest.mark.parametrize("kind", TRUNKS)
def test_lpips_is_the_papers_formula(kind, lpips_files):
    trunk, heads = lpips_files[kind]
    distance = LPIPS(kind, trunk, heads)
    a, b = _pictures(2, seed=1), _pictures(2, seed=2)
    state, linear = torch.load(trunk), torch.load(heads)
    expected = torch.zeros(2)
    layers = [_published_features(kind, state, x) for x in (a, b)]
    for tap, pair in enumerate(zip(*layers, strict=True)):
        unit = [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in pair]
        weighted = (unit[0] - unit[1]) ** 2 * linear[f"lin{tap}.model.1.weight"]
        expected += weighted.sum(1).mean((1, 2))
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-5, atol=0)
    assert tap == 4
    spatial = distance.spatial(distance.features(a), distance.features(b), (40, 48))
    assert spatial.shape == (2, 40, 48)
    assert float(distance(a, a).abs().max()) == 0


def test_faint_features_stay_shorter_than_one(lpips_files):
    """The published code adds 1e-10 to the length itself, not to its square."""
    distance = LPIPS("alex", *lpips_files["alex"])
    distance.network[0].weight.mul_(1e-10)
    distance.network[0].bias.zero_()
    state = {k: v * 1e-10 * k.endswith("weight") for k, v in torch.load(
        lpips_files["alex"][0]).items()}
    x = _pictures(1)
    length = _published_features("alex", state, x)[0].double().norm(dim=1)
    found = distance.features(x)[0].double().norm(dim=1)
    assert 0.05 < float(found.mean()) < 0.95
    torch.testing.assert_close(found, length / (length + 1e-10), rtol=1e-5, atol=1e-6)


def test_lpips_says_which_files_it_used(lpips_files):
    trunk, heads = lpips_files["alex"]
    facts = LPIPS("alex", trunk, heads).facts()
    assert facts["weights"] == "alex.pth"
    assert len(facts["weights_sha256"]) == len(facts["heads_sha256"]) == 64
    assert not facts["torchvision_weights"]
    assert "not torchvision's" in facts["name"]
    assert "no LPIPS" in create_distance("random-alex").name
    assert create_distance("pixel").facts()["trunk"] is None


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("lpips-alex", (None, None), r"weights: LPIPS needs .*alexnet-owt-7be5be79\.pth.*pixel"),
        ("lpips-alex", ("absent.pth", None), r"weights: expected .*absent\.pth does not exist"),
        ("lpips-alex", ("vgg.pth", None), r"weights: expected features\.0\.weight of shape"),
        ("lpips-alex", ("alex.pth", "vgg_heads.pth"), r"heads: expected lin1\.model\.1\.weight"),
        ("lpips-squeeze", (None, None), r"distance: expected one of .*pixel; got 'lpips-squeeze'"),
        ("pixel", ("alex.pth", None), r"weights, heads: pixel reads none"),
    ],
)
def test_nothing_stands_in_for_a_missing_trunk(kind, files, message, lpips_files, monkeypatch,
                                               tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    folder = lpips_files["alex"][0].parent
    weights, heads = (None if name is None else folder / name for name in files)
    with pytest.raises(ValueError, match=message):
        create_distance(kind, weights, heads)


def test_pictures_that_cannot_be_compared_are_refused():
    distance = create_distance("random-alex")
    for kind, least in (("alex", 31), ("vgg", 16)):
        layers = create_distance(f"random-{kind}")
        assert min(layers.features(_pictures(1, (least, least)))[-1].shape) >= 1
        with pytest.raises(ValueError, match=f"at least {least}"):
            layers.features(_pictures(1, (40, least - 1)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        distance.features(torch.full((1, 3, 40, 40), math.nan))
    with pytest.raises(ValueError, match="b: expected the shape of a"):
        distance(_pictures(1), _pictures(2))


def test_areas_by_both_readings_of_the_masking():
    a, b = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2] = True  # a quarter
    b[:, :, 0] = 1  # half of the mask, in all channels
    pictures, distance = torch.cat([a, b]), PixelDistance()
    (zeroed,) = area_distances(pictures, [mask], distance, [(0, 1)], "zero")
    (spatial,) = area_distances(pictures, [mask], distance, [(0, 1)], "spatial")
    assert zeroed == (pytest.approx(1 / 16), 0)
    assert spatial == (pytest.approx(1 / 4), 0)
    b[:, :, 7] = 1
    pictures = torch.cat([a, b])
    (zeroed,) = area_distances(pictures, [mask], distance, [(0, 1)], "zero")
    (spatial,) = area_distances(pictures, [mask], distance, [(0, 1)], "spatial")
    assert zeroed == (pytest.approx(1 / 16), pytest.approx(1 / 16))
    assert spatial == (pytest.approx(1 / 4), pytest.approx(1 / 12))
    everything = torch.ones_like(mask)
    for mode in ("zero", "spatial"):
        assert area_distances(pictures, [everything], distance, [(0, 1)], mode)[0][1] == 0


def test_pairs_of_the_protocol():
    assert DiversityProtocol(samples=4, pairs=3).indices(0) == [(0, 1), (1, 2), (2, 3)]
    drawn = DiversityProtocol(samples=6, pairs=9, pairing="random")
    found = drawn.indices(1)
    assert len(set(found)) == 9
    assert all(0 <= i < j < 6 for i, j in found)
    assert found == drawn.indices(1) != drawn.indices(2)
    one, other = protocol("n100-m19").diversity, protocol("one-layout-n100-m19").diversity
    assert (one.layouts, one.samples, one.pairs) == (100, 20, 19)
    assert (other.layouts, other.samples, other.pairs) == (1, 100, 19)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": 1}, "samples: expected at least 2"), ({"pairs": 20}, "pairs: .* at most 19"),
     ({"samples": 4, "pairs": 7, "pairing": "random"}, "pairs: expected at most 6 random pairs"),
     ({"mask_mode": "crop"}, "mask_mode: expected zero or spatial; got 'crop'"),
     ({"layouts": 0}, "layouts: expected at least 1"), ({"dont_care": "drop"}, "dont_care")],
)
def test_protocols_refuse_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        protocol("n100-m19", **options)


def test_changes_of_a_protocol_are_told():
    changed = protocol("n100-m19", layouts=5, dont_care="count").facts()["changed"]
    assert changed == {"diversity.layouts": 5, "dont_care": "count"}
    with pytest.raises(ValueError, match="protocol: expected one of n100-m19"):
        protocol("papers")


def test_codes_of_one_class_change_alone(model):
    codes = sample_codes(model, 4, seed=3, index=2)
    channels = model.generator.class_channels(2)
    held = torch.ones(codes.shape[1], dtype=torch.bool)
    held[channels] = False
    assert (codes[:, held] == codes[:1, held]).all()
    assert all(not torch.equal(codes[0, channels], codes[k, channels]) for k in (1, 2, 3))
    assert torch.equal(codes, sample_codes(model, 4, seed=3, index=2))
    for k in range(4):  # each draw of a seed of its own
        drawn = drawn_code(model, derived_seed(3, k, 2 + 1))
        assert torch.equal(codes[k, channels], drawn[0, channels])
    whole = sample_codes(model, 4, seed=3)
    for k in range(4):
        assert torch.equal(whole[k], drawn_code(model, derived_seed(3, k))[0])
    assert torch.equal(codes[0, held], whole[0, held])
    assert not torch.equal(whole[0, held], whole[1, held])


@pytest.mark.parametrize("mask_mode", ["zero", "spatial"])
def test_the_synthesizer_measures_what_the_model_paints(model, layouts, mask_mode):
    options = DiversityProtocol(layouts=2, samples=3, pairs=2, mask_mode=mask_mode)
    distances = [PixelDistance(), create_distance("random-alex")]

    def plain(codes):
        with use_backend("reference"):
            return torch.cat([model(planes, z[None]) for z in codes])

    sampler = LayoutSampler(model, 2)  # 3 samples: the last batch is filled up
    for layout in layouts:
        planes = semantics(model, layout)
        slow = scene_diversity(model, layout, plain, distances, options)
        fast = scene_diversity(model, layout, sampler.load(layout), distances, options)
        for (by_class, whole), (expected, expected_whole) in zip(fast, slow, strict=True):
            assert set(by_class) == set(layout.present)
            assert whole == pytest.approx(expected_whole, rel=1e-3)
            for c, pair in by_class.items():
                assert pair == pytest.approx(expected[c], rel=1e-3, abs=1e-7)
    assert len(sampler(sample_codes(model, 3, seed=0))) == 3  # none of those that filled it up


class _Painter(nn.Module):
    """Paints each class's area in the first channels of its own code: mOCD is exactly 0."""

    def __init__(self, generator):
        super().__init__()
        self.preset, self.weight = generator.preset, nn.Parameter(torch.ones(()))
        self.class_channels, self.sample_latent = generator.class_channels, generator.sample_latent

    def forward(self, layout, z):
        planes = layout.dense() if hasattr(layout, "dense") else layout
        colours = z.unflatten(1, (self.preset.classes, -1))[:, :, :3, :1, :1].tanh()
        return (planes[:, :, None] * colours).sum(1)


def test_a_model_whose_classes_are_apart_has_no_diversity_elsewhere(model, layouts):
    apart = type(model)(model.name, model.preset, {"generator": _Painter(model.generator)})
    found = diversity(apart, layouts, PixelDistance(), QUICK)
    assert found.mocd == 0
    assert found.mcsd > 0.001
    assert found.class_codes
    assert found.pictures == 3 * sum(1 + len(layout.present) for layout in layouts)
    assert set(found.by_class) == {c for layout in layouts for c in layout.present}
    means = np.mean([own for own, _ in found.by_class.values()])
    assert found.mcsd == pytest.approx(means)


@pytest.mark.parametrize("name", ["spade_coco_vae", "bicyclegan_deepfashion"])
def test_models_with_one_code_draw_it_whole(name):
    options = {"ngf": 4, "image_size": (64, 64), "classes": 8, "dont_care": None,
               "instance_edge": False, "init_gain": 1.0}
    whole = create_model(name, **options).eval()
    found = diversity(whole, sample_scenes(whole.preset, 2), PixelDistance(), QUICK)
    assert not found.class_codes
    assert found.pictures == 6
    assert found.mocd > 0


def test_what_cannot_be_sampled_is_refused(model, layouts):
    with pytest.raises(ValueError, match="layouts: expected 5 of them, got 2"):
        diversity(model, layouts, PixelDistance(), DiversityProtocol(layouts=5))
    plain = create_model("spade_ade20k", ngf=4, hidden=8, image_size=(64, 64), classes=8,
                         dont_care=None, unlabelled=None).eval()
    with pytest.raises(ValueError, match="paints one picture for a layout"):
        diversity(plain, layouts, PixelDistance(), QUICK)


def test_several_distances_see_the_same_pictures(model, layouts):
    first, second = diversities(model, layouts, [PixelDistance(), PixelDistance()], QUICK)
    assert first.to_json() == second.to_json()
    written = json.loads(json.dumps(first.to_json()))
    assert written["by_class"] == {
        str(c): {"csd": own, "ocd": other} for c, (own, other) in first.by_class.items()}
    assert [written[key] for key in ("mcsd", "mocd", "diversity", "class_codes", "pictures")] == [
        first.mcsd, first.mocd, first.diversity, True, first.pictures]


def test_frechet_distance_of_known_distributions():
    r = np.random.default_rng(0)
    a = FeatureStatistics.of(r.normal(0, 1, (4000, 3)))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shifted = FeatureStatistics(a.mean + 2, a.covariance, a.count)
    assert frechet_distance(a, shifted) == pytest.approx(12)
    wide = FeatureStatistics(a.mean, 4 * a.covariance, a.count)
    assert frechet_distance(a, wide) == pytest.approx(np.trace(a.covariance))
    with pytest.raises(ValueError, match="features of length 3, got 2"):
        frechet_distance(a, FeatureStatistics.of(r.normal(0, 1, (9, 2))))


@pytest.mark.parametrize(("features", "message"), [
    ([[1.0, 2.0]], r"at least 2 for a covariance, got features of shape \(1, 2\)"),
    ([1.0, 2.0], "at least 2 for a covariance"), ([[1.0], [np.nan]], "expected finite values"),
    ([[-np.inf], [1.0]], "expected finite values"),
])
def test_statistics_are_of_two_finite_pictures_at_least(features, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.of(np.array(features))
    assert FeatureStatistics.of(np.array([[0.0], [2.0]])).covariance.tolist() == [[2.0]]


def test_fid_counts_pictures_and_warns_of_few():
    def extractor(batch):
        assert batch.dtype == torch.uint8
        return batch.float().mean((2, 3))

    real, fake = [_pictures(3, seed=k) for k in (0, 1)], [_pictures(2, seed=5) * 0.5]
    found = fid(real, fake, extractor)
    assert (found["real"], found["fake"]) == (6, 2)
    assert found["fid"] > 0
    assert "biased upwards" in found["note"]
    for count in (8, 9, 10):  # of nine features
        features = torch.randn(count, 9), torch.randn(12, 9)
        assert ("note" in fid_of_features(*features)) == (count <= 9)
        assert ("note" in fid_of_features(*features[::-1])) == (count <= 9)
    with pytest.raises(ValueError, match="at least 2"):
        fid(real, [], extractor)


def test_fid_reads_the_bytes_that_would_be_written():
    seen = []
    x = torch.tensor([-1.0, -0.5, 0.25, 1.0]).view(4, 1, 1, 1).repeat(1, 3, 8, 8)
    x *= torch.tensor([1, -1, 0.5]).view(1, 3, 1, 1)

    def extractor(batch):
        seen.append(batch[:, :, 0, 0].tolist())
        return batch.float().mean((2, 3))

    fid([x[:1], x[1:]], [x], extractor)
    rows = [[0, 255, 64], [64, 191, 96], [159, 96, 143], [255, 0, 191]]  # (x + 1) / 2 · 255
    assert seen == [rows[:1], rows[1:], rows]


def test_inception_refuses_other_files(tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"inception-weights: .*absent\.pth is no file"):
        Inception(tmp_path / "absent.pth")
    with pytest.raises((ValueError, ModuleNotFoundError), match=r"other\.pth|torch-fidelity"):
        Inception(tmp_path / "other.pth")


def test_miou_and_accuracy_of_a_known_confusion():
    score = SegmentationScore(4, LabelRule("same", frozenset({3})))
    score.add(np.array([[0, 0, 0, 1], [1, 1, 3, 3]]), np.array([[0, 0, 1, 1], [1, 0, 2, 0]]))
    found = score.result()
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["iou"] == {"0": pytest.approx(2 / 4), "1": pytest.approx(2 / 4)}
    assert found["pixels"] == 6
    with pytest.raises(ValueError, match=r"predictions: expected 0\.\.3 .* got 4"):
        score.add(np.zeros((1, 1), int), np.full((1, 1), 4))
    with pytest.raises(ValueError, match="expected the labels' shape"):
        score.add(np.zeros((1, 2), int), np.zeros((2, 1), int))
    with pytest.raises(ValueError, match="got none"):
        SegmentationScore(4, LabelRule("same", frozenset())).result()


@pytest.mark.parametrize(
    ("name", "preset", "predicted", "label", "ignored"),
    [("cityscapes", CITYSCAPES, 18, 33, {0, 6, 34}), ("ade20k", ADE20K, 149, 150, {0}),
     ("same", SPADE_COCO, 5, 5, {182}), ("same", ADE20K, 150, 150, {0})],
)
def test_rules_of_the_data_sets(name, preset, predicted, label, ignored):
    rule = label_rule(name, preset)
    assert ignored <= rule.ignored
    score = SegmentationScore(preset.classes, rule)
    score.add(np.array([[label, min(ignored)]]), np.array([[predicted, 0]]))
    assert score.result()["accuracy"] == 1
    assert score.result()["pixels"] == 1
    counted = SegmentationScore(preset.classes, label_rule(name, preset, "count"))
    counted.add(np.array([[label, min(ignored)]]), np.array([[predicted, predicted]]))
    assert counted.result()["accuracy"] == 0.5


def test_a_rule_of_another_data_set_is_refused():
    with pytest.raises(ValueError, match=r"label-rule: cityscapes has labels up to 33"):
        label_rule("cityscapes", DEEPFASHION)
    with pytest.raises(ValueError, match="label-rule: expected same, cityscapes or ade20k"):
        label_rule("coco", SPADE_COCO)


class _Brightness(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grey = x.mean(1, keepdim=True)
        return torch.nn.functional.avg_pool2d(torch.cat([0.5 - grey, grey - 0.5], 1), 2)


@pytest.mark.parametrize("kind", ["pt", "pt2"])
def test_segmentation_models_from_files(kind, tmp_path):
    path = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.jit.save(torch.jit.script(_Brightness()), path)
    else:
        example = (torch.zeros(1, 3, 8, 8),)
        torch.export.save(torch.export.export(_Brightness(), example), path)
    pictures = torch.full((1, 3, 8, 8), -1.0)
    pictures[..., 4:] = 1
    segmenter = FileSegmenter(path, "unit")
    found = predict(segmenter, pictures)
    assert found.shape == (1, 8, 8)
    assert (found[..., :3] == 0).all() and (found[..., 5:] == 1).all()
    assert segmenter.facts()["segmenter"] == path.name
    with pytest.raises(ValueError, match="segmenter-input: expected symmetric"):
        FileSegmenter(path, "bgr")
    path.write_text("no model")
    with pytest.raises(ValueError, match=r"segmenter: .* is neither TorchScript nor"):
        FileSegmenter(path)


def test_a_segmenter_must_give_labels_or_scores():
    pictures = _pictures(2, (8, 8))
    labels = torch.randint(0, 4, (2, 8, 8))
    assert np.array_equal(predict(lambda x: labels, pictures), labels.numpy())
    scores = torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()
    assert np.array_equal(predict(lambda x: {"out": scores}, pictures), labels.numpy())
    with pytest.raises(ValueError, match="segmenter: expected scores"):
        predict(lambda x: torch.zeros(2, 8, 8), pictures)


def test_evaluate_is_repeatable_and_says_how(model, tmp_path):
    scenes = Scenes(GeneratedScenes(3, 64, "test"), {"dataset": "scenes"})
    measured = Metrics([PixelDistance()], lambda batch: batch.float().mean((2, 3)),
                       lambda pictures: torch.zeros(len(pictures), 64, 64, dtype=torch.long),
                       rule=LabelRule("same", frozenset({0})))
    options = protocol("n100-m19", layouts=2, samples=3, pairs=2)
    found, again = (evaluate(model, scenes, measured, options, seed=4) for _ in range(2))
    for result in (found, again):
        result["results"]["diversity"]["pixel L1"].pop("seconds")
        json.dumps(result)
    assert found["results"] == again["results"]
    digest = hashlib.sha256()
    for i in range(3):
        scene = scenes.scene(i)[0]
        digest.update(f"test_{i:06d}(64, 64)".encode() + scene.labels.astype("<i8").tobytes())
    assert found["data"] == {
        "dataset": "scenes", "scenes": 3, "labels_sha256": digest.hexdigest()}
    assert (found["seed"], found["model"]["weights"]) == (4, "random, seed 4")
    assert found["results"]["fid"]["fake"] == 3
    counted = sum(int((scenes.scene(i)[0].labels != 0).sum()) for i in range(3))
    assert found["results"]["segmentation"]["pixels"] == counted
    for i in range(3):
        images.write_indices(tmp_path / f"{scenes.scene(i)[0].name}.png", np.zeros((64, 64), int))
    read = Metrics(predictions=tmp_path, rule=measured.rule)
    assert evaluate(model, scenes, read, options)["results"]["segmentation"]["pixels"] == counted
    assert found["model"]["options"]["ngf"] == 8
    assert found["protocol"]["changed"]
    assert {"torch", "smis_kernels"} <= set(found["versions"])
    wrong = protocol("cityscapes-256x512")
    with pytest.raises(ValueError, match=r"protocol: cityscapes-256x512 is of pictures"):
        evaluate(model, scenes, measured, wrong)
    fitting = SimpleNamespace(preset=CITYSCAPES)  # 256 high, 512 wide
    with pytest.raises(ValueError, match="metrics: nothing to measure"):
        evaluate(fitting, scenes, Metrics(), wrong)


def test_the_seed_reaches_every_code(model):
    """Of the pictures that FID and the segmenter see, and of those that are compared."""
    source = GeneratedScenes(3, 64, "test")
    scenes, options = Scenes(source, {"dataset": "scenes"}), protocol(
        "n100-m19", layouts=2, samples=3, pairs=2)

    def extractor(batch):
        return batch.float().mean((2, 3))

    found = {seed: evaluate(model, scenes, Metrics([PixelDistance()], extractor), options,
                            seed=seed)["results"] for seed in (0, 4)}
    with torch.no_grad():
        painted = [model(model.semantics(scene["labels"][None]),
                         drawn_code(model, derived_seed(4, i))) for i, scene in enumerate(source)]
    photographs = [scene["image"][None] for scene in source]
    assert found[4]["fid"]["fid"] == pytest.approx(
        fid(photographs, painted, extractor)["fid"], rel=2e-2)
    assert abs(found[0]["fid"]["fid"] / found[4]["fid"]["fid"] - 1) > 0.1
    layouts = [scenes.scene(i)[0] for i in range(2)]
    apart = [diversity(model, layouts, PixelDistance(), options.diversity, seed=seed)
             for seed in (0, 4)]
    for seed, expected in zip((0, 4), apart, strict=True):
        values = found[seed]["diversity"]["pixel L1"]
        assert (values["mcsd"], values["mocd"]) == (expected.mcsd, expected.mocd)
    assert apart[0].mcsd != apart[1].mcsd


def test_instance_features_reach_the_pictures(tmp_path):
    painter = create_model("pix2pixhd_cityscapes_features", ngf=4, nef=4, blocks=1,
                           image_size=(64, 128), init_gain=1.0).eval()
    layouts = sample_scenes(painter.preset, 2)
    clusters = FeatureClusters({c: np.random.default_rng(c).normal(size=(4, 3)).astype(np.float32)
                                for c in range(35)})
    seen = []

    def segmenter(pictures):
        seen.append(pictures)
        return torch.zeros(1, 64, 128, dtype=torch.long)

    evaluate(painter, Scenes(layouts, {}), Metrics(segmenter=segmenter), protocol("n100-m19"),
             seed=3, clusters=clusters)
    clusters = FeatureClusters.load(clusters.save(tmp_path / "c.npz"))
    data = evaluate(painter, Scenes(layouts[:1], {}), Metrics(segmenter=lambda x: segmenter(x)),
                    protocol("n100-m19"), clusters=clusters)["data"]
    assert data["features"] == str(tmp_path / "c.npz")
    assert data["features_sha256"] == file_hash(tmp_path / "c.npz")
    for i, (layout, picture) in enumerate(zip(layouts, seen[:2], strict=True)):
        planes = clusters.sample(torch.from_numpy(layout.instances)[None],
                                 seed=derived_seed(3, i))
        with torch.no_grad():
            expected = painter(semantics(painter, layout), planes)
        torch.testing.assert_close(picture, expected, rtol=0, atol=2e-3)


def test_predictions_come_to_the_maps_size_by_pixel_centres(tmp_path):
    model = create_model("groupdnet_deepfashion", **{**TINY, "image_size": (64, 128)}).eval()
    layouts = sample_scenes(model.preset, 2)
    matrix = np.zeros((8, 8))
    for k, layout in enumerate(layouts):
        predicted = np.random.default_rng(k).integers(0, 8, (37 + k, 90)).astype(np.int32)
        images.write_indices(tmp_path / f"{layout.name}.png", predicted)
        resized = np.asarray(Image.fromarray(predicted).resize((128, 64), Image.Resampling.NEAREST))
        matrix += confusion_matrix(layout.labels.flatten(), resized.flatten(), labels=range(8))
    read = Metrics(predictions=tmp_path, rule=LabelRule("same", frozenset()))
    found = evaluate(model, Scenes(layouts, {}), read, protocol("n100-m19"))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    assert found["results"]["segmentation"]["miou"] == pytest.approx(
        float((matrix.diagonal()[union > 0] / union[union > 0]).mean()))


def test_a_prediction_is_of_one_scene(model, tmp_path):
    """A map without its scene's folder serves where no other scene has that name."""
    for name in ("a/1", "a/2", "b/1"):
        images.write_indices(tmp_path / f"labels/{name}.png", np.zeros((64, 64), int))
    for name in ("1", "2"):
        images.write_indices(tmp_path / f"flat/{name}.png", np.zeros((64, 64), int))

    def score(folder):
        scenes = read_scenes(tmp_path / "labels", None, model.preset)[folder]
        return evaluate(model, Scenes(scenes, {}), Metrics(predictions=tmp_path / "flat"),
                        protocol("n100-m19"))["results"]["segmentation"]["pixels"]

    assert score(slice(2)) == 2 * 64**2
    with pytest.raises(ValueError, match=r"1\.png would be of two scenes, a/1 and b/1; put"):
        score(slice(3))


def test_predictions_are_recorded_as_what_was_judged(model, tmp_path):
    layouts = sample_scenes(model.preset, 2)
    digest = hashlib.sha256()
    for k, layout in enumerate(layouts):
        predicted = np.full((64, 64), k)
        images.write_indices(tmp_path / f"{layout.name}.png", predicted)
        digest.update(f"{layout.name}(64, 64)".encode() + predicted.astype("<i8").tobytes())
    images.write_indices(tmp_path / "of_no_scene.png", np.zeros((64, 64), int))
    found = evaluate(model, Scenes(layouts, {}), Metrics(predictions=tmp_path),
                     protocol("n100-m19"))["results"]
    told = {"predictions": str(tmp_path), "maps": 2, "maps_sha256": digest.hexdigest()}
    assert {key: found["segmentation"][key] for key in told} == told
    assert metric_rows({"results": found})[0][2] == f"label rule same; 2 label maps in {tmp_path}"


def test_fid_of_one_scene_is_refused_before_it(model):
    touched = []
    with pytest.raises(ValueError, match="fid: expected at least 2 scenes with photographs, got 1"):
        evaluate(model, Scenes(GeneratedScenes(1, 64, "test"), {}),
                 Metrics([PixelDistance()], lambda x: x.float().mean((2, 3))),
                 protocol("n100-m19", layouts=1, samples=2, pairs=1), step=touched.append)
    assert not touched


def test_a_part_that_fails_costs_no_other(model):
    everything = LabelRule("same", frozenset(range(8)))  # is left out
    nothing = Metrics(segmenter=lambda x: torch.zeros(len(x), 64, 64, dtype=torch.long),
                      rule=everything)
    scenes = Scenes(sample_scenes(model.preset, 1), {})
    short = protocol("n100-m19", layouts=1, samples=2, pairs=1)
    found = evaluate(model, scenes, replace(nothing, distances=[PixelDistance()]), short)
    assert set(found["results"]) == {"diversity"}
    assert found["failed"]["segmentation"].startswith("labels: expected pixels of classes")
    with pytest.raises(ValueError, match="labels: expected pixels of classes"):
        evaluate(model, scenes, nothing, short)


def test_names_of_scenes_are_bytes_of_any_kind(model):
    name = os.fsdecode(b"caf\xe9")  # Latin-1 on a disk where names are UTF-8
    scene = replace(sample_scenes(model.preset, 1)[0], name=name)
    found = evaluate(model, Scenes([scene], {}), Metrics([PixelDistance()]),
                     protocol("n100-m19", layouts=1, samples=2, pairs=1))
    expected = hashlib.sha256(b"caf\xe9(64, 64)" + scene.labels.astype("<i8").tobytes())
    assert found["data"]["labels_sha256"] == expected.hexdigest()


def test_a_model_without_a_code_is_told_before_any_file_is_read(layouts):
    plain = create_model("spade_ade20k", ngf=4, hidden=8, image_size=(64, 64), classes=8,
                         dont_care=None, unlabelled=None).eval()
    with pytest.raises(ValueError, match="picture for a layout; --distance none measures the rest"):
        evaluate(plain, Scenes(layouts, {}), Metrics([PixelDistance()]),
                 protocol("n100-m19", layouts=1, samples=2, pairs=1), step=pytest.fail)


# The order of Cityscapes' train ids, by the data set's own list.
TRAINED = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
           "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
           "motorcycle", "bicycle")


def test_train_ids_mean_these_classes():
    names = class_names("groupdnet_cityscapes", 35)
    rule = label_rule("cityscapes", CITYSCAPES)
    assert tuple(names[k] for k in rule.meaning) == TRAINED
    assert {names[k] for k in rule.ignored} == set(names) - set(TRAINED)
    assert label_rule("ade20k", ADE20K).meaning == tuple(range(1, 151))


def test_what_networks_for_segmentation_give():
    """Pairs of scores and an auxiliary head's; labels with a channel of their own."""
    pictures, labels = _pictures(2, (8, 8)), torch.randint(0, 4, (2, 8, 8))
    scores = torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()
    for out in ((scores, -scores), [scores, -scores], labels[:, None], labels.int()):
        assert np.array_equal(predict(lambda x, out=out: out, pictures), labels.numpy())


@pytest.fixture
def smis(monkeypatch, capsys, tmp_path, model):
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    save_checkpoint(model, tmp_path / "tiny.safetensors")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", [
            "smis", "evaluate", "--model", "groupdnet_deepfashion", "--checkpoint",
            str(tmp_path / "tiny.safetensors"), "--out", str(tmp_path / "out/result.json"),
            *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


def test_the_command_writes_json(smis, tmp_path):
    code, out, err = smis("--dataset", "scenes", "--count", 2, "--layouts", 2, "--samples", 2,
                          "--pairs", 1, "--distance", "pixel", "--segmenter", "scenes")
    assert code == 0, err
    assert "mCSD" in out and "fid: not measured" in out
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert set(result["results"]) == {"diversity", "segmentation"}
    assert len(result["model"]["weights_sha256"]["tiny.safetensors"]) == 64
    model = create_model(checkpoint=tmp_path / "tiny.safetensors").eval()
    matrix = np.zeros((8, 8))
    for i, scene in enumerate(GeneratedScenes(2, 64, "val")):
        with torch.no_grad():
            picture = model(model.semantics(scene["labels"][None]),
                            drawn_code(model, derived_seed(0, i)))
        read = SceneClassifier.shipped().read(picture).labels
        matrix += confusion_matrix(scene["labels"].flatten(), read.flatten(), labels=range(8))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    assert result["results"]["segmentation"]["miou"] == pytest.approx(
        float((matrix.diagonal()[union > 0] / union[union > 0]).mean()), abs=2e-3)


def test_a_full_disk_at_the_end_costs_no_number(smis, tmp_path, monkeypatch):
    def full(path, content):
        if path == tmp_path / "out/result.json":
            raise OSError(28, "No space left on device")
        return images.write_atomically(path, content)

    monkeypatch.setattr(cli.evaluate, "write_atomically", full)
    given = ("--dataset", "scenes", "--count", 1, "--layouts", 1, "--samples", 2, "--pairs", 1,
             "--distance", "pixel")
    code, out, err = smis(*given)
    assert code == 2 and "mCSD" in out
    found = re.search(r"cannot be written \(No space left on device\); the results are (\S+)", err)
    assert found and "diversity" in json.loads(Path(found[1]).read_text())["results"]
    shutil.rmtree(Path(found[1]).parent)
    monkeypatch.setattr(cli.evaluate, "write_atomically", lambda path, _: full(
        tmp_path / "out/result.json", b""))  # of a temporary folder neither
    code, out, err = smis(*given)
    assert "the results are printed above" in err
    assert json.loads(out[out.index("{"):])["results"]


def test_the_hash_is_of_the_weights_that_were_measured(smis, tmp_path, monkeypatch):
    """A run writes others while an evaluation goes on."""
    build, before = cli.evaluate.build_dataset, file_hash(tmp_path / "tiny.safetensors")

    def late(*given, **options):
        save_checkpoint(create_model("groupdnet_deepfashion", seed=9, **TINY),
                        tmp_path / "tiny.safetensors")
        return build(*given, **options)

    monkeypatch.setattr(cli.evaluate, "build_dataset", late)
    code, _, err = smis("--dataset", "scenes", "--count", 1, "--layouts", 1, "--samples", 2,
                        "--pairs", 1, "--distance", "pixel")
    assert code == 0, err
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["model"]["weights_sha256"] == {"tiny.safetensors": before}
    assert before != file_hash(tmp_path / "tiny.safetensors")


def test_the_command_reads_label_maps_and_predictions(smis, tmp_path, monkeypatch):
    scene = GeneratedScenes(1, 64, "test")[0]["labels"].numpy()
    images.write_indices(tmp_path / "labels/a_labelIds.png", scene)
    images.write_indices(tmp_path / "predicted/a.png", scene)
    asked, rule = [], cli.evaluate.metrics.label_rule
    monkeypatch.setattr(cli.evaluate.metrics, "label_rule",
                        lambda *given: asked.append(given) or rule(*given))
    code, _, err = smis("--labels", tmp_path / "labels", "--distance", "none", "--predictions",
                        tmp_path / "predicted", "--dont-care", "count", "--seed", 6)
    assert code == 0, err
    result = json.loads((tmp_path / "out/result.json").read_text())
    found = result["results"]
    assert found["segmentation"]["miou"] == found["segmentation"]["accuracy"] == 1
    assert [(name, dont_care) for name, _, dont_care in asked] == [("same", "count")]
    assert (result["seed"], result["protocol"]["dont_care"]) == (6, "count")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "scenes"), r"weights: LPIPS needs"),
        ((), r"labels, dataset: expected one of them"),
        (("--dataset", "scenes", "--distance", "none"), r"metrics: nothing to measure"),
        (("--dataset", "scenes", "--count", "1", "--distance", "pixel"), r"layouts: expected 100"),
        (("--dataset", "scenes", "--distance", "mse"), r"distance: expected one of"),
        (("--dataset", "scenes", "--distance", "pixel", "--lpips-weights", "x"), r"lpips-weights"),
        (("--dataset", "scenes", "--distance", "pixel", "--protocol", "p"), r"protocol: expected"),
        (("--dataset", "scenes", "--distance", "pixel", "--segmenter", "none.pt"), r"is no file"),
        (("--dataset", "scenes", "--inception-weights", "x", "--distance", "none"), r"is no file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(smis, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    code, _, err = smis(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()
