"""Builds the native libraries: ``python -m smis_kernels.build``; setup.py runs the same code.

``_cpu.abi3.so`` from ``csrc/*/cpu.cpp`` (once) and ``csrc/*/cpu_kernel.cpp`` (once per instruction
set), ``_cuda.abi3.so`` from ``csrc/*/cuda.cu`` with nvcc, GPU or not. Both use the LibTorch stable
ABI and hold no Python symbol, so one binary serves every torch >= 2.10 and every Python.

Only the standard library is imported and torch is found without importing it: under pip's build
isolation ``import torch`` fails, while its headers are there.

Environment: ``SMIS_BUILD`` = none | cpu | cuda | all, ``CXX``, ``CUDACXX``, ``CUDA_HOME``,
``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

COMMAND = "python -m smis_kernels.build"
RECORD = "_build_record.json"
LIBRARIES = ("cpu", "cuda")
SELECTION = "SMIS_BUILD"
MINIMUM_TORCH = (2, 10)
ARCHITECTURES = ("8.0", "9.0", "10.0")
COMMON = ("-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")
HOST = ("-fPIC", "-fvisibility=hidden")
KERNEL = ("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = AVX2
    INSTRUCTION_SETS["avx512"] = (
        *AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mprefer-vector-width=512",
    )

Record = dict[str, dict[str, str]]


class NotBuilt(Exception):
    """Why a library is not built and what changes that; ``output`` is the compiler's, if any."""

    def __init__(self, reason: str, cure: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason, self.cure, self.output = reason, cure, output


@dataclass(frozen=True)
class Torch:
    """An installed torch, read from its files."""

    root: Path
    version: str

    @property
    def includes(self) -> tuple[str, ...]:
        include = self.root / "include"
        return (f"-I{include}", f"-I{include / 'torch/csrc/api/include'}")


@dataclass(frozen=True)
class Unit:
    """One object file; ``log`` is what the compiler said, kept beside the object."""

    name: str
    source: Path
    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    includes: tuple[str, ...]
    stamp: str

    def object(self, directory: Path) -> Path:
        """The object's path: its name carries a hash of all that goes into it."""
        common = self.source.parent.parent / "common"
        headers = [p for d in (common, self.source.parent) for p in sorted(d.glob("*.*h"))]
        digest = hashlib.sha256("\0".join((self.stamp, *self.flags)).encode())
        for path in (self.source, *headers):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return directory / f"{self.name}.{digest.hexdigest()[:16]}.o"

    def log(self, directory: Path) -> str:
        return self.object(directory).with_suffix(".log").read_text()


@dataclass(frozen=True)
class Plan:
    """How to make one library: its objects, the command that links them, facts for the record."""

    name: str
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    libraries: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)


def find_torch() -> Torch | None:
    """The torch of the target environment, even where it cannot be imported."""
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and "system-site-packages = true" in config.read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        roots += [sysconfig.get_path("purelib", vars=base), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    for root in (*roots, *sys.path):
        torch = read_torch(Path(root) / "torch")
        if torch is not None:
            return torch
    return None


def read_torch(root: Path) -> Torch | None:
    """The torch whose package directory is ``root``, or None."""
    version = root / "version.py"
    if not (version.exists() and (root / "include").is_dir()):
        return None
    match = re.search(r"__version__ = '([^']+)'", version.read_text())
    return Torch(root, match.group(1)) if match else None


def _checked_torch(torch: Torch | None) -> Torch:
    if not sys.platform.startswith("linux"):
        raise NotBuilt("the native libraries are made for Linux", "run on Linux")
    if torch is None:
        raise NotBuilt(
            "torch is not installed in this environment", f"pip install torch && {COMMAND}"
        )
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.version)[:2])
    if numbers < MINIMUM_TORCH:
        raise NotBuilt(
            f"torch {torch.version} is older than 2.10", f"pip install -U torch && {COMMAND}"
        )
    return torch


def _first_line(command: tuple[str, ...], pattern: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    match = re.search(pattern, done.stdout)
    if done.returncode or not match:
        said = (done.stderr.strip().splitlines() or ["nothing"])[0]
        raise NotBuilt(f"{shlex.join(command)} does not run: {said}", f"repair it, then {COMMAND}")
    return match.group(0)


def find_cxx() -> tuple[str, ...]:
    """The C++ compiler: ``$CXX``, else g++, clang++ or c++."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name in [wanted[0]] if wanted else ["g++", "clang++", "c++"]:
        path = shutil.which(name)
        if path:
            return (path, *wanted[1:])
    reason = f"CXX={wanted[0]} is not found" if wanted else "no C++ compiler (g++ or clang++)"
    raise NotBuilt(reason, f"install g++ (Debian: apt-get install g++), then {COMMAND}")


def find_nvcc() -> str:
    """nvcc: ``$CUDACXX``, ``$CUDA_HOME/bin``, ``PATH``, ``/usr/local/cuda/bin``."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wanted = os.environ.get("CUDACXX") or (str(Path(home, "bin", "nvcc")) if home else "")
    for name in (wanted,) if wanted else ("nvcc", "/usr/local/cuda/bin/nvcc"):
        path = shutil.which(name)
        if path:
            return path
    raise NotBuilt(
        f"{wanted} is not found" if wanted else "no CUDA compiler (nvcc)",
        f"install the CUDA toolkit or set CUDA_HOME, then {COMMAND}",
    )


def architectures(nvcc: str) -> tuple[str, ...]:
    """``TORCH_CUDA_ARCH_LIST``, else the default ones this nvcc knows, with PTX for the last."""
    wanted = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    for arch in filter(None, wanted):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise NotBuilt(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, got {arch!r}",
                f"TORCH_CUDA_ARCH_LIST='8.0;9.0' {COMMAND}",
            )
    if wanted != [""]:
        return tuple(wanted)
    known = subprocess.run((nvcc, "--list-gpu-code"), capture_output=True, text=True).stdout
    default = [a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in known.split()]
    return (*default[:-1], *(f"{a}+PTX" for a in default[-1:]))


def _gencode(arch: str) -> Iterator[str]:
    number, _, ptx = arch.partition("+")
    number = number.replace(".", "")
    for code in (f"sm_{number}", f"compute_{number}") if ptx else (f"sm_{number}",):
        yield f"-gencode=arch=compute_{number},code={code}"


def _sources(source_dir: Path, name: str) -> list[Path]:
    found = sorted(source_dir.glob(f"*/{name}"))
    if not found:
        raise NotBuilt(f"no sources {source_dir.name}/*/{name}", "reinstall the package")
    return found


def plan_cpu(source_dir: Path, torch: Torch | None) -> Plan:
    """The CPU library: bindings once, kernels once per instruction set."""
    torch, cxx = _checked_torch(torch), find_cxx()
    version = _first_line((*cxx, "--version"), ".+")
    stamp = f"{version} torch {torch.version}"
    include = f"-I{source_dir}"
    units = [
        Unit(f"cpu-{s.parent.name}", s, cxx, (*COMMON, *HOST), (include, *torch.includes), stamp)
        for s in _sources(source_dir, "cpu.cpp")
    ]
    # In this order: a weak symbol that several objects define is taken from the first, which must
    # not hold instructions that the machine may lack.
    for isa, machine in INSTRUCTION_SETS.items():
        flags = (*COMMON, *HOST, *KERNEL, *machine, f"-DSMIS_ISA={isa}")
        units += [
            Unit(f"cpu-{s.parent.name}-{isa}", s, cxx, flags, (include,), stamp)
            for s in sorted(source_dir.glob("*/cpu_kernel.cpp"))
        ]
    lib = torch.root / "lib"
    libraries = ("-Wl,-z,defs", f"-L{lib}", f"-Wl,-rpath-link,{lib}",
                 "-Wl,--as-needed", "-ltorch_cpu", "-lc10")
    facts = {"compiler": version, "torch": torch.version, "isa": " ".join(INSTRUCTION_SETS)}
    return Plan("cpu", tuple(units), (*cxx, "-shared"), libraries, facts)


def plan_cuda(source_dir: Path, torch: Torch | None) -> Plan:
    """The CUDA library; neither a GPU nor a CUDA build of torch is needed to compile it."""
    torch, nvcc, cxx = _checked_torch(torch), find_nvcc(), find_cxx()
    version = _first_line((nvcc, "--version"), r"release [^\n]+")
    archs = architectures(nvcc)
    compiler = (nvcc, "-ccbin", cxx[0])
    flags = (*COMMON, "-DUSE_CUDA", f"-Xcompiler={','.join(HOST)}", "-Xptxas=-v",
             *(g for a in archs for g in _gencode(a)))
    includes = (f"-I{source_dir}", *torch.includes)
    units = tuple(
        Unit(f"cuda-{s.parent.name}", s, compiler, flags, includes,
             f"nvcc {version} torch {torch.version}")
        for s in _sources(source_dir, "cuda.cu")
    )
    libraries = (f"-L{torch.root / 'lib'}", "-Xlinker=--no-as-needed",
                 "-ltorch_cuda", "-ltorch_cpu", "-lc10")
    facts = {"compiler": f"nvcc {version}", "torch": torch.version,
             "architectures": " ".join(archs)}
    return Plan("cuda", units, (*compiler, "-shared", "-cudart=static"), libraries, facts)


PLANS: dict[str, Callable[[Path, Torch | None], Plan]] = {"cpu": plan_cpu, "cuda": plan_cuda}


def _run(command: tuple[str, ...]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    output = done.stdout + done.stderr
    if done.returncode:
        lines = output.splitlines()
        first = next((line for line in lines if "error" in line.lower()), (lines or ["failed"])[0])
        raise NotBuilt(first.strip(), f"{COMMAND} shows the whole message", output)
    return output


def _compile(unit: Unit, directory: Path, say: Callable[[str], None]) -> Path:
    target = unit.object(directory)
    if target.exists():
        return target
    start = time.perf_counter()
    partial = target.with_suffix(".partial.o")
    log = _run((*unit.compiler, *unit.flags, *unit.includes,
                "-c", str(unit.source), "-o", str(partial)))
    target.with_suffix(".log").write_text(log)
    os.replace(partial, target)
    say(f"  {unit.name}  {time.perf_counter() - start:.1f} s")
    return target


def compile_units(units: tuple[Unit, ...], directory: Path, pool: ThreadPoolExecutor,
                  say: Callable[[str], None] = print) -> list[Future[Path]]:
    """Start the compilations that ``directory`` does not hold yet."""
    return [pool.submit(_compile, unit, directory, say) for unit in units]


def _link(plan: Plan, objects: list[Path], package_dir: Path) -> None:
    """Link beside the target and rename, so that no half-written library is ever seen."""
    with tempfile.TemporaryDirectory(dir=package_dir, prefix=".build-") as folder:
        output = Path(folder, "library.so")
        search: tuple[str, ...] = ()
        if plan.name == "cuda":
            # A CPU-only torch has no libtorch_cuda; the loader needs no more than its name.
            stub = Path(folder, "libtorch_cuda.so")
            _run((*plan.link[:3], "-shared", "-Xlinker=-soname=libtorch_cuda.so", "-x", "c++",
                  os.devnull, "-o", str(stub)))
            search = (f"-L{folder}",)
        _run((*plan.link, *map(str, objects), *search, *plan.libraries, "-o", str(output)))
        os.replace(output, package_dir / f"_{plan.name}.abi3.so")


@contextmanager
def object_directory(cache: Path | None) -> Iterator[Path]:
    """Where objects go: ``cache``, one build at a time, or a folder that disappears."""
    if cache is None or sys.platform == "win32":
        with tempfile.TemporaryDirectory(prefix="smis-build-") as folder:
            yield Path(folder)
        return
    import fcntl  # not on Windows, where an install must succeed too

    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _selection() -> tuple[str, ...]:
    choice = os.environ.get(SELECTION, "all")
    if choice not in ("none", "all", *LIBRARIES):
        raise SystemExit(f"{SELECTION}: expected none, cpu, cuda or all; got {choice!r}")
    return {"none": (), "all": LIBRARIES}.get(choice, (choice,))


def jobs() -> int:
    """Compilers at a time: ``MAX_JOBS``, else one per processor."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def build(package_dir: Path, source_dir: Path, torch: Torch | None, *, cache: Path | None = None,
          say: Callable[[str], None] = print) -> Record:
    """Build what this machine can into ``package_dir`` and record what was built, or why not.

    Args:
        package_dir: receives ``_cpu.abi3.so``, ``_cuda.abi3.so`` and ``_build_record.json``.
        source_dir: the folder ``csrc``.
        torch: from :func:`find_torch`; None when there is none.
        cache: folder that keeps objects between builds.
        say: receives each line of the report.

    Returns:
        {"cpu": {...}, "cuda": {...}}, all strings: ``state`` ("built" or "not built"), ``reason``,
        ``cure``, ``output`` of a failed compiler; of a built library ``compiler``, ``torch``,
        ``isa`` or ``architectures``, ``seconds``. A failure keeps the library of an earlier build.

    Example:
        >>> record = build(Path("smis_kernels"), Path("csrc"), find_torch())
    """
    start = time.perf_counter()
    path = package_dir / RECORD
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    running: list[tuple[Plan, list[Future[Path]]]] = []
    selected = _selection()
    say(f"building {', '.join(selected) or 'nothing'} "
        f"with torch {torch.version if torch else 'absent'}")
    with object_directory(cache) as objects, ThreadPoolExecutor(jobs()) as pool:
        for name in LIBRARIES:
            if name not in selected:
                if not (package_dir / f"_{name}.abi3.so").exists():
                    record[name] = _not_built(NotBuilt(
                        f"{SELECTION}={os.environ.get(SELECTION)} left it out", COMMAND))
                continue
            try:
                plan = PLANS[name](source_dir, torch)
                running.append((plan, compile_units(plan.units, objects, pool, say)))
            except NotBuilt as problem:
                record[name] = _not_built(problem)
        for plan, compiled in running:
            try:
                _link(plan, [future.result() for future in compiled], package_dir)
                seconds = f"{time.perf_counter() - start:.1f}"
                record[plan.name] = {"state": "built", "reason": "", "cure": "",
                                     **plan.facts, "seconds": seconds}
                _forget(objects, plan)
            except NotBuilt as problem:
                record[plan.name] = _not_built(problem)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
    for name in LIBRARIES:
        say(f"{name}: {summary(record[name])}" if name in record else f"{name}: kept")
    return record


def _not_built(problem: NotBuilt) -> dict[str, str]:
    return {"state": "not built", "reason": problem.reason, "cure": problem.cure,
            "output": problem.output}


def _forget(objects: Path, plan: Plan) -> None:
    keep = {unit.object(objects).stem for unit in plan.units}
    for path in objects.glob(f"{plan.name}-*"):
        if path.stem not in keep:
            path.unlink()


def summary(entry: dict[str, str]) -> str:
    """One line for a library: built with what, or why not and the cure."""
    if entry["state"] == "built":
        target = entry.get("isa") or entry.get("architectures", "")
        return (f"built for {target} with {entry['compiler']}, torch {entry['torch']}, "
                f"{entry['seconds']} s")
    return f"not built: {entry['reason']}; cure: {entry['cure']}"


def locate() -> tuple[Path, Path, Path | None]:
    """(package, csrc, object cache): csrc lies beside the package in a checkout, else inside it."""
    package = Path(__file__).resolve().parent
    root = package.parent
    if (root / "csrc").is_dir() and (root / "setup.py").exists():
        return package, root / "csrc", root / "build" / "native"
    return package, package / "csrc", None


def _enlist(package: Path) -> None:
    """Name the libraries in pip's list of installed files, so that uninstalling removes them."""
    for installed in package.parent.glob("smis_kernels-*.dist-info/RECORD"):
        listed = installed.read_text()
        for library in sorted(package.glob("_*.abi3.so")):
            line = f"{package.name}/{library.name},"
            if line not in listed:
                listed += f"{line},\n"
        installed.write_text(listed)


def main() -> int:
    """Build into the package that this file lies in; 1 when a library asked for did not build."""
    package, source, cache = locate()
    try:
        record = build(package, source, find_torch(), cache=cache)
        _enlist(package)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    entries = [record[name] for name in _selection()]
    for entry in entries:
        print(entry.get("output", ""), file=sys.stderr, end="")
    named = os.environ.get(SELECTION) in LIBRARIES
    failed = [e for e in entries if e["state"] != "built" and (named or e["output"])]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
