"""``--plan``: what each of several calls of the command has time for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .driver import grouped
from .parts import BY_NAME, PARTS

CALLS = 3


def measured_seconds(results: Mapping[str, Any]) -> dict[str, float]:
    """Seconds that each finished part took, over all calls; of a part of every call, the last's."""
    found: dict[str, float] = {}
    for call in results.get("calls", []):
        for name, seconds in call["seconds"].items():
            found[name] = seconds + (0.0 if BY_NAME[name].again else found.get(name, 0.0))
    parts = results.get("parts", {})
    return {name: seconds for name, seconds in found.items()
            if parts.get(name, {}).get("state") == "done"}


def plan(budget: float, results: Mapping[str, Any], calls: int = CALLS
         ) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Seconds of each part in each call, and of the parts that no call has time for.

    Parts go in their order, those of a group at the same time; what a call does not finish the
    next one goes on with, row by row.
    """
    known = measured_seconds(results)
    rest = {part.name: part.seconds for part in PARTS
            if results.get("parts", {}).get(part.name, {}).get("state") != "done"}
    found = []
    for _ in range(calls):
        left, call = budget, {}
        for group in grouped(PARTS):
            taken = 0.0
            for part in group:
                wanted = (known.get(part.name, part.seconds) if part.again
                          else rest.get(part.name, 0.0))
                given = min(wanted, left)
                if given > 0:
                    call[part.name] = given
                    taken = max(taken, given)
                    if not part.again:
                        rest[part.name] = wanted - given
            left -= taken
        found.append(call)
    return found, {name: seconds for name, seconds in rest.items()
                   if seconds > 0 and not BY_NAME[name].again}


def text(budget: float, results: Mapping[str, Any], commit: str, source: str | None) -> str:
    """The plan and the command of each call."""
    known = measured_seconds(results)
    found, rest = plan(budget, results)
    lines = [f"{len(found)} calls of {budget:.0f} s; parts with * took so long before, "
             "the others are estimates"]
    for i, call in enumerate(found):
        parts = ", ".join(f"{name}{'*' if name in known else ''} {seconds:.0f} s"
                          for name, seconds in call.items())
        earlier = (f" --from {source}" if i == 0 and source else
                   " --from RESULTS.json" if i else "")
        lines += [f"call {i + 1}: {parts}",
                  f"  python -m benchmarks.gpu --commit {commit} --out OUT{earlier}"]
    lines.append("RESULTS.json is the file that the call before left in OUT; it carries its rows "
                 "and the tuned settings.")
    if rest:
        lines.append("no time is left for: "
                     + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in rest.items()))
    return "\n".join(lines)
