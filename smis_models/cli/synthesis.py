"""``smis list | info | synthesize | features | demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from smis_kernels import info as kernels_info

from ..demo import page as demonstration
from ..families import GroupDNetPreset, Pix2pixHDPreset, create_model, list_models
from ..io.images import grid, write_png
from ..synthesis import scene as synthesis
from ..synthesis.features import CLUSTERS, FeatureClusters, encode_features
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
    load_model,
    preset_of,
    progress,
    resolve_device,
    say_random,
    selected,
    weights_line,
    weights_of,
)


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
    with selected(backend):
        place = resolve_device(device)
        checkpoint = weights_of(model, checkpoint)
        preset = preset_of(model, checkpoint)
        clusters = synthesis.read_clusters(preset, features)
        layouts = synthesis.read_layouts(labels, instances, preset, unknown)
        network = load_model(model, checkpoint, place, seed)
        say_random(checkpoint)
        rows, sheet = Table("scene", "classes", "pictures", "seconds each"), []
        with progress(len(layouts) * samples) as step:
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
    console.print(f"weights: {weights_line(checkpoint)}", soft_wrap=True)
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
        layouts = (
            synthesis.sample_layouts(preset, scenes, seed, model) if labels is None
            else synthesis.read_layouts(labels, instances, preset, unknown)
        )
        options = {} if published else _quarter_width(preset)
        network = load_model(model, checkpoint, place, seed, **options)
        if checkpoint is not None and "encoder" not in dict(network.named_children()):
            network.add_module("encoder", create_model(model, part="encoder", device=place).eval())
        say_random(checkpoint)
        width = "its whole width" if published else "a quarter of the published width (--full: all)"
        console.print(f"{network.name}, {width}", soft_wrap=True)
        if checkpoint is None:
            planes = synthesis.semantics(network, layouts[0])
            synthesis.calibrate(network, planes, synthesis.draw_code(network, seed))
        with progress(demonstration.forwards(len(layouts), samples) + 3) as step:
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
    console.print(f"weights: {weights_line(checkpoint)}", soft_wrap=True)
    console.print(f"open {made.files[0]}; grids: {', '.join(map(str, made.files[1:]))}",
                  soft_wrap=True)


def _quarter_width(preset: GroupDNetPreset) -> dict[str, int]:
    """Options for a network that two CPU cores run in about a second."""
    groups = preset.classes
    return {"ngf": preset.ngf // 4, "nef": max(1, preset.nef // 4 // groups) * groups}
