"""``smis mix | edit | morph | resample``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..io.animation import check_format, write_animation
from ..io.images import grid, write_png
from ..synthesis import applications
from ..synthesis import scene as synthesis
from ..synthesis.applications import Frame
from ..synthesis.codes import draw_code, drawn_code
from ..synthesis.edits import painted, parse_takes, relabelled
from ..synthesis.pictures import read_pictures
from ..synthesis.scene import Layout
from ..synthesis.shapes import ShapeLibrary
from .common import (
    Backend,
    Checkpoint,
    Device,
    Instances,
    Model,
    Out,
    Seed,
    Unknown,
    app,
    console,
    load_model,
    progress,
    resized_line,
    resolve_device,
    say_random,
    selected,
    weights_of,
)

LabelMap = Annotated[Path, typer.Option("--labels", help="label map (PNG) that is painted")]
Animation = Annotated[str, typer.Option(help="gif, apng or webp")]
Seconds = Annotated[float, typer.Option(help="that each frame stays")]
Pictures = Annotated[list[Path], typer.Option(
    help="picture whose appearance is taken; again for each, or a folder")]
PictureLabels = Annotated[list[Path], typer.Option(
    help="label map of each --images, in their order; or a folder, matched by scene")]
FeatureFile = Annotated[Path | None, typer.Option(
    "--features", help="clusters of instance features (.npz, or an official .npy)")]


@dataclass
class _Scene:
    """A model and the layout that it paints."""

    model: Any
    layout: Layout
    device: torch.device
    random: bool
    """Whether its weights are."""

    def encoded(self, images: Sequence[Path], labels: Sequence[Path],
                unknown: int | None) -> tuple[list[torch.Tensor], list[str]]:
        """Codes of pictures, and their names."""
        pictures = read_pictures(images, labels, self.model.preset, unknown)
        codes = [applications.encode(self.model, image, maps) for _, image, maps in pictures]
        return codes, [name for name, *_ in pictures]

    def code(self, images: Sequence[Path], labels: Sequence[Path], unknown: int | None,
             seed: int) -> Any:
        """The code of the one picture that is given, or one drawn by the seed."""
        if not images:
            return draw_code(self.model, seed)
        codes, names = self.encoded(images, labels, unknown)
        if len(codes) != 1:
            raise ValueError(f"images: expected one picture, got {len(names)}")
        return codes[0]


@contextmanager
def _scene(model: str, checkpoint: Path | None, labels: Path, instances: Path | None,
           unknown: int | None, seed: int, backend: str | None, device: str,
           animation: str) -> Iterator[_Scene]:
    check_format(animation)
    place = resolve_device(device)
    with selected(backend):
        checkpoint = weights_of(model, checkpoint)
        network = load_model(model, checkpoint, place, seed)
        layouts = synthesis.read_layouts(labels, instances, network.preset, unknown)
        if len(layouts) > 1:
            raise ValueError(f"labels: expected one label map, got {len(layouts)} in {labels}; "
                             "give a file")
        layout = layouts[0]
        say_random(checkpoint)
        if line := resized_line(layout):
            console.print(line, soft_wrap=True, highlight=False)
        yield _Scene(network, layout, place, checkpoint is None)


def _settle(scene: _Scene, z: Any) -> None:
    """Random weights paint grey until their scales are set."""
    if scene.random:
        synthesis.calibrate(scene.model, synthesis.semantics(scene.model, scene.layout), z)


def _write(name: str, frames: Iterator[Frame], total: int, scene: _Scene, out: Path,
           animation: str, seconds: float) -> None:
    """OUT/<name>_<k>.png, all of them with their layouts on OUT/<name>_grid.png, and animated."""
    drawn: list[Frame] = []
    with progress(total) as step:
        for frame in frames:
            step(frame.caption)
            drawn.append(frame)
    for k, frame in enumerate(drawn):
        write_png(out / f"{name}_{k}.png", frame.picture)
    classes = scene.model.preset.classes
    rows = [[frame.layout.picture(classes) for frame in drawn], [f.picture for f in drawn]]
    write_png(out / f"{name}_grid.png", grid(rows))
    path = write_animation(out / name, [f.picture for f in drawn], animation, seconds)
    for k, frame in enumerate(drawn):
        console.print(f"{name}_{k}.png: {frame.caption}", highlight=False)
    console.print(f"{len(drawn)} frames in {out}, animated in {path}", soft_wrap=True)


@app.command()
def mix(
    model: Model, labels: LabelMap, images: Pictures, image_labels: PictureLabels, out: Out,
    take: Annotated[list[str] | None, typer.Option(
        help="CLASS=PICTURE (number from 0, or name); may be given again. Without it: the classes "
             "in turn, largest first")] = None,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.6, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Appearance mixture: paint a label map with each class's code from another picture."""
    with _scene(model, checkpoint, labels, instances, unknown, seed, backend, device,
                animation) as scene:
        codes, names = scene.encoded(images, image_labels, unknown)
        takes = parse_takes(take, names) if take else None
        _settle(scene, codes[0])
        count = 1 + len(scene.layout.present if takes is None else takes)
        frames = applications.mix(scene.model, scene.layout, codes, takes, names)
        _write("mix", frames, count, scene, out, animation, seconds)


@app.command()
def edit(
    model: Model, labels: LabelMap, out: Out,
    relabel: Annotated[list[str] | None, typer.Option(
        help="FROM=TO: one class becomes another; may be given again")] = None,
    paint: Annotated[list[str] | None, typer.Option(
        help="CLASS:TOP,LEFT,BOTTOM,RIGHT: a box of a class; may be given again")] = None,
    to: Annotated[list[Path] | None, typer.Option(
        help="an edited label map; may be given again")] = None,
    to_instances: Annotated[list[Path] | None, typer.Option(
        help="instance map of each --to, where the model reads them")] = None,
    exchange: Annotated[int | None, typer.Option(
        help="an instance id, or a class: its shape is exchanged for others of --library")] = None,
    library: Annotated[Path | None, typer.Option(help="folder of label maps with shapes")] = None,
    library_instances: Annotated[Path | None, typer.Option(
        help="their instance maps, where the model reads them")] = None,
    shapes: Annotated[int, typer.Option(help="how many are shown", min=1)] = 4,
    texture: Annotated[bool, typer.Option(
        help="with every shape draw the class's code anew")] = True,
    images: Annotated[list[Path] | None, typer.Option(
        help="a picture whose codes are kept; without it they are drawn")] = None,
    image_labels: Annotated[list[Path] | None, typer.Option(help="its label map")] = None,
    features: FeatureFile = None,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.8, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Semantic manipulation: edit the label map and keep the codes; or exchange shapes.

    Edits follow one another: first --relabel, then --paint, then --to.
    """
    with _scene(model, checkpoint, labels, instances, unknown, seed, backend, device,
                animation) as scene:
        preset = scene.model.preset
        layouts = [scene.layout]
        for text in relabel or ():
            layouts.append(relabelled(layouts[-1], text, preset.classes))
        for text in paint or ():
            layouts.append(painted(layouts[-1], text, preset.classes))
        for path, ids in _paired(to or (), to_instances or ()):
            layouts += synthesis.read_layouts(path, ids, preset, unknown)
        if (exchange is None) == (len(layouts) == 1):
            raise ValueError("edit: expected --relabel, --paint or --to; or --exchange with "
                             "--library")
        clusters = synthesis.read_clusters(preset, features)
        if clusters is not None:
            z: Any = [synthesis.draw_input(scene.model, x, seed, clusters) for x in layouts]
            _settle(scene, z[0])
        else:
            z = scene.code(images or (), image_labels or (), unknown, seed)
            _settle(scene, z)
        if exchange is None:
            frames = applications.edit(scene.model, layouts, z)
            _write("edit", frames, len(layouts), scene, out, animation, seconds)
            return
        if library is None:
            raise ValueError("library: expected a folder of label maps with --exchange, got none")
        if clusters is not None:
            raise ValueError("exchange: expected a model with codes, got one that reads instance "
                             "features; use --to with the exchanged map")
        shelf = ShapeLibrary.from_layouts(
            synthesis.read_layouts(library, library_instances, preset, unknown))
        frames = applications.exchange(scene.model, scene.layout, exchange, shelf, shapes, seed, z,
                                       texture)
        _write("exchange", frames, 1 + shapes, scene, out, animation, seconds)


def _paired(maps: Sequence[Path], ids: Sequence[Path]) -> list[tuple[Path, Path | None]]:
    if ids and len(ids) != len(maps):
        raise ValueError(f"to-instances: expected {len(maps)}, one for each --to; got {len(ids)}")
    return list(zip(maps, ids or (None,) * len(maps), strict=True))


@app.command()
def morph(
    model: Model, labels: LabelMap, out: Out,
    images: Annotated[list[Path] | None, typer.Option(
        help="the two pictures between which is morphed; without them codes are drawn")] = None,
    image_labels: Annotated[list[Path] | None, typer.Option(
        help="their label maps, in the same order; or a folder")] = None,
    classes: Annotated[list[int] | None, typer.Option(
        "--class", help="a class whose code changes; may be given again; without it: all")] = None,
    steps: Annotated[int, typer.Option(help="frames, both ends included", min=2)] = 8,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.2, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Style morphing: from one code to another on a line."""
    with _scene(model, checkpoint, labels, instances, unknown, seed, backend, device,
                animation) as scene:
        if images:
            codes, names = scene.encoded(images, image_labels or (), unknown)
            if len(codes) != 2:
                raise ValueError(f"images: expected two pictures, got {len(names)}")
        else:
            codes = [drawn_code(scene.model, seed + k) for k in range(2)]
        start, end = codes
        _settle(scene, start)
        frames = applications.morph(scene.model, scene.layout, start, end, steps, classes)
        _write("morph", frames, steps, scene, out, animation, seconds)


@app.command()
def resample(
    model: Model, labels: LabelMap, out: Out,
    index: Annotated[int | None, typer.Option("--class", help="drawn anew", min=0)] = None,
    instance: Annotated[int | None, typer.Option(
        help="of a pix2pixHD with --features: its clusters in turn", min=0)] = None,
    samples: Annotated[int, typer.Option(help="draws", min=1)] = 6,
    images: Annotated[list[Path] | None, typer.Option(
        help="a picture whose codes are held; without it they are drawn")] = None,
    image_labels: Annotated[list[Path] | None, typer.Option(help="its label map")] = None,
    features: FeatureFile = None,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.5, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Draw one class (or the features of one instance) anew, again and again; hold the rest."""
    if (index is None) == (instance is None):
        raise ValueError("class, instance: expected one of them; give --class N")
    with _scene(model, checkpoint, labels, instances, unknown, seed, backend, device,
                animation) as scene:
        clusters = synthesis.read_clusters(scene.model.preset, features)
        if instance is not None:
            if clusters is None:
                raise ValueError("instance: this model reads no instance features; give --class")
            first = synthesis.draw_input(scene.model, scene.layout, seed, clusters)
            _settle(scene, first)
            frames = applications.edit_features(scene.model, scene.layout, clusters, instance,
                                                seed, samples)
            total = min(samples, clusters.count(instance))
            _write("resample", frames, total, scene, out, animation, seconds)
            return
        assert index is not None
        z = scene.code(images or (), image_labels or (), unknown, seed)
        _settle(scene, z)
        frames = applications.resample(scene.model, scene.layout, index, samples, seed, z)
        _write("resample", frames, 1 + samples, scene, out, animation, seconds)
