"""Honest timing: cases, interleaved measurement, records and their tables, on a CPU or on CUDA.

A set is a list of cases; a new one is a list and its name in ``SETS``.
"""

from __future__ import annotations

import importlib

from ..io.choices import unknown_name
from .case import Case, Maps, Provider, Setting
from .measure import measure
from .records import load, markdown, save

SETS = {
    "modulation": ("ops:MODULATION",), "algebra": ("networks:ALGEBRA",),
    "pix2pixhd": ("ops:PIX2PIXHD", "networks:PIX2PIXHD"),
    "ccfpse": ("ops:CCFPSE", "networks:CCFPSE"), "evaluation": ("evaluation:CASES",),
    "training": ("training:CASES", "ops:SPECTRAL"), "family": ("networks:FAMILY",),
}
"""Set name -> the lists of this package whose cases it runs."""


def cases(name: str, only: str = "") -> list[Case]:
    """The cases of a set ("all": of every set) whose name contains ``only``.

    Raises:
        ValueError: unknown set, or no case matches.
    """
    if name != "all" and name not in SETS:
        raise ValueError(unknown_name("set", [*SETS, "all"], name))
    found = []
    for place in (p for key, places in SETS.items() if name in ("all", key) for p in places):
        module, _, attribute = place.partition(":")
        listed = getattr(importlib.import_module(f".{module}", __name__), attribute)
        found += [case for case in listed if only in case.group]
    if not found:
        raise ValueError(f"only: no case of the set {name!r} contains {only!r}")
    return found


__all__ = [
    "SETS", "Case", "Maps", "Provider", "Setting", "cases", "load", "markdown", "measure", "save",
]
