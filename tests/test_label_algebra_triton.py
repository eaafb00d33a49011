"""The GPU kernels of the label algebra against the references: on a GPU, or interpreted."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.label_windows.op import number_vectors, number_windows
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.runtime.backend import BackendError, missing, triton_interpreted
from smis_kernels.testing import (
    assert_as_accurate,
    gradients,
    max_error,
    poisoned_empty,
    with_memory_format,
)

DEVICE = "cpu" if triton_interpreted() else "cuda"
needs_cuda = pytest.mark.skipif(
    missing("cuda") is not None or not torch.cuda.is_available(),
    reason=str(missing("cuda") or "no GPU"),
)


def draw(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE)


def draw_windows(count: int, rows: int) -> Tensor:
    """(count + 1, 9) numbers below ``rows``, most of them 1 as in real maps; row 0 is zero."""
    generator = torch.Generator().manual_seed(count)
    windows = torch.randint(0, rows, (count + 1, 9), generator=generator, dtype=torch.int32)
    windows[torch.rand(windows.shape, generator=generator) < 0.5] = 1
    windows[0] = 0
    return windows.to(DEVICE)


def table_inputs(groups: int, depth: int, channels: int) -> tuple[Tensor, ...]:
    hidden = draw(5, depth)
    hidden[0] = 0
    weights = (draw(channels, depth // groups, 3, 3, seed=s) for s in (1, 2))
    biases = (draw(channels, seed=s) for s in (3, 4))
    return hidden, *(t for pair in zip(weights, biases, strict=True) for t in pair)


@pytest.mark.triton
@pytest.mark.parametrize("one_level", [False, True])
@pytest.mark.parametrize(("groups", "depth", "channels"), [(1, 19, 37), (2, 6, 4), (3, 54, 9)])
def test_window_table(groups: int, depth: int, channels: int, one_level: bool) -> None:
    windows = draw_windows(70, 5)
    inputs = table_inputs(groups, depth, channels)

    def call(backend: str, *tensors: Tensor) -> Tensor:
        return window_table(*tensors, windows, groups=groups, one_level=one_level,
                            backend=backend)

    def run(backend: str) -> list[Tensor]:
        return [call(backend, *inputs), *gradients(partial(call, backend), inputs)]

    truth = run("reference")
    for got, expected in zip(run("triton"), truth, strict=True):
        assert got.shape == expected.shape
        assert max_error(got, expected) < 1e-11
    single = tuple(t.float() for t in inputs)
    got = call("triton", *single)
    assert got.dtype == torch.float32
    assert_as_accurate(got, call("reference", *single), truth[0])


@pytest.mark.triton
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_window_embedding(groups: int, relu: bool) -> None:
    windows = draw_windows(40, 4)
    vectors = draw(4, 9)
    vectors[0] = 0
    inputs = (vectors, draw(12, 9 // groups, 3, 3), draw(12))

    def run(backend: str) -> list[Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            return window_embedding(*tensors, windows, groups=groups, relu=relu, backend=backend)

        plain = window_embedding(*inputs[:2], None, windows, groups=groups, relu=relu,
                                 backend=backend)
        return [call(*inputs), plain, *gradients(call, inputs)]

    for got, expected in zip(run("triton"), run("reference"), strict=True):
        assert max_error(got, expected) < 1e-11


class Modulated:
    """Inputs of one call; one row has most pixels, others none, so pieces and gaps are met."""

    def __init__(self, shape: tuple[int, int, int, int], layout: str, upsample: bool) -> None:
        n, c, h, w = shape
        up = 2 if upsample else 1
        generator = torch.Generator().manual_seed(h)
        index = torch.randint(1, 9, (n, h * up, w * up), generator=generator, dtype=torch.int32)
        index[torch.rand(index.shape, generator=generator) < 0.7] = 3
        self.index = index.to(DEVICE)
        self.x = with_memory_format(draw(*shape) + 1, layout)
        self.tables = (draw(11, 2 * c), draw(11, 2 * c, seed=1))
        self.upsample = upsample

    def run(self, backend: str, pair: bool, dtype: torch.dtype = torch.float64,
            **options: object) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = (self.x.to(dtype), *(t.to(wide) for t in self.tables[: 2 if pair else 1]))

        def call(x: Tensor, *tables: Tensor) -> Tensor:
            function = indexed_modulation_pair if pair else indexed_modulation
            out = function(x, self.index, *tables, upsample=self.upsample, backend=backend,
                           **options)
            return torch.cat(out, 1) if pair else out

        return [call(*inputs), *gradients(call, inputs)]


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("upsample", [False, True])
def test_indexed_modulation(layout: str, upsample: bool) -> None:
    case = Modulated((2, 5, 7, 6), layout, upsample)
    for pair, options in ((True, {"training": True}), (False, {"norm": "instance"}),
                          (False, {"norm": "none", "activation": "relu"})):
        options.setdefault("activation", "leaky_relu")
        for got, expected in zip(case.run("triton", pair, **options),
                                 case.run("reference", pair, **options), strict=True):
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            assert max_error(got, expected) < 1e-11


@pytest.mark.triton
def test_indexed_modulation_of_several_tiles() -> None:
    for layout in ("contiguous", "channels_last"):
        case = Modulated((1, 3, 35, 41), layout, False)
        for got, expected in zip(case.run("triton", False, training=True),
                                 case.run("reference", False, training=True), strict=True):
            assert max_error(got, expected) < 1e-11


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype) -> None:
    case = Modulated((1, 6, 8, 7), "channels_last", False)
    case.x = case.x.to(dtype).double()
    results = (case.run("triton", True, dtype, training=True),
               case.run("reference", True, dtype, training=True),
               case.run("reference", True, training=True))
    for got, reference, truth in zip(*results, strict=True):
        assert_as_accurate(got, reference, truth, floor=4 * torch.finfo(dtype).eps)


@pytest.mark.triton
def test_every_element_is_written() -> None:
    windows = draw_windows(5, 5)
    with poisoned_empty():
        results = Modulated((1, 3, 5, 4), "contiguous", True).run("triton", True, training=True)
        for one_level in (False, True):
            call = partial(window_table, windows=windows, one_level=one_level, backend="triton")
            results += [call(*table_inputs(1, 5, 3)), *gradients(call, table_inputs(1, 5, 3))]
    assert all(t.isfinite().all() for t in results)


@needs_cuda
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 5), (3, 40, 33), (1, 128, 130)], ids=str)
def test_numbering_on_cuda(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    for labels in (2, 5, 900):
        coarse = torch.randint(0, labels, shape, generator=generator)
        labels_map = coarse[:, torch.arange(shape[1]) // 4 * 4][:, :, torch.arange(shape[2]) // 3]
        vectors = torch.nn.functional.one_hot(labels_map, labels).permute(0, 3, 1, 2)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            conditioning = torch.where(vectors == 0, -0.0, 1.0).to(dtype)
            expected = number_vectors(conditioning, 4096, backend="reference")
            got = number_vectors(conditioning.cuda(), 4096, backend="cuda")
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a.cpu(), b)
        ids, expected_windows = number_windows(expected[0], 1 << 20, backend="reference")
        index, windows = number_windows(expected[0].cuda(), 1 << 20, backend="cuda")
        assert torch.equal(index.cpu(), ids)
        assert torch.equal(windows.cpu(), expected_windows)
        few = len(expected_windows) - 2
        refused = [number_windows(expected[0].cuda(), few, backend="cuda"),
                   number_windows(expected[0].cuda() + 2**21, 1 << 20, backend="cuda"),
                   number_vectors(conditioning.cuda(), 0, backend="cuda")]
        conditioning[0, 0, 0, 0] = float("nan")
        refused.append(number_vectors(conditioning.cuda(), 4096, backend="cuda"))
        for zeros, none in refused:
            assert len(none) == 0
            assert not zeros.any()
    with pytest.raises(ValueError, match="map: expected ids from 0"):
        number_windows(-torch.ones(shape, dtype=torch.int32).cuda(), 9, backend="cuda")


def test_numbering_has_no_triton_kernel() -> None:
    with pytest.raises(BackendError, match="number_windows has reference, cpu, cuda"):
        number_windows(torch.ones(1, 2, 2, dtype=torch.int32), 4, backend="triton")


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="emulated digits")
def test_tf32_products_round_to_the_nearest() -> None:
    from smis_kernels.ops.window_table import triton as kernels

    hidden = (1 + draw(7, 40).abs()).float()  # of one sign: what is cut off adds up
    hidden[0] = 0
    weights = [draw(9, 40, 3, 3, seed=s).abs().bfloat16() for s in (1, 2)]
    biases = [torch.zeros(9)] * 2
    windows = draw_windows(70, 7)
    bits = hidden.view(torch.int32)
    cut = (bits & -(1 << 13)).view(torch.float32)
    rounded = (bits + (1 << 12) & -(1 << 13)).view(torch.float32)

    def table(rows: Tensor) -> Tensor:
        gamma, beta = (w.double() for w in weights)
        b = [t.to(rows.dtype) for t in biases]
        return window_table(rows, gamma, b[0], beta, b[1], windows, backend="reference")

    packed = kernels._packed((weights[0], weights[1]))
    got = kernels._product(hidden, packed, torch.zeros(18), windows, 1, True, torch.float32)
    truth = table(hidden.double())
    assert max_error(got, table(rounded.double())) < 1e-6
    assert max_error(got, table(cut.double())) > 1e-4
    shift = float(((got.double() - truth)[1:] / truth[1:]).mean())
    assert abs(shift) < 5e-5  # cutting gives -3.5e-4


@pytest.mark.triton
@pytest.mark.parametrize("one_level", [False, True])
def test_tables_of_16_bit_weights_are_rounded_once(one_level: bool) -> None:
    hidden = draw(7, 40).float()
    hidden[0] = 0
    gamma, beta = (draw(9, 40, 3, 3, seed=s).bfloat16() for s in (1, 2))
    bias, windows = draw(9, seed=3).bfloat16(), draw_windows(70, 7)

    def table(backend: str, dtype: torch.dtype, kind: torch.dtype) -> Tensor:
        b = bias.to(kind)
        return window_table(hidden.to(dtype), gamma.to(kind), b, beta.to(kind), b, windows,
                            one_level=one_level, backend=backend)

    got = table("triton", torch.float32, torch.bfloat16)
    truth = table("reference", torch.float64, torch.float64)
    assert got.dtype == torch.bfloat16
    # half a unit of bfloat16, and what ten bits of hidden leave
    assert max_error(got, truth) < 0.5 * torch.finfo(torch.bfloat16).eps + 2e-3
    hidden.requires_grad_()
    assert table("triton", torch.float32, torch.bfloat16).dtype == torch.float32


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="of the interpreter")
def test_rounding_keeps_infinity_and_nan() -> None:
    hidden = torch.ones(4, 8)
    hidden[0], hidden[1, 3], hidden[2, 0] = 0, float("inf"), float("nan")
    hidden[3, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    weight, bias = torch.ones(2, 8, 3, 3).bfloat16(), torch.zeros(2)
    windows = torch.zeros(4, 9, dtype=torch.int32)
    windows[1:] = torch.arange(1, 4)[:, None]
    got = window_table(hidden, weight, bias, weight, bias, windows, one_level=True,
                       backend="triton")
    assert got[1].isinf().all()
    assert got[2:].isnan().all()


@pytest.mark.triton
def test_bfloat16_is_as_accurate_as_the_reference() -> None:
    case = Modulated((1, 6, 8, 7), "channels_last", False)
    case.x = case.x.bfloat16().double()
    results = (case.run("triton", True, torch.bfloat16, training=True),
               case.run("reference", True, torch.bfloat16, training=True),
               case.run("reference", True, training=True))
    for got, reference, truth in zip(*results, strict=True):
        assert_as_accurate(got, reference, truth, floor=torch.finfo(torch.bfloat16).eps)


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="a limit that no GPU has")
def test_batches_beyond_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    from smis_kernels.runtime import triton_support

    monkeypatch.setattr(triton_support, "GRID_LIMIT", 2)
    case = Modulated((5, 2, 3, 2), "channels_last", True)
    for got, expected in zip(case.run("triton", True, norm="instance"),
                             case.run("reference", True, norm="instance"), strict=True):
        assert max_error(got, expected) < 1e-11


def product_inputs(rows: int, channels: int, depth: int, groups: int) -> tuple[Tensor, ...]:
    weights = (draw(channels, depth // groups, 3, 3, seed=s) for s in (1, 2))
    return draw(rows, 9, 2 * channels), draw(rows, depth), *weights


PRODUCTS = ((1, 1, 1, 1), (65, 33, 65, 1), (300, 6, 4, 2), (70, 9, 54, 3), (257, 64, 130, 2))


@pytest.mark.triton
@pytest.mark.parametrize(("rows", "channels", "depth", "groups", "programs"), [
    *((*sizes, programs) for sizes in PRODUCTS for programs in (1, 40)),
    # of the others the parts are the same as for 40
    *((*sizes, 10**6) for sizes in PRODUCTS if sizes[0] > 256)])
def test_products_of_gradients(rows: int, channels: int, depth: int, groups: int, programs: int,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    from smis_kernels.ops.window_table import op
    from smis_kernels.ops.window_table import triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", programs)  # in how many parts sums are cut
    inputs = product_inputs(rows, channels, depth, groups)
    with poisoned_empty():
        found = kernels.table_products(*inputs, groups, False)
    expected = op._products_in_torch(*inputs, groups, False)
    single = tuple(t.float() for t in inputs)
    narrow = kernels.table_products(*single, groups, False)
    reference = op._products_in_torch(*single, groups, False)
    truths = op._products_in_torch(*(t.double() for t in single), groups, False)
    for a, b, c, d, truth in zip(found, expected, narrow, reference, truths, strict=True):
        assert a.shape == b.shape and a.is_contiguous() and max_error(a, b) < 1e-12
        assert c.dtype == torch.float32
        assert_as_accurate(c, d, truth)


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="emulated digits")
def test_single_products_of_gradients_round_both_operands() -> None:
    from smis_kernels.ops.window_table import op
    from smis_kernels.ops.window_table import triton as kernels

    inputs = tuple(1 + t.abs().float() for t in product_inputs(70, 9, 40, 1))
    bits = [t.view(torch.int32) for t in inputs]
    cut = [(b & -(1 << 13)).view(torch.float32) for b in bits]
    rounded = [(b + (1 << 12) & -(1 << 13)).view(torch.float32) for b in bits]

    def products(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return op._products_in_torch(*(t.double() for t in tensors), 1, False)

    results = (kernels.table_products(*inputs, 1, True), products(rounded), products(cut))
    for got, near, low in zip(*results, strict=True):
        assert max_error(got, near) < 1e-6
        assert max_error(got, low) > 1e-4


@pytest.mark.triton
@pytest.mark.skipif(not triton_interpreted(), reason="autocast of the CPU")
def test_gradients_under_autocast_are_as_accurate_as_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    from smis_kernels.ops.window_table import triton as kernels

    asked: list[bool] = []
    made = kernels.table_products

    def noted(*arguments: object) -> object:
        asked.append(bool(arguments[-1]))
        return made(*arguments)

    monkeypatch.setattr(kernels, "table_products", noted)
    windows = draw_windows(70, 7)
    inputs = tuple(t.float() for t in table_inputs(1, 40, 9))
    inputs = torch.cat([inputs[0], draw(2, 40).float()]), *inputs[1:]

    def run(backend: str, dtype: torch.dtype, *, low: bool = False) -> list[Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                return window_table(*tensors, windows, backend=backend).to(dtype)

        return gradients(call, tuple(t.to(dtype) for t in inputs))

    truth = run("reference", torch.float64)
    got, reference = (run(kind, torch.float32, low=True) for kind in ("triton", "reference"))
    exact = run("triton", torch.float32)
    assert asked == [True, False]
    for name, a, b, c, t in zip(("hidden", "gamma", "bias", "beta", "bias"), got, reference, exact,
                                truth, strict=True):
        assert a.dtype == torch.float32
        assert_as_accurate(a, b, t, what=name)
        assert max_error(a, t) < 1e-3  # ten bits
        assert max_error(c, t) < 1e-5
