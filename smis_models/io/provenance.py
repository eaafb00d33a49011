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
    """The processor's name and how many cores it shows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, " \
           f"{len(names) or 'unknown'} cores"
