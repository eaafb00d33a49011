"""Registers, shared memory, stack and spills of every GPU kernel, without a GPU.

``python -m tools.kernel_report [cuda] [triton]``. CUDA kernels are compiled as the build compiles
them (and taken from its cache); Triton's for sm_80, sm_90 and sm_100 by making the calls of
``COMPILE_CASES`` of ``smis_kernels/ops/<op>/triton.py`` on meta tensors, so that each kernel is
specialised as in a call. Both are read from ``ptxas -v``; of Triton's PTX are shown the bytes of
the accesses to global memory with their number, barriers, and the products of tensor cores; for
sm_90 the cycles that their loop takes to issue, by the cycles of its products (read from SASS). A
spill is an error unless ``tools/allowed_spills.json`` gives a reason, {"<op>/<kernel>/<arch>":
"why"} with shell wildcards; a product of other operands than the case declares is one always.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from multiprocessing import get_context
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
    loads: str = ""
    stores: str = ""
    barriers: int = 0
    products: tuple[str, ...] = ()
    issue: float = 0.0

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
    assert cache is not None  # this file lies in a checkout
    plan = build.plan_cuda(source, build.find_torch())
    objects = build.make(plan, cache / "cuda").parent
    found = [
        usage for path in sorted(source.glob("*/cuda.cu"))
        for usage in parse_ptxas(path.parent.name,
                                 (objects / f"{path.parent.name}.o.log").read_text())
    ]
    for usage, name in zip(found, _demangled([u.kernel for u in found]), strict=True):
        usage.kernel = name
    return found


def _ptxas() -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # The plain ptxas of triton 3.9 is too old for the PTX that 3.9 writes.
    return str(max(folder.glob("ptxas*"), key=lambda path: len(path.name)))


class _Target:
    """Stands for a GPU's driver, so that calls compile without a GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, Any, tuple[int, ...]]]]:
    """Triton launches compile to PTX for ``arch`` and run nothing: (name, kernel, grid) of each."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    launched: list[tuple[str, Any, tuple[int, ...]]] = []
    run = triton.JITFunction.run

    def compiled(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool,
                 **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launched.append((self.__name__, kernel, grid))
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    assemble = CUDABackend.make_cubin
    triton.JITFunction.run = compiled
    CUDABackend.make_cubin = lambda *_: b""
    driver.set_active(_Target(arch))
    try:
        yield launched
    finally:
        triton.JITFunction.run = run
        CUDABackend.make_cubin = assemble
        driver._active = before


def accesses(ptx: str, word: str) -> str:
    """Bytes of each ``ld`` or ``st`` of global memory and their number: "16:4 2:1"."""
    found: Counter[int] = Counter()
    for vector, bits in re.findall(rf"\b{word}\.global[.:\w]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        found[int(vector or 1) * int(bits) // 8] += 1
    if word == "ld":
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*, [^,]*, (0x[\da-f]+|\d+)", ptx)
        found.update(int(size, 0) for size in copies)
    return " ".join(f"{size}:{count}" for size, count in sorted(found.items(), reverse=True))


def products(ptx: str) -> tuple[str, ...]:
    """Types of the operands of the tensor-core instructions; sm_100 says f16 of both kinds."""
    kinds = r"\b(?:wg)?mma\.(?:mma_async|sync)\S*?\.(?:f32|f64)\.(bf16|f16|tf32|f64)\."
    found = set(re.findall(kinds, ptx))
    found.update(re.findall(r"\btcgen05\.mma\S*?\.kind::(\w+)", ptx))
    return tuple(sorted(found))


def issue_share(sass: str) -> float:
    """Cycles to issue the innermost loop with products, by the cycles of its products; else 0.

    Of sm_90: a processor issues one instruction of a warp a cycle on each of its four parts, which
    multiply 512 16-bit, 256 TF32 or 32 float64 pairs meanwhile.
    """
    code = [(int(at, 16), text) for at, text in
            re.findall(r"/\*([\da-f]{4,})\*/\s+([^;]*?)\s*;", sass)]
    shares: list[tuple[int, float]] = []
    for last, text in code:
        jump = re.search(r"\bBRA\b.*?\b0x([\da-f]+)", text)
        if jump is None or int(jump.group(1), 16) > last:
            continue
        body = [text for at, text in code if int(jump.group(1), 16) <= at <= last]
        cycles = 0.0
        for kind, *sizes, rest in re.findall(
                r"\b([HD])G?MMA\.(\d+)x(\d+)x(\d+)(\S*)", "\n".join(body)):
            pairs = math.prod(map(int, sizes)) / (4 if kind == "H" else 1)  # of a warp
            cycles += pairs / (32 if kind == "D" else 256 if "TF32" in rest else 512)
        if cycles:
            shares.append((len(body), len(body) / cycles))
    return min(shares)[1] if shares else 0.0


def _triton_cases(op: str) -> list[Any]:
    return list(importlib.import_module(f"smis_kernels.ops.{op}.triton").COMPILE_CASES)


@cache  # what several cases call is assembled once
def assembled(ptx: str, folder: str) -> tuple[str, Path]:
    """What ptxas says of a kernel, and the file of its machine code in the folder."""
    code = Path(folder, f"{hashlib.sha256(ptx.encode()).hexdigest()}.cubin")
    code.with_suffix(".ptx").write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    said = subprocess.run(
        (_ptxas(), "-v", f"--gpu-name={target.group(1)}", str(code.with_suffix(".ptx")),
         "-o", str(code)), capture_output=True, text=True, check=True).stderr
    return said, code


def disassembled(code: Path) -> str:
    """The machine code as text (SASS)."""
    return subprocess.run((str(Path(_ptxas()).with_name("cuobjdump")), "-sass", str(code)),
                          capture_output=True, text=True, check=True).stdout


def triton_usage() -> list[Usage]:
    """The kernels of every COMPILE_CASE for each of TRITON_ARCHITECTURES, a process an op.

    Raises:
        ValueError: a kernel multiplies other operands than its case declares, or none.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET: expected unset, since interpreted kernels do not compile")
    paths = sorted(Path(build.__file__).parent.glob("ops/*/triton.py"))
    with ProcessPoolExecutor(build.jobs(), mp_context=get_context("spawn")) as pool:
        return list(chain.from_iterable(pool.map(_usage_of, [p.parent.name for p in paths])))


def _usage_of(op: str) -> list[Usage]:
    found: dict[tuple[str, str], Usage] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for case in _triton_cases(op):
            for arch in TRITON_ARCHITECTURES:
                with compiling(arch) as launched:
                    case.call()
                check_products(f"{op}/{case.name}/sm_{arch}", case.product,
                               [kernel.asm["ptx"] for _, kernel, _ in launched])
                for name, kernel, _ in launched:
                    ptx = kernel.asm["ptx"]
                    name = f"{name.removesuffix('_kernel')} {case.name}"
                    if (name, f"sm_{arch}") in found:
                        continue
                    said, code = assembled(ptx, folder)
                    (usage,) = parse_ptxas(op, said)
                    usage.kernel, usage.arch = name, f"sm_{arch}"
                    # Triton's shared memory is dynamic, which ptxas does not see.
                    usage.shared = kernel.metadata.shared
                    usage.loads, usage.stores = accesses(ptx, "ld"), accesses(ptx, "st")
                    usage.barriers = len(re.findall(r"\bbar(?:rier)?\.sync", ptx))
                    usage.products = products(ptx)
                    if arch == 90 and usage.products:
                        usage.issue = issue_share(disassembled(code))
                    found[name, usage.arch] = usage
    return list(found.values())


def check_products(case: str, declared: str, kernels: list[str]) -> None:
    """Refuse PTX of a case whose tensor-core operands are not of the declared type."""
    # sm_100 writes one kind for both, and has no instruction for float64 there
    alike = {"bf16": {"bf16", "f16"}}.get(declared, {declared}) if "sm_100" in case else {declared}
    met = {kind for ptx in kernels for kind in products(ptx)}
    if not met <= alike or bool(met) != bool(declared):
        raise ValueError(f"{case}: expected products of {declared or 'nothing'}, "
                         f"got {', '.join(sorted(met)) or 'none'}")


def table(found: list[Usage]) -> str:
    """One row a kernel and architecture."""
    head = ("kernel", "arch", "registers", "shared", "stack", "spills", "barriers", "loads",
            "stores", "products", "issue")
    rows = [head] + [
        (f"{u.op}/{u.kernel}", u.arch,
         *map(str, (u.registers, u.shared, u.stack, u.spills, u.barriers)), u.loads, u.stores,
         " ".join(u.products), f"{u.issue:.2f}" if u.issue else "")
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
