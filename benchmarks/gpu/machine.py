"""Parts ``device`` and ``build``: what figures depend on besides the code, and its libraries."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .results import ROOT, Journal, Row, Settings, Skip

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
        return {**found, "gpu": "none (dry run)"}
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


def device(journal: Journal, settings: Settings) -> None:
    """Part ``device``."""
    row = journal.row("machine", lambda: facts(settings.device))
    if row is not None and row["state"] != "done":
        raise RuntimeError(row["reason"])


def compile_libraries(journal: Journal, settings: Settings) -> Row:
    """``python -m smis_kernels.build`` for the architectures of the GPUs in this machine."""
    if settings.dry_run:
        raise Skip("dry run: the libraries that are built are used as they are")
    machine = journal.content["parts"]["device"]["rows"][0]
    environment = {**os.environ, "SMIS_BUILD": "all"}
    wanted = sorted(set(machine["capabilities"]), key=lambda text: tuple(map(int, text.split("."))))
    environment.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(wanted))
    done = subprocess.run(
        (sys.executable, "-m", "smis_kernels.build"), cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=max(journal.left(), 10),
        check=False,
    )
    print(done.stdout, flush=True)
    record = json.loads((ROOT / "smis_kernels" / "_build_record.json").read_text())
    return {"architectures": environment["TORCH_CUDA_ARCH_LIST"],
            "libraries": {name: {k: v for k, v in entry.items() if k != "output"}
                          for name, entry in record.items()}}


def load(name: str, settings: Settings) -> Row:
    """One library, compiled and loaded; what the CUDA library lacks stops no Triton kernel."""
    from smis_kernels.runtime import native  # not before it is compiled

    entry = native.build_record().get(name, {})
    if settings.dry_run and name == "cuda":
        raise Skip(f"dry run: {native.STATUS[name].reason or 'it needs a GPU'}")
    if not settings.dry_run and entry.get("state") != "built":
        raise RuntimeError(f"{entry.get('reason', 'not built')}; cure: {entry.get('cure', '')}")
    status = native.STATUS[name]
    if not status.loaded:
        raise RuntimeError(f"{status.reason}; cure: {status.cure}")
    return {"file": Path(status.path).name}


def kernels() -> Row:
    """Every op must have the kernels that its ``KINDS`` promise, of the libraries that loaded."""
    from smis_kernels.runtime import native
    from smis_kernels.runtime.library import NAMESPACE, raw_ops

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    counts = {key: sum(has(f"{NAMESPACE}::{name}", key) for name in raw_ops)
              for key in ("CPU", "CUDA")}
    missing = []
    for path in sorted((ROOT / "smis_kernels").glob("ops/*/op.py")):
        op = importlib.import_module(f"smis_kernels.ops.{path.parent.name}.op")
        if "triton" in op.KINDS:
            importlib.import_module(f"smis_kernels.ops.{path.parent.name}.triton")
        raw = [value for value in vars(op).values() if type(value).__name__ == "RawOp"]
        loaded = [kind for kind in op.KINDS if kind == "triton" or native.STATUS[kind].loaded]
        needed = sorted({"CPU" if kind == "cpu" else "CUDA" for kind in loaded})
        missing += [f"{r.name} on {key}" for r in raw for key in needed
                    if (r.on_cpu or key != "CPU") and not has(f"{NAMESPACE}::{r.name}", key)
                    and not has(f"{NAMESPACE}::{r.name}", "CompositeExplicitAutograd")]
    if missing:
        raise RuntimeError(f"no kernel of {', '.join(missing)}")
    return {"kernels": counts}


def build(journal: Journal, settings: Settings) -> None:
    """Part ``build``."""
    journal.row("compile", lambda: compile_libraries(journal, settings))
    for name in ("cpu", "cuda"):
        journal.row(f"{name} library", partial(load, name, settings))
    journal.row("kernels", kernels)
