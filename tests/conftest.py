"""Tests that need Triton run on a GPU or under its interpreter; elsewhere they say why not.

SMIS_CUDA_EMULATED=1 runs the CUDA kernels on the CPU (cuda_on_cpu/); SMIS_REQUIRE=cpu,triton,...
ends the run where one of these is missing, instead of skipping its tests (require.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Workers share the processors: a thread that waits by spinning keeps those of others from ending.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read where torch is imported

import pytest
import torch
from require import unmet

from smis_kernels.acceleration.swap import at_any_size
from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.runtime.native import cuda_emulated

if triton_interpreted() and missing("triton") is None:
    from interpreted import look_once

    look_once()
if cuda_emulated():
    from cuda_on_cpu.plugin import no_findings, pytest_terminal_summary  # noqa: F401


@pytest.fixture(autouse=True)
def fused_at_any_size() -> Iterator[None]:
    """Small inputs take the fused forms of ``accelerate``, too."""
    with at_any_size():
        yield


@pytest.fixture
def totals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(steps that were told, steps that were taken) of each of the commands' progress bars."""
    from smis_models import cli

    found: list[tuple[int, int]] = []

    @contextmanager
    def progress(total: int | None) -> Iterator[cli.common.Steps]:
        step = cli.common.Steps(total, None)
        yield step
        found.append((step._total, step._count))

    for module in (cli.apply, cli.data, cli.evaluate, cli.measure, cli.synthesis):
        monkeypatch.setattr(module, "progress", progress)
    return found


def pytest_sessionstart() -> None:
    if problems := unmet(os.environ.get("SMIS_REQUIRE", "")):
        raise pytest.UsageError("\n".join(problems))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing("triton")
    if reason is None and not (torch.cuda.is_available() or triton_interpreted()):
        reason = "no GPU; run again with TRITON_INTERPRET=1"
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if item.get_closest_marker("triton"):
            item.add_marker(skip)
