"""The generated scenes as files, in the layout that the data set "folder" reads."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..io.files import LOCK, unfinished, unfinished_task
from ..io.images import to_pictures, write_atomically, write_indices, write_png
from .generated import GeneratedScenes
from .scenes import LANDSCAPE, MODE_NAMES


def write_scenes(out: str | Path, counts: Mapping[str, int], size: int | tuple[int, int] = 128,
                 seed: int = 0, *, step: Callable[[str], None] = lambda what: None) -> list[Path]:
    """Write generated scenes as PNGs, which read back as the very samples.

    ``<out>/<split>/{images,labels,instances}/<name>.png``, and ``modes.csv``: the mode of each
    class in each scene.

    Args:
        out: a folder, new or empty; or one where the same call was stopped, which goes on.
        counts: scenes of each split, such as ``{"train": 1000, "val": 100}``.
        size, seed: as of :class:`GeneratedScenes`.
        step: called with the name of each scene when it has been written.

    Returns:
        The folders of the splits.

    Raises:
        ValueError: the folder holds files already, or a call with other arguments was stopped
            there; a bad argument.

    Example:
        >>> write_scenes("scenes", {"train": 100}, 64)
        [PosixPath('scenes/train')]
    """
    out = Path(out)
    sets = {split: GeneratedScenes(count, size, split, seed)
            for split, count in counts.items() if count}
    task = {"command": "smis scenes", "counts": {split: len(scenes) for split, scenes in
                                                 sets.items()}, "size": size, "seed": seed}
    task = json.loads(json.dumps(task))
    before = unfinished_task(out)
    if before is None and out.exists() and (not out.is_dir() or any(
            entry.name != LOCK for entry in out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, got {out}; choose another")
    if before not in (None, task):
        raise ValueError(f"out: {out} holds an unfinished set of {before}; give the same options "
                         "to go on with it, or choose another folder")
    with unfinished(out, task):
        for split, dataset in sets.items():
            _write_split(out / split, dataset, step)
    return [out / split for split in sets]


def _write_split(folder: Path, dataset: GeneratedScenes, step: Callable[[str], None]) -> None:
    """The scenes of one split but for those whose files are all there."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["scene", *LANDSCAPE])
    for index in range(len(dataset)):
        sample = dataset[index]
        name = sample["name"]
        files = {role: folder / role / f"{name}.png" for role in ("images", "labels", "instances")}
        if not all(path.exists() for path in files.values()):
            (picture,) = to_pictures(sample["image"][None])
            write_png(files["images"], picture)
            for role in ("labels", "instances"):
                pixels: np.ndarray[tuple[int, ...], np.dtype[np.integer]] = sample[role].numpy()
                write_indices(files[role], pixels)
        writer.writerow([name, *(names[mode] for names, mode in
                                 zip(MODE_NAMES, sample["modes"].tolist(), strict=True))])
        step(name)
    write_atomically(folder / "modes.csv", table.getvalue().encode())
