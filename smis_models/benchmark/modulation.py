"""The set ``modulation``: modulation, class crops and instance edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from smis_kernels import class_crops, instance_edges, modulation, use_backend
from smis_kernels.ops.class_crops import reference as class_crops_reference
from smis_kernels.ops.instance_edges import reference as instance_edges_reference
from smis_kernels.ops.modulation import reference as modulation_reference

from .case import Case, Inputs, Setting, channels_last, nbytes, providers, unchanged

_SCENES = {8: "person", 151: "indoor"}


def _random(setting: Setting, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(setting.device, setting.dtype)


def _labels(setting: Setting, size: tuple[int, int], classes: int) -> Tensor:
    labels = setting.maps.labels(_SCENES[classes], size, classes)
    return torch.from_numpy(labels)[None].to(setting.device)


def _modulation_case(name: str, channels: int, size: int, *, upsample: bool = False,
                     training: bool = False, in_channels_last: bool = False,
                     targets: dict[str, float] | None = None, confirm: bool = False) -> Case:
    """Dense gamma and beta of size² pixels, LeakyReLU; statistics known unless ``training``.

    Floor in eval: x, gamma, beta read and y written once. In training 15 streams of the output's
    size: forward x (statistics), x, gamma, beta, y; backward dy, y, x, gamma, dgamma, dbeta, then,
    once the sums are known, dbeta, gamma, x, dx.
    """

    def make_inputs(setting: Setting) -> Inputs:
        out = (1, channels, size, size)
        source = (1, channels, size // 2, size // 2) if upsample else out
        x, gamma, beta = (_random(setting, s, i) for i, s in enumerate((source, out, out)))
        mean = _random(setting, (channels,), 3)
        return x, gamma, beta, mean, mean.square() + 0.5

    def run(op: Callable[..., Tensor], x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor,
            var: Tensor) -> Tensor:
        return op(x, gamma, beta, running_mean=mean, running_var=var, training=training,
                  activation="leaky_relu", upsample=upsample)

    return Case(
        name=f"modulation/{name}", make_inputs=make_inputs,
        providers=providers(
            partial(run, modulation_reference.modulation), partial(run, modulation),
            prepare=channels_last if in_channels_last else unchanged,
        ),
        direction="step" if training else "forward", leaves=(0, 1, 2) if training else (),
        moved=(lambda inputs, outputs: 15 * nbytes(inputs[0])) if training else
        (lambda inputs, outputs: nbytes(inputs, outputs)),
        macs=lambda inputs: (6 if training else 2) * inputs[1].numel(),
        targets=targets or {}, confirm=confirm,
    )


def _crops_case(name: str, classes: int, least: float) -> Case:
    """Floor: image and labels read once, the crops written once."""
    size = (256, 256)

    def make_inputs(setting: Setting) -> Inputs:
        return _random(setting, (1, 3, *size), 0), _labels(setting, size, classes), classes

    def reference(image: Tensor, labels: Tensor, count: int) -> Tensor:
        return class_crops_reference.class_crops(image, labels, count, size, "nonzero")

    return Case(
        name=f"class_crops/{name}", make_inputs=make_inputs,
        providers=providers(reference, class_crops, compile=False),
        targets={"reference": least, "scratch": 0.01}, graphs=False,
    )


def _edges_case() -> Case:
    """Floor: ids read once, edges written once."""

    def make_inputs(setting: Setting) -> Inputs:
        ids = setting.maps.instances("street", (512, 1024))
        return (torch.from_numpy(ids)[None].to(setting.device),)

    return Case(
        name="instance_edges/512x1024", make_inputs=make_inputs,
        providers=providers(
            partial(instance_edges_reference.instance_edges, dtype=torch.float32), instance_edges,
        ),
        targets={"scratch": 0.01},
    )


def on_backend(backend: str) -> Callable[..., Tensor]:
    """``run(module, *inputs)`` on a backend."""

    def run(module: Any, *inputs: Any) -> Tensor:
        with use_backend(backend):
            return module(*inputs)

    return run


def conv_macs(inputs: Inputs) -> int:
    """Multiply-accumulates of a network's reference path, counted without computing."""
    module, *arguments = inputs
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.no_grad():
        on_backend("reference")(module, *arguments)
    return counter.get_total_flops() // 2


_MODULATION = {"reference": 3.0, "copy": 0.8, "scratch": 0.01}

CASES = [
    _modulation_case("dense_128x256x256", 128, 256, targets=_MODULATION, confirm=True),
    _modulation_case("upsampled_128x256x256", 128, 256, upsample=True,
                     targets={**_MODULATION, "reference": 4.0}),
    _modulation_case("channels_last_128x256x256", 128, 256, in_channels_last=True,
                     targets={"scratch": 0.01}),
    _modulation_case("dense_1024x16x16", 1024, 16, targets={"scratch": 0.01}),
    _modulation_case("training_128x256x256", 128, 256, training=True),
    _crops_case("ade20k", 151, least=100),
    _crops_case("deepfashion", 8, least=10),
    _edges_case(),
]
