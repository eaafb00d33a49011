"""CelebAMask-HQ as published, to a folder of pictures and label maps."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..io.files import replacing, unfinished
from ..io.images import ImageError, opened, write_indices
from ..io.names import files_under

# The published order: part k is class k + 1, and later parts lie over earlier ones.
PARTS = ("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth",
         "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")
CLASSES = ("background", *PARTS)
HELD_OUT = 28000  # the first picture of the published test set
_IMAGES, _MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
_MASK = re.compile(r"(\d+)_(\w+)\.png")


def label_map(masks: dict[str, Path]) -> NDArray[np.uint8]:
    """(H, W) classes from the masks of one face by part; 0 where none is.

    Raises:
        ImageError: a mask that cannot be read, or is of another size than the others.
    """
    labels: NDArray[np.uint8] | None = None
    for index, part in enumerate(PARTS, 1):
        if part not in masks:
            continue
        with opened(masks[part], "a mask as PNG", "a mask") as image:
            inside = np.asarray(image.convert("L")) > 0
        if labels is None:
            labels = np.zeros(inside.shape, np.uint8)
        if inside.shape != labels.shape:
            raise ImageError(f"{masks[part]}: expected {labels.shape} (height, width) as the other "
                             f"masks of this face, got {inside.shape}")
        labels[inside] = index
    assert labels is not None
    return labels


def _faces(root: Path) -> tuple[dict[int, Path], dict[int, dict[str, Path]]]:
    """Pictures and masks by number."""
    root = next((place for place in (root, root / "CelebAMask-HQ") if (place / _IMAGES).is_dir()
                 and (place / _MASKS).is_dir()), root)
    for name in (_IMAGES, _MASKS):
        if not (root / name).is_dir():
            raise FileNotFoundError(f"{root}: expected the folders {_IMAGES} and {_MASKS} of "
                                    f"CelebAMask-HQ, got no {name}")
    pictures = {int(name.removesuffix(".jpg")): root / _IMAGES / name
                for name in files_under(root / _IMAGES)
                if name.endswith(".jpg") and name.removesuffix(".jpg").isdecimal()}
    masks: dict[int, dict[str, Path]] = {}
    for name in files_under(root / _MASKS):
        match = _MASK.fullmatch(name.rpartition("/")[2])
        if match is None:
            continue
        if match[2] not in PARTS:
            raise ValueError(f"{root / _MASKS / name}: expected a part of {', '.join(PARTS)}; got "
                             f"{match[2]!r}")
        masks.setdefault(int(match[1]), {})[match[2]] = root / _MASKS / name
    alone = sorted(pictures.keys() ^ masks.keys())
    if alone or not pictures:
        what = f"picture {alone[0]} has no {'masks' if alone[0] in pictures else 'file'}" if (
            alone) else "there is no picture"
        raise ValueError(f"{root}: {what}; is all of CelebAMask-HQ there?")
    return pictures, masks


def _place(picture: Path, target: Path) -> None:
    """The picture itself: linked where the disk allows it, else copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(picture.resolve(), target)  # not a link to a link, which would dangle elsewhere
    except OSError:
        with replacing(target) as partial:
            shutil.copyfile(picture, partial)


def convert_celebamask(root: str | Path, out: str | Path, *, held_out: int = HELD_OUT,
                       jobs: int | None = None,
                       step: Callable[[str], None] = lambda what: None) -> dict[str, int]:
    """Write CelebAMask-HQ as the data set "folder" reads it: 19 classes, background 0.

    ``<out>/{train,val}/labels/<number>.png`` and ``images/<number>.jpg``. What is there already is
    not made again, so a conversion that was stopped goes on.

    Args:
        root: with ``CelebA-HQ-img`` and ``CelebAMask-HQ-mask-anno``.
        out: the folder.
        held_out: pictures from this number on are "val"; by default the published test set.
        jobs: faces at a time; by default one for each core.
        step: called with the number of each face.

    Returns:
        How many faces each split has.

    Raises:
        FileNotFoundError, ValueError: a folder, or a face's picture or masks, are missing; a mask
            of an unknown part.

    Paper: Lee et al., "MaskGAN: Towards Diverse and Interactive Facial Image Manipulation",
    CVPR 2020.

    Example:
        >>> convert_celebamask("CelebAMask-HQ", "faces")  # doctest: +SKIP
        {'train': 28000, 'val': 2000}
    """
    pictures, masks = _faces(Path(root))
    counts = {"train": 0, "val": 0}

    def convert(number: int) -> str:
        split = "train" if number < held_out else "val"
        labels = Path(out) / split / "labels" / f"{number:05d}.png"
        if not labels.exists():
            write_indices(labels, label_map(masks[number]))
        picture = Path(out) / split / "images" / f"{number:05d}.jpg"
        if not picture.exists():
            _place(pictures[number], picture)
        return split

    for number in pictures:  # of an earlier run with another split
        other = Path(out) / ("val" if number < held_out else "train")
        for face in (other / f"labels/{number:05d}.png", other / f"images/{number:05d}.jpg"):
            if face.exists():
                raise ValueError(f"held-out: {face} is there, of another number than {held_out}; "
                                 "give that one again, or another folder")
    task = {"command": "smis convert-data celebamask-hq"}
    with unfinished(out, task), ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        numbers = sorted(pictures)
        for number, split in zip(numbers, pool.map(convert, numbers), strict=True):
            counts[split] += 1
            step(f"face {number}")
    return counts
