"""The command line: ``smis demo | list | info | synthesize | features | benchmark``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table

from smis_kernels import BackendError, use_backend
from smis_kernels import info as kernels_info

from . import benchmark as harness
from . import demo as demonstration
from . import synthesis
from .benchmark.measure import resident_peak, under_default_allocator
from .benchmark.records import SUMMARY, plots, summary, target_lines
from .features import CLUSTERS, FeatureClusters, encode_features
from .images import grid, write_atomically, write_png
from .memory import reuse_freed_memory
from .presets import GroupDNetPreset, Pix2pixHDPreset, Preset
from .registry import create_model, list_models

USER_ERRORS = (ValueError, OSError, BackendError)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Semantic image synthesis: GroupDNet on fused kernels.",
)
console = Console()

Labels = Annotated[Path | None, typer.Option(help="label map (PNG) or a folder of them")]
Instances = Annotated[Path | None, typer.Option(help="instance map or a folder of them")]
Model = Annotated[str, typer.Option(help="a name that `smis list` shows")]
Checkpoint = Annotated[
    Path | None, typer.Option(help=".pth or .safetensors file, or a folder; without one: random")
]
Out = Annotated[Path, typer.Option(help="folder to write to")]
Seed = Annotated[int, typer.Option(help="of the codes and of random weights", min=0)]
Backend = Annotated[str | None, typer.Option(help="auto, reference, cpu, triton or cuda")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Unknown = Annotated[int | None, typer.Option(help="class of pixels labelled 255")]
Samples = Annotated[int, typer.Option(help="pictures of each layout", min=1)]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of errors")] = False,
) -> None:
    """Read by :func:`main`, which sees every error."""


@contextmanager
def _progress(total: int | None) -> Iterator[Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
               MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def step(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        yield step


def _selected(backend: str | None) -> AbstractContextManager[None]:
    """Without an option SMIS_BACKEND decides."""
    return nullcontext() if backend is None else use_backend(backend)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not here ({torch.cuda.device_count()} GPUs are); "
                         "use --device cpu")
    return device


def _model(name: str, checkpoint: Path | None, device: torch.device, seed: int,
           **options: Any) -> Any:
    model = create_model(name, checkpoint, device=device, seed=seed, init_gain=1.0, **options)
    return model.eval()


def _weights(checkpoint: Path | None) -> str:
    return "RANDOM (no --checkpoint)" if checkpoint is None else str(checkpoint)


def _say_random(checkpoint: Path | None) -> None:
    if checkpoint is None:
        console.print("[yellow]The weights are random[/]: no --checkpoint was given; the pictures "
                      "show the mechanism, not what a trained network paints.")


@app.command("list")
def list_command() -> None:
    """The models and their sizes."""
    rows = Table("model", "description", "generator", "encoder", "discriminator")
    for info in list_models():
        sizes = (f"{info.parameters.get(part, 0) / 1e6:.1f} M"
                 for part in ("generator", "encoder", "discriminator"))
        rows.add_row(info.name, info.description, *sizes)
    console.print(rows)


@app.command()
def info() -> None:
    """What is built, loaded and missing, and the command that changes it."""
    typer.echo(kernels_info.report(kernels_info.info()))


@app.command()
def synthesize(
    model: Model, labels: Annotated[Path, typer.Option(help="label map (PNG) or a folder of them")],
    out: Out, checkpoint: Checkpoint = None, instances: Instances = None, samples: Samples = 1,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu", unknown: Unknown = None,
    features: Annotated[
        Path | None, typer.Option(help="clusters of instance features (.npz, or an official .npy)")
    ] = None,
) -> None:
    """Label maps to pictures: OUT/<scene>_<sample>.png, and all of them on OUT/grid.png."""
    with _selected(backend):
        place = _device(device)
        preset = _preset(model)
        clusters = synthesis.read_clusters(preset, features)
        layouts = synthesis.read_layouts(labels, instances, preset, unknown)
        network = _model(model, checkpoint, place, seed)
        _say_random(checkpoint)
        rows, sheet = Table("scene", "classes", "pictures", "seconds each"), []
        with _progress(len(layouts) * samples) as step:
            for i, layout in enumerate(layouts):
                planes = synthesis.semantics(network, layout)
                if checkpoint is None and i == 0:
                    first = synthesis.draw_input(network, layout, seed, clusters)
                    synthesis.calibrate(network, planes, first)
                start, drawn = time.perf_counter(), []
                for k in range(samples):
                    step(layout.name)
                    code = synthesis.draw_input(network, layout, seed + k, clusters)
                    drawn += synthesis.pictures(network, planes, [code])
                    write_png(out / f"{layout.name}_{k}.png", drawn[-1])
                spent = (time.perf_counter() - start) / samples
                sheet.append([layout.picture(network.preset.classes), *drawn])
                files = f"{layout.name}_0.png" + (f" .. _{samples - 1}.png" if samples > 1 else "")
                rows.add_row(layout.name, str(len(layout.present)), files, f"{spent:.2f}")
        path = write_png(out / "grid.png", grid(sheet))
    console.print(rows)
    console.print(f"weights: {_weights(checkpoint)}", soft_wrap=True)
    console.print(f"{len(layouts) * samples} pictures in {out}, all on {path}", soft_wrap=True)


@app.command()
def features(
    out: Annotated[Path, typer.Option(help="file to write, .npz")],
    model: Model = "pix2pixhd_cityscapes_features", checkpoint: Checkpoint = None,
    images: Annotated[Path | None, typer.Option(help="picture or a folder of them")] = None,
    instances: Instances = None,
    convert: Annotated[
        Path | None, typer.Option(help="an official .npy of clusters, to convert instead")
    ] = None,
    clusters: Annotated[int, typer.Option(help="of each class, at most", min=1)] = CLUSTERS,
    device: Device = "cpu", seed: Seed = 0,
) -> None:
    """Encode a data set's instances, cluster each class, and write what --features reads."""
    if convert is not None:
        found = FeatureClusters.load(convert)
    elif images is None or instances is None:
        raise ValueError("images, instances: expected both (or --convert); give two folders")
    else:
        place, preset = _device(device), _preset(model)
        if not isinstance(preset, Pix2pixHDPreset) or not preset.features:
            raise ValueError(f"model: expected one that reads instance features, got {model!r}")
        encoder = _model(model, checkpoint, place, seed, part="encoder")
        _say_random(checkpoint)
        scenes = synthesis.read_photographs(images, instances, preset.image_size)
        with _progress(None) as step:
            encoded = encode_features(
                encoder, ((image.to(place), ids.to(place)) for image, ids in scenes), step)
        found = FeatureClusters.fit(encoded, clusters)
    path = found.save(out)
    total = sum(len(centers) for centers in found.centers.values())
    console.print(f"{total} clusters of {len(found.centers)} classes in {path}", soft_wrap=True)


@app.command()
def demo(
    out: Out = Path("demo"), model: Model = "groupdnet_deepfashion", checkpoint: Checkpoint = None,
    labels: Labels = None, instances: Instances = None, samples: Samples = 3,
    scenes: Annotated[int, typer.Option(help="sample scenes to draw without --labels", min=1)] = 2,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu", unknown: Unknown = None,
    full: Annotated[
        bool, typer.Option("--full", help="published width, where random weights take a quarter")
    ] = False,
) -> None:
    """Pictures from label maps, and this machine's speed table, on one HTML page."""
    place = _device(device)
    published = full or checkpoint is not None
    with _selected(backend):
        preset = _preset(model)
        if not isinstance(preset, GroupDNetPreset):
            raise ValueError(
                "model: expected a GroupDNet, for the demo draws the code of one class anew; got "
                f"{model!r}; smis synthesize takes every model"
            )
        layouts = (
            synthesis.sample_layouts(preset, scenes, seed) if labels is None
            else synthesis.read_layouts(labels, instances, preset, unknown)
        )
        options = {} if published else _quarter_width(preset)
        network = _model(model, checkpoint, place, seed, **options)
        if checkpoint is not None and "encoder" not in dict(network.named_children()):
            network.add_module("encoder", create_model(model, part="encoder", device=place).eval())
        _say_random(checkpoint)
        width = "published width" if published else "a quarter of the published width (--full: all)"
        console.print(f"{network.name}, {width}", soft_wrap=True)
        if checkpoint is None:
            planes = synthesis.semantics(network, layouts[0])
            synthesis.calibrate(network, planes, synthesis.draw_code(network, seed))
        with _progress(demonstration.forwards(len(layouts), samples) + 3) as step:
            made = demonstration.run(
                network, layouts, out, samples=samples, seed=seed, width=width,
                random_weights=checkpoint is None, step=step,
            )
    rows = Table("stage", "reference, ms", "fused, ms", "speedup")
    for stage in made.stages:
        rows.add_row(stage.name, f"{stage.reference * 1e3:.1f}", f"{stage.fused * 1e3:.1f}",
                     f"{stage.speedup:.2f}x")
    console.print(rows)
    if made.backend == "reference":
        console.print("[yellow]The fused kernels are not available here[/]: both columns are the "
                      "reference; `smis info` says what is missing.")
    console.print(f"weights: {_weights(checkpoint)}", soft_wrap=True)
    console.print(f"open {made.files[0]}; grids: {', '.join(map(str, made.files[1:]))}",
                  soft_wrap=True)


def _preset(model: str) -> Preset:
    """The options of a model, before its weights take time and memory."""
    preset: Preset = create_model(model, part="generator", device="meta").preset
    return preset


def _quarter_width(preset: GroupDNetPreset) -> dict[str, int]:
    """Options for a network that two CPU cores run in about a second."""
    groups = preset.classes
    return {"ngf": preset.ngf // 4, "nef": max(1, preset.nef // 4 // groups) * groups}


@app.command()
def benchmark(
    set: Annotated[str, typer.Option(help=f"{', '.join(harness.SETS)} or all")],
    out: Out = Path("benchmark"),
    maps: Annotated[
        Path | None, typer.Option(help="folder of label maps, or with label/ and inst/ inside")
    ] = None,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    device: Device = "cpu",
    default_allocator: Annotated[bool, typer.Option(
        help="on the CPU measure once more under the default allocator")] = True,
) -> None:
    """Measure a set of cases; print its table, write records.json, report.md and plots to OUT."""
    place = _device(device)
    cases = harness.cases(set, only)
    source = harness.Maps(maps)
    dtypes = (torch.float32,) if place.type == "cpu" else (torch.float32, torch.bfloat16)
    on_cpu = place.type == "cpu"
    records = []
    with _progress(None) as step:
        for case in cases:
            for dtype in dtypes:
                setting = harness.Setting(place, dtype, source)
                found = harness.measure(case, setting, partial(_named, step, case.group))
                if case.confirm and on_cpu and sys.platform.startswith("linux"):
                    step(f"{case.group}: resident memory")
                    found = [
                        r if r.provider == "compiled" else
                        replace(r, resident_memory=resident_peak(case, r.provider, source))
                        for r in found
                    ]
                records += found
            if on_cpu and default_allocator:
                step(f"{case.group}: default allocator")
                records += under_default_allocator(case, source)
    reused = [r for r in records if r.allocator == "reuse"]
    rows = Table(Column(SUMMARY[0], overflow="fold"), *SUMMARY[1:])
    for line in summary(reused):
        rows.add_row(*line)
    console.print(rows)
    for text in target_lines(reused):
        console.print(text, soft_wrap=True, highlight=False)
    text = harness.markdown(records)
    files = [
        harness.save(out / "records.json", records),
        write_atomically(out / "report.md", text.encode()), *plots(records, out),
    ]
    console.print("wrote " + ", ".join(map(str, files)), soft_wrap=True)


def _named(step: Callable[[str], None], group: str, what: str) -> None:
    step(f"{group}: {what}")


def main() -> None:
    """Run the command line: a user's mistake is one line and exit code 2."""
    reuse_freed_memory()
    try:
        app()
    except USER_ERRORS as error:
        if "--debug" in sys.argv[1:]:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
