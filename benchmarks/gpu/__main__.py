"""Build, check, tune and measure on a GPU, and write results, tables and plots.

A first session (--commit where there is no git; --out a folder that outlasts the session):

  python -m benchmarks.gpu --dry-run                       on any machine: all up to the launch
  python -m benchmarks.gpu --commit C --only correctness sanitizer parity rates tune --parity DIR
  python -m benchmarks.gpu --commit C --resume             networks and the rest, tuned by then
  python -m benchmarks.gpu --commit C --resume             what failed or found no time, again

Later, python -m benchmarks.gpu alone runs all parts in under 8 minutes and marks regressions.

Results go to <gpu>-<date>.json, .md, .tuned.json and plots; logs to build/gpu/<result>/. The launch
settings that measured fastest also go to smis_kernels/tuned/, where the package reads them.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import driver, report
from .journal import Skip, read_json, write_json
from .parts import BY_NAME, PARTS, TOTAL_SECONDS
from .settings import ROOT, Settings

RESULTS = ROOT / "benchmarks" / "results"
DRY_RUNS = ROOT / "build" / "dry-runs"
INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parts = "\n".join(f"  {part.name:12} {part.about} ({part.seconds:.0f} s)" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"parts:\n{parts}",
    )
    parser.add_argument("--maps", help="folder of label maps; default: the package's own scenes")
    parser.add_argument("--parity", help="folder of check_golden.py with its goldens")
    parser.add_argument("--out", type=Path, help="folder of the results; default: "
                        "benchmarks/results, of dry runs build/dry-runs")
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), metavar="PART",
                        help="these parts (and what all need: device, build)")
    parser.add_argument("--budget", type=float, default=None,
                        help=f"seconds for all parts; default: {TOTAL_SECONDS:.0f}")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the rows that the last run of this machine lacks")
    parser.add_argument("--dry-run", action="store_true",
                        help="every part on the CPU with tiny sizes: proves the command, not a GPU")
    parser.add_argument("--commit", help="what to record; default: git's description")
    return parser


def commit() -> str:
    """The commit of the checkout, "unknown" where there is no git or no repository."""
    command = ("git", "-c", "safe.directory=*", "-C", str(ROOT), "describe", "--always", "--dirty",
               "--abbrev=12")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine_name(dry_run: bool) -> str:
    """"cpu", or the GPU's name as the results' files carry it."""
    if dry_run:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a CPU-only build")
        raise Skip(f"no CUDA GPU is visible to {built}; with --dry-run every part runs on the CPU")
    name = torch.cuda.get_device_name(0).removeprefix("NVIDIA ")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def latest(out: Path, machine: str, dry_run: bool, before: Path | None = None) -> Path | None:
    """The newest results of this machine in ``out``, older than ``before``."""
    prefix = "dry-run-" if dry_run else ""
    found = [path for path in out.glob(f"{prefix}{machine}-*.json")
             if re.fullmatch(rf"{prefix}{re.escape(machine)}-[-\d]+", path.stem)
             and (before is None or path.stem < before.stem)]
    return max(found, key=lambda path: path.stem, default=None)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def _settings(arguments: argparse.Namespace) -> tuple[Settings, Path, str]:
    """The settings, the results' file and the machine's name.

    Raises:
        Skip: this cannot run here, and why.
    """
    for name in ("maps", "parity"):
        folder = getattr(arguments, name)
        if folder is not None and not Path(folder).is_dir():
            raise Skip(f"--{name}: {folder} is no folder")
    out = (arguments.out or (DRY_RUNS if arguments.dry_run else RESULTS)).resolve()
    if arguments.dry_run and out == RESULTS:
        raise Skip(f"--out: {out} holds measured results, and a dry run's are none; give another")
    machine = machine_name(arguments.dry_run)
    target = latest(out, machine, arguments.dry_run) if arguments.resume else None
    if arguments.resume and target is None:
        raise Skip(f"--resume: no results of {machine} in {out}; run once without it")
    if target is None:
        prefix = "dry-run-" if arguments.dry_run else ""
        target = out / f"{prefix}{machine}-{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    settings = Settings(
        out=str(out), work=str(ROOT / "build" / "gpu" / target.stem),
        maps=arguments.maps and str(Path(arguments.maps).resolve()),
        parity=arguments.parity and str(Path(arguments.parity).resolve()),
        dry_run=arguments.dry_run, commit=arguments.commit or commit(),
        table=str(target.with_suffix(".tuned.json")),
    )
    return settings, target, machine


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        settings, target, machine = _settings(arguments)
    except Skip as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    parts: dict[str, Any] = {}
    if arguments.resume:
        parts = read_json(target)["parts"]
        driver.restore(settings, parts)
    chosen = [part for part in driver.order(arguments.only or BY_NAME)
              if part.fatal or parts.get(part.name, {}).get("state") != "done"]

    def save(parts: dict[str, Any]) -> None:
        ordered = {part.name: parts[part.name] for part in PARTS if part.name in parts}
        write_json(target, {"format": 1, "dry_run": settings.dry_run, "commit": settings.commit,
                            "date": time.strftime("%Y-%m-%d"), "machine": machine,
                            "parts": ordered})

    print(f"{machine}, commit {settings.commit}: {', '.join(part.name for part in chosen)}; "
          f"results in {target}", flush=True)
    interrupted = False
    try:
        usual = TOTAL_SECONDS * (driver.DRY_RUN if settings.dry_run else 1)
        driver.run_parts(chosen, settings, arguments.budget or usual, save, parts)
    except KeyboardInterrupt:
        interrupted = True
    if parts:
        save(parts)
        report.write(target, None if settings.dry_run else
                     latest(target.parent, machine, False, before=target)
                     or latest(RESULTS, machine, False, before=target))
    if interrupted:
        print("error: interrupted; --resume goes on", file=sys.stderr)
        return INTERRUPTED
    failed = [name for name, part in parts.items() if part["state"] == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; logs in {settings.work}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
