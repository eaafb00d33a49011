"""Sizes one below, at and one above every constant of the kernels: chunks, tiles, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import (
    LabelLayout,
    class_crops,
    conditional_attention,
    conditional_conv2d,
    instance_avg_pool2d,
    instance_edges,
    instance_mean_table,
    modulation,
    modulation_pair,
    norm_act,
    polyphase_conv2d,
    polyphase_conv_transpose2d,
    spatially_varying_conv2d,
    spectral_weight,
    winograd_conv2d,
)
from smis_kernels.modules.label_conv import LabelConv2d
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.ops.label_windows.op import number_vectors, number_windows
from smis_kernels.ops.window_table.op import window_embedding, window_table
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import gradients, max_error, with_memory_format

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
F64 = torch.float64


def agree(call: Callable[..., Tensor], *inputs: Tensor, bound: float = 1e-10) -> None:
    """Value and gradients of the CPU's kernel against the definition."""
    (ours, *our_grads), (theirs, *their_grads) = (
        [run(*inputs), *gradients(run, inputs)]
        for run in (partial(call, backend=kind) for kind in ("cpu", "reference")))
    for i, (a, b) in enumerate(zip([ours, *our_grads], [theirs, *their_grads], strict=True)):
        assert max_error(a, b) < bound, (i, max_error(a, b))


def draw(*shape: int, last: bool = False) -> Tensor:
    made = torch.randn(shape, dtype=F64) + 1
    form = "channels_last" if last else "contiguous"
    return with_memory_format(made, form) if len(shape) == 4 else made


def _paired(x: Tensor, *rest: Tensor, call: Any, **options: Any) -> Tensor:
    return torch.cat(call(x, *rest, **options), 1)


def dense(shape: tuple[int, ...], last: bool) -> None:
    """modulation and norm_act, with batch and instance statistics, alone and paired, enlarged."""
    x = draw(*shape, last=last)
    up = (*shape[:2], 2 * shape[2], 2 * shape[3])
    for norm in ("batch", "instance"):
        options = {"norm": norm, "training": True, "activation": "leaky_relu"}
        agree(partial(modulation, **options), x, *(draw(*shape, last=last) for _ in "ab"))
        agree(partial(norm_act, **options), x, draw(*shape, last=last))
    options = {"training": True, "activation": "relu", "upsample": True}
    agree(partial(_paired, call=modulation_pair, **options), x,
          *(draw(*up, last=last) for _ in "abcd"))


def indexed(shape: tuple[int, ...], last: bool) -> None:
    n, c, h, w = shape
    index = torch.zeros(n, h, w, dtype=torch.int32)  # one run over all pixels but the last
    index.view(-1)[-1] = 1
    for name, call, tables in (("one", indexed_modulation, 1), ("two", indexed_modulation_pair, 2)):
        def run(x: Tensor, *t: Tensor, call: Any = call, **options: Any) -> Tensor:
            made = call(x, index, *t, training=True, activation="leaky_relu", **options)
            return made if isinstance(made, Tensor) else torch.cat(made, 1)

        assert name
        agree(run, draw(*shape, last=last), *(draw(3, 2 * c) for _ in range(tables)))
    wide = torch.randint(3, (n, 2 * h, 2 * w)).int()
    agree(lambda x, t, backend: indexed_modulation(
        x, wide, t, norm="instance", upsample=True, backend=backend), draw(*shape, last=last),
        draw(3, 2 * c))


def attention(shape: tuple[int, ...], last: bool) -> None:
    agree(conditional_attention, draw(*shape, last=last), draw(*shape, last=last))


def planes(check: Callable[..., None], size: int) -> None:
    """``size`` pixels of a plane, and of a row of pixels."""
    for last in (False, True):
        check((2, 3, 1, size), last)


def channels(check: Callable[..., None], size: int) -> None:
    """``size`` channels of a pixel."""
    check((2, size, 3, 1), True)


def streamed(size: int) -> None:
    """Outputs of ``size`` fp32 elements, written past the caches from 8 MiB on."""
    x = torch.randn(1, 1, 1, size)
    y = norm_act(x, norm="none", activation="relu", backend="cpu")
    assert torch.equal(y, x.relu())
    z = conditional_attention(x, torch.ones_like(x), backend="cpu")
    torch.testing.assert_close(z, F.leaky_relu(x * torch.ones(()).sigmoid(), 0.2))
    ids = torch.zeros(1, 1, size, dtype=torch.uint8)
    ids[..., -1] = 1
    edges = instance_edges(ids, backend="cpu").flatten()
    assert edges.nonzero().flatten().tolist() == [size - 2, size - 1]


def crops(width: int, target: int) -> None:
    """Pictures ``width`` wide, crops ``target`` wide."""
    image = torch.randn(1, 3, 2, width)
    labels = torch.zeros(1, 2, width, dtype=torch.uint8)
    labels[..., width // 3 : width - 1] = 1
    for form in ("contiguous", "channels_last"):
        image = with_memory_format(image, form)
        made = [class_crops(image, labels, 2, size=(3, target), backend=kind)
                for kind in ("cpu", "reference")]
        assert torch.equal(*made)
    agree(lambda x, backend: class_crops(x, labels, 2, size=(3, target), backend=backend), image,
          bound=1e-5)


def pooled(shape: tuple[int, ...], last: bool, *, noise: bool = False) -> None:
    image = draw(*shape, last=last)
    count = 50000 if noise else 3
    ids = torch.randint(0, count, (shape[0], *shape[2:])) if noise else (
        torch.arange(shape[2] * shape[3]) // max(shape[2] * shape[3] - 1, 1)
    ).view(1, *shape[2:]).expand(shape[0], -1, -1).contiguous()
    found = instance_mean_table(image, ids, backend="cpu")
    flat = image.permute(0, 2, 3, 1).reshape(shape[0], -1, shape[1])
    first = 0
    for i in range(shape[0]):
        present, where, area = ids[i].flatten().unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(present), shape[1], dtype=F64).index_add_(0, where, flat[i])
        rows = slice(first, first + len(present))
        assert torch.equal(found.id[rows], present.to(found.id.dtype))
        assert torch.equal(found.area[rows], area.to(found.area.dtype))
        torch.testing.assert_close(found.mean[rows], sums / area[:, None])
        pool = instance_avg_pool2d(image, ids, backend="cpu")[i].flatten(1).T
        torch.testing.assert_close(pool, (sums / area[:, None])[where])
        first += len(present)
    narrow = instance_avg_pool2d(image.float(), ids, backend="cpu")
    torch.testing.assert_close(narrow.double(), instance_avg_pool2d(image, ids, backend="cpu"),
                               rtol=1e-5, atol=1e-5)


def vectors(shape: tuple[int, int, int]) -> None:
    """``K`` channels at h x w pixels: one-hot, and soft."""
    k, h, w = shape
    hot = F.one_hot(torch.randint(0, k, (1, h, w)), k).permute(0, 3, 1, 2).float()
    hot[0, :, -1, -1] = 0
    hot[0, k - 1, -1, -1] = 1  # the last channel counts
    for made in (hot, hot * 0.5):
        pair = [number_vectors(made, h * w, backend=kind) for kind in ("cpu", "reference")]
        assert torch.equal(pair[0][0], pair[1][0]) and torch.equal(pair[0][1], pair[1][1])
    map = torch.randint(1, 4, (1, h, w), dtype=torch.int32)
    pair = [number_windows(map, h * w, backend=kind) for kind in ("cpu", "reference")]
    assert torch.equal(pair[0][0], pair[1][0]) and torch.equal(pair[0][1], pair[1][1])


def label_conv(size: int) -> None:
    layout = LabelLayout.from_labels(torch.randint(0, 4, (1, 5, 9)), 4)
    weight, bias = draw(size, 4, 3, 3), draw(size)
    planes = F.pad(layout.dense(dtype=F64), (1, 1, 1, 1), mode="reflect")
    for dtype, bound in ((F64, 1e-12), (torch.float16, 2e-3)):
        w, b = weight.to(dtype), bias.to(dtype)
        found = LabelConv2d(layout, w, b, backend="cpu").rows(0, 5)
        assert max_error(found, F.conv2d(planes, w.double(), b.double())) < bound


def conditional(shape: tuple[int, ...]) -> None:
    n, c, h, w, depth = shape
    agree(conditional_conv2d, draw(n, c, h, w), draw(n, depth, h, w),
          draw(9 * c, depth, 3, 3) / (9 * depth), draw(9 * c))


def varying(width: int) -> None:
    for last in (False, True):
        agree(spatially_varying_conv2d, draw(1, 2, 3, width, last=last),
              draw(1, 18, 3, width, last=last))


def banded(height: int) -> None:
    """Rows of 4096 values, whose gradients are summed in bands of 64."""
    for stride, dilation in ((1, 1), (2, 1), (3, 2)):
        window = {"stride": stride, "dilation": dilation, "padding": dilation}
        out = [(size - 1) // stride + 1 for size in (height, 8)]
        agree(partial(spatially_varying_conv2d, **window), draw(1, 512, height, 8, last=True),
              draw(1, 9, *out, last=True))


def spectral(size: int) -> None:
    for form in (torch.contiguous_format, torch.channels_last):
        weight = draw(3, size, 3, 3)
        u, v = F.normalize(draw(3), dim=0), F.normalize(draw(9 * size), dim=0)
        agree(partial(spectral_weight, u=u, v=v, memory_format=form), weight)


def winograd(inputs: int, outputs: int, height: int = 4, width: int = 6) -> None:
    x, w = draw(1, inputs, height, width, last=True), draw(outputs, inputs, 3, 3) / inputs
    truth = F.conv2d(x, w, padding=1)
    for tile in (2, 4):
        agree(partial(winograd_conv2d, tile=tile), x, w, draw(outputs))
        for weight in (w, w.contiguous(memory_format=torch.channels_last)):
            narrow = winograd_conv2d(x.float(), weight.float(), tile=tile, backend="cpu")
            assert max_error(narrow, truth) < 1e-5


def polyphase(inputs: int, outputs: int, height: int = 5, width: int = 7) -> None:
    x = draw(1, inputs, height, width, last=True)
    for side, stride in ((3, 2), (4, 2), (4, 1)):
        w = draw(outputs, inputs, side, side) / inputs
        agree(partial(polyphase_conv2d, stride=stride, padding=1), x, w, draw(outputs))
        truth = F.conv2d(x, w, None, stride, 1)
        for weight in (w, w.contiguous(memory_format=torch.channels_last)):
            narrow = polyphase_conv2d(x.float(), weight.float(), stride=stride, padding=1,
                                      backend="cpu")
            assert max_error(narrow, truth) < 1e-5
    for side in (3, 4):
        agree(partial(polyphase_conv_transpose2d, padding=1, output_padding=1), x,
              draw(inputs, outputs, side, side), draw(outputs))


def table(rows: int, width: int, depth: int = 5) -> None:
    hidden = draw(4, depth)
    hidden[0] = 0
    windows = torch.randint(0, 4, (rows + 1, 9), dtype=torch.int32)
    windows[0] = 0
    weights = (draw(width, depth, 3, 3), draw(width), draw(width, depth, 3, 3), draw(width))
    for one_level in (False, True):
        agree(lambda *t, backend, one_level=one_level: window_table(
            *t, windows, one_level=one_level, backend=backend), hidden, *weights)
    agree(lambda *t, backend: window_embedding(*t, windows, backend=backend),
          hidden, draw(width, depth, 3, 3), draw(width))


def threads(size: int) -> None:
    """Work of ``size`` elements, shared by three threads."""
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        dense((1, 1, 1, size), False)
    finally:
        torch.set_num_threads(count)


def distinct(count: int) -> None:
    """``count`` distinct vectors of a float map: up to 4096 they are numbered."""
    map = torch.arange(count, dtype=torch.float32).view(1, 1, 1, -1).expand(1, 2, 4, -1)
    layout = LabelLayout.from_tensor(map.contiguous())
    if count + 1 > 4096 + 1:
        assert layout is None
    else:
        assert layout is not None
        assert torch.equal(layout.dense(), map)


# Constant and its place, the sizes beside it, what is run at each.
CASES: list[tuple[str, tuple[int, ...], Callable[[int], None]]] = [
    # csrc/common/modulate.h: elements staged at a time
    ("modulate kChunk 1024 pixels", (1023, 1024, 1025), partial(planes, dense)),
    ("modulate kChunk 1024 channels", (1023, 1024, 1025, 2049), partial(channels, dense)),
    ("indexed kChunk 1024 pixels", (1023, 1024, 1025), partial(planes, indexed)),
    ("indexed kChunk 1024 channels", (1023, 1024, 1025, 2049), partial(channels, indexed)),
    ("attention kChunk 1024 pixels", (1023, 1024, 1025), partial(planes, attention)),
    ("attention kChunk 1024 channels", (1023, 1024, 1025), partial(channels, attention)),
    # csrc/modulation/cpu.cpp kPartialPixels, csrc/norm_act/cpu.cpp kPixels
    ("kPartialPixels, kPixels 512", (511, 512, 513), partial(planes, dense)),
    # csrc/modulation/cpu_kernel.cpp: lanes and blocks of the moments
    ("moments kLanes 64", (63, 64, 65), partial(planes, dense)),
    ("moments kFirst 128", (127, 128, 129), partial(planes, dense)),
    ("moments kFirst + kBlock 16", (143, 144, 145), partial(planes, dense)),
    ("moments kFour x kLanes", (255, 256, 257), partial(planes, dense)),
    # csrc/indexed_modulation/cpu_kernel.cpp: pixels of a run
    ("kRun 256", (255, 256, 257, 258, 513), partial(planes, indexed)),
    # csrc/common/tensor.h: 8 MiB of fp32
    ("kStreamBytes", ((2 << 20) - 1, 2 << 20, (2 << 20) + 1), streamed),
    # csrc/common/modulate_host.h
    ("kGrain 32768", (32767, 32768, 32769), threads),
    # csrc/class_crops/cpu_kernel.cpp, cpu_kernel.h
    ("kSkip 32, pictures", (31, 32, 33, 65), lambda w: crops(w, 40)),
    ("kOverread 16, pictures", (15, 16, 17), lambda w: crops(w, 20)),
    ("kExact 8192, pictures", (8191, 8192, 8193), lambda w: crops(w, 300)),
    ("kExact 8192, crops", (8191, 8192, 8193, 20011), lambda w: crops(700, w)),
    ("kExact 8192, both", (8191, 8192, 8193), lambda w: crops(w, w + 5)),
    # csrc/instance_pool: cpu.cpp, pieces.h, rows.h, segments.h, cpu_kernel.cpp
    ("kGroup 8", (7, 8, 9, 17), lambda c: pooled((2, c, 3, 5), False)),
    ("kRowGroup 256", (255, 256, 257, 513), lambda c: pooled((2, c, 3, 5), True)),
    ("kChunk 1024", (1024, 1025, 1026), lambda w: pooled((1, 2, 1, w), False)),
    ("kRowPixels 64", (63, 64, 65, 66, 257), lambda w: pooled((1, 5, 1, w), True)),
    ("kStep 8, 16", (7, 8, 9, 15, 16, 17), lambda w: pooled((1, 1, 2, w), False)),
    ("kStripe 32768", (32767, 32768, 32769), lambda w: [  # type: ignore[list-item]
        pooled((1, 2, 1, w), last) for last in (False, True)]),
    ("kMerge 16384", (200, 300), lambda h: [  # type: ignore[list-item]
        pooled((1, 3, h, 300), last, noise=True) for last in (False, True)]),
    # csrc/label_windows/cpu_kernel.h
    ("kKeyChunk 512 pixels", (511, 512, 513, 1025), lambda w: vectors((5, 1, w))),
    ("kKeyChunk 512 channels", (511, 512, 513), lambda k: vectors((k, 3, 7))),
    ("kSumBits", (254, 255, 256, 257), lambda k: vectors((k, 9, 40))),
    # csrc/label_conv/cpu_kernel.cpp
    ("label_conv kBlock 64", (63, 64, 65, 129), label_conv),
    ("label_conv kPixel 1024", (1023, 1024, 1025), label_conv),
    # csrc/conditional_conv/cpu_kernel.h: 64 tiles of two pixels across a region
    ("conditional_conv most 64", (127, 128, 129, 131), lambda w: conditional((1, 2, 3, w, 3))),
    ("conditional_conv lanes", (7, 8, 9, 15, 16, 17), lambda c: conditional((1, c, 3, 5, c))),
    # csrc/spatially_varying_conv: vectors of a row
    ("spatially_varying_conv rows", (7, 8, 9, 15, 16, 17, 33, 65), varying),
    # csrc/spatially_varying_conv/cpu_kernel.h: pixels of a block, values of a band
    ("varying rows() 2048", (682, 683, 1024, 1025, 2047, 2048, 2049), varying),
    ("varying band() 2^18", (63, 64, 65, 129), banded),
    # csrc/spectral_weight/cpu_kernel.cpp
    ("spectral_weight kBlock 64", (63, 64, 65, 129, 193), spectral),
    # csrc/winograd_conv: common/winograd_panels.h kDepth, kMost, kPanelVectors; common/conv_host.h
    # kMostTiles, kRows
    ("winograd kDepth 160", (159, 160, 161, 320, 321), lambda k: winograd(k, 5)),
    ("winograd kMost 64, half contiguous", (31, 32, 33, 63, 64, 65), lambda m: winograd(m, m)),
    ("winograd kPanelVectors", (23, 24, 25, 47, 48, 49, 97), lambda m: winograd(3, m)),
    ("winograd kMostTiles 128", (254, 256, 258, 509, 512, 513), lambda w: winograd(3, 4, 2, w)),
    ("winograd kRows 8", (14, 16, 18, 29, 32, 33), lambda w: winograd(3, 4, 2, w)),
    # csrc/polyphase_conv, by common/winograd_panels.h and conv_host.h as above; kTile 3
    ("polyphase kDepth 160", (159, 160, 161, 321), lambda k: polyphase(k, 5)),
    ("polyphase kDepth 160, many tiles", (161,), lambda k: polyphase(k, 5, 26, 52)),
    ("polyphase kMost 576 / taps, half of it contiguous", (
        17, 18, 19, 31, 32, 33, 35, 36, 37, 63, 64, 65), lambda m: polyphase(m, m)),
    ("polyphase kPanelVectors", (23, 24, 25, 47, 48, 49, 97), lambda m: polyphase(3, m)),
    ("polyphase kMostTiles 128", (382, 384, 386, 770), lambda w: polyphase(3, 4, 6, w)),
    ("polyphase kTile 3", (3, 4, 5, 6, 7, 8, 9, 10), lambda w: polyphase(3, 4, w, w + 1)),
    # csrc/window_table/cpu_kernel.cpp: rows and vectors of a register tile
    ("kOneLevelRows", (1, 2, 3, 5, 6, 7, 12, 13), lambda r: table(r, 9)),
    ("kWide", (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65), lambda c: table(7, c)),
    # smis_kernels/layout/label_layout.py
    ("MAX_VECTORS 4096", (4095, 4096), distinct),
]


@pytest.mark.parametrize(("run", "size"), [
    pytest.param(run, size, id=f"{name}: {size}") for name, sizes, run in CASES for size in sizes])
def test_sizes_beside_a_constant(run: Callable[[int], None], size: int) -> None:
    run(size)


def at_zero() -> Iterator[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Calls whose activation is reached by exact zeros."""
    x = torch.zeros(1, 2, 3, 4, dtype=F64)
    x[0, 0, 0, :2] = torch.tensor([1.0, -1.0])
    zero = torch.zeros_like(x)
    index = torch.zeros(1, 3, 4, dtype=torch.int32)
    table = torch.zeros(1, 4, dtype=F64)
    windows = torch.zeros(3, 9, dtype=torch.int32)
    windows[1:] = torch.tensor([[1], [2]])
    vectors = torch.tensor([[0.0, 0], [1, 0], [0, 1]], dtype=F64)
    for last in (False, True):
        x, zero = (t.to(memory_format=torch.channels_last if last else torch.contiguous_format)
                   for t in (x, zero))
        for activation in ("relu", "leaky_relu"):
            options = {"norm": "none", "activation": activation}
            yield "modulation", partial(modulation, **options), (x, zero, zero)
            yield "pair", partial(_paired, call=modulation_pair, **options), (x, *[zero] * 4)
            yield "norm_act", partial(norm_act, **options), (x, zero)
            yield "indexed", (lambda x, t, backend, options=options: indexed_modulation(
                x, index, t, backend=backend, **options)), (x, table)
        yield "attention", conditional_attention, (x, zero)
    yield "embedding", (lambda *t, backend: window_embedding(*t, windows, backend=backend)), (
        vectors, torch.zeros(4, 2, 3, 3, dtype=F64), torch.zeros(4, dtype=F64))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize(("call", "inputs"), [
    pytest.param(call, inputs, id=f"{i}-{name}") for i, (name, call, inputs) in
    enumerate(at_zero())])
def test_gradient_at_exactly_zero(call: Callable[..., Tensor], inputs: tuple[Tensor, ...],
                                  backend: str) -> None:
    """0 for ReLU, the slope for LeakyReLU, as torch's own."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("tests/gpu runs the compiled kernels")
    found, expected = (gradients(partial(call, backend=kind), inputs)
                       for kind in (backend, "reference"))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) or max_error(a, b) < 1e-14
