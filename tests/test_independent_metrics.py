"""Metrics against independent programs: lpips, torch-fidelity, SciPy, scikit-learn, and by hand."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from require import INDEPENDENT, lacking
from torch import Tensor, nn
from validation import agree

from smis_models.io.images import as_bytes, to_pictures
from smis_models.io.seeds import derived_seed
from smis_models.metrics import (
    LPIPS,
    DiversityProtocol,
    FeatureStatistics,
    LabelRule,
    PixelDistance,
    SegmentationScore,
    create_distance,
    diversity,
    frechet_distance,
)
from smis_models.metrics.diversity import area_distances, scene_diversity
from smis_models.metrics.fid import fid_of_features
from smis_models.metrics.segmentation import FileSegmenter, predict
from smis_models.synthesis.scene import Scene

# torchvision's Python files run beside any torch once its two operators are there.
_OPERATORS = ("nms", "qnms")


@pytest.fixture(scope="module")
def programs() -> Iterator[SimpleNamespace]:
    """lpips, torchvision and torch-fidelity from a folder of their own."""
    if reason := lacking("independent"):
        pytest.skip(reason)
    library = None
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(INDEPENDENT))
    try:
        yield SimpleNamespace(
            lpips=importlib.import_module("lpips"), library=library,
            models=importlib.import_module("torchvision.models"),
            inception=importlib.import_module("torch_fidelity.feature_extractor_inceptionv3"),
            fid=importlib.import_module("torch_fidelity.metric_fid"),
        )
    finally:
        sys.path.remove(str(INDEPENDENT))


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_the_published_package(programs: Any, kind: str, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trunk of torchvision with drawn weights, and the published heads."""
    for name in ("kaiming_normal_", "normal_", "trunc_normal_"):  # VGG's classifier takes seconds
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    net = {"alex": "alexnet", "vgg": "vgg16"}[kind]
    with torch.device("meta"):
        trunk = getattr(programs.models, net)(weights=None)
    torch.manual_seed(4)
    state = {f"features.{key}": torch.randn(t.shape) * (2 / t[0].numel()) ** 0.5
             if t.dim() > 1 else 0.1 * torch.randn(t.shape)
             for key, t in trunk.features.state_dict().items()}
    monkeypatch.setattr(programs.models, net, lambda **_: SimpleNamespace(features=trunk.features))
    trunk.features.load_state_dict(
        {k.removeprefix("features."): v for k, v in state.items()}, assign=True)
    theirs = programs.lpips.LPIPS(net=kind, pnet_rand=True, verbose=False, version="0.1").eval()
    torch.save(state, tmp_path / "trunk.pth")
    heads = Path(programs.lpips.__file__).parent / "weights/v0.1" / f"{kind}.pth"
    ours = LPIPS(kind, tmp_path / "trunk.pth", heads)
    for size in ((64, 64), (35, 50)):
        a, b = pictures(2, size, 1), pictures(2, size, 2)
        with torch.no_grad():
            expected, layers = theirs(a, b, retPerLayer=True)
        assert float(expected.min()) > 0.01
        agree(f"LPIPS, {kind}", "lpips 0.1.4", ours(a, b), expected.flatten(), rtol=1e-5, atol=1e-7)
        found = ours.maps(ours.features(a), ours.features(b))
        for mine, layer in zip(found, layers, strict=True):
            torch.testing.assert_close(mine.mean((1, 2)), layer.flatten(), rtol=1e-5, atol=1e-8)
        theirs.spatial = True
        with torch.no_grad():
            wide = theirs(a, b)
        theirs.spatial = False
        agree(f"LPIPS by pixel, {kind}", "lpips 0.1.4",
              ours.spatial(ours.features(a), ours.features(b), size), wide[:, 0],
              rtol=1e-5, atol=1e-7)


def test_frechet_distance_is_scipys_and_torch_fidelitys(programs: Any) -> None:
    from scipy import linalg

    r = np.random.default_rng(0)
    mixing = r.normal(size=(2, 12, 12))
    a, b = (r.normal(size=(60, 12)) @ m + shift for m, shift in zip(mixing, (0, 1), strict=True))
    ours = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    agree("Fréchet distance", "SciPy's sqrtm", ours, expected, rtol=1e-8)
    theirs = programs.fid.fid_statistics_to_metric(
        {"mu": mean_a, "sigma": cov_a}, {"mu": mean_b, "sigma": cov_b}, False)
    agree("Fréchet distance", "torch-fidelity 0.4.0", ours, next(iter(theirs.values())), rtol=1e-6)
    statistics = programs.fid.fid_features_to_statistics(torch.from_numpy(a))
    own = FeatureStatistics.of(a)
    agree("mean of features", "torch-fidelity 0.4.0", own.mean, statistics["mu"], rtol=1e-7)
    agree("covariance of features", "torch-fidelity 0.4.0", own.covariance, statistics["sigma"],
          rtol=1e-7)
    found = fid_of_features(torch.from_numpy(a), torch.from_numpy(b))
    assert found["fid"] == pytest.approx(expected, rel=1e-4)  # features are fp32
    assert (found["real"], found["fake"], "note" in found) == (60, 60, False)


def test_inception_is_torch_fidelitys(programs: Any, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The extractor with a drawn weights file, on bytes of another size than 299."""
    from smis_models.metrics import Inception

    torch.manual_seed(0)
    made: dict[str, Any] = {}
    own = programs.inception.FeatureExtractorInceptionV3

    class Recorded(own):  # type: ignore[valid-type,misc]
        def __init__(self, name: str, features: list[str], **options: Any) -> None:
            made.update(name=name, features=features, options=options)
            nn.Module.__init__(self)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            made.update(input=x, still=not (self.training or torch.is_grad_enabled()))
            return (x.float().mean((2, 3)),)

    monkeypatch.setattr(programs.inception, "FeatureExtractorInceptionV3", Recorded)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "inception.pth")
    extractor = Inception(tmp_path / "inception.pth")
    x = as_bytes(pictures(2, (40, 50)))
    torch.testing.assert_close(extractor(x), x.float().mean((2, 3)))
    assert made["name"] == "inception-v3-compat"
    assert made["features"] == ["2048"]
    assert made["options"] == {"feature_extractor_weights_path": str(tmp_path / "inception.pth")}
    assert made["input"].dtype == torch.uint8 and made["input"].shape == (2, 3, 40, 50)
    assert made["still"]  # in training mode the batch would be normalised by itself


@pytest.mark.parametrize("ignored", [(), (0,), (2, 5)])
def test_miou_is_scikit_learns(ignored: tuple[int, ...]) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

    r = np.random.default_rng(3)
    labels = r.integers(0, 6, (4, 20, 30))
    predictions = np.where(r.random(labels.shape) < 0.6, labels, r.integers(0, 5, labels.shape))
    score = SegmentationScore(8, LabelRule("same", frozenset(ignored)))  # 6 and 7 are absent
    for i in range(4):
        score.add(labels[i], predictions[i])
    kept = ~np.isin(labels, ignored)
    truth, made = labels[kept], predictions[kept]
    agree("confusion matrix", "scikit-learn", score.matrix,
          confusion_matrix(truth, made, labels=range(8)))
    found = score.result()
    agree("pixel accuracy", "scikit-learn", found["accuracy"],
          accuracy_score(truth, made), rtol=1e-9)
    classes = [c for c in range(6) if c not in ignored]
    each = jaccard_score(truth, made, labels=classes, average=None)
    assert found["iou"] == {str(c): pytest.approx(v) for c, v in zip(classes, each, strict=True)}
    agree("mIoU", "scikit-learn", found["miou"], each.mean(), rtol=1e-9)
    assert found["pixels"] == len(truth)


def test_pixels_of_every_level_survive() -> None:
    """Levels 0..255 come back from where they were read to, and half a level decides."""
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    exact = levels.double() / 127.5 - 1
    for offset in (-0.49, -0.25, 0.0, 0.25, 0.49):
        batch = (exact + offset / 127.5).clamp(-1, 1).float()
        (found,) = to_pictures(batch)
        np.testing.assert_array_equal(found, levels[0].permute(1, 2, 0))
        assert torch.equal(as_bytes(batch), levels.byte())
    # What 16-bit floats exceed [-1, 1] by is clipped, and 127.5 goes to the even one.
    odd = torch.tensor([0.0, -1.0009, 1.0009, 1.0, -1.0, 0.2, -0.2])
    wanted = [128, 0, 255, 255, 0, 153, 102]
    assert as_bytes(odd.view(1, 1, 1, -1).expand(1, 3, 1, -1))[0, 0, 0].tolist() == wanted
    (found,) = to_pictures(odd.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert found[0, :, 0].tolist() == wanted
    for beyond in (1.004, -1.004, 5.0):
        with pytest.raises(ValueError, match=r"expected values in \[-1, 1\]"):
            to_pictures(torch.full((1, 3, 2, 2), beyond))
    for low in (torch.float16, torch.bfloat16):
        (found,) = to_pictures(odd.to(low).view(1, 1, 1, -1).expand(1, 3, 1, -1))
        expected = np.rint((odd.to(low).double().clamp(-1, 1) + 1) * 127.5)
        np.testing.assert_array_equal(found[0, :, 0], expected)


def test_pixel_distance_by_hand() -> None:
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    b[0, 0, 0, 0], b[0, 2, 1, 1] = 1.0, -0.5
    distance = PixelDistance()
    assert float(distance(a, b)) == pytest.approx((1 + 0.5) / (3 * 4) / 2)
    spatial = distance.spatial(distance.features(a), distance.features(b), (2, 2))
    assert spatial.tolist() == [[[pytest.approx(1 / 6), 0], [0, pytest.approx(0.5 / 6)]]]


class _Coarse(PixelDistance):
    """Two layers of features, one of half the size: what an enlargement shows in."""

    def features(self, x: Tensor) -> list[Tensor]:
        return [x, F.avg_pool2d(x, 2)]

    def maps(self, a: Any, b: Any) -> list[Tensor]:
        return [(x - y).abs().mean(1) for x, y in zip(a, b, strict=True)]


def test_layers_are_summed_and_enlarged_bilinearly() -> None:
    a, b = pictures(2, (8, 12), 1), pictures(2, (8, 12), 2)
    distance = _Coarse()
    fine, coarse = distance.maps(distance.features(a), distance.features(b))
    torch.testing.assert_close(distance(a, b), fine.mean((1, 2)) + coarse.mean((1, 2)))
    wide = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)(coarse[:, None])[:, 0]
    torch.testing.assert_close(
        distance.spatial(distance.features(a), distance.features(b), (8, 12)), fine + wide)


class _Generator(nn.Module):
    """Paints each class's area in its code's first number; class 1 shines on row 0 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.preset = SimpleNamespace(classes=2, dont_care=None, unlabelled=None,
                                      instance_edge=False, image_size=(2, 4))

    def class_channels(self, index: int) -> slice:
        return slice(index, index + 1)

    def sample_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(count, 2, 1, 1, generator=generator)

    def forward(self, layout: Any, z: Tensor) -> Tensor:
        planes = layout.dense() if hasattr(layout, "dense") else layout
        picture = 0.9 * (planes * z.tanh()).sum(1, keepdim=True)
        picture[:, :, 0] = picture[:, :, 0] + 0.1 * z[:, 1:].tanh()[:, :, 0]
        return picture.expand(-1, 3, -1, -1)


def test_mcsd_and_mocd_by_hand() -> None:
    """Two layouts, in one of which class 1 is absent: means over the layouts that show a class."""
    from smis_models.metrics.sampling import sample_codes

    generator = _Generator()
    model: Any = SimpleNamespace(generator=generator, preset=generator.preset,
                                 parameters=generator.parameters)
    maps = np.array([[[0, 0, 1, 1], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    layouts = [Scene(f"scene {i}", labels, None) for i, labels in enumerate(maps)]
    options = DiversityProtocol(layouts=2, samples=3, pairs=2, mask_mode="zero")
    found = diversity(model, layouts, PixelDistance(), options, seed=5)

    def paint(layout: Scene, z: Tensor) -> Tensor:
        planes = F.one_hot(torch.from_numpy(layout.labels), 2).permute(2, 0, 1)[None].float()
        return generator(planes, z).detach()

    own: dict[int, list[float]] = {0: [], 1: []}
    other: dict[int, list[float]] = {0: [], 1: []}
    whole = []
    for i, layout in enumerate(layouts):
        seed = derived_seed(5, i)
        for c in (None, *layout.present):
            made = [paint(layout, z[None]) for z in sample_codes(model, 3, seed, c)]
            apart = [(made[k] - made[k + 1]).abs().mean(1)[0] / 2 for k in (0, 1)]
            if c is None:
                whole.append(float(torch.stack([x.mean() for x in apart]).mean()))
                continue
            inside = torch.from_numpy(layout.labels == c)
            for values, area in ((own, inside), (other, ~inside)):
                values[c].append(float(torch.stack([(x * area).mean() for x in apart]).mean()))
    for c in (0, 1):
        assert found.by_class[c] == pytest.approx((np.mean(own[c]), np.mean(other[c])), rel=1e-4)
    assert len(own[0]) == 2 and len(own[1]) == 1
    by_hand = "pictures painted and compared one by one"
    agree("mCSD", by_hand, found.mcsd, np.mean([np.mean(own[c]) for c in (0, 1)]), rtol=1e-4)
    agree("mOCD", by_hand, found.mocd, np.mean([np.mean(other[c]) for c in (0, 1)]), rtol=1e-4)
    agree("mean distance of pictures", by_hand, found.diversity, np.mean(whole), rtol=1e-4)
    assert found.mcsd > found.mocd > 0
    further = diversity(model, [*layouts, layouts[0]], PixelDistance(), options, seed=5)
    assert (further.mcsd, further.pictures) == (found.mcsd, found.pictures)  # the first two alone


def test_one_code_for_the_whole_picture_is_compared_in_every_area() -> None:
    plain = SimpleNamespace(sample_latent=_Generator().sample_latent)
    made, drawn = pictures(3, (2, 4)), []
    scene = Scene("a", np.array([[0, 0, 1, 1], [0, 0, 0, 3]]), None)

    def draw(codes: Tensor) -> Tensor:
        drawn.append(codes)
        return made

    options = DiversityProtocol(layouts=1, samples=3, pairs=2, mask_mode="spatial")
    ((by_class, _),) = scene_diversity(
        SimpleNamespace(generator=plain), scene, draw, [PixelDistance()], options)
    assert [len(codes.unique(dim=0)) for codes in drawn] == [3]
    apart = sum((made[k] - made[k + 1]).abs().mean(0) / 2 for k in (0, 1)) / 2
    for c in (0, 1, 3):
        own = torch.from_numpy(scene.labels == c)
        assert by_class.pop(c) == pytest.approx((float(apart[own].mean()),
                                                 float(apart[~own].mean())), rel=1e-5)
    assert not by_class


def test_beside_an_area_the_network_sees_mid_grey() -> None:
    made, mask, distance = pictures(2, (40, 40)), torch.rand(40, 40) > 0.5, create_distance(
        "random-alex")
    ((inside, outside),) = area_distances(made, [mask], distance, [(0, 1)], "zero")
    for found, area in ((inside, mask), (outside, ~mask)):
        a, b = (torch.where(area, picture, 0.0)[None] for picture in made)
        assert found == pytest.approx(float(distance(a, b)), rel=1e-5)


@pytest.mark.parametrize("mode", ["zero", "spatial"])
def test_areas_of_several_pairs(mode: str) -> None:
    """The mean over the pairs, each of its own two pictures."""
    made, mask = pictures(4, (6, 5)), torch.rand(6, 5) > 0.5
    pairs = [(0, 1), (1, 2), (0, 3)]
    apart = torch.stack([(made[i] - made[j]).abs().mean(0) / 2 for i, j in pairs])
    divide = {"zero": (30.0, 30.0), "spatial": (float(mask.sum()), float((~mask).sum()))}[mode]
    expected = tuple(float((apart * area).sum() / len(pairs) / count)
                     for area, count in zip((mask, ~mask), divide, strict=True))
    (found,) = area_distances(made, [mask], PixelDistance(), pairs, mode)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (2, 3)])
def test_scores_are_enlarged_bilinearly(size: tuple[int, int]) -> None:
    scores = torch.randn(2, 5, *size)
    truth = nn.Upsample((8, 12), mode="bilinear", align_corners=False)(scores).argmax(1)
    found = predict(lambda x: scores, torch.zeros(2, 3, 8, 12))
    np.testing.assert_array_equal(found, truth)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["symmetric", "unit", "imagenet"])
def test_what_a_segmenter_reads(kind: str, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Identity()), tmp_path / "same.pt")
    x = pictures(1, (4, 4))
    found = FileSegmenter(tmp_path / "same.pt", kind)(x)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = {"symmetric": x, "unit": (x + 1) / 2, "imagenet": ((x + 1) / 2 - mean) / deviation}
    torch.testing.assert_close(found, expected[kind])
    assert FileSegmenter(tmp_path / "same.pt", kind).facts() == {
        "segmenter": "same.pt", "input": kind,
        "sha256": hashlib.sha256((tmp_path / "same.pt").read_bytes()).hexdigest()}
    torch.jit.save(torch.jit.script(nn.Dropout(0.5).train()), tmp_path / "drops.pt")
    found = FileSegmenter(tmp_path / "drops.pt", kind)(x)  # in eval mode, however it was saved
    torch.testing.assert_close(found, expected[kind])


def test_random_pairs_are_of_each_scenes_own_seed() -> None:
    generator = _Generator()
    model: Any = SimpleNamespace(generator=generator, preset=generator.preset,
                                 parameters=generator.parameters)
    made, scene = pictures(8, (2, 4)), Scene("a", np.zeros((2, 4), np.int64), None)
    options = DiversityProtocol(layouts=1, samples=8, pairs=4, pairing="random")
    chosen = []
    for seed in (0, 1):
        chosen.append(options.indices(derived_seed(seed, 1)))
        ((_, whole),) = scene_diversity(
            model, scene, lambda codes: made, [PixelDistance()], options, seed)
        each = [float((made[i] - made[j]).abs().mean()) / 2 for i, j in chosen[-1]]
        assert whole == pytest.approx(np.mean(each), rel=1e-5)
    assert chosen[0] != chosen[1]


def test_untrained_trunks_are_those_of_seed_0() -> None:
    first, again = create_distance("random-alex"), create_distance("random-alex")
    a, b = pictures(1, (40, 40), 1), pictures(1, (40, 40), 2)
    assert torch.equal(first(a, b), again(a, b))
    for i in range(5):
        assert bool((first.get_buffer(f"head{i}") == 1).all())
