"""Applications: what each changes and what it holds, its files, and one line for every mistake."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from smis_kernels import use_backend
from smis_models import cli, create_model
from smis_models.data import GeneratedScenes
from smis_models.io import images
from smis_models.io.animation import write_animation
from smis_models.io.checkpoint import save_checkpoint
from smis_models.synthesis import applications
from smis_models.synthesis.codes import draw_code, interpolate, resample_class
from smis_models.synthesis.edits import painted, parse_takes, relabelled
from smis_models.synthesis.features import FeatureClusters
from smis_models.synthesis.pictures import read_pictures
from smis_models.synthesis.scene import (
    Scene,
    calibrate,
    sample_scenes,
    semantics,
)
from smis_models.synthesis.shapes import ShapeLibrary, exchange_shape, regions

TINY = {"ngf": 8, "nef": 16, "image_size": (64, 64), "upsampling": "normal", "init_gain": 1.0}
PIX2PIXHD = {"ngf": 4, "nef": 4, "blocks": 1, "image_size": (64, 128), "init_gain": 1.0}


@pytest.fixture(scope="module")
def model():
    made = create_model("groupdnet_deepfashion", **TINY).eval()
    layout = _scene(0)
    calibrate(made, semantics(made, layout), draw_code(made, 0))
    return made


def _scene(index):
    sample = GeneratedScenes(4, 64, "test")[index]
    return Scene(sample["name"], sample["labels"].numpy().astype(np.int64), None)


def _photo(index):
    sample = GeneratedScenes(4, 64, "test")[index]
    return sample["image"][None], sample["labels"][None].long()


def _model_paints(model, layout, z):
    with torch.no_grad():
        return images.to_pictures(model(semantics(model, layout), z))[0]


def _close(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def test_the_encoder_serves_at_test_time(model):
    image, labels = _photo(0)
    mean, logvar = model.encoder.encode(image, labels)
    assert torch.equal(applications.encode(model, image, labels), mean)
    drawn = applications.encode(model, image, labels, seed=1)
    assert torch.equal(drawn, applications.encode(model, image, labels, seed=1))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, mean + noise * logvar.exp().sqrt())
    bare = type(model)(model.name, model.preset, {"generator": model.generator})
    with pytest.raises(ValueError, match="model: expected one with an encoder"):
        applications.encode(bare, image, labels)


def test_mixture_takes_each_class_from_its_picture(model):
    codes = [applications.encode(model, *_photo(k)) for k in range(3)]
    layout = _scene(3)
    frames = list(applications.mix(model, layout, codes, {2: 1, 4: 2}, ["a", "b", "c"]))
    assert [frame.caption for frame in frames] == [
        "all from a", "class 2 from b", "class 4 from c"]
    z = codes[0].clone()
    for index, source in ((2, 1), (4, 2)):
        channels = model.generator.class_channels(index)
        z[:, channels] = codes[source][:, channels]
    assert _close(frames[-1].picture, _model_paints(model, layout, z))
    every = list(applications.mix(model, layout, codes))
    area = np.bincount(layout.labels.ravel(), minlength=8)
    largest = [c for c in np.argsort(-area, kind="stable") if area[c]]
    assert [frame.caption for frame in every] == ["all from picture 0", *(
        f"class {c} from picture {1 + k % 2}" for k, c in enumerate(largest))]
    others = applications.mixed_code(model, codes, {2: 1}, rest=2)
    expected = codes[2].clone()
    expected[:, model.generator.class_channels(2)] = codes[1][:, model.generator.class_channels(2)]
    assert torch.equal(others, expected)
    with pytest.raises(ValueError, match=r"take: expected a picture 0\.\.2 for class 1, got 7"):
        list(applications.mix(model, layout, codes, {1: 7}))


def test_edits_keep_the_codes(model):
    layout, z = _scene(0), draw_code(model, 3)
    edited = relabelled(painted(layout, "4:8,8,24,30", 8), "0=1", 8)
    frames = list(applications.edit(model, [layout, edited, layout], z))
    assert _close(frames[0].picture, _model_paints(model, layout, z))
    assert _close(frames[1].picture, _model_paints(model, edited, z))
    assert _close(frames[2].picture, frames[0].picture)
    assert not np.array_equal(frames[0].picture, frames[1].picture)


def test_morphing_is_spherical_between_codes(model):
    layout, start, end = _scene(0), draw_code(model, 0), draw_code(model, 1)
    frames = list(applications.morph(model, layout, start, end, 5))
    assert len(frames) == 5
    for frame, t in zip(frames, (0, 0.25, 0.5, 0.75, 1), strict=True):
        assert _close(frame.picture, _model_paints(model, layout, interpolate(start, end, t, 8)))
    held = list(applications.morph(model, layout, start, end, 2, classes=[3]))
    z = applications.mixed_code(model, [start, end], {3: 1})
    assert _close(held[1].picture, _model_paints(model, layout, z))
    with pytest.raises(ValueError, match="steps: expected a whole number of at least 2"):
        list(applications.morph(model, layout, start, end, 1))


def test_one_class_is_drawn_anew(model):
    layout = _scene(0)
    index = layout.present[1]
    frames = list(applications.resample(model, layout, index, 3, seed=2))
    assert len(frames) == 4
    assert len({frame.picture.tobytes() for frame in frames}) == 4
    start = draw_code(model, 2)
    for k, frame in enumerate(frames):
        z = resample_class(model, start, index, 2 + k) if k else start
        assert _close(frame.picture, _model_paints(model, layout, z))
    absent = Scene("flat", np.zeros((64, 64), np.int64), None)
    with pytest.raises(ValueError, match=r"class: expected one of flat, 0; got 5"):
        list(applications.resample(model, absent, 5, 1))


def test_no_code_that_is_given_is_written_to(model):
    codes, layout = [draw_code(model, k) for k in range(3)], _scene(0)
    before = [code.clone() for code in codes]
    list(applications.mix(model, layout, codes))
    list(applications.morph(model, layout, *codes[:2], 3, classes=[1, 4]))
    list(applications.resample(model, layout, layout.present[0], 1, z=codes[2]))
    assert all(map(torch.equal, codes, before))


def test_the_code_that_is_given_is_kept_whatever_the_seed(model):
    """A picture's, of which one class is drawn anew, and with a shape that is exchanged."""
    layout, z = _scene(0), draw_code(model, 9)
    index = layout.present[0]
    library = ShapeLibrary.from_scenes([_scene(k) for k in range(4)])
    target = next(c for c in layout.present if library.shapes.get(c))
    for frames, changed in (
            (applications.resample(model, layout, index, 1, seed=2, z=z), index),
            (applications.exchange(model, layout, target, library, 1, seed=2, z=z), target)):
        for frame, code in zip(frames, (z, resample_class(model, z, changed, 3)), strict=True):
            assert _close(frame.picture, _model_paints(model, frame.scene, code))


@pytest.mark.parametrize("name", ["spade_coco_vae", "bicyclegan_deepfashion"])
def test_models_without_class_codes_are_named(name):
    plain = create_model(name, ngf=4, image_size=(64, 64), classes=8, dont_care=None,
                         instance_edge=False).eval()
    with pytest.raises(ValueError, match=f"a code for each class.*got {name}"):
        list(applications.resample(plain, _scene(0), 0, 1))
    z = [draw_code(plain, seed) for seed in range(2)]
    assert len(list(applications.morph(plain, _scene(0), *z, 3))) == 3


def test_instance_features_of_pix2pixhd():
    painter = create_model("pix2pixhd_cityscapes_features", **PIX2PIXHD).eval()
    (layout,) = sample_scenes(painter.preset, 1)
    instance = int(layout.instances[layout.instances >= 1000][0])
    r = np.random.default_rng(0)
    clusters = FeatureClusters({c: r.normal(size=(4, 3)).astype(np.float32) for c in range(35)})
    frames = list(applications.edit_features(painter, layout, clusters, instance, seed=1))
    assert len(frames) == 4
    assert len({frame.picture.tobytes() for frame in frames}) == 4
    ids = torch.from_numpy(layout.instances)[None]
    planes = clusters.sample(ids, seed=1, chosen={instance: 2})
    with torch.no_grad():
        expected = painter(semantics(painter, layout), planes)
    assert _close(frames[2].picture, images.to_pictures(expected)[0])
    for samples, shown in ((2, 2), (9, 4)):  # there are four clusters
        some = list(applications.edit_features(painter, layout, clusters, instance, 1, samples))
        assert [f.picture.tobytes() for f in some] == [f.picture.tobytes() for f in frames[:shown]]
    with pytest.raises(ValueError, match="chosen: expected instances of the map, got 99999"):
        list(applications.edit_features(painter, layout, clusters, 99999))


def _boxes():
    """Two squares of class 1 on a ground of class 0 over a floor of class 2."""
    labels = np.zeros((16, 20), np.int64)
    labels[12:] = 2
    labels[6:12, 3:7] = labels[9:12, 12:15] = 1
    ids = labels.copy()
    ids[6:12, 3:7], ids[9:12, 12:15] = 1000, 1001
    return labels, ids


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_shape_is_exchanged_and_the_hole_filled(with_ids):
    labels, ids = _boxes()
    layout = Scene("boxes", labels, ids if with_ids else None)
    assert sorted(int(mask.sum()) for mask in regions(layout, 1)) == [9, 24]
    library = ShapeLibrary.from_scenes([layout])
    shapes = sorted(mask.shape for mask in library.of(1))
    assert shapes == [(3, 3), (6, 4)]
    triangle = np.tril(np.ones((3, 3), bool))
    changed = exchange_shape(layout, 1000 if with_ids else 1, triangle)
    assert changed.labels[11, 2:8].tolist() == [1] * 6  # its lower edge, scaled to height 6
    assert changed.labels[6, 2:8].tolist() == [1, 1, 0, 0, 0, 0]  # the hole took what is around
    assert (changed.labels[9:12, 12:15] == 1).all()  # the other stays
    assert (changed.labels[12:] == 2).all()
    if with_ids:
        assert set(np.unique(changed.instances)) == {0, 2, 1000, 1001}
        assert ((changed.instances == 1000) == ((changed.labels == 1) & (
            changed.instances != 1001))).all()
    with pytest.raises(ValueError, match="library: expected a shape of class 2"):
        library.of(2)  # it touches the border
    with pytest.raises(ValueError, match="exchange: expected a class or an instance of boxes"):
        exchange_shape(layout, 7, triangle)


@pytest.mark.parametrize("right", [False, True])
def test_a_wide_shape_is_cut_off_at_the_border(right):
    labels = np.zeros((12, 9), np.int64)
    labels[4:10, :2] = 1
    shape = np.array([[1, 1, 1, 0, 1]] * 3, bool)  # twice as large, its middle at column 1
    if right:
        labels, shape = labels[:, ::-1].copy(), shape[:, ::-1]
    changed = exchange_shape(Scene("edge", labels, None), 1, shape).labels
    expected = np.zeros((12, 9), np.int64)
    expected[4:10, :6] = [1, 1, 0, 0, 1, 1]
    np.testing.assert_array_equal(changed[:, ::-1] if right else changed, expected)


def test_shape_and_texture_vary(model):
    layout = _scene(0)
    library = ShapeLibrary.from_scenes([_scene(k) for k in range(4)])
    target = next(c for c in layout.present if library.shapes.get(c))
    frames = list(applications.exchange(model, layout, target, library, 3, seed=1))
    assert len(frames) == 4
    assert len({frame.scene.labels.tobytes() for frame in frames}) > 1
    known = library.of(target)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1)).tolist()
    for k, frame in enumerate(frames[1:], 1):
        shape = known[order[(k - 1) % len(order)]]
        np.testing.assert_array_equal(
            frame.scene.labels, exchange_shape(layout, target, shape).labels)
        z = resample_class(model, draw_code(model, 1), target, 1 + k)
        assert _close(frame.picture, _model_paints(model, frame.scene, z))
    held = list(applications.exchange(model, layout, target, library, 1, seed=1, texture=False))
    assert _close(held[1].picture, _model_paints(model, held[1].scene, draw_code(model, 1)))


def test_regions_touch_at_corners_and_have_a_least_size():
    corners = Scene("corners", np.eye(4, dtype=np.int64), None)
    assert [int(mask.sum()) for mask in regions(corners, 1)] == [4]
    labels = np.zeros((50, 80), np.int64)  # of which two pixels are the 2000th part
    labels[10, 10], labels[20, 20:22], labels[49, 3:9] = 1, 1, 1
    assert [mask.shape for mask in ShapeLibrary.from_scenes([Scene("s", labels, None)]).of(1)] == [
        (1, 2)]


def test_an_instance_is_a_shape_of_the_class_alone():
    labels, ids = _boxes()
    ids[12, 3:7] = 1000  # of another class below
    assert sorted(int(mask.sum()) for mask in regions(Scene("s", labels, ids), 1)) == [9, 24]


def test_unknown_pixels_of_pictures_may_be_given_a_class(model, tmp_path):
    images.write_png(tmp_path / "images/a.png", np.zeros((64, 64, 3), np.uint8))
    images.write_indices(tmp_path / "labels/a.png", np.full((64, 64), 255))
    folders = [tmp_path / "images"], [tmp_path / "labels"]
    (picture,) = read_pictures(*folders, model.preset, unknown=6)
    assert bool((picture.labels == 6).all())
    with pytest.raises(images.ImageError, match="got 255"):
        read_pictures(*folders, model.preset)


@pytest.mark.parametrize("turns", range(4))
def test_a_shape_that_a_side_cuts_off_is_none(turns):
    labels = np.zeros((16, 16), np.int64)
    labels[:4, 6:10] = 1
    library = ShapeLibrary.from_scenes([Scene("cut", np.rot90(labels, turns).copy(), None)])
    assert 1 not in library.shapes


def test_edits_in_words_fill_these_pixels():
    labels, ids = _boxes()
    edited = painted(Scene("boxes", labels, ids), "5:2,4,7,10", 8)
    inside = np.zeros((16, 20), bool)
    inside[2:7, 4:10] = True
    np.testing.assert_array_equal(edited.labels, np.where(inside, 5, labels))
    np.testing.assert_array_equal(edited.instances, np.where(inside, 5, ids))
    assert (painted(Scene("boxes", labels, ids), "5:0,0,16,20", 8).labels == 5).all()
    edited = relabelled(Scene("boxes", labels, ids), "1=6", 8)
    np.testing.assert_array_equal(edited.labels, np.where(labels == 1, 6, labels))
    np.testing.assert_array_equal(edited.instances, np.where(labels == 1, 6, ids))


def test_a_picture_is_taken_by_its_name_before_its_number():
    assert parse_takes(["1=1", "0=2"], ["1", "0", "c"], ["x", "y"]) == {1: 0, 0: 2}


def test_untrained_weights_get_these_deviations():
    made = create_model("groupdnet_deepfashion", **TINY).eval()
    planes, z = semantics(made, _scene(0)), draw_code(made, 0)
    calibrate(made, planes, z)
    found = {}

    def look(name):
        return lambda _, __, out: found.setdefault(name, []).append(float(
            out.std((0, 2, 3)).median()))

    for name, module in made.generator.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("mlp_gamma", "mlp_beta", "conv_img"):
            module.register_forward_hook(look(leaf))
    with use_backend("reference"), torch.no_grad():
        made.generator(planes, z)
    for leaf, deviation in (("mlp_gamma", 0.4), ("mlp_beta", 0.8), ("conv_img", 0.6)):
        assert np.median(found[leaf]) == pytest.approx(deviation, rel=0.15), leaf
    assert all(not module.training for module in made.generator.modules())
    norms = [m for m in made.generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}  # as training goes on with them


@pytest.mark.parametrize(("format", "suffix"), [("gif", ".gif"), ("apng", ".png"),
                                                ("webp", ".webp")])
def test_animated_files(format, suffix, tmp_path):
    noise = [np.random.default_rng(k).integers(0, 256, (8, 12, 3), np.uint8) for k in range(3)]
    with Image.open(write_animation(tmp_path / "noise", noise, format, seconds=2.01)) as image:
        assert image.info.get("loop") == 0  # without end
        for k, frame in enumerate(noise):
            image.seek(k)
            shown = np.asarray(image.convert("RGB"))
            assert image.info["duration"] == pytest.approx(4020 if k == 2 else 2010, abs=1e-6)
            if format != "gif":  # without loss
                np.testing.assert_array_equal(shown, frame)
    (tmp_path / f"noise{suffix}").unlink()
    frames = [np.full((8, 12, 3), 60 * k, np.uint8) for k in range(3)]
    path = write_animation(tmp_path / "a", frames, format, seconds=0.2)
    assert path.suffix == suffix
    with Image.open(path) as image:
        assert image.n_frames == 3
        assert image.size == (12, 8)
        image.seek(2)
        assert abs(int(np.asarray(image.convert("RGB"))[0, 0, 0]) - 120) <= 4
    for bad, message in ((([], format), "frames: expected at least one"),
                         ((frames, "mp4"), "animation: expected one of gif, apng, webp"),
                         (([frames[0], frames[0][:4]], format), "all of one size")):
        with pytest.raises(ValueError, match=message):
            write_animation(tmp_path / "b", *bad)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: painted(x, "1:2,3", 8), "paint: expected CLASS:TOP"),
        (lambda x: painted(x, "9:0,0,1,1", 8), r"paint: expected a class 0\.\.7, got 9"),
        (lambda x: painted(x, "1:0,0,99,1", 8), "paint: expected a box inside 16x20"),
        (lambda x: painted(x, "1:3,0,3,1", 8), "paint: expected a box inside 16x20"),
        (lambda x: painted(x, "1:0,4,1,4", 8), "paint: expected a box inside 16x20"),
        (lambda x: relabelled(x, "5", 8), "relabel: expected FROM=TO"),
        (lambda x: relabelled(x, "5=1", 8), r"relabel: expected a class of boxes, 0, 1, 2; got 5"),
        (lambda x: parse_takes(["1:2"], ["a"], ["x", "y"]), "take: expected CLASS=PICTURE"),
        (lambda x: parse_takes(["1=b"], ["a"], ["x", "y"]), "take: expected a picture"),
        (lambda x: parse_takes(["1=²"], ["a"], ["x", "y"]), "take: expected a picture"),
    ],
)
def test_edits_in_words_refuse_others(call, message):
    with pytest.raises(ValueError, match=message):
        call(Scene("boxes", *_boxes()))


@pytest.fixture
def smis(monkeypatch, capsys, tmp_path, model):
    """Run a command on the tiny model and a scene; its exit code, stdout and stderr."""
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    save_checkpoint(model, tmp_path / "tiny.safetensors")
    for index in range(3):
        sample = GeneratedScenes(4, 64, "test")[index]
        images.write_indices(tmp_path / f"labels/{index}.png", sample["labels"].numpy())
        (picture,) = images.to_pictures(sample["image"][None])
        images.write_png(tmp_path / f"images/{index}.png", picture)

    def run(command, *arguments):
        words = [str(a).replace("DIR", str(tmp_path)) for a in arguments]
        monkeypatch.setattr("sys.argv", [
            "smis", command, "--model", "groupdnet_deepfashion", "--checkpoint",
            str(tmp_path / "tiny.safetensors"), "--labels", str(tmp_path / "labels/0.png"),
            "--out", str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


PHOTOS = ("--images", "DIR/images", "--image-labels", "DIR/labels")
ONE = ("--images", "DIR/images/1.png", "--image-labels", "DIR/labels/1.png")
TWO = (*ONE, "--images", "DIR/images/2.png", "--image-labels", "DIR/labels/2.png")


@pytest.mark.parametrize(
    ("command", "arguments", "name", "frames"),
    [
        ("mix", (*PHOTOS, "--take", "0=1", "--take", "3=2"), "mix", 3),
        ("edit", ("--relabel", "0=1", "--paint", "3:2,2,20,20", "--to", "DIR/labels/1.png", *ONE),
         "edit", 4),
        ("edit", ("--exchange", "5", "--library", "DIR/labels", "--shapes", "2"), "exchange", 3),
        ("morph", ("--steps", "3"), "morph", 3),
        ("morph", ("--steps", "3", "--class", "0", *TWO), "morph", 3),
        ("resample", ("--class", "0", "--samples", "2", "--animation", "webp"), "resample", 3),
    ],
)
def test_commands_write_pictures_and_an_animation(smis, tmp_path, totals, command, arguments, name,
                                                  frames):
    code, out, err = smis(command, *arguments)
    assert code == 0, err
    assert totals == [(frames, frames)]
    suffix = "webp" if "webp" in arguments else "gif"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(f"{name}_{k}.png" for k in range(frames)), f"{name}_grid.png", f"{name}.{suffix}"}
    assert f"{frames} frames" in out
    with Image.open(tmp_path / f"out/{name}.{suffix}") as image:
        assert getattr(image, "n_frames", 1) > 1


def test_unknown_pixels_of_every_map_get_the_class_that_is_given(smis, tmp_path):
    """Of a picture's map and of an edited one as of the one that is painted."""
    images.write_indices(tmp_path / "odd.png", np.full((64, 64), 255))
    for command, *arguments in (
            ("resample", "--class", 0, "--samples", 1, *ONE[:3], "DIR/odd.png"),
            ("edit", "--to", "DIR/odd.png")):
        code, _, err = smis(command, *arguments)
        assert code == 2 and "got 255; give the class of unknown pixels (--unknown)" in err
        code, _, err = smis(command, *arguments, "--unknown", 6)
        assert code == 0, err


def test_a_morph_leads_from_one_seed_to_the_next(smis, tmp_path, model):
    code, _, err = smis("morph", "--steps", 2, "--seed", 4)
    assert code == 0, err
    scene = Scene("0", images.read_labels(tmp_path / "labels/0.png", 8), None)
    for k in range(2):
        found = images.read_picture(tmp_path / f"out/morph_{k}.png")
        assert _close(found, _model_paints(model, scene, draw_code(model, 4 + k)))


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("mix", ("--images", "DIR/images", "--image-labels", "DIR/labels/0.png"),
         r"image-labels: no map of scene '1'"),
        ("mix", ("--images", "DIR/no", "--image-labels", "DIR/labels"), r"images: .*not exist"),
        ("mix", (*PHOTOS, "--take", "9=1"), r"take: expected a class 0\.\.7, got 9"),
        ("edit", (), r"edit: expected --relabel, --paint or --to"),
        ("edit", ("--exchange", "5"), r"library: expected a folder"),
        ("edit", ("--exchange", "77", "--library", "DIR/labels"), r"exchange: expected a class"),
        ("edit", ("--relabel", "0=1", "--features", "x.npz"), r"features: this model reads no"),
        ("morph", ONE, r"images: expected two pictures, got 1"),
        ("morph", ("--animation", "mp4"), r"animation: expected one of"),
        ("resample", (), r"class, instance: expected one of them"),
        ("resample", ("--class", "9"), r"class: expected a class 0\.\.7, got 9"),
        ("resample", ("--instance", "3"), r"instance: this model reads no instance features"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(smis, tmp_path, command, arguments, message):
    code, _, err = smis(command, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()
