"""The results as Markdown: targets, tables beside their floors, what was skipped, regressions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .journal import explain, read_json
from .targets import TARGETS, Parts, figure, floor_share, measured, reached

REGRESSION = 1.1  # slower by so much, and outside both quartiles


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |"
                     for line in lines)


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rows(parts: Parts, *names: str) -> list[dict[str, Any]]:
    return [row for name in names for row in parts.get(name, {}).get("rows", [])]


def _machine(results: dict[str, Any]) -> str:
    rows = _rows(results["parts"], "device")
    facts = rows[0] if rows else {}
    shown = ("gpu", "capability", "multiprocessors", "driver, SM clock, memory clock, power limit",
             "python", "torch", "torch_cuda", "cudnn", "nvcc")
    text = "; ".join(f"{name} {facts[name]}" for name in shown if facts.get(name))
    modules = ", ".join(f"{k} {v}" for k, v in facts.get("modules", {}).items())
    return f"Commit {results['commit']}; {text}; {modules}."


def target_rows(parts: Parts) -> list[tuple[str, str, str, str]]:
    """(case, demand, figure, verdict) of every target."""
    found = []
    for target in TARGETS:
        value, why = measured(parts, target)
        case = f"{target.row}: {target.provider}"
        if value is None:
            found.append((case, target.text, "-", why))
        else:
            verdict = "reached" if reached(target, value) else "MISSED"
            found.append((case, target.text, figure(target, value), verdict))
    return found


def _providers(row: dict[str, Any]) -> list[tuple[str, ...]]:
    lines = []
    base = next((e["median"] for e in row["providers"].values() if "median" in e), None)
    for name, entry in row["providers"].items():
        if "skipped" in entry:
            lines.append((row["name"], name, "-", "-", "-", "-", "-", f"skipped: {entry['skipped']}"
                          ))
            continue
        share = floor_share(row, entry)
        spread = f"[{duration(entry['q1'])}, {duration(entry['q3'])}]"
        wrong = "" if entry["correct"] else " WRONG"
        note = "CUDA graph" if entry.get("graph") else ""
        if "images_per_second" in entry:
            note = ", ".join(filter(None, [note, f"{entry['images_per_second']:.3g} images/s"]))
        lines.append((
            row["name"], name, f"{duration(entry['median'])} {spread}",
            "-" if base is None else f"{base / entry['median']:.2f}x",
            "-" if share is None else f"{share:.0%}", f"{entry['peak_bytes'] / 1e6:.1f}",
            f"{entry['error']:.1e}{wrong}", note,
        ))
    return lines


def _timed(parts: Parts, name: str) -> str:
    head = ("row", "provider", "median [quartiles]", "x first", "of floor", "peak MB", "error",
            "")
    rows = [line for row in _rows(parts, name) if row["state"] == "done" and "providers" in row
            for line in _providers(row)]
    return _table(head, rows) if rows else "nothing measured"


def _checks(parts: Parts) -> str:
    lines = []
    for name in ("build", "correctness", "sanitizer", "parity"):
        for row in _rows(parts, name):
            counts = f"{row['passed']} passed" if "passed" in row else ""
            lines.append((name, row["name"], row["state"], counts, row.get("reason", "")))
    return _table(("part", "row", "state", "", "reason"), lines) if lines else "nothing ran"


def _left_out(parts: Parts) -> list[str]:
    lines = [f"- {name}: {part['state']}, {part['reason']}" for name, part in parts.items()
             if part["state"] != "done"]
    for name, part in parts.items():
        lines += [f"- {name}, {row['name']}: {row['state']}, {row.get('reason', '')}"
                  for row in part["rows"] if row["state"] not in ("done",)]
        for row in part["rows"]:
            lines += [f"- {name}, {row['name']}: {count} tests skipped, {why}"
                      for why, count in row.get("skips", {}).items()]
    return lines


def regressions(parts: Parts, earlier: Parts) -> list[str]:
    """Providers of ours that are slower than in earlier results."""
    found = []
    for name, part in parts.items():
        before = {row["name"]: row for row in earlier.get(name, {}).get("rows", [])}
        for row in part["rows"]:
            old = before.get(row["name"], {}).get("providers", {})
            for provider, entry in row.get("providers", {}).items():
                then = old.get(provider, {})
                if not provider.startswith("ours") or "median" not in entry or "median" not in then:
                    continue
                ratio = entry["median"] / then["median"]
                if ratio >= REGRESSION and entry["q1"] > then["q3"]:
                    found.append(f"- {row['name']}, {provider}: {duration(then['median'])} -> "
                                 f"{duration(entry['median'])} ({ratio:.2f}x)")
    return found


def _rates(parts: Parts) -> str:
    lines = []
    for row in _rows(parts, "rates"):
        for kind in ("bytes_per_second", "operations_per_second", "seconds"):
            values = row.get(kind)
            if isinstance(values, dict):
                for name, value in values.items():
                    text = {"bytes_per_second": f"{value / 1e12:.3g} TB/s",
                            "operations_per_second": f"{value / 1e12:.3g} TFLOP/s",
                            "seconds": duration(value)}[kind]
                    lines.append((row["name"], name, text))
    return _table(("rate", "", ""), lines) if lines else "nothing measured"


def markdown(results: dict[str, Any], earlier: dict[str, Any] | None, before: str = "") -> str:
    """The whole report."""
    parts = results["parts"]
    dry = ("**A dry run on a CPU: it proves the command; its figures are of tiny sizes on a "
           "processor and mean nothing.**\n\n" if results["dry_run"] else "")
    text = [
        f"# GPU results: {results['machine']}, {results['date']}", dry + _machine(results),
        "Medians of interleaved rounds of one run; errors are against float64 and may be 1.5 times "
        "the reference's own at that dtype; WRONG gets no figure. \"Of floor\" is the least time "
        "that the bytes (at the copy bandwidth of the run) or the operations (at its matrix rate) "
        "allow, over the time taken.",
        "## Targets", _table(("case", "target", "figure", ""), target_rows(parts)),
        "## Checks", _checks(parts), "## Rates", _rates(parts),
        "## Operations", _timed(parts, "operations"), "## Networks", _timed(parts, "networks"),
        "## Training", _timed(parts, "training"),
    ]
    tuned = [f"- {row['name']}: {row['chosen']}" for row in _rows(parts, "tune") if "chosen" in row]
    text += ["## Tuned", "\n".join(tuned) or "nothing tuned"]
    if earlier is not None:
        slower = regressions(parts, earlier["parts"])
        text += [f"## Slower than {before}", "\n".join(slower) or "nothing"]
    text += ["## Left out", "\n".join(_left_out(parts)) or "nothing"]
    return "\n\n".join(text) + "\n"


def write(path: Path, earlier_path: Path | None) -> list[Path]:
    """Markdown and plots beside the results; prints the targets and where all is."""
    results = read_json(path)
    earlier = read_json(earlier_path) if earlier_path is not None else None
    report = path.with_suffix(".md")
    report.write_text(markdown(results, earlier, earlier_path.stem if earlier_path else ""))
    written = [path, report]
    try:
        from .plots import plots

        written += plots(results, path)
    except Exception as error:  # tables do not depend on matplotlib
        print(f"no plots: {explain(error)}", flush=True)
    for line in target_rows(results["parts"]):
        print("  ".join(line), flush=True)
    if earlier is not None:
        for line in regressions(results["parts"], earlier["parts"]):
            print(f"slower {line}", flush=True)
    print("written: " + ", ".join(map(str, written)), flush=True)
    return written
