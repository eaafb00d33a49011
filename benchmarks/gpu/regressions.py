"""What is slower, larger, wrong or failed where earlier results of the machine were better."""

from __future__ import annotations

from typing import Any

from .targets import Parts

SLOWER = 1.1  # times the median, and outside both quartiles
LARGER = 1.1  # times the peak memory
Place = tuple[str, str, str]  # part, row, provider ("" for the row)


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _worse(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    if "median" not in now:
        return [f"failed: {now['failed']}"] if "failed" in now else []
    found = []
    if then["correct"] and not now["correct"]:
        found.append(f"wrong: error {then['error']:.1e} -> {now['error']:.1e}")
    ratio = now["median"] / then["median"]
    if ratio >= SLOWER and now["q1"] > then["q3"]:
        found.append(
            f"slower: {duration(then['median'])} -> {duration(now['median'])} ({ratio:.2f}x)")
    if now["peak_bytes"] > LARGER * then["peak_bytes"]:
        found.append(f"more memory: {then['peak_bytes'] / 1e6:.1f} -> "
                     f"{now['peak_bytes'] / 1e6:.1f} MB")
    return found


def regressions(parts: Parts, earlier: Parts) -> dict[Place, str]:
    """Rows that no longer end well, and providers of ours that do worse than in earlier results."""
    found: dict[Place, str] = {}
    for name, part in parts.items():
        before = {row["name"]: row for row in earlier.get(name, {}).get("rows", [])}
        for row in part["rows"]:
            old = before.get(row["name"], {})
            if row["state"] == "failed" and old.get("state") == "done":
                found[name, row["name"], ""] = f"failed: {row.get('reason', '')}"
            for provider, now in row.get("providers", {}).items():
                then = old.get("providers", {}).get(provider, {})
                if provider.startswith("ours") and "median" in then:
                    worse = "; ".join(_worse(now, then))
                    if worse:
                        found[name, row["name"], provider] = worse
    return found
