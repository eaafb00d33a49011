"""Where the files of each data set lie, and which belong to one scene."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..io.files import UNFINISHED, unfinished_task
from ..io.names import (
    INSTANCES,
    LABELS,
    LOSSY_SUFFIXES,
    PICTURE,
    PICTURE_SUFFIXES,
    SUFFIXES,
    by_scene,
    files_under,
)
from ..io.scene import SceneFiles


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file. A note is for information: the data set can be used."""

    path: Path
    message: str
    note: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass
class Listing:
    """The scenes found, in the order of their names, and the files that belong to none."""

    records: list[SceneFiles] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


Files = dict[str, str]


def _gather(folder: Path, role: str, listing: Listing,
            suffixes: tuple[str, ...] = SUFFIXES) -> Files:
    """The files of one role under ``folder`` by scene; two of one scene are a problem."""
    def clash(first: str, path: str) -> None:
        listing.problems.append(Problem(Path(path), f"the same scene as {first}; remove one"))

    return by_scene(folder, role, suffixes, clash)


def _lossy(folder: Path) -> Iterator[Problem]:
    """Maps in formats that cannot hold them."""
    for name in files_under(folder):
        if name.lower().endswith(LOSSY_SUFFIXES):
            kind = {"gif": "GIF", "webp": "WebP"}.get(name.lower().rpartition(".")[2], "JPEG")
            yield Problem(folder / name, f"a {kind} file does not keep indices; make the map again "
                                         "as PNG")


def _pair(listing: Listing, images: Files, labels: Files, instances: Files | None) -> Listing:
    roles = {"picture": images, "label map": labels}
    if instances is not None:
        roles["instance map"] = instances
    paired = all(files.keys() == images.keys() for files in roles.values())
    for name in sorted(images if paired else set().union(*roles.values())):
        absent = [role for role, files in roles.items() if name not in files]
        if not absent:
            listing.records.append(SceneFiles(name, images[name], labels[name],
                                              None if instances is None else instances[name]))
            continue
        present = next(files[name] for files in roles.values() if name in files)
        reason = f"no {' and no '.join(absent)} of this scene"
        listing.problems.append(Problem(Path(present), reason))
    return listing


def _folder(root: Path, names: tuple[str, ...], what: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{root}: no {what}; expected a folder {' or '.join(names)} in it")


def _flat(root: Path, split: str, instances: bool, names: dict[str, tuple[str, ...]]) -> Listing:
    """Folders by role, the files of a scene with one stem."""
    listing = Listing()
    roles = {"pictures": PICTURE, "label maps": LABELS}
    if instances:
        roles["instance maps"] = INSTANCES
    folders = {name: _folder(root, names[name], f"{name} of {split!r}") for name in roles}
    files = {name: _gather(folder, roles[name], listing,
                           PICTURE_SUFFIXES if name == "pictures" else SUFFIXES)
             for name, folder in folders.items()}
    _pair(listing, files["pictures"], files["label maps"], files.get("instance maps"))
    if listing.problems:  # of which those that have a reason are told first
        reasons = [problem for name, folder in folders.items() if name != "pictures"
                   for problem in _lossy(folder)]
        listing.problems[:0] = reasons
    return listing


def _cityscapes(root: Path, split: str, instances: bool) -> Listing:
    if not (root / "gtFine").is_dir() and _has_folder(root, "_label"):
        return _coco_stuff(root, split, instances)  # as pix2pixHD flattens it
    listing = Listing()
    part = "train" if split == "train" else "val"
    images = _folder(root, (f"leftImg8bit/{part}",), f"pictures of {split!r}")
    maps = _folder(root, (f"gtFine/{part}",), f"label maps of {split!r}")
    return _pair(
        listing, _gather(images, PICTURE, listing), _gather(maps, LABELS, listing),
        _gather(maps, INSTANCES, listing) if instances else None,
    )


def _has_folder(root: Path, ending: str) -> bool:
    with os.scandir(root) as entries:
        return any(entry.name.endswith(ending) and entry.is_dir() for entry in entries)


def _ade20k(root: Path, split: str, instances: bool) -> Listing:
    listing = Listing()
    mark = "_train_" if split == "train" else "_val_"
    images: Files = {}
    labels: Files = {}
    for file in files_under(root):
        name, dot, ending = file.rpartition("/")[2].rpartition(".")
        kind = {"jpg": images, "jpeg": images, "png": labels}.get(ending.lower())
        if not dot or kind is None or mark not in name:
            continue
        if "_parts_" in name or name.endswith("_seg"):
            raise ValueError(
                f"{root}: this is the full ADE20K (files ..._seg.png, ..._parts_1.png); expected "
                "the scene parsing benchmark, ADEChallengeData2016"
            )
        path = str(root / file)
        if name in kind:
            clash = f"the same scene as {kind[name]}; remove one"
            listing.problems.append(Problem(Path(path), clash))
        else:
            kind[name] = path
    return _pair(listing, images, labels, None)


def _coco_stuff(root: Path, split: str, instances: bool) -> Listing:
    parts = ("train",) if split == "train" else ("val", "test")
    return _flat(root, split, instances, {
        "pictures": tuple(f"{part}_img" for part in parts),
        "label maps": tuple(f"{part}_label" for part in parts),
        "instance maps": tuple(f"{part}_inst" for part in parts),
    })


def _deepfashion(root: Path, split: str, instances: bool) -> Listing:
    part = "train" if split == "train" else "test"
    return _flat(root, split, False, {
        "pictures": (part,), "label maps": (f"cihp_{part}_mask",), "instance maps": (),
    })


_NAMES = {
    "pictures": ("images", "image", "img"),
    "label maps": ("labels", "label", "seg_maps", "annotations"),
    "instance maps": ("instances", "instance", "inst"),
}


def _any_folder(root: Path, split: str, instances: bool) -> Listing:
    def places(names: tuple[str, ...]) -> Iterator[str]:
        parts = ("train",) if split == "train" else (split, *({"val", "test"} - {split}))
        for part in parts:
            for name in names:
                yield from (f"{part}/{name}", f"{part}_{name}")
        yield from names  # one set for every split

    return _flat(root, split, instances, {role: tuple(places(names))
                                          for role, names in _NAMES.items()})


_FINDERS: dict[str, Callable[[Path, str, bool], Listing]] = {
    "cityscapes": _cityscapes, "ade20k": _ade20k, "coco_stuff": _coco_stuff,
    "deepfashion": _deepfashion, "folder": _any_folder,
}
FOLDER_FORMATS = tuple(_FINDERS)
WITHOUT_INSTANCES = ("ade20k", "deepfashion")


def _stopped(root: Path) -> list[Problem]:
    """That what wrote the data set did not come to its end."""
    for folder in (root, root.absolute().parent):
        task = unfinished_task(folder)
        if task is not None:
            command = task.get("command", "the command that wrote it")
            return [Problem(folder / UNFINISHED, f"the data set is not complete: {command} was "
                            "stopped; give the same command again, which goes on")]
    return []


def list_scenes(folder_format: str, root: str | Path, split: str = "train", *,
                instances: bool = False) -> Listing:
    """The scenes of a data set on disk.

    =============== =================================================================
    ``cityscapes``  ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png``,
                    ``gtFine/{train,val}/<city>/*_{labelIds,instanceIds}.png``, or the
                    folders of pix2pixHD: ``{train,test}_{img,label,inst}``
    ``ade20k``      ``ADE_{train,val}_*.jpg`` and ``.png`` anywhere under the root
    ``coco_stuff``  ``{train,val}_{img,label,inst}``, equal stems
    ``deepfashion`` ``{train,test}``, ``cihp_{train,test}_mask``, equal stems
    ``folder``      ``images``, ``labels`` (and ``instances``), or each split's own:
                    ``train/images`` or ``train_images``, ...
    =============== =================================================================

    Args:
        folder_format: one of the above.
        root: the data set's folder.
        split: "train", or "val" or "test": the published evaluation split.
        instances: whether instance maps are wanted; a scene without one is a problem then.

    Raises:
        FileNotFoundError: a folder is missing, or holds no scene.
        ValueError: an unknown format or split, or instances where the data set has none.
    """
    if folder_format not in _FINDERS:
        raise ValueError(f"folder_format: expected {', '.join(FOLDER_FORMATS)}; "
                         f"got {folder_format!r}")
    if split not in ("train", "val", "test"):
        raise ValueError(f"split: expected train, val or test; got {split!r}")
    if instances and folder_format in WITHOUT_INSTANCES:
        raise ValueError(f"instances: {folder_format} has no instance maps")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected the root of the data set")
    listing = _FINDERS[folder_format](root, split, instances)
    listing.problems[:0] = _stopped(root)
    if not listing.records and not listing.problems:
        raise FileNotFoundError(f"{root}: no scene of split {split!r}; see the format of "
                                f"{folder_format}")
    return listing


def one_set(root: str | Path, split: str) -> bool:
    """Whether a folder has one set for every split, so that one's scenes are those of "train" too.

    Raises:
        FileNotFoundError: no scene of the split.

    Example:
        >>> from smis_models.data import write_scenes
        >>> _ = write_scenes("scenes", {"train": 2, "val": 1}, 64)
        >>> one_set("scenes", "val"), one_set("scenes/val", "val")
        (False, True)
    """
    found = {str(scene.labels) for scene in list_scenes("folder", root, split).records}
    try:
        trained = list_scenes("folder", root, "train").records
    except FileNotFoundError:
        return False
    return not found.isdisjoint(str(scene.labels) for scene in trained)


def detect_layout(root: str | Path) -> str:
    """Which format a folder has, by its subfolders and names of files; "folder" where it is none
    of the published.
    """
    root = Path(root)
    if (root / "gtFine").is_dir():
        return "cityscapes"
    if _has_folder(root, "_mask") and any(root.glob("cihp_*_mask")):
        return "deepfashion"
    label_folders = [root / f"{part}_label" for part in ("train", "val", "test")]
    if any(folder.is_dir() for folder in label_folders):
        return "cityscapes" if any(_shows(folder, "_labelIds.png") for folder in label_folders
                                   ) else "coco_stuff"
    annotations = ("annotations", "annotations/training", "annotations/validation", "")
    if any(_shows(root / place, ".png", "ADE_") for place in annotations):
        return "ade20k"
    return "folder"


def _shows(folder: Path, ending: str, start: str = "") -> bool:
    """Whether a folder holds a file so named."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(e.name.endswith(ending) and e.name.startswith(start) for e in entries)
