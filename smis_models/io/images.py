"""Label and instance maps in, pictures out: reading PNGs, atomic writes, grids."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .files import replacing

SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # of index maps, which no lossy format may hold
PICTURE_SUFFIXES = (*SUFFIXES, ".jpg", ".jpeg", ".webp")
# What data sets append to the names of the picture and the maps of one scene.
_ROLE = re.compile(
    r"(_gtFine)?_?(labelIds|instanceIds|labels?|inst|instances?|leftImg8bit|img|images?)$"
)
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
# Pillow stretches 2- and 4-bit grey levels to 0..255; indices must not be stretched.
_STRETCH = {"L;2": 85, "L;4": 17}

Picture = NDArray[np.uint8]


class ImageError(ValueError):
    """A file that cannot be used as the map it was given as; the message names file and cure."""


def scene_name(path: Path) -> str:
    """The stem of a file without what tells its role: the same for all files of a scene.

    Example:
        >>> scene_name(Path("aachen_000000_000019_gtFine_labelIds.png"))
        'aachen_000000_000019'
    """
    return _ROLE.sub("", path.stem)


def _read_indices(path: Path) -> NDArray[np.int64]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a PNG index map")
    try:
        with Image.open(path) as image:
            stretch = _STRETCH.get(str(image.tile[0][3]) if image.tile else "", 1)
            mode = image.mode
            pixels = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageError(f"{path}: cannot be read as an image ({reason}); "
                         "expected a PNG index map") from error
    if mode not in _INDEX_MODES:
        raise ImageError(f"{path}: expected one index per pixel (8-bit, palette or 16-bit PNG), "
                         f"got a {mode} image; convert the colours to class indices first")
    indices = pixels.astype(np.int64)
    return indices if stretch == 1 else indices // stretch


def resize_nearest(indices: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Nearest neighbour with source index = floor(target index * scale), as the papers' code.

    Args:
        indices: (H, W).
        size: (height, width) of the result.
    """
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, indices.shape, strict=True))
    return indices[rows[:, None], columns]


def read_labels(path: str | Path, num_classes: int, size: tuple[int, int] | None = None,
                unknown: int | None = None) -> NDArray[np.int64]:
    """Read a class-index map.

    Args:
        path: an 8-bit, palette or 16-bit single-channel image.
        num_classes: values must lie in 0..num_classes-1.
        size: (height, width) to resize to, by nearest neighbour.
        unknown: the class that the value 255 stands for, if any.

    Returns:
        (H, W) int64.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, not an index map, or a value out of range.

    Example:
        >>> labels = read_labels("scene.png", num_classes=35, size=(256, 512))  # doctest: +SKIP
    """
    labels = _read_indices(Path(path))
    if unknown is not None:
        if not 0 <= unknown < num_classes:
            raise ValueError(f"unknown: expected a class 0..{num_classes - 1}, got {unknown}")
        labels = np.where(labels == 255, unknown, labels)
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if bad.size:
        cure = "give the class of unknown pixels (--unknown)" if bad[0] == 255 else (
            "remap the classes or choose the model of this data set")
        raise ImageError(f"{path}: expected labels 0..{num_classes - 1}, got {bad[0]}; {cure}")
    return labels if size is None else resize_nearest(labels, size)


def read_instances(path: str | Path, size: tuple[int, int] | None = None) -> NDArray[np.int64]:
    """Read an instance-id map; 16-bit ids keep their value.

    Returns:
        (H, W) int64.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, or a colour image.
    """
    ids = _read_indices(Path(path))
    return ids if size is None else resize_nearest(ids, size)


def read_picture(path: str | Path, size: tuple[int, int] | None = None) -> Picture:
    """Read a photograph as (H, W, 3), resized bicubically to ``size`` (height, width).

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a picture")
    try:
        with Image.open(path) as image:
            mode = image.mode
            picture = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: cannot be read as a picture ({error}); "
                         "expected a PNG or JPEG") from error
    if mode.startswith(("I", "F")):  # which Pillow clips to 255 instead of scaling
        raise ImageError(f"{path}: expected a picture of 8 bits per channel, got mode {mode} "
                         "(16 or 32 bits); convert it to 8 bits first")
    if size is not None:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def write_atomically(path: str | Path, content: bytes) -> Path:
    """Write a whole file or none of it: a temporary file beside it, then a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content)
    return path


def encode_png(picture: NDArray[np.unsignedinteger[Any]]) -> bytes:
    """PNG bytes of an (H, W) or (H, W, 3) uint8 array, or an (H, W) uint16 one."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: str | Path, picture: NDArray[np.unsignedinteger[Any]]) -> Path:
    """Write :func:`encode_png`'s bytes atomically."""
    return write_atomically(path, encode_png(picture))


def write_indices(path: str | Path, indices: NDArray[np.integer[Any]]) -> Path:
    """Write a label or instance map as an 8-bit or, where ids need it, a 16-bit PNG.

    Raises:
        ValueError: an id below 0 or above 65535, which a PNG cannot hold.
    """
    low, high = (int(indices.min()), int(indices.max())) if indices.size else (0, 0)
    if low < 0 or high > 65535:
        raise ValueError(f"indices: expected 0..65535, got {low if low < 0 else high}")
    small: NDArray[np.unsignedinteger[Any]] = indices.astype(np.uint8 if high < 256 else np.uint16)
    return write_png(path, small)


def data_uri(picture: Picture) -> str:
    """The picture as ``data:image/png;base64,...`` for a page without other files."""
    return "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode("ascii")


def to_pictures(batch: Tensor) -> list[Picture]:
    """(N, 3, H, W) values -1..1 as N uint8 arrays (H, W, 3).

    Raises:
        ValueError: the batch holds NaN or infinity, which no pixel can show.
    """
    if not bool(torch.isfinite(batch).all()):
        raise ValueError("batch: expected finite values, got NaN or infinity; "
                         "check the checkpoint and the inputs")
    levels = ((batch.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def grid(rows: Sequence[Sequence[Picture]], gap: int = 4) -> Picture:
    """Pictures of one size, row under row, on white; short rows end in white."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            sheet[y:y + height, x:x + width] = picture
    return sheet
