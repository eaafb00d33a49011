"""Label maps on disk: one rule of resizing, roles in names, links, formats, colours."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from smis_models import cli, create_model
from smis_models.benchmark.case import Maps, Setting
from smis_models.data import FileScenes, Preprocess, detect_layout, list_scenes
from smis_models.data.celebamask import CLASSES, HELD_OUT, PARTS, convert_celebamask, label_map
from smis_models.data.doctor import examine, find_splits
from smis_models.families import ADE20K, CITYSCAPES, DEEPFASHION, SPADE_CELEBAMASK, SPADE_COCO
from smis_models.io import images
from smis_models.io.colours import convert_colours, read_colour_table
from smis_models.io.images import ImageError, read_instances, read_labels, read_picture
from smis_models.io.names import INSTANCES, LABELS, by_scene, files_under, map_files, parse_stem
from smis_models.io.scene import SceneFiles, one_shape, read_scene, text_size
from smis_models.metrics import label_rule
from smis_models.metrics.diversity import DiversityMeter
from smis_models.synthesis import scene as synthesis
from smis_models.synthesis.pictures import read_pictures
from smis_models.training.options import load_config

# Up, down, odd, by no whole factor; 1024x2048 to 256x512 is Cityscapes'.
SIZES = [((7, 5), (3, 9)), ((5, 13), (64, 96)), ((213, 160), (64, 64)), ((96, 128), (96, 128)),
         ((1024, 2048), (256, 512)), ((33, 1), (1, 7))]
SMALL = replace(DEEPFASHION, image_size=(64, 96), upsampling="normal")


def pillow(indices: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    image = Image.fromarray(indices.astype(np.int32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST))


def a_map(size: tuple[int, int], classes: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, classes, size)


@pytest.fixture
def smis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["smis", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_maps_are_resized_as_pillow_does(tmp_path: Path, source: tuple[int, int],
                                         size: tuple[int, int]) -> None:
    labels, ids = a_map(source, 8), a_map(source, 60000, 1)
    images.write_indices(tmp_path / "a.png", labels)
    images.write_indices(tmp_path / "ids.png", ids)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png", 8, size), pillow(labels, size))
    np.testing.assert_array_equal(read_instances(tmp_path / "ids.png", size), pillow(ids, size))
    plan = Preprocess("fixed", size, augment=False).plan(source, np.random.default_rng(0))
    np.testing.assert_array_equal(plan.indices(labels), pillow(labels, size))


def test_every_reader_gives_one_map(tmp_path: Path) -> None:
    """Layouts to paint, pictures to encode, data sets and photographs with ids: bit for bit."""
    labels, ids = a_map((213, 160), 8), a_map((213, 160), 60000, 1)
    picture = np.random.default_rng(2).integers(0, 256, (213, 160, 3)).astype(np.uint8)
    for folder, pixels in (("labels", labels), ("inst", ids)):
        images.write_indices(tmp_path / folder / "a.png", pixels)
    images.write_png(tmp_path / "images/a.png", picture)
    expected, expected_ids = pillow(labels, (64, 96)), pillow(ids, (64, 96))
    layout = synthesis.read_scenes(tmp_path / "labels", None, SMALL)[0]
    np.testing.assert_array_equal(layout.labels, expected)
    assert layout.source_size == (213, 160)
    edged = replace(SMALL, instance_edge=True)
    with_ids = synthesis.read_scenes(tmp_path / "labels", tmp_path / "inst", edged)[0]
    np.testing.assert_array_equal(with_ids.instances, expected_ids)
    (found,) = read_pictures([tmp_path / "images"], [tmp_path / "labels"], SMALL)
    np.testing.assert_array_equal(found.labels[0], expected)
    sample = FileScenes([SceneFiles("a", tmp_path / "images/a.png", tmp_path / "labels/a.png",
                                    tmp_path / "inst/a.png")], 8,
                        Preprocess("fixed", (64, 96), augment=False))[0]
    np.testing.assert_array_equal(sample["labels"], expected)
    np.testing.assert_array_equal(sample["instances"], expected_ids)
    np.testing.assert_array_equal(sample["image"], found.image[0])
    (photograph, own), = synthesis.read_photographs(tmp_path / "images", tmp_path / "inst",
                                                    (64, 96))
    np.testing.assert_array_equal(own[0], expected_ids)
    np.testing.assert_array_equal(photograph, found.image)


def test_evaluate_reads_the_same_maps_either_way(tmp_path: Path, smis: Any) -> None:
    for k in range(2):
        images.write_indices(tmp_path / f"data/val/labels/{k}.png", a_map((111, 77), 8, k))
        images.write_png(tmp_path / f"data/val/images/{k}.png",
                         np.full((111, 77, 3), 90 * k, np.uint8))
    common = ("evaluate", "--model", "groupdnet_scenes", "--layouts", 1, "--samples", 2,
              "--pairs", 1, "--distance", "pixel", "--out", tmp_path / "e.json")
    found = []
    for source in (("--labels", tmp_path / "data/val/labels"),
                   ("--dataset", "folder", "--root", tmp_path / "data")):
        code, _, error = smis(*common, *source)
        assert code == 0, error
        result = json.loads((tmp_path / "e.json").read_text())
        assert "pixel centres" in result["protocol"]["label_filter"]
        found.append((result["data"]["labels_sha256"], result["results"]["diversity"]["pixel L1"]
                      ["mcsd"]))
    assert found[0] == found[1]


GTFINE = ("labelIds.png", "instanceIds.png", "labelTrainIds.png", "color.png", "polygons.json")


def gtfine(root: Path, scenes: int = 2) -> Path:
    folder = root / "gtFine/val/frankfurt"
    folder.mkdir(parents=True)
    for k in range(scenes):
        for value, ending in enumerate(GTFINE):
            path = folder / f"frankfurt_{k:06d}_000019_gtFine_{ending}"
            if path.suffix == ".json":
                path.write_text("{}")
            else:
                images.write_indices(path, np.full((8, 16), value))
    return folder


def test_roles_in_names_are_heeded(tmp_path: Path) -> None:
    folder = gtfine(tmp_path)
    for role, value in ((LABELS, 0), (INSTANCES, 1)):
        files = map_files("option", tmp_path / "gtFine", role)
        assert list(files) == [f"val/frankfurt/frankfurt_{k:06d}_000019" for k in range(2)]
        for path in files.values():
            assert (read_labels(path, 9) == value).all(), path
    with pytest.raises(ValueError, match=r"labels: expected a label map, .*a map of train ids; its "
                                         r"train ids are no label ids"):
        map_files("labels", next(folder.glob("*_labelTrainIds.png")))
    with pytest.raises(ValueError, match=r"labels: expected a label map, .*a colour-coded map"):
        map_files("labels", next(folder.glob("*_color.png")))
    for path in folder.glob("*_instanceIds.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"instances: expected instance maps in .*, by its name a"):
        map_files("instances", folder, INSTANCES)


@pytest.mark.parametrize(("stem", "expected"), [
    ("a_gtFine_labelIds", ("a", LABELS)), ("a_leftImg8bit", ("a", "picture")),
    ("label", ("label", None)), ("_label", ("_label", None)),
    ("water_color", ("water_color", None)),
    ("bluelabel", ("bluelabel", None)), ("a_inst", ("a", INSTANCES)), ("0001", ("0001", None)),
])
def test_what_a_name_says(stem: str, expected: tuple[str, str | None]) -> None:
    assert parse_stem(stem) == expected


def test_two_files_of_one_scene_are_named(tmp_path: Path) -> None:
    for name in ("cat.png", "cat_label.png", "cat.bmp"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"labels: .*cat\.bmp and .*cat\.png are both of the scene "
                                         r"'cat'"):
        synthesis.read_scenes(tmp_path, None, SMALL)


def test_scenes_in_subfolders_keep_their_folder(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        images.write_indices(tmp_path / folder / "1.png", np.full((4, 4), 1))
    assert [x.name for x in synthesis.read_scenes(tmp_path, None, SMALL)] == ["a/1", "b/1"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "disk/b").mkdir(parents=True)
    (tmp_path / "data/labels/a").mkdir(parents=True)
    (tmp_path / "disk/b/2.png").touch()
    (tmp_path / "data/labels/a/1.png").touch()
    (tmp_path / "data/labels/.hidden.png").touch()
    folder = tmp_path / "data/labels"
    os.symlink(tmp_path / "disk/b", folder / "b")
    os.symlink("../disk/b/2.png", tmp_path / "data/file.png")
    os.symlink(folder, folder / "a/itself")       # to a folder on the way
    os.symlink(tmp_path, folder / "above")        # to one above the root
    os.symlink("/", folder / "a/root")
    os.symlink("dead.png", folder / "dead.png")  # to itself
    os.symlink(folder / "a", tmp_path / "disk/b/across")  # a cycle of two links
    os.symlink(tmp_path / "disk/b", folder / "a/across")
    found = files_under(folder)
    assert {"a/1.png", "b/2.png"} <= set(found)
    assert "b/across/1.png" in found
    assert len(found) < 10
    assert not [name for name in found if "itself" in name or "above" in name or "root" in name]


def test_a_data_set_with_linked_folders_is_whole(tmp_path: Path) -> None:
    for role in ("images", "labels"):
        (tmp_path / f"data/{role}").mkdir(parents=True)
        for k in range(2):
            images.write_indices(tmp_path / f"disk/{role}/{k}.png", np.full((4, 4), k))
            images.write_indices(tmp_path / f"data/{role}/a/{k}.png", np.full((4, 4), k))
        os.symlink(tmp_path / f"disk/{role}", tmp_path / f"data/{role}/b")
    names = [record.name for record in list_scenes("folder", tmp_path / "data").records]
    assert names == ["a/0", "a/1", "b/0", "b/1"]


def test_listing_stays_fast(tmp_path: Path) -> None:
    """20,000 scenes in a fifth of the two seconds that 100,000 may take."""
    count = 20_000
    for role in ("images", "labels"):
        (tmp_path / role).mkdir()
        for k in range(count):
            os.mknod(tmp_path / role / f"{k:06d}.png")
    spent = []
    for _ in range(3):
        start = time.process_time()
        assert len(list_scenes("folder", tmp_path).records) == count
        spent.append(time.process_time() - start)
    assert min(spent) < 0.4


@pytest.mark.parametrize(("name", "files"), [
    ("ade20k", ["ADE_train_00000001.jpg", "ADE_train_00000001.png"]),
    ("ade20k", ["images/ADE_val_00000001.jpg", "annotations/ADE_val_00000001.png"]),
    ("ade20k", ["annotations/training/ADE_train_00000001.png"]),
    ("cityscapes", ["train_label/aachen_000000_000019_gtFine_labelIds.png"]),
    ("coco_stuff", ["train_label/000000000009.png"]), ("folder", ["labels/ADE.png"]),
])
def test_flat_data_sets_are_told(tmp_path: Path, name: str, files: list[str]) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert detect_layout(tmp_path) == name


@pytest.mark.parametrize(("file", "options"), [
    ("a.jpg", {"quality": 95}), ("a.gif", {}), ("a.webp", {"quality": 80}),
    ("a.tif", {"compression": "jpeg"}),
])
def test_lossy_maps_are_refused_by_content(tmp_path: Path, file: str, options: dict[str, Any],
                                           smis: Any) -> None:
    labels = np.kron(a_map((8, 8), 8), np.ones((8, 8), int)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / file, **options)
    renamed = tmp_path / "data/labels/1.png"
    renamed.parent.mkdir(parents=True)
    shutil.copy(tmp_path / file, renamed)
    for path in (tmp_path / file, renamed):
        for read in (lambda path: read_labels(path, 183), read_instances):
            with pytest.raises(ImageError, match="does not keep indices"):
                read(path)
    images.write_png(tmp_path / "data/images/1.png", np.zeros((64, 64, 3), np.uint8))
    code, out, _ = smis("doctor", tmp_path / "data", "--classes", 183)
    assert code == 1
    assert "does not keep indices" in out


def test_doctor_names_lossy_files_and_palettes(tmp_path: Path) -> None:
    labels = Image.fromarray(a_map((8, 8), 8).astype(np.uint8))
    (tmp_path / "labels").mkdir()
    labels.save(tmp_path / "labels/1.jpg")
    coloured = labels.convert("RGB").quantize(8)
    coloured.putpalette([7 * k % 256 for k in range(24)])
    coloured.save(tmp_path / "labels/2.png")
    for k in (1, 2):
        images.write_png(tmp_path / f"images/{k}.png", np.zeros((8, 8, 3), np.uint8))
    problems = examine(find_splits("folder", tmp_path)).problems
    assert any(p.path.name == "1.jpg" and "JPEG" in p.message for p in problems)
    assert any(p.path.name == "2.png" and "palette" in p.message and p.note for p in problems)


@pytest.mark.parametrize(("mode", "message"), [
    ("RGB", "equal channels; `smis convert-labels` keeps one"), ("LA", "alpha channel"),
    ("F", "float image; round"), ("colours", "turns colours into class indices"),
])
def test_maps_of_other_modes_are_named_as_what_they_are(tmp_path: Path, mode: str,
                                                        message: str) -> None:
    grey = Image.fromarray(a_map((8, 8), 8).astype(np.uint8))
    image = Image.new("RGB", (8, 8), (3, 4, 5)) if mode == "colours" else grey.convert(mode)
    image.save(tmp_path / "map.tif")
    with pytest.raises(ImageError, match=message):
        read_labels(tmp_path / "map.tif", 8)


def _packed(values: np.ndarray, bits: int) -> list[bytes]:
    """Rows of samples of 1, 2 or 4 bits, the first in the highest."""
    step = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % step))).astype(np.uint8)
    parts = padded.reshape(len(values), -1, step) << (8 - bits * (1 + np.arange(step)))
    return [bytes(row) for row in np.bitwise_or.reduce(parts, 2).astype(np.uint8)]


def _grey_png(path: Path, values: np.ndarray, bits: int) -> Path:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    height, width = values.shape
    rows = b"".join(b"\0" + row for row in _packed(values, bits))
    path.write_bytes(b"\x89PNG\r\n\x1a\n"
                     + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def _grey_tiff(path: Path, values: np.ndarray, bits: int) -> Path:
    rows = b"".join(_packed(values, bits))
    tags = [(256, values.shape[1]), (257, len(values)), (258, bits), (259, 1), (262, 1),
            (273, 8), (277, 1), (278, len(values)), (279, len(rows))]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows
                     + struct.pack("<H", len(tags)) + fields + bytes(4))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("write", [_grey_png, _grey_tiff])
def test_levels_of_few_bits_are_the_classes(write: Any, bits: int, tmp_path: Path, smis: Any
                                            ) -> None:
    values = np.arange(8 * 15).reshape(8, 15) % (1 << bits)
    path = write(tmp_path / f"map{'.png' if write is _grey_png else '.tif'}", values, bits)
    assert np.array_equal(images.read_labels(path, 16), values)
    assert np.array_equal(images.read_instances(path), values)
    assert smis("convert-labels", path, tmp_path / "out")[0] == 0
    assert np.array_equal(images.read_labels(tmp_path / "out/map.png", 16), values)


@pytest.mark.parametrize(("head", "largest"), [(b"P5", 100), (b"P2", 100), (b"P5", 1000)])
def test_scaled_levels_are_refused(head: bytes, largest: int, tmp_path: Path) -> None:
    pixels = b"1 " * 4 if head == b"P2" else bytes([0, 1]) * (2 + 2 * (largest > 255))
    (tmp_path / "a.pgm").write_bytes(head + b"\n2 2\n%d\n" % largest + pixels)
    with pytest.raises(images.ImageError, match=f"a.pgm: expected .* got up to {largest}, which"):
        images.read_labels(tmp_path / "a.pgm", 256)


def _white_is_zero(path: Path, bits: int) -> None:
    """A TIFF of one row whose PhotometricInterpretation is 0."""
    tags = ((256, 8), (257, 1), (258, bits), (259, 1), (262, 0), (273, 8), (277, 1), (278, 1),
            (279, bits))
    head = b"II*\0" + struct.pack("<I", 16) + bytes([0x53] * 8)
    path.write_bytes(head + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4))


@pytest.mark.parametrize("name", ["p1.pbm", "p4.pbm", "1.tif", "2.tif", "4.tif", "8.tif"])
def test_inverted_values_are_refused(tmp_path: Path, name: str) -> None:
    """Pillow hands out 1 where a 0 is stored; other programs read what is stored."""
    path = tmp_path / name
    if name.startswith("p"):
        path.write_bytes(b"P1\n3 1\n0 1 1\n" if name[1] == "1" else b"P4\n3 1\n\x60")
    else:
        _white_is_zero(path, int(name[0]))
    with pytest.raises(images.ImageError, match="zero is white"):
        images.read_labels(path, 256)


@pytest.mark.parametrize(("largest", "values"), [(255, [0, 1, 7, 255]), (65535, [0, 1, 300, 9999])])
def test_whole_levels_of_a_pgm_are_kept(largest: int, values: list[int], tmp_path: Path) -> None:
    pixels = struct.pack(">4H" if largest > 255 else "4B", *values)
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 2\n%d\n" % largest + pixels)
    assert images.read_instances(tmp_path / "a.pgm").ravel().tolist() == values


def test_colours_of_more_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6\n1 1\n100\n" + bytes([100, 0, 0]))
    with pytest.raises(images.ImageError, match=r"expected 8 bits per channel, got .*up to 100"):
        images.read_exact(tmp_path / "a.ppm")


def test_files_of_a_scene_have_one_shape(tmp_path: Path) -> None:
    images.write_indices(tmp_path / "labels/a.png", np.zeros((10, 20), int))
    images.write_indices(tmp_path / "inst/a.png", np.zeros((20, 20), int))
    preset = replace(SMALL, instance_edge=True)
    layouts = synthesis.read_scenes(tmp_path / "labels", tmp_path / "inst", preset)
    with pytest.raises(ImageError, match=r"20x20 \(width x height\), but labels/a.png is 20x10"):
        _ = layouts[0]


def test_a_scene_is_as_large_as_its_label_map(tmp_path: Path) -> None:
    """And where it has none as what it has."""
    images.write_indices(tmp_path / "labels.png", np.ones((8, 12), np.int64))
    images.write_indices(tmp_path / "ids.png", np.ones((4, 6), np.int64))
    images.write_png(tmp_path / "image.png", np.zeros((16, 24, 3), np.uint8))
    labels, image, ids = (tmp_path / f"{name}.png" for name in ("labels", "image", "ids"))
    assert read_scene(SceneFiles("a", image, labels, ids), 2).size == (8, 12)
    assert read_scene(SceneFiles("a", image, None, ids), 2).size == (16, 24)
    assert read_scene(SceneFiles("a", None, None, ids), 2).size == (4, 6)


def test_scaled_sizes_are_of_one_shape() -> None:
    """Half a pixel of a side may be rounded off, no more."""
    for a, b, same in (((10, 20), (20, 40), True), ((10, 20), (20, 20), False),
                       ((10, 20), (20, 10), False), ((333, 500), (67, 100), True),
                       ((333, 500), (66, 100), False), ((333, 500), (666, 1000), True),
                       ((101, 201), (50, 100), True), ((101, 201), (51, 100), False),
                       ((1, 1), (7, 7), True)):
        assert one_shape(a, b) == one_shape(b, a) == same, (a, b)
    assert text_size((10, 20)) == "20x10"


def test_a_folder_of_maps_is_read_one_by_one(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(5):
        images.write_indices(tmp_path / f"{k}.png", np.full((4, 4), k))
    read: list[str] = []

    def counted(files: SceneFiles, *given: Any, **named: Any) -> Any:
        read.append(files.name)
        return read_scene(files, *given, **named)

    monkeypatch.setattr(synthesis, "read_scene", counted)
    layouts = synthesis.read_scenes(tmp_path, None, SMALL)
    assert (len(layouts), read) == (5, [])
    assert next(iter(layouts)).name == "0"
    assert read == ["0"]
    assert [layout.name for layout in layouts[3:]] == ["3", "4"]


@pytest.mark.parametrize(("dont_care", "given", "expected"), [
    (7, None, 7), (7, 2, 2), (7, 0, 0), (None, 2, 2),
])
def test_unknown_pixels_become_the_class_that_is_given(
        tmp_path: Path, dont_care: int | None, given: int | None, expected: int) -> None:
    images.write_indices(tmp_path / "labels/a.png", np.where(np.eye(8), 255, 3))
    images.write_png(tmp_path / "images/a.png", np.zeros((8, 8, 3), np.uint8))
    preset = replace(SMALL, dont_care=dont_care)
    (picture,) = read_pictures([tmp_path / "images"], [tmp_path / "labels"], preset, given)
    layout = synthesis.read_scenes(tmp_path / "labels", None, preset, given)[0]
    for labels in (picture.labels[0].numpy(), layout.labels):
        assert set(np.unique(labels)) == {3, expected}


def test_unknown_pixels_name_an_option_that_the_command_has(tmp_path: Path) -> None:
    images.write_indices(tmp_path / "a.png", np.full((64, 64), 255))
    images.write_png(tmp_path / "i.png", np.zeros((64, 64, 3), np.uint8))
    files = [SceneFiles("a", tmp_path / "i.png", tmp_path / "a.png")]
    with pytest.raises(ImageError, match=r"\(--data\.unknown\)"):
        _ = FileScenes(files, 8, Preprocess("none", (64, 64)), option="--data.unknown")[0]
    with pytest.raises(ImageError, match=r"got 255; relabel unknown pixels$"):
        read_labels(tmp_path / "a.png", 8)


def test_colours_become_indices_exactly(tmp_path: Path, smis: Any) -> None:
    labels = a_map((9, 7), 4)
    colours = np.array([[70, 130, 180], [0, 0, 0], [255, 255, 255], [70, 130, 181]], np.uint8)
    (tmp_path / "table.txt").write_text(
        "# class R G B\n5 70 130 180\n6,0,0,0\n7;255;255;255\n300 70 130 181\n5 1 2 3\n")
    table = read_colour_table(tmp_path / "table.txt")
    (tmp_path / "maps/sub").mkdir(parents=True)
    picture = Image.fromarray(colours[labels])
    picture.save(tmp_path / "maps/rgb.png")
    picture.convert("RGBA").save(tmp_path / "maps/sub/rgba.bmp")
    picture.quantize(4).save(tmp_path / "maps/quantised.png")
    code, out, error = smis("convert-labels", tmp_path / "maps", tmp_path / "out", "--colours",
                            tmp_path / "table.txt")
    assert code == 0, error
    assert "3 index maps" in out
    expected = np.array([5, 6, 7, 300])[labels]
    for name in ("rgb", "sub/rgba", "quantised"):
        np.testing.assert_array_equal(read_instances(tmp_path / f"out/{name}.png"), expected)
    del table[255, 255, 255]
    count = int((labels == 2).sum())
    with pytest.raises(ImageError, match=rf"got \(255, 255, 255\) at row .* in {count} pixels"):
        convert_colours(tmp_path / "maps/rgb.png", table)
    grey = Image.fromarray(labels.astype(np.uint8))
    for mode in ("RGB", "LA"):
        grey.convert(mode).save(tmp_path / "grey.png")
        np.testing.assert_array_equal(convert_colours(tmp_path / "grey.png", None), labels)
    with pytest.raises(ImageError, match="give their table"):
        convert_colours(tmp_path / "maps/rgb.png", None)
    picture.save(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="JPEG"):
        convert_colours(tmp_path / "a.jpg", table)
    (tmp_path / "twice.txt").write_text("1 2 3 4\n2 2 3 4\n")
    with pytest.raises(ValueError, match=r"is class 1 and, in line 2 of .*, class 2"):
        read_colour_table(tmp_path / "twice.txt")


def faces(root: Path) -> NDArray[Any]:
    """Three faces as published; the parts of face 0 are rows of its map."""
    expected = np.zeros((20, 6), np.int64)
    for number in range(3):
        folder = root / f"CelebAMask-HQ/CelebAMask-HQ-mask-anno/{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        for k, part in enumerate(PARTS):
            if number and k > 1:
                continue
            mask = np.zeros((20, 6), np.uint8)
            mask[k + 1 :] = 255  # over the parts before it, down to the last row
            expected[k + 1 :] = k + 1
            Image.fromarray(mask).convert("RGB").save(folder / f"{number:05d}_{part}.png")
        pictures = root / "CelebAMask-HQ/CelebA-HQ-img"
        pictures.mkdir(exist_ok=True)
        Image.new("RGB", (12, 40), (number, 9, 9)).save(pictures / f"{number}.jpg")
    return np.minimum(np.arange(20), 18)[:, None].repeat(6, 1)


def test_linked_faces_become_whole_files(tmp_path: Path) -> None:
    """A link beside the pictures, by a path that means nothing elsewhere."""
    faces(tmp_path)
    pictures = tmp_path / "CelebAMask-HQ/CelebA-HQ-img"
    (tmp_path / "CelebAMask-HQ/store").mkdir()
    for path in pictures.iterdir():
        path.rename(tmp_path / "CelebAMask-HQ/store" / path.name)
        path.symlink_to(Path("../store") / path.name)
    convert_celebamask(tmp_path, tmp_path / "out")
    for number in range(3):
        with Image.open(tmp_path / f"out/train/images/{number:05d}.jpg") as image:
            assert image.size == (12, 40)


# The published list of parts, spelled out: the order is the classes' and that of covering.
PUBLISHED = ["skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear",
             "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"]


def test_celebamask_becomes_a_data_set(tmp_path: Path, smis: Any) -> None:
    assert list(CLASSES) == ["background", *PUBLISHED]
    assert HELD_OUT == 28000  # the published test set: 28000.jpg to 29999.jpg
    images.write_png(tmp_path / "faint.png", np.array([[0, 1, 255]], np.uint8))
    assert label_map({"nose": tmp_path / "faint.png"}).tolist() == [[0, 2, 2]]
    assert SPADE_CELEBAMASK.classes == len(CLASSES)
    expected = faces(tmp_path)
    code, out, error = smis("convert-data", "celebamask-hq", tmp_path, tmp_path / "out",
                            "--held-out", 2)
    assert code == 0, error
    assert "2 faces to train on and 1 held out" in out
    found = read_labels(tmp_path / "out/train/labels/00000.png", 19)
    np.testing.assert_array_equal(found, expected)
    pair = read_labels(tmp_path / "out/val/labels/00002.png", 19)
    np.testing.assert_array_equal(np.unique(pair), [0, 1, 2])
    names = [record.name for record in list_scenes("folder", tmp_path / "out").records]
    assert names == ["00000", "00001"]
    assert smis("doctor", tmp_path / "out", "--classes", 19)[0] == 0
    (tmp_path / "out/train/labels/00001.png").unlink()  # as a conversion that was stopped
    assert convert_celebamask(tmp_path, tmp_path / "out", held_out=2) == {"train": 2, "val": 1}
    with pytest.raises(ValueError, match=r"held-out: .* of another number than 1"):
        convert_celebamask(tmp_path, tmp_path / "out", held_out=1)  # no face in both splits
    assert not list((tmp_path / "out").glob("*.json"))
    assert (tmp_path / "out/train/labels/00001.png").exists()
    (tmp_path / "CelebAMask-HQ/CelebA-HQ-img/1.jpg").unlink()
    with pytest.raises(ValueError, match="picture 1 has no file"):
        convert_celebamask(tmp_path, tmp_path / "other")


def test_the_same_rule_keeps_ade20ks_last_class() -> None:
    assert label_rule("same", ADE20K).ignored == {0}
    assert label_rule("same", SPADE_COCO).ignored == {182}
    assert label_rule("same", CITYSCAPES).ignored == {
        c for c in (CITYSCAPES.dont_care,) if c is not None and CITYSCAPES.unlabelled is None
    } | {c for c in (CITYSCAPES.unlabelled,) if c is not None}


def test_by_scene_takes_maps_that_are_named_as_pictures(tmp_path: Path) -> None:
    (tmp_path / "a_img.png").touch()
    assert list(by_scene(tmp_path, LABELS)) == ["a"]
    (tmp_path / "b_label.png").touch()
    assert list(by_scene(tmp_path, LABELS)) == ["b"]


def test_a_small_model_tells_that_a_map_is_resized(tmp_path: Path, smis: Any) -> None:
    images.write_indices(tmp_path / "wide.png", a_map((96, 320), 8))
    code, out, error = smis("synthesize", "--model", "groupdnet_scenes", "--labels",
                            tmp_path / "wide.png", "--out", tmp_path / "out")
    assert code == 0, error
    assert "320x96, to 128x128 (width x height); its shape is stretched" in out
    code, _, error = smis("synthesize", "--model", "groupdnet_scenes", "--labels",
                          tmp_path / "wide.png", "--out", tmp_path / "out", "--size", "128x256")
    assert (code, error.count("\n")) == (2, 1)
    assert "starts from a code of one size" in error


def test_size_paints_a_convolutional_model_at_another(tmp_path: Path, smis: Any,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"ngf": 4, "hidden": 8, "classes": 8, "dont_care": None, "unlabelled": None}

    def make(name: str, checkpoint: Any = None, **options: Any) -> Any:
        return create_model(name, checkpoint, **{**small, **options})

    monkeypatch.setattr(cli.common, "create_model", make)
    images.write_indices(tmp_path / "a.png", a_map((64, 128), 8))
    code, out, error = smis("synthesize", "--model", "spade_ade20k", "--labels",
                            tmp_path / "a.png", "--out", tmp_path / "out", "--size", "64x128")
    assert code == 0, error
    assert "resized" not in out
    assert images.read_picture(tmp_path / "out/a_0.png").shape == (64, 128, 3)
    for bad in ("64", "64x100"):
        code, _, error = smis("synthesize", "--model", "spade_ade20k", "--labels",
                              tmp_path / "a.png", "--out", tmp_path / "out", "--size", bad)
        assert (code, error.count("\n")) == (2, 1)


def test_pictures_of_two_folders_keep_their_own_maps(tmp_path: Path) -> None:
    for folder, label in (("a", 1), ("b", 2)):
        images.write_png(tmp_path / folder / "images/0.png", np.zeros((64, 96, 3), np.uint8))
        images.write_indices(tmp_path / folder / "labels/0.png", np.full((64, 96), label))
    pictures = [tmp_path / "a/images", tmp_path / "b/images"]
    labels = [tmp_path / "a/labels", tmp_path / "b/labels"]
    with pytest.raises(ValueError, match=r"^images: .*a/images/0.png and .* are both"):
        read_pictures(pictures, labels, SMALL)
    with pytest.raises(ValueError, match=r"^image-labels: .* are both of scene '0'"):
        read_pictures(pictures[:1], labels, SMALL)
    singly = read_pictures([path / "0.png" for path in pictures],
                           [path / "0.png" for path in labels], SMALL)
    assert [int(picture.labels.max()) for picture in singly] == [1, 2]


def test_the_grid_is_bounded(tmp_path: Path, smis: Any) -> None:
    for k in range(20):
        images.write_indices(tmp_path / f"maps/{k}.png", np.full((128, 128), k % 8))
    code, out, _ = smis("synthesize", "--model", "groupdnet_scenes", "--labels", tmp_path / "maps",
                        "--out", tmp_path / "out")
    assert code == 0
    assert "20 pictures" in out
    assert "the first 16 scenes on" in out
    assert images.read_picture(tmp_path / "out/grid.png").shape[0] == 16 * (128 + 16 + 4) - 4
    assert len(list((tmp_path / "out").iterdir())) == 21


def test_converted_faces_train_in_one_line(tmp_path: Path, smis: Any) -> None:
    pytest.importorskip("jsonargparse")
    faces(tmp_path)
    convert_celebamask(tmp_path, tmp_path / "out", held_out=2)
    code, out, error = smis(
        "train", "spade_celebamask", "--data.root", tmp_path / "out", "--out", tmp_path / "run",
        "--data.batch", 2, "--data.workers", 0, "--schedule.epochs", 1, "--losses.perceptual", 0,
        "--network.ngf", 4, "--network.ndf", 4, "--network.hidden", 8,
        "--network.image_size", "[64,64]", "--log.grid_every", 0, "--log.tensorboard", "false")
    assert code == 0, error
    assert "1 of 1 steps" in out


def test_a_benchmarks_maps_take_their_own_instances(tmp_path: Path) -> None:
    for k, name in enumerate(("a", "b")):
        images.write_indices(tmp_path / f"label/{name}_labelIds.png", np.full((4, 4), k))
        images.write_indices(tmp_path / f"inst/{name}_instanceIds.png", np.full((4, 4), 7 + k))
    images.write_indices(tmp_path / "inst/0_instanceIds.png", np.full((4, 4), 99))
    maps = Maps(tmp_path)
    for k in range(2):
        assert (maps.labels("street", (4, 4), 35, k) == k).all()
        assert (maps.instances("street", (4, 4), k) == 7 + k).all()
    place = Setting(torch.device("cpu"), maps=maps).at(1)  # a batch goes on from its first map
    for found, values in ((place.labels("street", (4, 4), 35, batch=3), (1, 0, 1)),
                          (place.instances("street", (4, 4), batch=3), (8, 7, 8))):
        assert torch.equal(found, torch.tensor(values)[:, None, None].expand(3, 4, 4))


def test_a_benchmark_takes_the_first_maps(tmp_path: Path) -> None:
    for number in range(20):
        images.write_indices(tmp_path / f"coco/label/{number:02}.png", np.full((8, 8), number))
    maps = Maps(tmp_path).named("coco")
    assert (maps.count, maps.left_out) == (16, 4)
    assert [int(maps.labels("", (8, 8), 183, k)[0, 0]) for k in range(16)] == list(range(16))


def test_a_missing_prediction_is_told_before_the_measuring(tmp_path: Path, smis: Any,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(3):
        images.write_indices(tmp_path / f"maps/{k}.png", np.full((128, 128), k))
        images.write_indices(tmp_path / f"pred/{k}_labelIds.png", np.full((128, 128), k))
    (tmp_path / "pred/2_labelIds.png").unlink()

    def untouched(*_: Any, **__: Any) -> None:
        raise AssertionError("measuring was begun")

    monkeypatch.setattr(DiversityMeter, "add", untouched)
    code, _, error = smis("evaluate", "--model", "groupdnet_scenes", "--labels", tmp_path / "maps",
                          "--predictions", tmp_path / "pred", "--distance", "pixel", "--layouts", 1,
                          "--samples", 2, "--pairs", 1, "--out", tmp_path / "e.json")
    assert (code, error.count("\n")) == (2, 1)
    assert "predictions: no map of scene '2'" in error


@pytest.mark.parametrize("read", [
    lambda p: read_labels(p, 8), read_instances, images.read_exact, images.read_picture,
    images.image_size, lambda p: label_map({"skin": p}),
], ids=["labels", "instances", "exact", "picture", "size", "mask"])
@pytest.mark.parametrize("how", ["cut", "text", "huge", "absent", "bomb", "levels"])
def test_no_reader_lets_a_damaged_file_through_as_a_traceback(
        read: Any, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    if how != "absent":
        images.write_indices(path, a_map((64, 64), 8))
    if how == "cut":  # inside its head
        path.write_bytes(path.read_bytes()[:20])
    elif how == "text":
        path.write_text("no picture")
    elif how == "bomb":  # a comment of more text than Pillow takes
        data = b"Comment\0\0" + zlib.compress(b"a" * 2_000_000)
        chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(
            ">I", zlib.crc32(b"zTXt" + data))
        path.write_bytes(path.read_bytes()[:33] + chunk + path.read_bytes()[33:])
    elif how == "levels":
        path.write_bytes(b"P5\n4 4\n99999\n" + bytes(32))
    elif how == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    error = FileNotFoundError if how == "absent" else ImageError
    words = r"a\.png: (cannot be read as an? \w+ \(|no such file)"
    with pytest.raises(error, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def _marked(path: Path, orientation: int, size: tuple[int, int]) -> NDArray[Any]:
    """A picture with an EXIF orientation; returned as it is shown."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_marked_picture_alone_is_read_as_shown(tmp_path: Path, orientation: int, suffix: str,
                                                 ) -> None:
    path = tmp_path / f"a{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    pixels = np.random.default_rng(0).integers(0, 256, (4, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    turns: dict[int, Any] = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)}
    np.testing.assert_array_equal(read_picture(path), turns[orientation])


def test_odd_marks_beside_the_orientation_change_nothing(tmp_path: Path) -> None:
    """Text where Pillow expects a number when it writes all marks anew."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0),
               struct.pack("<HHI4s", 0x0111, 2, 4, b"abc\0")]
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(sorted(entries)) + bytes(4)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        stored = np.asarray(image)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.jpg"), np.rot90(stored, -1))


def test_doctor_names_what_pillow_refuses(tmp_path: Path) -> None:
    images.write_png(tmp_path / "images/a.png", np.zeros((4, 4, 3), np.uint8))
    images.write_indices(tmp_path / "labels/a.png", np.zeros((4, 4), int))
    (tmp_path / "labels/a.png").write_bytes(b"P5\n4 4\n99999\n" + bytes(32))
    (problem, *_) = examine(find_splits("folder", tmp_path)).problems
    assert problem.path == tmp_path / "labels/a.png" and "cannot be read" in problem.message


def test_the_map_tells_how_a_marked_picture_lies(tmp_path: Path) -> None:
    """Tools draw maps on pictures as shown, or as stored: the wrong one is another scene's map."""
    shown = _marked(tmp_path / "a.png", 6, (4, 7))
    stored = np.rot90(shown)
    for size, picture in (((7, 4), shown), ((14, 8), shown), ((4, 7), stored), ((8, 14), stored)):
        images.write_indices(tmp_path / "map.png", a_map(size, 8))
        for files in (SceneFiles("a", tmp_path / "a.png", tmp_path / "map.png"),
                      SceneFiles("a", tmp_path / "a.png", instances=tmp_path / "map.png")):
            found = read_scene(files, 8)
            assert found.picture is not None
            np.testing.assert_array_equal(found.picture, picture)


@pytest.mark.parametrize(("orientation", "size"), [(6, (8, 8)), (3, (4, 7)), (2, (4, 7))])
def test_a_marked_picture_whose_map_fits_both_ways_is_refused(
        tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    _marked(tmp_path / "images" / "a.png", orientation, size)
    images.write_indices(tmp_path / "labels" / "a.png", a_map(size, 8))
    message = rf"a\.png: .* EXIF orientation {orientation}, and its map fits both ways; save"
    with pytest.raises(ImageError, match=message):
        FileScenes(list_scenes("folder", tmp_path).records, 8,
                   Preprocess("fixed", (8, 8), augment=False))[0]
    (problem,) = examine(find_splits("folder", tmp_path)).problems
    assert not problem.note
    assert f"EXIF orientation {orientation}" in problem.message


def test_a_marked_picture_whose_map_fits_neither_way_is_a_misfit(tmp_path: Path) -> None:
    _marked(tmp_path / "a.png", 6, (4, 7))
    images.write_indices(tmp_path / "map.png", a_map((8, 8), 8))
    with pytest.raises(ImageError, match="one scene has one shape"):
        read_scene(SceneFiles("a", tmp_path / "a.png", tmp_path / "map.png"), 8)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_of_several_pages_none_is_guessed(tmp_path: Path, name: str) -> None:
    one, two = (Image.fromarray(a_map((4, 4), 8, seed).astype(np.uint8)) for seed in (0, 1))
    one.save(tmp_path / name, save_all=True, append_images=[two])
    for read in (lambda path: read_labels(path, 8), read_instances,
                 lambda path: convert_colours(path, {(0, 0, 0): 0})):
        with pytest.raises(ImageError, match=r"expected one map, got a (TIFF|PNG) of 2 pages"):
            read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-mark"])
def test_tables_are_read_as_editors_write_them(tmp_path: Path, encoding: str) -> None:
    text = "# \u7a7a, ciel\r\n0 70 130 180\r\n1,107,142,35\r\n"
    content = (b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-mark"
               else text.encode(encoding))
    (tmp_path / "colours.txt").write_bytes(content)
    assert read_colour_table(tmp_path / "colours.txt") == {(70, 130, 180): 0, (107, 142, 35): 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_configurations_are_read_as_editors_write_them(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("# \u00e9t\u00e9\nrecipe: groupdnet_scenes_codes\ndata:\n  root: \u65e5\n"
                     .encode(encoding))
    with_root = load_config(path, ["--data.name", "folder"])
    assert str(with_root.data.root) == "\u65e5"
