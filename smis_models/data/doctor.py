"""Checks a data set on disk and names every bad file and value."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..io.images import ImageError, read_instances, read_labels, read_picture
from ..io.scene import SceneFiles, misfits
from .listing import WITHOUT_INSTANCES, Listing, Problem, list_scenes


@dataclass(frozen=True)
class LabelRule:
    """Which values a label map may hold: 0..classes-1, and 255 where it has a class."""

    classes: int
    unknown: int | None = None


#: What the published data sets hold. Cityscapes: ids 0..34. ADE20K: 0..150 as stored, where 0 is
#: "unknown" and classes count from 1 (the shift in the published loader has no effect), 255
#: becoming 150. COCO-Stuff: 0..181, 255 becoming 182. DeepFashion: 0..7.
LABEL_RULES = {
    "cityscapes": LabelRule(35), "ade20k": LabelRule(151, 150), "coco_stuff": LabelRule(183, 182),
    "deepfashion": LabelRule(8),
}
_NO_RULE = 1 << 16  # every value that a PNG can hold


@dataclass
class SceneCheck:
    """What one scene showed: its problems, its size and its values of the label map."""

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    values: Counter[int] = field(default_factory=Counter)
    palette: Path | None = None
    """The label map, where it is a palette file with colours."""

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """An error inside is a problem of the file."""
        try:
            yield
        except (ImageError, OSError) as error:
            self.problems.append(Problem(path, str(error).removeprefix(f"{path}: ")))


@dataclass
class Diagnosis:
    """What a data set showed.

    Attributes:
        scenes: how many were read, by split.
        problems: what must be mended, and notes.
        sizes: how many scenes have each (height, width).
        values: in how many scenes each value of the label maps is.
    """

    scenes: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    values: Counter[int] = field(default_factory=Counter)

    @property
    def healthy(self) -> bool:
        """Whether a model can be trained on it: there are notes at most."""
        return all(problem.note for problem in self.problems)

    def add(self, checked: SceneCheck) -> None:
        self.problems += checked.problems
        if checked.size is not None:
            self.sizes[checked.size] += 1
        self.values.update(checked.values.keys())


def _bad_values(path: Path, values: Counter[int], rule: LabelRule) -> Iterator[Problem]:
    bad = {value: count for value, count in sorted(values.items())
           if value >= rule.classes and not (value == 255 and rule.unknown is not None)}
    if bad:
        shown = [f"{value} ({count} pixels)" for value, count in list(bad.items())[:8]]
        more = f" and {len(bad) - 8} values more" if len(bad) > 8 else ""
        cure = ("255 has no class here: relabel it, or give the class of unknown pixels "
                "(--unknown)" if set(bad) == {255} else "remap the classes, or check their number")
        yield Problem(path, f"expected labels 0..{rule.classes - 1}, got "
                            f"{', '.join(shown)}{more}; {cure}")


def check_scene(record: SceneFiles, rule: LabelRule | None = None) -> SceneCheck:
    """Read all files of a scene whole, and check them by themselves and against each other.

    Args:
        record: the files.
        rule: which labels may occur; None: any.
    """
    check = SceneCheck()
    assert record.labels is not None and record.image is not None
    label_file, image_file = Path(record.labels), Path(record.image)
    sizes: dict[Path, tuple[int, ...]] = {}
    with check.reading(label_file):
        labels = read_labels(label_file, _NO_RULE)
        sizes[label_file] = labels.shape
        counts = np.bincount(labels.ravel())
        check.values = Counter({int(v): int(counts[v]) for v in np.flatnonzero(counts)})
        with Image.open(label_file) as image:
            mode, palette = image.mode, image.getpalette() or []
        if mode.startswith("I"):
            check.problems.append(Problem(label_file, "a 16-bit label map; it is read as it is "
                                          "here, but other loaders cut it to 8 bits", note=True))
        # Whose colours are others than the indices as grey levels.
        if mode == "P" and palette not in ([], [k // 3 for k in range(len(palette))]):
            check.palette = label_file
        if rule is not None:
            check.problems += _bad_values(label_file, check.values, rule)
    with check.reading(image_file):
        sizes[image_file] = read_picture(image_file, like=sizes.get(label_file)).shape[:2]
    if record.instances is not None:
        id_file = Path(record.instances)
        with check.reading(id_file):
            sizes[id_file] = read_instances(id_file).shape
    if label_file in sizes:
        height, width = sizes[label_file]
        check.size = height, width
        check.problems += [Problem(*found) for found in misfits(sizes, exactly=False)]
    return check


def find_splits(folder_format: str, root: str | Path, split: str | None = None, *,
                instances: bool | None = None) -> dict[str, Listing]:
    """The scenes of one split, or of both "train" and "val" where they are there.

    Args:
        folder_format, root, split: as of :func:`list_scenes`.
        instances: whether instance maps are wanted; None: where any split has them.

    Raises:
        FileNotFoundError: the split asked for, or both, cannot be found.
    """
    root = Path(root)
    splits = [split] if split is not None else ["train", "val"]
    wanted = folder_format not in WITHOUT_INSTANCES if instances is None else instances
    listings: dict[str, Listing] = {}
    lacking: dict[str, str] = {}
    for part in splits:
        for with_ids in (True, False) if wanted else (False,):
            try:
                listings[part] = list_scenes(folder_format, root, part, instances=with_ids)
                break
            except FileNotFoundError as error:
                lacking.setdefault(part, str(error).removeprefix(f"{root}: "))
    if not listings:
        raise FileNotFoundError(f"{root}: {lacking[splits[0]]}")
    told: set[Problem] = set()
    for listing in listings.values():  # what is of the whole set is told once
        listing.problems = [problem for problem in listing.problems if problem not in told]
        told.update(listing.problems)
    if instances or any(part not in lacking for part in listings):
        for part in listings.keys() & lacking.keys():
            listings[part].problems.append(Problem(root, lacking[part]))
    if len(listings) == 2 and listings["train"].records == listings["val"].records:
        listings = {"all": listings["train"]}
    return listings


def examine(listings: dict[str, Listing], rule: LabelRule | None = None, *,
            jobs: int | None = None, step: Callable[[str], None] = lambda what: None) -> Diagnosis:
    """Check every scene of every split, several at a time.

    Args:
        listings: of :func:`find_splits`.
        rule: which labels may occur; None: any.
        jobs: threads; by default one for each core.
        step: called with the name of each scene when it has been checked.

    Example:
        >>> from smis_models.data import write_scenes
        >>> _ = write_scenes("scenes", {"train": 2}, 64)
        >>> diagnosis = examine(find_splits("folder", "scenes"))
        >>> print(*diagnosis.problems, sep="\\n")
        <BLANKLINE>
    """
    diagnosis = Diagnosis()
    palettes: list[Path] = []
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for split, listing in listings.items():
            diagnosis.scenes[split] = len(listing.records)
            diagnosis.problems += listing.problems
            names = (record.name for record in listing.records)
            checks = pool.map(lambda record: check_scene(record, rule), listing.records)
            for name, check in zip(names, checks, strict=True):
                diagnosis.add(check)
                palettes += filter(None, [check.palette])
                step(name)
    if palettes:
        more = f" (and {len(palettes) - 1} more)" if len(palettes) > 1 else ""
        diagnosis.problems.append(Problem(
            palettes[0], f"a palette file{more}: its indices are the labels, not its colours; if "
                         "the colours count, `smis convert-labels` reads them", note=True))
    return diagnosis
