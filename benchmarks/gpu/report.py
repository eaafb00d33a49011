"""The results as Markdown: the harness's report after targets, checks, rates, what is worse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smis_models.benchmark.records import (
    Record,
    by_case,
    check_text,
    checks,
    duration,
    load,
    markdown,
    markdown_table,
    ours,
    plots,
    regressions,
)

from .results import Row, explain, read_json
from .timed import ALL

Parts = dict[str, Any]


def _rows(parts: Parts, *names: str) -> list[Row]:
    return [row for name in names for row in parts.get(name, {}).get("rows", [])]


def _machine(results: dict[str, Any]) -> str:
    rows = _rows(results["parts"], "device")
    facts = rows[0] if rows else {}
    shown = ("gpu", "capability", "multiprocessors", "driver, SM clock, memory clock, power limit",
             "python", "torch", "torch_cuda", "cudnn", "nvcc")
    text = "; ".join(f"{name} {facts[name]}" for name in shown if facts.get(name))
    modules = ", ".join(f"{k} {v}" for k, v in facts.get("modules", {}).items())
    settings = sorted({row.get("tuned", "") or "none" for row in _rows(results["parts"], *ALL)
                       if row["state"] in ("done", "failed")})
    others = sorted({row.get("commit", "") for row in _rows(results["parts"], *results["parts"])}
                    - {results["commit"], ""})
    mixed = f" Some rows are of commit {', '.join(others)}." if others else ""
    used = f" Tuned settings of the timed rows: {'; '.join(settings)}." if settings else ""
    return f"Commit {results['commit']}; {text}; {modules}.{mixed}{used}"


def target_rows(records: Sequence[Record], dry_run: bool = False) -> list[tuple[str, str]]:
    """(case, verdicts) of every case that has targets, measured or not."""
    measured = {rows[0]: found for rows, found in by_case(records).items()}
    found = []
    for case in (case for cases in ALL.values() for case in cases() if case.targets):
        text = "; ".join(check_text(*check) for check in checks(measured.get(case.group, {})))
        if dry_run and text:
            text = "dry run: computed, says nothing"
        found.append((case.group, text or "not measured"))
    judged = ours(records)
    right = sum(r.correct for r in judged)
    verdict = "reached" if right == len(judged) else "MISSED"
    found.append((f"outputs of all {len(judged)} timed forms of ours",
                  "not measured" if not judged else "dry run: computed, says nothing" if dry_run
                  else
                  f"error <= 1.5x the reference's: {right} of {len(judged)} {verdict}"))
    return found


def _checks(parts: Parts) -> str:
    lines = [(name, row["name"], row["state"],
              f"{row['passed']} passed" if "passed" in row else "", row.get("reason", ""))
             for name in ("build", "checks") for row in _rows(parts, name)]
    return markdown_table(("part", "row", "state", "", "reason"), lines) if lines else "nothing ran"


def _rates(parts: Parts) -> str:
    units = {"bytes_per_second": lambda v: f"{v / 1e12:.3g} TB/s",
             "operations_per_second": lambda v: f"{v / 1e12:.3g} TFLOP/s",
             "launch_seconds": duration}
    lines = [(row["name"], name, text(value)) for row in _rows(parts, "rates")
             for kind, text in units.items() for name, value in row.get(kind, {}).items()]
    return markdown_table(("rate", "", ""), lines) if lines else "nothing measured"


def _left_out(parts: Parts) -> list[str]:
    lines = [f"- {name}: {part['state']}, {part.get('reason', '')}" for name, part in parts.items()
             if part.get("state") not in ("done", None)]
    for name, part in parts.items():
        for row in part["rows"]:
            if row["state"] != "done":
                lines.append(f"- {name}, {row['name']}: {row['state']}, {row.get('reason', '')}")
            lines += [f"- {name}, {row['name']}: {count} tests skipped, {why}"
                      for why, count in row.get("skips", {}).items()]
            lines += [f"- {name}, {row['name']}, {provider}: {why}"
                      for provider, why in row.get("missing", {}).items()]
    return lines


def worse_than(parts: Parts, records: Sequence[Record], earlier: Path) -> list[str]:
    """Rows that no longer end well, and forms of ours that do worse than in earlier results."""
    before = read_json(earlier)["parts"]
    done = {(name, row["name"]) for name, part in before.items() for row in part["rows"]
            if row["state"] == "done"}
    return [f"{name}, {row['name']}: failed: {row.get('reason', '')}"
            for name, part in parts.items() for row in part["rows"]
            if row["state"] == "failed" and (name, row["name"]) in done] + [
        f"{', '.join(place)}: {what}"
        for place, what in regressions(records, load(earlier)).items()]


def text(results: dict[str, Any], records: Sequence[Record], worse: Sequence[str],
         before: str) -> str:
    """The whole report."""
    parts, dry = results["parts"], results["dry_run"]
    rehearsal = ("**A dry run on a CPU: it proves the command; its figures are of tiny sizes on a "
                 "processor and mean nothing.**\n\n" if dry else "")
    tuned = [f"- {row['name']}: {row['chosen']}" for row in _rows(parts, "tune") if "chosen" in row]
    found = [
        f"# GPU results: {results['machine']}, {results['date']}", rehearsal + _machine(results),
        "\"Of floor\" is the least time that the bytes (at the copy bandwidth of the run) or the "
        "operations (at its matrix rate) allow, over the time taken.",
        "## Targets", markdown_table(("case", "target, figure"), target_rows(records, dry)),
        "## Checks", _checks(parts), "## Rates", _rates(parts),
        "## Tuned", "\n".join(tuned) or "nothing tuned",
    ]
    if before:
        found += [f"## Worse than {before}", "\n".join(f"- {line}" for line in worse) or "nothing"]
    found += ["## Left out", "\n".join(_left_out(parts)) or "nothing"]
    return "\n\n".join(found) + "\n\n" + (markdown(records) if records else "")


def write(path: Path, earlier: Path | None) -> list[Path]:
    """Markdown and plots beside the results; prints the targets and where all is."""
    results, records = read_json(path), load(path)
    worse = [] if earlier is None else worse_than(results["parts"], records, earlier)
    report = path.with_suffix(".md")
    report.write_text(text(results, records, worse, earlier.stem if earlier else ""))
    written = [path, report]
    try:
        from .plots import batches, roofline

        drawn = [roofline(records, path.with_suffix(".roofline.png")),
                 batches(records, path.with_suffix(".batches.png"))]
        written += [each for each in drawn if each is not None]
        if records:
            written += plots(records, path.parent, f"{path.stem}.")
    except Exception as error:  # tables do not depend on matplotlib
        print(f"no plots: {explain(error)}", flush=True)
    if not results["dry_run"]:
        for line in target_rows(records):
            print("  ".join(line), flush=True)
    for what in worse:
        print(f"worse than {earlier}: {what}", flush=True)
    print("written: " + ", ".join(map(str, written)), flush=True)
    return written
