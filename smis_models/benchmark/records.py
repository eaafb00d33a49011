"""Records in pytest-benchmark's JSON form, and the tables and plots made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ..io.images import write_atomically
from ..io.provenance import commit, versions

PROVIDERS = ("reference", "channels_last", "compiled", "fused")
_BASELINES = PROVIDERS[:3]


@dataclass(frozen=True)
class Record:
    """One provider of one case: its times and what a reader needs to judge them.

    ``bytes`` must be moved by any implementation; ``peak_memory`` counts the allocations of one
    call, outputs included; ``copy_bandwidth`` (bytes/s, reads and writes) is of the same run.
    """

    group: str
    provider: str
    times: list[float]
    device: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    macs: int
    peak_memory: int
    output_bytes: int
    max_rel_error: float
    correct: bool
    copy_bandwidth: float
    memory_bound: bool
    targets: dict[str, float] = field(default_factory=dict)
    compile_seconds: float | None = None
    resident_memory: int | None = None
    allocator: str = "reuse"
    maps: dict[str, float] = field(default_factory=dict)
    """Median seconds on each map, where ``times`` are geometric means over several."""
    windows: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Of each map its distinct 3x3 windows (V), 5x5 windows (U) and pixels."""
    bound: float | None = None
    """Seconds that the remaining arithmetic and traffic take at the rates of the same run."""
    counts: dict[str, int] = field(default_factory=dict)
    """What the case counts beside time, such as parameters."""
    commit: str = field(default_factory=commit)
    """Of the source tree that ran."""
    versions: dict[str, str] = field(default_factory=versions)
    """What the times depend on besides the commit."""

    @property
    def slowest(self) -> float:
        """Seconds on the slowest map."""
        return max(self.maps.values(), default=self.median)

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds."""
        if len(self.times) < 2:
            return self.times[0], self.times[0]
        low, _, high = quantiles(self.times, n=4, method="inclusive")
        return low, high

    def extra_info(self) -> dict[str, Any]:
        """All but the times."""
        return {k: v for k, v in asdict(self).items() if k not in ("group", "times")}

    def to_entry(self) -> dict[str, Any]:
        """The record as one of pytest-benchmark's ``benchmarks``."""
        low, high = self.quartiles
        stats = {"data": self.times, "median": self.median, "q1": low, "q3": high,
                 "rounds": len(self.times)}
        name = f"{self.group}[{self.provider}]"
        return {"group": self.group, "name": name, "stats": stats, "extra_info": self.extra_info()}

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Record:
        """The inverse of :meth:`to_entry`; summaries without ``data`` keep the quartiles."""
        stats, info = entry["stats"], entry["extra_info"]
        times = stats.get("data") or [stats["q1"], stats["median"], stats["q3"]]
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in info.items() if k in known}
        values["shape"] = tuple(values["shape"])
        return cls(group=entry["group"], times=list(times), **values)


def save(path: str | Path, records: Sequence[Record]) -> Path:
    """Write records as JSON that :func:`load` and pytest-benchmark's tools read."""
    content = {"benchmarks": [r.to_entry() for r in records], "version": versions()["smis_kernels"]}
    return write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def load(path: str | Path) -> list[Record]:
    """The records in a JSON file of :func:`save` or of ``pytest --benchmark-json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no such records.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected the JSON of a benchmark run")
    try:
        entries = json.loads(path.read_text())["benchmarks"]
        return [Record.from_entry(entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the JSON of a benchmark run ({error!r})") from error


Key = tuple[str, str, str, str]


def by_case(records: Sequence[Record]) -> dict[Key, dict[str, Record]]:
    """(group, device, dtype, allocator) -> provider -> record, in order of appearance."""
    cases: dict[Key, dict[str, Record]] = {}
    for r in records:
        cases.setdefault((r.group, r.device, r.dtype, r.allocator), {})[r.provider] = r
    return cases


def speedup(rows: dict[str, Record], baseline: str = "reference", *,
            slowest: bool = False) -> float | None:
    """Fused over a baseline ("best": the fastest); None where a check against fp64 failed."""
    names = [n for n in (_BASELINES if baseline == "best" else (baseline,)) if n in rows]
    fused = rows.get("fused")
    correct = [rows[n].median for n in names if rows[n].correct]
    if fused is None or not fused.correct or not correct:
        return None
    return min(correct) / (fused.slowest if slowest else fused.median)


def copy_share(record: Record) -> float:
    """The bytes that must move over the time it took, as a share of the copy bandwidth."""
    return record.bytes / record.median / record.copy_bandwidth


def scratch_share(record: Record) -> float:
    """Peak memory beyond the outputs, as a share of the outputs."""
    return max(0, record.peak_memory - record.output_bytes) / max(1, record.output_bytes)


def checks(rows: dict[str, Record]) -> list[tuple[str, float | None, float, bool]]:
    """(what, measured, target, reached) for each target of the case."""
    fused = rows.get("fused")
    if fused is None:
        return []
    found: list[tuple[str, float | None, float, bool]] = []
    for what, target in fused.targets.items():
        if what == "scratch":
            value: float | None = scratch_share(fused)
            reached = value is not None and value <= target
        elif what == "memory":
            value = fused.peak_memory / max(1, rows["reference"].peak_memory)
            reached = value <= target
        elif what == "copy":
            value = copy_share(fused) if fused.correct else None
            reached = value is not None and value >= target
        else:
            value = speedup(rows, "best" if what == "best" else "reference",
                            slowest=what == "slowest")
            reached = value is not None and value >= target
        found.append((what, value, target, reached))
    return found


def duration(seconds: float) -> str:
    """The time in s, ms or µs, as text."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def times_text(value: float | None) -> str:
    """A ratio, such as 2.31x."""
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def _check_text(what: str, value: float | None, target: float, reached: bool) -> str:
    sign = "reached" if reached else "MISSED"
    times = {"reference": "reference", "best": "best baseline", "slowest": "reference, slowest map"}
    if what in times:
        return f">= {target:g}x {times[what]}: {times_text(value)} {sign}"
    share = "-" if value is None else f"{value:.1%}"
    if what == "memory":
        return f"peak <= {target:.0%} of reference: {share} {sign}"
    if what == "copy":
        return f">= {target:.0%} of copy: {share} {sign}"
    return f"scratch <= {target:.0%} of output: {share} {sign}"


def _provider_cell(rows: dict[str, Record], name: str) -> str:
    if name not in rows:
        return "-"
    record = rows[name]
    low, high = record.quartiles
    wrong = "" if record.correct else " WRONG"
    return f"{duration(record.median)} [{duration(low)}, {duration(high)}]{wrong}"


COLUMNS = ("case", *PROVIDERS, "slowest map", "bound", "x reference", "x best baseline", "of copy",
           "peak MB (ref -> fused)", "error (ref, fused)", "targets")


def table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of :data:`COLUMNS`, one per case; no speedup where a check against fp64 failed."""
    lines = []
    for (group, device, dtype, _), rows in by_case(records).items():
        fused, reference = rows.get("fused"), rows.get("reference")
        share = peak = error = "-"
        if fused is not None and reference is not None:
            peak = f"{reference.peak_memory / 1e6:.1f} -> {fused.peak_memory / 1e6:.1f}"
            error = f"{reference.max_rel_error:.1e}, {fused.max_rel_error:.1e}"
            if fused.memory_bound and fused.correct:
                share = f"{copy_share(fused):.0%}"
        place = "" if (device, dtype) == ("cpu", "float32") else f" ({device}, {dtype})"
        lines.append((
            group + place, *(_provider_cell(rows, name) for name in PROVIDERS),
            duration(fused.slowest) if fused is not None and fused.maps else "-",
            duration(fused.bound) if fused is not None and fused.bound else "-",
            times_text(speedup(rows)), times_text(speedup(rows, "best")), share, peak, error,
            "; ".join(_check_text(*check) for check in checks(rows)) or "-",
        ))
    return lines


SUMMARY = ("case", "reference", "fused", "x ref.", "x best", "of copy")


def summary(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of :data:`SUMMARY`: what fits a terminal of :func:`table`'s rows."""
    picked: list[tuple[str, ...]] = []
    for row in table(records):
        cells = dict(zip(COLUMNS, row, strict=True))
        times = (cells[name].partition(" [")[0] for name in ("reference", "fused"))
        wrong = " WRONG" if "WRONG" in cells["fused"] else ""
        case, reference, fused = cells["case"].removesuffix("/forward"), *times
        picked.append((case, reference, fused + wrong, cells["x reference"],
                       cells["x best baseline"], cells["of copy"]))
    return picked


def target_lines(records: Sequence[Record]) -> list[str]:
    """One line per case that has targets."""
    return [f"{row[0]}: {row[-1]}" for row in table(records) if row[-1] != "-"]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(records: Sequence[Record]) -> str:
    """A report: machine, table of times, the default allocator's ratios, resident memory."""
    reuse = [r for r in records if r.allocator == "reuse"]
    default = [r for r in records if r.allocator == "default"]
    commits = dict.fromkeys(r.commit for r in records)
    machines = [", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records]
    about = "; ".join(dict.fromkeys(machines))
    parts = [
        "# Benchmark", f"Commit {', '.join(commits)}; {about}.",
        "Median [quartiles] of interleaved rounds; freed memory is reused on all sides; errors are "
        "against fp64. A provider whose error is too large is marked WRONG and gets no ratio.",
        markdown_table(COLUMNS, table(reuse)),
    ]
    fused = [r for r in reuse if r.provider == "fused"]
    bandwidths = sorted({(r.output_bytes, r.copy_bandwidth) for r in fused})
    copied = ", ".join(f"{b / 1e9:.1f} GB/s at {size / 1e6:.1f} MB" for size, b in bandwidths)
    parts.append(
        f"Copy bandwidth by size of the output, reads and writes: {copied}. A share above 100 % is "
        "no error: a copy pays for reading each line that it overwrites, which is not counted, and "
        "has one such line for every one it reads; ops that read more than they write have fewer."
    )
    compiled = [r for r in reuse if r.compile_seconds is not None]
    if compiled:
        times = ", ".join(f"{r.group} {r.compile_seconds:.1f} s" for r in compiled)
        parts.append(f"Compile time, first call included: {times}.")
    resident = [r for r in reuse if r.resident_memory is not None]
    if resident:
        memory = [(r.group, r.provider, f"{r.peak_memory / 1e6:.1f}",
                   f"{(r.resident_memory or 0) / 1e6:.1f}") for r in resident]
        parts += ["## Peak memory, confirmed by the resident size of a fresh process",
                  markdown_table(("case", "provider", "allocations, MB", "resident, MB"),
                                  memory)]
    counted = [r for r in fused if r.windows]
    if counted:
        lines = [
            (r.group, name, str(v), str(u), f"{v / pixels:.1%}", f"{u / pixels:.1%}",
             duration(r.maps.get(name, r.median)))
            for r in counted for name, (v, u, pixels) in r.windows.items()
        ]
        parts += ["## Maps: distinct 3x3 (V) and 5x5 (U) windows at the full size",
                  markdown_table(("case", "map", "V", "U", "of pixels", "of pixels", "fused"),
                                  lines)]
    if default:
        rows = [
            (group, *(_provider_cell(case, n) for n in PROVIDERS), times_text(speedup(case)))
            for (group, *_), case in by_case(default).items()
        ]
        parts += ["## Under the default allocator",
                  markdown_table(("case", *PROVIDERS, "x reference"), rows)]
    return "\n\n".join(parts) + "\n"


def plots(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """``times.png`` and ``memory.png`` in ``folder``, as shares of the reference."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {
        key: rows for key, rows in by_case(records).items()
        if key[3] == "reuse" and "reference" in rows
    }
    written = []
    for file, title, value in (
        ("times.png", "time, reference = 1", lambda r: r.median),
        ("memory.png", "peak memory, reference = 1", lambda r: r.peak_memory),
    ):
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.7 * len(cases)), layout="constrained")
        for k, name in enumerate(PROVIDERS):
            places, lengths = [], []
            for i, rows in enumerate(cases.values()):
                if name in rows and rows[name].correct and value(rows["reference"]):
                    places.append(i + 0.2 * k)
                    lengths.append(value(rows[name]) / value(rows["reference"]))
            if places:
                axes.barh(places, lengths, 0.18, label=name, color=f"C{k}")
        axes.set_yticks([i + 0.3 for i in range(len(cases))], [key[0] for key in cases])
        axes.invert_yaxis()
        axes.set_xlabel(title)
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        pyplot.close(figure)
        written.append(write_atomically(Path(folder) / file, buffer.getvalue()))
    return written
