"""Every test starts from the same random state; examples of docstrings run in an empty folder."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
