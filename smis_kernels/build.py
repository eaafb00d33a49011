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

import importlib.util
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMMAND = "python -m smis_kernels.build"
RECORD = "_build_record.json"
LIBRARIES = ("cpu", "cuda")
SELECTION = "SMIS_BUILD"
MINIMUM_TORCH = (2, 10)
# What its compiler takes longest for by far: it is started first.
SLOWEST = "spatially_varying_conv.o"
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
# What a compiler says is kept beside its object: ptxas lists registers and spills there. The
# versions stand in the command, so that another compiler or another torch compiles anew.
RULES = """\
rule compile
  command = $compiler -MMD -MF $out.d -c $in -o $out >$out.log 2>&1 || {{ cat $out.log; exit 1; }} \
# {versions}
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $linker -o $out.partial && mv -f $out.partial $out
  description = $out
"""

Record = dict[str, dict[str, str]]


class NotBuilt(Exception):
    """Why a library is not built and what changes that; ``output`` is the compiler's, if any."""

    def __init__(self, reason: str, cure: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason, self.cure, self.output = reason, cure, output


@dataclass(frozen=True)
class Torch:
    """An installed torch, read from its files; ``cuda`` is the version it was built for, if any."""

    root: Path
    version: str
    cuda: str = ""

    @property
    def includes(self) -> tuple[str, ...]:
        include = self.root / "include"
        return (f"-I{include}", f"-I{include / 'torch/csrc/api/include'}")


@dataclass(frozen=True)
class LibraryBuild:
    """How to make one library: the text of build.ninja, and facts for the record."""

    library: str
    ninja: str
    facts: dict[str, str]


def find_torch() -> Torch | None:
    """The torch of the target environment, even where it cannot be imported."""
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and "system-site-packages = true" in config.read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        roots += [sysconfig.get_path("purelib", vars=base), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    found = (read_torch(Path(root) / "torch") for root in (*roots, *sys.path))
    return next(filter(None, found), None)


def read_torch(root: Path) -> Torch | None:
    """The torch whose package directory is ``root``, or None."""
    version = root / "version.py"
    if not (version.exists() and (root / "include").is_dir()):
        return None
    found = dict(re.findall(r"^(__version__|cuda)\b.*= '([^']+)'", version.read_text(), re.M))
    return Torch(root, found["__version__"], found.get("cuda", "")) if found else None


def _checked_torch(torch: Torch | None) -> Torch:
    if not sys.platform.startswith("linux"):
        raise NotBuilt("the native libraries are made for Linux", "run on Linux")
    if torch is None:
        reason = "torch is not installed in this environment"
        raise NotBuilt(reason, f"pip install torch && {COMMAND}")
    if tuple(int(n) for n in re.findall(r"\d+", torch.version)[:2]) < MINIMUM_TORCH:
        reason = f"torch {torch.version} is older than 2.10"
        raise NotBuilt(reason, f"pip install -U torch && {COMMAND}")
    return torch


def _find(wanted: str, names: tuple[str, ...], missing: str, cure: str) -> str:
    for name in (wanted,) if wanted else names:
        if path := shutil.which(name):
            return path
    raise NotBuilt(f"{wanted} is not found" if wanted else missing, f"{cure}, then {COMMAND}")


def find_cxx() -> tuple[str, ...]:
    """The C++ compiler: ``$CXX``, else g++, clang++ or c++."""
    wanted, *options = shlex.split(os.environ.get("CXX", "")) or [""]
    names = ("g++", "clang++", "c++")
    cure = "install g++ (Debian: apt-get install g++)"
    return (_find(wanted, names, "no C++ compiler (g++ or clang++)", cure), *options)


def find_nvcc() -> str:
    """nvcc: ``$CUDACXX``, ``$CUDA_HOME/bin``, ``PATH``, ``/usr/local/cuda/bin``."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wanted = os.environ.get("CUDACXX") or (str(Path(home, "bin", "nvcc")) if home else "")
    return _find(wanted, ("nvcc", "/usr/local/cuda/bin/nvcc"), "no CUDA compiler (nvcc)",
                 "install the CUDA toolkit or set CUDA_HOME")


def _ninja() -> tuple[str, ...]:
    if importlib.util.find_spec("ninja"):
        return (sys.executable, "-m", "ninja")
    return (_find("", ("ninja",), "no ninja", "pip install ninja"),)


def _version(command: tuple[str, ...], pattern: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    match = re.search(pattern, done.stdout)
    if done.returncode or not match:
        said = (done.stderr.strip().splitlines() or ["nothing"])[0]
        raise NotBuilt(f"{shlex.join(command)} does not run: {said}", f"repair it, then {COMMAND}")
    return match.group(0)


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


def gencode(arch: str) -> list[str]:
    """nvcc's options for one word of ``TORCH_CUDA_ARCH_LIST``."""
    number, _, ptx = arch.replace(".", "").partition("+")
    codes = (f"sm_{number}", f"compute_{number}") if ptx else (f"sm_{number}",)
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def other_cuda(built: str, torch: str) -> tuple[str, str] | None:
    """Reason and cure where what nvcc of CUDA ``built`` makes cannot serve a torch of ``torch``."""
    major = torch.partition(".")[0]
    if not (built and torch) or built.partition(".")[0] == major:
        return None
    return (f"nvcc is of CUDA {built} and torch of CUDA {torch}: their major versions must agree",
            f"set CUDA_HOME to a CUDA {major} toolkit, then {COMMAND}")


def _sources(source_dir: Path, name: str) -> list[Path]:
    found = sorted(source_dir.glob(f"*/{name}"))
    if not found:
        raise NotBuilt(f"no sources {source_dir.name}/*/{name}", "reinstall the package")
    return found


def _text(command: tuple[str, ...]) -> str:
    return shlex.join(command).replace("$", "$$")


def _plan(name: str, units: dict[str, tuple[Path, tuple[str, ...]]], link: tuple[str, ...],
          libraries: tuple[str, ...], facts: dict[str, str], stub: str = "") -> LibraryBuild:
    versions = f"{facts['compiler']}, torch {facts['torch']}"
    lines = [RULES.format(versions=versions.replace("$", "$$"))]
    # The largest first: ninja starts them in this order, and none is left alone at the end.
    for target, (source, compiler) in sorted(
            units.items(), key=lambda u: (u[0] != SLOWEST, -u[1][0].stat().st_size)):
        path = re.sub(r"([$ :])", r"$\1", str(source))
        lines += [f"build {target}: compile {path}", f"  compiler = {_text(compiler)}"]
    if stub:
        # A CPU-only torch has no libtorch_cuda; the loader needs no more than its name.
        empty = ("-x", "c++", os.devnull, f"-Xlinker=-soname={stub}")
        lines += [f"build {stub}: link", f"  linker = {_text((*link, *empty))}"]
    library = f"_{name}.abi3.so"
    lines += [f"build {library}: link {' '.join(units)} | {stub}".rstrip(" |"),
              f"  linker = {_text((*link, *units, *libraries))}"]
    return LibraryBuild(library, "\n".join(lines) + "\n", facts)


def plan_cpu(source_dir: Path, torch: Torch | None) -> LibraryBuild:
    """The CPU library: bindings once, kernels once per instruction set."""
    torch, cxx = _checked_torch(torch), find_cxx()
    host = (*cxx, *COMMON, *HOST, f"-I{source_dir}")
    units = {f"{s.parent.name}.o": (s, (*host, *torch.includes))
             for s in _sources(source_dir, "cpu.cpp")}
    # In this order: a weak symbol that several objects define is taken from the first, which must
    # not hold instructions that the machine may lack.
    for isa, machine in INSTRUCTION_SETS.items():
        for s in sorted(source_dir.glob("*/cpu_kernel.cpp")):
            flags = (*KERNEL, *machine, f"-DSMIS_ISA={isa}")
            units[f"{s.parent.name}-{isa}.o"] = (s, (*host, *flags))
    lib = torch.root / "lib"
    libraries = ("-Wl,-z,defs", f"-L{lib}", f"-Wl,-rpath-link,{lib}",
                 "-Wl,--as-needed", "-ltorch_cpu", "-lc10")
    facts = {"compiler": _version((*cxx, "--version"), ".+"), "torch": torch.version,
             "isa": " ".join(INSTRUCTION_SETS)}
    return _plan("cpu", units, (*cxx, "-shared"), libraries, facts)


def plan_cuda(source_dir: Path, torch: Torch | None) -> LibraryBuild:
    """The CUDA library; neither a GPU nor a CUDA build of torch is needed to compile it."""
    torch, nvcc, cxx = _checked_torch(torch), find_nvcc(), find_cxx()
    version = _version((nvcc, "--version"), r"release [^\n]+")
    cuda = version.split()[1].rstrip(",")
    if problem := other_cuda(cuda, torch.cuda):
        raise NotBuilt(*problem)
    archs = architectures(nvcc)
    compiler = (nvcc, "-ccbin", cxx[0])
    flags = (*COMMON, "-DUSE_CUDA", f"-Xcompiler={','.join(HOST)}", "-Xptxas=-v",
             *(option for arch in archs for option in gencode(arch)))
    units = {f"{s.parent.name}.o": (s, (*compiler, *flags, f"-I{source_dir}", *torch.includes))
             for s in _sources(source_dir, "cuda.cu")}
    libraries = ("-L.", f"-L{torch.root / 'lib'}", "-Xlinker=--no-as-needed",
                 "-ltorch_cuda", "-ltorch_cpu", "-lc10")
    facts = {"compiler": f"nvcc {version}", "torch": torch.version, "cuda": cuda,
             "architectures": " ".join(archs)}
    return _plan("cuda", units, (*compiler, "-shared", "-cudart=static"), libraries, facts,
                 stub="libtorch_cuda.so")


PLANS: dict[str, Callable[[Path, Torch | None], LibraryBuild]] = {
    "cpu": plan_cpu, "cuda": plan_cuda}


def make(plan: LibraryBuild, directory: Path, *targets: str,
         say: Callable[[str], None] = print) -> Path:
    """Bring ``targets`` (default: the library) up to date in ``directory``; the library's path."""
    import fcntl  # not on Windows, for which there is no plan

    ninja = _ninja()
    directory.mkdir(parents=True, exist_ok=True)
    output = []
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "build.ninja").write_text(plan.ninja)
        command = (*ninja, "-j", str(jobs()), *(targets or (plan.library,)))
        with subprocess.Popen(command, cwd=directory, text=True, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
            for line in running.stdout or ():
                if line.startswith("["):
                    say(f"  {line.rstrip()}")
                else:
                    output.append(line)
    if running.returncode:
        text = "".join(output)
        first = re.search(r"^.*(\berror\s*:|undefined reference).*$", text, re.M | re.I)
        reason = first.group(0) if first else output[-1]
        raise NotBuilt(reason.strip(), f"{COMMAND} shows the whole message", text)
    return directory / plan.library


def _selection() -> tuple[str, ...]:
    choice = os.environ.get(SELECTION, "all")
    if choice not in ("none", "all", *LIBRARIES):
        raise SystemExit(f"{SELECTION}: expected none, cpu, cuda or all; got {choice!r}")
    return {"none": (), "all": LIBRARIES}.get(choice, (choice,))


def jobs() -> int:
    """Compilers at a time: ``MAX_JOBS``, else one per processor."""
    given = os.environ.get("MAX_JOBS")
    if given and not (given.isdecimal() and int(given)):
        raise SystemExit(f"MAX_JOBS: expected a number of at least 1, got {given!r}")
    return int(given or os.cpu_count() or 1)


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
        ``isa`` or ``cuda`` and ``architectures``, ``seconds``. A failure keeps the library of an
        earlier build.

    Example:
        >>> record = build(Path("smis_kernels"), Path("csrc"), find_torch())  # doctest: +SKIP
    """
    path = package_dir / RECORD
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    selected = _selection()
    say(f"building {', '.join(selected) or 'nothing'} "
        f"with torch {torch.version if torch else 'absent'}")
    with tempfile.TemporaryDirectory(prefix="smis-build-") as folder:
        for name in LIBRARIES:
            start, library = time.perf_counter(), package_dir / f"_{name}.abi3.so"
            try:
                if name in selected:
                    plan = PLANS[name](source_dir, torch)
                    _replace(library, make(plan, (cache or Path(folder)) / name, say=say))
                    record[name] = {"state": "built", "reason": "", "cure": "", **plan.facts,
                                    "seconds": f"{time.perf_counter() - start:.1f}"}
                elif not library.exists():
                    choice = os.environ.get(SELECTION)
                    raise NotBuilt(f"{SELECTION}={choice} left it out", COMMAND)
            except NotBuilt as problem:
                record[name] = {"state": "not built", "reason": problem.reason,
                                "cure": problem.cure, "output": problem.output}
        partial = Path(folder, RECORD)
        partial.write_text(json.dumps(record, indent=1) + "\n")
        _replace(path, partial)
    for name in LIBRARIES:
        say(f"{name}: {summary(record[name])}" if name in record else f"{name}: kept")
    return record


def _replace(target: Path, made: Path) -> None:
    """Copy beside the target and rename, so that no half-written file is ever seen."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        os.replace(shutil.copy(made, folder), target)


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


def acts_on(package: Path, module: str) -> str:
    """Which copy of the package ``python -m smis_kernels.<module>`` is about, in one line."""
    for place in sys.path:
        other = Path(place).resolve() / package.name
        if other != package and (other / "__init__.py").exists():
            return (f"{package}, not the installed {other}; for that one: "
                    f"python -I -m smis_kernels.{module}")
    return str(package)


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
    print(f"package: {acts_on(package, 'build')}")
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
