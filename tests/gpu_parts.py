"""Parts that behave badly, for tests of the GPU command's driver."""

from __future__ import annotations

import os
import time

from benchmarks.gpu.results import Journal, Settings, Skip


def _row(value: int) -> dict[str, int]:
    return {"value": value}


def good(journal: Journal, settings: Settings) -> None:
    for i in range(3):
        journal.row(f"row {i}", lambda i=i: _row(i))


def crashing(journal: Journal, settings: Settings) -> None:
    journal.row("before", lambda: _row(1))
    journal.row("crash", lambda: os.abort())
    journal.row("after", lambda: _row(2))


def losing(journal: Journal, settings: Settings) -> None:
    def lose() -> dict[str, int]:
        journal.healthy = lambda: "CUDA error: an illegal memory access was encountered"
        raise RuntimeError("CUDA error")

    journal.row("lost", lose)
    journal.row("after", lambda: _row(2))


def hanging(journal: Journal, settings: Settings) -> None:
    journal.row("before", lambda: _row(1))
    journal.row("hang", lambda: time.sleep(600) or _row(2))


def failing(journal: Journal, settings: Settings) -> None:
    def fail() -> dict[str, int]:
        raise ValueError("x: expected 1, got 2\nsecond line")

    def skip() -> dict[str, int]:
        raise Skip("the tool is absent")

    journal.row("fails", fail)
    journal.row("skips", skip)
    journal.row("after", lambda: _row(3))


def skipped(journal: Journal, settings: Settings) -> None:
    raise Skip("nothing to do here")
