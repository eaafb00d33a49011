"""Tables of all norms of a resolution: packed, multiplied and placed as each norm's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smis_kernels.ops.level_tables.op import NormConvs, level_tables
from smis_kernels.runtime.backend import triton_interpreted
from smis_kernels.testing import assert_as_accurate, max_error, poisoned_empty

triton = pytest.mark.triton
INTERPRETED = triton_interpreted()
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) / 4


def norm_convs(generator: torch.Generator, classes: int, channels: int, depth: int, *,
               shared_groups: int = 1, groups: int = 1) -> NormConvs:
    weight = draw(generator, depth, classes // shared_groups, 3, 3)
    parts = (draw(generator, channels, depth // groups, 3, 3), draw(generator, channels))
    other = (draw(generator, channels, depth // groups, 3, 3), draw(generator, channels))
    return NormConvs(weight, draw(generator, depth), *parts, *other, shared_groups, groups)


def windows(generator: torch.Generator, count: int, rows: int) -> Tensor:
    drawn = torch.randint(rows, (count + 1, 9), generator=generator, dtype=torch.int32)
    drawn[0] = 0
    return drawn


def one_hot(classes: int) -> Tensor:
    return torch.cat([torch.zeros(1, classes), torch.eye(classes)]).double()


def dense_rows(generator: torch.Generator, classes: int) -> Tensor:
    """Vectors of no, one, some and all entries."""
    rows = draw(generator, 9, classes)
    rows[torch.rand(rows.shape, generator=generator) < 0.5] = 0
    rows[:2] = 0
    rows[2] = torch.arange(classes) == classes - 1
    rows[3] = torch.arange(1, classes + 1)
    return rows


def cast(norms: list[NormConvs], dtype: torch.dtype) -> list[NormConvs]:
    return [NormConvs._make((*(t.to(DEVICE, dtype) for t in n.tensors), n.shared_groups, n.groups))
            for n in norms]


def check(norms: list[NormConvs], vectors: Tensor, w3: Tensor, w5: Tensor, dtype: torch.dtype,
          backend: str) -> None:
    exact = level_tables(vectors, w3, w5, norms, backend="reference")
    wide = vectors.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    own, moved = cast(norms, dtype), (w3.to(DEVICE), w5.to(DEVICE))
    with poisoned_empty(), torch.no_grad():
        found = level_tables(wide, *moved, own, backend=backend)
    same = level_tables(wide, *moved, own, backend="reference")
    assert len(found) == len(norms)
    for got, simple, truth in zip(found, same, exact, strict=True):
        assert (got.shape, got.dtype) == (truth.shape, dtype)
        assert got.is_contiguous() and not got[0].any()
        if dtype == torch.float64:
            assert max_error(got.cpu(), truth) < 1e-12 * max(1.0, truth.abs().max().item())
        else:
            assert_as_accurate(got.cpu(), simple.cpu(), truth)


def mixed(generator: torch.Generator, classes: int) -> list[NormConvs]:
    """Norms of other widths, depths and groups, whose groups cut across each other."""
    return [norm_convs(generator, classes, 8, 32), norm_convs(generator, classes, 17, 5),
            norm_convs(generator, classes, 12, 24, shared_groups=2, groups=3),
            norm_convs(generator, classes, 6, 18, shared_groups=3, groups=2),
            norm_convs(generator, classes, 130, 128)]


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=triton)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16],
                         ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_norms_of_every_kind_together(soft: bool, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(int(soft))
    vectors = dense_rows(generator, 12) if soft else one_hot(12)
    w3, w5 = windows(generator, 30, len(vectors)), windows(generator, 41, 31)
    check(mixed(generator, 12), vectors, w3, w5, dtype, backend)


@triton
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 129])
def test_any_number_of_windows(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    w3, w5 = windows(generator, rows, 6), windows(generator, rows, rows + 1)
    check([norm_convs(generator, 5, 17, 20)], one_hot(5), w3, w5, torch.float64, "triton")
    check([norm_convs(generator, 5, 24, 64)], one_hot(5), w3, w5, torch.bfloat16, "triton")


@triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [17, 130, 280, 1041])
def test_any_number_of_channels(channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(channels)
    norms = [norm_convs(generator, 4, channels, 32), norm_convs(generator, 4, 8, 32)]
    w3, w5 = windows(generator, 5, 5), windows(generator, 9, 6)
    check(norms, one_hot(4), w3, w5, dtype, "triton")


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=triton)])
def test_weights_that_no_symbol_picks_do_not_matter(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    norm = norm_convs(generator, 4, 8, 16)
    vectors = one_hot(4)[:3].float()
    w3, w5 = windows(generator, 6, 3).to(DEVICE), windows(generator, 8, 7).to(DEVICE)
    before = cast([norm], torch.float32)
    after = cast([norm], torch.float32)
    after[0].weight[:, 2:] = 1e30
    tables = [level_tables(vectors.to(DEVICE), w3, w5, norms, backend=backend)[0]
              for norms in (before, after)]
    assert torch.equal(*tables)


@triton
def test_nan_in_an_unread_weight_stays_there_and_in_a_read_one_shows() -> None:
    generator = torch.Generator().manual_seed(4)
    norm = cast([norm_convs(generator, 3, 8, 16)], torch.float32)[0]
    norm.weight[:, 0] = torch.nan  # the channel that absent entries point to
    vectors = one_hot(3)[[0, 2, 3, 1]].float().to(DEVICE)
    w3 = torch.tensor([[0] * 9, [1] * 9, [3] * 9], dtype=torch.int32, device=DEVICE)
    w5 = torch.tensor([[0] * 9, [1] * 9, [2] * 9], dtype=torch.int32, device=DEVICE)
    (table,) = level_tables(vectors, w3, w5, [norm], backend="triton")
    assert table[:2].isfinite().all() and table[2].isnan().all()


def test_gradients_are_refused() -> None:
    generator = torch.Generator().manual_seed(5)
    norm = norm_convs(generator, 4, 8, 16)
    norm.bias_beta.requires_grad_()
    w3, w5 = windows(generator, 6, 5), windows(generator, 8, 7)
    with pytest.raises(ValueError, match=r"norms: expected convs without gradients"):
        level_tables(one_hot(4), w3, w5, [norm], backend="cpu")
    (table,) = level_tables(one_hot(4), w3, w5, [norm], backend="reference")
    assert table.requires_grad


@pytest.mark.parametrize(("field", "value", "message"), [
    ("bias_beta", torch.zeros(9), r"norms\[0\].bias_beta: expected .*\(8,\)"),
    ("weight_beta", torch.zeros(8, 16, 3, 3, dtype=torch.float16), "weight_beta"),
    ("weight", torch.zeros(16, 3, 3, 3), r"norms\[0\].weight: expected"),
])
def test_convs_that_do_not_fit_are_named(field: str, value: Tensor, message: str) -> None:
    generator = torch.Generator().manual_seed(6)
    (norm,) = cast([norm_convs(generator, 4, 8, 16)], torch.float32)
    w3, w5 = windows(generator, 6, 5), windows(generator, 8, 7)
    changed = NormConvs._make(value.to(DEVICE) if name == field else old
                         for name, old in norm._asdict().items())
    given = one_hot(4).float().to(DEVICE), w3.to(DEVICE), w5.to(DEVICE)
    with pytest.raises((ValueError, TypeError), match=message):
        level_tables(*given, [changed])
    with pytest.raises(ValueError, match="norms: expected at least one"):
        level_tables(*given, [])
