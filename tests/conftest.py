"""Tests that need Triton run on a GPU or under its interpreter; elsewhere they say why not."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from smis_kernels.runtime.backend import triton_interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif not (torch.cuda.is_available() or triton_interpreted()):
        reason = "no GPU; run again with TRITON_INTERPRET=1"
    else:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if "triton" in item.keywords:
            item.add_marker(skip)
