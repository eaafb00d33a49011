"""Data sets: published layouts and preprocessing, label rules, batches, and what doctor finds."""

import json
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from smis_models import cli, create_model, metrics
from smis_models.data import (
    Collate,
    Draw,
    FileScenes,
    GeneratedScenes,
    Preprocess,
    build_dataset,
    detect_layout,
    list_scenes,
    modulation_sizes,
    published_preprocess,
    write_scenes,
)
from smis_models.data.doctor import LABEL_RULES
from smis_models.data.listing import one_set
from smis_models.data.preprocess import MODES
from smis_models.data.sample import label_tensor
from smis_models.data.scenes import LANDSCAPE, MODE_NAMES
from smis_models.families import (
    ADE20K,
    CITYSCAPES,
    DEEPFASHION,
    PIX2PIXHD_CITYSCAPES_FEATURES,
    SPADE_CITYSCAPES,
    SPADE_COCO,
)
from smis_models.io import images
from smis_models.io.images import ImageError
from smis_models.networks.semantics import compile_layout

SIZE = (64, 64)
SMALL = replace(DEEPFASHION, image_size=SIZE, upsampling="normal")
# Of each data set: layout, preset, and the files of a scene by split: picture, labels, instances.
CITY = "leftImg8bit/{0}/bonn/bonn_000000_00000{1}_leftImg8bit.png", (
    "gtFine/{0}/bonn/bonn_000000_00000{1}_gtFine_labelIds.png"), (
    "gtFine/{0}/bonn/bonn_000000_00000{1}_gtFine_instanceIds.png")
FLAT = ("{0}_img/bonn_000000_00000{1}_leftImg8bit.png",
        "{0}_label/bonn_000000_00000{1}_gtFine_labelIds.png",
        "{0}_inst/bonn_000000_00000{1}_gtFine_instanceIds.png")
FOLDER_FORMATS = {
    "cityscapes": ("cityscapes", CITYSCAPES, ("train", "val"), CITY),
    "cityscapes, flat": ("cityscapes", CITYSCAPES, ("train", "test"), FLAT),
    "coco_stuff": ("coco_stuff", SPADE_COCO, ("train", "val"), (
        "{0}_img/00000{1}.jpg", "{0}_label/00000{1}.png", "{0}_inst/00000{1}.png")),
    "ade20k": ("ade20k", ADE20K, ("training", "validation"), (
        "images/{0}/ADE_{2}_0000000{1}.jpg", "annotations/{0}/ADE_{2}_0000000{1}.png", None)),
    "deepfashion": ("deepfashion", DEEPFASHION, ("train", "test"), (
        "{0}/id_{1}.jpg", "cihp_{0}_mask/id_{1}.png", None)),
    "folder": ("folder", SPADE_CITYSCAPES, ("train", "val"), (
        "{0}/images/{1}.png", "{0}/labels/{1}.png", "{0}/instances/{1}.png")),
}


def _write_scene(root, files, labels, ids, *names):
    """A picture of flat grey whose value is 5 x label, its label map and its instance map."""
    picture, label_file, id_file = files
    (root / picture.format(*names)).parent.mkdir(parents=True, exist_ok=True)
    grey = np.repeat((labels * 5 % 256).astype(np.uint8)[..., None], 3, -1)
    Image.fromarray(grey).save(root / picture.format(*names))
    images.write_indices(root / label_file.format(*names), labels)
    if id_file:
        images.write_indices(root / id_file.format(*names), ids)


def _write_set(root, which, count=2, top=None, size=(96, 192)):
    layout_name, preset, splits, files = FOLDER_FORMATS[which]
    r = np.random.default_rng(7)
    made = {}
    for split, mark in zip(splits, ("train", "val"), strict=True):
        for i in range(count):
            coarse = r.integers(0, top or preset.classes - 1, (size[0] // 16, size[1] // 16))
            labels = np.kron(coarse, np.ones((16, 16), np.int64))
            ids = np.where(labels > 2, labels * 1000 + 7, labels)
            _write_scene(root, files, labels, np.minimum(ids, 65535), split, i, mark)
            made[mark, i] = labels, np.minimum(ids, 65535)
    return layout_name, preset, made


@pytest.mark.parametrize("which", FOLDER_FORMATS)
def test_published_layouts(tmp_path, which):
    name, preset, made = _write_set(tmp_path, which)
    assert detect_layout(tmp_path) == name
    for split in ("train", "val"):
        dataset = build_dataset(name, tmp_path, preset, split, augment=False)
        assert len(dataset) == 2
        for i in range(2):
            sample = dataset[i]
            labels, ids = made[split, i]
            size = preset.image_size
            assert sample["image"].shape == (3, *size)
            assert sample["image"].dtype == torch.float32
            assert sample["labels"].dtype == torch.uint8

            def resized(indices, size=size):
                image = Image.fromarray(indices.astype(np.int32))
                return np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST))

            np.testing.assert_array_equal(sample["labels"], resized(labels))
            if preset.instance_edge:
                np.testing.assert_array_equal(sample["instances"], resized(ids))
            else:
                assert "instances" not in sample
    assert dataset[0]["name"] != dataset[1]["name"]


def test_cityscapes_names_pair_by_scene(tmp_path):
    _write_set(tmp_path, "cityscapes")
    names = [record.name for record in list_scenes("cityscapes", tmp_path).records]
    assert names == ["bonn/bonn_000000_000000", "bonn/bonn_000000_000001"]


@pytest.mark.parametrize("which", FOLDER_FORMATS)
def test_the_published_test_split_is_val(tmp_path, which):
    name, _, _ = _write_set(tmp_path, which, size=(16, 32))
    train, test, val = (list_scenes(name, tmp_path, split).records
                        for split in ("train", "test", "val"))
    assert test == val
    assert not {scene.labels for scene in train} & {scene.labels for scene in val}


def test_a_folders_splits_are_their_own_where_they_are_there(tmp_path):
    def write(*places):
        for place in places:
            for kind in ("images", "labels"):
                images.write_png(tmp_path / place / kind / "a.png", np.zeros((4, 4), np.uint8))

    def found(split):
        return Path(list_scenes("folder", tmp_path, split).records[0].labels).parents[1].name

    write("test")
    assert [found(split) for split in ("val", "test")] == ["test", "test"]
    with pytest.raises(FileNotFoundError, match="no pictures of 'train'"):
        found("train")
    write("", "train")
    assert [found(split) for split in ("train", "val")] == ["train", "test"]
    write("val")
    assert [found(split) for split in ("train", "val", "test")] == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("which", "stored", "expected"),
    [
        ("coco_stuff", [0, 181, 255], [0, 181, 182]),
        ("ade20k", [0, 1, 150, 255], [0, 1, 150, 150]),  # not shifted, as the published code
        ("deepfashion", [0, 7], [0, 7]),
        ("cityscapes", [0, 33, 34], [0, 33, 34]),
    ],
)
def test_label_rules(tmp_path, which, stored, expected):
    name, preset, _, files = FOLDER_FORMATS[which]
    labels = np.array([stored])
    _write_scene(tmp_path, files, labels, labels, FOLDER_FORMATS[which][2][0], 0, "train")
    preprocess = Preprocess("fixed", labels.shape, augment=False)
    records = list_scenes(name, tmp_path, instances=preset.instance_edge).records
    dataset = FileScenes(records, preset.classes, preprocess, unknown=preset.dont_care)
    assert dataset[0]["labels"].tolist() == [expected]


def test_many_classes_need_sixteen_bits(tmp_path):
    _write_set(tmp_path, "folder", top=400)
    records = list_scenes("folder", tmp_path, instances=True).records
    sample = FileScenes(records, 400, Preprocess("none", SIZE, augment=False))[0]
    assert sample["labels"].dtype == torch.int16
    assert sample["labels"].max() > 255
    assert sample["instances"].max() == 65535  # not -1


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("resize", (70, 80)), ("resize_and_crop", (48, 64)), ("crop", (48, 64)),
        ("scale_width", (40, 80)), ("scale_shortside", (70, 140)), ("fixed", (48, 64)),
        ("scale_shortside_and_crop", (48, 64)), ("none", (96, 192)),
    ],
)
def test_modes_give_the_published_sizes(mode, expected):
    preprocess = Preprocess(mode, (48, 64), (70, 80))
    plan = preprocess.plan((100, 200), np.random.default_rng(0))
    picture = plan.picture(np.zeros((100, 200, 3), np.uint8))
    assert picture.shape == (*expected, 3)
    assert plan.indices(np.zeros((100, 200), np.uint8)).shape == expected
    assert preprocess.output_size in (expected, None)
    assert (preprocess.output_size is None) == (mode in ("scale_width", "scale_shortside", "none"))


def test_every_mode_is_named():
    assert len(MODES) == 9
    with pytest.raises(ValueError, match="mode: expected resize,"):
        Preprocess("zoom", (4, 4))


@pytest.mark.parametrize(("classes", "dtype"), [(255, torch.uint8), (256, torch.uint8),
                                                (257, torch.int16)])
def test_labels_have_room_for_the_last_class(classes, dtype):
    found = label_tensor(np.array([[0, classes - 1]]), classes)
    assert found.dtype == dtype
    assert found.tolist() == [[0, classes - 1]]


# Of each data set: mode, and what pictures of 256x512 are loaded at to train and to evaluate.
PREPROCESSED = {
    "cityscapes": ("fixed", None, None), "deepfashion": ("resize", None, None),
    **dict.fromkeys(("ade20k", "coco_stuff", "folder"),
                    ("resize_and_crop", (286, 572), (256, 512))),
}


@pytest.mark.parametrize("name", PREPROCESSED)
def test_preprocessing_is_the_published_one(name):
    mode, *loads = PREPROCESSED[name]
    for augment, load in zip((True, False), loads, strict=True):
        found = published_preprocess(name, (256, 512), augment=augment)
        assert found == Preprocess(mode, (256, 512), load, augment=augment, flip=True)


def test_of_two_published_splits_val_is_evaluated(tmp_path):
    _write_set(tmp_path, "coco_stuff", count=1)
    for role in ("img", "label", "inst"):
        shutil.copytree(tmp_path / f"train_{role}", tmp_path / f"test_{role}")
    for split in ("val", "test"):
        (record,) = list_scenes("coco_stuff", tmp_path, split, instances=True).records
        assert {Path(file).parent.name for file in (record.image, record.labels, record.instances)
                } == {"val_img", "val_label", "val_inst"}


def test_generated_scenes_are_as_high_and_wide_as_the_model():
    found = build_dataset("scenes", None, replace(SMALL, image_size=(32, 64)), count=1)[0]
    assert (found["image"].shape, found["labels"].shape) == ((3, 32, 64), (32, 64))


def test_generated_scenes_are_of_their_seed_split_and_index():
    every = [GeneratedScenes(2, 32, split, seed)[i] for seed in (0, 1)
             for split in ("train", "val", "test") for i in range(2)]
    for key in ("labels", "image"):
        assert len({scene[key].numpy().tobytes() for scene in every}) == 12, key


def test_a_batchs_edges_are_between_instances():
    samples = [GeneratedScenes(2, SIZE)[i] for i in range(2)]
    planes = Collate(replace(SMALL, instance_edge=True))(samples)["layout"].dense()
    assert planes.shape == (2, 9, *SIZE)
    for sample, edges in zip(samples, planes[:, 8], strict=True):
        around = np.pad(sample["instances"].numpy(), 1, mode="edge")
        expected = np.zeros(SIZE, bool)
        for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            expected |= (np.roll(around, shift, (0, 1)) != around)[1:-1, 1:-1]
        np.testing.assert_array_equal(edges, expected)


def test_a_mode_keeps_its_load_size(tmp_path):
    """Where another mode is asked for, only those that crop from a resized scene take the load."""
    name, preset, _ = _write_set(tmp_path, "coco_stuff")
    loads = {mode: build_dataset(name, tmp_path, preset, mode=mode).preprocess.load
             for mode in ("resize_and_crop", "fixed", "resize", "scale_shortside_and_crop")}
    assert loads == {"resize_and_crop": (286, 286), "fixed": None, "resize": None,
                     "scale_shortside_and_crop": None}


def test_a_mode_that_brings_another_size_is_refused(tmp_path):
    name, preset, _ = _write_set(tmp_path, "coco_stuff")
    for mode, message in (("none", r"none brings .*000000\.png to 96x192"),
                          ("scale_width", r"scale_width brings .*000000\.png to 128x256"),
                          ("resize", "resize brings all scenes to 64x64")):
        with pytest.raises(ValueError, match=message):
            build_dataset(name, tmp_path, preset, mode=mode, load=(64, 64) if mode == "resize"
                          else None)


@pytest.mark.parametrize(("mode", "size", "message"), [
    ("none", (40, 96), r"none brings .*1\.png to 32x96"),
    ("scale_width", (90, 100), r"scale_width brings .*1\.png to 115x128"),
    ("crop", (60, 200), r"1\.png: size: the crop 64x128 is larger"),
])
def test_every_scene_is_of_a_size_that_pix2pixhd_paints(tmp_path, mode, size, message):
    """At the start: a later one would stop the training, and each that goes on."""
    for name, (height, width) in (("0", (64, 128)), ("1", size)):
        images.write_png(tmp_path / f"images/{name}.png", np.zeros((height, width, 3), np.uint8))
        for maps in ("labels", "instances"):
            images.write_indices(tmp_path / f"{maps}/{name}.png", np.zeros((height, width), int))
    preset = replace(PIX2PIXHD_CITYSCAPES_FEATURES, image_size=(64, 128), enhancers=1)
    with pytest.raises(ValueError, match=message):
        build_dataset("folder", tmp_path, preset, mode=mode)
    for file in tmp_path.glob("*/1.png"):
        file.unlink()
    assert build_dataset("folder", tmp_path, preset, mode=mode)[0]["image"].shape[1:] == (64, 128)


def test_doctor_knows_the_last_class(tmp_path):
    for value, code in ((2, 0), (3, 1)):
        images.write_png(tmp_path / f"{value}/images/a.png", np.zeros((4, 4, 3), np.uint8))
        images.write_indices(tmp_path / f"{value}/labels/a.png", np.full((4, 4), value))
        found, out, _ = _smis("doctor", tmp_path / str(value), "--classes", 3)
        assert found == code
        assert ("got 3 (16 pixels)" in out) == bool(code)


def test_a_splits_own_folders_go_before_those_of_all(tmp_path):
    """Whatever their names are."""
    for place in ("images", "labels", "val/img", "val/label"):
        images.write_png(tmp_path / place / "a.png", np.zeros((4, 4), np.uint8))
    found = {split: list_scenes("folder", tmp_path, split).records[0] for split in ("train", "val")}
    assert Path(found["val"].labels).parent == tmp_path / "val/label"
    assert Path(found["val"].image).parent == tmp_path / "val/img"
    assert Path(found["train"].labels).parent == tmp_path / "labels"
    assert not one_set(tmp_path, "val")


def test_one_set_for_every_split_is_not_held_out(tmp_path, monkeypatch):
    for place in ("whole", "split/train", "split/val"):
        for kind in ("images", "labels"):
            images.write_png(tmp_path / place / kind / "a.png", np.zeros((64, 64), np.uint8))
    assert one_set(tmp_path / "whole", "val") and not one_set(tmp_path / "split", "val")
    network = create_model("groupdnet_deepfashion", ngf=8, nef=8, image_size=SIZE,
                           upsampling="normal").eval()
    monkeypatch.setattr(cli.common.Chosen, "load", lambda _: network)
    for root, split, told in (("whole", "val", "one set for every split"), ("split", "val", None),
                              ("whole", "train", "train")):
        out = tmp_path / "e.json"
        code, said, _ = _smis(
            "evaluate", "--model", "groupdnet_deepfashion", "--dataset", "folder", "--root",
            tmp_path / root, "--split", split, "--distance", "pixel", "--layouts", 1, "--samples",
            2, "--pairs", 1, "--out", out)
        assert code == 0, said
        record = json.loads(out.read_text())
        assert record["protocol"]["changed"].get("split") == told
        assert record["data"]["split"] == (told or "val")


def test_what_is_measured_is_never_augmented(tmp_path, monkeypatch):
    """Pictures to train on too: neither mirrored nor cut."""
    maps = np.random.default_rng(0).integers(0, 8, (6, *SIZE))
    for i, labels in enumerate(maps):
        images.write_indices(tmp_path / f"train/labels/{i}.png", labels)
        images.write_png(tmp_path / f"train/images/{i}.png", np.zeros((*SIZE, 3), np.uint8))
    network = create_model("groupdnet_deepfashion", ngf=8, nef=8, image_size=SIZE,
                           upsampling="normal").eval()
    monkeypatch.setattr(cli.common.Chosen, "load", lambda _: network)
    measured = []

    def evaluate(network, scenes, *rest, **options):
        measured.extend(scene.labels for scene, _ in scenes)
        raise ValueError("seen")

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    _smis("evaluate", "--model", "groupdnet_deepfashion", "--dataset", "folder", "--root",
          tmp_path, "--split", "train", "--distance", "pixel", "--out", tmp_path / "e.json")
    assert np.array_equal(measured, maps)


def test_published_load_sizes(tmp_path):
    name, preset, _ = _write_set(tmp_path, "coco_stuff")
    train = build_dataset(name, tmp_path, preset)
    held_out = build_dataset(name, tmp_path, preset, "val")
    assert train.preprocess == Preprocess("resize_and_crop", (256, 256), (286, 286))
    assert held_out.preprocess == Preprocess("resize_and_crop", (256, 256), (256, 256),
                                             augment=False)
    other = build_dataset(name, tmp_path, preset, mode="scale_width_and_crop", load=(300, 600),
                          flip=False, seed=4)
    assert other.preprocess == Preprocess("scale_width_and_crop", (256, 256), (300, 600),
                                          flip=False)
    assert (other.seed, train.seed, train.unknown) == (4, 0, 182)


@pytest.mark.parametrize("mode", ["crop", "scale_width_and_crop", "resize_and_crop"])
def test_picture_and_maps_are_cut_and_mirrored_alike(tmp_path, mode):
    _write_set(tmp_path, "folder", count=1, top=35)
    records = list_scenes("folder", tmp_path, instances=True).records
    # Load at the size of the files: then nothing is interpolated.
    dataset = FileScenes(records, 35, Preprocess(mode, (40, 56), (96, 192)), seed=3)
    seen = set()
    for epoch in range(6):
        sample = dataset[Draw(0, epoch)]
        grey = torch.round((sample["image"][0] + 1) * 127.5).long()
        assert torch.equal(grey, sample["labels"].long() * 5)
        labels, ids = sample["labels"].long(), sample["instances"]
        assert torch.equal(ids, torch.where(labels > 2, labels * 1000 + 7, labels).int())
        seen.add(labels.numpy().tobytes())
    assert len(seen) == 6
    again = dataset[Draw(0, 2)]
    assert torch.equal(again["labels"], dataset[Draw(0, 2)]["labels"])
    plain = FileScenes(records, 35, Preprocess(mode, (40, 56), (96, 192), augment=False))
    assert torch.equal(plain[Draw(0, 1)]["labels"], plain[0]["labels"])


def test_flips_come_half_of_the_time():
    r = np.random.default_rng(0)
    flips = [Preprocess("fixed", SIZE).plan((9, 9), r).flip for _ in range(200)]
    assert 70 < sum(flips) < 130
    assert not any(Preprocess("fixed", SIZE, flip=False).plan((9, 9), r).flip for _ in range(50))


def _damage(root):
    """Seven scenes in the layout of COCO-Stuff, each with a flaw of its own but the first."""
    files = FOLDER_FORMATS["coco_stuff"][3]
    labels = np.arange(64).reshape(8, 8) % 7
    for i in range(7):
        _write_scene(root, files, labels, labels, "train", i)
    (root / "train_label/000001.png").unlink()
    (root / "train_img/000002.jpg").write_bytes(b"no picture")
    images.write_indices(root / "train_label/000003.png", np.where(labels == 3, 200, labels))
    images.write_indices(root / "train_inst/000004.png", labels[:4])
    images.write_indices(root / "train_label/000005.png", np.where(labels == 0, 40000, labels))
    Image.new("RGB", (8, 8)).save(root / "train_label/000006.png")
    return {
        "000001.jpg": "no label map of this scene",
        "000002.jpg": "cannot be read as a picture",
        "train_label/000003.png": r"expected labels 0..182, got 200 \(9 pixels\)",
        "train_inst/000004.png": r"8x4 \(width x height\), but train_label/000004\.png is 8x8",
        "train_label/000005.png": r"expected labels 0..182, got 40000 \(10 pixels\)",
        "train_label/000006.png": "expected one index per pixel .*, got a RGB image",
    }


def _smis(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, re.sub(r"\s+", " ", result.output), result.exception


def test_doctor_names_each_bad_file_and_value(tmp_path):
    flaws = _damage(tmp_path)
    code, out, _ = _smis("doctor", tmp_path)
    assert code == 1
    for file, message in flaws.items():
        assert re.search(f"{re.escape(file)}: {message}", out), (file, out)
    assert "6 problems" in out
    assert "a 16-bit label map" in out
    assert "000000" not in out
    assert "6 train" in out


@pytest.mark.parametrize("which", FOLDER_FORMATS)
def test_doctor_passes_a_good_set(tmp_path, totals, which):
    name, _, _ = _write_set(tmp_path, which, size=(32, 64))
    code, out, _ = _smis("doctor", tmp_path, "--dataset", name, "--jobs", 2)
    assert totals == [(4, 4)]
    assert code == 0, out
    assert "no problems" in out
    assert "2 train, 2 val" in out


@pytest.mark.parametrize("which", LABEL_RULES)
def test_doctor_knows_what_the_models_read(which):
    rule, preset = LABEL_RULES[which], FOLDER_FORMATS[which][1]
    assert (rule.classes, rule.unknown) == (preset.classes, preset.dont_care)


def test_doctor_counts_unknown_pixels_only_where_they_have_no_class(tmp_path):
    _write_set(tmp_path, "folder", top=3, size=(32, 32))
    path = tmp_path / "val/labels/1.png"
    images.write_indices(path, np.full((32, 32), 255))
    assert _smis("doctor", tmp_path)[0] == 0  # no number of classes is known
    code, out, _ = _smis("doctor", tmp_path, "--classes", 3)
    assert code == 1
    assert "got 255 (1024 pixels); 255 has no class here" in out
    assert _smis("doctor", tmp_path, "--classes", 3, "--unknown", 0)[0] == 0
    code, out, _ = _smis("doctor", tmp_path, "--classes", 3, "--split", "train")
    assert code == 0 and "1 val" not in out


def test_doctor_tells_a_split_that_lacks_its_instance_maps(tmp_path):
    _write_set(tmp_path, "coco_stuff", size=(32, 32))
    for path in (tmp_path / "val_inst").iterdir():
        path.unlink()
    (tmp_path / "val_inst").rmdir()
    code, out, _ = _smis("doctor", tmp_path)
    assert code == 1
    assert "no instance maps of 'val'" in out
    assert _smis("doctor", tmp_path, "--no-instances")[0] == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [(1, "cannot be read as a picture"), (2, "expected labels 0..182, got 200"),
     (3, r"8x4 \(width x height\), but train_label/000004\.png is 8x8"), (4, "got 40000"),
     (5, "got a RGB image")],
)
def test_reading_a_bad_scene_names_the_file(tmp_path, index, message):
    _damage(tmp_path)
    records = list_scenes("coco_stuff", tmp_path, instances=True).records
    dataset = FileScenes(records, 183, Preprocess("fixed", SIZE), unknown=182)
    dataset[0]
    with pytest.raises(ImageError, match=message) as error:
        dataset[index]
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unpaired_files_are_an_error_before_any_work(tmp_path):
    _damage(tmp_path)
    with pytest.raises(ValueError, match=r"000001.*no label map.*smis doctor"):
        build_dataset("coco_stuff", tmp_path, SPADE_COCO)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("mnist", "."), ValueError, "data set: expected one of scenes, cityscapes"),
        (("scenes", "."), ValueError, "root: the scenes are generated"),
        (("folder", None), ValueError, "root: expected the folder"),
        (("folder", "absent"), FileNotFoundError, "no such folder"),
        (("cityscapes", "."), FileNotFoundError, "no pictures of 'train'"),
        (("folder", ".", "test1"), ValueError, "split: expected train, val or test"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    name, root, *split = arguments
    with pytest.raises(error, match=message) as caught:
        build_dataset(name, root, CITYSCAPES, *split)
    assert "\n" not in str(caught.value)


def test_a_model_of_other_classes_cannot_read_the_scenes():
    with pytest.raises(ValueError, match="8 classes, the model 35"):
        build_dataset("scenes", None, CITYSCAPES)


@pytest.mark.parametrize(("mode", "scaled"), [("crop", False), ("fixed", True)])
def test_pixels_are_cut_out_of_files_of_one_size(tmp_path, mode, scaled):
    images.write_png(tmp_path / "images/a.png", np.zeros((16, 16, 3), np.uint8))
    images.write_indices(tmp_path / "labels/a.png", np.zeros((8, 8), np.int64))
    dataset = FileScenes(list_scenes("folder", tmp_path).records, 8, Preprocess(mode, (4, 4)))
    if scaled:
        assert dataset[0]["image"].shape == (3, 4, 4)
        return
    with pytest.raises(ImageError, match=r"a\.png: 16x16 .* labels/a\.png is 8x8"):
        _ = dataset[0]


def test_a_crop_larger_than_a_scene_names_the_file(tmp_path):
    _write_set(tmp_path, "folder", count=1, size=(32, 32))
    records = list_scenes("folder", tmp_path).records
    with pytest.raises(ImageError, match=r"0\.png: size: the crop 64x64 is larger"):
        FileScenes(records, 35, Preprocess("crop", SIZE))[0]
    with pytest.raises(ValueError, match="is larger than the scene"):
        Preprocess("resize_and_crop", (64, 64), (32, 128))


def test_full_ade20k_is_told_from_the_benchmark(tmp_path):
    for end in (".jpg", "_seg.png", "_parts_1.png"):
        (tmp_path / f"ADE_train_00000001{end}").write_bytes(b"")
    with pytest.raises(ValueError, match="ADEChallengeData2016"):
        list_scenes("ade20k", tmp_path)


def test_two_files_of_one_scene_are_a_problem(tmp_path):
    _write_set(tmp_path, "folder", count=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "train/images/0.jpg")
    (problem,) = list_scenes("folder", tmp_path).problems
    assert "the same scene as" in str(problem)


def test_sixteen_bit_pictures_are_refused(tmp_path):
    rows = b"".join(b"\x00" + struct.pack(">4H", *[60000] * 4) for _ in range(4))

    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match="8 bits per channel"):
        images.read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("preset", [SMALL, replace(CITYSCAPES, image_size=(64, 128))])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_the_compiled_labels(tmp_path, preset, workers):
    which = "cityscapes" if preset.instance_edge else "deepfashion"
    name, _, _ = _write_set(tmp_path, which)
    dataset = build_dataset(name, tmp_path, preset)
    (batch,) = DataLoader(dataset, 2, num_workers=workers, collate_fn=Collate(preset))
    assert batch["labels"].shape == (2, *preset.image_size)
    assert batch["image"].shape == (2, 3, *preset.image_size)
    assert len(batch["name"]) == 2
    expected = compile_layout(batch["labels"], preset, batch.get("instances"))
    sent = batch["layout"]
    assert torch.equal(sent.dense(), expected.dense())
    assert set(sent._levels) == set(modulation_sizes(preset))
    for size, level in sent._levels.items():
        for key, value in vars(expected.level(size)).items():
            assert torch.equal(getattr(level, key), value), (size, key)
    if workers:
        blocks = {t.untyped_storage().data_ptr() for level in sent._levels.values()
                  for t in vars(level).values()}
        assert len(blocks) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("groupdnet_deepfashion", {"ngf": 8, "nef": 8, "upsampling": "normal"}),
        ("spade_coco", {"ngf": 4, "hidden": 16, "classes": 8, "dont_care": None}),
        ("ccfpse_ade20k", {"ngf": 8, "hidden": 16, "classes": 8, "dont_care": None}),
    ],
)
def test_a_generator_compiles_nothing_more(name, options):
    generator = create_model(name, part="generator", image_size=SIZE, **options).eval()
    preset = generator.preset
    batch = Collate(preset)([GeneratedScenes(1, SIZE)[0]])
    compiled = batch["layout"]
    before = set(compiled._levels)
    with torch.no_grad():
        generator(compiled, generator.sample_latent(1) if preset.has_encoder else None)
    assert set(compiled._levels) == before
    assert SIZE in before


def test_feature_models_read_instances(tmp_path):
    _write_set(tmp_path, "cityscapes")
    preset = replace(PIX2PIXHD_CITYSCAPES_FEATURES, instance_edge=False, image_size=(64, 128))
    assert "instances" in build_dataset("cityscapes", tmp_path, preset)[0]


def test_scenes_of_two_sizes_are_no_batch():
    one, other = GeneratedScenes(1, 64)[0], GeneratedScenes(1, 32)[0]
    with pytest.raises(ValueError, match=r"one size in a batch, got \(64, 64\)"):
        Collate(SMALL)([one, other])


def test_written_scenes_read_back_exactly(tmp_path):
    write_scenes(tmp_path / "set", {"train": 3, "val": 2}, SIZE, seed=4)
    for split, count in (("train", 3), ("val", 2)):
        generated = GeneratedScenes(count, SIZE, split, seed=4)
        read = build_dataset("folder", tmp_path / "set", SMALL, split, mode="fixed", augment=False,
                             instances=True)
        assert len(read) == count
        for a, b in zip(read, generated, strict=True):
            assert a["name"] == b["name"]
            for key in ("image", "labels", "instances"):
                assert torch.equal(a[key], b[key])
                assert a[key].dtype == b[key].dtype
        modes = (tmp_path / "set" / split / "modes.csv").read_text().splitlines()
        assert modes == [",".join(["scene", *LANDSCAPE])] + [",".join([
            scene["name"], *(names[mode] for names, mode in
                             zip(MODE_NAMES, scene["modes"].tolist(), strict=True))])
            for scene in generated]


def test_scenes_command(tmp_path, totals):
    code, out, _ = _smis("scenes", tmp_path / "set", "--count", 2, "--held-out", 1, "--size", 32)
    assert code == 0, out
    assert totals == [(3, 3)]
    assert _smis("doctor", tmp_path / "set", "--classes", 8)[0] == 0
    code, _, error = _smis("scenes", tmp_path / "set", "--count", 2)
    assert code == 1 and "expected a new or empty folder" in str(error)
