"""Part ``correctness``: tests/gpu, in as many processes as there are processors to compile with."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from .journal import Journal, Row, Skip
from .settings import ROOT, Settings

OPS = ("indexed_modulation", "modulation and not indexed", "conditional", "norm_act", "window_",
       "spatially or class_crops or instance_ or number_")
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
        for op in OPS:
            yield (f"{op}, {dtype}",
                   ["tests/gpu/test_ops.py", "-k", f"{ACCURACY} and {dtype} and ({op})"])
    for op in OPS:
        yield (f"{op}, formats and repeats",
               ["tests/gpu/test_ops.py", "-k", f"not {ACCURACY} and ({op})"])
    yield from ((name, [f"tests/gpu/{name}"]) for name in files)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if "mark.triton" in path.read_text():
            yield f"Triton tests of {path.name}", [f"tests/{path.name}", "-m", "triton"]


def _outcome(report: Path, code: int, output: str) -> Row:
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


def _pytest(arguments: list[str], seconds: float) -> Row:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q",
                   f"--junitxml={report}", *arguments)
        try:
            done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=max(seconds, 1), check=False)
        except subprocess.TimeoutExpired:
            return {"state": "failed", "reason": "not finished in the part's time; --from"}
        print(f"== {' '.join(arguments)}\n{done.stdout}", flush=True)
        seconds = round(time.monotonic() - start, 1)
        return {**_outcome(report, done.returncode, done.stdout), "seconds": seconds}


def run(journal: Journal, settings: Settings) -> None:
    try:
        import pytest  # noqa: F401
    except ImportError:
        raise Skip("pytest is not installed") from None
    wanted = dict(shards(settings.dry_run))
    missing = journal.missing(wanted)
    workers = min(len(missing), max(2, (os.cpu_count() or 2) - 2)) or 1
    with ThreadPoolExecutor(2 if settings.dry_run else workers) as pool:
        futures = {pool.submit(_pytest, wanted[name], journal.left() - 3): name for name in missing}
        for future in as_completed(futures):
            journal.row(futures[future], future.result)
