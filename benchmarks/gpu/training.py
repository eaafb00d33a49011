"""Part ``training``: generator steps under autocast, forward and backward, training mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import LabelLayout

from .inputs import Scene
from .journal import Journal, Row
from .measure import Provider, measure, release
from .networks import LOW, Network, reference
from .settings import Settings


def _gradients(generator: nn.Module, call: Callable[..., Tensor], source: Tensor | LabelLayout,
               z: Tensor | None, autocast: bool) -> Tensor:
    """All gradients of the mean square of the images, as one vector."""
    parameters = list(generator.parameters())
    device = parameters[0].device.type
    with torch.autocast(device, LOW, enabled=autocast):
        image = call(generator, source, z)
    found = torch.autograd.grad(image.float().square().mean(), parameters, allow_unused=True)
    return torch.cat([g.flatten().float() for g in found if g is not None])


def _step(net: Network, call: Callable[..., Tensor], *, last: bool = False, autocast: bool = True,
          layout: bool = False) -> Callable[[], Tensor]:
    # A copy for each provider: spectral normalisation moves with every forward pass.
    generator = copy.deepcopy(net.model).train().requires_grad_()
    source: Any = net.layout() if layout else net.planes
    if last:
        generator = generator.to(memory_format=torch.channels_last)
        source = source.to(memory_format=torch.channels_last)
    return partial(_gradients, generator, call, source, net.z, autocast)


def _ours(generator: nn.Module, source: Tensor | LabelLayout, z: Tensor | None) -> Tensor:
    image: Tensor = generator(source, z)
    return image


def step(scene: Scene, name: str, batch: int) -> Row:
    """Time and peak memory; gradients judged against float32 products in full precision."""
    net = Network(scene, name, scene.pick(batch, 2))
    net.frozen = net.low = None

    def truth() -> Tensor:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            return _step(net, reference, autocast=False)()
        finally:
            torch.backends.cudnn.allow_tf32 = before

    providers = [
        Provider("reference", partial(_step, net, reference), LOW),
        Provider("reference channels-last", partial(_step, net, reference, last=True), LOW,
                 "reference"),
        Provider("ours", partial(_step, net, _ours, layout=True), LOW, "reference"),
        Provider("ours, layout in the call", partial(_step, net, _ours), LOW, "reference"),
    ]
    row = measure(providers, truth, scene.device, seconds=3.0, least=5, judge="rms",
                  small=scene.dry)
    for entry in row["providers"].values():
        if "median" in entry:
            entry["images_per_second"] = net.batch / entry["median"]
    return {**row, "batch": net.batch, "model": name}


def run(journal: Journal, settings: Settings) -> None:
    scene = Scene(settings)
    torch.backends.cudnn.benchmark = True
    names = ("groupdnet_deepfashion", "spade_coco", "groupdnet_ade20k")
    rows = {f"{name} batch 8 step": partial(step, scene, name, 8)
            for name in (names[1:2] if settings.dry_run else names)}
    for name in journal.late_last(rows):
        journal.row(name, rows[name], 0.0 if settings.dry_run else 10.0)
        release()
