"""The parts of the command, in order, with the time that each may take, and the plan of calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CALLS = 3


@dataclass(frozen=True)
class Part:
    """One process of the command.

    Attributes:
        name: on the command line and in the results.
        seconds: its share of the time; what parts leave over, the next ones get.
        about: one line for ``--help``.
        target: what runs it, "module:function".
        again: run by every call, on whatever machine it finds.
        fatal: the whole run stops where it fails.
    """

    name: str
    seconds: float
    about: str
    target: str
    again: bool = False
    fatal: bool = False


PARTS = (
    Part("device", 20, "what the machine is: GPU, driver, versions, tools",
         "benchmarks.gpu.machine:device", again=True, fatal=True),
    Part("build", 100, "compile and load the native libraries", "benchmarks.gpu.machine:build",
         again=True),
    Part("checks", 100, "tests/gpu, compute-sanitizer on a small run of every kernel, and with "
         "--parity the goldens of the published networks, side by side",
         "benchmarks.gpu.checks:run"),
    Part("rates", 15, "copy bandwidth, matrix rates, launch cost", "benchmarks.gpu.rates:run"),
    Part("tune", 50, "launch settings and path rates, measured and written for the package",
         "benchmarks.gpu.tune:run"),
    Part("operations", 80, "every op against its reference and torch.compile, beside its floor",
         "benchmarks.gpu.timed:operations"),
    Part("networks", 240, "generators: eager, compiled, ours, CUDA graphs, batch sizes",
         "benchmarks.gpu.timed:networks"),
    Part("training", 60, "training steps: time and memory", "benchmarks.gpu.timed:training"),
)
BY_NAME = {part.name: part for part in PARTS}
TOTAL_SECONDS = 470.0


def order(names: Iterable[str]) -> list[Part]:
    """Parts of these names in the order of PARTS, those of every call included."""
    wanted = set(names)
    return [part for part in PARTS if part.name in wanted or part.again]


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

    What a call does not finish the next one goes on with, row by row.
    """
    known = measured_seconds(results)
    rest = {part.name: part.seconds for part in PARTS
            if results.get("parts", {}).get(part.name, {}).get("state") != "done"}
    found = []
    for _ in range(calls):
        left, call = budget, {}
        for part in PARTS:
            wanted = (known.get(part.name, part.seconds) if part.again
                      else rest.get(part.name, 0.0))
            if min(wanted, left) > 0:
                call[part.name] = min(wanted, left)
                left -= call[part.name]
                if not part.again:
                    rest[part.name] -= call[part.name]
        found.append(call)
    return found, {name: seconds for name, seconds in rest.items()
                   if seconds > 0 and not BY_NAME[name].again}


def plan_text(budget: float, results: Mapping[str, Any], commit: str, source: str | None) -> str:
    """The plan and the command of each call."""
    known = measured_seconds(results)
    found, rest = plan(budget, results)
    lines = [f"{len(found)} calls of {budget:.0f} s; parts with * took so long before, "
             "the others are estimates"]
    for i, call in enumerate(found):
        parts = ", ".join(f"{name}{'*' if name in known else ''} {seconds:.0f} s"
                          for name, seconds in call.items())
        earlier = source if i == 0 else "RESULTS.json"
        lines += [f"call {i + 1}: {parts}",
                  f"  python -m benchmarks.gpu --commit {commit} --out OUT"
                  + (f" --from {earlier}" if earlier else "")]
    lines.append("RESULTS.json is the file that the call before left in OUT; it carries its rows "
                 "and the tuned settings.")
    if rest:
        lines.append("no time is left for: "
                     + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in rest.items()))
    return "\n".join(lines)
