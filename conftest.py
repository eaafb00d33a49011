"""Every test starts from the same random state; examples of docstrings run in an empty folder."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the processors: more threads make small tests ten times slower. It is read as
    # numpy's BLAS and torch load, so it comes first; tests of what threads change set their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Half of the tests each, then what another has left: files share their fixtures, and no
    process is left alone with the slow tests at the end."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
