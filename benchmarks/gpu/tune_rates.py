"""Rows of the ``tune`` part: the rates by which a norm chooses between convs and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import geometric_mean, median
from typing import Any

import torch

from smis_kernels import SPADE
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_models.benchmark import timing
from smis_models.networks.semantics import one_hot

from .inputs import COCO, Scene
from .journal import Row

NORMS = ((128, 256), (512, 64), (1024, 32))  # channels, size: SPADE COCO's large, middle and small


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    clock = timing.cuda_seconds if device.type == "cuda" else timing.cpu_seconds
    with torch.no_grad():
        for _ in range(3):
            call()
        return median(clock(call, 3) for _ in range(7))


def _norm(scene: Scene, channels: int, size: int, dtype: torch.dtype) -> dict[str, float]:
    """Multiply-adds (or additions) a nanosecond of each path's work for one norm."""
    torch.manual_seed(0)
    norm = SPADE(channels, COCO).eval().to(scene.device, dtype)
    labels = scene.labels("indoor", (size, size), COCO)
    layout = scene.layout(labels, COCO)
    level = layout.level((size, size), unlimited=True)
    v, u = level.counts
    planes = one_hot(labels, COCO, dtype).to(memory_format=torch.channels_last)
    wide = torch.float32
    shared, gamma, beta = norm.mlp_shared[0], norm.mlp_gamma, norm.mlp_beta
    hidden = window_embedding(layout.vectors, shared.weight.to(wide), shared.bias.to(wide),
                              level.windows3)
    per_output = 2 * gamma.weight.numel()
    products = hidden.new_empty((v + 1, 9, 2 * channels)).normal_()

    def table(one_level: bool) -> Callable[[], Any]:
        return lambda: window_table(hidden, gamma.weight, gamma.bias, beta.weight, beta.bias,
                                    level.windows5, one_level=one_level)

    def sums() -> Any:
        # the nine-row sums alone, as an embedding whose products are given
        return torch.ops.smis_kernels.window_sum(products, level.windows5, None, False)

    nanoseconds = {
        "dense": 1e9 * _seconds(lambda: norm.gamma_beta(planes, (size, size), True), scene.device),
        "one_level": 1e9 * _seconds(table(True), scene.device),
        "two_level": 1e9 * _seconds(table(False), scene.device),
        "sums": 1e9 * _seconds(sums, scene.device),
    }
    two_level = max(nanoseconds["two_level"] - nanoseconds["sums"], 0.1 * nanoseconds["two_level"])
    return {
        "dense": size * size * (per_output + shared.weight.numel()) / nanoseconds["dense"],
        "one_level": u * per_output / nanoseconds["one_level"],
        "two_level": v * per_output / two_level,
        "sums": u * 18 * channels / nanoseconds["sums"],
    }


def _rates(scene: Scene, dtype: torch.dtype) -> Row:
    norms = scene.pick(NORMS, ((8, 16),))
    each = {f"{c} channels, {s}x{s}": _norm(scene, c, s, dtype) for c, s in norms}
    rates = {name: geometric_mean(norm[name] for norm in each.values())
             for name in ("dense", "two_level", "one_level", "sums")}
    name = str(dtype).removeprefix("torch.")
    return {"rates": {name: rates}, "chosen": {k: round(v, 3) for k, v in rates.items()},
            "norms": each}


def path_rates(scene: Scene) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, row) for each dtype."""
    for dtype in scene.pick((torch.bfloat16, torch.float32), (torch.float32,)):
        yield f"path rates, {str(dtype).removeprefix('torch.')}", partial(_rates, scene, dtype)
