"""Which implementation runs: one selector word for every op."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from . import native as _native
from .derivatives import transformed

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT = "SMIS_BACKEND"
# The least compute capability: what Triton supports, and what the CUDA sources are compiled for.
TRITON_LEAST = (8, 0)
CUDA_LEAST = (7, 5)


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


def _validated(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return name


class _Selection:
    # Process-wide on purpose: torch.compile guards a plain attribute, and neither a
    # ContextVar (cannot be traced) nor a thread-local (not guarded, so stale after a change).
    backend: str | None = None
    fallback = True


_selection = _Selection()
_environment = os.environ.get(ENVIRONMENT, "auto")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the block on ``backend`` (process-wide, as torch.backends flags are).

    Example:
        >>> from smis_kernels import InstanceNormAct2d
        >>> with use_backend("reference"):
        ...     y = InstanceNormAct2d(8)(torch.randn(1, 8, 4, 4))
    """
    previous = _selection.backend
    _selection.backend = _validated(backend, "backend")
    try:
        yield
    finally:
        _selection.backend = previous


@contextmanager
def no_fallback() -> Iterator[None]:
    """``auto`` raises :class:`BackendError` where a kernel that the op has is missing.

    For measurements and tests of the kernels: the reference must not pass for one.
    """
    before, _selection.fallback = _selection.fallback, False
    try:
        yield
    finally:
        _selection.fallback = before


def requested(backend: str | None = None) -> str:
    """The backend asked for: the argument, else ``use_backend``, else ``SMIS_BACKEND``."""
    if backend is not None:
        return _validated(backend, "backend")
    return _selection.backend or _validated(_environment, ENVIRONMENT)


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuse_trace(what: str) -> None:
    """Raise under ``torch.jit.trace``: what depends on a call's values would be kept as constants.

    For what reads a map in Python; the trace would give every other map the first one's result.
    """
    if torch._C._get_tracing_state() is not None:
        raise BackendError(
            f"backend: {what} reads the values of its map, which torch.jit.trace would keep for "
            "every other map; use `smis export` or torch.export, or leave it out of what is traced"
        )


@cache
def _refused_by_gpu(kind: str, index: int) -> str | None:
    """Why the GPU ``index`` cannot run ``kind``, with the cure; else None."""
    if not torch.cuda.is_available():  # a fake tensor's device
        return None
    capability = torch.cuda.get_device_capability(index)
    gpu = f"{torch.cuda.get_device_name(index)} has compute capability {_dotted(capability)}"
    if kind == "triton" and capability < TRITON_LEAST:
        return f"{gpu}, triton needs {_dotted(TRITON_LEAST)}; cure: a newer GPU"
    built = _native.build_record().get(kind, {}).get("architectures", "")
    if built and not _native.covers(built, capability):
        cure = (f"TORCH_CUDA_ARCH_LIST={_dotted(capability)} {_native.BUILD_COMMAND}"
                if capability >= CUDA_LEAST else f"a GPU of {_dotted(CUDA_LEAST)} or newer")
        return f"{gpu}, the library is built for {built}; cure: {cure}"
    return None


def _gpu_problem(kind: str, index: int) -> str | None:
    return _refused_by_gpu(kind, index)


# A device's capability stays. torch.compiler.assume_constant_result sets this too, but imports the
# whole compiler, which every process would pay.
_gpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def missing(kind: str, device: torch.device | None = None) -> str | None:
    """Why ``kind`` cannot run in this process, or on this GPU, with the cure; else None."""
    problem = _missing(kind)
    if problem is None and device is not None and device.type == "cuda":
        problem = _gpu_problem(kind, device.index or 0)
    return problem


def _missing(kind: str) -> str | None:
    if kind in ("cpu", "cuda"):
        status = _native.STATUS[kind]
        if status.loaded and not (kind == "cpu" and _native.absent_kernels):
            return None
        if status.loaded:
            return (
                f"the native cpu library is older than the package: it lacks "
                f"{', '.join(_native.absent_kernels)}; cure: {_native.BUILD_COMMAND}"
            )
        return f"the native {kind} library is not loaded: {status.reason}; cure: {status.cure}"
    if kind == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed; cure: pip install triton"
    return _interpreter_fault() if kind == "triton" and triton_interpreted() else None


def _interpreter_fault() -> str | None:
    """Triton 3.6 interprets a loop's bounds by a conversion that NumPy 2.4 took away."""
    found = {name: version(name) for name in ("triton", "numpy")}
    triton, numpy = (tuple(map(int, text.split(".")[:2])) for text in found.values())
    if triton >= (3, 7) or numpy < (2, 4):
        return None
    return (
        f"the interpreter of triton {found['triton']} fails with numpy {found['numpy']}; "
        "cure: pip install 'numpy<2.4', or triton 3.7 and newer"
    )


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def resolve(op: str, tensor: Tensor, backend: str | None, kinds: tuple[str, ...]) -> str:
    """The implementation of ``op`` that runs on ``tensor``: one of ``kinds`` or ``"reference"``.

    ``auto`` takes the op's kernel for the tensor's device, or the reference (with one warning
    that says what is missing; without one where the call is traced, vmapped or differentiated in
    forward mode); an explicit choice runs or raises :class:`BackendError`.
    """
    choice = requested(backend)
    if choice == "reference" or (choice == "auto" and transformed() is not None):
        return "reference"
    if choice == "auto":
        on_cpu = tensor.is_cpu
        for kind in kinds:
            if (kind == "cpu") == on_cpu and (on_cpu or tensor.is_cuda):
                problem = missing(kind, None if on_cpu else tensor.device)
                if problem is None and kind == "cuda" and _native.cuda_emulated():
                    problem = "the cuda library is emulated and takes CPU tensors"
                if problem is None:
                    return kind
                if not _selection.fallback:
                    raise BackendError(f"backend: {op} cannot run its kernel: {problem}")
                if not torch.compiler.is_compiling():
                    _warn_once(f"smis_kernels.{op} runs on the reference path: {problem}")
        return "reference"
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        problem = (f"backend: ONNX has no operator for {choice!r} of {op}; export under "
                   "use_backend('reference') or 'auto'")
        _warn_once(problem)  # the exporter goes on in other ways, and fails with another message
        raise BackendError(problem)
    if torch.compiler.is_compiling() and transformed() is not None:
        raise BackendError(f"backend: {choice!r} of {op} has no part in {transformed()} that is "
                           "compiled; use 'auto' or 'reference'")
    if choice not in kinds:
        raise BackendError(
            f"backend: {op} has {', '.join(('reference', *kinds))}; got {choice!r}"
        )
    device = tensor.device.type
    on_cpu = choice == "cpu" or (choice == "triton" and device == "cpu")
    wanted = "cpu" if on_cpu or (choice == "cuda" and _native.cuda_emulated()) else "cuda"
    if device != wanted:
        raise BackendError(
            f"backend: {choice!r} of {op} needs a {wanted} tensor, got one on {tensor.device}"
        )
    if choice == "triton" and device == "cpu" and not triton_interpreted():
        raise BackendError(
            f"backend: 'triton' of {op} needs a CUDA tensor (or TRITON_INTERPRET=1), got a CPU one"
        )
    problem = missing(choice, tensor.device)
    if problem is not None:
        raise BackendError(f"backend: {choice!r} of {op} cannot run: {problem}")
    return choice
