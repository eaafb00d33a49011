"""The zoo's networks as cases: random weights, on maps of their data set, spectral norm folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import SPADE, LabelLayout, instance_edges, use_backend, use_path
from smis_kernels.interface import TableCache

from ..families import MODELS, PARTS, create_model, entry, list_models
from ..networks.semantics import one_hot, semantics
from ..synthesis.synthesizer import Synthesizer, frozen_copy
from .case import (
    COCO_CLASSES,
    Case,
    Inputs,
    Provider,
    Remaining,
    Run,
    Setting,
    channels_last,
    contiguous,
    unchanged,
)
from .macs import conv_macs, dense_macs, effective_macs
from .records import Record, by_case, duration, speedup, times_text

KINDS = {"deepfashion": "person", "cityscapes": "street"}
"""Of the sample scenes, by data set; "indoor" for the others."""


def kind_of(name: str) -> str:
    """The kind of sample scene that a model paints."""
    return next((kind for key, kind in KINDS.items() if key in name), "indoor")


def reference(module: Any, *inputs: Any) -> Any:
    """The network op by op, as published."""
    with use_backend("reference"):
        return module(*inputs)


def ours(module: Any, *inputs: Any) -> Any:
    """The network on our kernels."""
    return module(*inputs)


def baselines(run: Run = reference) -> tuple[Provider, ...]:
    """The dense definition eager, channels-last and compiled in the faster of the two."""
    return (Provider("reference", run, contiguous), Provider("channels_last", run, channels_last),
            Provider("compiled", run, channels_last, compile=True))


def tiny_options(name: str) -> dict[str, Any]:
    """The narrowest that a model's groups allow, on pictures of 64 or 128 pixels a side."""
    preset = entry(name).preset
    width = 70 if name == "groupdnet_cityscapes" else 8
    side = 128 if name.endswith("scenes") else 64
    options = {"ngf": width, "nef": width, "ndf": 4, "hidden": 8}
    wide = name in ("groupdnet_ade20k", "groupdnet_scenes")
    return {"image_size": (side, side),
            **{k: v for k, v in options.items() if hasattr(preset, k) and not wide}}


@lru_cache(maxsize=1)  # the weights of one model at a time
def _model(name: str, device: torch.device, tiny: bool) -> Any:
    return create_model(name, device=device, init_gain=1.0,
                        **tiny_options(name) if tiny else {}).eval()


def model_of(name: str, setting: Setting) -> Any:
    """A random model with published options, in float32."""
    return _model(name, setting.device, setting.tiny)


def maps_of(model: Any, name: str, setting: Setting, batch: int = 1
            ) -> tuple[Tensor, Tensor | None, Tensor]:
    """Labels, instance ids where the model reads edges, and the planes of both."""
    preset, kind = model.preset, kind_of(name)
    labels = setting.labels(kind, preset.image_size, preset.classes, batch)
    ids = setting.instances(kind, preset.image_size, batch) if preset.instance_edge else None
    planes = semantics(labels, preset, ids, dtype=setting.dtype)
    return labels, ids, planes.contiguous()  # as published code scatters them


def generator_inputs(name: str, setting: Setting, batch: int = 1) -> Inputs:
    """The generator and its arguments: semantics, and the code or features that it takes.

    Spectral norm is folded for every provider: the baselines do not pay for it either, and
    torch.compile sees one graph.
    """
    model = model_of(name, setting)
    planes = maps_of(model, name, setting, batch)[2]
    random = torch.Generator().manual_seed(0)
    if getattr(model.preset, "features", False):
        shape = (batch, model.preset.feature_channels, *planes.shape[2:])
        z: Tensor | None = torch.rand(shape, generator=random) * 2 - 1
    else:
        z = model.generator.sample_latent(batch, random)
    generator = frozen_copy(model.generator, setting.dtype)
    return (generator, planes, *([] if z is None else [z.to(planes)]))


def generator_case(name: str, case: str = "generator", batch: int = 1, **options: Any) -> Case:
    """A generator, eval; the map's layout and all tables are made in the call."""
    return Case(**{
        "name": f"{name}/{case}", "make_inputs": partial(generator_inputs, name, batch=batch),
        "providers": (*baselines(), Provider("fused", ours)), "macs": conv_macs,
        "memory_bound": False, "floor": 1e-4, "seconds": 40.0,
        "scenes": "cityscapes" if "cityscapes" in name else "coco", **options})


def further_case(name: str, against: float, against_best: float) -> Case:
    """A further sample of one layout: tables kept by a :class:`Synthesizer`."""

    def make_inputs(setting: Setting) -> Inputs:
        labels, ids, _ = maps_of(model_of(name, setting), name, setting)
        return (*generator_inputs(name, setting), labels, ids)

    def prepare(inputs: Inputs) -> Inputs:
        generator, _, z, labels, ids = inputs
        synthesizer = Synthesizer(generator, labels, ids)
        synthesizer.sample(z)
        return synthesizer, z

    def bound(inputs: Inputs) -> Remaining:
        synthesizer, z = prepare(inputs)
        return network_bound(inputs[:3], lambda: synthesizer.sample(z))

    return generator_case(
        name, "further_sample", make_inputs=make_inputs, every_map=True,
        providers=(*baselines(lambda *inputs: reference(*inputs[:3])),
                   Provider("fused", lambda s, z: s.sample(z), prepare)),
        macs=lambda inputs: conv_macs(inputs[:3]),
        bound=bound,
        targets={"reference": against, "best": against_best, "floor": 0.75},
    )


def encoder_case(against: float) -> Case:
    """GroupDNet ADE20K's encoder with its class crops: only the classes present are encoded."""
    name = "groupdnet_ade20k"

    def make_inputs(setting: Setting) -> Inputs:
        model = model_of(name, setting)
        labels, _, planes = maps_of(model, name, setting)
        image = torch.rand((1, 3, *planes.shape[2:]), generator=torch.Generator().manual_seed(2))
        return copy.deepcopy(model.encoder).to(planes.dtype), (image * 2 - 1).to(planes), labels

    def encode(encoder: Any, image: Tensor, labels: Tensor) -> Any:
        return encoder.encode(image, labels)

    published = partial(reference, encode)
    return generator_case(
        name, "encoder", make_inputs=make_inputs, macs=lambda inputs: 0, seconds=20.0,
        providers=(Provider("reference", published),
                   Provider("channels_last", published, channels_last), Provider("fused", encode)),
        every_map=True, targets={"reference": against})


def discriminator_case(name: str, against: float) -> Case:
    """A discriminator on a random picture."""

    def make_inputs(setting: Setting) -> Inputs:
        model = model_of(name, setting)
        planes = maps_of(model, name, setting)[2]
        picture = setting.draw(1, 3, *planes.shape[2:]).tanh()
        return frozen_copy(model.discriminator, setting.dtype), picture, planes

    return generator_case(name, "discriminator", make_inputs=make_inputs, seconds=4.0,
                          targets={"reference": against})


def gradients(generator: nn.Module, image: Tensor) -> list[Tensor]:
    """Of the picture's mean square, by all parameters that have one."""
    parameters = [p for p in generator.parameters() if p.requires_grad]
    found = torch.autograd.grad(image.float().square().mean(), parameters, allow_unused=True)
    return [g for g in found if g is not None]


def step_case(name: str, batch: int, **options: Any) -> Case:
    """A generator's forward and backward in training mode: batch statistics, all gradients.

    Floats of the setting's dtype are those of autocast; the weights stay in float32.
    """

    def make_inputs(setting: Setting) -> Inputs:
        model = model_of(name, setting)
        generator = copy.deepcopy(model.generator)
        planes = maps_of(model, name, setting, 2 if setting.tiny else batch)[2]
        z = generator.sample_latent(len(planes), torch.Generator().manual_seed(0))
        start = {key: b.clone() for key, b in generator.named_buffers()}
        return generator, planes.float(), z, start, setting.dtype

    def step(backend: str | None, low: bool, generator: Any, source: Any, z: Tensor | None,
             start: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        for key, buffer in generator.named_buffers():
            buffer.copy_(start[key])  # power iterations and running statistics: one step each
        generator.train()
        device = next(generator.parameters()).device.type
        before, cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn
        cudnn.allow_tf32 = before and low  # the truth's products are full ones
        try:
            with torch.enable_grad(), use_backend(backend or "auto"), \
                    torch.autocast(device, dtype, enabled=low and dtype != torch.float32):
                image = generator(source, None if z is None else z.to(device))
            with torch.enable_grad():
                found = gradients(generator, image)
        finally:
            cudnn.allow_tf32 = before
        generator.eval()
        for layer in generator.modules():
            if "weight_orig" in layer._parameters:  # a weight with a graph cannot be copied
                layer.weight = layer.weight.detach()
        return [torch.cat([g.flatten().float() for g in found])]

    published = partial(step, "reference", True)
    return generator_case(name, f"training_step_batch{batch}", **{
        "make_inputs": make_inputs, "macs": lambda inputs: 0, "floor": 1e-3, "seconds": 60.0,
        "providers": (Provider("reference", published),
                      Provider("channels_last", published, channels_last),
                      Provider("fused", partial(step, None, True))),
        "truth": partial(step, "reference", False), "graphs": False, **options})


@cache
def _layer(channels: int, classes: int, device: torch.device, dtype: torch.dtype) -> SPADE:
    torch.manual_seed(0)
    return SPADE(channels, classes).to(device, dtype).eval()


def _layer_inputs(setting: Setting, planes: Tensor, channels: int) -> Inputs:
    x = setting.draw(len(planes), *setting.shape(channels), *planes.shape[2:], seed=1)
    layer = _layer(x.shape[1], planes.shape[1], setting.device, setting.dtype)
    return layer, x, planes.to(x)


def layer_map(inputs: Inputs) -> Inputs:
    """Features channels-last, the map as published code hands it over: contiguous planes."""
    return channels_last(inputs[:2]) + inputs[2:]


def layer_layout(inputs: Inputs) -> Inputs:
    """The same with the layout compiled beforehand."""
    module, x, planes = layer_map(inputs)
    layout = LabelLayout.from_tensor(planes)
    assert layout is not None
    layout.level((planes.shape[2], planes.shape[3]))
    return module, x, layout


def layer_tables(inputs: Inputs) -> Inputs:
    """The same with the layer's table kept."""
    module, x, layout = layer_layout(inputs)
    layout.tables = TableCache()
    module(x, layout)
    return module, x, layout


def layer_case(name: str, prepare: Callable[[Inputs], Inputs], batch: int = 1,
               **options: Any) -> Case:
    """One SPADE layer of a COCO model. Floor: x read and y written once."""

    def make_inputs(setting: Setting) -> Inputs:
        labels = setting.labels("indoor", setting.shape(256, 256), COCO_CLASSES, batch)
        return _layer_inputs(setting, one_hot(labels, COCO_CLASSES, setting.dtype), 128)

    return Case(**{
        "name": f"spade_layer/{name}", "make_inputs": make_inputs, "macs": conv_macs,
        "providers": (*baselines(), Provider("fused", ours, prepare)),
        "moved": lambda inputs, outputs: 2 * inputs[1].numel() * inputs[1].element_size(),
        "every_map": True, "seconds": 10.0, "windows": lambda inputs: windows_of(inputs[2]),
        **options})


def growth_case(size: tuple[int, int], batch: int) -> Case:
    """One SPADE layer of 64 channels on street scenes with edges: how cost grows."""

    def make_inputs(setting: Setting) -> Inputs:
        small = setting.shape(*size)
        labels, ids = setting.labels("street", small, 35, batch), setting.instances("street", small,
                                                                                   batch)
        return _layer_inputs(setting, torch.cat([one_hot(labels, 35), instance_edges(ids)], 1), 64)

    return layer_case(
        f"size_{size[1]}x{size[0]}_batch_{batch}", unchanged, make_inputs=make_inputs,
        providers=(Provider("reference", reference), Provider("fused", ours, channels_last)),
        every_map=False, windows=None, scenes="cityscapes", truth=reference, floor=1e-4,
        seconds=4.0)


def noise_case() -> Case:
    """Where nothing repeats: what looking for windows costs beside our own dense path."""

    def make_inputs(setting: Setting) -> Inputs:
        generator = torch.Generator().manual_seed(3)
        labels = torch.randint(0, COCO_CLASSES, (1, *setting.shape(256, 256)), generator=generator)
        planes = one_hot(labels.to(setting.device), COCO_CLASSES, setting.dtype)
        return _layer_inputs(setting, planes, 128)

    def dense(*inputs: Any) -> Any:
        with use_path("dense"):
            return ours(*inputs)

    return layer_case(
        "noise_against_own_dense_path", unchanged, make_inputs=make_inputs,
        providers=(Provider("reference", dense, channels_last),
                   Provider("fused", ours, channels_last)),
        memory_bound=False, every_map=False, windows=None, targets={"reference": 0.95},
        seconds=20.0)


def windows_of(planes: Tensor) -> tuple[int, int, int]:
    """V, U and pixels of a map at its own size."""
    layout = LabelLayout.from_tensor(planes)
    assert layout is not None
    v, u = layout.level((planes.shape[2], planes.shape[3]), unlimited=True).counts
    return v, u, layout.symbols.numel()


def network_bound(inputs: Inputs, call: Callable[[], Any] | None = None) -> Remaining:
    """The products that ours (or ``call``) makes on this map, and passes over features.

    The main convs are those called as modules; each reads a norm's output, and the norm read as
    much: two passes for every conv input.
    """
    module, *arguments = inputs
    moved = largest = 0

    def hook(conv: nn.Conv2d, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal moved, largest
        size = given[0].numel() * given[0].element_size()
        moved, largest = moved + 2 * size, max(largest, size)

    with torch.no_grad(), ExitStack() as hooks:
        for name, layer in module.named_modules():
            # Not on the convs of norms, whose tables would not be made then.
            if isinstance(layer, nn.Conv2d) and ".mlp_" not in name:
                hooks.enter_context(layer.register_forward_hook(hook))
        module(*arguments)
    return Remaining(effective_macs(call or (lambda: module(*arguments))), moved, largest)


def _algebra(name: str, against: float, best: float) -> Case:
    return generator_case(
        name, every_map=True, bound=network_bound, windows=lambda inputs: windows_of(inputs[1]),
        targets={"reference": against, "best": best, "memory": 0.35, "floor": 0.75})


def _family(name: str) -> Case:
    """Dense multiply-accumulates are those of the reference path's convs and matrix products,
    whatever the map; effective ones are those that the fused run makes on this map.
    """

    def counts(inputs: Inputs) -> dict[str, int]:
        generator, *arguments = inputs
        found = {info.name: info.parameters for info in list_models()}[name]
        return {**found, "effective_macs": effective_macs(lambda: generator(*arguments))}

    return generator_case(
        "family", name, make_inputs=partial(generator_inputs, name), macs=dense_macs,
        providers=(Provider("reference", reference, contiguous), Provider("fused", ours)),
        counts=counts, seconds=12.0, truth=reference,
        scenes="cityscapes" if "cityscapes" in name else "coco")


FAMILY_COLUMNS = ("model", "G, M", "E, M", "D, M", "GMAC dense", "GMAC effective", "reference",
                  "fused", "x ref.", "peak MB (ref -> fused)")


def family_table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of :data:`FAMILY_COLUMNS`: one for each model among the records."""
    rows = []
    for (group, *_), found in by_case(records).items():
        fused, published = found.get("fused"), found.get("reference")
        if fused is None or published is None or "effective_macs" not in fused.counts:
            continue
        sizes = (f"{fused.counts[part] / 1e6:.1f}" if part in fused.counts else "-"
                 for part in PARTS)
        rows.append((
            group.split("/")[1], *sizes, f"{fused.macs / 1e9:.1f}",
            f"{fused.counts['effective_macs'] / 1e9:.1f}", duration(published.median),
            duration(fused.median), times_text(speedup(found)),
            f"{published.peak_memory / 1e6:.0f} -> {fused.peak_memory / 1e6:.0f}",
        ))
    return rows


ALGEBRA = [
    layer_case("a_layout_and_tables_in_the_call", layer_map,
               targets={"reference": 12, "best": 8}),
    layer_case("b_layout_given", layer_layout, targets={"reference": 15, "best": 10}),
    layer_case("c_tables_kept", layer_tables, targets={"reference": 20, "best": 12}),
    *(growth_case(size, 1) for size in ((256, 256), (256, 512), (512, 1024), (1024, 2048))),
    *(growth_case((256, 256), batch) for batch in (4, 16)),
    noise_case(),
    _algebra("spade_coco", 5.5, 4.2),
    _algebra("spade_ade20k", 5.5, 4.2),
    _algebra("groupdnet_ade20k", 11, 8),
    _algebra("groupdnet_deepfashion", 4.8, 3.7),
    _algebra("spade_cityscapes", 5, 4),
    _algebra("groupdnet_cityscapes", 8.5, 2.7),
    further_case("spade_coco_vae", 8, 6),
    further_case("groupdnet_ade20k", 16, 12),
    further_case("groupdnet_deepfashion", 5.2, 4.3),
    encoder_case(8),
    step_case("spade_coco", 2, targets={"reference": 2.3, "best": 2.2}),
]
CCFPSE = [
    generator_case("ccfpse_coco", seconds=30.0,
                   targets={"reference": 3.5, "best": 3, "memory": 0.25}),
    discriminator_case("ccfpse_coco", 1.3),
]
PIX2PIXHD = [generator_case("pix2pixhd_cityscapes", seconds=90.0, truth=reference,
                            targets={"reference": 2.4, "best": 2.1, "memory": 0.6})]
FAMILY = [_family(name) for name in MODELS]
