"""Commands about data sets: checking one, converting one, writing the generated one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from ..data.celebamask import HELD_OUT, convert_celebamask
from ..data.doctor import LABEL_RULES, Diagnosis, LabelRule, examine, find_splits
from ..data.listing import FOLDER_FORMATS, Problem, detect_layout
from ..data.write import write_scenes
from ..io.colours import convert_colours, read_colour_table
from ..io.files import locked, unfinished
from ..io.images import write_indices
from ..io.names import LOSSY_SUFFIXES, SUFFIXES, files_under
from .common import (
    Seed,
    called,
    command,
    console,
    existing,
    folder_to_write,
    keep_inputs,
    progress,
)


def _ranges(values: Iterable[int]) -> str:
    """0-3, 7, 9-11"""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join("-".join(str(end) for end in run) for run in runs)


def _summary(root: Path, folder_format: str, diagnosis: Diagnosis, rule: LabelRule | None) -> Table:
    table = Table(title=f"{root} as {folder_format}", show_header=False, title_justify="left")
    table.add_row("scenes", ", ".join(f"{n} {part}" for part, n in diagnosis.scenes.items()))
    sizes = [f"{w}x{h} ({n})" for (h, w), n in diagnosis.sizes.most_common(4)]
    more = len(diagnosis.sizes) - len(sizes)
    table.add_row("width x height", ", ".join(sizes) + (f" and {more} sizes more" if more else ""))
    table.add_row("labels found", _ranges(diagnosis.values))
    if rule is None:
        table.add_row("labels allowed", "any: give --classes to check them")
    else:
        unknown = "" if rule.unknown is None else f", 255 (becomes {rule.unknown})"
        table.add_row("labels allowed", f"0-{rule.classes - 1}{unknown}")
        absent = set(range(rule.classes)) - set(diagnosis.values)
        table.add_row("classes in no scene", _ranges(absent) or "none")
    return table


def _tell(problems: list[Problem], style: str, shown: int) -> None:
    for problem in problems[:shown]:
        console.print(f"[{style}]{escape(str(problem.path))}[/]: {escape(problem.message)}",
                      soft_wrap=True, highlight=False, markup=True)
    if len(problems) > shown:
        console.print(f"... and {len(problems) - shown} more (--show {len(problems)})")


@command()
def doctor(
    data: Annotated[Path, typer.Argument(help="the root folder of the data set")],
    dataset: Annotated[str | None, typer.Option(
        help=f"{', '.join(FOLDER_FORMATS)}; without it: told from the subfolders")] = None,
    split: Annotated[str | None, typer.Option(help="train or val; without it: both")] = None,
    classes: Annotated[int | None, typer.Option(
        help="labels must lie below this; published data sets know it", min=1)] = None,
    unknown: Annotated[int | None, typer.Option(help="class of pixels labelled 255", min=0)] = None,
    instances: Annotated[bool | None, typer.Option(
        "--instances/--no-instances", help="check instance maps; without it: where there are any",
    )] = None,
    jobs: Annotated[int | None, typer.Option(help="files read at a time", min=1)] = None,
    show: Annotated[int, typer.Option(help="problems shown at most", min=1)] = 50,
) -> None:
    """Check a data set and name every bad file and value; exit code 1 if there are problems."""
    existing("data", data, "the root folder of a data set")
    if not data.is_dir():
        raise ValueError(f"data: expected the root folder of a data set, got the file {data}")
    folder_format = dataset or detect_layout(data)
    rule = LABEL_RULES.get(folder_format)
    if classes is not None or unknown is not None:
        count = classes if classes is not None else rule.classes if rule else None
        if count is None:
            raise ValueError("unknown: give --classes too")
        if unknown is not None and unknown >= count:
            raise ValueError(f"unknown: expected a class 0..{count - 1}, got {unknown}")
        rule = LabelRule(count, unknown if unknown is not None or rule is None else rule.unknown)
    with called(folder_format="dataset"):
        listings = find_splits(folder_format, data, split, instances=instances)
    with progress(sum(len(listing.records) for listing in listings.values())) as step:
        diagnosis = examine(listings, rule, jobs=jobs, step=step)
    console.print(_summary(data, folder_format, diagnosis, rule))
    notes = [problem for problem in diagnosis.problems if problem.note]
    problems = [problem for problem in diagnosis.problems if not problem.note]
    _tell(notes, "yellow", show)
    _tell(problems, "red", show)
    if not diagnosis.healthy:
        console.print(f"[red]{len(problems)} problems[/]", markup=True)
        raise typer.Exit(1)
    console.print("[green]no problems[/]", markup=True)


@command("convert-labels")
def convert_labels(
    source: Annotated[Path, typer.Argument(help="colour-coded label map, or a folder of them")],
    out: Annotated[Path, typer.Argument(
        help="folder to write index maps (PNG) to", callback=folder_to_write)],
    colours: Annotated[Path | None, typer.Option(
        help="text file of lines CLASS R G B; without it: maps whose channels are equal")] = None,
) -> None:
    """Colour-coded label maps to class indices: all colours must be in the table, exactly."""
    existing("source", source, "a colour-coded label map, or a folder of them")
    existing("colours", colours, "a text file of lines CLASS R G B")
    table = None if colours is None else read_colour_table(colours)
    single = source.is_file()
    names = [source.name] if single else [
        name for name in files_under(source) if name.lower().endswith((*SUFFIXES, *LOSSY_SUFFIXES))]
    if not names:
        raise FileNotFoundError(f"source: no label map in {source}")
    targets: dict[Path, str] = {}
    for name in names:
        target = (out / name).with_suffix(".png")
        if target in targets:
            raise ValueError(f"source: {targets[target]} and {name} would both become {target}")
        if target.exists() and target.samefile(source if single else source / name):
            raise ValueError(f"out: {target} would be written over itself; give another folder")
        targets[target] = name
    keep_inputs(targets, [source] if single else [source / name for name in names])
    found: set[int] = set()
    task = {"command": "smis convert-labels"}
    with locked(out), unfinished(out, task), progress(len(targets)) as step:
        for target, name in targets.items():
            indices = convert_colours(source if single else source / name, table)
            found.update(np.unique(indices).tolist())
            write_indices(target, indices)
            step(name)
    console.print(f"{len(targets)} index maps in {out}, labels {_ranges(found)}", soft_wrap=True)


@command("convert-data")
def convert_data(
    kind: Annotated[str, typer.Argument(help="celebamask-hq")],
    root: Annotated[Path, typer.Argument(
        help="with CelebA-HQ-img and CelebAMask-HQ-mask-anno")],
    out: Annotated[Path, typer.Argument(help="folder to write to", callback=folder_to_write)],
    held_out: Annotated[int, typer.Option(
        help="the first picture of the split val; by default that of the published test set",
        min=0)] = HELD_OUT,
    jobs: Annotated[int | None, typer.Option(help="faces at a time", min=1)] = None,
) -> None:
    """CelebAMask-HQ to label maps of 19 classes, as the data set `folder` and doctor read them."""
    if kind != "celebamask-hq":
        raise ValueError(f"kind: expected celebamask-hq, got {kind!r}")
    existing("root", root, "the folder with CelebA-HQ-img and CelebAMask-HQ-mask-anno")
    with locked(out), progress(None) as step:
        counts = convert_celebamask(root, out, held_out=held_out, jobs=jobs, step=step)
    console.print(f"{counts['train']} faces to train on and {counts['val']} held out in {out}; "
                  f"smis train spade_celebamask --data.root {out} trains on them", soft_wrap=True)


@command()
def scenes(
    out: Annotated[Path, typer.Argument(
        help="folder to write to, new or empty; or one where this was stopped",
        callback=folder_to_write)],
    count: Annotated[int, typer.Option(help="scenes to train on", min=1)] = 1000,
    held_out: Annotated[int, typer.Option(help="scenes to evaluate on", min=0)] = 100,
    size: Annotated[int, typer.Option(help="height and width in pixels", min=1)] = 128,
    seed: Seed = 0,
) -> None:
    """Write the generated scenes as a data set: pictures, label maps, instance maps, modes."""
    with locked(out), progress(count + held_out) as step:
        folders = write_scenes(out, {"train": count, "val": held_out}, size, seed, step=step)
    for folder in folders:
        console.print(f"{folder}", soft_wrap=True, highlight=False)
