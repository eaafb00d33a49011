"""Loads the two native libraries and knows why one is missing."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import build

PACKAGE = Path(__file__).resolve().parent.parent
BUILD_COMMAND = build.COMMAND


@dataclass(frozen=True)
class NativeStatus:
    """State of one native library; ``reason`` and ``cure`` are empty when it is loaded.

    ``isa`` of the CPU library: what its kernels run on, or what is wrong with ``SMIS_ISA``.
    """

    name: str
    loaded: bool
    path: str = ""
    reason: str = ""
    cure: str = ""
    isa: str = ""
    emulated: bool = False


def build_record() -> dict[str, dict[str, str]]:
    """What the last build wrote: ``{"cpu": {...}, "cuda": {...}}`` with state, reason and cure."""
    path = PACKAGE / "_build_record.json"
    return json.loads(path.read_text()) if path.exists() else {}


def cuda_emulated() -> bool:
    """Whether ``backend="cuda"`` takes CPU tensors (``SMIS_CUDA_EMULATED=1``, for the tests)."""
    return os.environ.get("SMIS_CUDA_EMULATED", "0") == "1"


def load_emulated(path: Path) -> None:
    """Take the CUDA kernels from a library that runs them on the CPU, as the tests build it."""
    torch.ops.load_library(path)
    STATUS["cuda"] = NativeStatus("cuda", True, str(path), emulated=True)


def _load(name: str) -> NativeStatus:
    if name == "cuda" and cuda_emulated():
        return NativeStatus(
            name, False, "", "SMIS_CUDA_EMULATED=1 asks for the emulation, which only tests load",
            "unset SMIS_CUDA_EMULATED",
        )
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
    if name == "cuda":
        built = build_record().get(name, {}).get("cuda", "")
        if other := build.other_cuda(built, torch.version.cuda or ""):
            return NativeStatus(name, False, str(path), *other)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        first = str(error).splitlines()[0]
        return NativeStatus(name, False, str(path), f"it does not load: {first}", BUILD_COMMAND)
    return NativeStatus(name, True, str(path), isa=_isa(path) if name == "cpu" else "")


def instruction_set() -> str:
    """What the CPU kernels run on ("avx2"); "none" where they are not loaded."""
    status = STATUS["cpu"]
    return status.isa if status.loaded and status.isa else "none"


def _isa(path: Path) -> str:
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "smis_isa"):
        return "unknown: the library is older than the package"
    library.smis_isa.restype = ctypes.c_char_p
    return str(library.smis_isa().decode())


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``architectures`` ("8.0 9.0+PTX") run on a GPU of ``capability``.

    Machine code runs within its major version from its minor one on, PTX on everything later; of
    "9.0a" both run on 9.0 alone, of "10.0f" on the family, which is taken as its major version.
    """
    for word in architectures.split():
        number, _, ptx = word.partition("+")
        least = tuple(int(n) for n in number.rstrip("af").split("."))
        same = least == capability if number.endswith("a") else least[0] == capability[0]
        if least <= capability and (same or (ptx and not number[-1].isalpha())):
            return True
    return False


# Raw ops that the loaded CPU library does not implement: it was built from older sources.
absent_kernels: list[str] = []

STATUS = {name: _load(name) for name in ("cpu", "cuda")}
