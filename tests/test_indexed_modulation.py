"""indexed_modulation and its pair against gathering gamma and beta and modulating."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import smis_kernels
from smis_kernels import BackendError, modulation
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.indexed_modulation.reference import gamma_beta
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    max_error,
    poisoned_empty,
    with_memory_format,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
# The last two: more channels and more pixels than one block of the loops.
SHAPES = [(2, 6, 5, 7), (3, 4, 1, 1), (2, 3, 1, 5), (1, 1, 4, 3), (1, 17, 20, 37),
          (1, 1041, 2, 3), (1, 2, 31, 47)]
NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = (None, "relu", "leaky_relu")


class Case:
    """Inputs of one call and the outputs, running statistics and gradients of any backend."""

    def __init__(self, shape: tuple[int, ...], layout: str, *, pair: bool = False, rows: int = 9,
                 dtype: torch.dtype = torch.float64, **options: object) -> None:
        n, c, h, w = shape
        up = 2 if options.get("upsample") else 1
        random = torch.Generator().manual_seed(n * c * h * w + rows)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        self.pair, self.options = pair, options
        self.x = with_memory_format((draw(*shape) + 3).to(dtype), layout)
        # Runs of one row, as in label maps, and single pixels; the last row is never picked.
        index = torch.randint(0, max(rows - 1, 1), (n, h * up, w * up), generator=random)
        index[torch.rand(index.shape, generator=random) < 0.7] = min(1, rows - 1)
        self.index = index.int()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.tables = [draw(rows, 2 * c).to(wide) for _ in range(2 if pair else 1)]
        running = [draw(c), draw(c).abs() + 0.5, draw(c), draw(c).abs() + 0.5]
        self.running = [t.to(dtype) for t in running]
        if options.get("norm") == "group":
            options["num_groups"] = c

    def run(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        names = ("running_mean", "running_var", "running_mean_s", "running_var_s")
        used = names if self.pair else names[:2]
        state: dict[str, Tensor] = {}

        def call(x: Tensor, *tables: Tensor) -> Tensor:
            state.update({k: v.to(x.dtype, copy=True)
                          for k, v in zip(used, self.running, strict=False)})
            options = {**self.options, **state, "backend": backend}
            if self.pair:
                return torch.cat(indexed_modulation_pair(x, self.index, *tables, **options), 1)
            return indexed_modulation(x, self.index, *tables, **options)

        inputs = (self.x, *self.tables)
        if dtype is not None:
            inputs = tuple(t.to(dtype) for t in inputs)
        grads = gradients(call, inputs)
        return [call(*inputs), *state.values(), *grads]

    def compare(self, backend: str, bound: float = 1e-10) -> None:
        for i, (a, b) in enumerate(zip(self.run(backend), self.run("reference"), strict=True)):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert max_error(a, b) < bound, f"result {i}: {max_error(a, b)}"


@needs_cpu
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_reference(shape: tuple[int, ...], layout: str) -> None:
    norms = NORMS if layout in ("contiguous", "channels_last") else NORMS[:1]
    options = itertools.product(norms, *[(False, True)] * 3)
    for i, (norm, training, upsample, pair) in enumerate(options):
        if shape[2] * shape[3] == 1 and norm in ("instance", "group"):
            continue
        Case(shape, layout, pair=pair, norm=norm, training=training, upsample=upsample,
             activation=ACTIVATIONS[i % 3]).compare("cpu")


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_activation_and_number_of_rows(layout: str) -> None:
    for activation, rows, upsample in itertools.product(ACTIVATIONS, (1, 2, 50), (False, True)):
        Case((2, 5, 6, 4), layout, rows=rows, activation=activation, upsample=upsample,
             training=True).compare("cpu")


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype, layout: str) -> None:
    for training, upsample in itertools.product((False, True), repeat=2):
        case = Case((2, 19, 33, 17), layout, dtype=dtype, training=training, upsample=upsample,
                    activation="leaky_relu", pair=True)
        truth = case.run("reference", torch.float64)
        reference = case.run("reference")
        for i, (a, b, t) in enumerate(zip(case.run("cpu"), reference, truth, strict=True)):
            assert a.dtype == b.dtype
            assert_as_accurate(a, b, t, what=f"result {i}")


@needs_cpu
def test_streamed_output_equals_the_cached_one() -> None:
    # at 8 MiB the kernel starts to write past the caches
    for layout, up in itertools.product(("contiguous", "channels_last"), (False, True)):
        size = (1, 37, 121, 127) if up else (1, 37, 243, 251)
        case = Case(size, layout, upsample=up, dtype=torch.float32)
        fused, reference = (
            indexed_modulation(case.x, case.index, *case.tables, upsample=up, activation="relu",
                               backend=backend) for backend in ("cpu", "reference")
        )
        assert fused.numel() * 4 >= 8 << 20
        assert max_error(fused, reference) < 3e-5


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_element_is_written(layout: str) -> None:
    with poisoned_empty():
        for upsample, norm in itertools.product((False, True), ("batch", "instance")):
            case = Case((2, 5, 7, 3), layout, upsample=upsample, training=True, pair=True,
                        norm=norm)
            assert all(torch.isfinite(t).all() for t in case.run("cpu"))


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equals_modulation_with_gamma_and_beta_spelled_out(layout: str) -> None:
    for upsample in (False, True):
        case = Case((2, 6, 8, 5), layout, upsample=upsample)
        gamma, beta = gamma_beta(case.index, case.tables[0])
        options = {"training": True, "upsample": upsample, "activation": "relu"}
        result = indexed_modulation(case.x, case.index, case.tables[0], **options)
        assert max_error(result, modulation(case.x, gamma, beta, **options)) < 1e-12


@needs_cpu
def test_rows_that_no_pixel_picks_have_no_gradient() -> None:
    for layout in ("contiguous", "channels_last"):
        for grad in Case((2, 5, 6, 4), layout, pair=True).run("cpu")[-2:]:
            assert not grad[-1].any() and grad[1].all()


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_repeat_bit_by_bit(layout: str) -> None:
    for norm in ("batch", "instance"):
        case = Case((2, 40, 33, 31), layout, dtype=torch.float32, training=True, pair=True,
                    norm=norm, upsample=True)
        for a, b in zip(case.run("cpu"), case.run("cpu"), strict=True):
            assert torch.equal(a, b)


@needs_cpu
@pytest.mark.parametrize("upsample", [False, True])
def test_output_keeps_dtype_and_memory_format(upsample: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case((2, 8, 6, 6), "channels_last", upsample=upsample, dtype=dtype, training=True)
        y = indexed_modulation(case.x, case.index, *case.tables, **case.options)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        y = indexed_modulation(case.x.contiguous(), case.index, *case.tables, **case.options)
        assert y.is_contiguous()


@needs_cpu
def test_layouts_of_index_table_and_gradient() -> None:
    for layout in ("contiguous", "channels_last"):
        case = Case((2, 6, 8, 5), layout)
        table = case.tables[0]
        expected = indexed_modulation(case.x, case.index, table)
        index = torch.stack([case.index, case.index], -1)[..., 0]
        wide = torch.cat([table, table], 1)[:, : table.shape[1]]
        assert not index.is_contiguous() and not wide.is_contiguous()
        assert torch.equal(indexed_modulation(case.x, index, wide), expected)
        x = case.x.detach().requires_grad_()
        y = indexed_modulation(x, case.index, table)
        other = torch.channels_last if layout == "contiguous" else torch.contiguous_format
        cotangent = torch.randn(y.shape, dtype=y.dtype)
        grads = [torch.autograd.grad(y, x, c, retain_graph=True)[0] for c in
                 (cotangent, cotangent.contiguous(memory_format=other))]
        assert torch.equal(*grads)
        (of_sum,) = torch.autograd.grad(y.sum(), x)  # an expanded cotangent
        ones = indexed_modulation(x, case.index, table)
        assert torch.equal(of_sum, torch.autograd.grad(ones, x, torch.ones_like(ones))[0])


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_pass(layout: str) -> None:
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 2], x[0, 1, 0, 0], x[0, 1, 0, 1] = float("nan"), float("inf"), float("-inf")
    x = with_memory_format(x, layout)
    index = torch.ones(1, 4, 4, dtype=torch.int32)
    index[0, 3, 3] = 2
    table = torch.ones(3, 4)
    table[2, 1] = float("nan")
    for activation in ACTIVATIONS:
        results = [indexed_modulation(x, index, table, norm="none", activation=activation,
                                      backend=backend) for backend in ("cpu", "reference")]
        torch.testing.assert_close(*results, equal_nan=True)
        assert results[0][0, 1, 3, 3].isnan()
        assert not results[0][0, 0, 3, 3].isnan()


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_without_a_graph_break(layout: str) -> None:
    case = Case((2, 6, 8, 8), layout, upsample=True, pair=True)

    def call(x: Tensor, *tables: Tensor) -> Tensor:
        y, y_s = indexed_modulation_pair(x, case.index, *tables, training=True, upsample=True)
        again = indexed_modulation(y_s, case.index, tables[0], norm="instance", activation="relu")
        return y * again

    inputs = (case.x, *case.tables)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = [call(*inputs), *gradients(call, inputs)]
    for a, b in zip([compiled(*inputs), *gradients(compiled, inputs)], expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_cpu
def test_explain_counts_the_rows() -> None:
    case = Case((1, 4, 8, 8), "contiguous", rows=6)
    (choice,) = smis_kernels.explain(indexed_modulation, case.x, case.index, *case.tables).choices
    assert (choice.op, choice.backend) == ("indexed_modulation", "cpu")
    assert choice.numbers["rows"] == 5


def test_an_explicit_backend_never_falls_back() -> None:
    with pytest.raises(BackendError, match="cuda"):
        indexed_modulation(X, INDEX, TABLE, backend="cuda")
    with pytest.raises(BackendError, match="cuda"):
        indexed_modulation_pair(X, INDEX, TABLE, TABLE, backend="cuda")


X = torch.randn(2, 4, 6, 6)
INDEX = torch.zeros(2, 6, 6, dtype=torch.int32)
TABLE = torch.randn(3, 8)


@pytest.mark.parametrize(("change", "words"), [
    ({"input": X[0]}, "input: expected (N, C, H, W), got shape (4, 6, 6)"),
    ({"input": X.int()}, "input: expected dtype"),
    ({"index": INDEX.long()}, "index: expected dtype int32; got int64"),
    ({"index": INDEX[:, None]}, "index: expected (N, H, W), got shape (2, 1, 6, 6)"),
    ({"index": INDEX[:1]}, "index: expected shape (2, 6, 6)"),
    ({"upsample": True}, "index: expected shape (2, 12, 12)"),
    ({"index": INDEX.to("meta")}, "index: expected the device of input (cpu), got meta"),
    ({"table": TABLE[:, :7]}, "table: expected shape (3, 8)"),
    ({"table": TABLE[0]}, "table: expected (U, 2C), got shape (8,)"),
    ({"table": TABLE.double()}, "table: expected dtype float32; got float64"),
    ({"table": TABLE.bfloat16(), "input": X.half()},
     "table: expected dtype float32, float16; got bfloat16"),
    ({"table": TABLE.to("meta")}, "table: expected the device of input (cpu), got meta"),
    ({"running_mean": torch.zeros(3), "running_var": torch.ones(3)}, "running_mean: expected"),
    ({"norm": "layer"}, "norm: expected one of batch"),
    ({"norm": "group", "num_groups": 3}, "num_groups: expected a divisor of the 4"),
    ({"activation": "gelu"}, "activation: expected None"),
])
def test_bad_arguments_name_themselves(change: dict[str, object], words: str) -> None:
    arguments = {"input": X, "index": INDEX, "table": TABLE, "training": True, **change}
    pair = {**arguments, "table_s": TABLE}
    calls = ((indexed_modulation, arguments), (indexed_modulation_pair, pair))
    for call, given_arguments in calls:
        with pytest.raises((ValueError, TypeError)) as error:
            call(**given_arguments)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_bad_table_of_the_shortcut_names_itself() -> None:
    with pytest.raises(ValueError, match="table_s: expected shape"):
        indexed_modulation_pair(X, INDEX, TABLE, TABLE[:, :6])


@pytest.mark.parametrize("shape", [(0, 4, 6, 6), (2, 4, 0, 6), (2, 4, 6, 0)], ids=str)
def test_empty_input_gives_empty_output(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    index = torch.zeros((shape[0], *shape[2:]), dtype=torch.int32)
    assert indexed_modulation(x, index, TABLE, training=True, activation="relu").shape == shape
    y, y_s = indexed_modulation_pair(x, index, TABLE, TABLE, training=True)
    assert y.shape == y_s.shape == shape


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_over_many_pixels_keep_their_digits(layout: str) -> None:
    # one row for all pixels, as on a blank map: a plain fp32 sum loses two digits here
    random = torch.Generator().manual_seed(0)
    x = with_memory_format(torch.rand((1, 3, 256, 256), generator=random), layout)
    index = torch.zeros(1, 256, 256, dtype=torch.int32)
    table = torch.rand((1, 6), generator=random)

    def tables_gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaf = table.to(dtype).requires_grad_()
        y = indexed_modulation(x.to(dtype), index, leaf, norm="none", backend=backend)
        return torch.autograd.grad(y.sum(), leaf)[0]

    truth = tables_gradient(torch.float64, "reference")
    assert max_error(tables_gradient(torch.float32, "cpu"), truth) < 2e-6
