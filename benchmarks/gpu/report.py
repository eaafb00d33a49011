"""The results as Markdown: targets, tables beside their floors, what was skipped, regressions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .journal import explain, read_json
from .regressions import Place, duration, regressions
from .targets import TARGETS, Parts, accuracy, figure, floor_share, measured, reached


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |"
                     for line in lines)


def _rows(parts: Parts, *names: str) -> list[dict[str, Any]]:
    return [row for name in names for row in parts.get(name, {}).get("rows", [])]


def _machine(results: dict[str, Any]) -> str:
    rows = _rows(results["parts"], "device")
    facts = rows[0] if rows else {}
    shown = ("gpu", "capability", "multiprocessors", "driver, SM clock, memory clock, power limit",
             "python", "torch", "torch_cuda", "cudnn", "nvcc")
    text = "; ".join(f"{name} {facts[name]}" for name in shown if facts.get(name))
    modules = ", ".join(f"{k} {v}" for k, v in facts.get("modules", {}).items())
    others = sorted({row.get("commit", "") for row in _rows(results["parts"], *results["parts"])}
                    - {results["commit"], ""})
    mixed = f" Some rows are of commit {', '.join(others)}." if others else ""
    timed = _rows(results["parts"], "operations", "networks", "training")
    settings = sorted({row.get("tuned", "") or "none" for row in timed if "providers" in row})
    used = f" Tuned settings of the timed rows: {'; '.join(settings)}." if settings else ""
    return f"Commit {results['commit']}; {text}; {modules}.{mixed}{used}"


def target_rows(parts: Parts, dry_run: bool = False) -> list[tuple[str, str, str, str]]:
    """(case, demand, figure, verdict) of every target."""
    found = []
    for target in TARGETS:
        value, why = measured(parts, target)
        case = f"{target.row}: {target.provider}"
        if dry_run:
            found.append((case, target.text, "-", why or "dry run: computed, says nothing"))
        elif value is None:
            found.append((case, target.text, "-", why))
        else:
            verdict = "reached" if reached(target, value) else "MISSED"
            found.append((case, target.text, figure(target, value), verdict))
    right, judged = accuracy(parts)
    found.append((f"outputs of all {judged} timed forms of ours", "error <= 1.5x the reference's",
                  f"{right} of {judged}" if judged and not dry_run else "-",
                  "not measured" if not judged else "dry run: computed, says nothing" if dry_run
                  else "reached" if right == judged else "MISSED"))
    return found


def _providers(row: dict[str, Any], worse: dict[str, str]) -> list[tuple[str, ...]]:
    lines = []
    base = next((e["median"] for e in row["providers"].values() if "median" in e), None)
    for name, entry in row["providers"].items():
        if "median" not in entry:
            state = "failed" if "failed" in entry else "skipped"
            lines.append((row["name"], name, *"-----", f"{state}: {entry[state]}"))
            continue
        share = floor_share(row, entry)
        spread = f"[{duration(entry['q1'])}, {duration(entry['q3'])}]"
        wrong = "" if entry["correct"] else " WRONG"
        note = "CUDA graph" if entry.get("graph") else entry.get("note", "")
        if "images_per_second" in entry:
            note = ", ".join(filter(None, [note, f"{entry['images_per_second']:.3g} images/s"]))
        if name in worse:
            note = ", ".join(filter(None, [note, f"**{worse[name]}**"]))
        lines.append((
            row["name"], name, f"{duration(entry['median'])} {spread}",
            "-" if base is None else f"{base / entry['median']:.2f}x",
            "-" if share is None else f"{share:.0%}", f"{entry['peak_bytes'] / 1e6:.1f}",
            f"{entry['error']:.1e}{wrong}", note,
        ))
    return lines


def _timed(parts: Parts, name: str, worse: dict[Place, str]) -> str:
    head = ("row", "provider", "median [quartiles]", "x first", "of floor", "peak MB", "error",
            "")
    rows = [line for row in _rows(parts, name) if "providers" in row
            for line in _providers(row, {provider: text for (part, at, provider), text
                                         in worse.items() if (part, at) == (name, row["name"])})]
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


def _rates(parts: Parts) -> str:
    lines = []
    for row in _rows(parts, "rates"):
        for kind in ("bytes_per_second", "operations_per_second", "launch_seconds"):
            for name, value in row.get(kind, {}).items():
                text = {"bytes_per_second": f"{value / 1e12:.3g} TB/s",
                        "operations_per_second": f"{value / 1e12:.3g} TFLOP/s",
                        "launch_seconds": duration(value)}[kind]
                lines.append((row["name"], name, text))
    return _table(("rate", "", ""), lines) if lines else "nothing measured"


def markdown(results: dict[str, Any], earlier: dict[str, Any] | None, before: str = "") -> str:
    """The whole report."""
    parts = results["parts"]
    worse = regressions(parts, earlier["parts"]) if earlier is not None else {}
    dry = ("**A dry run on a CPU: it proves the command; its figures are of tiny sizes on a "
           "processor and mean nothing.**\n\n" if results["dry_run"] else "")
    text = [
        f"# GPU results: {results['machine']}, {results['date']}", dry + _machine(results),
        "Medians of interleaved rounds of one run; errors are against float64 and may be 1.5 times "
        "the reference's own at that dtype; WRONG gets no figure. \"Of floor\" is the least time "
        "that the bytes (at the copy bandwidth of the run) or the operations (at its matrix rate) "
        "allow, over the time taken.",
        "## Targets", _table(("case", "target", "figure", ""),
                             target_rows(parts, results["dry_run"])),
        "## Checks", _checks(parts), "## Rates", _rates(parts),
    ]
    for name in ("operations", "networks", "training"):
        text += [f"## {name.capitalize()}", _timed(parts, name, worse)]
    tuned = [f"- {row['name']}: {row['chosen']}" for row in _rows(parts, "tune") if "chosen" in row]
    text += ["## Tuned", "\n".join(tuned) or "nothing tuned"]
    if earlier is not None:
        lines = [f"- {', '.join(filter(None, place))}: {what}" for place, what in worse.items()]
        text += [f"## Worse than {before}", "\n".join(lines) or "nothing"]
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
    if not results["dry_run"]:
        for line in target_rows(results["parts"]):
            print("  ".join(line), flush=True)
    if earlier is not None:
        for place, what in regressions(results["parts"], earlier["parts"]).items():
            print(f"worse than {earlier['date']}: {', '.join(filter(None, place))}: {what}",
                  flush=True)
    print("written: " + ", ".join(map(str, written)), flush=True)
    return written
