"""The set ``ccfpse``: spatially varying and conditional convolutions, and CC-FPSE's networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smis_kernels import conditional_attention, conditional_conv2d, spatially_varying_conv2d
from smis_kernels.ops.conditional_attention import reference as attention_reference
from smis_kernels.ops.conditional_conv import reference as conditional_conv_reference
from smis_kernels.ops.spatially_varying_conv import reference as varying_conv_reference

from ..families import create_model
from ..synthesis.synthesizer import frozen_copy
from .case import (
    Case,
    Inputs,
    Setting,
    channels_last,
    contiguous,
    nbytes,
    providers,
    read_and_written,
    unchanged,
)
from .modulation import conv_macs, on_backend


def _random(setting: Setting, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(setting.device, setting.dtype)


def _varying_case(channels: int, size: int, direction: str, targets: dict[str, float],
                  in_channels_last: bool = False) -> Case:
    """Floor: x and the weights read once, y written once; backward also reads dy once more and
    writes the two gradients."""

    def make_inputs(setting: Setting) -> Inputs:
        x = _random(setting, 0, 1, channels, size, size)
        return x, _random(setting, 1, 1, channels, 9, size, size)

    def run(op: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        return op(x, weight)

    def prepare(inputs: Inputs) -> Inputs:
        x, weight = channels_last((inputs[0], inputs[1].flatten(1, 2)))
        return x, weight.unflatten(1, (channels, 9))

    def backward_bytes(inputs: Inputs, outputs: Any) -> int:
        return 2 * nbytes(inputs) + nbytes(inputs[0])

    backward = direction == "backward"
    form = "channels_last_" if in_channels_last else ""
    return Case(
        name=f"spatially_varying_conv2d/{form}{direction}_{channels}x{size}x{size}",
        make_inputs=make_inputs,
        providers=providers(
            partial(run, varying_conv_reference.spatially_varying_conv2d),
            partial(run, spatially_varying_conv2d),
            prepare=prepare if in_channels_last else unchanged,
        ),
        direction=direction, leaves=(0, 1) if backward else (),
        moved=backward_bytes if backward else read_and_written,
        macs=lambda inputs: inputs[1].numel() * (2 if backward else 1), targets=targets,
    )


def _conditional_case(channels: int, size: int, direction: str, targets: dict[str, float],
                      hidden: int = 128) -> Case:
    """Floor: the multiply-adds of the prediction; F(2x2, 3x3) needs 16/36 of the definition's."""

    def make_inputs(setting: Setting) -> Inputs:
        x = _random(setting, 0, 1, channels, size, size)
        condition = _random(setting, 1, 1, hidden, size, size).relu()
        weight = _random(setting, 2, 9 * channels, hidden, 3, 3) / (9 * hidden) ** 0.5
        return x, condition, weight, _random(setting, 3, 9 * channels)

    step = direction == "step"
    return Case(
        name=f"conditional_conv2d/{direction}_{channels}x{size}x{size}", make_inputs=make_inputs,
        providers=providers(conditional_conv_reference.conditional_conv2d, conditional_conv2d),
        direction=direction, leaves=(0, 1, 2, 3) if step else (),
        macs=lambda inputs: inputs[2].numel() * size * size * (3 if step else 1),
        memory_bound=False, targets=targets, seconds=20.0, confirm=not step,
    )


def _attention_case() -> Case:
    """Floor: x and the logits read once, y written once."""

    def make_inputs(setting: Setting) -> Inputs:
        shape = (1, 128, 256, 256)
        return _random(setting, 0, *shape), _random(setting, 1, *shape)

    return Case(
        name="conditional_attention/128x256x256", make_inputs=make_inputs,
        providers=providers(attention_reference.conditional_attention, conditional_attention),
    )


def _model_inputs(part: str, setting: Setting) -> tuple[Any, Tensor]:
    model = create_model("ccfpse_coco", device=setting.device, dtype=setting.dtype,
                         init_gain=1.0).eval()
    size = model.preset.image_size
    labels = setting.maps.labels("indoor", size, model.preset.classes, setting.index)
    ids = setting.maps.instances("indoor", size, setting.index)
    planes = model.semantics(torch.from_numpy(labels)[None].to(setting.device),
                             torch.from_numpy(ids)[None].to(setting.device))
    # Spectral norm is folded for every provider, so that torch.compile sees one graph.
    return frozen_copy(getattr(model, part)), planes.contiguous()


def _generator_case() -> Case:
    """CC-FPSE's COCO generator, published options, random weights, eval, N=1."""

    def make_inputs(setting: Setting) -> Inputs:
        generator, planes = _model_inputs("generator", setting)
        return generator, planes, generator.sample_latent(1, torch.Generator().manual_seed(0))

    return Case(
        name="ccfpse_coco/generator", make_inputs=make_inputs,
        providers=providers(on_backend("reference"), on_backend("auto"), prepare=contiguous),
        macs=conv_macs, memory_bound=False, floor=1e-4, seconds=30.0, scenes="coco",
        targets={"reference": 1.5, "best": 1.2, "memory": 0.25},
    )


def _discriminator_case() -> Case:
    """CC-FPSE's COCO discriminator, published options, random weights, eval, N=1."""

    def make_inputs(setting: Setting) -> Inputs:
        discriminator, planes = _model_inputs("discriminator", setting)
        return discriminator, _random(setting, 0, 1, 3, *planes.shape[2:]).tanh(), planes

    return Case(
        name="ccfpse_coco/discriminator", make_inputs=make_inputs,
        providers=providers(on_backend("reference"), on_backend("auto"), prepare=contiguous),
        macs=conv_macs, memory_bound=False, floor=1e-4, targets={"reference": 1.3},
    )


CASES = [
    _varying_case(128, 256, "forward", {"reference": 4.0, "copy": 0.75}),
    _varying_case(128, 256, "backward", {"reference": 3.0}),
    _varying_case(128, 256, "forward", {}, in_channels_last=True),
    _conditional_case(128, 256, "forward", {"reference": 1.2, "best": 1.0, "memory": 0.05}),
    _conditional_case(128, 256, "step", {"reference": 1.0, "memory": 0.2}),
    _attention_case(),
    _generator_case(),
    _discriminator_case(),
]
