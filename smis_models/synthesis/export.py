"""Generators as files for servers: ONNX, torch.export and AOTInductor, checked after writing."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import BackendError, __version__, instance_edges, use_backend
from smis_kernels.interface import NAMESPACE, requested

from ..io.extras import cure
from ..io.files import replacing
from ..networks.semantics import UNKNOWN
from .synthesizer import frozen_copy

TOLERANCE = 2e-4  # of the largest value
SCHEMAS = "smis_schemas"  # of a package's metadata: the operators that a C++ process must define
_OPSET = 18
_ONNX_LIMIT = 2**31 - 2**20  # bytes of one protobuf file
_TRACED, _CHECKED = 2, 3  # batches

Run = Callable[..., Tensor]


class ExportError(ValueError):
    """A file that could not be written, or that is not the model; the message is one line."""


class Painter(nn.Module):
    """A generator that reads label maps: what is exported.

    The weights are those at construction, spectral normalisation folded. In a file nothing can
    raise, so a map with a label out of range gives a picture of NaN.

    Args:
        model: a :class:`SynthesisModel` of the zoo.

    Shapes: labels (N, H, W) int64, of the model's size; instances (N, H, W) int64 where it reads
        edges; z as ``generator.sample_latent(N)`` where it takes a code; features
        (N, feature_channels, H, W) where it reads some -> picture (N, 3, H, W) in [-1, 1].

    Example:
        >>> from smis_models import create_model
        >>> painter = Painter(create_model("spade_ade20k", ngf=4, image_size=(64, 64)))
        >>> painter.names, painter(torch.zeros(1, 64, 64).long()).shape
        (('labels',), torch.Size([1, 3, 64, 64]))
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.generator: Any = frozen_copy(model.generator)
        self.preset = model.preset
        self.eval()
        code = model.generator.sample_latent(1)
        reads = {"labels": True, "instances": self.preset.instance_edge, "z": code is not None,
                 "features": getattr(self.preset, "features", False)}
        self.names = tuple(name for name, read in reads.items() if read)

    def forward(self, *inputs: Tensor) -> Tensor:
        preset, given = self.preset, dict(zip(self.names, inputs, strict=True))
        labels = given.pop("labels")
        if preset.dont_care is not None:
            labels = torch.where(labels == UNKNOWN, preset.dont_care, labels)
        bad = ((labels < 0) | (labels >= preset.classes)).flatten(1).any(1)
        weight = next(self.generator.parameters())
        classes = torch.arange(preset.classes, device=labels.device)[:, None, None]
        planes = (labels[:, None] == classes).to(weight.dtype)
        if preset.instance_edge:
            edges = instance_edges(given.pop("instances"))
            planes = torch.cat([planes, edges.to(weight.dtype)], 1)
        picture: Tensor = self.generator(planes, *given.values())
        return torch.where(bad[:, None, None, None], torch.nan, picture)

    def example(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        """Inputs for a trial: maps of blocks, instances in them, codes from N(0, 1)."""
        preset, generator = self.preset, torch.Generator().manual_seed(seed)
        height, width = preset.image_size

        def blocks(values: int) -> Tensor:
            coarse = torch.randint(values, (batch, 1, 8, 8), generator=generator).double()
            map = nn.functional.interpolate(coarse, (height, width), mode="nearest")
            return map[:, 0].long()

        labels = blocks(preset.classes)
        if preset.dont_care is not None:
            labels[:, :2] = UNKNOWN
        made: dict[str, Callable[[], Tensor]] = {
            "labels": lambda: labels,
            "instances": lambda: blocks(40),
            "z": lambda: self.generator.sample_latent(batch, generator).cpu(),
            "features": lambda: torch.rand(
                (batch, preset.feature_channels, height, width), generator=generator) * 2 - 1,
        }
        return tuple(made[name]() for name in self.names)


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its bytes, and how far it is from the model.

    ``difference`` is the largest, of the largest value; ``operators``: those of this library that
    the file calls, none where it is of plain operators.
    """

    path: Path
    size: int
    difference: float
    names: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class _Written:
    run: Run
    operators: tuple[str, ...] = ()


def _need(format: str, *modules: str) -> None:
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    if lacking:
        raise ModuleNotFoundError(f"format: {format} needs {', '.join(modules)}; "
                                  f"{cure('export', *lacking)}", name=lacking[0])


def _onnx(painter: Painter, path: Path, notes: Mapping[str, str]) -> _Written:
    """Plain operators of ONNX's own set, of the definitions; run by onnxruntime."""
    _need("onnx", "onnx", "onnxruntime")
    import onnx
    import onnxruntime

    size = sum(t.numel() * t.element_size() for t in painter.state_dict().values())
    if size > _ONNX_LIMIT:
        raise ValueError(f"format: one ONNX file holds 2 GB, these weights are {size / 1e9:.1f} GB;"
                         " use torch-export or aoti")
    with use_backend("reference"):
        torch.onnx.export(
            painter, painter.example(_TRACED, 0), str(path), dynamo=False, opset_version=_OPSET,
            input_names=list(painter.names), output_names=["picture"],
            dynamic_axes={name: {0: "batch"} for name in (*painter.names, "picture")})
    made = onnx.load(str(path))
    onnx.helper.set_model_props(made, dict(notes))
    sizes = made.graph.output[0].type.tensor_type.shape.dim[1:]
    for dimension, size in zip(sizes, (3, *painter.preset.image_size), strict=True):
        dimension.dim_value = size
    onnx.save(made, str(path))
    onnx.checker.check_model(str(path), full_check=True)
    foreign = {node.domain for node in made.graph.node} - {""}
    if foreign:
        raise ExportError(f"export: the graph has operators of {', '.join(foreign)}; report it")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        fed = {name: x.numpy() for name, x in zip(painter.names, inputs, strict=True)}
        return torch.from_numpy(session.run(["picture"], fed)[0])

    return _Written(run)


def _program(painter: Painter) -> tuple[Any, tuple[str, ...]]:
    """The exported program, and the operators of this library in it."""
    batch = torch.export.Dim("batch", min=1)
    shapes = {"inputs": tuple({0: batch} for _ in painter.names)}
    example = tuple(x.to(_device(painter)) for x in painter.example(_TRACED, 0))
    program = torch.export.export(painter, example, dynamic_shapes=shapes)
    graphs = [part.graph for part in program.graph_module.modules()
              if isinstance(part, torch.fx.GraphModule)]
    found = {node.target for graph in graphs for node in graph.nodes
             if isinstance(node.target, torch._ops.OpOverload)
             and node.target.namespace == NAMESPACE}
    return program, tuple(sorted(str(op._schema).removeprefix(f"{NAMESPACE}::") for op in found))


def _device(painter: Painter) -> torch.device:
    return next(painter.parameters()).device


def _torch_export(painter: Painter, path: Path, notes: Mapping[str, str]) -> _Written:
    """A program for ``torch.export.load``, of the kernels that ``use_backend`` selects."""
    program, operators = _program(painter)
    torch.export.save(program, path, extra_files=dict(notes))
    return _Written(torch.export.load(path).module(), operators)


def _aoti(painter: Painter, path: Path, notes: Mapping[str, str]) -> _Written:
    """A compiled package, for Python and C++."""
    program, operators = _program(painter)
    metadata = {**notes, SCHEMAS: "\n".join(operators)}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})
    return _Written(torch._inductor.aoti_load_package(str(path)), operators)


FORMATS: dict[str, tuple[str, Callable[[Painter, Path, Mapping[str, str]], _Written]]] = {
    "onnx": (".onnx", _onnx), "torch-export": (".pt2", _torch_export), "aoti": (".pt2", _aoti)}
"""Format -> the ending of its files, and what writes one."""


def check_format(format: str, out: str | Path) -> None:
    """Refuse an unknown format, or a file of another name than its own."""
    if format not in FORMATS:
        raise ValueError(f"format: expected {', '.join(FORMATS)}; got {format!r}")
    suffix = FORMATS[format][0]
    if Path(out).suffix != suffix:
        raise ValueError(f"out: expected a name ending in {suffix}, got {Path(out).name!r}")
    if format == "onnx":
        _need("onnx", "onnx", "onnxruntime")
        if requested() not in ("auto", "reference"):
            raise ValueError(f"backend: ONNX has plain operators alone, got {requested()!r}; use "
                             "auto or reference")


@torch.no_grad()
def export(model: Any, out: str | Path, format: str) -> Exported:
    """Write the generator of ``model`` to ``out``, for batches of any size; checked, whole or not.

    The file is run on other maps, another code and another batch than it was made from, and
    compared with the model itself.

    Args:
        model: a :class:`SynthesisModel` of the zoo.
        out: the file; its ending is the format's, ``.onnx`` or ``.pt2``.
        format: "onnx": plain operators of the definitions, for onnxruntime and TensorRT;
            "torch-export": a program that ``torch.export.load`` reads; "aoti": compiled for this
            device, for Python and C++. The latter two call the kernels that ``use_backend``
            selects; with "reference" they are of torch's operators alone.

    Raises:
        ValueError: an unknown format, another ending, weights that ONNX cannot hold, a model of
            other floats than float32.
        ExportError: the exporter fails, or the file does not compute what the model does; nothing
            is written.
        ModuleNotFoundError: onnx or onnxruntime is missing.
        OSError: the place cannot be written.

    Example:
        >>> from smis_models import create_model
        >>> model = create_model("spade_ade20k", ngf=4, image_size=(64, 64), init_gain=1.0)
        >>> export(model, "spade.pt2", "torch-export").difference < TOLERANCE
        True
    """
    out = Path(out)
    check_format(format, out)
    painter = Painter(model)
    dtype, device = next(painter.parameters()).dtype, _device(painter)
    if dtype != torch.float32:
        raise ValueError(f"model: expected float32 weights, got {dtype}; use model.float()")
    if format == "onnx" and device.type != "cpu":
        raise ValueError(f"model: ONNX is written from the CPU, got {device}; use model.cpu()")
    notes = {**model.configuration.to_metadata(), "inputs": ", ".join(painter.names),
             "output": "picture, RGB in [-1, 1]; NaN where a label is out of range",
             "made_with": f"smis_models {__version__}, torch {torch.__version__}"}
    with replacing(out, sync=True) as partial, tempfile.TemporaryDirectory(
            dir=out.parent, prefix=f".{out.name}.smis-") as folder:
        draft = Path(folder) / out.name
        written = _written(format, painter, draft, notes)
        difference = _difference(painter, model, written.run)
        size = draft.stat().st_size
        os.replace(draft, partial)
    return Exported(out, size, difference, painter.names, written.operators)


def _written(format: str, painter: Painter, draft: Path, notes: Mapping[str, str]) -> _Written:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters; the check decides
            return FORMATS[format][1](painter, draft, notes)
    except (ValueError, OSError, BackendError, ModuleNotFoundError):
        raise
    except Exception as error:  # the exporters raise many kinds
        text = " ".join(str(error).split())[:200]
        raise ExportError(f"export: {format} was not written: {type(error).__name__}: {text}; try "
                          "--backend reference or another format") from error


def _difference(painter: Painter, model: Any, run: Run) -> float:
    """The largest difference of what was written from the model, of the largest value."""
    found = 0.0
    for batch, seed in ((_CHECKED, 1), (1, 2)):
        inputs = tuple(x.to(_device(painter)) for x in painter.example(batch, seed))
        given = dict(zip(painter.names, inputs, strict=True))
        planes = model.semantics(given.pop("labels"), given.pop("instances", None))
        modes = [(part, part.training) for part in model.modules()]
        try:
            expected = model.eval().generator(planes, *given.values())
        finally:
            for part, training in modes:
                part.training = training
        got = run(*(x.clone() for x in inputs))
        if got.shape != expected.shape:
            raise ExportError(f"export: the file paints {tuple(got.shape)}, the model "
                              f"{tuple(expected.shape)}; nothing was written")
        error = float((got.to(expected) - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:  # NaN fails too
            raise ExportError(f"export: the file differs from the model by {error:.1e} of the "
                              f"largest value, {TOLERANCE:g} is allowed; nothing was written")
        found = max(found, error)
    return found
