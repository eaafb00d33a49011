"""The parameter-free norm that modulation modules hold, and its settings as the ops take them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

_NORMS = ("batch", "syncbatch", "instance", "none")


def _parameter_free_norm(norm: str, channels: int) -> nn.Module:
    if norm in ("batch", "syncbatch"):
        return nn.BatchNorm2d(channels, affine=False)
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=False)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm: expected one of {', '.join(_NORMS)}; got {norm!r}")


def child(module: Any, name: str) -> Any:
    """``getattr(module, name)`` of a submodule or buffer, found where nn.Module looks last.

    Its way there costs a microsecond, and more where it finds nothing.
    """
    found = module._modules.get(name)
    if found is None:
        found = module._buffers.get(name)
    return getattr(module, name, None) if found is None else found


class Normalizing(nn.Module):
    """A module with a ``param_free_norm`` of ``channels``: the base of :class:`SPADE` and others.

    Args:
        channels: of the features.
        norm: "batch", "syncbatch" (all-reduced in training under torch.distributed), "instance" or
            "none".
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.channels = channels
        self.synchronized = norm == "syncbatch"
        self.param_free_norm = _parameter_free_norm(norm, channels)

    def norm_arguments(self, suffix: str = "") -> dict[str, Any]:
        """The running statistics as keyword arguments of the op."""
        norm = child(self, "param_free_norm")
        return {
            "running_mean" + suffix: child(norm, "running_mean"),
            "running_var" + suffix: child(norm, "running_var"),
        }

    def shared_arguments(self) -> dict[str, Any]:
        """Norm, mode, momentum and process group as keyword arguments of the op."""
        norm = child(self, "param_free_norm")
        if isinstance(norm, nn.Identity):
            return {"norm": "none", "training": self.training}
        batch = not isinstance(norm, nn.InstanceNorm2d)
        synchronized = self.synchronized or isinstance(norm, nn.SyncBatchNorm)
        group = None
        if batch and synchronized and self.training and dist.is_available():
            initialized = dist.is_initialized() and dist.get_world_size() > 1
            group = dist.group.WORLD if initialized else None
        return {
            "norm": "batch" if batch else "instance", "training": self.training,
            "momentum": norm.momentum, "eps": norm.eps, "process_group": group,
        }

    def count_batch(self) -> None:
        """Advance ``num_batches_tracked`` as nn.BatchNorm2d does."""
        if not self.training:
            return
        counter = getattr(self.param_free_norm, "num_batches_tracked", None)
        if counter is not None:
            counter.add_(1)
