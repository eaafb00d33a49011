"""Plots of a GPU's records: roofline, and images a second against batch size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from smis_models.benchmark.records import Record, by_case, floor_share, ours


def _save(figure: Any, path: Path) -> Path:
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    partial.replace(path)
    return path


def roofline(records: Sequence[Record], path: Path) -> Path | None:
    """Every op with a floor: its rate over its intensity, under the rates of the same run."""
    rows = [max(found, key=lambda r: floor_share(r) or 0.0)
            for rows in by_case(records).values()
            if (found := [r for r in ours(rows.values()) if r.correct and floor_share(r)])]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    copy = max(r.copy_bandwidth for r in rows)
    matrix = max((2 * r.macs / r.bound for r in rows if r.bound and r.macs), default=0.0)
    for i, r in enumerate(rows):
        # ops that multiply little are drawn by their bytes: one operation for each
        operations = 2 * r.macs if r.bound else r.bytes
        axes.loglog(operations / r.bytes, operations / r.median, "ox"[i // 10 % 2],
                    color=f"C{i % 10}", label=r.group)
    low, high = axes.get_xlim()
    grid = [low, high] if not matrix else sorted([low, matrix / copy, high])
    roof = [min(copy * x, matrix) if matrix else copy * x for x in grid]
    axes.loglog(grid, roof, "k-", label=f"copy {copy / 1e12:.2f} TB/s"
                + (f", matrix {matrix / 1e12:.0f} TFLOP/s" if matrix else ""))
    axes.set_xlabel("operations a byte (1: counted by bytes)")
    axes.set_ylabel("operations a second")
    axes.legend(fontsize="small")
    return _save(figure, path)


def batches(records: Sequence[Record], path: Path) -> Path | None:
    """Images a second of one generator against batch size."""
    points: dict[str, dict[int, float]] = {}
    for r in records:
        if r.correct and re.match(r"spade_coco/(rate_)?batch_", r.group):
            points.setdefault(r.provider, {})[r.shape[0]] = r.shape[0] / r.median
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
