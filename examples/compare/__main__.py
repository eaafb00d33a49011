"""The comparison on the command line: ``python -m examples.compare``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress as bars
from rich.table import Table

from examples import compare as comparison
from examples.compare.report import notes
from smis_models import metrics
from smis_models.cli import main
from smis_models.cli.common import (
    Backend,
    Device,
    Out,
    Seed,
    console,
    progress,
    resolve_device,
    selected,
)
from smis_models.cli.evaluate import (
    DistanceNames,
    HeadFile,
    InceptionFile,
    TrunkFile,
    create_distances,
)
from smis_models.cli.usage import Command
from smis_models.io.files import locked
from smis_models.training import Progress

app = typer.Typer(add_completion=False)


@contextmanager
def _training(minutes: float, names: tuple[str, ...]) -> Iterator[Any]:
    """A bar of the time that each system has."""
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=console, transient=True) as bar:
        tasks = {name: bar.add_task(f"training {name}", total=60 * minutes) for name in names}

        def report(name: str, state: Progress, left: float) -> None:
            speed = state.values["images_per_second"]
            bar.update(tasks[name], completed=60 * minutes - left,
                       description=f"training {name}, step {state.step}, {speed:.1f} images/s")

        yield report


@app.command(cls=Command)
def compare(
    minutes_per_model: Annotated[float, typer.Option(
        help="of training for each system; stated in the result", min=0)],
    out: Out = Path("comparison"),
    only: Annotated[list[str] | None, typer.Option(
        help=f"{', '.join(comparison.SYSTEMS)}; may be given again; without it: all")] = None,
    size: Annotated[int, typer.Option(help="height and width of the pictures")] = 64,
    width: Annotated[int, typer.Option(
        help="GroupDNet's ngf (published: 160); the others' follow from their sizes")] = 20,
    ndf: Annotated[int, typer.Option(help="width of the discriminators")] = 32,
    batch: Annotated[int, typer.Option(help="images of a step")] = 8,
    workers: Annotated[int, typer.Option(help="processes that draw scenes", min=0)] = 1,
    layouts: Annotated[int, typer.Option(help="held-out layouts of mCSD and mOCD")] = 16,
    samples: Annotated[int, typer.Option(help="pictures of each layout and class")] = 20,
    pairs: Annotated[int, typer.Option(help="of them that are compared")] = 19,
    pictures: Annotated[int, typer.Option(help="held-out scenes painted for mIoU and FID")] = 200,
    speed_seconds: Annotated[float, typer.Option(help="of measuring speed", min=0)] = 30.0,
    distance: DistanceNames = ["random-alex", "pixel"],  # noqa: B006 (typer copies it)
    lpips_weights: TrunkFile = None, lpips_heads: HeadFile = None,
    inception_weights: InceptionFile = None,
    vgg: Annotated[Path | None, typer.Option(
        help="torchvision's VGG19 weights, for the perceptual loss of those that have one")] = None,
    seed: Seed = 0, backend: Backend = None, device: Device = "cpu",
) -> None:
    """Train GroupDNet's comparison systems on the same time each, and measure them.

    Stopped at any moment, the same command goes on. For LPIPS give --distance lpips-alex
    --lpips-weights FILE; without them the trunk is a random one, and the tables say so.
    """
    place = resolve_device(device)
    settings = comparison.Settings(
        minutes=minutes_per_model, systems=tuple(only or comparison.SYSTEMS), size=size,
        width=width, ndf=ndf, batch=batch, workers=workers, seed=seed,
        vgg=None if vgg is None else str(vgg), layouts=layouts, samples=samples, pairs=pairs,
        pictures=pictures, seconds=speed_seconds,
    )
    distances = create_distances(distance, lpips_weights, lpips_heads, place)
    extractor = None if inception_weights is None else metrics.Inception(inception_weights, place)
    with locked(out), selected(backend), _training(
            minutes_per_model, settings.systems) as report:
        trained = comparison.train(settings, out, device=place, report=report)
    with locked(out), selected(backend), progress(None) as step:
        result = comparison.measure(settings, out, trained, distances, extractor=extractor,
                                    device=place, step=step, expect=step.expect)
    head, lines = comparison.table(result)
    for first in range(1, len(head), 6):  # as much as a terminal shows
        rows = Table(head[0], *head[first:first + 6])
        for line in lines:
            rows.add_row(line[0], *line[first:first + 6])
        console.print(rows)
    for text in notes(result):
        console.print(text, soft_wrap=True, highlight=False)
    for metric, (found, published) in comparison.found_order(result).items():
        console.print(f"{metric}, best first: {', '.join(found)} (published: "
                      f"{', '.join(published)})", soft_wrap=True, highlight=False)
    console.print(f"wrote {out / 'comparison.md'}, {out / 'comparison.json'}", soft_wrap=True)


if __name__ == "__main__":
    main(app)
