"""Part ``build``: the native libraries, compiled for this machine's GPU and loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from .journal import Journal, Row, Skip
from .settings import ROOT, Settings


def build(journal: Journal, settings: Settings) -> Row:
    """``python -m smis_kernels.build`` for the architectures of the GPUs in this machine."""
    if settings.dry_run:
        raise Skip("dry run: the libraries that are built are used as they are")
    machine = (json.loads(settings.journal("device").read_text())["rows"] or [{}])[0]
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
    from smis_kernels.runtime import native

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
    import importlib

    import torch

    from smis_kernels.runtime import native as _native
    from smis_kernels.runtime.library import NAMESPACE, raw_ops

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    counts = {key: sum(has(f"{NAMESPACE}::{name}", key) for name in raw_ops)
              for key in ("CPU", "CUDA")}
    missing = []
    for path in sorted(Path(_native.__file__).parent.parent.glob("ops/*/op.py")):
        op = importlib.import_module(f"smis_kernels.ops.{path.parent.name}.op")
        if "triton" in op.KINDS:
            importlib.import_module(f"smis_kernels.ops.{path.parent.name}.triton")
        raw = [value for value in vars(op).values() if type(value).__name__ == "RawOp"]
        loaded = [kind for kind in op.KINDS if kind == "triton" or _native.STATUS[kind].loaded]
        needed = sorted({"CPU" if kind == "cpu" else "CUDA" for kind in loaded})
        missing += [f"{r.name} on {key}" for r in raw for key in needed
                    if not has(f"{NAMESPACE}::{r.name}", key)
                    and not has(f"{NAMESPACE}::{r.name}", "CompositeExplicitAutograd")]
    if missing:
        raise RuntimeError(f"no kernel of {', '.join(missing)}")
    return {"kernels": counts}


def run(journal: Journal, settings: Settings) -> None:
    journal.row("compile", lambda: build(journal, settings))
    for name in ("cpu", "cuda"):
        journal.row(f"{name} library", partial(load, name, settings))
    journal.row("kernels", kernels)
