"""Part ``parity``: goldens of the published networks and ops, with the networks on the GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from smis_kernels.runtime.backend import missing

from .journal import Journal, Row, Skip
from .settings import ROOT, Settings

FAMILIES = {"ops": "^ops_", "groupdnet": "^smis_.*small", "spade": "^spade_.*small",
            "ccfpse": "^ccfpse_.*small", "pix2pixhd": "^pix2pixhd_.*small"}


def _checked(settings: Settings, pattern: str, seconds: float) -> Row:
    assert settings.parity is not None
    environment = {**os.environ, "SMIS_PARITY": settings.parity,
                   "SMIS_PARITY_DEVICE": settings.device}
    command = (sys.executable, str(Path(settings.parity, "check_golden.py")),
               str(ROOT / "benchmarks" / "gpu" / "parity_builders.py"), "--only", pattern)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return {"state": "failed", "reason": "not finished in the part's time; --from"}
    print(f"== {pattern}\n{done.stdout}", flush=True)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["no output"]
    passed, failed = (sum(line.endswith(word) for line in lines) for word in (" ok", "FAIL"))
    row: Row = {"passed": passed, "failed": failed, "last": lines[-1]}
    lacking = None if settings.dry_run else missing("cuda")
    if lacking is not None:  # the reference stood in for its kernels
        row |= {"again": True, "note": lacking}
    if done.returncode:
        bad = next((line for line in lines if line.endswith("FAIL")), lines[-1])
        return {**row, "state": "failed", "reason": re.sub(r"\s+", " ", bad)[:400]}
    return row


def run(journal: Journal, settings: Settings) -> None:
    if settings.parity is None:
        raise Skip("no --parity folder was given")
    if not Path(settings.parity, "check_golden.py").exists():
        raise Skip(f"{settings.parity} holds no check_golden.py")
    with ThreadPoolExecutor(len(FAMILIES)) as pool:
        families = ["ops"] if settings.dry_run else FAMILIES  # the networks' take minutes on a CPU
        futures = {pool.submit(_checked, settings, FAMILIES[name], journal.left() - 3): name
                   for name in journal.missing(families)}
        for future in as_completed(futures):
            journal.row(futures[future], future.result)
