"""Sample scenes, and the maps and pictures that are read and written."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from smis_models import images
from smis_models.scenes import KINDS, palette, sample_scene


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [1, 2, 8, 35, 151, 300])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (37, 53), (128, 256)])
def test_labels_and_instances_are_valid(kind, num_classes, size):
    scene = sample_scene(kind, *size, num_classes, seed=3)
    assert scene.labels.shape == scene.instances.shape == size
    assert scene.labels.min() >= 0
    assert scene.labels.max() < num_classes
    assert len(scene.names) == num_classes
    of_instance = np.where(scene.instances < 1000, scene.instances, scene.instances // 1000)
    np.testing.assert_array_equal(of_instance, scene.labels)


@pytest.mark.parametrize(
    ("kind", "num_classes", "least"),
    [("street", 35, 15), ("indoor", 151, 15), ("street", 151, 14), ("person", 8, 8)],
)
@pytest.mark.parametrize("seed", range(4))
def test_statistics_are_those_of_real_maps(kind, num_classes, least, seed):
    scene = sample_scene(kind, 256, 256, num_classes, seed)
    assert least <= len(scene.present) <= 20
    same_right = np.mean(scene.labels[:, 1:] == scene.labels[:, :-1])
    same_down = np.mean(scene.labels[1:] == scene.labels[:-1])
    assert 0.95 < same_right < 1
    assert 0.95 < same_down < 1
    if kind != "person":
        assert len(np.unique(scene.instances)) >= len(scene.present) + 3


def test_a_seed_is_a_scene_at_any_size():
    small, large = (sample_scene("street", 64 * k, 64 * k, 35, seed=5) for k in (1, 3))
    # The centres of the small map's pixels are centres of the large map's middle pixels.
    np.testing.assert_array_equal(small.labels, large.labels[1::3, 1::3])
    assert not np.array_equal(small.labels, sample_scene("street", 64, 64, 35, seed=6).labels)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("beach", 8, 8, 8), "kind"), (("street", 0, 8, 8), "height"), (("street", 8, 8, 0), "num_c")],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        sample_scene(*arguments)


def test_palette_tells_classes_apart():
    colours = palette(151)
    assert colours.shape == (151, 3)
    assert len(np.unique(colours, axis=0)) == 151


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I"])
def test_maps_round_trip(tmp_path, mode):
    indices = np.arange(12).reshape(3, 4) % 7
    dtype = {"L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]
    image = Image.fromarray(indices.astype(dtype))
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    path = tmp_path / ("map.tif" if mode == "I" else "map.png")
    image.save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
    np.testing.assert_array_equal(images.read_labels(path, 7), indices)


def test_sixteen_bit_ids_do_not_wrap(tmp_path):
    ids = np.array([[0, 26001], [33003, 65535]])
    images.write_indices(tmp_path / "ids.png", ids)
    np.testing.assert_array_equal(images.read_instances(tmp_path / "ids.png"), ids)
    with pytest.raises(ValueError, match="65536"):
        images.write_indices(tmp_path / "large.png", ids + 1)
    assert not (tmp_path / "large.png").exists()


def test_four_bit_grey_levels_are_indices(tmp_path):
    # Pillow writes no 4-bit grey PNG: make one by hand.
    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(b"\x00\x3a")) + chunk(b"IEND", b"")
    (tmp_path / "grey4.png").write_bytes(png)
    np.testing.assert_array_equal(images.read_labels(tmp_path / "grey4.png", 16), [[3, 10]])


def test_resize_takes_the_floor(tmp_path):
    images.write_indices(tmp_path / "map.png", np.arange(10).reshape(2, 5))
    resized = images.read_labels(tmp_path / "map.png", 10, size=(3, 3))
    np.testing.assert_array_equal(resized, np.arange(10).reshape(2, 5)[[0, 0, 1]][:, [0, 1, 3]])


def _bad_maps(folder):
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (4, 4)).save(folder / "rgb.png")
    images.write_indices(folder / "large.png", np.full((2, 2), 8))
    images.write_indices(folder / "unknown.png", np.full((2, 2), 255))
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 8, (64, 64), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:200])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("text.png", "not an image"),
        ("rgb.png", "got a RGB image"),
        ("large.png", "expected labels 0..7, got 8"),
        ("unknown.png", "got 255.*--unknown"),
        ("cut.png", "cannot be read as an image"),
        ("absent.png", "no such file"),
    ],
)
def test_bad_maps_are_one_clear_line(tmp_path, file, message):
    _bad_maps(tmp_path)
    with pytest.raises((images.ImageError, FileNotFoundError), match=message) as error:
        images.read_labels(tmp_path / file, 8)
    assert str(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_pixels_take_the_class_given(tmp_path):
    images.write_indices(tmp_path / "map.png", np.array([[1, 255]]))
    np.testing.assert_array_equal(images.read_labels(tmp_path / "map.png", 8, unknown=0), [[1, 0]])


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        images.write_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"


def test_pictures_and_grids():
    batch = torch.tensor([-1.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    (picture,) = images.to_pictures(batch)
    assert picture.shape == (2, 5, 3)
    assert picture[0, 0].tolist() == [0, 128, 255]
    sheet = images.grid([[picture, picture], [picture]], gap=1)
    assert sheet.shape == (5, 11, 3)
    assert (sheet[3:, 6:] == 255).all()
    with pytest.raises(ValueError, match="NaN"):
        images.to_pictures(batch * float("nan"))
