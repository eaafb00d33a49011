"""Animated files of frames: GIF, APNG and WebP, through Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, features
from PIL.PngImagePlugin import PngInfo

from .images import SOFTWARE, Picture, write_atomically

FORMATS = {"gif": ("GIF", ".gif"), "apng": ("PNG", ".png"), "webp": ("WEBP", ".webp")}


_MOST_SECONDS = 30.0  # APNG counts milliseconds in 16 bits; the last frame stays twice as long


def check_animation(format: str, seconds: float) -> None:
    """Refuse what cannot be written here.

    Raises:
        ValueError: an unknown format, or WebP where Pillow was built without it; seconds that no
            frame can stay.
    """
    if not 0.01 <= seconds <= _MOST_SECONDS:
        raise ValueError(f"seconds: expected 0.01 to {_MOST_SECONDS:g}, got {seconds:g}")
    if format not in FORMATS:
        raise ValueError(f"animation: expected one of {', '.join(FORMATS)}; got {format!r}")
    if format == "webp" and not features.check("webp"):
        raise ValueError("animation: this Pillow writes no WebP; choose gif or apng")


def write_animation(path: str | Path, frames: Sequence[Picture], format: str = "gif",
                    seconds: float = 0.4) -> Path:
    """Write frames (H, W, 3) that repeat without end; the whole file or none of it.

    APNG and WebP are written without loss; GIF has 256 colours a frame, by Pillow's dithering.

    Args:
        path: without its ending, which the format decides.
        frames: at least one, of one size.
        format: "gif", "apng" or "webp".
        seconds: that each frame stays; the last stays twice as long.

    Returns:
        The file.

    Raises:
        ValueError: an unknown format, no frames, frames of several sizes, too little or too much
            time.

    Example:
        >>> import numpy as np
        >>> frames = np.zeros((3, 16, 16, 3), np.uint8)
        >>> path = write_animation("out/morph", frames, "webp")
    """
    check_animation(format, seconds)
    sizes = {frame.shape for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"frames: expected at least one, all of one size; got {sorted(sizes)}")
    kind, suffix = FORMATS[format]
    images = [Image.fromarray(frame) for frame in frames]
    each = round(1000 * seconds)
    mark, exif = PngInfo(), Image.Exif()
    mark.add_text("Software", SOFTWARE)
    exif[ExifTags.Base.Software] = SOFTWARE
    options: dict[str, dict[str, Any]] = {
        "gif": {"comment": SOFTWARE.encode()}, "apng": {"pnginfo": mark},
        "webp": {"lossless": True, "exif": exif}}
    buffer = io.BytesIO()
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], loop=0,
                   duration=[each] * (len(images) - 1) + [2 * each], **options[format])
    return write_atomically(Path(path).with_name(Path(path).name + suffix), buffer.getvalue())
