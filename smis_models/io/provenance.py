"""What a record says of the source, the libraries and the machine that made it."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch


@cache
def commit() -> str:
    """The commit of the source tree that runs; "unknown" where it is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    inside = (root / "pyproject.toml").exists()
    return done.stdout.strip() or "unknown" if inside and done.returncode == 0 else "unknown"


@cache
def versions() -> dict[str, str]:
    """What the times depend on besides the commit."""
    import smis_kernels
    from smis_kernels.interface import instruction_set

    found = {
        "smis_kernels": smis_kernels.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "processor": processor(),
        "instructions": instruction_set(), "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def processor() -> str:
    """The processor's name, its family and model where they are told, and the cores it shows."""
    path = Path("/proc/cpuinfo")
    return _processor_of(path.read_text() if path.exists() else "")


def _processor_of(text: str) -> str:
    told = [line.partition(":")[::2] for line in text.splitlines() if ":" in line]
    first = {key.strip(): value.strip() for key, value in reversed(told)}
    name = first.get("model name") or platform.processor() or platform.machine()
    kind = " ".join(f"{word} {first[key]}" for word, key in (("family", "cpu family"),
                                                             ("model", "model")) if key in first)
    cores = sum(key.strip() == "model name" for key, _ in told)
    return f"{name}{f' ({kind})' if kind else ''}, {cores or 'unknown'} cores"
