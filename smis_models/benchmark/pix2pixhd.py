"""The set ``pix2pixhd``: instance-wise pooling, norm + ReLU + residual, and G1 whole."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from smis_kernels import instance_avg_pool2d, norm_act
from smis_kernels.ops.instance_pool import reference as instance_pool_reference
from smis_kernels.ops.norm_act import reference as norm_act_reference

from ..families import create_model
from ..networks.semantics import semantics
from .case import Case, Inputs, Setting, channels_last, nbytes, providers, unchanged
from .modulation import conv_macs, on_backend

SIZE = (512, 1024)


def _features(setting: Setting, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, channels, *SIZE), generator=generator)
    return x.to(setting.device, setting.dtype)


def _ids(setting: Setting) -> Tensor:
    found = setting.maps.instances("street", SIZE, setting.index)
    return torch.from_numpy(found)[None].to(setting.device)


def tiles(count: int) -> Tensor:
    """(1, H, W) ids of ``count`` instances, each a rectangle: as many large ones as small ones."""
    rows = max(1, int((count * SIZE[0] / SIZE[1]) ** 0.5))
    columns = count // rows
    y, x = (torch.arange(size) * cells // size for size, cells in zip(SIZE, (rows, columns),
                                                                     strict=True))
    return (y[:, None] * columns + x)[None]


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


def _pooled_bytes(inputs: Inputs, outputs: Tensor) -> int:
    """x read once, the ids twice, y written once."""
    return nbytes(inputs[0], outputs) + 2 * nbytes(inputs[1])


def _loop_case() -> Case:
    """Against the published loop. Floor: x read once, the ids twice, y written once."""

    def make_inputs(setting: Setting) -> Inputs:
        return _features(setting, 3), _ids(setting)

    return Case(
        name="instance_pool/3x512x1024_loop", make_inputs=make_inputs, scenes="cityscapes",
        providers=providers(instance_pool_reference.instance_avg_pool2d, instance_avg_pool2d,
                            compile=False),
        moved=_pooled_bytes, targets={"reference": 60.0}, graphs=False,
    )


def _index_add_case(channels: int, least: float) -> Case:
    """Against torch's own calls, the faster of their layouts. Floor: as against the loop."""

    def make_inputs(setting: Setting) -> Inputs:
        return _features(setting, channels), _ids(setting)

    return Case(
        name=f"instance_pool/{channels}x512x1024_index_add", make_inputs=make_inputs,
        scenes="cityscapes", providers=providers(index_add_pool, instance_avg_pool2d,
                                                 compile=False),
        moved=_pooled_bytes, targets={"best": least}, graphs=False,
    )


def _tiles_case(count: int) -> Case:
    """The time must not depend on ``count``: benchmarks/test_pix2pixhd.py compares the two."""

    def make_inputs(setting: Setting) -> Inputs:
        return _features(setting, 3), tiles(count).to(setting.device)

    return Case(
        name=f"instance_pool/3x512x1024_{count}_ids", make_inputs=make_inputs,
        providers=providers(index_add_pool, instance_avg_pool2d, compile=False),
        moved=_pooled_bytes, graphs=False,
    )


def _norm_act_case(name: str, channels: int, size: tuple[int, int], *, last: bool) -> Case:
    """Instance norm, ReLU and a residual. Floor: x read twice (statistics), r once, y written."""

    def make_inputs(setting: Setting) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn((1, channels, *size), generator=generator)
                     .to(setting.device, setting.dtype) for _ in range(2))

    return Case(
        name=f"norm_act/{name}", make_inputs=make_inputs,
        providers=providers(
            partial(norm_act_reference.norm_act, norm="instance", activation="relu"),
            partial(norm_act, activation="relu"), prepare=channels_last if last else unchanged,
        ),
        moved=lambda inputs, outputs: nbytes(inputs, outputs) + nbytes(inputs[0]),
    )


def _generator_case(name: str) -> Case:
    """A generator with published options and random weights, eval, N=1."""

    def make_inputs(setting: Setting) -> Inputs:
        generator = create_model(name, part="generator", device=setting.device,
                                 dtype=setting.dtype).eval()
        preset = generator.preset
        labels = setting.maps.labels("street", preset.image_size, preset.classes, setting.index)
        ids = setting.maps.instances("street", preset.image_size, setting.index)
        planes = semantics(torch.from_numpy(labels)[None], preset, torch.from_numpy(ids)[None],
                           dtype=setting.dtype)
        return generator, planes.to(setting.device)

    return Case(
        name=f"{name}/generator", make_inputs=make_inputs, scenes="cityscapes",
        providers=providers(on_backend("reference"), on_backend("auto")),
        macs=conv_macs, memory_bound=False, floor=1e-4, seconds=90.0, single_precision_truth=True,
        targets={"reference": 1.25, "best": 1.1, "memory": 0.6},
    )


CASES = [
    _loop_case(),
    _index_add_case(3, 6.0),
    _index_add_case(64, 5.0),
    _tiles_case(10),
    _tiles_case(10_000),
    _norm_act_case("64x512x1024", 64, SIZE, last=False),
    _norm_act_case("channels_last_64x512x1024", 64, SIZE, last=True),
    _generator_case("pix2pixhd_cityscapes"),
]
