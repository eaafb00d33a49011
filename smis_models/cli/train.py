"""``smis train CONFIG``."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .. import training
from ..training.checkpoints import STATE, differences
from ..training.options import to_dict
from .common import Backend, Device, command, console, folder_to_write, resolve_device, selected
from .usage import Command

_SHOWN = ("images_per_second", "waiting", "memory", "rate_generator", "rate_discriminator")


@contextmanager
def _stopping(first: bool) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after the present step, with a checkpoint.

    Yields the signals that asked for it so far.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if not asked and first:  # written at once: a print may be what was interrupted
            os.write(2, f"{signal.Signals(number).name}: stopping after this step, with a "
                        "checkpoint\n".encode())
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _ResumeCommand(Command):
    """``--resume`` alone, or ``--resume auto``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for word in args:
            if word == "auto" and given[-1:] == ["--resume=must"]:
                given[-1] = "--resume=auto"
            else:
                given.append("--resume=must" if word == "--resume" else word)
        return super().parse_args(ctx, given)


@contextmanager
def _warnings(shown: bool) -> Iterator[None]:
    """Warnings in one line each, by one process."""
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if shown:
            console.print(f"[yellow]{escape(str(message))}[/]", soft_wrap=True, markup=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment,unused-ignore]
        yield


def _speed(progress: training.Progress) -> str:
    values, left = progress.values, timedelta(seconds=round(progress.left))
    return (f"{values['images_per_second']:.1f} images/s, {values['memory']:.0f} MB, "
            f"{values['waiting']:.0%} waiting for data, {left} left")


def _losses(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in values.items() if k not in _SHOWN)


def _chosen(name: str, arguments: list[str], out: Path, resume: bool) -> training.TrainConfig:
    """The options; of a run that goes on its own, changed by what the command line gives alone."""
    configured = training.load_config(name, arguments)
    if not resume:
        return configured
    chosen = training.continued(out, arguments)
    if chosen.model != configured.model:
        raise ValueError(f"config: {name} is of {configured.model}, the run in {out} of "
                         f"{chosen.model}; give that one's, or another --out")
    stays = differences(to_dict(configured), to_dict(chosen))
    if stays:
        told = ", ".join(f"{key} {kept} (not {other})" for key, (other, kept) in stays.items())
        warnings.warn(f"resume: the run keeps its own options where {name} has others: {told}",
                      stacklevel=2)
    return chosen


def _names(options: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """Every option of a configuration as the command line calls it."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@contextmanager
def _suggesting(context: typer.Context, config: str) -> Iterator[None]:
    """Of an option that there is not: the one that was perhaps meant."""
    try:
        yield
    except ValueError as error:
        if "nrecognized" not in str(error):
            raise
        own = (name for parameter in context.command.params for name in parameter.opts)
        known = [*own, *_names(to_dict(training.load_config(config)))]
        given = (word.partition("=")[0] for word in context.args if word[:2] == "--")
        close = [get_close_matches(word, known, 1) for word in given if word not in known]
        found = next((names[0] for names in close if names), None)
        if found is None:
            raise
        raise ValueError(f"{error}; did you mean {found}?") from error


def run_folder(path: Path | None) -> Path | None:
    """A folder that is there or can be made, where one is given."""
    return None if path is None else folder_to_write(path)


@command("train", cls=_ResumeCommand,
         context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(
        help=f"a .yaml or .json file, or one of {', '.join(training.RECIPES)}")],
    out: Annotated[Path | None, typer.Option(help="folder of the run; needed but with --options",
                                             callback=run_folder)] = None,
    resume: Annotated[str | None, typer.Option(
        metavar="[auto]", help="go on with the run in OUT from its last checkpoint, with its own "
        "options but for those given; auto: where there is one, else start")] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after that long", min=0)] = None,
    options: Annotated[bool, typer.Option(
        "--options", help="list every option of CONFIG with its value, and stop")] = False,
    device: Device = "cpu", backend: Backend = None,
) -> None:
    """Train a model; every option of CONFIG can be given too, such as --data.batch 4.

    Several GPUs or processes: torchrun --nproc-per-node N -m smis_models.cli train CONFIG ...
    A run that a signal stopped has saved, and its exit code is 128 + the signal: 143 of SIGTERM.
    """
    if resume not in (None, "must", "auto"):
        raise ValueError(f"resume: expected auto or nothing behind --resume, got {resume!r}")
    if out is None:
        if not options:
            raise ValueError("out: expected a folder for the run; give --out")
        with _warnings(True), _suggesting(context, config):
            typer.echo(training.to_json(training.load_config(config, context.args)), nl=False)
        return
    going = resume == "must" or (resume == "auto" and (out / STATE).exists())
    first = os.environ.get("RANK", "0") == "0"
    with _warnings(first), _suggesting(context, config):
        chosen = _chosen(config, context.args, out, going)
    if options:
        typer.echo(training.to_json(chosen), nl=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with selected(backend), _stopping(first) as asked, _warnings(first), Progress(
            *columns, console=console, disable=not first) as bar:
        task = bar.add_task("starting", total=None)

        def report(progress: training.Progress) -> None:
            bar.update(task, total=progress.steps, completed=progress.step,
                       description=_speed(progress))
            bar.console.print(
                f"step {progress.step} of {progress.steps}, epoch {progress.epoch} of "
                f"{progress.epochs}: {_losses(progress.values)}; {_speed(progress)}",
                highlight=False, soft_wrap=True)

        outcome = training.train(chosen, out, device=resolve_device(device), resume=going,
                                 minutes=minutes, report=report, stop=lambda: bool(asked))
    if first:
        rest = "" if outcome.finished else "; --resume goes on"
        console.print(f"{outcome.step} of {outcome.steps} steps{rest}; weights: {outcome.weights}",
                      soft_wrap=True)
    if asked and not outcome.finished:
        raise typer.Exit(128 + asked[0])
