"""Which files lie in a folder, and what a file's name says: its scene and its role in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from .files import UNFINISHED, unfinished_task

SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # of index maps, which no lossy format may hold
PICTURE_SUFFIXES = (*SUFFIXES, ".jpg", ".jpeg", ".webp")
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp", ".gif")

LABELS, INSTANCES, PICTURE = "label map", "instance map", "picture"
COLOURS, TRAIN_IDS = "colour-coded map", "map of train ids"
# What data sets append to the names of the picture and the maps of one scene, in small letters.
_ENDINGS = {
    "labelids": LABELS, "label": LABELS, "labels": LABELS,
    "instanceids": INSTANCES, "inst": INSTANCES, "instance": INSTANCES, "instances": INSTANCES,
    "leftimg8bit": PICTURE, "img": PICTURE, "image": PICTURE, "images": PICTURE,
    "labeltrainids": TRAIN_IDS, "instancetrainids": TRAIN_IDS,
}
_ANNOTATIONS = ("_gtFine", "_gtCoarse")


def parse_stem(stem: str) -> tuple[str, str | None]:
    """(scene, role) of a file's stem; the role is None where the name does not tell it.

    Example:
        >>> parse_stem("aachen_000000_000019_gtFine_labelIds")
        ('aachen_000000_000019', 'label map')
        >>> parse_stem("label")
        ('label', None)
    """
    scene, _, ending = stem.rpartition("_")
    role = _ENDINGS.get(ending.lower())
    if ending == "color" and scene.endswith(_ANNOTATIONS):
        role = COLOURS
    if not scene or role is None:
        return stem, None
    for annotation in _ANNOTATIONS:
        scene = scene.removesuffix(annotation) or scene
    return scene, role


def scene_name(path: Path) -> str:
    """The stem of a file without what tells its role: the same for all files of a scene.

    Example:
        >>> scene_name(Path("aachen_000000_000019_gtFine_labelIds.png"))
        'aachen_000000_000019'
    """
    return parse_stem(path.stem)[0]


def files_under(folder: str | Path) -> list[str]:
    """The files in a folder and below it, as sorted paths from it; hidden ones are passed over.

    Links are followed. One that leads back to a folder on its own way is not: it would never end.

    Example:
        >>> files_under("data/labels")  # doctest: +SKIP
        ['aachen/0.png', 'aachen/1.png']
    """
    found: list[str] = []
    root = os.path.realpath(folder)
    pending: list[tuple[str, str, tuple[str, ...]]] = [(root, "", (root,))]
    while pending:
        place, relative, way = pending.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    inner = entry.is_dir()
                except OSError:  # a link to itself: its reader will name it
                    inner = False
                if not inner:
                    found.append(relative + entry.name)
                    continue
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                above = root == real or root.startswith(os.path.join(real, ""))
                if not above and real not in way:
                    pending.append((real, f"{relative}{entry.name}/", (*way, real)))
    return sorted(found)


def by_scene(folder: str | Path, role: str, suffixes: tuple[str, ...] = SUFFIXES,
             clash: Callable[[str, str], None] | None = None) -> dict[str, str]:
    """The files of one role under a folder by scene: ``subfolder/scene`` -> path.

    Files whose names tell another role are passed over; where all are named as pictures, a data
    set has given its maps the pictures' names, and they are taken.

    Args:
        folder: searched with its subfolders.
        role: LABELS, INSTANCES or PICTURE.
        suffixes: of the files that count, in small letters.
        clash: called with two files of one scene, of which the first is kept.

    Raises:
        ValueError: two files of one scene, without ``clash``; no file of the role, though there
            are files of others.
    """
    named: dict[str | None, list[tuple[str, str]]] = {None: [], role: [], PICTURE: []}
    other = None
    for file in files_under(folder):
        place, slash, name = file.rpartition("/")
        stem, dot, ending = name.rpartition(".")
        if not dot or f".{ending.lower()}" not in suffixes:
            continue
        scene, found = parse_stem(stem)
        if found in named:
            named[found].append((place + slash + scene, file))
        else:
            other = file, found
    plain, own = named[None], named[role]
    files = sorted(plain + own, key=itemgetter(1)) if plain and own else plain or own
    files = files or named[PICTURE]
    if not files and other is not None:
        raise ValueError(f"expected {role}s in {folder}, got {other[0]}, by its name a {other[1]}")
    by_scene: dict[str, str] = {}
    root = os.path.join(folder, "")  # for a Path each would take most of a listing's time
    for scene, file in files:
        path = root + file
        if scene not in by_scene:
            by_scene[scene] = path
        elif clash is not None:
            clash(by_scene[scene], path)
        else:
            raise ValueError(f"{by_scene[scene]} and {path} are both of the scene {scene!r}; "
                             "remove or rename one")
    return by_scene


def map_files(option: str, path: str | Path, role: str = LABELS,
              suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """A file, or the files of a folder, by scene; errors speak of ``option``.

    Raises:
        FileNotFoundError: no such path, or a folder without such files.
        ValueError: a file of another role by its name, or two files of one scene.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{option}: {path} does not exist; give a PNG or a folder of PNGs")
    if path.is_file():
        scene, found = parse_stem(path.stem)
        if found not in (None, role, PICTURE):
            cure = ("; its train ids are no label ids: give the file ..._labelIds.png"
                    if found == TRAIN_IDS else "")
            raise ValueError(f"{option}: expected a {role}, got {path}, by its name a {found}"
                             f"{cure}")
        return {scene: path}
    for folder in (path, *path.absolute().parents[:2]):
        task = unfinished_task(folder)
        if task is not None:
            raise ValueError(
                f"{option}: {path} is not complete: {task.get('command', 'what wrote it')} was "
                f"stopped; give the same command again, or remove {folder / UNFINISHED}")
    try:
        files = by_scene(path, role, suffixes)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if not files:
        lossy = next((name for name in files_under(path)
                      if name.lower().endswith(LOSSY_SUFFIXES)), None)
        why = "" if lossy is None or suffixes != SUFFIXES else (
            f"; {lossy} is of a format that cannot keep indices")
        raise FileNotFoundError(f"{option}: no {', '.join(suffixes)} file in {path}{why}")
    return {scene: Path(file) for scene, file in files.items()}


def match(option: str, scenes: Sequence[str], files: dict[str, Path]) -> list[Path]:
    """The file of each scene; two single files belong together whatever they are called.

    Raises:
        FileNotFoundError: a scene without a file; the message speaks of ``option``.
    """
    if len(scenes) == len(files) == 1:
        return list(files.values())
    missing = next((scene for scene in scenes if scene not in files), None)
    if missing is not None:
        folder = os.path.commonpath([path.parent for path in files.values()])
        raise FileNotFoundError(f"{option}: no map of scene {missing!r} in {folder}")
    return [files[scene] for scene in scenes]
