"""``smis list | info | synthesize | features | demo``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from smis_kernels import info as kernels_info

from ..app import demo as demonstration
from ..families import (
    CodePreset,
    GroupDNetPreset,
    LatentPreset,
    Pix2pixHDPreset,
    Preset,
    create_model,
    list_models,
    with_options,
)
from ..io.images import grid, to_pictures, write_png
from ..synthesis import scene as synthesis
from ..synthesis.codes import draw_code
from ..synthesis.features import CLUSTERS, FeatureClusters, encode_features
from ..synthesis.scene import Scene
from ..synthesis.synthesizer import Synthesizer
from .common import (
    Backend,
    Checkpoint,
    Device,
    Instances,
    Labels,
    Model,
    Out,
    Samples,
    Seed,
    Unknown,
    app,
    console,
    file_to_write,
    load_model,
    preset_of,
    progress,
    resized_line,
    resolve_device,
    say_random,
    selected,
    weights_line,
    weights_of,
)


@app.command("list")
def list_command() -> None:
    """The models and their sizes."""
    table = Table("model", "description", "generator", "encoder", "discriminator")
    for info in list_models():
        sizes = (f"{info.parameters.get(part, 0) / 1e6:.1f} M"
                 for part in ("generator", "encoder", "discriminator"))
        table.add_row(info.name, info.description, *sizes)
    console.print(table)


@app.command()
def info() -> None:
    """What is built, loaded and missing, and the command that changes it."""
    typer.echo(kernels_info.report(kernels_info.info()))


_GRID_ROWS = 16  # scenes on grid.png, whatever their number


def _size(text: str | None, model: str, preset: Preset) -> dict[str, tuple[int, int]]:
    """The option ``image_size`` from "HEIGHTxWIDTH"."""
    if text is None:
        return {}
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"size: expected HEIGHTxWIDTH such as 512x1024, got {text!r}")
    size = int(match[1]), int(match[2])
    with_options(preset, {"image_size": size}, model)  # which checks its multiples
    if isinstance(preset, LatentPreset) and size != preset.image_size and (
            not isinstance(preset, CodePreset) or preset.vae):
        raise ValueError(f"size: {model} starts from a code of one size and paints "
                         f"{preset.image_size[0]}x{preset.image_size[1]} alone; leave --size out")
    return {"image_size": size}


@app.command()
def synthesize(
    model: Model, labels: Annotated[Path, typer.Option(help="label map (PNG) or a folder of them")],
    out: Out, checkpoint: Checkpoint = None, instances: Instances = None, samples: Samples = 1,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu", unknown: Unknown = None,
    features: Annotated[
        Path | None, typer.Option(help="clusters of instance features (.npz, or an official .npy)")
    ] = None,
    size: Annotated[str | None, typer.Option(
        help="HEIGHTxWIDTH of the pictures, of models that paint any (pix2pixHD; SPADE and CC-FPSE "
             "without a code)")] = None,
) -> None:
    """Label maps to pictures: OUT/<scene>_<sample>.png; the first scenes on OUT/grid.png."""
    with selected(backend):
        place = resolve_device(device)
        checkpoint = weights_of(model, checkpoint)
        preset = preset_of(model, checkpoint)
        options = _size(size, model, preset)
        preset = with_options(preset, options, model)
        clusters = synthesis.read_clusters(preset, features)
        scenes = synthesis.read_scenes(labels, instances, preset, unknown)
        first = scenes[0]
        network = load_model(model, checkpoint, place, seed, **options)
        say_random(checkpoint)
        if checkpoint is None:
            synthesis.calibrate(network, synthesis.semantics(network, first),
                                synthesis.draw_input(network, first, seed, clusters))
        table, sheet = Table("scene", "classes", "pictures", "seconds each"), []
        made: Synthesizer | None = None
        first_resized: Scene | None = None
        count = 0
        with progress(len(scenes) * samples) as step:
            for i, scene in enumerate(scenes):
                start, drawn = time.perf_counter(), []
                if made is None:
                    made = Synthesizer(network, *scene.tensors())
                else:
                    made.update(*scene.tensors())
                for k in range(samples):
                    step(scene.name)
                    z = synthesis.draw_input(network, scene, seed + k, clusters)
                    (picture,) = to_pictures(made.sample(z))
                    write_png(out / f"{scene.name}_{k}.png", picture)
                    drawn += [picture] if i < _GRID_ROWS else []
                spent = (time.perf_counter() - start) / samples
                if resized_line(scene):
                    first_resized, count = first_resized or scene, count + 1
                if i < _GRID_ROWS:
                    sheet.append([scene.picture(preset.classes), *drawn])
                files = f"{scene.name}_0.png" + (f" .. _{samples - 1}.png" if samples > 1 else "")
                table.add_row(scene.name, str(len(scene.present)), files, f"{spent:.2f}")
        path = write_png(out / "grid.png", grid(sheet))
    console.print(table)
    if first_resized is not None:
        console.print(resized_line(first_resized, count), soft_wrap=True, highlight=False)
    console.print(f"weights: {weights_line(checkpoint)}", soft_wrap=True)
    shown = "all" if len(scenes) <= _GRID_ROWS else f"the first {_GRID_ROWS} scenes"
    console.print(f"{len(scenes) * samples} pictures in {out}, {shown} on {path}", soft_wrap=True)


@app.command()
def features(
    out: Annotated[Path, typer.Option(help="file to write, .npz",
                                      callback=file_to_write(".npz"))],
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
        place, preset = resolve_device(device), preset_of(model, checkpoint)
        if not isinstance(preset, Pix2pixHDPreset) or not preset.features:
            raise ValueError(f"model: expected one that reads instance features, got {model!r}")
        encoder = load_model(model, checkpoint, place, seed, part="encoder")
        say_random(checkpoint)
        scenes = synthesis.read_photographs(images, instances, preset.image_size)
        with progress(None) as step:
            encoded = encode_features(
                encoder, ((image.to(place), ids.to(place)) for image, ids in scenes), step)
        found = FeatureClusters.fit(encoded, clusters)
    path = found.save(out)
    total = sum(len(centers) for centers in found.centers.values())
    console.print(f"{total} clusters of {len(found.centers)} classes in {path}", soft_wrap=True)


@app.command()
def demo(
    out: Out = Path("demo"), model: Model = "groupdnet_scenes", checkpoint: Checkpoint = None,
    labels: Labels = None, instances: Instances = None, samples: Samples = 3,
    scenes: Annotated[int, typer.Option(help="sample scenes to draw without --labels", min=1)] = 2,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu", unknown: Unknown = None,
    full: Annotated[
        bool, typer.Option("--full", help="published width, where random weights take a quarter")
    ] = False,
) -> None:
    """Pictures from label maps, and this machine's speed table, on one HTML page."""
    place, checkpoint = resolve_device(device), weights_of(model, checkpoint)
    published = full or checkpoint is not None
    with selected(backend):
        preset = preset_of(model, checkpoint)
        if not isinstance(preset, GroupDNetPreset):
            raise ValueError(
                "model: expected a GroupDNet, for the demo draws the code of one class anew; got "
                f"{model!r}; smis synthesize takes every model"
            )
        shown = (
            synthesis.sample_scenes(preset, scenes, seed, model) if labels is None
            else synthesis.read_scenes(labels, instances, preset, unknown)
        )
        options = {} if published else _quarter_width(preset)
        network = load_model(model, checkpoint, place, seed, **options)
        if checkpoint is not None and "encoder" not in dict(network.named_children()):
            network.add_module("encoder", create_model(model, part="encoder", device=place).eval())
        say_random(checkpoint)
        width = "its whole width" if published else "a quarter of the published width (--full: all)"
        console.print(f"{network.name}, {width}", soft_wrap=True)
        if checkpoint is None:
            planes = synthesis.semantics(network, shown[0])
            synthesis.calibrate(network, planes, draw_code(network, seed))
        with progress(demonstration.forwards(len(shown), samples) + 3) as step:
            made = demonstration.run(
                network, shown, out, samples=samples, seed=seed, width=width,
                random_weights=checkpoint is None, step=step,
            )
    table = Table("stage", "reference, ms", "fused, ms", "speedup")
    for stage in made.stages:
        table.add_row(stage.name, f"{stage.reference * 1e3:.1f}", f"{stage.fused * 1e3:.1f}",
                     f"{stage.speedup:.2f}x")
    console.print(table)
    if made.backend == "reference":
        console.print("[yellow]The fused kernels are not available here[/]: both columns are the "
                      "reference; `smis info` says what is missing.")
    console.print(f"weights: {weights_line(checkpoint)}", soft_wrap=True)
    console.print(f"open {made.files[0]}; grids: {', '.join(map(str, made.files[1:]))}",
                  soft_wrap=True)


def _quarter_width(preset: GroupDNetPreset) -> dict[str, int]:
    """Options for a network that two CPU cores run in about a second."""
    groups = preset.classes
    return {"ngf": preset.ngf // 4, "nef": max(1, preset.nef // 4 // groups) * groups}
