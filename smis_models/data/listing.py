"""Where the files of each data set lie, and which belong to one scene."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..io.images import PICTURE_SUFFIXES, SUFFIXES, scene_name


@dataclass(frozen=True)
class Record:
    """The files of one scene."""

    name: str
    image: Path
    labels: Path
    instances: Path | None = None


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

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


Files = dict[str, Path]


def _gather(folder: Path, suffixes: tuple[str, ...], listing: Listing,
            key: Callable[[Path], str | None]) -> Files:
    """The files under ``folder`` (recursively) by scene; hidden files are passed over."""
    found: Files = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in suffixes:
            continue
        name = key(path)
        if name is None:
            continue
        if name in found:
            listing.problems.append(Problem(path, f"the same scene as {found[name]}; remove one"))
        else:
            found[name] = path
    return found


def _relative(folder: Path) -> Callable[[Path], str]:
    return lambda path: (path.parent.relative_to(folder) / scene_name(path)).as_posix()


def _pair(listing: Listing, images: Files, labels: Files, instances: Files | None) -> Listing:
    roles = {"picture": images, "label map": labels}
    if instances is not None:
        roles["instance map"] = instances
    for name in sorted(set().union(*roles.values())):
        absent = [role for role, files in roles.items() if name not in files]
        if not absent:
            listing.records.append(Record(name, images[name], labels[name],
                                          instances[name] if instances is not None else None))
            continue
        present = next(files[name] for files in roles.values() if name in files)
        listing.problems.append(Problem(present, f"no {' and no '.join(absent)} of this scene"))
    return listing


def _folder(root: Path, names: tuple[str, ...], what: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{root}: no {what}; expected a folder {' or '.join(names)} in it")


def _flat(root: Path, split: str, instances: bool, names: dict[str, tuple[str, ...]]) -> Listing:
    """Folders by role, the files of a scene with one stem."""
    listing = Listing()
    folders = {role: _folder(root, names[role], f"{role} of {split!r}")
               for role in ("pictures", "label maps", "instance maps")
               if role != "instance maps" or instances}
    files = {
        role: _gather(folder, PICTURE_SUFFIXES if role == "pictures" else SUFFIXES, listing,
                      _relative(folder))
        for role, folder in folders.items()
    }
    return _pair(listing, files["pictures"], files["label maps"], files.get("instance maps"))


def _cityscapes(root: Path, split: str, instances: bool) -> Listing:
    if not (root / "gtFine").is_dir() and any(root.glob("*_label")):
        return _coco_stuff(root, split, instances)  # as pix2pixHD flattens it
    listing = Listing()
    part = "train" if split == "train" else "val"
    images = _folder(root, (f"leftImg8bit/{part}",), f"pictures of {split!r}")
    maps = _folder(root, (f"gtFine/{part}",), f"label maps of {split!r}")

    def ending(folder: Path, end: str) -> Callable[[Path], str | None]:
        return lambda path: _relative(folder)(path) if path.stem.endswith(end) else None

    return _pair(
        listing, _gather(images, (".png",), listing, ending(images, "_leftImg8bit")),
        _gather(maps, (".png",), listing, ending(maps, "_labelIds")),
        _gather(maps, (".png",), listing, ending(maps, "_instanceIds")) if instances else None,
    )


def _ade20k(root: Path, split: str, instances: bool) -> Listing:
    listing = Listing()
    mark = "_train_" if split == "train" else "_val_"

    def of_split(path: Path) -> str | None:
        return path.stem if mark in path.name else None

    images = _gather(root, (".jpg", ".jpeg"), listing, of_split)
    labels = _gather(root, (".png",), listing, of_split)
    if any("_parts_" in name or name.endswith("_seg") for name in labels):
        raise ValueError(
            f"{root}: this is the full ADE20K (files ..._seg.png, ..._parts_1.png); expected the "
            "scene parsing benchmark, ADEChallengeData2016"
        )
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
    def places(name: str) -> Iterator[str]:
        parts = ("train",) if split == "train" else (split, *({"val", "test"} - {split}))
        for part in parts:
            yield from (f"{part}/{name}", f"{part}_{name}")
        yield name  # one set for every split

    return _flat(root, split, instances, {
        role: tuple(place for name in names for place in places(name))
        for role, names in _NAMES.items()
    })


_FINDERS: dict[str, Callable[[Path, str, bool], Listing]] = {
    "cityscapes": _cityscapes, "ade20k": _ade20k, "coco_stuff": _coco_stuff,
    "deepfashion": _deepfashion, "folder": _any_folder,
}
LAYOUTS = tuple(_FINDERS)
WITHOUT_INSTANCES = ("ade20k", "deepfashion")


def list_scenes(layout: str, root: str | Path, split: str = "train", *,
                instances: bool = False) -> Listing:
    """The scenes of a data set on disk.

    ============== =================================================================
    ``cityscapes`` ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png``,
                   ``gtFine/{train,val}/<city>/*_{labelIds,instanceIds}.png``, or the
                   folders of pix2pixHD: ``{train,test}_{img,label,inst}``
    ``ade20k``     ``ADE_{train,val}_*.jpg`` and ``.png`` anywhere under the root
    ``coco_stuff`` ``{train,val}_{img,label,inst}``, equal stems
    ``deepfashion`` ``{train,test}``, ``cihp_{train,test}_mask``, equal stems
    ``folder``     ``images``, ``labels`` (and ``instances``), or each split's own:
                   ``train/images`` or ``train_images``, ...
    ============== =================================================================

    Args:
        layout: one of the above.
        root: the data set's folder.
        split: "train", or "val" or "test": the published evaluation split.
        instances: whether instance maps are wanted; a scene without one is a problem then.

    Raises:
        FileNotFoundError: a folder is missing, or holds no scene.
        ValueError: an unknown layout or split, or instances where the data set has none.
    """
    if layout not in _FINDERS:
        raise ValueError(f"layout: expected {', '.join(LAYOUTS)}; got {layout!r}")
    if split not in ("train", "val", "test"):
        raise ValueError(f"split: expected train, val or test; got {split!r}")
    if instances and layout in WITHOUT_INSTANCES:
        raise ValueError(f"instances: {layout} has no instance maps")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected the root of the data set")
    listing = _FINDERS[layout](root, split, instances)
    if not listing.records and not listing.problems:
        raise FileNotFoundError(f"{root}: no scene of split {split!r}; see the layout of {layout}")
    return listing


def detect_layout(root: str | Path) -> str:
    """Which layout a folder has, by its subfolders; "folder" where it is none of the published."""
    root = Path(root)
    if (root / "gtFine").is_dir():
        return "cityscapes"
    if any(root.glob("cihp_*_mask")):
        return "deepfashion"
    if any(root.glob("annotations/*/ADE_*")) or any(root.glob("annotations/ADE_*")):
        return "ade20k"
    if any((root / f"{part}_label").is_dir() for part in ("train", "val")):
        return "coco_stuff"
    return "folder"
