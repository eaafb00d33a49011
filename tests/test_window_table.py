"""window_embedding and window_table against convolving every window: values, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import SPADE, BackendError, LabelLayout, use_path
from smis_kernels.ops.label_windows.op import number_vectors, number_windows
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import assert_as_accurate, gradients, max_error, poisoned_empty

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))

# (planes, hidden, groups) of mlp_shared: SPADE, then GroupDNet's three data sets.
EMBEDDINGS = [
    (183, 128, 1), (36, 128, 1), (1, 1, 1), (5, 7, 1),
    *((8, 128, groups) for groups in (8, 4, 2, 1)),
    *((70, 35 * groups, 35) for groups in (35, 20, 14, 10, 4, 1)),
    (151, 302, 151), (151, 151 * 16, 151),
]
# (hidden, channels, groups) of mlp_gamma and mlp_beta: SPADE, then GroupDNet's.
TABLES = [
    (128, 64, 1), (1, 1, 1), (3, 17, 1), (6, 70, 2),
    (128, 128, 8), (128, 64, 4), (128, 32, 2), (128, 20, 1),
    (35 * 20, 35 * 16, 35), (35 * 14, 35 * 8, 35), (35, 35, 35), (35 * 4, 35 * 35, 35),
    (151 * 16, 16 * 8, 16), (151 * 2, 2 * 35, 2), (302, 16, 1),
]


def draw(*size: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=random, dtype=torch.float64)


def draw_windows(count: int, rows: int, seed: int = 0) -> Tensor:
    """(count + 1, 9) numbers below ``rows``, half of them 1, some 0, the outside; row 0 zero."""
    random = torch.Generator().manual_seed(seed + count)
    windows = torch.randint(0, rows, (count + 1, 9), generator=random, dtype=torch.int32)
    windows[torch.rand(windows.shape, generator=random) < 0.5] = min(1, rows - 1)
    windows[0] = 0
    return windows


def outside_first(rows: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(rows[:1]), rows[1:]])


def embedding_inputs(planes: int, hidden: int, groups: int, symbols: int = 12
                     ) -> tuple[Tensor, Tensor, Tensor]:
    return (outside_first(draw(symbols + 1, planes)), draw(hidden, planes // groups, 3, 3),
            draw(hidden))


def table_inputs(hidden: int, channels: int, groups: int, rows: int = 12) -> tuple[Tensor, ...]:
    shape = (channels, hidden // groups, 3, 3)
    return (outside_first(draw(rows + 1, hidden)), draw(*shape), draw(channels),
            draw(*shape, seed=1), draw(channels, seed=1))


def embed(windows: Tensor, backend: str, **options: object) -> Callable[..., Tensor]:
    return lambda vectors, weight, bias=None: window_embedding(
        vectors, weight, bias, windows, backend=backend, **options
    )


def tabulate(windows: Tensor, backend: str, **options: object) -> Callable[..., Tensor]:
    return lambda *t: window_table(*t, windows, backend=backend, **options)


def compare(make: Callable[..., Callable[..., Tensor]], inputs: tuple[Tensor, ...],
            windows: Tensor, bound: float = 1e-10, **options: object) -> None:
    """Values and the gradient of every input."""
    fused, reference = (make(windows, backend, **options) for backend in ("cpu", "reference"))
    results = [fused(*inputs), *gradients(fused, inputs)]
    options.pop("one_level", None)
    expected = [reference(*inputs), *gradients(reference, inputs)]
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert max_error(a, b) < bound, f"result {i}: {max_error(a, b)}"
    assert not results[0][0].any()


@needs_cpu
@pytest.mark.parametrize("shape", EMBEDDINGS, ids=str)
def test_embedding_equals_reference(shape: tuple[int, int, int]) -> None:
    groups = shape[2]
    vectors, weight, bias = embedding_inputs(*shape)
    windows = draw_windows(23, len(vectors))
    compare(embed, (vectors, weight, bias), windows, groups=groups)
    compare(embed, (vectors, weight), windows, groups=groups, relu=False)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
@pytest.mark.parametrize("shape", TABLES, ids=str)
def test_table_equals_reference(shape: tuple[int, int, int], one_level: bool) -> None:
    inputs = table_inputs(*shape)
    compare(tabulate, inputs, draw_windows(23, len(inputs[0])), groups=shape[2],
            one_level=one_level)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
def test_any_number_of_rows(one_level: bool) -> None:
    # register blocks take three or six rows at a time; the outside alone is one more
    for rows in (0, 1, 2, 5, 6, 7, 11, 13):
        vectors, weight, bias = embedding_inputs(6, 8, 2, symbols=rows)
        compare(embed, (vectors, weight, bias), draw_windows(rows, rows + 1), groups=2)
        for count in (0, 1, 5, 6, 7, 12):
            compare(tabulate, table_inputs(6, 34, 2, rows=rows), draw_windows(count, rows + 1),
                    groups=2, one_level=one_level)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
def test_channels_per_group(one_level: bool) -> None:
    # below, at and beyond a register row, and the blocks of four
    for channels in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 35, 64, 65, 127, 131):
        for depth in (1, 2, 31, 33):
            compare(tabulate, table_inputs(2 * depth, 2 * channels, 2, rows=4),
                    draw_windows(8, 5), groups=2, one_level=one_level)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
def test_large(one_level: bool) -> None:
    inputs = table_inputs(67, 262, 1, rows=1201)
    compare(tabulate, inputs, draw_windows(3001, 1202), one_level=one_level)
    vectors, weight, bias = embedding_inputs(19, 131, 1, symbols=401)
    compare(embed, (vectors, weight, bias), draw_windows(5003, 402))


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
@pytest.mark.parametrize("shape", [(128, 70, 1), (151 * 2, 2 * 35, 2)], ids=str)
def test_fp32_is_as_accurate_as_the_reference(shape: tuple[int, int, int],
                                              one_level: bool) -> None:
    inputs = table_inputs(*shape, rows=61)
    windows = draw_windows(203, 62)
    given = embedding_inputs(70, 140, 35)
    picked = draw_windows(61, len(given[0]))
    for make, index, tensors, options in (
        (tabulate, windows, inputs, {"groups": shape[2], "one_level": one_level}),
        (embed, picked, given, {"groups": 35}),
    ):
        narrow = tuple(t.float() for t in tensors)
        wide = tuple(t.double() for t in narrow)
        fused = make(index, "cpu", **options)
        reference = make(index, "reference", **options)
        for result in (lambda f, t: [f(*t)], gradients):
            triples = zip(result(fused, narrow), result(reference, narrow),
                          result(reference, wide), strict=True)
            for i, (a, b, truth) in enumerate(triples):
                assert a.dtype == torch.float32
                assert_as_accurate(a, b, truth, what=f"result {i}")


def label_planes(classes: int, edge: bool) -> Tensor:
    random = torch.Generator().manual_seed(classes)
    coarse = torch.randint(0, classes, (2, 5, 6), generator=random)
    labels = coarse.repeat_interleave(3, 1).repeat_interleave(4, 2)
    planes = F.one_hot(labels, classes).permute(0, 3, 1, 2).double()
    if not edge:
        return planes
    edges = (torch.rand((2, 1, 15, 24), generator=random) < 0.2).double().expand_as(planes)
    return torch.stack([planes, edges], 2).flatten(1, 2)


@needs_cpu
@pytest.mark.parametrize(("classes", "edge", "hidden", "shared", "channels", "groups"), [
    (9, False, 16, 1, 8, 1),          # SPADE
    (8, False, 128, 4, 32, 4),        # GroupDNet, DeepFashion
    (35, True, 35 * 2, 35, 70, 35),   # Cityscapes
    (13, False, 26, 13, 16, 2),       # ADE20K
])
def test_two_levels_are_the_two_convs(classes: int, edge: bool, hidden: int, shared: int,
                                      channels: int, groups: int) -> None:
    """From the planes to gamma and beta of each pixel, as the published norm computes them."""
    planes = label_planes(classes, edge)
    symbols, vectors = number_vectors(planes, 1000)
    index3, windows3 = number_windows(symbols, symbols.numel())
    index5, windows5 = number_windows(index3, symbols.numel())
    weights = (draw(hidden, planes.shape[1] // shared, 3, 3), draw(hidden))
    convs = (draw(channels, hidden // groups, 3, 3), draw(channels),
             draw(channels, hidden // groups, 3, 3, seed=1), draw(channels, seed=1))

    def tables(*t: Tensor, one_level: bool = False) -> Tensor:
        rows = window_embedding(vectors, *t[:2], windows3, groups=shared, backend="cpu")
        table = window_table(rows, *t[2:], windows5, groups=groups, one_level=one_level,
                             backend="cpu")
        return table[index5.long()].permute(0, 3, 1, 2)

    def dense(*t: Tensor) -> Tensor:
        hidden_map = F.relu(F.conv2d(planes, *t[:2], padding=1, groups=shared))
        return torch.cat([F.conv2d(hidden_map, *t[i : i + 2], padding=1, groups=groups)
                          for i in (2, 4)], 1)

    inputs = (*weights, *convs)
    expected = [dense(*inputs), *gradients(dense, inputs)]
    for one_level in (False, True):
        call = partial(tables, one_level=one_level)
        for a, b in zip([call(*inputs), *gradients(call, inputs)], expected, strict=True):
            assert max_error(a, b) < 1e-10


@needs_cpu
def test_layouts_of_every_argument() -> None:
    inputs = table_inputs(6, 16, 2)
    windows = draw_windows(9, 13)
    expected = window_table(*inputs, windows, groups=2, backend="cpu")
    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    picked = torch.cat([windows, windows], 1)[:, :9]
    assert not any(t.is_contiguous() for t in (*strided, picked))
    for one_level in (False, True):
        table = window_table(*strided, picked, groups=2, one_level=one_level, backend="cpu")
        assert max_error(table, expected) < 1e-12
    last = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]
    compare(tabulate, tuple(last), picked, groups=2)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
def test_every_element_is_written(one_level: bool) -> None:
    with poisoned_empty():
        inputs = table_inputs(6, 22, 2)
        windows = draw_windows(17, 13)
        results = [window_table(*inputs, windows, groups=2, one_level=one_level),
                   *gradients(tabulate(windows, "cpu", groups=2, one_level=one_level), inputs)]
        inputs = embedding_inputs(6, 8, 2)
        results += [window_embedding(*inputs, windows, groups=2),
                    *gradients(embed(windows, "cpu", groups=2), inputs)]
        assert all(torch.isfinite(t).all() for t in results)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
def test_a_table_of_no_rows(one_level: bool) -> None:
    hidden, *rest = table_inputs(8, 6, 2)
    none = torch.zeros(0, 9, dtype=torch.int32)
    assert window_table(hidden, *rest, none, groups=2, one_level=one_level).shape == (0, 12)


@needs_cpu
@pytest.mark.parametrize("one_level", [False, True])
def test_nan_stays_in_its_rows(one_level: bool) -> None:
    inputs = table_inputs(6, 22, 2)
    windows = draw_windows(17, 13)
    inputs[0][5, 4] = float("nan")  # of the second group
    table = window_table(*inputs, windows, groups=2, one_level=one_level, backend="cpu")
    expected = window_table(*inputs, windows, groups=2, backend="reference")
    assert table.isnan().any() and not table.isnan().all()
    torch.testing.assert_close(table, expected, equal_nan=True)
    vectors, weight, bias = embedding_inputs(6, 8, 2)
    bias[3] = float("nan")
    hidden = window_embedding(vectors, weight, bias, windows, groups=2, backend="cpu")
    expected = window_embedding(vectors, weight, bias, windows, groups=2, backend="reference")
    torch.testing.assert_close(hidden, expected, equal_nan=True)


@needs_cpu
def test_results_repeat_bit_by_bit() -> None:
    inputs = tuple(t.float() for t in table_inputs(128, 70, 2, rows=300))
    windows = draw_windows(2000, 301)
    for one_level in (False, True):
        call = tabulate(windows, "cpu", groups=2, one_level=one_level)
        first, again = ([call(*inputs), *gradients(call, inputs)] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_cpu
def test_compiles_without_a_graph_break() -> None:
    shared = embedding_inputs(6, 8, 2)
    windows3, windows5 = draw_windows(12, 13), draw_windows(20, 13)
    convs = table_inputs(8, 10, 2)[1:]

    def call(*t: Tensor) -> Tensor:
        hidden = window_embedding(*t[:3], windows3, groups=2)
        return torch.cat([
            window_table(hidden, *t[3:], windows5, groups=2, one_level=one_level)
            for one_level in (False, True)
        ])

    inputs = (*shared, *convs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = [call(*inputs), *gradients(call, inputs)]
    for a, b in zip([compiled(*inputs), *gradients(compiled, inputs)], expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_cpu
def test_rows_that_no_window_holds_have_no_gradient() -> None:
    windows = torch.ones(4, 9, dtype=torch.int32)
    windows[0] = 0
    inputs = table_inputs(6, 4, 1)
    grad = gradients(tabulate(windows, "cpu"), inputs)[0]
    assert not grad[2:].any() and grad[1].all()


H, WG, BG, WB, BB = table_inputs(6, 8, 2)
WINDOWS = draw_windows(5, 13)


@needs_cpu
@pytest.mark.parametrize(("change", "words"), [
    ({"hidden": H[0]}, "hidden: expected (V, D), got shape (6,)"),
    ({"hidden": H.half()}, "hidden: expected dtype float32, float64; got float16"),
    ({"hidden": H.tolist()}, "hidden: expected a tensor"),
    ({"windows": WINDOWS.long()}, "windows: expected dtype int32; got int64"),
    ({"windows": WINDOWS[:, :8]}, "windows: expected shape (6, 9)"),
    ({"windows": WINDOWS.to("meta")}, "windows: expected the device of hidden (cpu), got meta"),
    ({"weight_gamma": WG[:, :2]}, "weight_gamma: expected shape (8, 3, 3, 3)"),
    ({"weight_gamma": WG.flatten(2)}, "weight_gamma: expected shape (8, 3, 3, 3)"),
    ({"weight_beta": WB[:4]}, "weight_beta: expected shape (8, 3, 3, 3)"),
    ({"bias_gamma": BG[:7]}, "bias_gamma: expected shape (8"),
    ({"bias_beta": BB.float()}, "bias_beta: expected"),
    ({"weight_beta": WB.float()}, "weight_beta: expected"),
    ({"groups": 4}, "groups: expected a divisor of"),
    ({"groups": 0}, "groups: expected"),
])
def test_bad_arguments_name_themselves(change: dict[str, object], words: str) -> None:
    arguments = {"hidden": H, "weight_gamma": WG, "bias_gamma": BG, "weight_beta": WB,
                 "bias_beta": BB, "windows": WINDOWS, "groups": 2, "backend": "cpu", **change}
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        window_table(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_vectors_name_themselves() -> None:
    vectors, weight, bias = embedding_inputs(6, 8, 2)
    for change, words in (
        (vectors.int(), "vectors: expected dtype float32, float64; got int32"),
        (vectors[None], "vectors: expected (S, K), got shape"),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            window_embedding(change, weight, bias, WINDOWS, groups=2)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_an_explicit_backend_never_falls_back() -> None:
    with pytest.raises(BackendError):
        window_table(H, WG, BG, WB, BB, WINDOWS, groups=2, backend="cuda")
    with pytest.raises(BackendError):
        window_embedding(*embedding_inputs(6, 8, 2), WINDOWS, groups=2, backend="cuda")


@pytest.mark.parametrize("path", ["one_level", "two_level"])
def test_autocast_leaves_tables_in_single_precision(path: str) -> None:
    norm = SPADE(4, 3, 5)
    layout = LabelLayout.from_labels(torch.arange(16).view(1, 4, 4) // 6, 3)
    x = torch.randn(1, 4, 4, 4)
    with use_path(path):
        expected = norm(x.bfloat16(), layout)
        with torch.autocast("cpu", torch.bfloat16):
            got = norm(x.bfloat16(), layout)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
    weight = norm.mlp_gamma.weight
    (outside,) = torch.autograd.grad(got.float().square().sum(), weight, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(got.float().square().sum(), weight)
    assert outside.abs().max() > 0.01
    torch.testing.assert_close(inside, outside)
