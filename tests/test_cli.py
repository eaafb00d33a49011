"""The command line: what it writes, what it says, and one line for every mistake."""

import functools
import re
import sys

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from smis_kernels import use_backend
from smis_kernels.modules.spade import CGNorm
from smis_models import cli, create_model, shipped_weights
from smis_models.app import demo
from smis_models.app.demo import strips
from smis_models.data import GeneratedScenes
from smis_models.data.scenes import sample_scene
from smis_models.families import ADE20K, CITYSCAPES, DEEPFASHION
from smis_models.io import images
from smis_models.synthesis import codes
from smis_models.synthesis import scene as synthesis
from smis_models.synthesis.features import FeatureClusters
from smis_models.training import Progress

SMALL = {
    "groupdnet_deepfashion": {"ngf": 8, "nef": 8, "image_size": (64, 64), "upsampling": "normal"},
    "groupdnet_cityscapes": {"ngf": 70, "nef": 35, "image_size": (64, 128), "upsampling": "normal"},
    "spade_ade20k": {"ngf": 4, "hidden": 16, "image_size": (64, 64)},
    "pix2pixhd_cityscapes": {"ngf": 4, "blocks": 1, "image_size": (64, 128)},
    "pix2pixhd_cityscapes_features": {"ngf": 4, "nef": 4, "blocks": 1, "image_size": (64, 128)},
}


def _small_model(name, checkpoint=None, **options):
    return create_model(name, checkpoint, **{**options, **SMALL.get(name, {})})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cli.common, "create_model", _small_model)
    monkeypatch.setattr(cli.synthesis, "create_model", _small_model)


@pytest.fixture
def smis(monkeypatch, capsys):
    """Run the command line; its exit code, stdout and stderr."""
    # The setting is the whole process's; the other tests are to run without it.
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["smis", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def scene(tmp_path):
    """A folder with label and instance maps of two street scenes and two people."""
    for seed in range(2):
        street = sample_scene("street", 48, 96, 35, seed)
        images.write_indices(tmp_path / f"street/label/{seed}_labelIds.png", street.labels)
        images.write_indices(tmp_path / f"street/inst/{seed}_instanceIds.png", street.instances)
        person = sample_scene("person", 64, 64, 8, seed)
        images.write_indices(tmp_path / f"person/{seed}.png", person.labels)
    return tmp_path


def _read(path):
    return np.asarray(Image.open(path))


def test_list_names_every_model(smis):
    code, out, _ = smis("list")
    assert code == 0
    for name in ("groupdnet_deepfashion", "groupdnet_cityscapes", "groupdnet_ade20k"):
        assert name[:12] in out


def test_info_reports_the_libraries(smis):
    code, out, _ = smis("info")
    assert code == 0
    assert "native libraries" in out


def test_synthesize_writes_samples_and_a_grid(smis, small, scene, totals, tmp_path):
    arguments = ("--model", "groupdnet_deepfashion", "--labels", scene / "person", "--samples", 2)
    code, out, _ = smis("synthesize", *arguments, "--out", tmp_path / "a")
    assert code == 0
    assert totals == [(4, 4)]
    assert "random" in out.lower()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "0_0.png", "0_1.png", "1_0.png", "1_1.png", "grid.png"
    }
    first, second = (_read(tmp_path / f"a/0_{k}.png") for k in range(2))
    assert first.shape == (64, 64, 3)
    assert first.std() > 10
    assert not np.array_equal(first, second)
    smis("synthesize", *arguments, "--out", tmp_path / "b")
    assert np.array_equal(first, _read(tmp_path / "b/0_0.png"))


def test_pictures_of_an_earlier_run_with_more_samples_go(tmp_path):
    for name in ("a_0", "a_1", "a_2", "a_3", "b_2"):
        images.write_png(tmp_path / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    Image.new("RGB", (8, 8)).save(tmp_path / "a_7.png")  # somebody else's
    cli.synthesis._remove_older(cli.synthesis._numbered, tmp_path / "a", 2)
    assert {path.stem for path in tmp_path.iterdir()} == {"a_0", "a_1", "b_2", "a_7"}


def test_a_checkpoint_is_used_as_it_is(smis, small, scene, tmp_path):
    model = _small_model("groupdnet_deepfashion", seed=5, init_gain=1.0).eval()
    torch.save(model.generator.state_dict(), tmp_path / "latest_net_G.pth")
    code, out, _ = smis(
        "synthesize", "--model", "groupdnet_deepfashion", "--labels", scene / "person/0.png",
        "--checkpoint", tmp_path / "latest_net_G.pth", "--out", tmp_path / "out", "--seed", 3,
    )
    assert code == 0
    assert "random" not in out.lower()
    (layout,) = synthesis.read_scenes(scene / "person/0.png", None, model.preset)
    with torch.no_grad():
        expected = images.to_pictures(
            model(synthesis.semantics(model, layout), codes.draw_code(model, 3)))
    np.testing.assert_allclose(_read(tmp_path / "out/0_0.png").astype(int), expected[0], atol=1)


def test_samples_are_of_the_next_seeds(smis, small, scene, tmp_path):
    given = ("synthesize", "--model", "groupdnet_deepfashion", "--labels", scene / "person",
             "--checkpoint", tmp_path / "latest_net_G.pth")
    model = _small_model("groupdnet_deepfashion", seed=5, init_gain=1.0)
    torch.save(model.generator.state_dict(), tmp_path / "latest_net_G.pth")
    for out, options in (("three", ("--samples", 3, "--seed", 7)), ("one", ("--seed", 9))):
        code, _, error = smis(*given, *options, "--out", tmp_path / out)
        assert code == 0, error
    for name in ("0", "1"):
        assert np.array_equal(_read(tmp_path / f"three/{name}_2.png"),
                              _read(tmp_path / f"one/{name}_0.png"))
        assert not np.array_equal(_read(tmp_path / f"three/{name}_2.png"),
                                  _read(tmp_path / f"three/{name}_1.png"))


def test_options_of_an_evaluation_reach_it(smis, tmp_path, monkeypatch):
    """Each option by itself: what is measured with, and what the record says."""
    asked = {}

    def measured(model, scenes, found, protocol, **given):
        asked.update(scenes=scenes, metrics=found, protocol=protocol, **given)
        raise ValueError("enough")

    monkeypatch.setattr(cli.evaluate.metrics, "evaluate", measured)
    code, _, error = smis(
        "evaluate", "--model", "groupdnet_scenes", "--dataset", "scenes", "--count", 7, "--split",
        "test", "--protocol", "one-layout-n100-m19", "--layouts", 3, "--samples", 6, "--pairs", 5,
        "--mask-mode", "spatial", "--dont-care", "count", "--distance", "random-vgg", "--distance",
        "pixel", "--distance", "pixel", "--segmenter", "scenes", "--seed", 8, "--out",
        tmp_path / "e.json")
    assert (code, error) == (2, "error: enough\n")
    diverse = asked["protocol"].diversity
    assert (diverse.layouts, diverse.samples, diverse.pairs, diverse.mask_mode, diverse.pairing
            ) == (3, 6, 5, "spatial", "random")
    assert (asked["protocol"].dont_care, asked["seed"]) == ("count", 8)
    assert [type(distance).__name__ for distance in asked["metrics"].distances] == [
        "LPIPS", "PixelDistance"]
    assert asked["metrics"].distances[0].facts()["trunk"] == "VGG16"
    assert asked["metrics"].segmenter is cli.evaluate.metrics.scene_labels
    assert asked["checkpoint"] == shipped_weights("groupdnet_scenes")
    source = asked["scenes"]
    assert (len(source), source.used()["split"]) == (7, "held out")
    expected = GeneratedScenes(7, 128, "test")[6]
    np.testing.assert_array_equal(source.scene(6)[0].labels, expected["labels"])
    torch.testing.assert_close(source.scene(6)[1][0], expected["image"])


def test_an_evaluations_labels_are_read_and_counted_as_asked(small, smis, tmp_path, monkeypatch):
    """The class of 255 reaches files of either kind; --dont-care count leaves no class out."""
    asked = {}

    def measured(model, scenes, found, protocol, **given):
        asked.update(scenes=scenes, rule=found.rule, **given)
        raise ValueError("enough")

    monkeypatch.setattr(cli.evaluate.metrics, "evaluate", measured)
    images.write_indices(tmp_path / "data/val/labels/a.png", np.full((64, 64), 255))
    images.write_png(tmp_path / "data/val/images/a.png", np.zeros((64, 64, 3), np.uint8))
    for counted, left_out, *source in (
            ("count", frozenset(), "--labels", tmp_path / "data/val/labels"),
            ("ignore", frozenset({0}), "--dataset", "folder", "--root", tmp_path / "data")):
        code, _, error = smis(
            "evaluate", "--model", "spade_ade20k", *source, "--unknown", 7, "--distance", "none",
            "--segmenter", "scenes", "--dont-care", counted, "--out", tmp_path / "e.json")
        assert (code, error) == (2, "error: enough\n")
        assert (np.asarray(asked["scenes"].scene(0)[0].labels) == 7).all()
        assert asked["rule"].ignored == left_out


def test_a_chosen_model_is_of_the_seed_and_evaluates(small):
    made = cli.common.chosen("groupdnet_deepfashion", None, seed=5).load()
    assert not any(module.training for module in made.modules())
    expected = create_model("groupdnet_deepfashion", seed=5, init_gain=1.0,
                            **SMALL["groupdnet_deepfashion"]).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in made.state_dict().items())


@pytest.mark.parametrize("dataset", ["ade20k", "coco_stuff", "cityscapes"])
def test_doctor_keeps_the_data_sets_class_of_unknown_pixels(dataset, smis, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli.data, "find_splits", lambda *_, **__: {})
    monkeypatch.setattr(cli.data, "examine", lambda _, rule, **__: asked.append(rule) or 1 / 0)
    known = cli.data.LABEL_RULES[dataset]
    for given, unknown in (((), known.unknown), (("--unknown", 3), 3)):
        words = ["doctor", tmp_path, "--dataset", dataset, "--classes", 190, *given]
        monkeypatch.setattr("sys.argv", ["smis", *map(str, words)])
        with pytest.raises(ZeroDivisionError):
            cli.main()
        assert asked.pop() == cli.data.LabelRule(190, unknown)


def test_seeds_reach_the_drawing_of_instance_features(small, smis, scene, tmp_path, monkeypatch):
    seeds = []

    def drawn(_, instances, *, seed, **__):
        seeds.append(seed)
        return torch.zeros(1, 3, *instances.shape[1:])

    clusters = FeatureClusters({k: np.zeros((2, 3), np.float32) for k in range(35)})
    monkeypatch.setattr(FeatureClusters, "sample", drawn)
    given = ("--model", "pix2pixhd_cityscapes_features", "--labels",
             scene / "street/label/0_labelIds.png", "--instances",
             scene / "street/inst/0_instanceIds.png", "--features",
             clusters.save(tmp_path / "f.npz"), "--seed", 9, "--out", tmp_path / "out")
    for words in (("resample", "--instance", 7), ("edit", "--paint", "7:0,0,8,8")):
        code, _, error = smis(*words, *given)
        assert code == 0, error
        assert set(seeds) == {9}
        seeds.clear()


def test_written_scenes_are_of_the_seed(smis, tmp_path):
    code, _, error = smis("scenes", tmp_path / "set", "--count", 2, "--held-out", 1, "--size", 32,
                          "--seed", 5)
    assert code == 0, error
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            drawn = GeneratedScenes(count, 32, split, seed=5)[i]
            np.testing.assert_array_equal(
                _read(tmp_path / f"set/{split}/labels/{drawn['name']}.png"), drawn["labels"])


def test_instances_are_matched_by_scene_and_keep_sixteen_bits(scene):
    preset = _small_model("groupdnet_cityscapes", part="generator", device="meta").preset
    folder = scene / "street"
    layouts = synthesis.read_scenes(folder / "label", folder / "inst", preset)
    assert [layout.name for layout in layouts] == ["0", "1"]
    for layout in layouts:
        assert layout.labels.shape == layout.instances.shape == (64, 128)
        assert layout.instances.max() >= 26000
        classes = np.where(
            layout.instances < 1000, layout.instances, layout.instances // 1000)
        np.testing.assert_array_equal(classes, layout.labels)


def test_a_slice_of_scenes_is_read_alike(tmp_path):
    preset = _small_model("groupdnet_deepfashion", part="generator", device="meta").preset
    for k in range(3):
        images.write_indices(tmp_path / f"{k}.png", np.full((64, 64), 255 if k else 1))
    names = tuple("abcdefgh")
    scenes = synthesis.read_scenes(tmp_path, None, preset, 5, names)
    assert [(x.name, x.present, x.class_name(5)) for x in scenes[1:]] == [
        ("1", [5], "f"), ("2", [5], "f")]


@pytest.fixture
def bad(scene):
    """Files that are not what they are given as."""
    (scene / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(scene / "rgb.png")
    images.write_indices(scene / "nine.png", np.full((8, 8), 9))
    images.write_indices(scene / "unknown.png", np.full((8, 8), 255))
    torch.save({"fc.weight": torch.zeros(3)}, scene / "other.pth")
    torch.save({"code": functools.partial(print, "run")}, scene / "code.pth")
    (scene / "empty").mkdir()
    return scene


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--labels": "text.png"}, r"text\.png: cannot be read as an image"),
        ({"--labels": "rgb.png"}, r"rgb\.png: expected one index per pixel"),
        ({"--labels": "nine.png"}, r"nine\.png: expected labels 0\.\.7, got 9"),
        ({"--labels": "unknown.png"}, r"unknown\.png: .*got 255; .*--unknown"),
        ({"--labels": "absent.png"}, r"labels: .*absent\.png does not exist"),
        ({"--labels": "empty"}, r"labels: no .*\.png.* in .*empty"),
        ({"--unknown": "8"}, r"unknown: expected a class 0\.\.7, got 8"),
        ({"--model": "pix3pix"}, r"model: expected one of .*; got 'pix3pix'"),
        ({"--checkpoint": "absent.pth"}, r"checkpoint: .*absent\.pth does not exist"),
        ({"--checkpoint": "rgb.png"}, r"checkpoint: .*rgb\.png is no .*PyTorch checkpoint"),
        ({"--checkpoint": "other.pth"}, r"checkpoint: .*other\.pth is not groupdnet_deepfashion"),
        ({"--checkpoint": "code.pth"}, r"checkpoint: .*code\.pth holds pickled code"),
        ({"--device": "cuda:99"}, r"device: cuda:99 is not here"),
        ({"--device": "abacus"}, r"device: expected cpu"),
        ({"--backend": "fast"}, r"backend: expected one of .*; got 'fast'"),
        (
            {"--model": "groupdnet_cityscapes", "--labels": "street/label"},
            r"instances: .*give --instances",
        ),
        (
            {"--model": "groupdnet_cityscapes", "--labels": "street/label",
             "--instances": "street/inst/0_instanceIds.png"},
            r"instances: no map of scene '1'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(smis, small, bad, tmp_path, arguments, message):
    paths = {"--labels", "--checkpoint", "--instances"}
    given = {"--model": "groupdnet_deepfashion", "--labels": "person", **arguments}
    words = [
        word for option, value in given.items()
        for word in (option, bad / value if option in paths else value)
    ]
    code, _, err = smis("synthesize", *words, "--out", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setattr("sys.argv", [
        "smis", "--debug", "synthesize", "--model", "none", "--labels", "x",
        "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="model: expected one of"):
        cli.main()


def test_unknown_pixels_may_be_given_a_class(smis, small, bad, tmp_path):
    code, *_ = smis("synthesize", "--model", "groupdnet_deepfashion", "--labels",
                    bad / "unknown.png", "--unknown", 0, "--out", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out/unknown_0.png").exists()


def test_the_demo_is_one_page_with_pictures_and_speed(smis, small, monkeypatch, totals, tmp_path):
    run = functools.partial(cli.synthesis.demonstration.run, seconds=0.1)
    monkeypatch.setattr(cli.synthesis.demonstration, "run", run)
    code, out, _ = smis("demo", "--model", "groupdnet_deepfashion", "--out", tmp_path / "demo",
                        "--samples", 2, "--scenes", 1)
    assert code == 0
    assert totals == [(7, 7)]  # four pictures and three timings
    assert "random" in out.lower()
    html = (tmp_path / "demo/index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 1 + 2 + 2 + 3  # the layout; samples, one class, morph
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for stage in ("class crops", "encoder", "modulation", "main convs", "generator"):
        assert stage in html
        assert stage in out
    # Pictures first, then this machine, then what to try.
    assert html.index("<img") < html.index("On this machine") < html.index("Go on")
    widths = {int(width) for width in re.findall(r'<img [^>]*width="(\d+)"', html)}
    assert all(width % 256 == 0 or 256 % width == 0 for width in widths), widths
    assert "image-rendering: pixelated" in html and "prefers-color-scheme: dark" in html
    assert "--model groupdnet_deepfashion --checkpoint FILE" in html
    assert "<strong>random</strong>" in html
    assert _read(tmp_path / "demo/person_0.png").std() > 10


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_demo_paints_these_codes(samples, monkeypatch):
    model = _small_model("groupdnet_deepfashion").eval()
    painted, told = [], []

    def sample(self, z):
        painted.append(z)
        return torch.zeros(1, 3, 64, 64)

    monkeypatch.setattr(demo.Synthesizer, "sample", sample)
    (scene,) = synthesis.sample_scenes(model.preset, 1)
    strips(model, scene, samples, 5, told.append)
    drawn = [codes.draw_code(model, 5 + k) for k in range(max(2, samples))]
    changed = [codes.resample_class(model, drawn[0], scene.present[1], 105 + k)
               for k in range(max(1, samples - 1))]
    ways = [codes.interpolate(*drawn[:2], k / samples, 8) for k in range(1, samples)]
    expected = [*drawn[:samples], *changed, *([drawn[1]] if samples == 1 else []), *ways]
    assert len(painted) == len(told) == demo.forwards(1, samples) == demo.forwards(2, samples) / 2
    assert all(map(torch.equal, painted, expected))
    assert demo.Stage("a", 3.0, 1.5).speedup == 2


def test_the_speed_table_keeps_its_sides(monkeypatch):
    model = _small_model("groupdnet_deepfashion").eval()

    def interleave(calls, *_, **__):
        for call in [*calls.values()] * 3:
            call()
        return {"reference": [2.0, 9.0, 3.0], "auto": [1.0, 1.5, 9.0]}

    monkeypatch.setattr(demo, "interleave", interleave)
    (scene,) = synthesis.sample_scenes(model.preset, 1)
    stages = {s.name: s for s in demo.speed(model, scene, codes.draw_code(model, 0), 0.1)}
    for name in ("class crops (encoder input)", "encoder, crops included", "generator, whole"):
        assert (stages[name].reference, stages[name].fused) == (3.0, 1.5)  # medians
    assert list(stages)[-1] == "generator, whole"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_demo_claims_no_kernels_where_none_ran(backend, monkeypatch, tmp_path):
    layout = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr(demo, "strips", lambda *_: (demo.Strip("a", (("layout", layout),)),))
    monkeypatch.setattr(demo, "speed", lambda *_: [demo.Stage("generator, whole", 2.0, 2.0)])
    with use_backend(backend):
        model = _small_model("groupdnet_deepfashion").eval()
        made = demo.run(model, synthesis.sample_scenes(model.preset, 1), tmp_path)
    unfused = "not available here" in (tmp_path / "index.html").read_text()
    assert unfused == (made.backend == "reference")
    assert unfused or backend == "auto"


def test_the_demos_widths_are_a_quarter():
    assert [cli.synthesis._quarter_width(preset) for preset in (DEEPFASHION, CITYSCAPES, ADE20K)
            ] == [{"ngf": 40, "nef": 64}, {"ngf": 70, "nef": 70}, {"ngf": 16, "nef": 151}]


def test_sample_scenes_are_of_their_seeds():
    preset = _small_model("groupdnet_deepfashion", part="generator", device="meta").preset
    for k, scene in enumerate(synthesis.sample_scenes(preset, 3, 5)):
        drawn = sample_scene("person", 64, 64, 8, 5 + k)
        np.testing.assert_array_equal(scene.labels, drawn.labels)
        assert (scene.name, scene.instances) == (f"person_{5 + k}", None)


def test_the_list_tells_sizes(smis):
    row = next(line for line in smis("list")[1].splitlines() if "groupdnet_deepfashi" in line)
    assert list(re.findall(r"\d+\.\d", row)) == ["96.3", "12.8", "5.5"]


def test_classes_are_listed_with_their_colours(smis):
    lines = smis("classes", "groupdnet_scenes")[1].splitlines()
    (sky,) = (line for line in lines if "sky" in line)
    assert "#73b2f5" in sky and " 0 " in sky
    assert "255 in a file becomes 150" in smis("classes", "spade_ade20k")[1]
    out = smis("classes", "groupdnet_deepfashion")[1]
    assert "class 7" in out and "no list tells which number is which" in out


@pytest.mark.parametrize(("host", "shown"), [
    ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::", "localhost"), ("::1", "[::1]"),
    ("my.machine", "my.machine"),
])
def test_a_page_is_told_where_it_is(host, shown):
    assert cli.paint._reachable(host) == shown


def test_progress_of_training_in_words():
    values = {"images_per_second": 12.34, "waiting": 0.126, "memory": 1234.5, "kl": 0.12345,
              "rate_generator": 1e-4, "rate_discriminator": 4e-4}
    told = Progress(3, 8, 1, 2, 3661.4, values)
    assert cli.train._speed(told) == "12.3 images/s, 1234 MB, 13% waiting for data, 1:01:01 left"
    assert cli.train._losses(values) == "kl 0.123"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_have_32_bits(smis, scene, tmp_path, seed):
    code, _, err = smis("synthesize", "--model", "groupdnet_scenes", "--labels", scene / "person",
                        "--out", tmp_path / "out", f"--seed={seed}")
    assert code == 2 and f"seed: expected 0 to 4294967295, got {seed}" in err
    assert cli.common._checked_seed(2**32 - 1) == 2**32 - 1


def test_labels_in_words():
    assert cli.data._ranges([11, 0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-11"


def test_spade_paints_and_has_no_demo(smis, small, scene, tmp_path):
    code, *_ = smis("synthesize", "--model", "spade_ade20k", "--labels", scene / "person",
                    "--out", tmp_path / "out")
    assert code == 0
    assert _read(tmp_path / "out/0_0.png").std() > 10
    present = int(images.read_labels(scene / "person/0.png", 256)[0, 0])
    code, _, err = smis("edit", "--model", "spade_ade20k", "--labels", scene / "person/0.png",
                        "--exchange", present, "--library", scene / "person", "--out",
                        tmp_path / "edit")
    assert code == 2
    assert re.match(r"error: texture: spade_ade20k has no code .*give --no-texture\n$", err), err
    code, _, err = smis("demo", "--model", "spade_ade20k", "--out", tmp_path / "demo")
    assert code == 2
    assert re.match(r"error: model: expected a GroupDNet, .*got 'spade_ade20k'.*\n$", err), err
    assert not (tmp_path / "demo").exists()


def test_one_class_is_resampled_and_the_rest_held():
    model = _small_model("groupdnet_deepfashion").eval()
    z = codes.draw_code(model, 0)
    changed = codes.resample_class(model, z, 3, seed=9)
    channels = model.generator.class_channels(3)
    assert not torch.equal(changed[:, channels], z[:, channels])
    drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(changed[:, channels], drawn[:, channels])  # where Synthesizer draws it too
    changed[:, channels] = z[:, channels]
    assert torch.equal(changed, z)


def test_a_morph_starts_and_ends_at_its_codes_with_unit_variance():
    start, end = torch.randn(2, 1, 4096, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes.interpolate(start, end, 0), start)
    assert torch.equal(codes.interpolate(start, end, 1), end)
    for t in (0.25, 0.5, 0.75):
        assert abs(codes.interpolate(start, end, t).var().item() - 1) < 0.02


def test_a_morph_is_spherical_for_each_class_and_holds_what_both_ends_share():
    """Against the formula by hand: two unit codes 60 degrees apart, and a class that is held."""
    start = torch.tensor([[1.0, 0.0, 3.0, 4.0]])
    end = torch.tensor([[0.5, 3**0.5 / 2, 3.0, 4.0]])
    third = codes.interpolate(start, end, 1 / 3, parts=2)
    angle = torch.pi / 9
    expected = torch.tensor([[np.cos(angle), np.sin(angle), 3.0, 4.0]], dtype=torch.float32)
    torch.testing.assert_close(third, expected)
    assert torch.equal(third[:, 2:], start[:, 2:])
    for t in (0.25, 0.4):  # of opposite codes no way on the sphere is the shortest
        torch.testing.assert_close(codes.interpolate(start, -start, t, parts=2),
                                   (1 - 2 * t) * start)
    with pytest.raises(ValueError, match="end: expected the start's shape"):
        codes.interpolate(start, end[:, :2], 0.5)


def test_a_morph_between_codes_of_one_direction_is_a_straight_line():
    """Of which the sphere's formula divides nothing by nothing; both ends are copies."""
    start = torch.tensor([[1.0, 2.0, -3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(codes.interpolate(start, 3 * start, 0.25, parts=2), 1.5 * start)
    turned = torch.tensor([[2.0, -1.0, 4.0, 3.0]], dtype=torch.float64)  # by 90 degrees
    found = codes.interpolate(start, turned, 1 / 3, parts=2)
    expected = 3**0.5 / 2 * start + turned / 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    for t, code in ((0, start), (1, turned)):
        before = code.clone()
        codes.interpolate(start, turned, t).zero_()
        assert torch.equal(code, before)


def test_further_samples_build_no_further_tables(smis, scene, tmp_path, monkeypatch):
    """`smis synthesize` and the demo's strips compute a layout's tables once, whatever is drawn."""
    built = []
    build = CGNorm._build_table

    def counting(self, *arguments, **given):
        built.append(self)
        return build(self, *arguments, **given)

    monkeypatch.setattr(CGNorm, "_build_table", counting)
    counts = []
    for samples in (1, 3):
        built.clear()
        code, _, error = smis("synthesize", "--model", "groupdnet_scenes", "--labels",
                              scene / "person/0.png", "--samples", samples,
                              "--out", tmp_path / "out")
        assert code == 0, error
        counts.append(len(built))
    model = create_model(checkpoint=shipped_weights("groupdnet_scenes")).eval()
    layout = synthesis.sample_scenes(model.preset, 1)[0]
    for samples in (1, 4):
        built.clear()
        strips(model, layout, samples, 0)
        counts.append(len(built))
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_features_are_made_and_read(small, smis, scene, tmp_path):
    pytest.importorskip("sklearn")
    name = "pix2pixhd_cityscapes_features"
    photographs = tmp_path / "photographs"
    for seed in range(2):
        colours = np.random.default_rng(seed).integers(0, 255, (48, 96, 3), np.uint8)
        images.write_png(photographs / f"{seed}_leftImg8bit.png", colours)
    made = tmp_path / "features.npz"
    code, out, _ = smis("features", "--model", name, "--images", photographs,
                        "--instances", scene / "street/inst", "--out", made)
    assert code == 0
    assert re.search(r"\d+ clusters of \d+ classes in", out)
    few = tmp_path / "few.npz"
    code, *_ = smis("features", "--model", name, "--images", photographs, "--instances",
                    scene / "street/inst", "--out", few, "--clusters", 1)
    assert code == 0
    with np.load(made) as all_of_them, np.load(few) as ones:
        assert {len(ones[key]) for key in ones} == {1}
        assert max(len(all_of_them[key]) for key in all_of_them) > 1
    given = ("--model", name, "--labels", scene / "street/label",
             "--instances", scene / "street/inst", "--out", tmp_path / "out")
    code, out, _ = smis("synthesize", *given, "--features", made, "--samples", 2)
    assert code == 0
    first, second = (np.asarray(Image.open(tmp_path / f"out/0_{k}.png")) for k in range(2))
    assert first.shape == (64, 128, 3)
    assert (first != second).any()  # other clusters, another picture
    code, _, error = smis("synthesize", *given)
    assert (code, error.count("\n")) == (2, 1)
    assert "give --features" in error
    (one, _) = (scene / "street/label").iterdir()
    code, _, error = smis("resample", "--model", name, "--labels", one,
                          "--instances", scene / "street/inst", "--features", made,
                          "--instance", 99999, "--out", tmp_path / "resampled")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: instance: expected instances of the map, got 99999")
    other = ("--model", "pix2pixhd_cityscapes", *given[2:], "--features", made)
    code, _, error = smis("synthesize", *other)
    assert (code, error.count("\n")) == (2, 1)
    assert "reads no instance features" in error
    code, _, error = smis("features", "--out", made)
    assert (code, error.count("\n")) == (2, 1)
    official = tmp_path / "official.npy"
    np.save(official, {7: np.zeros((2, 3), np.float32)}, allow_pickle=True)
    code, out, _ = smis("features", "--convert", official, "--out", tmp_path / "converted.npz")
    assert code == 0
    assert "2 clusters of 1 classes" in out


def test_features_are_not_encoded_for_nothing(small, smis, scene, tmp_path, monkeypatch):
    """What is missing, or bad in the last file, is told before the first picture is encoded."""
    for seed in range(2):
        images.write_png(tmp_path / f"photographs/{seed}.png", np.zeros((48, 96, 3), np.uint8))
    encoded = []
    monkeypatch.setattr("smis_models.families.pix2pixhd.FeatureEncoder.features",
                        lambda self, image: encoded.append(image) or 1 / 0)
    given = ("features", "--model", "pix2pixhd_cityscapes_features", "--images",
             tmp_path / "photographs", "--instances", scene / "street/inst", "--out",
             tmp_path / "f.npz")
    last = scene / "street/inst/1_instanceIds.png"
    whole = last.read_bytes()
    last.write_bytes(whole[:60])
    code, out, error = smis(*given)
    assert (code, error.count("\n")) == (2, 1)
    assert "1_instanceIds.png: cannot be read" in error
    assert "resized by bicubic: 0, " in out and "2 pictures in all" in out
    last.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    code, _, error = smis(*given)
    assert code == 2 and "clustering needs scikit-learn" in error
    assert not encoded


_SYNTHESIZE = ["synthesize", "--labels", "a", "--out", "b"]


@pytest.mark.parametrize(("words", "said"), [
    # A number that is none, or out of its range.
    ([*_SYNTHESIZE, "--samples", "x"], "samples: expected a whole number of at least 1, got 'x'"),
    ([*_SYNTHESIZE, "--samples="], "samples: expected a whole number of at least 1, got ''"),
    ([*_SYNTHESIZE, "--samples", "0"], "samples: expected a whole number of at least 1, got '0'"),
    ([*_SYNTHESIZE, "--samples", "2", "--samples", "1e3"],
     "samples: expected a whole number of at least 1, got '1e3'"),
    ([*_SYNTHESIZE, "--seed", "1.5"], "seed: expected a whole number, got '1.5'"),
    (["features", "--convert", "a.npy", "--out", "b.npz", "--clusters", "many"],
     "clusters: expected a whole number of at least 1, got 'many'"),
    (["paint", "--port", "99999"], "port: expected a whole number from 0 to 65535, got '99999'"),
    (["morph", "--labels", "a", "--out", "b", "--seconds", "soon"],
     "seconds: expected a number, got 'soon'"),
    (["train", "x", "--out", "b", "--minutes", "-1"],
     "minutes: expected a number of at least 0, got '-1'"),
    (["doctor", "a", "--unknown", "sky"],
     "unknown: expected a whole number of at least 0, got 'sky'"),
    # Nothing where there should be something, and something where there should be nothing.
    (["synthesize", "--labels", "a"], "out: expected a path, got nothing; give --out PATH"),
    (["convert", "a.pth"], "out: expected a path, got nothing; give OUT"),
    (["synthesize", "--labels"], "labels: expected a path, got nothing; give --labels PATH"),
    (["resample", "--samples"],
     "samples: expected a whole number of at least 1, got nothing; give --samples NUMBER"),
    (["synthesize", "--labels", "--out", "b"],
     "labels: expected a path behind --labels, got the option --out; give the value first"),
    (["demo", "--out", "--help"],
     "out: expected a path behind --out, got the option --help; give the value first"),
    (["paint", "--open=yes"], "open: expected --open alone, got the value 'yes'"),
    (["evaluate", "more", "--out", "b"], "arguments: expected options alone, got 'more' besides; "),
    (["doctor", "a", "b", "c"], "arguments: expected DATA and options, got 'b c' besides; "),
    # Names that there are not.
    (["synthesize", "--smaples", "3"], "option: expected one that `smis synthesize` takes, got "
                                        "'--smaples'; did you mean --samples?"),
    (["synthesize", "-x"], "option: expected one that `smis synthesize` takes, got '-x'"),
    (["synthesize", "--debug"], "option: expected one that `smis synthesize` takes, got '--debug'; "
                                "give it first: `smis --debug synthesize ...`"),
    (["--verson"], "option: expected one that `smis` takes, got '--verson'; "
                   "did you mean --version?"),
    (["paints"], "command: expected one of mix, edit, "),
])
def test_a_command_line_that_cannot_be_read_is_one_line(smis, words, said):
    code, out, error = smis(*words)
    assert (code, out) == (2, "")
    command = "smis" if words[0] in ("paints", "--verson") else f"smis {words[0]}"
    assert error.startswith(f"error: {said}"), error
    assert error.endswith(f"; `{command} --help` shows what it takes\n")
    assert error.count("\n") == 1
    assert words[0] != "paints" or "; got 'paints'; did you mean 'paint'?" in error


@pytest.mark.parametrize(("wrong", "meant"), [
    (("--data.bacth", "4"), "--data.batch"), (("--schedule.epcohs=3",), "--schedule.epochs"),
    (("--devise", "cpu"), "--device"), (("--qqq", "1"), None)])
def test_an_option_of_a_run_that_there_is_not(smis, tmp_path, wrong, meant):
    pytest.importorskip("jsonargparse")
    for more in (("--options",), ("--out", tmp_path / "run")):
        code, out, error = smis("train", "groupdnet_scenes_codes", *wrong, *more)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert re.match(rf"error: config: .*{wrong[0].partition('=')[0]}", error), error
        assert ("did you mean" in error) == (meant is not None)
        assert meant is None or error.endswith(f"; did you mean {meant}?\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "said"), [
    ("classes spade_cooc", "model: expected one of .*; did you mean 'spade_coco'"),
    ("convert m.png o.safetensors --model spade_cooc", "model: expected one of "),
    ("doctor d --dataset foo", "dataset: expected .*; got 'foo'"),
    ("doctor no", "data: no does not exist; give "),
    ("convert no.pth o.safetensors", r"source: no\.pth does not exist; give "),
    ("convert-labels no o", "source: no does not exist; give "),
    ("convert-labels m.png o --colours no", "colours: no does not exist; give "),
    ("convert-data celebamask-hq no o", "root: no does not exist; give "),
    ("features --convert no.npy --out o.npz", r"convert: no\.npy does not exist; give "),
    ("evaluate --model groupdnet_scenes --out o --distance pixel --dataset folder --root no",
     "root: no does not exist; give "),
    ("evaluate {} --distance lpips-alex --lpips-weights no.pth",
     r"lpips-weights: no\.pth does not exist; give "),
    ("edit {} --to no.png", r"to: no\.png does not exist; give "),
    ("edit {} --exchange sky --library no", "library: no does not exist; give "),
    ("evaluate {} --distance pixel --mask-mode foo", "mask-mode: expected zero or spatial; got"),
    ("evaluate {} --distance pixel --dont-care foo", "dont-care: expected ignore or count; got"),
    ("evaluate --model groupdnet_scenes --out o --distance pixel --dataset foo",
     "dataset: expected one of .*; got 'foo'"),
])
def test_an_error_names_the_option_that_was_given(smis, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    images.write_indices(tmp_path / "m.png", np.zeros((128, 128), np.int64))
    given = words.format("--model groupdnet_scenes --labels m.png --out o").split()
    code, _, error = smis(*given)
    assert (code, error.count("\n")) == (2, 1), error
    assert re.match(f"error: (?:{said})", error), error


def test_a_number_below_zero_is_a_value_of_its_option(smis):
    assert smis(*_SYNTHESIZE, "--seed", "-1") == (
        2, "", "error: seed: expected 0 to 4294967295, got -1\n")


def test_weights_are_those_of_the_model_that_is_named(smis, tmp_path):
    shipped = shipped_weights("groupdnet_scenes")
    for command in (["classes", "spade_ade20k"],
                    ["synthesize", "--model", "spade_ade20k", "--labels", "x", "--out",
                     tmp_path / "o", "--size", "512x512"]):
        code, out, error = smis(*command, "--checkpoint", shipped)
        assert (code, out) == (2, "")
        assert error == f"error: checkpoint: {shipped} is groupdnet_scenes, not spade_ade20k\n"
    code, out, error = smis("classes", "spade_ade20k", "--checkpoint", tmp_path / "no.pth")
    assert (code, out) == (2, "")
    assert error.startswith(f"error: checkpoint: {tmp_path / 'no.pth'} does not exist; give a .pth")


def test_an_interruption_ends_without_a_traceback(smis, monkeypatch):
    def interrupted(*_, **__):
        raise typer.Abort

    monkeypatch.setattr(cli, "app", interrupted)
    assert smis("list") == (130, "", "")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 2147483648 bytes."),
    RuntimeError("number_vectors: can't allocate memory for what it makes"),
], ids=["python", "gpu", "torch", "kernel"])
def test_too_little_memory_is_one_line(smis, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    code, out, said = smis("list")
    assert (code, out) == (2, "")
    assert said == "error: memory: not enough for this; smaller pictures or batches take less\n"
    with pytest.raises(type(error)):
        smis("list", "--debug")


def test_other_errors_of_a_runtime_are_seen(smis, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a shape that does not fit")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(RuntimeError, match="a shape"):
        smis("list")


def test_a_files_early_end_is_no_interruption(smis, monkeypatch):
    """Click calls both an Abort: the one ends in silence, the other must be seen."""
    def early(**_):
        raise EOFError("Ran out of input")

    app = typer.Typer()
    app.command()(lambda: early())
    monkeypatch.setattr(cli, "app", typer.main.get_command(app))
    monkeypatch.setattr(sys, "argv", ["smis"])
    with pytest.raises(EOFError, match="Ran out of input"):
        cli.main()
