"""``smis mix | edit | morph | resample``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..data.classes import class_index
from ..io.animation import FORMATS, check_animation, write_animation
from ..io.files import locked
from ..io.images import Picture, to_pictures, write_png, written_here
from ..io.names import files_under
from ..io.sheet import captioned, captioned_grid
from ..synthesis import applications
from ..synthesis import scene as synthesis
from ..synthesis.applications import Frame
from ..synthesis.codes import draw_code, drawn_code
from ..synthesis.edits import painted, parse_takes, relabelled
from ..synthesis.pictures import read_pictures
from ..synthesis.scene import Scene
from ..synthesis.shapes import ShapeLibrary
from .common import (
    Backend,
    Checkpoint,
    Device,
    Features,
    Instances,
    Model,
    Out,
    Seed,
    Unknown,
    called,
    chosen,
    command,
    console,
    keep_inputs,
    progress,
    say_resized,
    selected,
    unusable,
)

LabelMap = Annotated[Path, typer.Option("--labels", help="label map (PNG) that is painted")]
Animation = Annotated[str, typer.Option(help="gif, apng or webp")]
Seconds = Annotated[float, typer.Option(help="that each frame stays")]
Pictures = Annotated[list[Path], typer.Option(
    help="picture whose appearance is taken; again for each, or a folder")]
PictureLabels = Annotated[list[Path], typer.Option(
    help="label map of each --images, in their order; or a folder, matched by scene")]


@dataclass
class _Application:
    """A model, the scene that it paints, and what becomes of its pictures."""

    model: Any
    scene: Scene
    random: bool
    """Whether its weights are."""
    names: tuple[str, ...]
    """Of all classes."""
    unknown: int | None
    out: Path
    animation: str
    seconds: float
    sources: list[tuple[str, Picture]] = field(default_factory=list)
    """The pictures that were encoded, by their names."""

    def encoded(self, images: Sequence[Path], labels: Sequence[Path],
                ) -> tuple[list[torch.Tensor], list[str]]:
        """Codes of pictures, and their names."""
        pictures = read_pictures(images, labels, self.model.preset, self.unknown)
        codes = [applications.encode(self.model, p.image, p.labels) for p in pictures]
        self.sources = [(p.name, to_pictures(p.image)[0]) for p in pictures]
        say_resized([(p.name, size) for p in pictures for size in p.source_sizes],
                    self.model.preset.image_size)
        return codes, [p.name for p in pictures]

    def code(self, images: Sequence[Path], labels: Sequence[Path], seed: int) -> Any:
        """The code of the one picture that is given, or one drawn by the seed."""
        if not images:
            if labels:
                raise ValueError("image-labels: no --images are given; leave it out")
            return draw_code(self.model, seed)
        codes, names = self.encoded(images, labels)
        if len(codes) != 1:
            raise ValueError(f"images: expected one picture, got {len(names)}")
        return codes[0]

    def scenes(self, option: str, labels: Path, instances: Path | None) -> Sequence[Scene]:
        """Label maps, or one, of an option, at the model's size; what is resized is told."""
        with called(labels=option, instances=f"{option}-instances"):
            found = list(synthesis.read_scenes(labels, instances, self.model.preset, self.unknown,
                                                self.names))
        say_resized([(x.name, x.source_size) for x in found], self.model.preset.image_size)
        return found

    def class_of(self, argument: str, text: str) -> int:
        """The class that a name or a number means."""
        return class_index(argument, text, self.names)

    def settle(self, z: Any) -> None:
        """Random weights paint grey until their scales are set."""
        if self.random:
            synthesis.calibrate(self.model, synthesis.semantics(self.model, self.scene), z)

    def write(self, name: str, frames: Iterator[Frame], total: int) -> None:
        """OUT/<name>_<k>.png, all of them with their scenes on OUT/<name>_grid.png, and animated.

        What an earlier run of the same name has left beside them goes.
        """
        drawn: list[Frame] = []
        with progress(total) as step:
            for frame in frames:
                step(frame.caption)
                drawn.append(frame)
        files = [self.out / f"{name}_{k}.png" for k in range(len(drawn))]
        for file, frame in zip(files, drawn, strict=True):
            write_png(file, frame.picture)
        classes, first = self.model.preset.classes, drawn[0].scene
        shared = all(frame.scene is first for frame in drawn)
        maps = [("layout", first.picture(classes))] if shared else [
            (f"layout {k}", frame.scene.picture(classes)) for k, frame in enumerate(drawn)]
        rows = [[*maps, ("classes", first.legend(classes)), *self.sources],
                [(frame.caption, frame.picture) for frame in drawn]]
        write_png(self.out / f"{name}_grid.png", captioned_grid(rows))
        shown = [captioned(frame.picture, frame.caption) for frame in drawn]
        path = write_animation(self.out / name, shown, self.animation, self.seconds)
        animations = {name + suffix for _, suffix in FORMATS.values()}
        for old in self.out.glob(f"{name}*"):
            left = old.name in animations or re.fullmatch(rf"{name}_\d+\.png", old.name)
            if left and old not in (path, *files) and written_here(old):
                old.unlink()
        for file, frame in zip(files, drawn, strict=True):
            console.print(f"{file.name}: {frame.caption}", highlight=False, markup=False)
        console.print(f"{len(drawn)} frames in {self.out}, animated in {path}", soft_wrap=True)


_WRITTEN = re.compile(r"(mix|edit|exchange|morph|resample)(_\d+|_grid)?\.(png|gif|webp)")


def _keep_inputs(out: Path, *paths: Path | None) -> None:
    """Refuse to write over what is read, be it in a folder."""
    read = [file for path in paths if path is not None for file in (
        (path / name for name in files_under(path)) if path.is_dir() else (path,))]
    keep_inputs((out / path.name for path in read if _WRITTEN.fullmatch(path.name)), read)


@contextmanager
def _prepared(model: str | None, checkpoint: Path | None, labels: Path, instances: Path | None,
              unknown: str | None, seed: int, backend: str | None, device: str,
              animation: str, seconds: float, out: Path) -> Iterator[_Application]:
    check_animation(animation, seconds)
    _keep_inputs(out, labels, instances)
    which = chosen(model, checkpoint, device, seed)
    index, names = which.class_of("unknown", unknown), which.classes
    with locked(out), selected(backend):
        scenes = synthesis.read_scenes(labels, instances, which.preset, index, names)
        if len(scenes) > 1:
            raise ValueError(f"labels: expected one label map, got {len(scenes)} in {labels}; "
                             "give a file")
        scene, network = scenes[0], which.load()
        say_resized([(scene.name, scene.source_size)], network.preset.image_size)
        yield _Application(network, scene, which.checkpoint is None, names, index, out, animation,
                           seconds)


@command()
def mix(
    labels: LabelMap, images: Pictures, image_labels: PictureLabels, out: Out,
    model: Model = None,
    take: Annotated[list[str] | None, typer.Option(
        help="CLASS=PICTURE (number from 0, or name); may be given again. Without it: the classes "
             "in turn, largest first")] = None,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.6, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Appearance mixture: paint a label map with each class's code from another picture."""
    _keep_inputs(out, *images, *image_labels)
    with _prepared(model, checkpoint, labels, instances, unknown, seed, backend, device,
                   animation, seconds, out) as made:
        codes, names = made.encoded(images, image_labels)
        takes = parse_takes(take, names, made.names) if take else None
        made.settle(codes[0])
        count = 1 + len(made.scene.present if takes is None else takes)
        frames = applications.mix(made.model, made.scene, codes, takes, names)
        made.write("mix", frames, count)


@command()
def edit(
    context: typer.Context, labels: LabelMap, out: Out, model: Model = None,
    relabel: Annotated[list[str] | None, typer.Option(
        help="FROM=TO: one class becomes another; may be given again")] = None,
    paint: Annotated[list[str] | None, typer.Option(
        help="CLASS:TOP,LEFT,BOTTOM,RIGHT: a box of a class; may be given again")] = None,
    to: Annotated[list[Path] | None, typer.Option(
        help="an edited label map; may be given again")] = None,
    to_instances: Annotated[list[Path] | None, typer.Option(
        help="instance map of each --to, where the model reads them")] = None,
    exchange: Annotated[str | None, typer.Option(
        help="an instance id, or a class (name or number): its shape is exchanged for others of "
             "--library")] = None,
    library: Annotated[Path | None, typer.Option(help="folder of label maps with shapes")] = None,
    library_instances: Annotated[Path | None, typer.Option(
        help="their instance maps, where the model reads them")] = None,
    shapes: Annotated[int, typer.Option(help="how many are shown", min=1)] = 4,
    texture: Annotated[bool, typer.Option(
        help="with every shape draw the class's code anew")] = True,
    images: Annotated[list[Path] | None, typer.Option(
        help="a picture whose codes are kept; without it they are drawn")] = None,
    image_labels: Annotated[list[Path] | None, typer.Option(help="its label map")] = None,
    features: Features = None,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.8, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Semantic manipulation: edit the label map and keep the codes; or exchange shapes.

    Edits follow one another: first --relabel, then --paint, then --to.
    """
    _keep_inputs(out, library, library_instances, *(to or ()), *(to_instances or ()),
                 *(images or ()), *(image_labels or ()))
    with _prepared(model, checkpoint, labels, instances, unknown, seed, backend, device,
                   animation, seconds, out) as made:
        preset = made.model.preset
        scenes = [made.scene]
        for text in relabel or ():
            scenes.append(relabelled(scenes[-1], text, preset.classes))
        for text in paint or ():
            scenes.append(painted(scenes[-1], text, preset.classes))
        for path, ids in _paired(to or (), to_instances or ()):
            scenes += made.scenes("to", path, ids)
        if (exchange is None) == (len(scenes) == 1):
            raise ValueError("edit: expected --relabel, --paint or --to; or --exchange with "
                             "--library")
        if exchange is None:
            unusable(context, "is read with --exchange alone", "library", "library_instances",
                     "shapes", "texture")
        clusters = synthesis.read_clusters(preset, features)
        if clusters is not None:
            unusable(context, "this model reads instance features in place of pictures",
                     "images", "image_labels")
            z: Any = [synthesis.draw_input(made.model, x, seed, clusters) for x in scenes]
            made.settle(z[0])
        else:
            z = made.code(images or (), image_labels or (), seed)
            made.settle(z)
        if exchange is None:
            frames = applications.edit(made.model, scenes, z)
            made.write("edit", frames, len(scenes))
            return
        if library is None:
            raise ValueError("library: expected a folder of label maps with --exchange, got none")
        if clusters is not None:
            raise ValueError("exchange: expected a model with codes, got one that reads instance "
                             "features; use --to with the exchanged map")
        if texture and not hasattr(made.model.generator, "class_channels"):
            raise ValueError(f"texture: {made.model.name} has no code for each class that could be "
                             "drawn anew; give --no-texture")
        shelf = ShapeLibrary.from_scenes(made.scenes("library", library, library_instances))
        target = int(exchange) if exchange.isdecimal() else made.class_of("exchange", exchange)
        frames = applications.exchange(made.model, made.scene, target, shelf, shapes, seed, z,
                                       texture)
        made.write("exchange", frames, 1 + shapes)


def _paired(maps: Sequence[Path], ids: Sequence[Path]) -> list[tuple[Path, Path | None]]:
    if ids and len(ids) != len(maps):
        raise ValueError(f"to-instances: expected {len(maps)}, one for each --to; got {len(ids)}")
    return list(zip(maps, ids or (None,) * len(maps), strict=True))


@command()
def morph(
    context: typer.Context, labels: LabelMap, out: Out, model: Model = None,
    images: Annotated[list[Path] | None, typer.Option(
        help="the two pictures between which is morphed; without them codes are drawn")] = None,
    image_labels: Annotated[list[Path] | None, typer.Option(
        help="their label maps, in the same order; or a folder")] = None,
    classes: Annotated[list[str] | None, typer.Option(
        "--class", help="a class (name or number) whose code changes; may be given again; without "
                        "it: all")] = None,
    steps: Annotated[int, typer.Option(help="frames, both ends included", min=2)] = 8,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.2, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Style morphing: from one code to another on the sphere, so that the variance is kept."""
    _keep_inputs(out, *(images or ()), *(image_labels or ()))
    with _prepared(model, checkpoint, labels, instances, unknown, seed, backend, device,
                   animation, seconds, out) as made:
        if images:
            codes, names = made.encoded(images, image_labels or ())
            if len(codes) != 2:
                raise ValueError(f"images: expected two pictures, got {len(names)}")
        else:
            unusable(context, "no --images are given", "image_labels")
            codes = [drawn_code(made.model, seed + k) for k in range(2)]
        start, end = codes
        made.settle(start)
        chosen = None if classes is None else [made.class_of("class", c) for c in classes]
        frames = applications.morph(made.model, made.scene, start, end, steps, chosen)
        made.write("morph", frames, steps)


@command()
def resample(
    context: typer.Context, labels: LabelMap, out: Out, model: Model = None,
    index: Annotated[str | None, typer.Option(
        "--class", help="drawn anew: a class's name or number")] = None,
    instance: Annotated[int | None, typer.Option(
        help="of a pix2pixHD with --features: its clusters in turn", min=0)] = None,
    samples: Annotated[int, typer.Option(help="draws", min=1)] = 6,
    images: Annotated[list[Path] | None, typer.Option(
        help="a picture whose codes are kept; without it they are drawn")] = None,
    image_labels: Annotated[list[Path] | None, typer.Option(help="its label map")] = None,
    features: Features = None,
    checkpoint: Checkpoint = None, instances: Instances = None, animation: Animation = "gif",
    seconds: Seconds = 0.5, seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
    unknown: Unknown = None,
) -> None:
    """Draw one class (or the features of one instance) anew, again and again; hold the rest."""
    if (index is None) == (instance is None):
        raise ValueError("class, instance: expected one of them; give --class N")
    _keep_inputs(out, *(images or ()), *(image_labels or ()))
    with _prepared(model, checkpoint, labels, instances, unknown, seed, backend, device,
                   animation, seconds, out) as made:
        clusters = synthesis.read_clusters(made.model.preset, features)
        if instance is not None:
            if clusters is None:
                raise ValueError("instance: this model reads no instance features; give --class")
            unusable(context, "instance features are drawn from the clusters", "images",
                     "image_labels")
            first = synthesis.draw_input(made.model, made.scene, seed, clusters)
            made.settle(first)
            frames = applications.edit_features(made.model, made.scene, clusters, instance,
                                                seed, samples)
            total = min(samples, clusters.count(instance))
            with called(chosen="instance"):
                made.write("resample", frames, total)
            return
        assert index is not None
        z = made.code(images or (), image_labels or (), seed)
        made.settle(z)
        frames = applications.resample(made.model, made.scene, made.class_of("class", index),
                                       samples, seed, z)
        made.write("resample", frames, 1 + samples)
