"""Build, check, tune and measure on a GPU, and write results, tables and plots.

On a machine that is lent for a few calls of ten minutes (--commit where there is no git):

  python -m benchmarks.gpu --dry-run                  on any machine: all up to the launch
  python -m benchmarks.gpu --plan                     what each of three calls has time for
  python -m benchmarks.gpu --commit C --out OUT       parts in order, for 470 s
  python -m benchmarks.gpu --commit C --out OUT --from RESULTS.json
                                                      the rows that RESULTS.json lacks, tuned as it
                                                      says; it is the file that the call before left

A machine that keeps its files needs no --from: --resume goes on with the newest results in --out.

Results go to <gpu>-<date>.json, .md, .tuned.json, .failed.log and plots; logs to
build/gpu/<result>/. Launch settings that measured fastest also go to smis_kernels/tuned/, where the
package reads them.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from smis_models.io.provenance import commit

from . import report
from .parts import BY_NAME, PARTS, TOTAL_SECONDS, Part, order, plan_text
from .results import (
    FORMAT,
    ROOT,
    Settings,
    Skip,
    going_on,
    read_json,
    read_results,
    write_json,
)
from .worker import DRY_RUN, run_parts

RESULTS = ROOT / "benchmarks" / "results"
DRY_RUNS = ROOT / "build" / "dry-runs"
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
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
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true",
                          help="go on with the newest results of this GPU in --out")
    going_on.add_argument("--from", type=Path, dest="earlier", metavar="FILE.json",
                          help="go on with these results of this GPU, and use their settings")
    parser.add_argument("--plan", action="store_true",
                        help="print what three calls have time for, and run nothing")
    parser.add_argument("--dry-run", action="store_true",
                        help="every part on the CPU with tiny sizes: proves the command, not a GPU")
    parser.add_argument("--commit", default=commit(),
                        help="what to record; default: git's description")
    return parser


def machine_name(dry_run: bool) -> str:
    """"cpu", or the GPU's name."""
    if dry_run:
        return "cpu"
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a CPU-only build")
        raise Skip(f"no CUDA GPU is visible to {built}; with --dry-run every part runs on the CPU")
    return torch.cuda.get_device_name(0)


def stem(machine: str) -> str:
    """The machine's name in the names of files: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", machine.removeprefix("NVIDIA ").lower()).strip("-")


def _earlier(path: Path, machine: str, dry_run: bool) -> dict[str, Any]:
    """Results to go on with: of the same GPU model, since rows of two do not compare."""
    found = read_results(path)
    if found["dry_run"] != dry_run:
        kind = "a dry run" if found["dry_run"] else "a run on a GPU"
        raise Skip(f"--from: {path} is of {kind}, and this is none")
    if found["machine"] != machine:
        raise Skip(f"--from: {path} is of {found['machine']}, this is {machine}; take a machine "
                   "of that kind, or start without --from")
    return going_on(found, [part.name for part in PARTS if part.again])


def latest(out: Path, machine: str, dry_run: bool, before: Path | None = None) -> Path | None:
    """The newest results of this machine in ``out``, older than ``before``."""
    prefix = ("dry-run-" if dry_run else "") + stem(machine)
    found = [path for path in out.glob(f"{prefix}-*.json")
             if re.fullmatch(rf"{re.escape(prefix)}-[-\d]+", path.stem)
             and (before is None or path.stem < before.stem)]
    return max(found, key=lambda path: path.stem, default=None)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def prepare(arguments: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """The settings, and the content that the results file begins with.

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
    source = arguments.earlier or target
    content = {"parts": {}, "benchmarks": [], "calls": [], "tuned": None} if source is None else (
        _earlier(source, machine, arguments.dry_run))
    prefix = "dry-run-" if arguments.dry_run else ""
    name = (f"{prefix}{stem(machine)}-{time.strftime('%Y-%m-%d-%H%M%S')}.json"
            if source is None else source.name)
    settings = Settings(
        path=str(out / name), maps=arguments.maps and str(Path(arguments.maps).resolve()),
        parity=arguments.parity and str(Path(arguments.parity).resolve()),
        dry_run=arguments.dry_run, commit=arguments.commit,
    )
    return settings, {**content, "format": FORMAT, "dry_run": arguments.dry_run,
                      "commit": arguments.commit, "machine": machine,
                      "date": time.strftime("%Y-%m-%d")}


def unfinished(only: list[str] | None, parts: dict[str, Any]) -> list[Part]:
    """The parts to run: those of every call, and those that have not ended well."""
    return [part for part in order(only or BY_NAME)
            if part.again or parts.get(part.name, {}).get("state") != "done"]


def main() -> int:
    """Run the command; 0 if nothing failed."""
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if arguments.plan:
            known = read_results(arguments.earlier) if arguments.earlier else {}
            print(plan_text(arguments.budget or TOTAL_SECONDS, known, arguments.commit,
                            arguments.earlier and str(arguments.earlier)))
            return 0
        settings, content = prepare(arguments)
    except Skip as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    target = Path(settings.path)
    if content["tuned"] and not settings.table.exists():
        write_json(settings.table, content["tuned"])
    chosen = unfinished(arguments.only, content["parts"])
    budget = arguments.budget or TOTAL_SECONDS * (DRY_RUN if settings.dry_run else 1)
    taken: dict[str, float] = {}
    content["calls"].append({"date": time.strftime("%Y-%m-%d %H:%M"), "commit": settings.commit,
                             "budget": budget, "seconds": taken})
    write_json(target, content)

    def after(part: Part, seconds: float) -> None:
        taken[part.name] = seconds
        content = read_json(target)
        content["calls"][-1]["seconds"] = taken
        content["tuned"] = read_json(settings.table)
        write_json(target, content)

    print(f"{content['machine']}, commit {settings.commit}: "
          f"{', '.join(part.name for part in chosen)}; results in {target}", flush=True)
    interrupted = False
    try:
        run_parts(chosen, settings, budget, after)
    except KeyboardInterrupt:
        interrupted = True
    report.write(target, None if settings.dry_run else
                 latest(target.parent, content["machine"], False, before=target)
                 or latest(RESULTS, content["machine"], False, before=target))
    if interrupted:
        print(f"error: interrupted; --from {target} goes on", file=sys.stderr)
        return INTERRUPTED
    failed = [name for name, part in read_json(target)["parts"].items()
              if part.get("state") == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; logs in {settings.log('').parent}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
