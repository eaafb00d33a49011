"""What must be reached on an H200, row by row, and whether it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Parts = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure: ``kind`` of a provider of a row, against another.

    Kinds: "times" (how many times as fast), "memory" (share of the other's peak), "floor" (share of
    the row's floor: bytes over the copy bandwidth, or operations over the matrix rate, of the run).
    ``provider`` and ``against`` are beginnings of names; the fastest match counts.
    """

    part: str
    row: str
    provider: str
    kind: str
    value: float
    against: str = ""

    @property
    def text(self) -> str:
        """The demand in words."""
        if self.kind == "times":
            return f">= {self.value:g}x {self.against}"
        if self.kind == "memory":
            return f"peak <= {self.value:.0%} of {self.against}"
        return f">= {self.value:.0%} of its floor's rate"


def _networks() -> list[Target]:
    found = []
    for row, eager, against_compiled in (
        ("groupdnet_deepfashion batch 1", 6, 2.5), ("groupdnet_ade20k batch 1", 10, 4),
        ("spade_coco batch 1", 8, 3), ("spade_coco batch 16", 5, 3),
        ("ccfpse_coco batch 4", 4, 1.3),
    ):
        found += [
            Target("networks", row, "ours, graph", "times", eager, "reference fp32"),
            Target("networks", f"{row} compiled", "ours, graph", "times", against_compiled,
                   "compiled"),
        ]
    return found


TARGETS = [
    Target("operations", "modulation", "ours", "floor", 0.85),
    Target("operations", "modulation", "ours", "times", 1.0, "compiled"),
    Target("operations", "modulation", "ours indexed", "floor", 0.85),
    Target("operations", "modulation", "ours indexed", "times", 1.5, "compiled"),
    Target("operations", "SPADE layer", "ours", "times", 15, "reference"),
    Target("operations", "SPADE layer", "ours", "times", 6, "compiled"),
    Target("operations", "spatially_varying_conv2d", "ours", "floor", 0.8),
    Target("operations", "spatially_varying_conv2d", "ours", "times", 5, "reference"),
    Target("operations", "conditional_conv2d", "ours", "times", 1.2, "compiled"),
    Target("operations", "conditional_conv2d", "ours", "memory", 0.1, "reference"),
    Target("operations", "conditional_conv2d", "ours", "memory", 0.1, "compiled"),
    Target("operations", "conditional_conv2d", "ours", "floor", 0.6),
    Target("operations", "instance_avg_pool2d", "ours", "floor", 0.75),
    Target("operations", "instance_avg_pool2d", "ours", "times", 300, "reference"),
    Target("operations", "instance_avg_pool2d", "ours", "times", 5, "index_add"),
    Target("operations", "class_crops", "ours", "times", 200, "reference"),
    *_networks(),
    Target("networks", "ccfpse_coco batch 4", "ours", "memory", 0.25, "reference bf16"),
    *(Target("training", f"{name} batch 8 step", "ours", kind, value, "reference")
      for name in ("groupdnet_deepfashion", "spade_coco")
      for kind, value in (("times", 2.5), ("memory", 0.6))),
]
# "ours" must not be satisfied by a form that does less work.
EXCLUDED = {"ours": ("ours indexed", "ours, tables kept", "ours, layout in the call", "ours fp32")}


def row_of(parts: Parts, part: str, name: str) -> dict[str, Any] | None:
    """A measured row."""
    for row in parts.get(part, {}).get("rows", []):
        if row["name"] == name and "providers" in row:
            found: dict[str, Any] = row
            return found
    return None


def matching(row: dict[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """Timed providers whose names begin so."""
    excluded = EXCLUDED.get(prefix, ())
    return {name: entry for name, entry in row["providers"].items()
            if name.startswith(prefix) and "median" in entry and not name.startswith(excluded)}


def floor_share(row: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """The floor's seconds over the time taken."""
    seconds = entry.get("floor_seconds", row.get("floor", {}).get("seconds"))
    return None if seconds is None else seconds / entry["median"]


def measured(parts: Parts, target: Target) -> tuple[float | None, str]:
    """The figure, or None and why there is none."""
    row = row_of(parts, target.part, target.row)
    if row is None:
        return None, "not measured"
    ours = matching(row, target.provider)
    if target.kind != "memory":
        wrong = [name for name, entry in ours.items() if not entry["correct"]]
        ours = {name: entry for name, entry in ours.items() if entry["correct"]}
        if not ours:
            return None, "fails its check against fp64" if wrong else "not measured"
    if not ours:
        return None, "not measured"
    if target.kind == "floor":
        return max(floor_share(row, entry) or 0.0 for entry in ours.values()), ""
    others = matching(row, target.against)
    if not others:
        why = [entry.get("skipped") or entry["failed"] for name, entry in row["providers"].items()
               if name.startswith(target.against) and "median" not in entry]
        return None, why[0] if why else f"no {target.against}"
    if target.kind == "memory":
        least = min(entry["peak_bytes"] for entry in ours.values())
        return least / min(entry["peak_bytes"] for entry in others.values()), ""
    fastest = min(entry["median"] for entry in others.values())
    return fastest / min(entry["median"] for entry in ours.values()), ""


def accuracy(parts: Parts) -> tuple[int, int]:
    """How many providers of ours are within their bound against fp64, of how many."""
    judged = [entry["correct"] for part in parts.values() for row in part["rows"]
              for name, entry in row.get("providers", {}).items()
              if name.startswith("ours") and "allowed" in entry]
    return sum(judged), len(judged)


def reached(target: Target, value: float) -> bool:
    """Whether a figure meets its target."""
    return value <= target.value if target.kind == "memory" else value >= target.value


def figure(target: Target, value: float) -> str:
    """A figure as text."""
    return f"{value:.2f}x" if target.kind == "times" else f"{value:.1%}"
