"""What a run leaves: losses.csv, TensorBoard files or Weights & Biases, speed and memory."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..io.extras import cure
from ..io.images import Picture, write_atomically


class Clock:
    """Images per second and the share of the time spent waiting for data, since the last look."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited, self._images = 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside, in which a batch is fetched, as waiting."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def count(self, images: int) -> None:
        """Images trained on."""
        self._images += images

    def look(self) -> dict[str, float]:
        """``images_per_second`` and ``waiting`` (0..1); starts anew."""
        spent = max(time.perf_counter() - self._start, 1e-9)
        seen = {"images_per_second": self._images / spent, "waiting": self._waited / spent}
        self.__init__()  # type: ignore[misc]
        return seen


def memory(device: torch.device) -> float:
    """Peak memory in MB: of the GPU, or the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


class LossTable:
    """losses.csv: a row for every logged step; a resumed run goes on where its state was saved."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._rows: list[dict[str, str]] = []
        if step and path.exists():
            try:
                with path.open(newline="", encoding="utf-8-sig") as file:
                    rows = [row for row in csv.DictReader(file) if None not in row.values()]
                self._rows = [row for row in rows if int(row["step"]) <= step]  # whole lines alone
            except (KeyError, ValueError, TypeError, csv.Error):  # as a spreadsheet saves it
                aside = path.replace(path.with_name("losses_aside.csv"))
                warnings.warn(f"losses: {path} is no table of a run any more; it is kept as "
                              f"{aside}, and another begins", stacklevel=3)
        self._names: list[str] = list(self._rows[0]) if self._rows else []
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self._path, text.getvalue().encode())

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row; a new name adds a column."""
        texts = {name: repr(value) for name, value in row.items()}
        new = [name for name in texts if name not in self._names]
        self._rows.append(texts)
        if new:
            self._names += new
            self._write()
        else:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._names, lineterminator="\n").writerow(texts)


class TensorBoard:
    """TensorBoard files in ``folder/tensorboard``.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("log.tensorboard: tensorboard is not installed; "
                             f"{cure('models', 'tensorboard')}, or --log.tensorboard false"
                             ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point on the curve of each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: Picture, step: int) -> None:
        """One (H, W, 3) picture."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; a run that goes on is the same run there.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, folder: Path, step: int, options: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("log.wandb: wandb is not installed; pip install wandb, or leave "
                             "--log.wandb out") from error
        name = folder / "wandb.id"
        if not step or not name.exists():
            write_atomically(name, uuid.uuid4().hex.encode())
        self._image = wandb.Image
        self._run = wandb.init(project="smis", name=folder.name, dir=str(folder), resume="allow",
                               id=name.read_text(encoding="utf-8"), config=dict(options))
        # Its own steps never go back, as those of a run do that goes on from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, name: str, picture: Picture, step: int) -> None:
        self._run.log({name: self._image(picture), "step": step})

    def close(self) -> None:
        self._run.finish()


Logger = TensorBoard | WandB
