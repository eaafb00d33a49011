"""The set ``family``: multiply-accumulates as counted by hand, and the table of all models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smis_kernels import (
    SPADE,
    LabelLayout,
    conditional_conv2d,
    polyphase_conv2d,
    polyphase_conv_transpose2d,
    spatially_varying_conv2d,
    use_backend,
    use_path,
    winograd_conv2d,
)
from smis_kernels.ops.label_windows.op import group_windows
from smis_kernels.ops.level_tables.op import NormConvs, level_tables
from smis_kernels.ops.window_table.op import window_table
from smis_kernels.runtime.backend import missing
from smis_models import create_model
from smis_models.benchmark import Setting, cases, measure
from smis_models.benchmark import networks as zoo
from smis_models.benchmark.macs import dense_macs, effective_macs
from smis_models.families import MODELS

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
# Published networks at batch 1, in units of 10^9: counted from the published code.
DENSE = {
    "groupdnet_deepfashion": 291.3, "groupdnet_ade20k": 382.7, "groupdnet_cityscapes": 462.7,
    "spade_coco": 191.1, "spade_ade20k": 181.2, "spade_cityscapes": 281.3,
    "ccfpse_coco": 455.8, "ccfpse_cityscapes": 738.7,
    "pix2pixhd_cityscapes": 489, "pix2pixhd_cityscapes_1024": 748,
}
SIZE = (32, 32)


def features(channels: int) -> Tensor:
    x = torch.randn((1, channels, *SIZE), generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def on_meta(name: str) -> tuple[Any, ...]:
    """A full-size generator and its inputs, without memory."""
    generator = create_model(name, part="generator", device="meta").eval()
    preset = generator.preset
    planes = torch.empty((1, preset.semantic_channels, *preset.image_size), device="meta")
    z = generator.sample_latent(1)
    return (generator, planes) if z is None else (generator, planes, z)


@pytest.mark.parametrize(("name", "expected"), DENSE.items())
def test_dense_macs_are_those_of_the_published_code(name: str, expected: float) -> None:
    digits = 0.06 if expected % 1 else 0.6
    assert dense_macs(on_meta(name)) / 1e9 == pytest.approx(expected, abs=digits)


@needs_cpu
@pytest.mark.parametrize("path", ["one_level", "two_level"])
def test_tables_are_counted_by_their_windows(path: str) -> None:
    norm = SPADE(16, 5, 8).eval()
    labels = torch.zeros(1, *SIZE, dtype=torch.long)
    labels[:, 10:20, 5:25] = 3
    layout = LabelLayout.from_labels(labels, 5)
    level = layout.level(SIZE)
    v, u = level.counts
    symbols = len(layout.vectors)
    with use_path(path):
        found = effective_macs(lambda: norm(features(16), layout))
    embedding = symbols * 5 * 9 * 8  # every symbol's vector by every tap, summed by window
    assert found == embedding + (u if path == "one_level" else v) * 2 * 9 * 8 * 16
    with use_path("dense"):
        dense = effective_macs(lambda: norm(features(16), layout))
    assert dense == 32 * 32 * (9 * 5 * 8 + 2 * 9 * 8 * 16)


@needs_cpu
def test_groups_are_counted_by_windows_of_their_own() -> None:
    vectors = torch.tensor([[0., 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    windows = torch.cat([torch.zeros(1, 9), torch.arange(1, 4)[:, None].expand(3, 9)]).int()
    own = group_windows(vectors, windows, [(0, 2), (2, 4), (0, 2)])
    rows = [int(own.counts[kind]) for kind in own.kinds]
    assert rows == [3, 2, 3]  # of three windows: the second group sees two of them empty
    weights = torch.randn(12, 4, 3, 3), torch.zeros(12), torch.randn(12, 4, 3, 3), torch.zeros(12)
    level = torch.zeros(6, 9, dtype=torch.int32)
    found = effective_macs(
        lambda: window_table(torch.zeros(4, 12), *weights, level, own=own, groups=3))
    assert found == sum(rows) * 2 * 9 * 4 * 4  # four channels of four inputs a group


@needs_cpu
def test_ops_are_counted_by_hand() -> None:
    x, pixels = features(8), 32 * 32
    weight = torch.randn(12, 8, 3, 3)
    assert effective_macs(lambda: winograd_conv2d(x, weight)) == pixels * 4 * 8 * 12
    assert effective_macs(lambda: winograd_conv2d(x, weight, tile=4)) == pixels * 36 // 16 * 8 * 12
    kernels = torch.randn(9 * 8, 6, 3, 3)
    for tile in (2, 4):
        found = effective_macs(lambda t=tile: conditional_conv2d(x, features(6), kernels, tile=t))
        assert found == pixels // tile**2 * (tile + 2) ** 2 * 9 * 8 * 6 + pixels * 9 * 8
    varying = torch.randn(1, 9 * 8, *SIZE)
    assert effective_macs(lambda: spatially_varying_conv2d(x, varying)) == pixels * 9 * 8
    grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    assert effective_macs(lambda: grouped(x)) == pixels * 9 * 2 * 12
    convs = (torch.randn(16, 4, 3, 3), torch.randn(16), *(torch.randn(64, 16, 3, 3),
                                                          torch.randn(64)) * 2)
    windows = torch.zeros(8, 9, dtype=torch.int32)
    assert effective_macs(lambda: level_tables(  # widths and depths that tiles need not pad
        torch.zeros(5, 4), windows, windows, [NormConvs(*convs, 1, 1)] * 2)
    ) == 2 * 7 * 9 * 16 * 128  # the embedding only picks


@needs_cpu
def test_convs_by_phases_are_counted_by_hand() -> None:
    """F(3, 2) takes 4 products a row, F(3, 1) 3: (4 + 3)² of the phases of 3x3, (4 + 4)² of 4x4."""
    x = torch.randn(1, 8, 36, 36)
    for side, products in ((3, 49), (4, 64)):
        weight = torch.randn(12, 8, side, side)
        found = effective_macs(lambda w=weight: polyphase_conv2d(x, w, padding=1, backend="cpu"))
        assert found == 6 * 6 * products * 8 * 12  # 18x18 outputs in tiles of 3x3
    found = effective_macs(lambda: polyphase_conv_transpose2d(
        x[..., :18, :18], torch.randn(8, 12, 3, 3), padding=1, output_padding=1, backend="cpu"))
    assert found == 7 * 7 * 49 * 8 * 12  # 36x36 outputs, of which the odd phase begins outside: 19


TINY = Setting(torch.device("cpu"), compiled=False, seconds=0.0, tiny=True)


def test_the_reference_run_is_the_dense_count() -> None:
    inputs = zoo.generator_inputs("groupdnet_deepfashion", TINY)
    with use_backend("reference"):
        assert effective_macs(lambda: inputs[0](*inputs[1:])) == dense_macs(inputs)


@needs_cpu
def test_the_table_has_a_row_for_each_model() -> None:
    records = [record for case in cases("family", "groupdnet_deepfashion")
               for record in measure(case, TINY)]
    (row,) = zoo.family_table(records)
    cells = dict(zip(zoo.FAMILY_COLUMNS, row, strict=True))
    assert cells["model"] == "groupdnet_deepfashion"
    assert (cells["G, M"], cells["E, M"], cells["D, M"]) == ("96.3", "12.8", "5.5")
    fused = next(r for r in records if r.provider == "fused")
    assert fused.correct
    assert 0 < fused.counts["effective_macs"] < fused.macs  # few windows
    assert cells["x ref."].endswith("x")
    assert zoo.family_table(records[:1]) == []


def test_the_bound_counts_two_passes_for_every_conv() -> None:
    """In float64, whose numbers have eight bytes; the products of a call go before its own."""
    convs = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    x = torch.zeros(1, 3, 4, 5, dtype=torch.float64)
    read = (3 * 4 * 5 * 8, 8 * 4 * 5 * 8)
    products = (9 * 3 * 8 + 8 * 4) * 4 * 5
    assert zoo.network_bound((convs, x)) == (products, 2 * sum(read), max(read))
    assert zoo.network_bound((convs, x), lambda: convs[2](convs[0](x)[:, :, :1])) == (
        9 * 3 * 8 * 4 * 5 + 8 * 4 * 5, 2 * sum(read), max(read))


def test_the_set_holds_every_model() -> None:
    assert [case.name for case in cases("family")] == [f"family/{name}" for name in MODELS]
