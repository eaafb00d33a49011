"""Registers, shared memory, stack and spills of every GPU kernel, without a GPU.

``python -m tools.kernel_report [cuda] [triton]``. CUDA kernels are compiled as the build compiles
them (and taken from its cache); each Triton kernel is cross-compiled for sm_80, sm_90 and sm_100
from ``COMPILE_CASES`` of ``smis_kernels/<op>/triton.py``. Both are read from ``ptxas -v``. A spill
is an error unless ``tools/allowed_spills.json`` gives a reason: {"<op>/<kernel>/<arch>": "why"},
with shell wildcards.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smis_kernels import build

ALLOWED = Path(__file__).with_name("allowed_spills.json")
TRITON_ARCHITECTURES = (80, 90, 100)
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Usage:
    """What one kernel takes on one architecture, in registers a thread and bytes."""

    op: str
    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0

    @property
    def key(self) -> str:
        return f"{self.op}/{self.kernel}/{self.arch}"


def parse_ptxas(op: str, log: str) -> list[Usage]:
    """The kernels in the output of ``ptxas -v``; called functions count for their kernel."""
    found: list[Usage] = []
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            found.append(Usage(op, entry.group(1), entry.group(2)))
        elif found and (frame := _FRAME.search(line)):
            stack, stores, loads = map(int, frame.groups())
            found[-1].stack += stack
            found[-1].spills += stores + loads
        elif found and (registers := _REGISTERS.search(line)):
            found[-1].registers = int(registers.group(1))
            shared = _SHARED.search(line)
            found[-1].shared = int(shared.group(1)) if shared else 0
    return found


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    text = subprocess.run(
        (tool, "-p"), input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    noise = r"\(anonymous namespace\)::|smis::|cuda::|^void "
    return [re.sub(noise, "", name) for name in text.splitlines()]


def cuda_usage() -> list[Usage]:
    """Every kernel of csrc/*/cuda.cu for every architecture of the build."""
    _, source, cache = build.locate()
    plan = build.plan_cuda(source, build.find_torch())
    with build.object_directory(cache) as objects, ThreadPoolExecutor(build.jobs()) as pool:
        for compiled in build.compile_units(plan.units, objects, pool):
            compiled.result()
        found = [
            usage for unit in plan.units
            for usage in parse_ptxas(unit.source.parent.name, unit.log(objects))
        ]
    for usage, name in zip(found, _demangled([u.kernel for u in found]), strict=True):
        usage.kernel = name
    return found


def _ptxas() -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # The plain ptxas of triton 3.9 is too old for the PTX that 3.9 writes.
    return str(max(folder.glob("ptxas*"), key=lambda path: len(path.name)))


def _compile_triton(case: tuple[Any, ...], arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, function, arguments, constexprs, warps = case
    signature = {
        name: "constexpr" if name in constexprs else arguments[name].partition(":")[0]
        for name in function.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in constexprs and re.search(r"^\*|:16$", arguments[name])
    }
    source = ASTSource(function, signature, constexprs, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
    )


def _triton_cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for path in sorted(Path(build.__file__).parent.glob("ops/*/triton.py")):
        op = path.parent.name
        for case in importlib.import_module(f"smis_kernels.ops.{op}.triton").COMPILE_CASES:
            yield op, case


def triton_usage() -> list[Usage]:
    """Every COMPILE_CASE of every smis_kernels/*/triton.py for each of TRITON_ARCHITECTURES."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET: expected unset, since interpreted kernels do not compile")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for op, case in _triton_cases():
            for arch in TRITON_ARCHITECTURES:
                kernel = _compile_triton(case, arch)
                ptx = Path(folder, "kernel.ptx")
                ptx.write_text(kernel.asm["ptx"])
                target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
                assert target is not None
                log = subprocess.run(
                    (_ptxas(), "-v", f"--gpu-name={target.group(1)}", str(ptx), "-o", os.devnull),
                    capture_output=True, text=True, check=True,
                ).stderr
                (usage,) = parse_ptxas(op, log)
                usage.kernel, usage.arch = case[0], f"sm_{arch}"
                # Triton's shared memory is dynamic, which ptxas does not see.
                usage.shared = kernel.metadata.shared
                found.append(usage)
    return found


def table(found: list[Usage]) -> str:
    """One row a kernel and architecture."""
    head = ("kernel", "arch", "registers", "shared", "stack", "spills")
    rows = [head] + [
        (f"{u.op}/{u.kernel}", u.arch, *map(str, (u.registers, u.shared, u.stack, u.spills)))
        for u in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def refused(found: list[Usage], allowed: dict[str, str]) -> list[Usage]:
    """The kernels that spill without an entry in ``allowed``."""
    return [
        u for u in found
        if u.spills and not any(fnmatch.fnmatchcase(u.key, pattern) for pattern in allowed)
    ]


def main() -> int:
    """Print the tables; 1 when a kernel spills without a reason or none was found."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_report", description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=["cuda", "triton", []], help="default: both")
    kinds = parser.parse_args().kinds or ["cuda", "triton"]
    usage = {"cuda": cuda_usage, "triton": triton_usage}
    code = 0
    for kind in kinds:
        try:
            found = usage[kind]()
        except build.NotBuilt as problem:
            print(f"{problem.output or problem.reason}\ncure: {problem.cure}", file=sys.stderr)
            return 1
        print(f"{kind}: {len(found)} kernels\n{table(found)}")
        for bad in refused(found, json.loads(ALLOWED.read_text())):
            print(f"{bad.key} spills {bad.spills} bytes: see {ALLOWED.name}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
