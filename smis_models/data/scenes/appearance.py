"""How landscapes look: several appearance modes for each class, painted into a label map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scene import LANDSCAPE
from .textures import texture_bank

Colour = tuple[float, float, float]
Plane = NDArray[np.float32]
_BLACK: Colour = (0.0, 0.0, 0.0)
JITTER = 0.03  # of a region's colour, uniform, per channel


@dataclass(frozen=True)
class Mode:
    """One appearance of a class: ``colour + amplitude * texture + v * fade`` in RGB 0..1.

    v runs from -1/2 at the top to 1/2 at the bottom: of the image for stuff, of the instance for
    things.
    """

    name: str
    colour: Colour
    texture: str = "flat"
    amplitude: Colour = (0.05, 0.05, 0.05)
    fade: Colour = _BLACK


MODES: dict[str, tuple[Mode, ...]] = {
    "sky": (
        Mode("clear", (0.45, 0.70, 0.96), "clouds", (0.14, 0.08, 0.02), (0.45, 0.30, 0.06)),
        Mode("overcast", (0.66, 0.67, 0.70), "clouds", (0.12, 0.12, 0.12)),
        Mode("sunset", (0.90, 0.50, 0.38), "clouds", (0.08, 0.10, 0.05), (0.45, 0.25, -0.70)),
        Mode("night", (0.06, 0.07, 0.20), "stars", (0.40, 0.40, 0.35), (0.05, 0.05, 0.12)),
    ),
    "mountain": (
        Mode("rock", (0.43, 0.40, 0.42), "ridges", (0.11, 0.10, 0.10)),
        Mode("snow", (0.87, 0.91, 0.98), "ridges", (0.13, 0.09, 0.04)),
        Mode("forest", (0.12, 0.27, 0.20), "leaves", (0.06, 0.08, 0.06)),
        Mode("desert", (0.70, 0.36, 0.22), "strata", (0.11, 0.08, 0.06)),
    ),
    "water": (
        Mode("deep", (0.08, 0.25, 0.50), "ripples", (0.06, 0.10, 0.12)),
        Mode("turquoise", (0.15, 0.72, 0.72), "ripples", (0.10, 0.12, 0.10)),
        Mode("frozen", (0.75, 0.88, 0.94), "grain", (0.10, 0.06, 0.04)),
        Mode("evening", (0.72, 0.46, 0.62), "ripples", (0.14, 0.08, 0.06)),
    ),
    "ground": (
        Mode("asphalt", (0.27, 0.27, 0.29), "speckle", (0.07, 0.07, 0.07)),
        Mode("grass", (0.38, 0.64, 0.20), "speckle", (0.10, 0.12, 0.08)),
        Mode("sand", (0.88, 0.77, 0.50), "ripples", (0.06, 0.06, 0.06)),
        Mode("soil", (0.44, 0.28, 0.14), "blotches", (0.10, 0.08, 0.05)),
    ),
    "building": (
        Mode("brick", (0.55, 0.20, 0.16), "bricks", (0.20, 0.22, 0.20)),
        Mode("concrete", (0.60, 0.60, 0.57), "windows", (-0.38, -0.36, -0.30)),
        Mode("glass", (0.25, 0.46, 0.54), "windows", (0.38, 0.36, 0.32)),
        Mode("plaster", (0.90, 0.83, 0.64), "windows", (-0.42, -0.48, -0.40)),
    ),
    "tree": (
        Mode("summer", (0.12, 0.50, 0.10), "leaves", (0.08, 0.16, 0.06), (-0.05, -0.12, -0.04)),
        Mode("autumn", (0.86, 0.46, 0.08), "leaves", (0.12, 0.20, 0.06), (-0.10, -0.16, 0.0)),
        Mode("blossom", (0.95, 0.68, 0.80), "leaves", (0.06, 0.18, 0.12)),
        Mode("copper", (0.36, 0.10, 0.22), "leaves", (0.10, 0.06, 0.08)),
    ),
    "car": (
        Mode("red", (0.84, 0.07, 0.10), fade=(-0.15, -0.02, -0.02)),
        Mode("yellow", (0.98, 0.82, 0.08), fade=(-0.12, -0.12, -0.02)),
        Mode("blue", (0.08, 0.16, 0.82), fade=(-0.02, -0.05, -0.15)),
        Mode("white", (0.96, 0.96, 0.96), fade=(-0.10, -0.10, -0.10)),
    ),
    "person": (
        Mode("striped", (0.50, 0.50, 0.50), "stripes", (0.42, 0.42, 0.42)),
        Mode("magenta", (0.84, 0.08, 0.62)),
        Mode("checked", (0.62, 0.86, 0.12), "checks", (0.28, 0.10, 0.08)),
        Mode("teal", (0.02, 0.42, 0.38)),
    ),
}
MODE_NAMES = tuple(tuple(mode.name for mode in MODES[part]) for part in LANDSCAPE)
_THINGS = ("building", "tree", "car", "person")
# Parts of a thing that all its modes share: from and to which height (0 top, 1 bottom), colour.
# A rectangle of one texture would fill its crop, and lose its colour to an instance norm.
_DETAILS: dict[str, tuple[tuple[float, float, Colour], ...]] = {
    "building": ((0.0, 0.14, (0.25, 0.22, 0.24)), (0.14, 0.19, (0.93, 0.93, 0.90))),
    "tree": ((0.74, 1.0, (0.33, 0.23, 0.15)),),
    "car": ((0.0, 0.36, (0.16, 0.24, 0.30)), (0.80, 1.0, (0.07, 0.07, 0.08))),
    "person": ((0.0, 0.19, (0.86, 0.64, 0.50)),),
}


def draw_modes(r: np.random.Generator) -> NDArray[np.int64]:
    """(8,) the mode of each class, each drawn independently and uniformly."""
    return r.integers(0, [len(names) for names in MODE_NAMES])


def _heights(instances: NDArray[np.integer[Any]], first: int) -> Plane:
    """(H, W) 0..1 from top to bottom of each instance with an id from ``first`` on."""
    v = np.zeros(instances.shape, np.float32)
    numbers = np.flatnonzero(np.bincount(instances.ravel()))
    for number in numbers[numbers >= first]:
        inside = instances == number
        rows = np.flatnonzero(inside.any(1))
        top, height = rows[0], rows[-1] + 1 - rows[0]
        ramp = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        np.copyto(v[top:top + height], ramp, where=inside[top:top + height])
    return v


def paint(labels: NDArray[np.integer[Any]], instances: NDArray[np.integer[Any]],
          modes: Sequence[int] | NDArray[np.integer[Any]],
          r: np.random.Generator) -> NDArray[np.uint8]:
    """Paint a landscape: each class in its mode, with colour and texture jitter from ``r``.

    Args:
        labels: (H, W), classes 0..7 in the order of ``LANDSCAPE``.
        instances: (H, W), ids as in :class:`DrawnScene`.
        modes: (8,) which of ``MODES[class]`` each class shows.
        r: where the jitter and the cut of each texture come from.

    Returns:
        (H, W, 3) uint8.

    Example:
        >>> from smis_models.data.scenes import sample_scene
        >>> scene = sample_scene("landscape", 64, 64, 8)
        >>> r = np.random.default_rng(0)
        >>> picture = paint(scene.labels, scene.instances, draw_modes(r), r)
    """
    height, width = labels.shape
    size = max(height, width)
    bank = texture_bank(size)
    image = np.zeros((3, height, width), np.float32)
    jitter = r.uniform(-JITTER, JITTER, (len(LANDSCAPE), 3)).astype(np.float32)
    strength = r.uniform(0.85, 1.15, len(LANDSCAPE)).astype(np.float32)
    cuts = r.integers(0, size + 1, (len(LANDSCAPE), 2))
    of_image = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    of_thing = _heights(instances, 1000)
    for index, part in enumerate(LANDSCAPE):
        where = labels == index
        rows = np.flatnonzero(where.any(1))
        if not len(rows):
            continue
        band = slice(rows[0], rows[-1] + 1)
        where = where[band]
        mode = MODES[part][modes[index]]
        top, left = cuts[index]
        tile = bank[mode.texture][top + band.start:top + band.stop, left:left + width]
        v = (of_thing if part in _THINGS else of_image)[band]
        details = [((low <= v) & (v < high), colour)
                   for low, high, colour in _DETAILS.get(part, ())]
        for channel in range(3):
            plane = tile * (mode.amplitude[channel] * strength[index])
            plane += mode.colour[channel] + jitter[index, channel]
            if mode.fade[channel]:
                plane += (v - 0.5) * mode.fade[channel]
            for inside, colour in details:
                np.copyto(plane, colour[channel], where=inside)
            np.copyto(image[channel, band], plane, where=where)
    np.clip(image, 0, 1, out=image)
    return np.ascontiguousarray((image * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))

