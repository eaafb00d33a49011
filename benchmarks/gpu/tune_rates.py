"""Rows of the ``tune`` part: the costs by which a norm chooses between convs and tables.

Each path's forward is timed as networks run it, from a CUDA graph, less the read and write of the
features that all paths share; a fixed cost and a rate are fitted over norms of several sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from smis_kernels import SPADE, LabelLayout, use_path
from smis_kernels.layout.planner import products_key
from smis_kernels.ops.indexed_modulation.op import indexed_modulation
from smis_models.benchmark.case import COCO_CLASSES, Setting
from smis_models.benchmark.timing import replay_seconds

from .results import Row

# Channels and size, as in SPADE COCO; the small ones show what a path costs at the least.
NORMS = ((128, 256), (256, 128), (512, 64), (1024, 32), (1024, 16), (1024, 8))
PATHS = ("dense", "two_level", "one_level")
Point = tuple[float, float]  # work, nanoseconds


def fit(points: Sequence[Point]) -> tuple[float, float]:
    """(fixed, slope) of fixed + slope * work by least squares of relative errors.

    Where that makes one of them negative, it is a slope alone.
    """
    scaled = [(1 / t, w / t) for w, t in points]
    a, b, c = (sum(x[i] * x[j] for x in scaled) for i, j in ((0, 0), (0, 1), (1, 1)))
    e, f = (sum(x[i] for x in scaled) for i in (0, 1))
    determinant = a * c - b * b
    fixed, slope = (0.0, f / c)
    if determinant > 1e-12 * a * c:
        fixed, slope = (c * e - b * f) / determinant, (a * f - b * e) / determinant
    return (fixed, slope) if fixed >= 0 and slope > 0 else (0.0, f / c)


def _norm(place: Setting, channels: int, size: int) -> dict[str, Any]:
    """Nanoseconds of each path, and the work in each, for one norm."""
    torch.manual_seed(0)
    norm = SPADE(channels, COCO_CLASSES).eval().to(place.device, place.dtype)
    layout = LabelLayout.from_labels(place.labels("indoor", (size, size), COCO_CLASSES),
                                     COCO_CLASSES)
    level = layout.level((size, size), unlimited=True)
    v, u = level.counts
    shared = norm.shared_conv
    assert shared is not None
    x = place.draw(1, channels, size, size).to(memory_format=torch.channels_last)
    rounds = place.pick(7, 1)
    with torch.no_grad():
        table = norm.table(layout, (size, size), "one_level")
        products = table.new_empty((v + 1, 9, 2 * channels), dtype=torch.float32).normal_()
        calls: dict[str, Callable[[], Any]] = {
            "shared": lambda: indexed_modulation(x, level.index5, table, **norm.norm_arguments()),
            # the nine-row sums alone, as an embedding whose products are given
            "sums": lambda: torch.ops.smis_kernels.window_sum(products, level.windows5, None,
                                                              False),
        }
        times = {name: 1e9 * replay_seconds(call, place.device, rounds)
                 for name, call in calls.items()}
        for path in PATHS:
            with use_path(path):
                times[path] = 1e9 * replay_seconds(lambda: norm(x, layout), place.device, rounds)
    convs = 2 * norm.mlp_gamma.weight.numel()
    work = {"dense": size * size * (convs + shared.weight.numel()),
            "two_level": v * convs, "one_level": u * convs, "sums": u * 18 * channels}
    embedding = v * 9 * norm.hidden
    return {"times": times, "work": work, "embedding": embedding, "V": v, "U": u}


def fitted(norms: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The planner's rates and fixed costs from the norms' times, the inverse of its ``costs``.

    Beside them the largest relative error of each path's fit.
    """
    _, sums = fit([(n["work"]["sums"], n["times"]["sums"]) for n in norms])
    found, misfits = {"sums": 1 / sums}, {}
    for path in PATHS:
        points = []
        for n in norms:
            left = n["times"][path] - n["times"]["shared"]
            if path != "dense":
                left -= n["embedding"] * sums
            if path == "two_level":
                left -= n["work"]["sums"] * sums
            points.append((n["work"][path], max(left, 0.05 * n["times"][path])))
        fixed, slope = fit(points)
        found |= {path: 1 / slope, f"fixed_{path}": fixed}
        misfits[path] = max(abs((fixed + slope * w) / t - 1) for w, t in points)
    return found, misfits


def _rates(place: Setting, tf32: bool) -> Row:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        norms = [_norm(place, c, s) for c, s in place.pick(NORMS, ((8, 16), (8, 8)))]
        rates, misfits = fitted(norms)
        return {"rates": {products_key(place.dtype): rates},
                "chosen": {k: round(v, 3) for k, v in rates.items()}, "misfits": misfits,
                "norms": norms}
    finally:
        torch.backends.cudnn.allow_tf32 = before


def path_rates(place: Setting) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, row) for each way to multiply."""
    wanted = ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))
    for dtype, tf32 in place.pick(wanted, wanted[1:2]):
        name = f"path rates, {str(dtype).removeprefix('torch.')}"
        row = partial(_rates, replace(place, dtype=dtype), tf32)
        yield name if tf32 else f"{name} without tf32", row
