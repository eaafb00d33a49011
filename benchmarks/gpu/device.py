"""Part ``device``: what the figures depend on besides the code."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .journal import Journal, Row, Skip
from .settings import Settings

TOOLS = ("nvcc", "compute-sanitizer", "cuobjdump", "nvidia-smi", "g++", "ninja", "git")
MODULES = ("triton", "numpy", "pytest", "matplotlib", "hypothesis", "PIL")
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def find_tool(name: str) -> str | None:
    """The path of a program, on PATH or in the toolkit's folders."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [str(Path(home, "bin"))] if home else []
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([*folders, *FOLDERS]))


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} failed: {error}"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1 if command[0].endswith("nvcc") else 0] if lines else ""


def facts(device: str) -> Row:
    """Device, driver, versions and tools.

    Raises:
        Skip: a GPU is wanted and none is visible.
    """
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__,
        "torch_cuda": torch.version.cuda, "cpus": os.cpu_count(),
        "tools": {name: find_tool(name) for name in TOOLS}, "modules": {},
    }
    for name in MODULES:
        try:
            module = __import__(name)
            found["modules"][name] = str(getattr(module, "__version__", "present"))
        except Exception as error:  # an import may fail with anything
            found["modules"][name] = f"absent: {type(error).__name__}"
    if device == "cpu":
        return {**found, "name": "cpu", "gpu": "none (dry run)"}
    if not torch.cuda.is_available():
        raise Skip("no CUDA GPU is visible to torch")
    facts_of = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    smi = found["tools"]["nvidia-smi"]
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
    return {
        **found, "gpu": facts_of.name, "capability": f"{facts_of.major}.{facts_of.minor}",
        "count": torch.cuda.device_count(), "multiprocessors": facts_of.multi_processor_count,
        "l2_bytes": facts_of.L2_cache_size, "memory_bytes": total, "free_bytes": free,
        "cudnn": torch.backends.cudnn.version(),
        "driver, SM clock, memory clock, power limit":
            _first_line(smi, query, "--format=csv,noheader") if smi else "nvidia-smi is absent",
        "nvcc": _first_line(found["tools"]["nvcc"], "--version") if found["tools"]["nvcc"] else "",
        "capabilities": [".".join(map(str, torch.cuda.get_device_capability(i)))
                         for i in range(torch.cuda.device_count())],
    }


def run(journal: Journal, settings: Settings) -> None:
    row = journal.row("machine", lambda: facts(settings.device))
    if row is not None and row["state"] != "done":
        raise RuntimeError(row["reason"])
