"""Under SMIS_CUDA_EMULATED=1: loads the emulation, holds host waits, and fails on any finding.

``SMIS_EMULATION`` chooses plain, race or asan, ``SMIS_EMULATION_SEED`` the schedule.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_on_cpu import emulator

from smis_kernels.runtime import native
from smis_kernels.runtime.library import RawOp

MODE = os.environ.get("SMIS_EMULATION", "plain")
SEED = int(os.environ.get("SMIS_EMULATION_SEED", "1"))
# The size of what these return depends on the data.
WAITS = {"instance_means": 1, "number_windows": 1, "number_vectors": 1}
CALLS: Counter[str] = Counter()

_LIBRARY = emulator.make(MODE)
native.load_emulated(_LIBRARY)
DEVICE = emulator.Device(_LIBRARY)
_call = RawOp.__call__


class _Redirection:
    """Whether calls of a CPU kernel run the CUDA kernel of that name: the tests of the ops."""

    on = False


def _counted(self: RawOp, backend: str, *args: Any) -> Any:
    if backend == "cpu" and _Redirection.on and type(args[0]) is torch.Tensor and (
            torch._C._dispatch_has_kernel_for_dispatch_key(f"smis_kernels::{self.name}", "CUDA")):
        backend = "cuda"
    before = DEVICE.waits
    result = _call(self, backend, *args)
    if backend == "cuda":
        CALLS[self.name] += 1
        waits, allowed = DEVICE.waits - before, WAITS.get(self.name, 0)
        assert waits <= allowed, f"{self.name} waits {waits} times, {allowed} are allowed"
    return result


RawOp.__call__ = _counted  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def no_findings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts with the session's schedule and ends with nothing found."""
    DEVICE.set(preempt=0.1, preempt_plain=0.02 if MODE == "race" else 0, resident=3, grid_x=1e18,
               grid_y=1e18, most_steps=1e9, seed=SEED)
    DEVICE.findings()
    _Redirection.on = request.path.parent.name == "tests"
    yield
    _Redirection.on = False
    found = DEVICE.findings()
    assert not found, "\n".join(map(str, found))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    say = terminalreporter.write_line
    kernels = DEVICE.kernels()
    say(f"emulation, {MODE}, schedule {SEED}: {sum(CALLS.values())} calls of ops, "
        f"{sum(k[0] for k in kernels.values())} launches, "
        f"{sum(k[2] for k in kernels.values())} threads")
    say("  calls: " + ", ".join(f"{name} {count}" for name, count in sorted(CALLS.items())))
    say("  launches: " + ", ".join(f"{name} {k[0]}" for name, k in kernels.items()))
