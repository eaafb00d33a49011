"""Part ``checks``: tests/gpu, compute-sanitizer and the goldens, each job a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path

from smis_kernels.runtime.backend import missing

from .machine import find_tool
from .op_cases import CASES
from .results import ROOT, Journal, Lacking, Row, Settings

SHARDS = ("indexed_", "modulation and not indexed", "conditional", "norm_act",
          "window_ or level_", "spatially or class_crops or instance_ or number_")
DTYPES = ("torch.bfloat16", "torch.float32", "torch.float16", "torch.float64")
QUICK = ("norm_act or instance_edges or class_crops or window_embedding or test_paths_agree or "
         "(test_training_step and spade_coco)")  # of ops and networks in a dry run
ACCURACY = "test_as_accurate_as_the_reference"


def shards(dry_run: bool) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments of pytest); Triton compiles on the host, so ops and dtypes run apart."""
    folder = ROOT / "tests" / "gpu"
    files = sorted(path.name for path in folder.glob("test_*.py") if path.name != "test_ops.py")
    if dry_run:  # few processes: most of the time goes into imports
        small = ["test_ops.py", "test_networks.py"]
        yield "ops and networks", [*(f"tests/gpu/{name}" for name in small), "-k", QUICK]
        yield "the others", [f"tests/gpu/{name}" for name in files if name not in small]
        return
    for dtype in DTYPES:
        for op in SHARDS:
            yield (f"{op}, {dtype}",
                   ["tests/gpu/test_ops.py", "-k", f"{ACCURACY} and {dtype} and ({op})"])
    for op in SHARDS:
        yield (f"{op}, formats and repeats",
               ["tests/gpu/test_ops.py", "-k", f"not {ACCURACY} and ({op})"])
    yield from ((name, [f"tests/gpu/{name}"]) for name in files)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if "mark.triton" in path.read_text():
            yield f"Triton tests of {path.name}", [f"tests/{path.name}", "-m", "triton"]


@dataclass(frozen=True)
class Job:
    """One process: its row's name, its command, and what makes a row of its code and output."""

    name: str
    command: tuple[str, ...]
    judge: Callable[[int, str], Row]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, seconds: float) -> Row:
        """The row; failed where the time does not suffice."""
        start = time.monotonic()
        try:
            done = subprocess.run(self.command, cwd=ROOT, env={**os.environ, **self.environment},
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=max(seconds, 1), check=False)
        except subprocess.TimeoutExpired:
            return {"state": "failed", "reason": "not finished in the part's time; --from"}
        print(f"== {' '.join(self.command)}\n{done.stdout[-20000:]}", flush=True)
        taken = round(time.monotonic() - start, 1)
        return {**self.judge(done.returncode, done.stdout), "seconds": taken}


def tests(settings: Settings, folder: Path) -> Iterator[Job]:
    """tests/gpu and the Triton tests, in as many processes as can compile."""
    if find_spec("pytest") is None:
        return
    for i, (name, arguments) in enumerate(shards(settings.dry_run)):
        report = folder / f"{i}.xml"
        yield Job(f"tests: {name}",
                  (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q",
                   f"--junitxml={report}", *arguments), partial(tested, report))


def tested(report: Path, code: int, output: str) -> Row:
    """Counts, failures and the reasons of skipped tests from a JUnit file."""
    if not report.exists():
        lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
        return {"state": "failed", "reason": f"pytest ended with {code}: {lines[-1]}"[:400]}
    passed, failures, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((c for c in case if c.tag in ("failure", "error")), None)
        skip = next((c for c in case if c.tag == "skipped"), None)
        if problem is not None:
            message = (problem.get("message") or "").strip().splitlines() or ["no message"]
            failures.append({"test": case.get("name"), "message": message[0][:300]})
        elif skip is not None:
            skipped[skip.get("message") or "no reason"] += 1
        else:
            passed += 1
    row: Row = {"passed": passed, "failures": failures, "skips": dict(skipped)}
    if any("library is not loaded" in reason for reason in skipped):
        row["again"] = True
    if failures or code not in (0, 5):  # 5: nothing was selected
        worst = f"{failures[0]['test']}: {failures[0]['message']}" if failures else f"code {code}"
        return {**row, "state": "failed", "reason": f"{len(failures)} failed, first {worst}"[:400]}
    return row


SHARED_MEMORY = ("label_windows", "class_crops", "instance_pool")
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")


def small_runs(settings: Settings) -> Iterator[Job]:
    """compute-sanitizer on a small run of every kernel; without it on a dry run."""
    # Without the allocator's pools every tensor has bounds of its own.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = (sys.executable, "-m", "benchmarks.gpu.op_cases")
    if settings.dry_run:
        yield Job("sanitizer: norm_act without the tool", (*run, "norm_act", "cpu"), rehearsed)
        return
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return
    ops = sorted({case.op for case in CASES})
    for which, chosen in (("memcheck", ops), ("racecheck", SHARED_MEMORY)):
        for op in chosen:
            command = (tool, "--tool", which, "--error-exitcode", "99", "--print-limit", "5",
                       "--target-processes", "application-only", *run, op, "cuda")
            native = any(case.kind == "cuda" for case in CASES if case.op == op)
            yield Job(f"sanitizer: {which} {op}", command,
                      partial(sanitized, missing("cuda") if native else None), environment)


def rehearsed(code: int, output: str) -> Row:
    """Of a small run without the tool."""
    if code:
        raise RuntimeError(_last_line(output))
    return {"rehearsed": _last_line(output)}


def _last_line(output: str) -> str:
    lines = [line.strip("= ").strip() for line in output.splitlines() if line.strip("= ").strip()]
    return (lines or ["no output"])[-1][:300]


def sanitized(lacking: str | None, code: int, output: str) -> Row:
    """Errors that compute-sanitizer counted."""
    if lacking is not None:
        raise Lacking(lacking)
    summary = _SUMMARY.search(output)
    if summary is None:
        first = next((line for line in output.splitlines() if "not supported" in line.lower()), "")
        if first:
            raise Lacking(f"compute-sanitizer cannot run here: {first.strip('= ').strip()}")
        raise RuntimeError(f"code {code}: {_last_line(output)}")
    errors = int(summary.group(2))
    if errors or code:
        wrong = next((line.strip("= ").strip() for line in output.splitlines()
                      if line.startswith("=========") and "COMPUTE-SANITIZER" not in line), "")
        raise RuntimeError(f"{errors} errors, code {code}: {wrong or _last_line(output)}")
    return {"errors": 0}


FAMILIES = {"ops": "^ops_", "groupdnet": "^smis_.*small", "spade": "^spade_.*small",
            "ccfpse": "^ccfpse_.*small", "pix2pixhd": "^pix2pixhd_.*small"}


def goldens(settings: Settings) -> Iterator[Job]:
    """The published networks and ops, with the networks on the GPU."""
    if settings.parity is None:
        return
    for name, pattern in FAMILIES.items():
        if name == "ops" or not settings.dry_run:  # the networks' take minutes on a CPU
            command = (sys.executable, str(Path(settings.parity, "check_golden.py")),
                       str(Path(__file__).with_name("parity_builders.py")), "--only", pattern)
            yield Job(f"parity: {name}", command, partial(compared, settings.dry_run),
                      {"SMIS_PARITY": settings.parity, "SMIS_PARITY_DEVICE": settings.device})


def compared(dry_run: bool, code: int, output: str) -> Row:
    """Of a run of check_golden.py."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    passed, failed = (sum(line.endswith(word) for line in lines) for word in (" ok", "FAIL"))
    row: Row = {"passed": passed, "failed": failed, "last": lines[-1]}
    lacking = None if dry_run else missing("cuda")
    if lacking is not None:  # the reference stood in for its kernels
        row |= {"again": True, "note": lacking}
    if code:
        bad = next((line for line in lines if line.endswith("FAIL")), lines[-1])
        return {**row, "state": "failed", "reason": re.sub(r"\s+", " ", bad)[:400]}
    return row


def run(journal: Journal, settings: Settings) -> None:
    """All jobs side by side, of each kind some from the start."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = (tests(settings, Path(folder)), small_runs(settings), goldens(settings))
        jobs = {job.name: job for job in chain.from_iterable(zip_longest(*kinds)) if job}
        _skip(journal, settings)
        waiting = [jobs[name] for name in journal.missing(jobs)]
        workers = 2 if settings.dry_run else max(2, os.cpu_count() or 2)
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(job.run, journal.left() - 3): job for job in waiting}
            for future in as_completed(futures):
                journal.row(futures[future].name, future.result)


def _skip(journal: Journal, settings: Settings) -> None:
    """Rows that say what cannot run at all."""
    def skip(reason: str) -> Row:
        raise Lacking(reason)  # the next call may have it

    if find_spec("pytest") is None:
        journal.row("tests", partial(skip, "pytest is not installed"))
    if settings.parity is None:
        journal.row("parity", partial(skip, "no --parity folder was given"))
    if not settings.dry_run and find_tool("compute-sanitizer") is None:
        journal.row("sanitizer", partial(skip, "compute-sanitizer is not installed"))
