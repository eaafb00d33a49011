"""The set ``algebra``: label tables, from one SPADE layer to whole generators and a training step.

Baselines do not depend on what a map shows, ours does: the baselines run on the first map, ours on
every map of the folder, all in one interleaved run. The fused time is the geometric mean over the
maps; the slowest map stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import SPADE, LabelLayout, instance_edges, use_backend, use_path
from smis_kernels.interface import TableCache

from ..networks import semantics as label_maps
from ..synthesis.synthesizer import Synthesizer
from .case import Case, Inputs, Provider, Remaining, Setting, channels_last, contiguous, unchanged
from .modulation import conv_macs
from .networks import COCO_CLASSES, class_map, model_and_generator, semantics_of

LAYER_SIZE, LAYER_CHANNELS = 256, 128


def _reference(module: Any, *arguments: Any) -> Any:
    with use_backend("reference"):
        return module(*arguments)


def _fused(module: Any, *arguments: Any) -> Any:
    return module(*arguments)


def _providers(prepare: Callable[[Inputs], Inputs], run: Callable[..., Any] = _fused,
               reference: Callable[..., Any] = _reference) -> tuple[Provider, ...]:
    """The dense definition eager, channels-last and compiled; ours after ``prepare``."""
    return (
        Provider("reference", reference, contiguous),
        Provider("channels_last", reference, channels_last),
        Provider("compiled", reference, channels_last, compile=True),
        Provider("fused", run, prepare),
    )


@cache
def _layer(device: torch.device, dtype: torch.dtype) -> SPADE:
    torch.manual_seed(0)
    return SPADE(LAYER_CHANNELS, COCO_CLASSES).to(device, dtype).eval()


def _layer_case(name: str, prepare: Callable[[Inputs], Inputs], against: float,
                against_best: float) -> Case:
    """One SPADE layer. Floor: x read and y written once."""

    def make_inputs(setting: Setting) -> Inputs:
        size = (LAYER_SIZE, LAYER_SIZE)
        maps = class_map(setting, size, COCO_CLASSES)
        planes = label_maps.one_hot(maps, COCO_CLASSES, setting.dtype)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((1, LAYER_CHANNELS, *size), generator=generator)
        return _layer(setting.device, setting.dtype), x.to(setting.device, setting.dtype), planes

    return Case(
        name=f"spade_layer/{name}", make_inputs=make_inputs, providers=_providers(prepare),
        moved=lambda inputs, outputs: 2 * inputs[1].numel() * inputs[1].element_size(),
        macs=conv_macs, targets={"reference": against, "best": against_best}, every_map=True,
        seconds=10.0, windows=lambda inputs: _windows(inputs[2]),
    )


def _layer_map(inputs: Inputs) -> Inputs:
    """Features channels-last, the map as published code hands it over: contiguous planes."""
    return channels_last(inputs[:2]) + inputs[2:]


def _layer_layout(inputs: Inputs) -> Inputs:
    module, x, planes = _layer_map(inputs)
    layout = LabelLayout.from_tensor(planes)
    assert layout is not None
    layout.level((LAYER_SIZE, LAYER_SIZE))
    return module, x, layout


def _layer_tables(inputs: Inputs) -> Inputs:
    module, x, layout = _layer_layout(inputs)
    layout.tables = TableCache()
    module(x, layout)
    return module, x, layout


def _generator_case(name: str, against: float, against_best: float, *,
                    slowest: float | None = None, scenes: str = "coco") -> Case:
    """A generator, eval, N=1; the map's layout and all tables are made in the call.

    Spectral norm is folded for every provider: the baselines do not pay for it either, and
    torch.compile sees one graph.
    """

    def make_inputs(setting: Setting) -> Inputs:
        model, generator = model_and_generator(name, setting.device, setting.dtype)
        _, _, planes = semantics_of(model, setting)
        z = model.generator.sample_latent(1, torch.Generator().manual_seed(0))
        return generator, planes, z

    targets = {"reference": against, "best": against_best}
    if slowest is not None:
        targets["slowest"] = slowest
    targets["memory"] = 0.5
    return Case(
        name=f"{name}/generator", make_inputs=make_inputs, providers=_providers(unchanged),
        macs=conv_macs, memory_bound=False, floor=1e-4, seconds=40.0, every_map=True,
        targets=targets, bound=network_bound, scenes=scenes,
        windows=lambda inputs: _windows(inputs[1]),
    )


def _further_case(name: str, against: float, against_best: float) -> Case:
    """A further sample of one layout: tables kept by a :class:`Synthesizer`."""

    def make_inputs(setting: Setting) -> Inputs:
        model, generator = model_and_generator(name, setting.device, setting.dtype)
        labels, ids, planes = semantics_of(model, setting)
        z = model.generator.sample_latent(1, torch.Generator().manual_seed(0))
        return generator, planes, z, Synthesizer(model, labels, ids)

    def prepare(inputs: Inputs) -> Inputs:
        synthesizer, z = inputs[3], inputs[2]
        synthesizer.sample(z)
        return synthesizer, z

    def dense(generator: Any, planes: Tensor, z: Tensor, _: Synthesizer) -> Any:
        return _reference(generator, planes, z)

    return Case(
        name=f"{name}/further_sample", make_inputs=make_inputs,
        providers=_providers(prepare, lambda s, z: s.sample(z), dense),
        macs=lambda inputs: conv_macs(inputs[:3]), memory_bound=False, floor=1e-4, seconds=40.0,
        every_map=True, targets={"reference": against, "best": against_best},
        bound=lambda inputs: network_bound(inputs[:3]),
    )


def _encoder_case(against: float) -> Case:
    """GroupDNet ADE20K's encoder with its class crops: only the classes present are encoded."""

    def make_inputs(setting: Setting) -> Inputs:
        model, _ = model_and_generator("groupdnet_ade20k", setting.device, setting.dtype)
        labels = class_map(setting, model.preset.image_size, model.preset.classes)
        generator = torch.Generator().manual_seed(2)
        image = torch.rand((1, 3, *model.preset.image_size), generator=generator) * 2 - 1
        return model.encoder, image.to(setting.device, setting.dtype), labels

    def encode(encoder: Any, image: Tensor, labels: Tensor) -> Any:
        return encoder.encode(image, labels)

    def reference(*inputs: Any) -> Any:
        with use_backend("reference"):
            return encode(*inputs)

    return Case(
        name="groupdnet_ade20k/encoder", make_inputs=make_inputs,
        providers=(Provider("reference", reference),
                   Provider("channels_last", reference, channels_last),
                   Provider("fused", encode)),
        memory_bound=False, floor=1e-4, seconds=20.0, every_map=True,
        targets={"reference": against},
    )


def _training_case(name: str, batch: int, against: float, against_best: float) -> Case:
    """Generator forward and backward in training mode: batch statistics, all gradients."""

    def make_inputs(setting: Setting) -> Inputs:
        model, _ = model_and_generator(name, setting.device, setting.dtype)
        planes = torch.cat([
            semantics_of(model, setting.at(setting.index + i))[2] for i in range(batch)
        ])
        start = {name: b.clone() for name, b in model.generator.named_buffers()}
        return model.generator, planes, start

    def step(generator: nn.Module, planes: Tensor, start: dict[str, Tensor]) -> Tensor:
        for name, buffer in generator.named_buffers():
            buffer.copy_(start[name])  # power iterations and running statistics: one step each
        generator.train()
        parameters = [p for p in generator.parameters() if p.requires_grad]
        with torch.enable_grad():
            image = generator(planes, None)
            gradients = torch.autograd.grad(image.square().mean(), parameters, allow_unused=True)
        total = sum(g.square().sum() for g in gradients if g is not None)
        generator.eval()
        for layer in generator.modules():
            if hasattr(layer, "weight_orig"):  # a weight with a graph cannot be copied
                setattr(layer, "weight", getattr(layer, "weight").detach())  # noqa: B009, B010
        assert isinstance(total, Tensor)
        return total

    def reference(*inputs: Any) -> Any:
        with use_backend("reference"):
            return step(*inputs)

    return Case(
        name=f"{name}/training_step_batch{batch}", make_inputs=make_inputs,
        providers=(Provider("reference", reference),
                   Provider("channels_last", reference, channels_last),
                   Provider("fused", step)),
        memory_bound=False, floor=1e-3, seconds=60.0,
        targets={"reference": against, "best": against_best}, single_precision_truth=True,
    )


def _growth_case(size: tuple[int, int], batch: int) -> Case:
    """One SPADE layer of 64 channels on street scenes with edges: how cost grows."""

    def make_inputs(setting: Setting) -> Inputs:
        torch.manual_seed(0)
        module = SPADE(64, 36).to(setting.device, setting.dtype).eval()
        planes = []
        for i in range(batch):
            labels = torch.from_numpy(setting.maps.labels("street", size, 35, i))[None]
            ids = torch.from_numpy(setting.maps.instances("street", size, i))[None]
            planes.append(torch.cat([label_maps.one_hot(labels, 35), instance_edges(ids)], 1))
        x = torch.randn((batch, 64, *size), generator=torch.Generator().manual_seed(1))
        place, dtype = setting.device, setting.dtype
        return module, x.to(place, dtype), torch.cat(planes).to(place, dtype)

    return Case(
        name=f"spade_layer/size_{size[1]}x{size[0]}_batch_{batch}", make_inputs=make_inputs,
        providers=(Provider("reference", _reference), Provider("fused", _fused, channels_last)),
        moved=lambda inputs, outputs: 2 * inputs[1].numel() * inputs[1].element_size(),
        macs=conv_macs, scenes="cityscapes", single_precision_truth=True, floor=1e-4, seconds=4.0,
    )


def _noise_case() -> Case:
    """Where nothing repeats: what looking for windows costs beside our own dense path."""

    def make_inputs(setting: Setting) -> Inputs:
        generator = torch.Generator().manual_seed(3)
        size = (LAYER_SIZE, LAYER_SIZE)
        labels = torch.randint(0, COCO_CLASSES, (1, *size), generator=generator)
        planes = label_maps.one_hot(labels.to(setting.device), COCO_CLASSES, setting.dtype)
        x = torch.randn((1, LAYER_CHANNELS, *size), generator=generator)
        return _layer(setting.device, setting.dtype), x.to(setting.device, setting.dtype), planes

    def dense(*inputs: Any) -> Any:
        with use_path("dense"):
            return _fused(*inputs)

    return Case(
        name="spade_layer/noise_against_own_dense_path", make_inputs=make_inputs,
        providers=(Provider("reference", dense, channels_last),
                   Provider("fused", _fused, channels_last)),
        macs=conv_macs, memory_bound=False, targets={"reference": 0.95}, seconds=20.0,
    )


def _windows(planes: Tensor) -> tuple[int, int, int]:
    """V, U and pixels of a map at its own size."""
    layout = LabelLayout.from_tensor(planes)
    assert layout is not None
    v, u = layout.level((planes.shape[2], planes.shape[3]), unlimited=True).counts
    return v, u, layout.symbols.numel()


def network_bound(inputs: Inputs) -> Remaining:
    """What remains when modulation is free: multiply-adds of direct convs, passes over features.

    The main convs are those called as modules; each reads a norm's output, and the norm read as
    much: two passes for every conv input.
    """
    module, *arguments = inputs
    macs = moved = largest = 0

    def hook(conv: nn.Conv2d, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs, moved, largest
        macs += out[0, 0].numel() * out.shape[0] * conv.weight.numel()
        size = given[0].numel() * given[0].element_size()
        moved, largest = moved + 2 * size, max(largest, size)

    hooks = [m.register_forward_hook(hook) for m in module.modules()
             if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            module(*arguments)
    finally:
        for handle in hooks:
            handle.remove()
    return Remaining(macs, moved, largest)


CASES = [
    _layer_case("a_layout_and_tables_in_the_call", _layer_map, 12, 8),
    _layer_case("b_layout_given", _layer_layout, 15, 10),
    _layer_case("c_tables_kept", _layer_tables, 20, 12),
    *(_growth_case(size, 1) for size in ((256, 256), (256, 512), (512, 1024), (1024, 2048))),
    *(_growth_case((256, 256), batch) for batch in (4, 16)),
    _noise_case(),
    _generator_case("spade_coco", 3.2, 2.5, slowest=2.5),
    _generator_case("spade_ade20k", 3.2, 2.5, slowest=2.5),
    _generator_case("groupdnet_ade20k", 5, 4, slowest=3.5),
    _generator_case("groupdnet_deepfashion", 2.3, 1.9),
    _generator_case("spade_cityscapes", 2.8, 2.2, scenes="cityscapes"),
    _generator_case("groupdnet_cityscapes", 2.4, 1.7, scenes="cityscapes"),
    _further_case("spade_coco_vae", 4, 3),
    _further_case("groupdnet_ade20k", 8, 6),
    _further_case("groupdnet_deepfashion", 2.6, 2.1),
    _encoder_case(8),
    _training_case("spade_coco", 2, 2.2, 1.8),
]
