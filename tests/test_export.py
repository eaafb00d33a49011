"""Exported generators against the models they are of, and traces of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from require import lacking
from small_models import NAMES, small_model
from torch import Tensor, nn

import smis_kernels
from smis_kernels import (
    SPADE,
    BackendError,
    ConditionalNorm2d,
    LabelLayout,
    accelerate,
    class_crops,
    instance_avg_pool2d,
    number_vectors,
    use_backend,
)
from smis_kernels.runtime.backend import missing
from smis_models import cli, create_model, save_checkpoint
from smis_models.synthesis import export as exports
from smis_models.synthesis.export import TOLERANCE, ExportError, Painter, export

needs_onnx = pytest.mark.skipif(lacking("onnxruntime") is not None, reason="no onnxruntime")
needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
# Little more than what calls a kernel: quick to compile.
TINY: dict[str, Any] = {"ngf": 4, "classes": 6, "image_size": (32, 32), "blocks": 0,
                        "downsamplings": 1, "instance_edge": False}


def tiny() -> Any:
    return create_model("pix2pixhd_cityscapes", **TINY).eval()


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def painted(model: Any, painter: Painter, inputs: tuple[Tensor, ...]) -> Tensor:
    """By the model itself, on the path that it takes."""
    given = dict(zip(painter.names, inputs, strict=True))
    planes = model.semantics(given.pop("labels"), given.pop("instances", None))
    with torch.no_grad():
        picture: Tensor = model.generator(planes, *given.values())
    return picture


def onnx_run(path: Path) -> Callable[..., Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))

    def run(*inputs: Tensor) -> Tensor:
        fed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


@needs_onnx
@pytest.mark.parametrize("name", NAMES)
def test_onnx_of_every_generator(tmp_path: Path, name: str) -> None:
    import onnx

    model, path = small_model(name, seed=2), tmp_path / "model.onnx"
    made = export(model, path, "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (made.path, made.size, made.operators) == (path, path.stat().st_size, ())
    graph = onnx.load(str(path)).graph
    assert {node.domain for node in graph.node} == {""}
    assert tuple(i.name for i in graph.input) == made.names
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert all(d.dim_value for d in value.type.tensor_type.shape.dim[1:])
    painter = Painter(model)
    inputs = painter.example(5, seed=77)
    assert relative(onnx_run(path)(*inputs), painted(model, painter, inputs)) < TOLERANCE


@needs_onnx
def test_labels_out_of_range_give_nan_and_255_the_dont_care_class(tmp_path: Path) -> None:
    model = small_model("spade_ade20k")
    export(model, tmp_path / "m.onnx", "onnx")
    labels = torch.zeros(4, 64, 64, dtype=torch.int64)
    labels[1, 5, 7], labels[2, 0, 0] = 6, -1
    labels[3, :9] = 255
    picture = onnx_run(tmp_path / "m.onnx")(labels)
    assert picture[1].isnan().all()
    assert picture[2].isnan().all()
    assert not picture[0].isnan().any()
    with torch.no_grad():
        assert relative(picture[3:], model(model.semantics(labels[3:]))) < TOLERANCE


@needs_onnx
@needs_cpu
def test_torch_onnx_export_as_users_call_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    generator = tiny().generator
    planes = [torch.eye(6)[torch.randint(6, (1, 32, 32))].permute(0, 3, 1, 2) for _ in "ab"]
    with torch.no_grad():
        generator(planes[0])
        torch.onnx.export(generator, (planes[0],), str(tmp_path / "g.onnx"), dynamo=True,
                          verbose=False)
        assert relative(onnx_run(tmp_path / "g.onnx")(planes[1]), generator(planes[1])) < TOLERANCE
    with (pytest.warns(UserWarning, match=r"ONNX has no operator for 'cpu' .* 'auto'"),
          pytest.raises(Exception, match="ONNX"), use_backend("cpu")):
        torch.onnx.export(generator, (planes[0],), str(tmp_path / "h.onnx"), dynamo=True,
                          verbose=False)


def test_inputs_of_a_trial_have_the_models_size() -> None:
    """Which is no square here; of a data set with unlabelled pixels some are there."""
    options: dict[str, Any] = {"ngf": 4, "nef": 4, "blocks": 1, "image_size": (64, 128)}
    painter = Painter(create_model("pix2pixhd_cityscapes_features", **options))
    assert painter.names == ("labels", "instances", "features")
    labels, instances, features = painter.example(2, 0)
    assert labels.shape == instances.shape == (2, 64, 128) and features.shape == (2, 3, 64, 128)
    assert painter(labels, instances, features).shape == (2, 3, 64, 128)
    coded = Painter(create_model("spade_coco_vae", ngf=4, hidden=8, image_size=(64, 128)))
    labels, *_, z = coded.example(3, 0)
    assert labels.shape == (3, 64, 128) and z.shape == (3, 256)
    assert bool((labels[:, :2] == 255).all()) and int(labels[:, 2:].max()) < 183


def test_an_export_leaves_every_part_in_its_mode(tmp_path: Path) -> None:
    model = small_model("spade_ade20k")
    model.train()
    model.generator.eval()
    modes = [part.training for part in model.modules()]
    export(model, tmp_path / "a.onnx", "onnx")
    assert [part.training for part in model.modules()] == modes



@needs_cpu
def test_torch_export_keeps_the_kernels(tmp_path: Path) -> None:
    model, path = small_model("spade_ade20k"), tmp_path / "spade.pt2"
    made = export(model, path, "torch-export")
    assert any(op.startswith("modulation_apply(") for op in made.operators)
    notes = {"smis_models": ""}
    run = torch.export.load(path, extra_files=notes).module()
    assert "spade_ade20k" in notes["smis_models"]
    painter = Painter(model)
    inputs = painter.example(5, seed=77)
    assert relative(run(*inputs), painted(model, painter, inputs)) < TOLERANCE
    with pytest.raises(Exception, match="64"):
        run(torch.zeros(1, 32, 64, dtype=torch.int64))


def test_torch_export_of_the_reference_needs_no_kernels(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "plain.pt2"
    with use_backend("reference"):
        assert export(model, path, "torch-export").operators == ()
    torch.save(Painter(model).example(2, 5), tmp_path / "inputs.pt")
    text = ("import sys, torch; p = torch.export.load(sys.argv[1]).module(); "
            "print(p(*torch.load(sys.argv[2])).shape); assert 'smis_kernels' not in sys.modules")
    found = subprocess.run([sys.executable, "-c", text, str(path), str(tmp_path / "inputs.pt")],
                           capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "[2, 3, 32, 32]" in found.stdout


@needs_cpu
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_aoti_from_python_and_from_cpp(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "model.pt2"
    made = export(model, path, "aoti")
    assert any(op.startswith("norm_act") for op in made.operators)
    painter = Painter(model)
    inputs = painter.example(5, seed=77)
    run = torch._inductor.aoti_load_package(str(path))
    assert relative(run(*inputs), painted(model, painter, inputs)) < TOLERANCE

    torch_folder = Path(torch.__file__).parent
    source = Path(__file__).parent.parent / "examples" / "aoti" / "main.cpp"
    library = torch_folder / "lib"
    subprocess.run(["g++", "-std=c++20", str(source), f"-I{torch_folder / 'include'}",
                    f"-L{library}", f"-Wl,-rpath,{library}", "-Wl,--no-as-needed", "-ltorch",
                    "-ltorch_cpu", "-lc10", "-ldl", "-o", "paint"], cwd=tmp_path, check=True)
    kernels = Path(smis_kernels.__file__).parent / "_cpu.abi3.so"

    def paint(*shape: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["./paint", str(path), str(kernels), *map(str, shape)],
                              cwd=tmp_path, capture_output=True, text=True)

    found = paint(3, 32, 32)
    assert found.returncode == 0, found.stderr
    labels = torch.zeros(3, 32, 32, dtype=torch.int64)
    labels[:, :16] = 1
    expected = painted(model, painter, (labels,)).abs().double().mean()
    shape, _, mean = found.stdout.rpartition(" ")
    assert shape == "[3, 3, 32, 32]"
    assert float(mean) == pytest.approx(float(expected), rel=1e-4)
    assert paint(3, 48, 32).returncode != 0


@pytest.mark.parametrize("factor", [1.00025, float("nan")])  # 2e-4 of the largest value is allowed
def test_a_file_that_is_not_the_model_is_not_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def wrong(painter: Painter, path: Path, notes: Any) -> Any:
        path.write_text("wrong")
        return exports._Written(lambda *inputs: painter(*inputs) * factor)

    monkeypatch.setitem(exports.FORMATS, "onnx", (".onnx", wrong))
    path = tmp_path / "m.onnx"
    path.write_text("earlier")
    with pytest.raises(ExportError, match=r"differs from the model by .* nothing was written"):
        export(tiny(), path, "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "earlier"


def test_a_file_that_rounds_otherwise_is_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def near(painter: Painter, path: Path, notes: Any) -> Any:
        path.write_text("near")
        return exports._Written(lambda *inputs: painter(*inputs) * 1.00015)

    monkeypatch.setitem(exports.FORMATS, "onnx", (".onnx", near))
    made = export(tiny(), tmp_path / "m.onnx", "onnx")
    assert made.difference == pytest.approx(1.5e-4, rel=0.05)
    assert (tmp_path / "m.onnx").read_text() == "near"


@pytest.mark.parametrize("right", [2, 3])
def test_a_file_that_is_right_for_some_batches_alone_is_not_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: int) -> None:
    """Two is the batch that is traced; a trace that keeps a number of pictures is right for it."""
    def wrong(painter: Painter, path: Path, notes: Any) -> Any:
        path.write_text("wrong")
        return exports._Written(
            lambda *inputs: painter(*inputs) * (1 if len(inputs[0]) == right else 1.01))

    monkeypatch.setitem(exports.FORMATS, "onnx", (".onnx", wrong))
    with pytest.raises(ExportError, match=r"differs from the model by .* nothing was written"):
        export(tiny(), tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_exporters_that_fail_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("line one\nline two")

    monkeypatch.setitem(exports.FORMATS, "onnx", (".onnx", failing))
    with pytest.raises(ExportError, match="onnx was not written: RuntimeError: line one line two"):
        export(tiny(), tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(cli, "reuse_freed_memory", lambda: True)
    monkeypatch.setattr("sys.argv", ["smis", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@needs_onnx
def test_the_command_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tiny(), tmp_path / "m.safetensors")
    out = tmp_path / "m.onnx"
    assert run_cli(monkeypatch, "export", "--model", "pix2pixhd_cityscapes", "--checkpoint",
                   tmp_path / "m.safetensors", "--out", out) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB, reads labels; largest" in said
    assert "of the largest value" in said


@pytest.mark.parametrize(("arguments", "words"), [
    (("--format", "tflite", "--out", "m.tflite"), ("format", "torch-export", "'tflite'")),
    (("--format", "aoti", "--out", "m.onnx"), ("out", ".pt2", "m.onnx")),
    (("--out", "missing/m.pt2"), ("out", ".onnx", "m.pt2")),
    (("--backend", "cpu", "--out", "m.onnx"), ("backend", "plain operators", "'cpu'")),
])
def test_the_command_refuses_in_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exports, "_need", lambda *_: None)
    assert run_cli(monkeypatch, "export", "--model", "spade_ade20k", *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'onnx.*' 'onnxruntime.*'"):
        export(tiny(), tmp_path / "m.onnx", "onnx")


TRACED = ("spade_coco", "spade_coco_vae", "groupdnet_cityscapes", "mulnet_deepfashion",
          "ccfpse_ade20k", "pix2pixhd_cityscapes_1024", "bicyclegan_deepfashion")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRACED)
def test_a_traced_generator_reads_its_map(name: str) -> None:
    model = small_model(name)
    painter = Painter(model)

    def arguments(batch: int, seed: int) -> tuple[Tensor, ...]:
        given = dict(zip(painter.names, painter.example(batch, seed), strict=True))
        return (model.semantics(given.pop("labels"), given.pop("instances", None)),
                *given.values())

    with torch.no_grad():
        model.generator(*arguments(1, 0))  # the map is known when it is traced
        traced = torch.jit.trace(model.generator, arguments(1, 0), check_trace=False)
        for batch in (1, 2):
            other = arguments(batch, 8)
            assert relative(traced(*other), model.generator(*other)) < TOLERANCE


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_of_norms_and_encoders_hold_for_other_inputs() -> None:
    torch.manual_seed(0)
    norm, x = ConditionalNorm2d(4, 3).eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(norm, (x[:1], torch.tensor([1])), check_trace=False)
        assert relative(traced(x, torch.tensor([0, 2])), norm(x, torch.tensor([0, 2]))) < 1e-5
        encoder = create_model("groupdnet_scenes", part="encoder", nef=8, init_gain=1.0).eval()
        image = torch.rand(1, 3, 128, 128)
        some, others = (image.repeat(1, 8, 1, 1) * (torch.arange(24) // 3 % 2 == kept)
                        .view(1, -1, 1, 1) for kept in (0, 1))
        others[:, :3] = image
        traced = torch.jit.trace(encoder, some, check_trace=False)
        for got, expected in zip(traced(others), encoder(others), strict=True):
            assert relative(got, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_reads_a_maps_values_refuses_a_trace(backend: str) -> None:
    x, ids = torch.rand(1, 3, 4, 4), torch.arange(4).repeat(1, 4, 1)
    calls: tuple[tuple[Callable[..., Any], Any], ...] = (
        (lambda m: instance_avg_pool2d(x, m), ids),
        (lambda m: smis_kernels.instance_mean_table(x, m).mean, ids),
        (lambda m: class_crops(x, m, 4), ids),
        (lambda m: smis_kernels.class_boxes(x, m, 4), ids),
        (lambda m: number_vectors(m, 100)[0], x),
        (lambda m: smis_kernels.number_windows(m.int() + 1, 100)[0], ids),
        (lambda m: LabelLayout.from_labels(m, 4).dense(), ids),
    )
    for call, argument in calls:
        with use_backend(backend), pytest.raises(BackendError, match=r"torch\.export") as error:
            torch.jit.trace(call, argument, check_trace=False)
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_an_accelerated_foreign_model_is_traced_without_its_map() -> None:
    class Foreign(nn.Module):
        """A conv, a norm written by hand, and an activation."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), SpatialNorm()

        def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
            return self.norm(self.conv(x), segmap).relu()

    class SpatialNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(8, affine=False)
            self.shared = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU())
            self.gamma, self.beta = (nn.Conv2d(6, 8, 3, padding=1) for _ in "gb")

        def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
            segmap = nn.functional.interpolate(segmap, size=x.shape[2:], mode="nearest")
            h = self.shared(segmap)
            return self.bn(x) * (1 + self.gamma(h)) + self.beta(h)

    torch.manual_seed(0)
    model = Foreign().eval()
    x = torch.randn(1, 3, 16, 16)
    first, other = (torch.eye(5)[torch.randint(5, (1, 4, 4))].permute(0, 3, 1, 2) for _ in "ab")
    with torch.no_grad():
        expected = model(x, other)
        assert any(row.replaced for row in accelerate(model).rows)
        model(x, first)
        traced = torch.jit.trace(model, (x, first), check_trace=False)
        assert relative(traced(x, other), expected) < 1e-5
        norm = SPADE(8, 5, 6).eval()  # and a norm of this library alone
        y = torch.randn(1, 8, 16, 16)
        norm(y, first)
        traced = torch.jit.trace(norm, (y, first), check_trace=False)
        assert relative(traced(y, other), norm(y, other)) < 1e-5
        assert not np.allclose(traced(y, first), traced(y, other))
