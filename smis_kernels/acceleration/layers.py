"""Per-pixel depthwise convs that unfold, and encoders that pool their features by instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..ops.instance_pool.op import MAX_ID, instance_avg_pool2d
from ..ops.spatially_varying_conv.op import KERNEL_SIZES, spatially_varying_conv2d
from ..runtime.check import autocast_enabled
from .probe import SEED, CannotRun, Trial, Verdict, agreeing, detached_copy
from .swap import Change, Fused, FusionPlan, arguments_of, serves


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def unfold_of(module: nn.Module) -> nn.Unfold | None:
    """The module's own nn.Unfold, if it has exactly one."""
    found = [m for m in module.children() if type(m) is nn.Unfold]
    return found[0] if len(found) == 1 else None


def window_of(unfold: nn.Unfold) -> dict[str, Any] | None:
    """Its window as arguments of :func:`spatially_varying_conv2d`; None where none serves."""
    window = {}
    for name in ("kernel_size", "stride", "padding", "dilation"):
        height, width = _pair(getattr(unfold, name))
        if height != width:
            return None
        window[name] = height
    return window if window["kernel_size"] in KERNEL_SIZES else None


class FusedPixelConv(Fused):
    """``conv(x, weight)`` with a kernel for every pixel and channel; nothing is unfolded."""

    def _smis_ready(self, x: Any, weight: Any) -> dict[str, Any] | str:
        unfold = unfold_of(self)
        window = None if unfold is None else window_of(unfold)
        if unfold is None or window is None:
            return "its unfold has another window"
        if not isinstance(x, Tensor) or not serves(x, None) or not isinstance(weight, Tensor):
            return "features of another kind"
        n, c = x.shape[:2]
        flat = tuple(weight.shape[:-2])
        taps = window["kernel_size"] ** 2
        if flat not in ((n, c * taps), (n, c, taps)):
            return "weights of another shape"
        if weight.dtype != x.dtype or weight.device != x.device:
            return "weights of another kind"
        if autocast_enabled(x):  # which casts the op's operands, and not the products of the module
            return "under autocast"
        return window

    def _smis_run(self, ready: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
        return spatially_varying_conv2d(x, weight, **ready)


def judge_pixel_conv(module: nn.Module) -> Verdict | None:
    """Whether a module applies per-pixel kernels that it is given; None where it never unfolds."""
    unfold = unfold_of(module)
    if unfold is None:
        return None
    window, arguments = window_of(unfold), arguments_of(module, 2)
    if window is None or arguments is None:
        return None, "its window, or what its forward takes, is of another kind"
    k, stride = window["kernel_size"], window["stride"]
    widths = [m.num_features for m in module.children() if isinstance(m, _NormBase)]
    channels, size = widths[0] if widths else 3, (4 * stride, 6 * stride)
    span = window["dilation"] * (k - 1) + 1
    out = [(s + 2 * window["padding"] - span) // stride + 1 for s in size]
    generator = torch.Generator().manual_seed(SEED)
    like = next(module.parameters(), torch.empty(0, device="cpu"))
    inputs = tuple(torch.randn(shape, generator=generator, device="cpu").to(like)
                   for shape in ((2, channels, *size), (2, channels * k * k, *out)))
    trials = [Trial(inputs, training, differentiable=(0, 1)) for training in (True, False)]
    plan, twin = FusionPlan(arguments), detached_copy(module)
    chosen, why = agreeing(twin, trials, [[Change(twin, FusedPixelConv, plan)]])
    return (None if chosen is None else plan), why


def network_of(module: nn.Module) -> nn.Sequential | None:
    """The one Sequential that an encoder consists of."""
    children = list(module.children())
    only = children[0] if len(children) == 1 and not module._parameters else None
    return only if isinstance(only, nn.Sequential) else None


class FusedInstancePool(Fused):
    """``encoder(image, instances)``: features of its one network, pooled in one reduction."""

    @staticmethod
    def _smis_besides(module: nn.Module, plan: FusionPlan) -> list[nn.Module]:
        return list(module.children())

    def _smis_ready(self, image: Any, instances: Any) -> tuple[nn.Module, Tensor] | str:
        network = network_of(self)
        if network is None:
            return "it consists of other parts"
        if not isinstance(image, Tensor) or not isinstance(instances, Tensor) or image.dim() != 4:
            return "an image of another kind"
        if tuple(instances.shape) != (image.shape[0], 1, *image.shape[2:]):
            return "ids of another shape"
        ids = instances.long()
        low, high = (int(v) for v in torch.aminmax(ids))  # the published loop waits for them too
        whole = not instances.is_floating_point() or torch.equal(ids.to(instances.dtype), instances)
        if low < 0 or high > MAX_ID or not whole:
            return f"ids that are no integers 0..{MAX_ID}"
        return network, ids

    def _smis_run(self, ready: tuple[nn.Module, Tensor], image: Tensor, _: Tensor) -> Tensor:
        network, ids = ready
        return instance_avg_pool2d(network(image), ids)


def judge_instance_pool(module: nn.Module) -> Verdict | None:
    """Whether a module pools its network's features by instance; None where it cannot."""
    network, arguments = network_of(module), arguments_of(module, 2)
    if network is None or arguments is None:
        return None
    conv = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        return None
    plan, twin = FusionPlan(arguments), detached_copy(module, keep=(network,))
    generator = torch.Generator().manual_seed(SEED)
    for side in (32, 64):  # what is halved often needs more pixels
        image = torch.randn((2, conv.in_channels, side, side + 16), generator=generator,
                            device="cpu")
        cells = torch.randint(5, (2, 1, side // 8, side // 8 + 2), generator=generator,
                              device="cpu")
        ids = torch.tensor([0, 7, 24, 26001, 33005], device="cpu")[cells]
        ids = ids.repeat_interleave(8, 2).repeat_interleave(8, 3)
        inputs = (image.to(conv.weight), ids.to(conv.weight.device))
        trials = [Trial(inputs, training) for training in (True, False)]
        try:
            chosen, why = agreeing(twin, trials, [[Change(twin, FusedInstancePool, plan)]])
        except CannotRun:
            continue
        return (None if chosen is None else plan), why
    return None  # two arguments, but no image and ids: something else altogether
