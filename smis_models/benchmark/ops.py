"""Cases of single ops, for any shape; their floors are what any implementation must move."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from smis_kernels import (
    class_crops,
    conditional_attention,
    conditional_conv2d,
    instance_avg_pool2d,
    instance_edges,
    modulation,
    norm_act,
    spatially_varying_conv2d,
    spectral_weight,
)
from smis_kernels.ops.class_crops import reference as crops_reference
from smis_kernels.ops.conditional_attention import reference as attention_reference
from smis_kernels.ops.conditional_conv import reference as conditional_reference
from smis_kernels.ops.instance_edges import reference as edges_reference
from smis_kernels.ops.instance_pool import reference as pool_reference
from smis_kernels.ops.modulation import reference as modulation_reference
from smis_kernels.ops.norm_act import reference as norm_act_reference
from smis_kernels.ops.spatially_varying_conv import reference as varying_reference
from smis_kernels.ops.spectral_weight import reference as spectral_reference

from .case import (
    Case,
    Inputs,
    Provider,
    Remaining,
    Run,
    Setting,
    channels_last,
    nbytes,
    providers,
    read_and_written,
    unchanged,
)
from .macs import effective_macs

Shape = tuple[int, int, int, int]
STREET = (512, 1024)


def _draws(setting: Setting, *shapes: tuple[int, ...]) -> Inputs:
    return tuple(setting.draw(*setting.shape(*shape), seed=i) for i, shape in enumerate(shapes))


def _size(shape: tuple[int, ...]) -> str:
    n, *rest = shape
    return "x".join(map(str, rest if n == 1 else shape))


def modulated(op: Run, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor,
              **options: Any) -> Tensor:
    """Normalisation by running statistics (or of the batch), gamma, beta and LeakyReLU."""
    return op(x, gamma, beta, running_mean=mean, running_var=var, activation="leaky_relu",
              **options)


def modulation_case(name: str, shape: Shape, *, upsample: bool = False, training: bool = False,
                    last: bool = False, **options: Any) -> Case:
    """Dense gamma and beta of every pixel, LeakyReLU; statistics known unless ``training``.

    Floor in eval: x, gamma, beta read and y written once. In training 15 streams of the output's
    size: forward x (statistics), x, gamma, beta, y; backward dy, y, x, gamma, dgamma, dbeta, then,
    once the sums are known, dbeta, gamma, x, dx.
    """
    n, c, h, w = shape

    def make_inputs(setting: Setting) -> Inputs:
        *most, height, width = setting.shape(n, c, h // 2, w // 2) if upsample else (
            setting.shape(*shape))
        up = 2 if upsample else 1
        x = setting.draw(*most, height, width)
        gamma, beta = (setting.draw(*most, up * height, up * width, seed=i) for i in (1, 2))
        mean = setting.draw(x.shape[1], seed=3).float()
        return x, gamma, beta, mean, mean.square() + 0.5

    given: dict[str, Any] = {"training": training, "upsample": upsample}
    return Case(
        name=f"modulation/{name}_{_size(shape)}", make_inputs=make_inputs,
        providers=providers(partial(modulated, modulation_reference.modulation, **given),
                            partial(modulated, modulation, **given),
                            prepare=channels_last if last else unchanged),
        direction="step" if training else "forward", leaves=(0, 1, 2) if training else (),
        moved=(lambda inputs, outputs: 15 * nbytes(inputs[0])) if training else read_and_written,
        macs=lambda inputs: (6 if training else 2) * inputs[1].numel(), **options,
    )


def crops_case(name: str, classes: int, batch: int = 1, **options: Any) -> Case:
    """Floor: image and labels read once, the crops written once."""

    def make_inputs(setting: Setting) -> Inputs:
        (image,) = _draws(setting, (batch, 3, 256, 256))
        kind = "person" if classes == 8 else "indoor"
        return image, setting.labels(kind, image.shape[2:], classes, len(image)), classes

    def reference(image: Tensor, labels: Tensor, count: int) -> Tensor:
        size = (image.shape[2], image.shape[3])
        return crops_reference.class_crops(image, labels, count, size, "nonzero")

    return Case(name=f"class_crops/{name}", make_inputs=make_inputs,
                providers=providers(reference, class_crops, loops=True), **options)


def edges_case(size: tuple[int, int], batch: int = 1, **options: Any) -> Case:
    """Floor: ids read once, edges written once."""

    def make_inputs(setting: Setting) -> Inputs:
        ids = setting.instances("street", setting.shape(*size))
        return (ids.expand(batch, -1, -1).contiguous(),)

    return Case(
        name=f"instance_edges/{_size((batch, *size))}", make_inputs=make_inputs,
        providers=providers(partial(edges_reference.instance_edges, dtype=torch.float32),
                            instance_edges), **options,
    )


def tiles(count: int, size: tuple[int, ...] = STREET) -> Tensor:
    """(1, H, W) ids of ``count`` instances, each a rectangle: as many large ones as small ones."""
    rows = max(1, int((count * size[0] / size[1]) ** 0.5))
    y, x = (torch.arange(s) * cells // s
            for s, cells in zip(size, (rows, count // rows), strict=True))
    return (y[:, None] * (count // rows) + x)[None]


def index_add_pool(input: Tensor, instance_map: Tensor) -> Tensor:
    """The pooling by torch's own calls: unique, index_add on (pixels, C) rows, one gather."""
    n, c, h, w = input.shape
    images = torch.arange(n, device=input.device).view(n, 1, 1)
    keys = instance_map.long() + (images << 32)
    _, index, count = keys.flatten().unique(return_inverse=True, return_counts=True)
    rows = input.permute(0, 2, 3, 1).reshape(-1, c)
    sums = rows.new_zeros((len(count), c)).index_add_(0, index, rows)
    means = sums / count.unsqueeze(1)
    return means[index].view(n, h, w, c).permute(0, 3, 1, 2)


def pool_case(name: str, reference: Run, channels: int, size: tuple[int, int] = STREET,
              ids: int = 0, **options: Any) -> Case:
    """Of a street's instances, or of ``ids`` tiles. Floor: x and y once, the ids twice."""

    def make_inputs(setting: Setting) -> Inputs:
        (x,) = _draws(setting, (1, channels, *size))
        found = (tiles(ids, x.shape[2:]).to(setting.device) if ids
                 else setting.instances("street", x.shape[2:]))
        return x, found

    return Case(
        name=f"instance_pool/{_size((1, channels, *size))}_{name}", make_inputs=make_inputs,
        providers=providers(reference, instance_avg_pool2d, loops=True), scenes="cityscapes",
        moved=lambda inputs, outputs: nbytes(inputs[0], outputs) + 2 * nbytes(inputs[1]),
        **options,
    )


def norm_act_case(name: str, shape: Shape, *, last: bool = False, **options: Any) -> Case:
    """Instance norm, ReLU and a residual. Floor: x read twice (statistics), r once, y written."""
    return Case(
        name=f"norm_act/{name}{_size(shape)}",
        make_inputs=lambda setting: _draws(setting, shape, shape),
        providers=providers(
            partial(norm_act_reference.norm_act, norm="instance", activation="relu"),
            partial(norm_act, activation="relu"), prepare=channels_last if last else unchanged),
        moved=lambda inputs, outputs: nbytes(inputs, outputs) + nbytes(inputs[0]), **options,
    )


def attention_case(shape: Shape, **options: Any) -> Case:
    """Floor: x and the logits read once, y written once."""
    return Case(
        name=f"conditional_attention/{_size(shape)}",
        make_inputs=lambda setting: _draws(setting, shape, shape),
        providers=providers(attention_reference.conditional_attention, conditional_attention),
        **options)


def varying_case(shape: Shape, direction: str = "forward", *, last: bool = False,
                 **options: Any) -> Case:
    """Floor: x and the weights read once, y written once; backward also reads dy once more and
    writes the two gradients."""

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return varying_reference.spatially_varying_conv2d(x, weight.unflatten(1, (x.shape[1], 9)))

    def make_inputs(setting: Setting) -> Inputs:
        count, channels, *size = setting.shape(*shape)
        return (setting.draw(count, channels, *size),
                setting.draw(count, 9 * channels, *size, seed=1))

    backward = direction == "backward"
    return Case(
        name="spatially_varying_conv2d/"
             f"{'channels_last_' if last else ''}{direction}_{_size(shape)}",
        make_inputs=make_inputs, direction=direction, leaves=(0, 1) if backward else (),
        providers=providers(reference, spatially_varying_conv2d,
                            prepare=channels_last if last else unchanged),
        moved=(lambda inputs, outputs: 2 * nbytes(inputs) + nbytes(inputs[0])) if backward
        else read_and_written,
        macs=lambda inputs: inputs[1].numel() * (2 if backward else 1), **options,
    )


def conditional_case(shape: Shape, direction: str = "forward", **options: Any) -> Case:
    """Floor of the forward: the multiply-adds that our form of it makes."""

    def make_inputs(setting: Setting) -> Inputs:
        x, condition = _draws(setting, shape, (shape[0], 128, *shape[2:]))
        k, depth = x.shape[1], condition.shape[1]
        weight = setting.draw(9 * k, depth, 3, 3, seed=2) / (9 * depth) ** 0.5
        return x, condition.relu(), weight, setting.draw(9 * k, seed=3)

    step = direction == "step"

    def macs(inputs: Inputs) -> int:
        x, _, weight, _ = inputs
        return weight.numel() * (x.numel() // x.shape[1]) * (3 if step else 1)

    return Case(
        name=f"conditional_conv2d/{direction}_{_size(shape)}", make_inputs=make_inputs,
        providers=providers(conditional_reference.conditional_conv2d, conditional_conv2d),
        direction=direction, leaves=(0, 1, 2, 3) if step else (), macs=macs, memory_bound=False,
        bound=None if step else lambda inputs: Remaining(
            effective_macs(lambda: conditional_conv2d(*inputs)), 0, 0), **options,
    )


def spectral_case() -> Case:
    """The weight of one of SPADE's widest convs: forward and backward.

    Floor: the weight for its singular value, for the division and for the product with its
    gradient, the gradient twice, both results once.
    """

    def make_inputs(setting: Setting) -> Inputs:
        (weight,) = _draws(setting, (1024, 1024, 3, 3))
        u, v = (torch.rand(k, generator=torch.Generator().manual_seed(k)).to(weight) / k
                for k in (len(weight), weight[0].numel()))
        return weight, u, v

    reference = spectral_reference.spectral_weight
    return Case(
        name="spectral_weight/1024x1024x3x3", direction="step", make_inputs=make_inputs,
        leaves=(0,), moved=lambda inputs, outputs: 7 * nbytes(inputs[0]),
        providers=(Provider("reference", reference),
                   Provider("compiled", reference, compile=True),
                   Provider("fused", spectral_weight)),
    )


_PLANE: Shape = (1, 128, 256, 256)
_SCRATCH = {"scratch": 0.01}
_MODULATION = {"reference": 3.0, "copy": 0.8, **_SCRATCH}

MODULATION = [
    modulation_case("dense", _PLANE, targets=_MODULATION, confirm=True),
    modulation_case("upsampled", _PLANE, upsample=True, targets={**_MODULATION, "reference": 4.0}),
    modulation_case("channels_last", _PLANE, last=True, targets=_SCRATCH),
    modulation_case("dense", (1, 1024, 16, 16), targets=_SCRATCH),
    modulation_case("training", _PLANE, training=True),
    crops_case("ade20k", 151, targets={"reference": 100, **_SCRATCH}),
    crops_case("deepfashion", 8, targets={"reference": 10, **_SCRATCH}),
    edges_case(STREET, targets=_SCRATCH),
]
PIX2PIXHD = [
    pool_case("loop", pool_reference.instance_avg_pool2d, 3, targets={"reference": 60.0}),
    pool_case("index_add", index_add_pool, 3, targets={"best": 6.0}),
    pool_case("index_add", index_add_pool, 64, targets={"best": 5.0}),
    *(pool_case(f"{count}_ids", index_add_pool, 3, ids=count) for count in (10, 10_000)),
    norm_act_case("", (1, 64, *STREET)),
    norm_act_case("channels_last_", (1, 64, *STREET), last=True),
]
CCFPSE = [
    varying_case(_PLANE, targets={"reference": 4.0, "copy": 0.75}),
    varying_case(_PLANE, "backward", targets={"reference": 3.0}),
    varying_case(_PLANE, last=True),
    conditional_case(_PLANE, seconds=20.0, confirm=True,
                     targets={"reference": 1.2, "best": 1.0, "memory": 0.05}),
    conditional_case(_PLANE, "step", seconds=20.0, targets={"reference": 1.0, "memory": 0.2}),
    attention_case(_PLANE),
]
SPECTRAL = [spectral_case()]
