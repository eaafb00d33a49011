"""What SMIS_REQUIRE asks for: its absence ends the run, where tests would be skipped without it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from smis_kernels.runtime.backend import missing

INDEPENDENT = Path(os.environ.get("SMIS_INDEPENDENT", Path(sys.prefix) / "independent"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")


def lacking(name: str) -> str | None:
    """Why ``name`` is not at hand, with the cure: a backend, "chromium", a module."""
    if name in ("cpu", "cuda", "triton"):
        return missing(name)
    if name == "independent":
        return None if INDEPENDENT.is_dir() else (
            f"{INDEPENDENT}: no such folder; python -m pip install --no-deps --target "
            f"{INDEPENDENT} -r tests/independent.txt")
    if name == "chromium":
        absent = [module for module in ("playwright", "starlette", "uvicorn")
                  if importlib.util.find_spec(module) is None]
        if CHROMIUM and not absent:
            return None
        return (f"no module {absent[0]!r}; pip install it" if CHROMIUM
                else "no chromium; apt-get install chromium")
    return None if importlib.util.find_spec(name) else f"no module {name!r}; pip install it"


def unmet(required: str) -> list[str]:
    """A line for each of the comma-separated names in ``required`` that is not at hand."""
    found = ((name, lacking(name)) for name in required.split(",") if name)
    return [f"SMIS_REQUIRE={name}: {reason}" for name, reason in found if reason]
