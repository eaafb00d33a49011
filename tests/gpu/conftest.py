"""GPU tests: skipped, with the reason, where there is no GPU; TRITON_INTERPRET=1 rehearses them.

Under Triton's interpreter (``python -m benchmarks.gpu --dry-run``) the same tests run on CPU
tensors: Triton kernels interpreted, CUDA ones replaced by the CPU's C++. That proves the tests.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from smis_kernels.runtime.backend import triton_interpreted

REHEARSED = triton_interpreted()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.gpu)
        only = item.get_closest_marker("cuda_only") is not None
        if REHEARSED and not only and importlib.util.find_spec("triton") is not None:
            continue
        if REHEARSED:
            item.add_marker(pytest.mark.skip(reason="rehearsal: needs a GPU"))
        elif not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU; TRITON_INTERPRET=1 rehearses it"))


@pytest.fixture
def device() -> str:
    return "cpu" if REHEARSED else "cuda"


@pytest.fixture(autouse=True)
def exact_products():
    """Products in full float32, so that the references are not the less accurate side."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul
