"""What is installed, built and loaded here, and the command that changes it.

``python -m smis_kernels.info [--json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import build
from .runtime import backend as _backend
from .runtime import native as _native

ENVIRONMENT = (
    _backend.ENVIRONMENT, "SMIS_PATH", "SMIS_ISA", build.SELECTION, "TRITON_INTERPRET",
    "SMIS_CUDA_EMULATED", "CXX", "CUDACXX",
    "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)
# The file that holds an op's implementation of each kind.
_FILES = {"cpu": "csrc/{op}/cpu.cpp", "cuda": "csrc/{op}/cuda.cu", "triton": "ops/{op}/triton.py"}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _field(path: str, key: str) -> str:
    """The first line of a /proc file that begins with ``key``, after its colon."""
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def _libraries() -> dict[str, dict[str, Any]]:
    record = _native.build_record()
    libraries = {}
    for name, status in _native.STATUS.items():
        built = (_native.PACKAGE / f"_{name}.abi3.so").exists()
        entry = record.get(name, {})
        libraries[name] = {
            "built": built, "loaded": status.loaded, "reason": status.reason, "cure": status.cure,
            "emulated": status.emulated, "last_build": build.summary(entry) if entry else "never",
        }
    return libraries


def _why_not(kind: str) -> str:
    problem = _backend.missing(kind)
    if kind == "cuda" and _native.STATUS["cuda"].emulated:
        return ""
    if problem is None and kind != "cpu":
        if not torch.cuda.is_available():
            interpreted = kind == "triton" and _backend.triton_interpreted()
            return "" if interpreted else "no CUDA GPU is visible"
        problem = _backend.missing(kind, torch.device("cuda"))
    return problem or ""


def _ops() -> dict[str, dict[str, str]]:
    """Per op the backends it has; an empty string where one runs here, else why not."""
    package, source, _ = build.locate()
    roots = {"cpu": source.parent, "cuda": source.parent, "triton": package}
    why_not = {kind: _why_not(kind) for kind in _FILES}
    ops = {}
    for path in sorted(package.glob("ops/*/op.py")):
        op = path.parent.name
        kinds = [k for k, name in _FILES.items() if (roots[k] / name.format(op=op)).exists()]
        ops[op] = {"reference": "", **{kind: why_not[kind] for kind in kinds}}
    return ops


def info() -> dict[str, Any]:
    """Versions, machine, native libraries, backends of each op and environment, as a dict.

    Example:
        >>> from smis_kernels.info import info
        >>> sorted(info()["libraries"])
        ['cpu', 'cuda']
    """
    gpus = [
        "{} ({}.{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    return {
        "versions": {
            "smis_kernels": _version("smis-kernels"),
            "package": build.acts_on(build.locate()[0], "info"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "torch's CUDA": torch.version.cuda or "none (CPU-only build)",
        },
        "machine": {
            "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "CPU kernels": _native.STATUS["cpu"].isa or "not loaded",
            "threads": str(torch.get_num_threads()),
            "driver": _field("/proc/driver/nvidia/version", "NVRM version") or "none",
            "GPUs": ", ".join(gpus) or "none",
        },
        "libraries": _libraries(),
        "ops": _ops(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
    }


def _library_line(library: dict[str, Any]) -> str:
    built = "built, not loaded" if library["built"] else "missing"
    loaded = "loaded, emulated on the CPU" if library["emulated"] else "loaded"
    state = loaded if library["loaded"] else built
    why = f": {library['reason']}; cure: {library['cure']}" if library["reason"] else ""
    return f"{state}{why}"


def report(found: dict[str, Any]) -> str:
    """``info()`` as a plain text table."""
    sections: dict[str, dict[str, str]] = {
        "versions": found["versions"],
        "machine": found["machine"],
        "native libraries": {},
        "backends that run here": {
            op: ", ".join(kind for kind, problem in kinds.items() if not problem)
            for op, kinds in found["ops"].items()
        },
        "backends that do not": {
            kind: problem
            for kinds in found["ops"].values() for kind, problem in kinds.items() if problem
        },
        "environment": found["environment"],
    }
    for name, library in found["libraries"].items():
        sections["native libraries"][name] = _library_line(library)
        sections["native libraries"][f"{name} build"] = library["last_build"]
    lines = []
    for title, rows in sections.items():
        width = max((len(key) for key in rows), default=0)
        lines += [title, *(f"  {key.ljust(width)}  {value}" for key, value in rows.items())]
        lines += [] if rows else ["  none"]
    return "\n".join(lines)


def main() -> None:
    """Print the report, or with ``--json`` the dict."""
    parser = argparse.ArgumentParser(prog="python -m smis_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    found = info()
    print(json.dumps(found, indent=2) if parser.parse_args().json else report(found))


if __name__ == "__main__":
    main()
