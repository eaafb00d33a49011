"""Loads the two native libraries and knows why one is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
BUILD_COMMAND = "python -m smis_kernels.build"


@dataclass(frozen=True)
class NativeStatus:
    """State of one native library; ``reason`` and ``cure`` are empty when it is loaded."""

    name: str
    loaded: bool
    path: str = ""
    reason: str = ""
    cure: str = ""


def build_record() -> dict[str, dict[str, str]]:
    """What the last build wrote: ``{"cpu": {...}, "cuda": {...}}`` with state, reason and cure."""
    path = PACKAGE / "_build_record.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> NativeStatus:
    path = PACKAGE / f"_{name}.abi3.so"
    if name == "cuda" and torch.version.cuda is None:
        built = " (the library itself is built)" if path.exists() else ""
        return NativeStatus(
            name, False, str(path) if path.exists() else "",
            f"this torch is a CPU-only build{built}", "install a CUDA build of torch",
        )
    if not path.exists():
        record = build_record().get(name, {})
        return NativeStatus(
            name, False, "",
            record.get("reason", "it has not been built"), record.get("cure", BUILD_COMMAND),
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        first = str(error).splitlines()[0]
        return NativeStatus(name, False, str(path), f"it does not load: {first}", BUILD_COMMAND)
    return NativeStatus(name, True, str(path))


# Raw ops that the loaded CPU library does not implement: it was built from older sources.
absent_kernels: list[str] = []

STATUS = {name: _load(name) for name in ("cpu", "cuda")}
