"""What the commands share: the app, its options, models, progress."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from smis_kernels import BackendError, __version__, use_backend

from ..data.classes import class_index, class_names
from ..families import (
    Preset,
    checkpoint_file,
    configured_preset,
    create_model,
    shipped_weights,
    stored_configuration,
)
from ..io.files import remove_partial
from ..io.scene import one_shape, text_size
from ..training.checkpoints import KEPT, RUN_FILES, STATE
from .usage import Command

MOST_SEED = 2**32 - 1  # samples add small numbers to it, and torch takes 64 bits
USER_ERRORS = (ValueError, OSError, BackendError, ModuleNotFoundError)

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command = partial(app.command, cls=Command)
console = Console(markup=False)  # names of files may have brackets


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of errors")] = False,
    version: Annotated[bool, typer.Option("--version", help="of this package, and stop")] = False,
) -> None:
    """Semantic image synthesis on fused kernels."""
    if version:
        typer.echo(f"smis-kernels {__version__}, torch {torch.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of Python, NumPy or Pillow, of torch, or of a kernel."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def tell_error(line: str) -> None:
    """The one line of a mistake."""
    typer.echo(f"error: {' '.join(line.split())}", err=True)


def _check_place(path: Path) -> None:
    """Refuse a path that cannot be made, before any work is done for it."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir() and place != path:
        raise ValueError(f"out: {place} is a file; expected a folder in {path}")
    place = place if place.is_dir() else place.parent  # a file is replaced, not written to
    try:
        if not os.access(place, os.W_OK):
            raise PermissionError
        os.rmdir(tempfile.mkdtemp(dir=place, prefix=".smis-"))  # some only seem to permit it
    except OSError as error:
        raise ValueError(f"out: {place} cannot be written here; choose another place") from error


def folder_to_write(path: Path) -> Path:
    """A folder that is there or can be made."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"out: {path} is a file; expected a folder")
    _check_place(path)
    return path


def file_to_write(suffix: str) -> Callable[[Path], Path]:
    """A file that can be written, whose name ends in ``suffix``."""
    def check(path: Path) -> Path:
        if path.is_dir():
            raise ValueError(f"out: {path} is a folder; expected a file to write")
        if path.exists() and not path.is_file():  # whose place a rename would take
            raise ValueError(f"out: {path} is a device or a pipe; expected a file to write")
        if _of_a_run(path):
            raise ValueError(f"out: {path} is a file of the training run there; give another name")
        if not path.name.endswith(suffix):
            raise ValueError(f"out: expected a name ending in {suffix}, got {path.name!r}")
        _check_place(path)
        remove_partial(path.parent, path.name)  # of a run that was killed
        return path

    return check


def _of_a_run(path: Path) -> bool:
    """Whether a path is one of the files that a training run keeps in its folder."""
    run, kept = path.absolute().parent, path.absolute().parent.parent
    return (path.name in RUN_FILES and (run / STATE).exists()) or (
        run.name == KEPT and path.exists() and (kept / STATE).exists())


def _checked_seed(seed: int) -> int:
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed: expected 0 to {MOST_SEED}, got {seed}")
    return seed


Labels = Annotated[Path | None, typer.Option(help="label map (PNG) or a folder of them")]
Instances = Annotated[Path | None, typer.Option(help="instance map or a folder of them")]
Model = Annotated[str | None, typer.Option(
    help="a name that `smis list` shows; not needed where --checkpoint holds its configuration")]
Checkpoint = Annotated[
    Path | None, typer.Option(help=".pth or .safetensors file, or a folder, of `smis train` too; "
                                   "without one those that ship (groupdnet_scenes), else random")
]
Out = Annotated[Path, typer.Option(help="folder to write to", callback=folder_to_write)]
Seed = Annotated[int, typer.Option(
    help="of the codes and of random weights", callback=_checked_seed)]
Backend = Annotated[str | None, typer.Option(help="auto, reference, cpu, triton or cuda")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Unknown = Annotated[str | None, typer.Option(
    help="class of pixels labelled 255: its name or number")]
Features = Annotated[Path | None, typer.Option(
    help="clusters of instance features (.npz, or an official .npy)")]
Samples = Annotated[int, typer.Option(help="pictures of each scene", min=1)]


_A_MINUTE = 60.0  # between lines where there is no terminal


class Steps:
    """A bar of steps; where there is no terminal, a line a minute.

    Called with what is done, which is one step; :meth:`tell` says what is done within it.
    """

    def __init__(self, total: int | None, bar: Progress | None) -> None:
        self._total, self._bar, self._count = total, bar, 0
        self._task: Any = None if bar is None else bar.add_task("starting", total=total)
        self._begin = self._told = time.monotonic()

    def expect(self, total: int) -> None:
        """There will be so many."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def __call__(self, what: str) -> None:
        self._count += 1
        self.tell(what)

    def tell(self, what: str) -> None:
        """What is done now."""
        if self._bar is not None:
            self._bar.update(self._task, description=escape(what), completed=self._count)
            return
        now = time.monotonic()
        if now - self._told >= _A_MINUTE:
            self._told = now
            of = "" if self._total is None else f" of {self._total}"
            console.print(f"{self._count}{of}, {now - self._begin:.0f} s: {what}", markup=False,
                          highlight=False, soft_wrap=True)


@contextmanager
def progress(total: int | None) -> Iterator[Steps]:
    """:class:`Steps` of ``total``, or of a number that is told later."""
    if not console.is_terminal:
        yield Steps(total, None)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
               MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(total, bar)


def selected(backend: str | None) -> AbstractContextManager[None]:
    """The backend that was chosen; without an option SMIS_BACKEND decides."""
    return nullcontext() if backend is None else use_backend(backend)


def resolve_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not here ({torch.cuda.device_count()} GPUs are); "
                         "use --device cpu")
    return device


@dataclass(frozen=True)
class Chosen:
    """What a command runs: the model's name, its weights (None: random ones), device and seed."""

    name: str
    checkpoint: Path | None
    place: torch.device
    seed: int

    @cached_property
    def preset(self) -> Preset:
        """The options of the model, before its weights take time and memory."""
        stored = None if self.checkpoint is None else stored_configuration(self.checkpoint)
        if stored is not None:
            return stored.preset
        return create_model(self.name, part="generator", device="meta").preset

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        return class_names(self.name, self.preset.classes)

    def class_of(self, argument: str, text: str | None) -> int | None:
        """The class that an option means by its name or number; None: it was left out."""
        return None if text is None else class_index(argument, text, self.classes)

    def load(self, **options: Any) -> Any:
        """The model in eval mode; told is whether its weights are random."""
        made = create_model(self.name, self.checkpoint, device=self.place, seed=self.seed,
                            init_gain=1.0, **options).eval()
        if self.checkpoint is None:
            console.print("[yellow]The weights are random[/]: no --checkpoint was given; the "
                          "pictures show the mechanism, not what a trained network paints.",
                          markup=True)
        return made

    @property
    def weights(self) -> str:
        """Where the weights are from, for people."""
        if self.checkpoint is None:
            return "RANDOM (no --checkpoint)"
        shipped = self.checkpoint == shipped_weights(self.checkpoint.stem)
        return (f"{self.checkpoint.name}, trained, of the package" if shipped
                else str(self.checkpoint))


def chosen(model: str | None, checkpoint: Path | None, device: str = "cpu", seed: int = 0, *,
           default: str | None = None) -> Chosen:
    """What the options choose; ``default``: the model where neither it nor weights are given.

    Raises:
        ValueError: no name, and no checkpoint that tells it; an unknown name; weights of another
            model; no such device.
        FileNotFoundError: the checkpoint is not there.
    """
    place = resolve_device(device)
    if model is None and checkpoint is None:
        model = default
    path = None if checkpoint is None else checkpoint_file(checkpoint)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"checkpoint: {path} does not exist; give a .pth or "
                                ".safetensors file, or a folder")
    if model is None:
        stored = None if path is None else stored_configuration(path)
        if stored is None:
            holds = "" if path is None else f"; {path} does not tell its model"
            raise ValueError("model: expected --model NAME (smis list shows them), or a "
                             f"--checkpoint of smis train or smis convert{holds}")
        return Chosen(stored.model, path, place, seed)
    with called(name="model"):  # which refuses an unknown one, and weights of another
        configured_preset(model, path, {})
    return Chosen(model, shipped_weights(model) if path is None else path, place, seed)


@contextmanager
def called(**options: str) -> Iterator[None]:
    """Errors that name an argument of the library name the option that it comes from."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        argument, colon, rest = str(error).partition(": ")
        if argument not in options:
            raise
        raise type(error)(f"{options[argument]}{colon}{rest}") from error


def existing(option: str, path: Path | None, what: str) -> None:
    """Refuse a path that is given and not there; ``what`` is to be given instead."""
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{option}: {path} does not exist; give {what}")


def keep_inputs(written: Iterable[Path], read: Iterable[Path], other: str = "folder") -> None:
    """Refuse files to write that are files to read; ``other`` is to be given instead.

    Raises:
        ValueError: the first that is both.
    """
    targets = {path.resolve() for path in written}
    for path in read:
        if path.resolve() in targets:
            raise ValueError(
                f"out: {path} is read, and would be written over; give another {other}")


def weight_files(*paths: Path | None) -> list[Path]:
    """The files that weights are read from: each path that is given, or those in its folder."""
    return [file for path in paths if path is not None for file in (
        [*path.glob("*.pth"), *path.glob("*.safetensors")] if path.is_dir() else [path])]


def unusable(context: typer.Context, reason: str, *names: str) -> None:
    """Refuse parameters of the running command that were given though nothing would read them.

    Raises:
        ValueError: the first of ``names`` that the command line gives.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{parameter.opts[0].lstrip('-')}: {reason}; leave it out")


def show(head: Iterable[str | Column], rows: Iterable[Iterable[str | Text]],
         **options: Any) -> None:
    """A table."""
    table = Table(*head, **options)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def say_resized(files: Iterable[tuple[str, tuple[int, int] | None]],
                size: tuple[int, int], what: str = "maps") -> None:
    """Name the first of the files of another (height, width) than ``size``, and how many are;
    ``what`` they are: maps or pictures."""
    resized = [(name, of) for name, of in files if of not in (None, size)]
    if not resized:
        return
    name, source = resized[0]
    assert source is not None
    rule = "nearest, pixel centres" if what == "maps" else "bicubic"
    text = (f"resized by {rule}: {name}, {text_size(source)}, to "
            f"{text_size(size)} (width x height)")
    if not one_shape(source, size):
        text += "; its shape is stretched"
    if len(resized) > 1:
        text += f"; {len(resized)} {what} in all"
    console.print(text, soft_wrap=True, highlight=False, markup=False)
