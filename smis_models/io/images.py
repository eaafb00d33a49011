"""Label and instance maps and pictures: read, resized by one rule, written whole; grids."""

from __future__ import annotations

import base64
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files import replacing

_EXACT = ("PNG", "BMP", "DIB", "TIFF", "PPM")  # formats that keep every value, by content
_LOSSY = ("jpeg", "tiff_jpeg", "webp")  # compressions inside a TIFF that do not
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
# Pillow stretches 2- and 4-bit grey levels to 0..255; indices must not be stretched.
_STRETCH = {"L;2": 85, "L;4": 17}
_UNSCALED = (255, 65535)  # the largest values of a PGM that Pillow keeps as they are

Picture = NDArray[np.uint8]
# What is opened: some of Pillow's other decoders start programs.
_DECODED = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")
# What Pillow raises of damaged files.
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError,
               struct.error, zlib.error, Image.DecompressionBombError)
SOFTWARE = "smis"  # the mark of written pictures: what is somebody else's is never removed


class ImageError(ValueError):
    """A file that cannot be used as the map it was given as; the message names file and cure."""


@contextmanager
def opened(path: str | Path, expected: str,
           kind: str = "an image") -> Iterator[ImageFile.ImageFile]:
    """An image to decode inside the block; of whatever cannot be, one line.

    Args:
        expected: what the file should be, for the error. kind: what it is read as.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, or a damaged one.

    Example:
        >>> with opened("mask.png", "a mask as PNG") as image:  # doctest: +SKIP
        ...     inside = np.asarray(image.convert("L")) > 0
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    try:
        with Image.open(path, formats=_DECODED) as image:
            yield image
    except ImageError:
        raise
    except _UNREADABLE as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageError(f"{path}: cannot be read as {kind} ({reason}); "
                         f"expected {expected}") from error


def _storage(image: ImageFile.ImageFile) -> tuple[str, int]:
    """(how a pixel is stored, the largest value of a PGM or PPM that Pillow scales, else 0)."""
    if not image.tile:
        return "", 0
    decoder, arguments = image.tile[0][0], image.tile[0][3]
    words: tuple[Any, ...] = arguments if isinstance(arguments, tuple) else (arguments,)
    if decoder.startswith("ppm") and isinstance(words[-1], int):  # else a PBM, which has no levels
        return "", words[-1]
    return str(words[0]) if words else "", 0


def _one_page(path: str | Path, image: ImageFile.ImageFile) -> None:
    """Refuse what holds several maps, of which the first alone would be read."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise ImageError(f"{path}: expected one map, got a {image.format} of {pages} pages; save "
                         "the one that is meant as PNG")


def read_indices(path: Path) -> NDArray[np.int64]:
    """The values of an image of one channel, as they are stored; of palettes the indices.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, a lossy format, several channels or pages, a PGM whose levels are
            scaled, a PBM or TIFF whose values are stored inverted.
    """
    with opened(path, "a PNG index map") as image:
        stored, largest = _storage(image)
        stretch = _STRETCH.get(stored[:3], 1)
        mode, kind = image.mode, str(image.format)
        if image.info.get("compression") in _LOSSY:
            kind = "lossy TIFF"
        _one_page(path, image)
        pixels = np.asarray(image)
    if kind not in _EXACT:
        raise ImageError(f"{path}: expected an index map as PNG, got a {kind} file, which does not "
                         "keep indices; make the map again as PNG, for a conversion keeps the "
                         "wrong values")
    if largest and largest not in _UNSCALED:
        raise ImageError(f"{path}: expected a PGM with levels up to 255 or 65535, got up to "
                         f"{largest}, which decoders scale; make the map again as PNG")
    if stored.endswith("I") and stored[:2] in ("1;", "L;"):
        raise ImageError(f"{path}: expected indices as they are, got a {kind} file whose zero is "
                         "white, which programs read inverted or not; make the map again as PNG")
    if mode not in _INDEX_MODES:
        raise ImageError(f"{path}: expected one index per pixel (8-bit, palette or 16-bit PNG), "
                         f"got {_no_indices(mode, pixels)}")
    indices = pixels.astype(np.int64)
    return indices if stretch == 1 else indices // stretch


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) from a file's head.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image.
    """
    with opened(path, "an image") as image:
        return image.height, image.width


def _no_indices(mode: str, pixels: NDArray[Any]) -> str:
    """What a picture of another mode is, and the cure."""
    if mode == "F":
        return "a float image; round and save it as 8-bit or 16-bit integers"
    if mode == "LA":
        return "a grey image with an alpha channel; `smis convert-labels` takes it off"
    if pixels.ndim == 3 and (pixels[..., :3] == pixels[..., :1]).all():
        return f"a {mode} image of equal channels; `smis convert-labels` keeps one of them"
    return f"a {mode} image; `smis convert-labels` turns colours into class indices"


def resize_nearest(indices: NDArray[np.integer[Any]], size: tuple[int, int]) -> NDArray[np.int64]:
    """The one rule by which maps that were read are resized: Pillow's NEAREST.

    It takes the source pixel under each target pixel's centre, as the loaders of pix2pixHD, SPADE
    and GroupDNet do. (Inside the networks, maps are resized as ``F.interpolate`` does.)

    Args:
        indices: (H, W), each below 2³¹.
        size: (height, width) of the result.
    """
    if indices.shape == tuple(size):
        return indices.astype(np.int64)
    image = Image.fromarray(indices.astype(np.int32))  # mode I: every id keeps its value
    return np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)


def resize_picture(picture: Picture, size: tuple[int, int]) -> Picture:
    """(H, W, 3) to ``size`` (height, width) by Pillow's BICUBIC, as the published loaders do."""
    if picture.shape[:2] == tuple(size):
        return picture
    image = Image.fromarray(picture)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def read_labels(path: str | Path, num_classes: int, size: tuple[int, int] | None = None,
                unknown: int | None = None, option: str | None = None) -> NDArray[np.int64]:
    """Read a class-index map.

    Args:
        path: an 8-bit, palette or 16-bit single-channel image.
        num_classes: values must lie in 0..num_classes-1.
        size: (height, width) to resize to, by :func:`resize_nearest`.
        unknown: the class that the value 255 stands for, if any.
        option: what the user can give ``unknown`` by, for the error.

    Returns:
        (H, W) int64.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, not an index map, or a value out of range.

    Example:
        >>> labels = read_labels("scene.png", num_classes=35, size=(256, 512))  # doctest: +SKIP
    """
    labels = read_indices(Path(path))
    if unknown is not None:
        if not 0 <= unknown < num_classes:
            raise ValueError(f"unknown: expected a class 0..{num_classes - 1}, got {unknown}")
        labels = np.where(labels == 255, unknown, labels)
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if bad.size:
        cure = "remap the classes or choose the model of this data set"
        if bad[0] == 255:
            cure = "relabel unknown pixels" if option is None else (
                f"give the class of unknown pixels ({option})")
        raise ImageError(f"{path}: expected labels 0..{num_classes - 1}, got {bad[0]}; {cure}")
    return labels if size is None else resize_nearest(labels, size)


def read_instances(path: str | Path, size: tuple[int, int] | None = None) -> NDArray[np.int64]:
    """Read an instance-id map; 16-bit ids keep their value.

    Returns:
        (H, W) int64, resized to ``size`` by :func:`resize_nearest`.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, or a colour image.
    """
    ids = read_indices(Path(path))
    return ids if size is None else resize_nearest(ids, size)


def read_exact(path: str | Path) -> Picture:
    """Read an image whose very colours count, as opaque (H, W, 3); of palettes the colours.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, a lossy format, several pages, more than 8 bits, transparent
            pixels.
    """
    with opened(path, "a PNG") as image:
        mode = image.mode
        stored, largest = _storage(image)
        kind = "lossy TIFF" if image.info.get("compression") in _LOSSY else str(image.format)
        _one_page(path, image)
        pixels = np.asarray(image.convert("RGBA"))
    if kind not in _EXACT:
        raise ImageError(f"{path}: expected colours as PNG, got a {kind} file, which does not keep "
                         "them; make the map again as PNG")
    if mode.startswith(("I", "F")) or ";16" in stored or largest not in (0, 255):
        raise ImageError(f"{path}: expected 8 bits per channel, got "
                         f"{stored or mode}{f' up to {largest}' if largest else ''}")
    if (pixels[..., 3] != 255).any():
        raise ImageError(f"{path}: expected opaque pixels, got transparent ones; fill them with "
                         "the colour of their class")
    return np.ascontiguousarray(pixels[..., :3])


def one_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether a (height, width) is another scaled; half a pixel of each side may be rounded off."""
    return abs(a[0] * b[1] - a[1] * b[0]) * 2 <= max(*a, *b)


# By which a picture of each EXIF orientation is shown. Pillow's own function writes the other
# marks anew, and fails at an odd one.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 where there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _TURNS else 1
    except Exception:  # damaged marks raise many kinds, and change no pixel
        return 1


def _as_stored(path: str | Path, orientation: int, size: tuple[int, int],
               like: tuple[int, ...] | None) -> bool:
    """Whether a picture of ``size`` is read as its pixels lie, and not as it is shown.

    Raises:
        ImageError: its map fits both ways.
    """
    if orientation == 1 or like is None:
        return orientation == 1
    stored = one_shape(size, like)
    shown = one_shape(size[::-1] if orientation > 4 else size, like)
    if stored and shown:
        raise ImageError(f"{path}: expected pixels as they are shown, got the EXIF orientation "
                         f"{orientation}, and its map fits both ways; save the picture turned as "
                         "its map is, without that mark")
    return stored


def read_picture(path: str | Path, size: tuple[int, int] | None = None,
                 like: tuple[int, ...] | None = None) -> Picture:
    """Read a photograph as (H, W, 3), resized bicubically to ``size`` (height, width).

    One that its camera marked to be shown turned or mirrored (EXIF) is read as it is shown. Where
    it has a map, the map's shape decides: some tools draw maps on the pixels as they are stored.

    Args:
        path: of the picture.
        size: (height, width) of the result.
        like: (height, width) of the picture's map, if it has one.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image; a marked one whose map fits both ways.
    """
    with opened(path, "a PNG or JPEG", "a picture") as image:
        mode = image.mode
        picture = image.convert("RGB")  # of a TIFF, Pillow has turned it and removed the mark
        orientation = _orientation(image)
        if not _as_stored(path, orientation, (image.height, image.width), like):
            picture = picture.transpose(_TURNS[orientation])
    if mode.startswith(("I", "F")):  # which Pillow clips to 255 instead of scaling
        raise ImageError(f"{path}: expected a picture of 8 bits per channel, got mode {mode} "
                         "(16 or 32 bits); convert it to 8 bits first")
    pixels = np.asarray(picture)
    return pixels if size is None else resize_picture(pixels, size)


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
    mark = PngInfo()
    if picture.ndim == 3:  # an index map may be one that a user drew, whatever wrote it
        mark.add_text("Software", SOFTWARE)
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def written_here(path: str | Path) -> bool:
    """Whether a picture (no index map) or an animation is this package's, by its mark."""
    try:
        with Image.open(path) as image:
            marks = (image.info.get("Software"), image.info.get("comment"),
                     image.getexif().get(ExifTags.Base.Software))
    except _UNREADABLE:
        return False
    return SOFTWARE in marks or SOFTWARE.encode() in marks


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


_SLACK = 1e-3  # what a picture may exceed [-1, 1] by: rounding of 16-bit floats


def check_pictures(pictures: Tensor, smallest: int = 1, name: str = "pictures") -> None:
    """Refuse what are no pictures in [-1, 1]: their numbers would be wrong, and plausible.

    Raises:
        ValueError: no floats, another rank or channel count, too small, not finite, out of range.
    """
    if not isinstance(pictures, Tensor) or not pictures.is_floating_point():
        got = pictures.dtype if isinstance(pictures, Tensor) else type(pictures).__name__
        raise ValueError(f"{name}: expected floats in [-1, 1], got {got}; of bytes give "
                         "x.float() / 127.5 - 1")
    if pictures.dim() != 4 or pictures.shape[1] != 3 or min(pictures.shape[2:]) < smallest:
        raise ValueError(f"{name}: expected (N, 3, H, W) with H and W of at least {smallest}, got "
                         f"{tuple(pictures.shape)}")
    if not pictures.numel():
        return
    low, high = (float(value) for value in torch.aminmax(pictures.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity; check the "
                         "checkpoint and the inputs")
    if max(-low, high) > 1 + _SLACK:
        raise ValueError(f"{name}: expected values in [-1, 1], got {low:.4g} to {high:.4g}; of "
                         "0..255 give x / 127.5 - 1")


class PictureSpan:
    """The least and the largest value of pictures: those in 0..1 pass for ones in [-1, 1].

    Example:
        >>> PictureSpan(torch.tensor([[-1.0, 1.0]])).tell()
    """

    def __init__(self, *pictures: Tensor) -> None:
        self.low, self.high = math.inf, -math.inf
        for batch in pictures:
            self.add(batch)

    def add(self, pictures: Tensor) -> None:
        """Go on with pictures."""
        if pictures.numel():
            low, high = torch.aminmax(pictures.detach())
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def tell(self, name: str = "pictures") -> None:
        """Warn where no value is below 0, unless all are one."""
        if 0 <= self.low < self.high:
            warnings.warn(f"{name}: expected values in [-1, 1], got none below 0; of pictures in "
                          "0..1 give 2 * x - 1", stacklevel=3)


def as_bytes(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> uint8, rounded as pictures are when they are written.

    Raises:
        ValueError: as :func:`check_pictures`.
    """
    check_pictures(pictures)
    return ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pictures(batch: Tensor) -> list[Picture]:
    """(N, 3, H, W) in [-1, 1] as N uint8 arrays (H, W, 3).

    Raises:
        ValueError: as :func:`check_pictures`.
    """
    return list(as_bytes(batch).permute(0, 2, 3, 1).cpu().numpy())


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
