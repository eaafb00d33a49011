"""Pictures with their label maps, as an encoder reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.sample import image_tensor
from ..families import Preset
from ..io.images import PICTURE_SUFFIXES, read_labels, read_picture, scene_name
from .scene import map_files


def read_pictures(images: Sequence[Path], labels: Sequence[Path], preset: Preset,
                  unknown: int | None = None) -> list[tuple[str, Tensor, Tensor]]:
    """(name, image (1, 3, H, W) in [-1, 1], labels (1, H, W)) of pictures, at the model's size.

    Args:
        images: files, or folders of them.
        labels: as many files in the same order; or folders, matched by the name of the scene.
        preset: of the model.
        unknown: the class of pixels labelled 255; by default the preset's don't-care class.

    Raises:
        FileNotFoundError: a path, or the label map of a picture, is missing.
        ImageError: a file is not what it was given as.
        ValueError: another number of label maps than pictures.

    Example:
        >>> from smis_models import create_model
        >>> from smis_models.data import write_scenes
        >>> (folder,) = write_scenes("scenes", {"train": 2}, 64)
        >>> preset = create_model("groupdnet_scenes", device="meta").preset
        >>> pictures = read_pictures([folder / "images"], [folder / "labels"], preset)
    """
    found = [p for path in images for p in map_files("images", path, PICTURE_SUFFIXES)]
    maps = [p for path in labels for p in map_files("image-labels", path)]
    if any(path.is_dir() for path in (*images, *labels)):
        by_scene = {scene_name(path): path for path in maps}
        missing = next((p for p in found if scene_name(p) not in by_scene), None)
        if missing is not None:
            raise FileNotFoundError(f"image-labels: no map of scene {scene_name(missing)!r}; the "
                                    "encoder needs the labels of every picture")
        maps = [by_scene[scene_name(path)] for path in found]
    if len(maps) != len(found):
        raise ValueError(f"image-labels: expected {len(found)} label maps, one for each picture; "
                         f"got {len(maps)}")
    unknown = preset.dont_care if unknown is None else unknown
    size = preset.image_size
    return [
        (scene_name(picture), image_tensor(read_picture(picture, size))[None],
         torch.from_numpy(read_labels(path, preset.classes, size, unknown))[None])
        for picture, path in zip(found, maps, strict=True)
    ]
