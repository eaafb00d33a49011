"""The parameter-free norm that modulation modules hold, and its settings as the ops take them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.nn.utils import parametrize

_NOTHING = nullcontext()
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


def has_hooks(module: Any) -> bool:
    """Whether calling the module does more than its weight tells: some hooks make the weight."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks
                or module._backward_hooks)


def hooked_everywhere() -> bool:
    """Whether hooks of all modules are there, but for those of torch.utils, which only look on."""
    return _modules._has_any_global_hook() and not all(
        str(getattr(hook, "__module__", "")).startswith("torch.utils.")
        for hooks in (_modules._global_forward_pre_hooks, _modules._global_forward_hooks,
                      _modules._global_backward_pre_hooks, _modules._global_backward_hooks)
        for hook in hooks.values())


def is_told_by_weights(layer: Any, kind: Any) -> bool:
    """Whether weight and bias tell all that calling a layer of this kind does.

    Not with hooks, nor of a subclass or instance with a forward of its own, nor without a bias.
    """
    return is_as_defined(layer, kind) and layer.__dict__["_parameters"].get("bias") is not None


def is_as_defined(layer: Any, *kinds: Any) -> bool:
    """Whether calling the layer does what one of ``kinds`` does, and nothing beside."""
    cls, own = type(layer), layer.__dict__
    return ((cls in kinds or any(_computes(cls, kind) for kind in kinds))
            and "forward" not in own and "_conv_forward" not in own and not has_hooks(layer))


def _computes(cls: Any, kind: Any) -> bool:
    """Whether a class's forward, and what a conv's forward calls, is that of ``kind``."""
    return cls.forward is kind.forward and (
        getattr(cls, "_conv_forward", None) is getattr(kind, "_conv_forward", None))


def weights_made_once(*modules: Any) -> AbstractContextManager[None]:
    """Inside, parametrized weights of the modules' convs are made once, not at every reading.

    Each reading of one under torch's spectral norm is a power step.
    """
    for module in modules:
        for part in module._modules.values():
            inner = getattr(part, "_modules", None)  # a part may be None
            if inner and ("parametrizations" in inner or "parametrizations" in getattr(
                    inner.get("0"), "_modules", ())):  # mlp_shared's conv
                return parametrize.cached()
    return _NOTHING


def _tracks(norm: Any) -> bool:
    """Whether running statistics are read or moved: in training nn.BatchNorm2d may be told not to.

    In eval mode it reads those that it has, whatever it was told.
    """
    return not norm.training or getattr(norm, "track_running_stats", True)


class Normalizing(nn.Module):
    """A module with a ``param_free_norm`` of ``channels``: the base of :class:`SPADE` and others.

    Args:
        channels: of the features.
        norm: "batch", "syncbatch" (all-reduced in training under torch.distributed), "instance" or
            "none".
    """

    takes_affine = False
    """Whether weight and bias of the norm are read."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.channels = channels
        self.synchronized = norm == "syncbatch"
        self.param_free_norm = _parameter_free_norm(norm, channels)

    @property
    def calls_norm(self) -> bool:
        """Whether ``param_free_norm`` is called: it has hooks, or computes what no kernel does."""
        norm = child(self, "param_free_norm")
        if isinstance(norm, nn.InstanceNorm2d) and norm.track_running_stats:
            return True
        return not is_as_defined(norm, nn.BatchNorm2d, nn.InstanceNorm2d, nn.SyncBatchNorm,
                                 nn.Identity) or hooked_everywhere()

    def normalised(self, input: Tensor, upsample: bool) -> tuple[Tensor, dict[str, Any]]:
        """What the ops read, and how they normalise and upsample it, as keyword arguments.

        It advances what the norm counts.
        """
        if self.calls_norm:
            if upsample:
                input = F.interpolate(input, scale_factor=2, mode="nearest")
            norm = child(self, "param_free_norm")
            return norm(input), {"norm": "none", "training": self.training, "upsample": False}
        options = {"upsample": upsample, **self.norm_arguments(), **self.shared_arguments()}
        self.count_batch()
        return input, options

    def norm_arguments(self, suffix: str = "") -> dict[str, Any]:
        """The running statistics as keyword arguments of the op."""
        norm = child(self, "param_free_norm")
        if not _tracks(norm):
            return {"running_mean" + suffix: None, "running_var" + suffix: None}
        return {
            "running_mean" + suffix: child(norm, "running_mean"),
            "running_var" + suffix: child(norm, "running_var"),
        }

    def shared_arguments(self) -> dict[str, Any]:
        """Norm, mode, momentum and process group as keyword arguments of the op.

        Raises:
            ValueError: a norm with weight and bias, put in by hand.

        A batch norm's mode is its own: it may be frozen (``eval()``) inside a module that trains.
        """
        norm = child(self, "param_free_norm")
        if isinstance(norm, nn.Identity):
            return {"norm": "none", "training": self.training}
        if not self.takes_affine and norm._parameters.get("weight") is not None:
            raise ValueError("param_free_norm: expected one without weight and bias, which would "
                             f"not be read; got {norm}; give affine=False")
        batch = not isinstance(norm, nn.InstanceNorm2d)
        synchronized = self.synchronized or isinstance(norm, nn.SyncBatchNorm)
        training = norm.training if batch else self.training
        group = None
        if batch and synchronized and training and dist.is_available() and dist.is_initialized():
            own = getattr(norm, "process_group", None) or dist.group.WORLD
            group = own if dist.get_world_size(own) > 1 else None
        momentum = norm.momentum
        if momentum is None:  # the mean of all batches, as nn.BatchNorm2d keeps it
            counted = batch and training and norm.num_batches_tracked is not None
            momentum = 1 / (int(norm.num_batches_tracked) + 1) if counted else 0.0
        return {
            "norm": "batch" if batch else "instance", "training": training,
            "momentum": momentum, "eps": norm.eps, "process_group": group,
        }

    def count_batch(self) -> None:
        """Advance ``num_batches_tracked`` as nn.BatchNorm2d does."""
        norm = child(self, "param_free_norm")
        if not (norm.training and _tracks(norm)):
            return
        counter = getattr(norm, "num_batches_tracked", None)
        if counter is not None:
            counter.add_(1)
