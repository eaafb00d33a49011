"""The one operator library: each op's ``op.py`` defines its schemas here, once."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import native as _native
from .backend import BackendError

NAMESPACE = "smis_kernels"

# The Library object owns the registrations: it must outlive every call.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# Kernels of this key are called on CPU tensors where CUDA is emulated.
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


# How a kernel refuses an argument: its name, what was expected, what came.
_REFUSAL = re.compile(r"\w+: expected .*, got ")
# What is left of torch's own words where a kernel asks it for a tensor in vain.
_NO_MEMORY = re.compile(
    r'torch_call_dispatcher\( "aten::(empty|contiguous|clone)\b.* API call failed')

raw_ops: dict[str, RawOp] = {}


def note_absent_kernels() -> None:
    """Note the ops without a CPU kernel in a loaded library; called once all ops are defined."""
    if _native.STATUS["cpu"].loaded:
        has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
        _native.absent_kernels[:] = [
            name for name, op in raw_ops.items()
            if op.on_cpu and not has_kernel(f"{NAMESPACE}::{name}", "CPU")
        ]


class RawOp:
    """A registered operator without autograd, called with the backend that was chosen.

    C++ files register the ``CPU`` (and, where the GPU kernel is CUDA C++, the ``CUDA``)
    implementation of the same name; ``triton`` names a Python launcher ``"module:function"``
    that is imported at the first call. ``on_cpu``: the CPU has a kernel. ``cpu`` is for ops that a
    CPU computes in torch.
    """

    def __init__(self, schema: str, fake: Callable[..., Any], triton: str | None = None,
                 cpu: Callable[..., Any] | None = None, *, on_cpu: bool = True) -> None:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        self.name = name
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        raw_ops[name] = self
        self.triton, self.on_cpu = triton, on_cpu
        if triton is not None:
            _LIBRARY.impl(name, self.launch, "CUDA")
        if cpu is not None:
            _LIBRARY.impl(name, cpu, "CPU")

    def launch(self, *args: Any) -> Any:
        """Call the Triton launcher."""
        assert self.triton is not None
        module, _, function = self.triton.partition(":")
        return getattr(importlib.import_module(module), function)(*args)

    def __call__(self, backend: str, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._called(backend, *args)
        try:
            out = self._called(backend, *args)
        except RuntimeError as error:  # all that the C++ library can raise
            line = str(error).partition("\n")[0]
            if _REFUSAL.match(line):
                raise ValueError(line) from error
            if _NO_MEMORY.match(line):
                on_cpu = any(isinstance(a, Tensor) and a.is_cpu for a in args)
                kind = RuntimeError if on_cpu else torch.OutOfMemoryError
                raise kind(f"{self.name}: can't allocate memory for what it makes") from error
            raise
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args, out)
        return out

    def _refuse_tangents(self, args: tuple[Any, ...], out: Any) -> None:
        """A backward of a forward outside of the level: its kernels would lose the tangents."""
        made = out if isinstance(out, tuple) else (out,)
        if any(t.is_floating_point() for t in made) and any(
                isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None
                for a in args):
            raise BackendError(
                f"backend: the kernel {self.name!r} has no forward-mode derivative; compute what "
                "is differentiated inside the dual level too, or under use_backend('reference')")

    def _called(self, backend: str, *args: Any) -> Any:
        # Triton's interpreter runs on CPU tensors, where the dispatcher would pick the C++ kernel.
        if backend == "triton" and args[0].device.type == "cpu":
            return self.launch(*args)
        if backend == "cuda" and args[0].device.type == "cpu":
            return self.overload.redispatch(_CUDA, *args)
        return self.overload(*args)
