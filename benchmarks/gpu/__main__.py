"""``python -m benchmarks.gpu``: build, check, tune and measure on a GPU; see CONTRIBUTING.md."""

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


def _parser() -> argparse.ArgumentParser:
    parts = "\n".join(f"  {part.name:12} {part.about} ({part.seconds:.0f} s)" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"parts:\n{parts}",
    )
    parser.add_argument("--maps", help="folder of label maps; default: the package's own scenes")
    parser.add_argument("--parity", help="folder of check_golden.py with its goldens")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
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


def machine_name(settings: Settings) -> str:
    """"cpu", or the GPU's name as the results' files carry it."""
    if settings.dry_run:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a CPU-only build")
        raise Skip(f"no CUDA GPU is visible to {built}; with --dry-run every part runs on the CPU")
    name = torch.cuda.get_device_name(0).removeprefix("NVIDIA ")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def latest(out: Path, machine: str, dry_run: bool, before: Path | None = None) -> Path | None:
    """The newest results of this machine in ``out``, other than ``before``."""
    prefix = "dry-run-" if dry_run else ""
    found = [path for path in out.glob(f"{prefix}{machine}-*.json")
             if path != before and re.fullmatch(rf"{prefix}{re.escape(machine)}-[-\d]+", path.stem)]
    return max(found, key=lambda path: path.stem, default=None)


def _restore(settings: Settings, results: dict[str, Any]) -> None:
    """Journals of earlier results, where a fresh machine has none."""
    for name, content in results.items():
        path = settings.journal(name)
        if not path.exists():
            write_json(path, {"rows": content["rows"]})


def _terminated(*_: object) -> None:
    raise SystemExit("error: ended by a signal; --resume goes on")


def main() -> int:
    arguments = _parser().parse_args()
    for name in ("maps", "parity"):
        folder = getattr(arguments, name)
        if folder is not None and not Path(folder).is_dir():
            print(f"error: --{name}: {folder} is no folder", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, _terminated)
    out = arguments.out.resolve()
    plain = Settings(str(out), "", dry_run=arguments.dry_run)
    try:
        machine = machine_name(plain)
    except Skip as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    last = latest(out, machine, arguments.dry_run)
    if arguments.resume and last is None:
        print(f"error: --resume: no results of {machine} in {out}", file=sys.stderr)
        return 2
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    prefix = "dry-run-" if arguments.dry_run else ""
    target = last if arguments.resume and last else out / f"{prefix}{machine}-{stamp}.json"
    settings = Settings(
        out=str(out), work=str(ROOT / "build" / "gpu" / target.stem),
        maps=arguments.maps and str(Path(arguments.maps).resolve()),
        parity=arguments.parity and str(Path(arguments.parity).resolve()),
        dry_run=arguments.dry_run, commit=arguments.commit or commit(),
        table=str(target.with_suffix(".tuned.json")),
    )
    kept: dict[str, Any] = {}
    if arguments.resume:
        kept = read_json(target)["parts"]
        _restore(settings, kept)
    names = driver.order(arguments.only or BY_NAME)
    names = [n for n in names if n == "device" or kept.get(n, {}).get("state") != "done"
             or (arguments.only and n in arguments.only) or BY_NAME[n].fatal]

    def save(parts: dict[str, Any]) -> None:
        ordered = {part.name: parts[part.name] for part in PARTS if part.name in parts}
        write_json(target, {"format": 1, "dry_run": settings.dry_run, "commit": settings.commit,
                            "date": stamp, "machine": machine, "parts": ordered})

    print(f"{machine}, commit {settings.commit}: {', '.join(names)}; results in {target}",
          flush=True)
    parts = dict(kept)
    try:
        usual = TOTAL_SECONDS * (driver.DRY_RUN if settings.dry_run else 1)
        driver.run_parts(names, settings, arguments.budget or usual, save, parts)
    finally:
        if parts:
            save(parts)
            earlier = latest(out, machine, arguments.dry_run, before=target)
            report.write(target, earlier)
    failed = [name for name, part in parts.items() if part["state"] == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; logs in {settings.work}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
