"""The generated scenes as files, in the layout that the data set "folder" reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..io.images import to_pictures, write_atomically, write_indices, write_png
from .generated import GeneratedScenes
from .scenes import LANDSCAPE, MODE_NAMES


def write_scenes(out: str | Path, counts: Mapping[str, int], size: int | tuple[int, int] = 128,
                 seed: int = 0, *, step: Callable[[str], None] = lambda what: None) -> list[Path]:
    """Write generated scenes as PNGs, which read back as the very samples.

    ``<out>/<split>/{images,labels,instances}/<name>.png``, and ``modes.csv``: the mode of each
    class in each scene.

    Args:
        out: a folder, new or empty.
        counts: scenes of each split, such as ``{"train": 1000, "val": 100}``.
        size, seed: as of :class:`GeneratedScenes`.
        step: called with the name of each scene when it has been written.

    Returns:
        The folders of the splits.

    Raises:
        ValueError: the folder holds files already, or a bad argument.

    Example:
        >>> write_scenes("scenes", {"train": 100}, 64)
        [PosixPath('scenes/train')]
    """
    out = Path(out)
    sets = {split: GeneratedScenes(count, size, split, seed)
            for split, count in counts.items() if count}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, got {out}; choose another")
    for split, dataset in sets.items():
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["scene", *LANDSCAPE])
        for index in range(len(dataset)):
            sample = dataset[index]
            name = sample["name"]
            (picture,) = to_pictures(sample["image"][None])
            write_png(out / split / "images" / f"{name}.png", picture)
            for role in ("labels", "instances"):
                pixels: np.ndarray[tuple[int, ...], np.dtype[np.integer]] = sample[role].numpy()
                write_indices(out / split / role / f"{name}.png", pixels)
            writer.writerow([name, *(names[mode] for names, mode in
                                     zip(MODE_NAMES, sample["modes"].tolist(), strict=True))])
            step(name)
        write_atomically(out / split / "modes.csv", table.getvalue().encode())
    return [out / split for split in sets]
