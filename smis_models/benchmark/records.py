"""Records in pytest-benchmark's JSON form, and the tables and plots made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
    graph: bool = False
    """Replayed from a CUDA graph."""
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


def ours(records: Iterable[Record]) -> list[Record]:
    """The records of our kernels, in whatever form."""
    return [r for r in records if r.provider.startswith("fused")]


def _fastest(rows: dict[str, Record], name: str) -> Record | None:
    """The fastest right one of a provider's memory formats; "best" and "eager": of baselines."""
    formats = {"best": tuple(n for n in rows if not n.startswith("fused")),
               "eager": _BASELINES[:2]}.get(
        name, (name, f"{name} channels_last"))
    right = [rows[n] for n in formats if n in rows and rows[n].correct]
    return min(right, key=lambda r: r.median, default=None)


def speedup(rows: dict[str, Record], baseline: str = "reference", *, slowest: bool = False,
            provider: str = "fused") -> float | None:
    """Fused over a baseline; None where a check against fp64 failed."""
    found, against = _fastest(rows, provider), _fastest(rows, baseline)
    if found is None or against is None:
        return None
    return against.median / (found.slowest if slowest else found.median)


def copy_share(record: Record) -> float:
    """The bytes that must move over the time it took, as a share of the copy bandwidth."""
    return record.bytes / record.median / record.copy_bandwidth


def floor_share(record: Record) -> float | None:
    """The bound's time, or that of a streaming op's bytes, as a share of the time it took."""
    if record.bound is not None:
        return record.bound / record.maps.get("map 0", record.median)
    return copy_share(record) if record.memory_bound else None


def scratch_share(record: Record) -> float:
    """Peak memory beyond the outputs, as a share of the outputs."""
    return max(0, record.peak_memory - record.output_bytes) / max(1, record.output_bytes)


Check = tuple[str, float | None, float, bool]


def checks(rows: dict[str, Record]) -> list[Check]:
    """(what, measured, target, reached) for each target of the case.

    Targets are "[PROVIDER: ]WHAT": "copy" and "floor" are least shares of a copy's rate and of the
    bound's, "scratch" a largest share of the output's bytes, "memory" and "memory PROVIDER" one of
    another's peak, by default the reference's. Any other WHAT names what must be so many times
    slower: a provider, "best" or "eager" for the fastest baselines, "slowest" for the reference
    over the slowest map.
    """
    any_row = rows.get("fused") or next(iter(ours(rows.values())), None)
    found: list[Check] = []
    for target, wanted in {} if any_row is None else any_row.targets.items():
        provider, _, what = target.rpartition(": ")
        value = _figure(rows, provider or "fused", what)
        most = what.startswith(("scratch", "memory"))
        reached = value is not None and (value <= wanted if most else value >= wanted)
        found.append((target, value, wanted, reached))
    return found


def _figure(rows: dict[str, Record], provider: str, what: str) -> float | None:
    kind, _, against = what.partition(" ")
    if kind == "memory":
        own, other = ([rows[n].peak_memory for n in (name, f"{name} channels_last") if n in rows]
                      for name in (provider, against or "reference"))
        return min(own) / max(1, min(other)) if own and other else None
    if kind not in ("copy", "floor", "scratch"):
        return speedup(rows, "reference" if what == "slowest" else what,
                       slowest=what == "slowest", provider=provider)
    found = _fastest(rows, provider)
    if kind == "scratch":
        return None if provider not in rows else scratch_share(rows[provider])
    return None if found is None else copy_share(found) if kind == "copy" else floor_share(found)


def duration(seconds: float) -> str:
    """The time in s, ms or µs, as text."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def times_text(value: float | None) -> str:
    """A ratio, such as 2.31x: three digits."""
    return "-" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}x"


def check_text(target: str, value: float | None, wanted: float, reached: bool) -> str:
    """A target in words, its figure and whether it was reached."""
    sign = "reached" if reached else "MISSED"
    provider, _, what = target.rpartition(": ")
    kind, _, against = what.partition(" ")
    share = "-" if value is None else f"{value:.1%}"
    if kind == "memory":
        text = f"peak <= {wanted:.0%} of {against or 'reference'}: {share}"
    elif kind == "scratch":
        text = f"scratch <= {wanted:.0%} of output: {share}"
    elif kind in ("copy", "floor"):
        text = f">= {wanted:.0%} of {kind}: {share}"
    else:
        names = {"best": "best baseline", "slowest": "reference, slowest map"}
        text = f">= {wanted:g}x {names.get(what, what)}: {times_text(value)}"
    return f"{provider + ': ' if provider else ''}{text} {sign}"


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
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
            group + place, *(_cell(rows.get(name)) for name in PROVIDERS),
            duration(fused.slowest) if fused is not None and fused.maps else "-",
            f"{duration(fused.bound)} ({floor_share(fused):.0%})"
            if fused is not None and fused.bound else "-",
            times_text(speedup(rows)), times_text(speedup(rows, "best")), share, peak, error,
            "; ".join(check_text(*check) for check in checks(rows)) or "-",
        ))
    return lines


FORMS = ("case", "provider", "median [quartiles]", "x first", "of floor", "images/s", "peak MB",
         "error", "")


def forms(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of :data:`FORMS`: every provider of the cases that have more forms than columns."""
    lines: list[tuple[str, ...]] = []
    for (group, *_), rows in by_case(records).items():
        if set(rows) <= set(PROVIDERS) and not any(r.graph for r in rows.values()):
            continue
        first = next(iter(rows.values()))
        for name, r in rows.items():
            share = floor_share(r)
            lines.append((
                group, name, _cell(r), times_text(first.median / r.median if r.correct else None),
                "-" if share is None else f"{share:.0%}", f"{r.shape[0] / r.median:.3g}",
                f"{r.peak_memory / 1e6:.1f}", f"{r.max_rel_error:.1e}",
                "CUDA graph" if r.graph else ""))
    return lines


SLOWER = LARGER = 1.1  # times the median (and outside both quartiles), times the peak memory


def regressions(records: Sequence[Record], earlier: Sequence[Record]) -> dict[tuple[str, str], str]:
    """(group, provider) -> what of ours is slower, larger or wrong where it was better before."""
    def key(r: Record) -> tuple[str, ...]:
        return r.group, r.provider, r.device, r.dtype, r.allocator

    before, found = {key(r): r for r in ours(earlier)}, {}
    for now in ours(records):
        then = before.get(key(now))
        if then is None:
            continue
        worse = []
        if then.correct and not now.correct:
            worse.append(f"wrong: error {then.max_rel_error:.1e} -> {now.max_rel_error:.1e}")
        ratio = now.median / then.median
        if ratio >= SLOWER and now.quartiles[0] > then.quartiles[1]:
            worse.append(f"slower: {duration(then.median)} -> {duration(now.median)} "
                         f"({ratio:.2f}x)")
        if now.peak_memory > LARGER * then.peak_memory:
            worse.append(f"more memory: {then.peak_memory / 1e6:.1f} -> "
                         f"{now.peak_memory / 1e6:.1f} MB")
        if worse:
            found[now.group, now.provider] = "; ".join(worse)
    return found


SUMMARY = ("case", "reference", "fused", "x ref.", "x best", "of copy")


def summary(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of :data:`SUMMARY`: what fits a terminal of :func:`table`'s rows."""
    picked: list[tuple[str, ...]] = []
    for row in table(records):
        cells = dict(zip(COLUMNS, row, strict=True))
        reference, fused = (cells[name].partition(" [")[0] for name in ("reference", "fused"))
        fused += " WRONG" if "WRONG" in cells["fused"] else ""
        picked.append((cells["case"].removesuffix("/forward"), reference, fused,
                       cells["x reference"], cells["x best baseline"], cells["of copy"]))
    return picked


def target_lines(records: Sequence[Record]) -> list[str]:
    """One line per case that has targets."""
    return [f"{row[0]}: {row[-1]}" for row in table(records) if row[-1] != "-"]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |"
                     for line in lines)


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
    sections: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
        "Peak memory, confirmed by the resident size of a fresh process": (
            ("case", "provider", "allocations, MB", "resident, MB"),
            [(r.group, r.provider, f"{r.peak_memory / 1e6:.1f}", f"{r.resident_memory / 1e6:.1f}")
             for r in reuse if r.resident_memory is not None]),
        "Maps: distinct 3x3 (V) and 5x5 (U) windows at the full size": (
            ("case", "map", "V", "U", "of pixels", "of pixels", "fused"),
            [(r.group, name, str(v), str(u), f"{v / pixels:.1%}", f"{u / pixels:.1%}",
              duration(r.maps.get(name, r.median)))
             for r in fused for name, (v, u, pixels) in r.windows.items()]),
        "Every provider": (FORMS, forms(reuse)),
        "Under the default allocator": (
            ("case", *PROVIDERS, "x reference"),
            [(group, *(_cell(case.get(n)) for n in PROVIDERS), times_text(speedup(case)))
             for (group, *_), case in by_case(default).items()]),
    }
    for title, (head, rows) in sections.items():
        if rows:
            parts += [f"## {title}", markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


def plots(records: Sequence[Record], folder: str | Path, prefix: str = "") -> list[Path]:
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
        written.append(write_atomically(Path(folder) / f"{prefix}{file}", buffer.getvalue()))
    return written
