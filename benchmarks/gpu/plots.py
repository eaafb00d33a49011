"""Plots of the results: roofline, images a second against batch size, peak memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .targets import Parts, floor_share


def _done(parts: Parts, name: str) -> list[dict[str, Any]]:
    return [row for row in parts.get(name, {}).get("rows", [])
            if "providers" in row]


def _ours(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in row["providers"].items()
            if name.startswith("ours") and "median" in entry and entry["correct"]}


def _save(figure: Any, path: Path) -> Path:
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    partial.replace(path)
    return path


def roofline(parts: Parts, path: Path) -> Path | None:
    """Every op with a floor: its rate over its intensity, under the rates of the same run."""
    rows = [row for row in _done(parts, "operations") if "floor" in row and _ours(row)]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    copy = max(row["rates"]["copy"] for row in rows)
    matrix = max(row["rates"].get("matrix", 0.0) for row in rows)
    for i, row in enumerate(rows):
        floor = row["floor"]
        # ops that multiply little are drawn by their bytes: one operation for each
        operations = floor["operations"] or floor["bytes"]
        # by shares, since forms of one row may have floors of their own
        share = max(floor_share(row, entry) or 0.0 for entry in _ours(row).values())
        axes.loglog(operations / floor["bytes"], share * operations / floor["seconds"],
                    "ox"[i // 10 % 2], color=f"C{i % 10}", label=row["name"])
    low, high = axes.get_xlim()
    grid = [low, high] if not matrix else sorted([low, matrix / copy, high])
    roof = [min(copy * x, matrix) if matrix else copy * x for x in grid]
    axes.loglog(grid, roof, "k-", label=f"copy {copy / 1e12:.2f} TB/s"
                + (f", matrix {matrix / 1e12:.0f} TFLOP/s" if matrix else ""))
    axes.set_xlabel("operations a byte (1: counted by bytes)")
    axes.set_ylabel("operations a second")
    axes.legend(fontsize="small")
    return _save(figure, path)


def batches(parts: Parts, path: Path) -> Path | None:
    """Images a second of one generator against batch size."""
    points: dict[str, dict[int, float]] = {}
    for row in _done(parts, "networks"):
        if row.get("model") != "spade_coco" or row["name"].endswith("compiled"):
            continue
        for name, entry in row["providers"].items():
            if "images_per_second" in entry and entry["correct"]:
                points.setdefault(name, {})[row["batch"]] = entry["images_per_second"]
    if not points:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, found in points.items():
        axes.plot(sorted(found), [found[n] for n in sorted(found)], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch size")
    axes.set_ylabel("images a second, SPADE COCO 256x256")
    axes.legend(fontsize="small")
    return _save(figure, path)


def memory(parts: Parts, path: Path) -> Path | None:
    """Peak memory of ours as a share of the first reference's."""
    bars = []
    for part in ("operations", "networks", "training"):
        for row in _done(parts, part):
            base = next((e["peak_bytes"] for n, e in row["providers"].items()
                         if n.startswith("reference") and "peak_bytes" in e), 0)
            ours = _ours(row).get("ours") or next(iter(_ours(row).values()), None)
            if base and ours:
                bars.append((re.sub("_", " ", row["name"]), ours["peak_bytes"] / base))
    if not bars:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes.barh([name for name, _ in bars], [share for _, share in bars])
    axes.axvline(1.0, color="black")
    axes.invert_yaxis()
    axes.set_xlabel("peak memory, reference = 1")
    return _save(figure, path)


def plots(results: dict[str, Any], path: Path) -> list[Path]:
    """The plots that the results have data for, beside ``path``."""
    parts = results["parts"]
    made = [draw(parts, path.with_suffix(f".{name}.png"))
            for name, draw in (("roofline", roofline), ("batches", batches), ("memory", memory))]
    return [each for each in made if each is not None]
