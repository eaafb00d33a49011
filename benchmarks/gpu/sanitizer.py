"""Part ``sanitizer``: compute-sanitizer on a small run of every kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

from smis_kernels.runtime.backend import missing

from .cases import CASES
from .device import find_tool
from .journal import Journal, Lacking, Row, Skip
from .settings import ROOT, Settings

OPS = ("label_windows", "class_crops", "instance_pool", "spatially_varying_conv", "instance_edges",
       "modulation", "indexed_modulation", "window_table", "norm_act", "conditional_attention",
       "conditional_conv")
SHARED_MEMORY = ("label_windows", "class_crops", "instance_pool")
AT_A_TIME = 5
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")


def _small_run(op: str, device: str, before: tuple[str, ...], seconds: float) -> tuple[int, str]:
    # Without the allocator's pools every tensor has bounds of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = (*before, sys.executable, "-m", "benchmarks.gpu.sanitized", op, device)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return -1, "not finished in the part's time; --from"
    print(f"== {' '.join(command)}\n{done.stdout[-20000:]}", flush=True)
    return done.returncode, done.stdout


def _last_line(output: str) -> str:
    lines = [line.strip("= ").strip() for line in output.splitlines() if line.strip("= ").strip()]
    return (lines or ["no output"])[-1][:300]


def _judged(code: int, output: str) -> Row:
    summary = _SUMMARY.search(output)
    if summary is None:
        first = next((line for line in output.splitlines() if "not supported" in line.lower()), "")
        if first:
            raise Skip(f"compute-sanitizer cannot run here: {first.strip('= ').strip()}")
        raise RuntimeError(f"code {code}: {_last_line(output)}")
    errors = int(summary.group(2))
    if errors or code:
        wrong = next((line.strip("= ").strip() for line in output.splitlines()
                      if line.startswith("=========") and "COMPUTE-SANITIZER" not in line), "")
        raise RuntimeError(f"{errors} errors, code {code}: {wrong or _last_line(output)}")
    return {"errors": 0}


def _lack(reason: str) -> Row:
    raise Lacking(reason)


def run(journal: Journal, settings: Settings) -> None:
    if settings.dry_run:
        def rehearsed() -> Row:
            code, output = _small_run("norm_act", "cpu", (), journal.left())
            if code:
                raise RuntimeError(_last_line(output))
            return {"rehearsed": _last_line(output)}

        journal.row("norm_act without the tool", rehearsed)
        raise Skip("dry run: compute-sanitizer needs a GPU")
    tool = find_tool("compute-sanitizer")
    if tool is None:
        raise Skip("compute-sanitizer is not installed")
    jobs = {f"memcheck {op}": (op, "memcheck") for op in OPS}
    jobs |= {f"racecheck {op}": (op, "racecheck") for op in SHARED_MEMORY}
    options = ("--error-exitcode", "99", "--print-limit", "5",
               "--target-processes", "application-only")
    lacking = missing("cuda")
    if lacking is not None:
        for name in journal.missing(jobs):
            if any(case.kind == "cuda" for case in CASES if case.op == jobs[name][0]):
                journal.row(name, partial(_lack, lacking))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        futures = {}
        for name in journal.missing(jobs):
            op, which = jobs[name]
            before = (tool, "--tool", which, *options)
            futures[pool.submit(_small_run, op, "cuda", before, journal.left() - 3)] = name
        for future in as_completed(futures):
            journal.row(futures[future], lambda: _judged(*future.result()))  # noqa: B023
