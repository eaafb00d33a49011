"""Honest timing: cases, interleaved measurement, records and their tables.

A set is a module of cases (:mod:`.modulation`); a new one is a file and a line in ``SETS``.
"""

from __future__ import annotations

import importlib

from ..io.choices import unknown_name
from .case import Case, Maps, Provider, Setting
from .measure import measure
from .records import load, markdown, save

SETS = {"modulation": ("modulation",), "algebra": ("algebra",), "pix2pixhd": ("pix2pixhd",),
        "ccfpse": ("ccfpse",), "evaluation": ("evaluation",), "training": ("training",),
        "family": ("family",)}
"""Set name -> the modules of this package whose ``CASES`` it runs."""


def cases(name: str, only: str = "") -> list[Case]:
    """The cases of a set ("all": of every set) whose name contains ``only``.

    Raises:
        ValueError: unknown set, or no case matches.
    """
    if name != "all" and name not in SETS:
        raise ValueError(unknown_name("set", [*SETS, "all"], name))
    modules = [m for key, value in SETS.items() if name in ("all", key) for m in value]
    found = [
        case
        for module in dict.fromkeys(modules)
        for case in importlib.import_module(f".{module}", __name__).CASES
        if only in case.group
    ]
    if not found:
        raise ValueError(f"only: no case of the set {name!r} contains {only!r}")
    return found


__all__ = [
    "SETS", "Case", "Maps", "Provider", "Setting", "cases", "load", "markdown", "measure", "save",
]
