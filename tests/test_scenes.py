"""Sample scenes, how they look and are read back, and the files that are read and written."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from smis_models.data import Draw, GeneratedScenes, SceneClassifier
from smis_models.data.classes import class_names
from smis_models.data.scenes import (
    KINDS,
    LANDSCAPE,
    MODES,
    draw_modes,
    paint,
    palette,
    sample_scene,
    shapes,
)
from smis_models.io import images


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


def test_shapes_by_their_formulas():
    """Pixels whose centres lie inside."""
    height, width = 45, 61
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / width)[None]
    dy, dx = (y - 0.4) / 0.3, (x - 0.55) / 0.2
    radius = 1 + 0.1 * np.sin(3 * np.arctan2(dy, dx)) - 0.05 * np.sin(4 * np.arctan2(dy, dx) + 1)
    ridge = 0.5 + 0.1 * np.sin(2 * np.pi * x + 0.3) + 0.05 * np.sin(4 * np.pi * x + 0.6)
    for shape, inside in (
        (shapes.rectangle(0.25, 0.1, 0.75, 0.5), (y >= 0.25) & (y < 0.75) & (x >= 0.1) & (x < 0.5)),
        (shapes.polygon((0.1, 0.2), (0.1, 0.8), (0.9, 0.2)),
         (y >= 0.1) & (x >= 0.2) & (x < 0.8 - 0.75 * (y - 0.1))),
        (shapes.blob(0.4, 0.55, 0.3, 0.2), dy**2 + dx**2 <= 1),
        (shapes.blob(0.4, 0.55, 0.3, 0.2, (0.1, -0.05)), dy**2 + dx**2 <= radius**2),
        (shapes.below(0.5, (0.1, 0.05), 0.3), y >= ridge),
    ):
        canvas = shapes.Canvas(height, width, {"ground": 0, "thing": 3})
        canvas.stuff("thing", shape)
        np.testing.assert_array_equal(canvas.labels, np.where(inside, 3, 0))
        np.testing.assert_array_equal(canvas.instances, canvas.labels)
        for number in range(2):  # over one another
            canvas.thing("thing", shape)
            np.testing.assert_array_equal(canvas.instances, np.where(inside, 3000 + number, 0))
        canvas.thing("ground", shape)  # class 0 has no instances
        assert not canvas.labels.any() and not canvas.instances.any()


def test_streets_have_cityscapes_classes():
    names = class_names("groupdnet_cityscapes", 35)
    for seed in range(3):
        scene = sample_scene("street", 128, 256, 35, seed)
        assert {scene.names[c] for c in scene.present} == {names[c] for c in scene.present}
        assert {"road", "sky", "car", "building"} <= {names[c] for c in scene.present}


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
    for high, mode in ((254, "L"), (255, "L"), (256, "I;16"), (257, "I;16")):
        images.write_indices(tmp_path / "edge.png", np.array([[0, high]]))
        with Image.open(tmp_path / "edge.png") as written:
            assert written.mode == mode
        assert images.read_instances(tmp_path / "edge.png").tolist() == [[0, high]]
    with pytest.raises(ValueError, match="65536"):
        images.write_indices(tmp_path / "large.png", ids + 1)
    with pytest.raises(ValueError, match="got -1"):
        images.write_indices(tmp_path / "large.png", ids - 1)
    assert not (tmp_path / "large.png").exists()


@pytest.mark.parametrize(("bits", "byte", "levels"), [(2, 0x1B, [0, 1, 2, 3]), (4, 0x3A, [3, 10])])
def test_few_bits_of_grey_are_indices(tmp_path, bits, byte, levels):
    # Pillow writes no grey PNG of 2 or 4 bits: make one by hand.
    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", len(levels), 1, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(bytes([0, byte]))) + chunk(b"IEND", b"")
    (tmp_path / "grey.png").write_bytes(png)
    np.testing.assert_array_equal(images.read_labels(tmp_path / "grey.png", 16), [levels])


def test_resize_takes_pixel_centres(tmp_path):
    images.write_indices(tmp_path / "map.png", np.arange(10).reshape(2, 5))
    resized = images.read_labels(tmp_path / "map.png", 10, size=(3, 3))
    np.testing.assert_array_equal(resized, np.arange(10).reshape(2, 5)[[0, 1, 1]][:, [0, 2, 4]])


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
        ("unknown.png", "got 255; relabel unknown pixels"),
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
    batch = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    (picture,) = images.to_pictures(batch)
    assert picture.shape == (2, 5, 3)
    assert picture[0, 0].tolist() == [0, 128, 255]
    sheet = images.grid([[picture, picture], [picture]], gap=1)
    assert sheet.shape == (5, 11, 3)
    assert (sheet[3:, 6:] == 255).all()
    with pytest.raises(ValueError, match="NaN"):
        images.to_pictures(batch * float("nan"))


def test_landscapes_show_every_class():
    shown = np.zeros(8)
    area = np.zeros(8)
    for index in range(60):
        labels = GeneratedScenes(60, 64)[index]["labels"].numpy()
        counts = np.bincount(labels.ravel(), minlength=8)
        shown += counts > 0
        area += counts / labels.size / 60
    assert (shown >= 45).all(), dict(zip(LANDSCAPE, shown, strict=True))
    assert (area > 0.01).all() and area.max() < 0.5, dict(zip(LANDSCAPE, area, strict=True))


@pytest.mark.parametrize("size", [64, (48, 96), 200])
def test_generated_scenes_depend_on_seed_split_and_index_alone(size):
    forward = [GeneratedScenes(3, size, seed=5)[i]["image"] for i in range(3)]
    longer = GeneratedScenes(9, size, seed=5)
    for i in (2, 0, 1):
        assert torch.equal(longer[i]["image"], forward[i])
        assert torch.equal(longer[Draw(i, epoch=4)]["image"], forward[i])
    others = [GeneratedScenes(3, size, "val", seed=5), GeneratedScenes(3, size, seed=6)]
    for other in others:
        assert not torch.equal(other[0]["labels"], longer[0]["labels"])
    with pytest.raises(IndexError, match=r"expected 0\.\.2, got 3"):
        others[0][3]


def test_a_generated_scene_is_drawn_by_these_numbers():
    """Of sets that weights were trained and measured on: numpy's draws of seed, split and index."""
    seen = set()
    for number, split in enumerate(("train", "val", "test")):
        for index in (0, 2):
            r = np.random.default_rng((5, number, index))
            scene = sample_scene("landscape", 48, 96, 8, int(r.integers(2**62)))
            modes = draw_modes(r)
            picture = paint(scene.labels, scene.instances, modes, r)
            sample = GeneratedScenes(3, (48, 96), split, seed=5)[index]
            np.testing.assert_array_equal(sample["labels"], scene.labels)
            np.testing.assert_array_equal(sample["instances"], scene.instances)
            np.testing.assert_array_equal(sample["modes"], modes)
            np.testing.assert_array_equal(images.to_pictures(sample["image"][None])[0], picture)
            assert sample["name"] == f"{split}_{index:06d}"
            seen.add(picture.tobytes())
    assert len(seen) == 6


@pytest.mark.parametrize(("split", "pixels", "mean"), [
    ("train", [[[60, 141, 231], [67, 145, 232], [33, 126, 227]],
               [[95, 165, 235], [26, 84, 99], [238, 143, 29]],
               [[216, 187, 111], [233, 204, 128], [228, 199, 123]]], [155.795, 158.361, 143.72]),
    ("val", [[[0, 0, 20], [0, 0, 20], [0, 0, 20]], [[3, 0, 30], [3, 0, 30], [188, 216, 245]],
             [[231, 250, 55], [198, 120, 155], [203, 123, 156]]], [126.032, 114.477, 96.919]),
])
def test_generated_pictures_stay_what_they_were(split, pixels, mean):
    """Weights were trained and measured on them: colours, jitter, textures and rounding."""
    (picture,) = images.to_pictures(GeneratedScenes(1, (48, 96), split, seed=5)[0]["image"][None])
    assert np.abs(picture[::16, ::32].astype(int) - pixels).max() <= 1  # sines differ by machine
    np.testing.assert_allclose(picture.mean((0, 1)), mean, atol=0.05)


def test_a_generated_sample():
    sample = GeneratedScenes(1, (40, 56))[0]
    assert sample["image"].shape == (3, 40, 56) and sample["image"].dtype == torch.float32
    assert sample["image"].min() >= -1 and sample["image"].max() <= 1
    assert sample["labels"].shape == (40, 56) and sample["labels"].dtype == torch.uint8
    assert sample["instances"].shape == (40, 56) and sample["instances"].dtype == torch.int32
    assert sample["modes"].shape == (8,) and sample["modes"].dtype == torch.int64


def test_modes_are_uniform_and_independent():
    r = np.random.default_rng(0)
    modes = np.stack([draw_modes(r) for _ in range(4000)])
    for c in range(8):
        assert np.abs(np.bincount(modes[:, c], minlength=4) / 4000 - 0.25).max() < 0.03
        for other in range(c):
            pairs = np.bincount(modes[:, c] * 4 + modes[:, other], minlength=16) / 4000
            assert np.abs(pairs - 1 / 16).max() < 0.02


@pytest.mark.parametrize("changed", range(8))
def test_a_mode_paints_its_own_class_only(changed):
    scene = sample_scene("landscape", 64, 64, 8, seed=11)
    assert changed in scene.present
    modes = np.zeros(8, np.int64)
    before = paint(scene.labels, scene.instances, modes, np.random.default_rng(1))
    for mode in range(1, 4):
        modes[changed] = mode
        after = paint(scene.labels, scene.instances, modes, np.random.default_rng(1))
        differs = (before != after).any(-1)
        assert not differs[scene.labels != changed].any()
        assert differs[scene.labels == changed].mean() > 0.5


def test_fades_and_details_run_from_top_to_bottom():
    """Of the whole picture for stuff, of each instance for things."""
    sky, building = LANDSCAPE.index("sky"), LANDSCAPE.index("building")
    names = [[mode.name for mode in MODES[part]] for part in LANDSCAPE]
    modes = np.zeros(8, np.int64)
    modes[sky], modes[building] = names[sky].index("sunset"), names[building].index("plaster")
    labels = np.zeros((100, 64), np.int64)
    instances = labels.copy()
    labels[50:, :32], instances[50:, :32] = building, 1000 * building
    labels[30:80, 40:], instances[30:80, 40:] = building, 1000 * building + 1
    picture = paint(labels, instances, modes, np.random.default_rng(0)) / 255
    rows = picture[:50, :32].mean(1)  # of the sky; smoothed, for clouds are in it
    slope = (rows[40:].mean(0) - rows[:10].mean(0)) / 0.4  # over 40 of 100 rows
    np.testing.assert_allclose(slope, MODES["sky"][modes[sky]].fade, atol=0.25)
    roof, rim = (0.25, 0.22, 0.24), (0.93, 0.93, 0.90)
    for top, column in ((50, 0), (30, 40)):  # both 50 rows high: 7 of the roof, 2 or 3 of its rim
        for row, colour in ((0, roof), (6, roof), (8, rim)):
            np.testing.assert_allclose(picture[top + row, column], colour, atol=1 / 255)
        assert np.abs(picture[top + 12, column] - roof).max() > 0.1


def _iou(seen, wanted):
    pairs = torch.bincount(wanted.flatten().long() * 8 + seen.flatten(), minlength=64).view(8, 8)
    both = pairs.diag().double()
    return both / (pairs.sum(0) + pairs.sum(1) - both)


@pytest.mark.parametrize(("size", "least"), [(64, 0.88), (128, 0.92), (192, 0.92)])
def test_the_classifier_reads_held_out_scenes(size, least):
    batch = [GeneratedScenes(12, size, "test", seed=9)[i] for i in range(12)]
    images_, labels, modes = (torch.stack([s[key] for s in batch])
                              for key in ("image", "labels", "modes"))
    reading = SceneClassifier.shipped().read(images_, labels)
    assert _iou(reading.labels, labels).mean() > least
    shown = reading.modes >= 0
    for c in range(8):
        assert torch.equal(shown[:, c], (labels == c).flatten(1).any(1))
    assert (reading.modes == modes)[shown].double().mean() > 0.97
    assert reading.confidence[shown].mean() > 0.85


def test_the_classifier_says_what_it_sees_not_what_was_asked():
    sample = GeneratedScenes(2, 128, "test")[1]
    judge = SceneClassifier.shipped()
    asked = torch.full((1, 128, 128), LANDSCAPE.index("car"))
    reading = judge.read(sample["image"][None], asked)
    assert reading.modes[0].tolist() == [-1] * 6 + [int(reading.modes[0, 6])] + [-1]
    assert reading.confidence[0, 6] < 0.1
    assert _iou(reading.labels, sample["labels"][None])[0] > 0.9
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert _iou(judge.read(noise).labels, sample["labels"][None]).mean() < 0.3


def test_the_classifier_reads_the_likeliest_class_in_all_its_modes(monkeypatch):
    chance = torch.full((1, 1, 1, 8, 4), 0.3 / 24)
    chance[..., 2, :], chance[..., 5, :] = torch.tensor([0.27, 0.01, 0.01, 0.01]), 0.1
    monkeypatch.setattr(SceneClassifier, "log_probabilities", lambda self, images: chance.log())
    reading = SceneClassifier([]).read(torch.zeros(1, 3, 1, 1))
    assert reading.labels.item() == 5  # 0.4 of four modes, where 0.27 is the largest of one


@pytest.mark.parametrize(
    ("shape", "labels", "name"),
    [((3, 8, 8), None, "images"), ((1, 1, 8, 8), None, "images"), ((1, 3, 8, 8), (8, 8), "labels")],
)
def test_the_classifier_checks_shapes(shape, labels, name):
    given = None if labels is None else torch.zeros(labels, dtype=torch.long)
    with pytest.raises(ValueError, match=name):
        SceneClassifier.shipped().read(torch.zeros(shape), given)


def test_a_classifier_is_fitted_and_kept(tmp_path):
    fitted = SceneClassifier.fit(24, 100, sizes=(64,), epochs=6)
    fitted.save(tmp_path / "judge.npz")
    again = SceneClassifier.load(tmp_path / "judge.npz")
    sample = GeneratedScenes(1, 64, "val")[0]
    reading = again.read(sample["image"][None], sample["labels"][None])
    assert torch.equal(reading.labels, fitted.read(sample["image"][None]).labels)
    assert (reading.labels[0] == sample["labels"]).double().mean() > 0.5  # by chance: 1 / 8


@pytest.mark.parametrize(
    ("arguments", "name"), [((0,), "count"), ((1, 0), "size"), ((1, 8, "dev"), "split"),
                            ((1, 8, "val", -1), "seed")],
)
def test_bad_sets_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        GeneratedScenes(*arguments)
