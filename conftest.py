"""Every test starts from the same random state; examples of docstrings run in an empty folder."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the processors: more threads make small tests ten times slower. OpenMP reads it
    # as torch loads; tests of what threads change set their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
