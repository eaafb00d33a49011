"""Protocols: what a name promises is compared with what was used, and the difference is told."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from smis_models import create_model
from smis_models.cli import common
from smis_models.cli.evaluate import show_metrics
from smis_models.data import GeneratedScenes, Preprocess, build_dataset
from smis_models.data.preprocess import LABEL_FILTER, PICTURE_FILTER
from smis_models.families import DEEPFASHION
from smis_models.io.checkpoint import save_checkpoint
from smis_models.io.files import file_hash
from smis_models.io.images import write_indices, write_png
from smis_models.io.seeds import derived_seed
from smis_models.metrics import (
    LPIPS,
    PROTOCOLS,
    DiversityProtocol,
    Inception,
    LabelRule,
    Metrics,
    PixelDistance,
    Protocol,
    Scenes,
    evaluate,
    label_rule,
    protocol,
    protocol_title,
)
from smis_models.metrics.fid import INCEPTION, fid
from smis_models.synthesis.codes import drawn_code
from smis_models.synthesis.scene import Scene

LPIPS_FILE = import_module("smis_models.metrics.lpips")
PROMISED: dict[str, Any] = {
    "dataset": "cityscapes", "split": "held out", "scenes": 500, "picture_filter": "bicubic",
    "label_filter": "nearest, pixel centres (Pillow NEAREST)", "fid_features": INCEPTION,
    "distance": "LPIPS (AlexNet)",
}


def test_a_kept_promise_changes_nothing() -> None:
    facts = protocol("cityscapes-256x512").facts(PROMISED)
    assert facts["changed"] == {} and {k: facts[k] for k in PROMISED} == PROMISED
    assert protocol_title(facts) == "cityscapes-256x512"
    sets = {name: (p.dataset, p.scenes, p.split) for name, p in PROTOCOLS.items() if p.dataset}
    assert sets == {"deepfashion-256": ("deepfashion", 2247, "held out"),
                    "cityscapes-256x512": ("cityscapes", 500, "held out"),
                    "ade20k-256": ("ade20k", 2000, "held out"),
                    "coco-256": ("coco_stuff", 5000, "held out"),
                    "scenes-quick": ("scenes", None, "held out")}


def test_protocols_are_these() -> None:
    """All fields but those of the data set, spelled out."""
    plain = {"layouts": 100, "samples": 20, "pairs": 19, "pairing": "consecutive",
             "mask_mode": "zero"}
    one = {**plain, "layouts": 1, "samples": 100, "pairing": "random"}
    quick = {**plain, "layouts": 4, "samples": 5, "pairs": 4}
    sizes = {"deepfashion-256": (256, 256), "cityscapes-256x512": (256, 512),
             "ade20k-256": (256, 256), "coco-256": (256, 256)}
    assert {name: asdict(p.diversity) for name, p in PROTOCOLS.items()} == {
        "n100-m19": plain, "one-layout-n100-m19": one, **dict.fromkeys(sizes, plain),
        "scenes-quick": quick}
    for name, p in PROTOCOLS.items():
        assert (p.size, p.dont_care) == (sizes.get(name), "ignore")
        assert p.distance == (None if name == "scenes-quick" else "LPIPS (AlexNet)")


@pytest.mark.parametrize(("name", "used"), [
    ("dataset", "folder"), ("dataset", None), ("split", "train"), ("scenes", 6),
    ("picture_filter", "bicubic, cropped"), ("label_filter", "nearest, floor"),
    ("fid_features", "weights of x.pth, which are not Inception's of 2015-12-05"),
    ("distance", "pixel L1"),
])
def test_every_broken_promise_is_told(name: str, used: object) -> None:
    facts = protocol("cityscapes-256x512", samples=30).facts({**PROMISED, name: used})
    assert facts["changed"] == {name: used, "diversity.samples": 30}
    assert facts[name] == used  # the record says what was done
    assert protocol_title(facts) == (
        f"cityscapes-256x512, changed: {name} {used}, diversity.samples 30")


def test_what_was_not_measured_is_not_claimed() -> None:
    facts = protocol("cityscapes-256x512").facts({"dataset": "cityscapes", "scenes": 500,
                                                  "split": "held out"})
    assert facts["changed"] == {}
    assert not {"fid_features", "distance", "picture_filter"} & set(facts)


def test_a_general_protocol_takes_any_data_set() -> None:
    used = {**PROMISED, "dataset": "folder", "scenes": 100}
    assert protocol("n100-m19").facts(used)["changed"] == {}
    assert protocol("n100-m19").facts({**used, "split": "train"})["changed"] == {"split": "train"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """DeepFashion's layout: eight pictures for training, six held out."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 6)):
        for i in range(count):
            picture = random.integers(0, 256, (64, 64, 3), np.uint8)
            write_png(tmp_path / f"{split}/{i}.png", picture)
            write_indices(tmp_path / f"cihp_{split}_mask/{i}.png", random.integers(0, 8, (64, 64)))
    return tmp_path


class Features:
    """Stands for Inception, whose weights take no part here."""

    def __init__(self, network: str) -> None:
        self.network = network

    def facts(self) -> dict[str, Any]:
        return {"network": self.network, "published_weights": self.network == INCEPTION}

    def __call__(self, pictures: Tensor) -> Tensor:
        return pictures.float().mean((2, 3))


def test_an_evaluation_tells_what_it_used(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "tiny", Protocol(
        name="tiny", size=(64, 64), dataset="deepfashion", scenes=6, distance="pixel L1",
        diversity=DiversityProtocol(layouts=1, samples=2, pairs=1)))
    model = create_model("groupdnet_deepfashion", ngf=8, nef=8, image_size=(64, 64),
                         upsampling="normal").eval()

    def measured(split: str, network: str = INCEPTION, name: str = "deepfashion",
                 **options: Any) -> dict[str, Any]:
        made = build_dataset(name, folder, model.preset, split, augment=False, **options)
        metrics = Metrics([PixelDistance()], Features(network))
        scenes = Scenes(made, {"dataset": name, "split": split})
        return evaluate(model, scenes, metrics, protocol("tiny"))

    kept = measured("val")
    assert kept["protocol"]["changed"] == {}
    assert kept["protocol"]["scenes"] == kept["results"]["fid"]["real"] == 6
    held_out = build_dataset("deepfashion", folder, model.preset, "val", augment=False)
    scenes = [held_out[i] for i in range(6)]
    with torch.no_grad():
        pictures = [model(model.semantics(scene["labels"][None]),
                          drawn_code(model, derived_seed(0, i))) for i, scene in enumerate(scenes)]
    photographs = [scene["image"][None] for scene in scenes]
    assert kept["results"]["fid"]["fid"] == pytest.approx(
        fid(photographs, pictures, Features(INCEPTION))["fid"], rel=1e-2)
    assert measured("test")["protocol"]["changed"] == {}  # the published evaluation split
    other = measured("train", "weights of x.pth", mode="crop")
    assert other["protocol"]["changed"] == {
        "split": "train", "scenes": 8, "fid_features": "weights of x.pth",
        "picture_filter": f"{PICTURE_FILTER}, cropped", "label_filter": f"{LABEL_FILTER}, cropped"}
    text = StringIO()
    monkeypatch.setattr(common, "console", Console(file=text, width=300))
    show_metrics(other)
    title = " ".join(text.getvalue().split("┏")[0].split())
    assert title == protocol_title(other["protocol"]) and "split train" in title
    assert "Fréchet distance" in text.getvalue() and "FID" not in text.getvalue()
    text = StringIO()
    monkeypatch.setattr(common, "console", Console(file=text, width=300))
    show_metrics(kept)
    assert "changed" not in text.getvalue() and "FID" in text.getvalue()


def test_scenes_say_what_they_are() -> None:
    layouts = [Scene("a", np.zeros((8, 8), np.int64), None)]
    assert Scenes(layouts, {"labels": "maps"}).used() == {
        "dataset": None, "split": None, "scenes": 1, "label_filter": LABEL_FILTER}
    generated = Scenes(GeneratedScenes(3, 64, "test"), {"dataset": "scenes", "split": "test"})
    assert generated.used() == {"dataset": "scenes", "split": "held out", "scenes": 3}


@pytest.mark.parametrize(("mode", "load", "whole"), [
    ("resize", None, True), ("fixed", None, True), ("none", None, True),
    ("resize_and_crop", (64, 64), True), ("resize_and_crop", (72, 72), False),
    ("crop", None, False), ("scale_width_and_crop", (64, 64), False),
])
def test_a_crop_is_told(mode: Any, load: Any, whole: bool) -> None:
    filters = Preprocess(mode, (64, 64), load).filters
    cut = "" if whole else ", cropped"
    assert filters == {"picture_filter": PICTURE_FILTER + cut, "label_filter": LABEL_FILTER + cut}
    assert DEEPFASHION.image_size == (256, 256)


def test_inception_is_told_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"other weights under the published name")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.0")
    extractor = object.__new__(Inception)
    extractor._path, extractor._digest = path, file_hash(path)
    facts = extractor.facts()
    assert facts["network"] == f"weights of {path.name}, which are not Inception's of 2015-12-05"
    assert not facts["published_weights"] and facts["weights_sha256"] == file_hash(path)
    monkeypatch.setattr(
        import_module("smis_models.metrics.fid"), "_FILE", f"weights-{file_hash(path)[:8]}.pth")
    facts = extractor.facts()
    assert facts["network"] == INCEPTION and facts["published_weights"]


def test_lpips_is_told_by_its_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = LPIPS_FILE.TRUNKS["alex"]
    torch.manual_seed(0)
    state = {f"features.{k}": v for k, v in trunk.build().state_dict().items()}
    torch.save(state, tmp_path / "trunk.pth")
    pytest.importorskip("torchmetrics")
    published = LPIPS_FILE._find_heads("alex")
    assert file_hash(published).startswith(trunk.heads)
    of_vgg = LPIPS_FILE._find_heads("vgg")
    assert file_hash(of_vgg).startswith(LPIPS_FILE.TRUNKS["vgg"].heads)
    heads = torch.load(published, map_location="cpu", weights_only=True)
    torch.save({key: 2 * value for key, value in heads.items()}, tmp_path / "heads.pth")
    name = LPIPS("alex", tmp_path / "trunk.pth", tmp_path / "heads.pth").name
    assert name == ("LPIPS (AlexNet) with weights of trunk.pth, which are not torchvision's with "
                    "heads of heads.pth, which are not those of version 0.1")
    digest = file_hash(tmp_path / "trunk.pth")[:8]
    monkeypatch.setitem(LPIPS_FILE.TRUNKS, "alex", LPIPS_FILE.Trunk(**{
        **vars(trunk), "file": f"alexnet-{digest}.pth"}))
    half = LPIPS("alex", tmp_path / "trunk.pth", tmp_path / "heads.pth").facts()
    assert half["torchvision_weights"] and not half["published_heads"]
    good = LPIPS("alex", tmp_path / "trunk.pth")
    assert good.name == PROTOCOLS["n100-m19"].distance == "LPIPS (AlexNet)"
    assert good.facts()["published_heads"] and good.facts()["torchvision_weights"]


def short_evaluation(model: Any, metrics: Metrics, **options: Any) -> dict[str, Any]:
    scenes = Scenes(GeneratedScenes(1, 64, "test"), {"dataset": "scenes", "split": "test"})
    return evaluate(model, scenes, metrics, protocol("n100-m19", layouts=1, samples=2, pairs=1),
                    **options)


def small_model(name: str = "groupdnet_deepfashion", **options: Any) -> Any:
    return create_model(name, ngf=8, nef=8, image_size=(64, 64), upsampling="normal",
                        **options).eval()


def test_another_distance_is_told_by_an_evaluation() -> None:
    found = short_evaluation(small_model(), Metrics([PixelDistance()]))["protocol"]
    assert found["distance"] == found["changed"]["distance"] == "pixel L1"


def test_a_record_names_the_weights_that_were_measured(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "w.safetensors"
    save_checkpoint(model, path)
    before = file_hash(path)
    found = short_evaluation(model, Metrics([PixelDistance()]), checkpoint=path,
                             step=lambda what: path.write_bytes(b"the next checkpoint"))
    assert found["model"]["weights_sha256"] == {"w.safetensors": before}


@pytest.mark.parametrize(("rule", "changed"), [
    (None, "count"), ("ignore", None), ("count", "count"), ("own", "a rule of the caller")])
def test_a_record_says_which_labels_counted(rule: str | None, changed: str | None) -> None:
    model = create_model("spade_coco", ngf=2, hidden=8, image_size=(64, 64)).eval()
    rules = {} if rule is None else {"rule": LabelRule("mine", frozenset({1})) if rule == "own"
                                     else label_rule("same", model.preset, rule)}

    def segmenter(pictures: Tensor) -> Tensor:
        return torch.zeros(len(pictures), 64, 64, dtype=torch.long)

    found = short_evaluation(model, Metrics([], segmenter=segmenter, **rules))["protocol"]
    assert found["changed"].get("dont_care") == changed
