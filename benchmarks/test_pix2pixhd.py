"""The set ``pix2pixhd``, and the cost of pooling held against the number of instances."""

from __future__ import annotations

import torch

from smis_kernels import instance_avg_pool2d
from smis_models.benchmark.pix2pixhd import SIZE, tiles
from smis_models.benchmark.timing import interleave

SET = "pix2pixhd"


def test_pix2pixhd(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"


def test_cost_does_not_depend_on_the_number_of_instances():
    x = torch.randn((1, 3, *SIZE))

    def pool(count):
        ids = tiles(count)
        return lambda: instance_avg_pool2d(x, ids)

    times = interleave({str(count): pool(count) for count in (10, 10_000)}, 2.0)
    few, many = (sorted(times[name])[len(times[name]) // 2] for name in ("10", "10000"))
    assert many <= 1.5 * few, (few, many)
