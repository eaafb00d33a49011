"""``smis list | info | synthesize | features | demo``."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column
from rich.text import Text

from smis_kernels import info as kernels_info

from ..app import demo as demonstration
from ..data.classes import class_colours, class_note
from ..families import (
    PARTS,
    CodePreset,
    GroupDNetPreset,
    LatentPreset,
    Pix2pixHDPreset,
    Preset,
    create_model,
    list_models,
    with_options,
)
from ..io.files import locked
from ..io.images import Picture, image_size, to_pictures, write_png, written_here
from ..io.names import PICTURE, PICTURE_SUFFIXES, map_files
from ..io.sheet import captioned_grid
from ..synthesis import scene as synthesis
from ..synthesis.codes import draw_code
from ..synthesis.features import CLUSTERS, FeatureClusters, clustering, encode_features
from ..synthesis.scene import Scene
from ..synthesis.synthesizer import Synthesizer
from .common import (
    Backend,
    Checkpoint,
    Device,
    Features,
    Instances,
    Labels,
    Model,
    Out,
    Samples,
    Seed,
    Unknown,
    chosen,
    command,
    console,
    existing,
    file_to_write,
    keep_inputs,
    progress,
    say_resized,
    selected,
    show,
    unusable,
)


@command("list")
def list_command() -> None:
    """Every model with its size: parameters in millions."""
    show((Column("model", no_wrap=True), Column("what it is", ratio=1), "G", "E", "D"), (
        (info.name, info.description,
         *(f"{info.parameters.get(part, 0) / 1e6:.1f}" for part in PARTS))
        for info in list_models()))
    console.print("G, E, D: millions of parameters of generator, encoder and discriminator",
                  highlight=False)


@command()
def classes(
    model: Annotated[str | None, typer.Argument(help="a name that `smis list` shows")] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """The classes of a model: number, name, and the colour that they are shown in."""
    if model is None and checkpoint is None:
        raise ValueError("model: expected `smis classes NAME` (smis list shows the names) or a "
                         "--checkpoint")
    which = chosen(model, checkpoint)
    preset = which.preset
    colours = ["#{:02x}{:02x}{:02x}".format(*map(int, c)) for c in class_colours(which.classes)]
    show(("class", "name", "colour"), (
        (str(k), what, Text.assemble(("#" * 4, colour), f" {colour}"))
        for k, (what, colour) in enumerate(zip(which.classes, colours, strict=True))))
    if note := class_note(which.name, preset.classes):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if preset.dont_care is not None:
        console.print(f"255 in a file becomes {preset.dont_care}", highlight=False)


@command()
def info() -> None:
    """What is built, loaded and missing, and the command that changes it."""
    typer.echo(kernels_info.report(kernels_info.info()))


_GRID_ROWS = 16  # scenes on grid.png, whatever their number
_TABLE_ROWS = 200


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


@command()
def synthesize(
    labels: Annotated[Path, typer.Option(help="label map (PNG) or a folder of them")], out: Out,
    model: Model = None, checkpoint: Checkpoint = None, instances: Instances = None,
    samples: Samples = 1,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu", unknown: Unknown = None,
    features: Features = None,
    size: Annotated[str | None, typer.Option(
        help="HEIGHTxWIDTH of the pictures, of models that paint any (pix2pixHD; SPADE and CC-FPSE "
             "without a code)")] = None,
) -> None:
    """Label maps to pictures: OUT/<scene>_<sample>.png; the first scenes on OUT/grid.png."""
    which = chosen(model, checkpoint, device, seed)
    if labels.is_dir() and labels.resolve() == out.resolve():
        raise ValueError(f"out: {out} is the folder of the label maps, which pictures might be "
                         "written over; give another")
    with locked(out), selected(backend):
        options = _size(size, which.name, which.preset)
        preset = with_options(which.preset, options, which.name)
        clusters = synthesis.read_clusters(preset, features)
        scenes = synthesis.read_scenes(labels, instances, preset,
                                       which.class_of("unknown", unknown), which.classes)
        keep_inputs((out / name for name in ("grid.png", *(
            f"{of.name}_{k}.png" for of in scenes.files for k in range(samples)))), scenes.read)
        first = scenes[0]
        network = which.load(**options)
        if samples > 1 and clusters is None and draw_code(network, seed) is None:
            raise ValueError(f"samples: {which.name} reads no code and paints one picture of a "
                             "map; leave --samples out")
        if which.checkpoint is None:
            synthesis.calibrate(network, synthesis.semantics(network, first),
                                synthesis.draw_input(network, first, seed, clusters))
        rows: list[tuple[str, str, str, str]] = []
        sheet: list[list[tuple[str, Picture]]] = []
        made: Synthesizer | None = None
        sizes: list[tuple[str, tuple[int, int] | None]] = []
        older = cache(_numbered)
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
                    drawn += [(f"seed {seed + k}", picture)] if i < _GRID_ROWS else []
                _remove_older(older, out / scene.name, samples)
                spent = (time.perf_counter() - start) / samples
                sizes.append((scene.name, scene.source_size))
                if i < _GRID_ROWS:
                    sheet.append([(scene.name, scene.picture(preset.classes)),
                                  ("classes", scene.legend(preset.classes)), *drawn])
                files = f"{scene.name}_0.png" + (f" .. _{samples - 1}.png" if samples > 1 else "")
                if i < _TABLE_ROWS:
                    rows.append((scene.name, str(len(scene.present)), files, f"{spent:.2f}"))
        path = write_png(out / "grid.png", captioned_grid(sheet))
    show(("scene", "classes", "pictures", "seconds each"), rows)
    if len(scenes) > _TABLE_ROWS:
        console.print(f"... and {len(scenes) - _TABLE_ROWS} scenes more")
    say_resized(sizes, preset.image_size)
    console.print(f"weights: {which.weights}", soft_wrap=True)
    shown = "all" if len(scenes) <= _GRID_ROWS else f"the first {_GRID_ROWS} scenes"
    console.print(f"{len(scenes) * samples} pictures in {out}, {shown} on {path}", soft_wrap=True)


_Numbered = dict[str, dict[int, Path]]


def _numbered(folder: Path) -> _Numbered:
    """The pictures ``<scene>_<number>.png`` of a folder: scene -> number -> file."""
    found: _Numbered = {}
    for name in os.listdir(folder):
        if match := re.fullmatch(r"(.+)_(0|[1-9][0-9]*)\.png", name):
            found.setdefault(match[1], {})[int(match[2])] = folder / name
    return found


def _remove_older(pictures: Callable[[Path], _Numbered], scene: Path, samples: int) -> None:
    """Pictures of a scene that an earlier run with more samples has left."""
    for number, path in pictures(scene.parent).get(scene.name, {}).items():
        if number >= samples and written_here(path):
            path.unlink()


@command()
def features(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="file to write, .npz",
                                      callback=file_to_write(".npz"))],
    model: Model = None, checkpoint: Checkpoint = None,
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
        unusable(context, "--convert reads its file alone", "images", "instances", "model",
                 "checkpoint", "clusters", "device", "seed")
        existing("convert", convert, "an official .npy of clusters")
        keep_inputs([out], [convert], "name")
        found = FeatureClusters.load(convert)
    elif images is None or instances is None:
        raise ValueError("images, instances: expected both (or --convert); give two folders")
    else:
        which = chosen(model, checkpoint, device, seed, default="pix2pixhd_cityscapes_features")
        place, preset = which.place, which.preset
        if not isinstance(preset, Pix2pixHDPreset) or not preset.features:
            raise ValueError(f"model: expected one that reads instance features, got "
                             f"{which.name!r}")
        clustering()  # which may be missing: not told when all is encoded
        encoder = which.load(part="encoder")
        files = map_files("images", images, PICTURE, PICTURE_SUFFIXES)
        say_resized([(name, image_size(path)) for name, path in files.items()], preset.image_size,
                    "pictures")
        with progress(2 * len(files)) as step:
            for _ in synthesis.read_photographs(images, instances, preset.image_size):
                step("checking")  # a bad file would cost all that was encoded before it
            scenes = synthesis.read_photographs(images, instances, preset.image_size)
            encoded = encode_features(
                encoder, ((image.to(place), ids.to(place)) for image, ids in scenes), step)
        found = FeatureClusters.fit(encoded, clusters)
    path = found.save(out)
    total = sum(len(centers) for centers in found.centers.values())
    console.print(f"{total} clusters of {len(found.centers)} classes in {path}", soft_wrap=True)


@command()
def demo(
    context: typer.Context,
    out: Out = Path("demo"), model: Model = None, checkpoint: Checkpoint = None,
    labels: Labels = None, instances: Instances = None, samples: Samples = 3,
    scenes: Annotated[int, typer.Option(help="sample scenes to draw without --labels", min=1)] = 2,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu", unknown: Unknown = None,
    full: Annotated[
        bool, typer.Option("--full", help="published width, where random weights take a quarter")
    ] = False,
) -> None:
    """Pictures from label maps, and this machine's speed table, on one HTML page."""
    if labels is None:
        unusable(context, "no --labels are given", "instances", "unknown")
    else:
        unusable(context, "--labels are given", "scenes")
    which = chosen(model, checkpoint, device, seed, default="groupdnet_scenes")
    if which.checkpoint is not None:
        unusable(context, "trained weights have one width", "full")
    published = full or which.checkpoint is not None
    with locked(out), selected(backend):
        preset = which.preset
        if not isinstance(preset, GroupDNetPreset):
            raise ValueError(
                "model: expected a GroupDNet, for the demo draws the code of one class anew; got "
                f"{which.name!r}; smis synthesize takes every model"
            )
        if labels is None:
            shown: Sequence[Scene] = synthesis.sample_scenes(preset, scenes, seed, which.name)
        else:
            of_files = synthesis.read_scenes(labels, instances, preset,
                                             which.class_of("unknown", unknown), which.classes)
            keep_inputs((out / f"{of.name}.png" for of in of_files.files), of_files.read)
            shown = of_files
            say_resized(((x.name, x.source_size) for x in shown), preset.image_size)
        options = {} if published else _quarter_width(preset)
        network = which.load(**options)
        if which.checkpoint is not None and "encoder" not in dict(network.named_children()):
            network.add_module("encoder", create_model(which.name, part="encoder",
                                                       device=which.place).eval())
        width = "its whole width" if published else "a quarter of the published width (--full: all)"
        console.print(f"{network.name}, {width}", soft_wrap=True)
        if which.checkpoint is None:
            planes = synthesis.semantics(network, shown[0])
            synthesis.calibrate(network, planes, draw_code(network, seed))
        with progress(demonstration.forwards(len(shown), samples) + 3) as step:
            made = demonstration.run(
                network, shown, out, samples=samples, seed=seed, width=width,
                random_weights=which.checkpoint is None, step=step,
            )
    show(("stage", "reference, ms", "fused, ms", "speedup"), (
        (stage.name, f"{stage.reference * 1e3:.1f}", f"{stage.fused * 1e3:.1f}",
         f"{stage.speedup:.2f}x") for stage in made.stages))
    if made.backend == "reference":
        console.print("[yellow]The fused kernels are not available here[/]: both columns are the "
                      "reference; `smis info` says what is missing.", markup=True)
    console.print(f"weights: {which.weights}", soft_wrap=True)
    console.print(f"open {made.files[0]}; grids: {', '.join(map(str, made.files[1:]))}",
                  soft_wrap=True)


def _quarter_width(preset: GroupDNetPreset) -> dict[str, int]:
    """Options for a network that two CPU cores run in about a second."""
    groups = preset.classes
    return {"ngf": preset.ngf // 4, "nef": max(1, preset.nef // 4 // groups) * groups}
