"""Every case of the harness, and choices of ours held against measurement.

``pytest benchmarks -k pattern`` picks cases by name.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor

from smis_kernels import CGNorm, LabelLayout, instance_avg_pool2d, use_path
from smis_kernels.layout.planner import costs
from smis_models.benchmark.ops import STREET, tiles
from smis_models.benchmark.records import Record
from smis_models.benchmark.timing import interleave
from smis_models.data.scenes import sample_scene

Norm = tuple[int, int, int, int, int, int]
# (channels, label channels, hidden, groups, shared groups, size): one norm of each kind of network.
NORMS = [
    (1024, 183, 128, 1, 1, 16), (512, 183, 128, 1, 1, 64), (128, 183, 128, 1, 1, 256),
    (2416, 151, 2416, 16, 151, 8), (512, 151, 302, 2, 151, 64), (128, 151, 302, 1, 151, 256),
    (1280, 8, 128, 4, 4, 64), (160, 8, 128, 1, 1, 256),
]


def test_set(measured: Record) -> None:
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_chosen_path_is_within_ten_percent_of_the_best(norm: Norm) -> None:
    channels, labels, hidden, groups, shared, size = norm
    module = CGNorm(channels, labels, hidden, groups=groups, shared_groups=shared).eval()
    scene = sample_scene("indoor", 256, 256, labels, seed=0)
    maps = torch.from_numpy(scene.labels.astype("int64"))[None]
    layout = LabelLayout.from_labels(maps, labels)
    level = layout.level((size, size))
    x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)

    def call(path: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad(), use_path(path):
                return module(x, layout)
        return run

    expected = costs(module, level, size * size)
    chosen = min(expected, key=lambda path: expected[path])
    times = interleave({path: call(path) for path in expected}, 3.0)
    found = {path: median(t) for path, t in times.items()}
    assert found[chosen] <= 1.1 * min(found.values()), (chosen, found, expected)


def test_cost_does_not_depend_on_the_number_of_instances() -> None:
    x = torch.randn((1, 3, *STREET))

    def pool(count: int) -> Callable[[], Tensor]:
        ids = tiles(count)
        return lambda: instance_avg_pool2d(x, ids)

    times = interleave({str(count): pool(count) for count in (10, 10_000)}, 2.0)
    few, many = (median(times[name]) for name in ("10", "10000"))
    assert many <= 1.5 * few, (few, many)
