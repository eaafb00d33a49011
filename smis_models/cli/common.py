"""What the commands share: the app, its options, models, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from smis_kernels import BackendError, use_backend

from ..families import Preset, create_model, shipped_weights, stored_configuration
from ..io.scene import one_shape, text_size
from ..synthesis.scene import Scene

USER_ERRORS = (ValueError, OSError, BackendError, ModuleNotFoundError)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Semantic image synthesis: GroupDNet on fused kernels.",
)
console = Console()


def _check_place(path: Path) -> None:
    """Refuse a path that cannot be made, before any work is done for it."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir() and place != path:
        raise ValueError(f"out: {place} is a file; expected a folder in {path}")
    if not os.access(place, os.W_OK):
        raise ValueError(f"out: {place} cannot be written here; choose another place")


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
        if not path.name.endswith(suffix):
            raise ValueError(f"out: expected a name ending in {suffix}, got {path.name!r}")
        _check_place(path)
        return path

    return check


Labels = Annotated[Path | None, typer.Option(help="label map (PNG) or a folder of them")]
Instances = Annotated[Path | None, typer.Option(help="instance map or a folder of them")]
Model = Annotated[str, typer.Option(help="a name that `smis list` shows")]
Checkpoint = Annotated[
    Path | None, typer.Option(help=".pth or .safetensors file, or a folder; without one those that "
                                   "ship (groupdnet_scenes), else random")
]
Out = Annotated[Path, typer.Option(help="folder to write to", callback=folder_to_write)]
Seed = Annotated[int, typer.Option(help="of the codes and of random weights", min=0)]
Backend = Annotated[str | None, typer.Option(help="auto, reference, cpu, triton or cuda")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Unknown = Annotated[int | None, typer.Option(help="class of pixels labelled 255")]
Samples = Annotated[int, typer.Option(help="pictures of each scene", min=1)]


@contextmanager
def progress(total: int | None) -> Iterator[Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
               MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def step(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        yield step


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


def load_model(name: str, checkpoint: Path | None, device: torch.device, seed: int,
           **options: Any) -> Any:
    model = create_model(name, checkpoint, device=device, seed=seed, init_gain=1.0, **options)
    return model.eval()


def weights_of(model: str, checkpoint: Path | None) -> Path | None:
    """The checkpoint that was given, else the weights that ship with the package, else None."""
    return shipped_weights(model) if checkpoint is None else checkpoint


def weights_line(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "RANDOM (no --checkpoint)"
    shipped = checkpoint == shipped_weights(checkpoint.stem)
    return f"{checkpoint.name}, trained, of the package" if shipped else str(checkpoint)


def say_random(checkpoint: Path | None) -> None:
    if checkpoint is None:
        console.print("[yellow]The weights are random[/]: no --checkpoint was given; the pictures "
                      "show the mechanism, not what a trained network paints.")


def resized_line(scene: Scene, count: int = 1) -> str | None:
    """What is said of a map that is not of the model's size; ``count``: how many of them."""
    if scene.source_size is None or scene.source_size == scene.labels.shape:
        return None
    height, width = scene.labels.shape
    text = (f"resized by nearest, pixel centres: {scene.name}, {text_size(scene.source_size)}, "
            f"to {text_size((height, width))} (width x height)")
    if not one_shape(scene.source_size, (height, width)):
        text += "; its shape is stretched"
    return text + (f"; {count} maps in all" if count > 1 else "")


def preset_of(model: str, checkpoint: Path | None = None) -> Preset:
    """The options of a model, before its weights take time and memory."""
    stored = None if checkpoint is None else stored_configuration(checkpoint)
    if stored is not None:
        return stored.preset
    preset: Preset = create_model(model, part="generator", device="meta").preset
    return preset
