"""pytest-benchmark over :mod:`smis_models.benchmark`: one interleaved run per case."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smis_models import benchmark as harness
from smis_models.benchmark.records import Record
from smis_models.io.allocator import reuse_freed_memory


class ReplayClock:
    """A timer that returns, start and end in turn, times that were measured before.

    All providers of a case are timed in one rotating run; each test then hands its provider's
    times to pytest-benchmark through this clock, so its statistics and JSON are of that run.
    """

    def __init__(self) -> None:
        self._readings: deque[float] = deque()

    def load(self, times: list[float]) -> None:
        """The times to be returned, each once."""
        now = 0.0
        for seconds in times:
            self._readings += (now, now + seconds)
            now += seconds

    def __call__(self) -> float:
        return self._readings.popleft() if self._readings else time.perf_counter()


CLOCK = ReplayClock()


def pytest_configure(config: pytest.Config) -> None:
    reuse_freed_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--maps", help="folder of label maps to use instead of the sample scenes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # A file's own CASES or those of all sets; each test is one provider of a case on one setting.
    if "measured" not in metafunc.fixturenames:
        return
    places = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        places += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    metafunc.parametrize("measured", [
        pytest.param((case, provider.name, device, dtype),
                     id=f"{case.group}-{provider.name}-{device}-{str(dtype)[6:]}")
        for case in getattr(metafunc.module, "CASES", None) or harness.cases("all")
        for device, dtype in places
        for provider in case.providers
    ], indirect=True)


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest) -> Callable[..., dict[str, Record]]:
    maps = harness.Maps(request.config.getoption("--maps"))
    known: dict[tuple[str, str, torch.dtype], dict[str, Record]] = {}

    def get(case: harness.Case, device: str, dtype: torch.dtype) -> dict[str, Record]:
        key = (case.group, device, dtype)
        if key not in known:
            setting = harness.Setting(torch.device(device), dtype, maps)
            known[key] = {r.provider: r for r in harness.measure(case, setting)}
        return known[key]

    return get


@pytest.fixture
def measured(request: pytest.FixtureRequest, records: Callable[..., dict[str, Record]],
             benchmark: Any) -> Record:
    """The record of one provider, handed to pytest-benchmark."""
    case, provider, device, dtype = request.param
    record = records(case, device, dtype)[provider]
    benchmark.group = record.group
    benchmark.extra_info.update(record.extra_info())
    CLOCK.load(record.times)
    benchmark.pedantic(lambda: None, rounds=len(record.times), iterations=1)
    return record
