"""Fused kernels for semantic image synthesis: drop-in, exact, a plain reference beside each."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    raise ImportError(
        "smis_kernels needs PyTorch, which is not installed; "
        "cure: pip install torch && python -m smis_kernels.build",
        name="smis_kernels",
    ) from None

from ._backend import BackendError, use_backend
from ._explain import Explanation, explain
from .modulation.module import SPADE, CGNorm, modulate_pair
from .modulation.op import modulation, modulation_pair

__version__ = "0.1.0"

__all__ = [
    "SPADE",
    "BackendError",
    "CGNorm",
    "Explanation",
    "explain",
    "modulate_pair",
    "modulation",
    "modulation_pair",
    "use_backend",
]
