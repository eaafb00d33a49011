"""GPU tests: skipped, with the reason, where there is no GPU; TRITON_INTERPRET=1 rehearses them.

Under Triton's interpreter (``python -m benchmarks.gpu --dry-run``) the same tests run on CPU
tensors: Triton kernels interpreted, CUDA ones replaced by the CPU's C++. That proves the tests.
SMIS_CUDA_EMULATED=1 runs the CUDA kernels themselves (tests/cuda_on_cpu).
"""

from __future__ import annotations

import pytest
import torch

from smis_kernels.runtime.backend import missing, triton_interpreted
from smis_kernels.runtime.native import cuda_emulated

REHEARSED = triton_interpreted() or cuda_emulated()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.gpu)
        only = item.get_closest_marker("cuda_only") is not None
        if REHEARSED and not only and missing("triton") is None:
            continue
        if REHEARSED:
            reason = missing("triton") or "rehearsal: needs a GPU"
            item.add_marker(pytest.mark.skip(reason=reason))
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
