"""The definition of modulation, op by op as the papers' code computes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def synchronized_batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    eps: float, group: dist.ProcessGroup,
) -> Tensor:
    """Batch normalisation over the batches of every process of ``group``, differentiable."""
    from torch.distributed.nn.functional import all_reduce

    count = torch.tensor(float(input.numel() // input.shape[1]), device=input.device)
    dist.all_reduce(count, group=group)
    mean = all_reduce(input.sum((0, 2, 3)), group=group) / count
    centered = input - mean.view(1, -1, 1, 1)
    var = all_reduce(centered.square().sum((0, 2, 3)), group=group) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var), momentum)
    return centered * torch.rsqrt(var + eps).view(1, -1, 1, 1)


# The backward of torch's batch and instance norm (2.13) misreads some strides: those of a gradient
# of one image that lies channels-last, and of what lies so with the batch in another place.
def _is_usual(tensor: Tensor) -> bool:
    _, c, h, w = tensor.shape
    return tensor.is_contiguous() or tensor.stride() == (h * w * c, 1, w * c, c)


def _readable(grad: Tensor) -> Tensor:
    return grad if len(grad) > 1 and _is_usual(grad) else grad.contiguous()


def _differentiable(norm: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """``norm(input)`` with a gradient that is right in every format; torch compiles its own."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and input.requires_grad):
        return norm(input)
    if not _is_usual(input):
        input = input.clone(memory_format=torch.contiguous_format)
    output = norm(input)
    if output.requires_grad and output.shape[0]:
        output.register_hook(_readable)
    return output


def normalize(
    input: Tensor, *, norm: str = "batch", num_groups: int | None = None,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The parameter-free normalisation: ``(x - mean) / sqrt(var + eps)``."""
    if norm == "none":
        return input
    if norm == "instance":
        return _differentiable(partial(F.instance_norm, eps=eps), input)
    if norm == "group":
        assert num_groups is not None
        return F.group_norm(input, num_groups, eps=eps)
    if training and process_group is not None:
        return synchronized_batch_norm(
            input, running_mean, running_var, momentum, eps, process_group
        )
    return _differentiable(partial(
        F.batch_norm, running_mean=running_mean, running_var=running_var,
        training=training or running_mean is None, momentum=momentum, eps=eps), input)


def modulation(
    input: Tensor, gamma: Tensor, beta: Tensor, *, norm: str = "batch",
    num_groups: int | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, activation: str | None = None, negative_slope: float = 0.2,
    upsample: bool = False, process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``act(normalize(x) * (1 + gamma) + beta)``, each step a tensor of its own."""
    if upsample:
        input = F.interpolate(input, scale_factor=2, mode="nearest")
    normalized = normalize(
        input, norm=norm, num_groups=num_groups, running_mean=running_mean,
        running_var=running_var, training=training, momentum=momentum, eps=eps,
        process_group=process_group,
    )
    out = normalized * (1 + gamma) + beta
    if activation == "relu":
        return F.relu(out)
    if activation == "leaky_relu":
        return F.leaky_relu(out, negative_slope)
    return out
