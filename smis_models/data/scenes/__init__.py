"""Procedural scenes: label and instance maps, their appearance, and a judge of it."""

from .appearance import MODE_NAMES, MODES, draw_modes, paint
from .scene import KINDS, LANDSCAPE, DrawnScene, palette, sample_scene

__all__ = [
    "KINDS",
    "LANDSCAPE",
    "MODES",
    "MODE_NAMES",
    "DrawnScene",
    "draw_modes",
    "paint",
    "palette",
    "sample_scene",
]
