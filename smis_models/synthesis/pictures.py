"""Pictures with their label maps, as an encoder reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.sample import image_tensor
from ..families import Preset
from ..io.images import resize_nearest, resize_picture
from ..io.names import LABELS, PICTURE, PICTURE_SUFFIXES, SUFFIXES, map_files, match
from ..io.scene import SceneFiles, read_scene


@dataclass(frozen=True)
class LabelledPicture:
    """A picture (1, 3, H, W) in [-1, 1], its labels (1, H, W), and the sizes of their files."""

    name: str
    image: Tensor
    labels: Tensor
    source_sizes: tuple[tuple[int, int], ...]


def read_pictures(images: Sequence[Path], labels: Sequence[Path], preset: Preset,
                  unknown: int | None = None) -> list[LabelledPicture]:
    """Pictures with their label maps, at the model's size.

    Args:
        images: files, or folders of them.
        labels: as many files in the same order; or folders, matched by the name of the scene.
        preset: of the model.
        unknown: the class of pixels labelled 255; by default the preset's don't-care class.

    Raises:
        FileNotFoundError: a path, or the label map of a picture, is missing.
        ImageError: a file is not what it was given as.
        ValueError: another number of label maps than pictures; in folders, two of one scene.

    Example:
        >>> from smis_models import create_model
        >>> from smis_models.data import write_scenes
        >>> (folder,) = write_scenes("scenes", {"train": 2}, 64)
        >>> preset = create_model("groupdnet_scenes", device="meta").preset
        >>> pictures = read_pictures([folder / "images"], [folder / "labels"], preset)
    """
    found = _files("images", images, PICTURE, PICTURE_SUFFIXES)
    own = _files("image-labels", labels)
    maps = [path for _, path in own]
    if any(path.is_dir() for path in (*images, *labels)):
        for option, files in (("images", found), ("image-labels", own)):
            _once_each(option, files)
        maps = match("image-labels", [name for name, _ in found], dict(own))
    if len(maps) != len(found):
        raise ValueError(f"image-labels: expected {len(found)} label maps, one for each picture; "
                         f"got {len(maps)}")
    unknown = preset.dont_care if unknown is None else unknown
    size = preset.image_size
    pictures = []
    for (name, path), of in zip(found, maps, strict=True):
        scene = read_scene(SceneFiles(name, path, of), preset.classes, unknown=unknown,
                           option="--unknown")
        assert scene.picture is not None and scene.labels is not None
        pictures.append(LabelledPicture(
            name, image_tensor(resize_picture(scene.picture, size))[None],
            torch.from_numpy(resize_nearest(scene.labels, size))[None],
            (scene.size,)))
    return pictures


def _once_each(option: str, files: Sequence[tuple[str, Path]]) -> None:
    """Refuse two files of one scene, of which a match by names would take the last for both."""
    first: dict[str, Path] = {}
    for name, path in files:
        if first.setdefault(name, path) is not path:
            raise ValueError(f"{option}: {first[name]} and {path} are both of scene {name!r}; give "
                             "files, one by one, in the order of the others")


def _files(option: str, paths: Sequence[Path], role: str = LABELS,
           suffixes: tuple[str, ...] = SUFFIXES) -> list[tuple[str, Path]]:
    return [pair for path in paths for pair in map_files(option, path, role, suffixes).items()]
