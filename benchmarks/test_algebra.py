"""The set ``algebra``, and the choice of path held against measurement."""

from __future__ import annotations

import pytest
import torch

from smis_kernels import CGNorm, LabelLayout, use_path
from smis_kernels.layout.planner import costs
from smis_models.benchmark.timing import interleave
from smis_models.data.scenes import sample_scene

SET = "algebra"
# (channels, label channels, hidden, groups, shared groups, size): one norm of each kind of network.
NORMS = [
    (1024, 183, 128, 1, 1, 16), (512, 183, 128, 1, 1, 64), (128, 183, 128, 1, 1, 256),
    (2416, 151, 2416, 16, 151, 8), (512, 151, 302, 2, 151, 64), (128, 151, 302, 1, 151, 256),
    (1280, 8, 128, 4, 4, 64), (160, 8, 128, 1, 1, 256),
]


def test_algebra(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_chosen_path_is_within_ten_percent_of_the_best(norm):
    channels, labels, hidden, groups, shared, size = norm
    module = CGNorm(channels, labels, hidden, groups=groups, shared_groups=shared).eval()
    scene = sample_scene("indoor", 256, 256, labels, seed=0)
    maps = torch.from_numpy(scene.labels.astype("int64"))[None]
    layout = LabelLayout.from_labels(maps, labels)
    level = layout.level((size, size))
    x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)

    def call(path):
        def run():
            with torch.no_grad(), use_path(path):
                return module(x, layout)
        return run

    expected = costs(module, level, size * size)
    chosen = min(expected, key=expected.get)
    times = interleave({path: call(path) for path in expected}, 3.0)
    median = {path: sorted(t)[len(t) // 2] for path, t in times.items()}
    assert median[chosen] <= 1.1 * min(median.values()), (chosen, median, expected)
