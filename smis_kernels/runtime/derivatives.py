"""Gradients of gradients: where the graph of a backward is recorded, the definition computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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
        # Views, so that an input that depends on another is not differentiated through.
        leaves = [x.view_as(x) for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, tuple(grads), create_graph=True,
                                         materialize_grads=True) if wanted else ())
    return tuple(next(found) if x.requires_grad else None for x in leaves)
