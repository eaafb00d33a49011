"""The parts of the command, in order, with the time that each may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process of the command.

    Attributes:
        name: on the command line and in the results.
        seconds: its share of the time; what parts leave over, the next ones get.
        group: parts of one group run at the same time; None: alone, since it is timed.
        about: one line for ``--help``.
        again: run by every call, on whatever machine it finds.
        fatal: the whole run stops where it fails.
        function: what runs it, "module:function"; default: ``run`` of ``benchmarks/gpu/<name>.py``.
    """

    name: str
    seconds: float
    about: str
    group: str | None = None
    again: bool = False
    fatal: bool = False
    function: str = ""

    @property
    def target(self) -> str:
        """The function's place, "module:function"."""
        return self.function or f"benchmarks.gpu.{self.name}:run"


PARTS = (
    Part("device", 20, "what the machine is: GPU, driver, versions, tools", again=True,
         fatal=True),
    Part("build", 100, "compile and load the native libraries", again=True),
    Part("correctness", 100, "tests/gpu and the Triton tests on the GPU", "check"),
    Part("sanitizer", 100, "compute-sanitizer on a small run of every kernel", "check"),
    Part("parity", 100, "the goldens of the published networks, with --parity", "check"),
    Part("rates", 15, "copy bandwidth, matrix rates, launch cost"),
    Part("tune", 50, "launch settings and path rates, measured and written for the package"),
    Part("operations", 80, "every op against its reference and torch.compile, beside its floor"),
    Part("networks", 240, "generators: eager, compiled, ours, CUDA graphs, batch sizes"),
    Part("training", 60, "training steps: time and memory"),
)
BY_NAME = {part.name: part for part in PARTS}
TOTAL_SECONDS = 470.0
