"""``smis train CONFIG``."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import training
from .common import Backend, Device, app, console, resolve_device, selected

_SHOWN = ("images_per_second", "waiting", "memory", "rate_generator", "rate_discriminator")


@contextmanager
def _stopping() -> Iterator[Event]:
    """Ctrl-C and SIGTERM end the run after the present step, with a checkpoint."""
    asked = Event()
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings(shown: bool) -> Iterator[None]:
    """Warnings in one line each, by one process."""
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if shown:
            console.print(f"[yellow]{escape(str(message))}[/]", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment,unused-ignore]
        yield


def _speed(values: dict[str, float]) -> str:
    return (f"{values['images_per_second']:.1f} images/s, {values['memory']:.0f} MB, "
            f"{values['waiting']:.0%} waiting for data")


def _losses(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in values.items() if k not in _SHOWN)


@app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(
        help=f"a .yaml or .json file, or one of {', '.join(training.RECIPES)}")],
    out: Annotated[Path, typer.Option(help="folder of the run")],
    resume: Annotated[bool, typer.Option(
        "--resume", help="go on with the run in OUT from its last checkpoint")] = False,
    minutes: Annotated[float | None, typer.Option(help="stop after that long", min=0)] = None,
    options: Annotated[bool, typer.Option(
        "--options", help="list every option of CONFIG with its value, and stop")] = False,
    device: Device = "cpu", backend: Backend = None,
) -> None:
    """Train a model; every option of CONFIG can be given too, such as --data.batch 4.

    Several GPUs or processes: torchrun --nproc-per-node N -m smis_models.cli train CONFIG ...
    """
    chosen = training.load_config(config, context.args)
    if options:
        typer.echo(training.to_json(chosen), nl=False)
        return
    first = os.environ.get("RANK", "0") == "0"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())
    with selected(backend), _stopping() as asked, _warnings(first), Progress(
            *columns, console=console, disable=not first) as bar:
        task = bar.add_task("starting", total=None)

        def report(progress: training.Progress) -> None:
            bar.update(task, total=progress.steps, completed=progress.step,
                       description=_speed(progress.values))
            bar.console.print(f"step {progress.step}: {_losses(progress.values)}",
                              highlight=False, soft_wrap=True)

        outcome = training.train(chosen, out, device=resolve_device(device), resume=resume,
                                 minutes=minutes, report=report, stop=asked.is_set)
    if first:
        rest = "" if outcome.finished else "; --resume goes on"
        console.print(f"{outcome.step} of {outcome.steps} steps{rest}; weights: {outcome.weights}",
                      soft_wrap=True)
