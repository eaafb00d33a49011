"""``smis evaluate``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import metrics
from ..data import FileScenes, build_dataset
from ..data.listing import one_set
from ..io.files import file_hashes
from ..io.hub import metric_rows
from ..io.images import image_size, write_atomically
from ..io.names import map_files
from ..metrics import DISTANCES, PROTOCOLS, Distance, Metrics, Scenes
from ..synthesis import scene as synthesis
from .common import (
    Backend,
    Checkpoint,
    Device,
    Features,
    Instances,
    Labels,
    Model,
    Seed,
    Unknown,
    called,
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
    weight_files,
)

DistanceNames = Annotated[list[str], typer.Option(
    "--distance", help=f"{', '.join(DISTANCES)} or none; may be given again")]
TrunkFile = Annotated[Path | None, typer.Option(
    help="torchvision's ImageNet weights of the trunk")]
HeadFile = Annotated[Path | None, typer.Option(
    help="LPIPS' linear weights, if neither lpips nor torchmetrics is installed")]
InceptionFile = Annotated[Path | None, typer.Option(
    help="torch-fidelity's Inception weights: FID is measured")]
SegmenterFile = Annotated[str | None, typer.Option(
    help="TorchScript .pt or torch.export .pt2, or `scenes` for the generated scenes' own: mIoU "
         "is measured")]


@command()
def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="JSON file to write", callback=file_to_write(""))],
    model: Model = None, checkpoint: Checkpoint = None,
    labels: Labels = None, instances: Instances = None, unknown: Unknown = None,
    dataset: Annotated[str | None, typer.Option(
        help="scenes, cityscapes, ade20k, coco_stuff, deepfashion or folder, in place of --labels",
    )] = None,
    root: Annotated[Path | None, typer.Option(help="folder of the data set")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    count: Annotated[int, typer.Option(help="how many generated scenes", min=1)] = 100,
    protocol: Annotated[str, typer.Option(help=", ".join(PROTOCOLS))] = "n100-m19",
    layouts: Annotated[int | None, typer.Option(help="n of the protocol", min=1)] = None,
    samples: Annotated[int | None, typer.Option(
        help="pictures of each layout and class", min=2)] = None,
    pairs: Annotated[int | None, typer.Option(help="m of the protocol", min=1)] = None,
    mask_mode: Annotated[str | None, typer.Option(help="zero or spatial")] = None,
    dont_care: Annotated[str | None, typer.Option(help="ignore or count")] = None,
    distance: DistanceNames = ["lpips-alex"],  # noqa: B006 (typer copies it)
    lpips_weights: TrunkFile = None, lpips_heads: HeadFile = None,
    inception_weights: InceptionFile = None,
    segmenter: SegmenterFile = None,
    segmenter_input: Annotated[str, typer.Option(help="symmetric, unit or imagenet")] = "imagenet",
    predictions: Annotated[Path | None, typer.Option(
        help="a segmentation model's label maps of earlier pictures, in place of --segmenter",
    )] = None,
    rule: Annotated[str, typer.Option(
        "--label-rule", help="same, cityscapes (19 train ids) or ade20k (150, from 0)")] = "same",
    features: Features = None,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
) -> None:
    """Measure mCSD, mOCD, LPIPS, FID, mIoU and accuracy; write a JSON that says how."""
    if (labels is None) == (dataset is None):
        raise ValueError("labels, dataset: expected one of them; give --labels DIR, or --dataset "
                         "scenes")
    if segmenter is not None and predictions is not None:
        raise ValueError("segmenter, predictions: expected one of them, got both")
    if dataset is None:
        unusable(context, "--labels are given, and no --dataset", "root", "split", "count")
    else:
        unusable(context, "--dataset is given, and no --labels", "instances")
    if dataset == "scenes":
        unusable(context, "the generated scenes lie in no folder", "root")
    elif dataset is not None:
        unusable(context, "it counts the generated scenes, --dataset scenes", "count")
    if segmenter in (None, "scenes"):
        unusable(context, "it is of a --segmenter from a file", "segmenter_input")
    if segmenter is None and predictions is None:
        unusable(context, "no --segmenter and no --predictions are given", "rule")
    existing("root", root, "the folder of the data set")
    which = chosen(model, checkpoint, device, seed)
    inputs = weight_files(which.checkpoint, lpips_weights, lpips_heads, inception_weights,
                          None if segmenter in (None, "scenes") else Path(segmenter), features)
    place = which.place
    with called(mask_mode="mask-mode", dont_care="dont-care"):
        pinned = metrics.protocol(protocol, layouts=layouts, samples=samples, pairs=pairs,
                                  mask_mode=mask_mode, dont_care=dont_care)
    clusters = synthesis.read_clusters(which.preset, features)
    index = which.class_of("unknown", unknown)
    labelled = metrics.label_rule(rule, which.preset, pinned.dont_care)
    distances = create_distances(distance, lpips_weights, lpips_heads, place)
    extractor = None if inception_weights is None else metrics.Inception(inception_weights, place)
    # Before they are read: a run may write others from then on.
    hashes = None if which.checkpoint is None else file_hashes(which.checkpoint)
    with selected(backend):
        network = which.load()
        preset = network.preset
        judge: Any = metrics.scene_labels if segmenter == "scenes" else None
        if segmenter is not None and judge is None:
            judge = metrics.FileSegmenter(segmenter, segmenter_input, place)
        measured = Metrics(distances, extractor, judge, predictions, labelled)
        if dataset is not None:
            with called(**{"data set": "dataset"}):
                read = build_dataset(dataset, root, preset, split, count=count, augment=False,
                                     unknown=index, seed=0)
            shared = dataset == "folder" and split != "train" and root is not None and one_set(
                root, split)
            facts = {"dataset": dataset, "root": None if root is None else str(root),
                     "split": "one set for every split" if shared else split}
            scenes = Scenes(read, facts)
            if isinstance(read, FileScenes):
                inputs += [Path(path) for of in read.records
                           for path in (of.image, of.labels, of.instances) if path]
        else:
            assert labels is not None
            found = synthesis.read_scenes(labels, instances, preset, index)
            say_resized([(of.name, image_size(of.labels)) for of in found.files if of.labels],
                        preset.image_size)
            scenes = Scenes(found, {"labels": str(labels)})
            inputs += found.read
        if predictions is not None:
            maps = map_files("predictions", predictions)
            say_resized([(name, image_size(path)) for name, path in maps.items()],
                        preset.image_size)
            inputs += maps.values()
        keep_inputs([out], inputs, "name")
        with progress(None) as step:
            result = metrics.evaluate(
                network, scenes, measured, pinned, checkpoint=which.checkpoint, hashes=hashes,
                seed=seed, clusters=clusters, step=step, expect=step.expect)
    show_metrics(result)  # first: a file that cannot be written costs no number
    _write(out, (json.dumps(result, indent=1) + "\n").encode())
    for what, reason in result.get("failed", {}).items():
        console.print(f"{what}: not measured: {reason}", highlight=False, soft_wrap=True)
    for what, flag in (("fid", "--inception-weights"), ("segmentation", "--segmenter")):
        if what not in {**result["results"], **result.get("failed", {})}:
            console.print(f"{what}: not measured; {flag} measures it", highlight=False)
    console.print(f"{result['seconds']:.1f} s; wrote {out}", soft_wrap=True)


def _write(out: Path, content: bytes) -> None:
    """Write the results; where that cannot be, into a temporary folder.

    Raises:
        OSError: with the place where they are.
    """
    try:
        write_atomically(out, content)
    except OSError as error:
        try:
            place = str(write_atomically(Path(tempfile.mkdtemp(prefix="smis-")) / out.name,
                                         content))
        except OSError:
            typer.echo(content.decode(), nl=False)
            place = "printed above"
        raise OSError(f"out: {out} cannot be written ({error.strerror}); the results are "
                      f"{place}") from error


def show_metrics(result: dict[str, Any]) -> None:
    """What was measured, and by which protocol, as a table."""
    show(("metric", "value", "measured with"), metric_rows(result),
         title=metrics.protocol_title(result["protocol"]))


def create_distances(names: list[str], weights: Path | None, heads: Path | None,
                     device: torch.device) -> list[Distance]:
    """The distances that were asked for; `none` for none."""
    wanted = [name for name in dict.fromkeys(names) if name != "none"]
    for option, file in (("lpips-weights", weights), ("lpips-heads", heads)):
        if file is not None and not any(name.startswith("lpips") for name in wanted):
            raise ValueError(f"{option}: {', '.join(names)} reads none; add --distance lpips-alex")
        existing(option, file, "a .pth or .safetensors file")
    files = {name: (weights, heads) if name.startswith("lpips") else (None, None)
             for name in wanted}
    return [metrics.create_distance(name, *files[name], device=device) for name in wanted]
