"""Gradients of gradients, and transforms: where the definition computes in a kernel's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor


def _inside_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# A compiler enters the level of a transform while it traces one, and guards the stack.
_inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> str | None:
    """What is being done to the call that no kernel takes part in; None where nothing is."""
    compiling = torch.compiler.is_compiling()
    if compiling and torch.onnx.is_in_onnx_export():
        return "torch.onnx exports it"
    if not compiling and torch._C._get_tracing_state() is not None:
        return "torch.jit traces it"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "a transform of torch.func (vmap, grad, jvp)" if _inside_transform() else None


class _Unrecorded:
    """The context of a forward whose backward nobody asks for."""

    def save_for_backward(self, *_: Tensor | None) -> None:
        """Keep nothing."""


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``; its forward alone, much sooner, where no gradient is required.

    Only for functions whose forward does no more to its context than setting attributes and
    ``save_for_backward``.
    """
    if transformed() is not None or (torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in args)):
        return function.apply(*args)
    return function.forward(_Unrecorded(), *args)


def recorded_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)``, differentiable themselves in inputs and ``grads``.

    For the backward of an autograd.Function while gradients are enabled (``create_graph``): the
    kernels' own results would be constants there, whose missing derivatives nobody is told of.
    ``once_differentiable`` is no guard: it lets every call pass whose ``grads`` are constants.

    Returns:
        One gradient for each input, None where it requires none.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        # Aliases, so that an input that depends on another is not differentiated through; view_as
        # gives one channels-last image other strides, on which torch's batch norm errs (2.13).
        leaves: list[Tensor] = [torch.ops.aten.alias.default(x) for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, tuple(grads), create_graph=True,
                                         materialize_grads=True) if wanted else ())
    return tuple(next(found) if x.requires_grad else None for x in leaves)
