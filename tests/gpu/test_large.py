"""Tensors of more than 2^31 elements: offsets must be 64-bit. Judged on their last pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smis_kernels import (
    class_crops,
    conditional_attention,
    conditional_conv2d,
    instance_avg_pool2d,
    instance_edges,
    modulation,
    norm_act,
    spatially_varying_conv2d,
)
from smis_kernels.ops.indexed_modulation.op import indexed_modulation
from smis_kernels.ops.label_windows.op import number_vectors
from smis_kernels.ops.window_table.op import window_table
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

LOW = torch.float16
TOLERANCE = 4e-3


@pytest.fixture
def scale(device: str) -> int:
    """Divides the sizes of a rehearsal."""
    return 1 if device == "cuda" else 1024


def need(device: str, gigabytes: float) -> None:
    """Skip where so much memory is not free."""
    if device != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} are free")


def backend(kind: str, device: str) -> str:
    chosen = kind if device == "cuda" else "triton" if kind == "triton" else "cpu"
    problem = missing(chosen)
    if problem is not None:
        pytest.skip(problem)
    return chosen


def drawn(device: str, *shape: int, seed: int = 0, last: bool = False) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = LOW if device == "cuda" else torch.float32
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
    return x.normal_(generator=generator)


def tail(x: Tensor, rows: int = 3) -> Tensor:
    """The last channel rows of the last image, in fp64."""
    return x[-1:, -4:, -rows:].double()


def close(got: Tensor, expected: Tensor) -> None:
    assert max_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_modulation_and_its_gradients(last: bool, device: str, scale: int) -> None:
    need(device, 60)
    kind = backend("triton", device)
    shape = (2, 64, 4160 // scale, 4096 // scale * (16 if scale > 1 else 1))
    x, g, b, dy = (drawn(device, *shape, seed=i, last=last) for i in range(4))
    assert scale > 1 or x.numel() > 2**31
    options = {"norm": "none", "activation": "leaky_relu"}
    leaves = [t.requires_grad_() for t in (x, g, b)]
    y = modulation(*leaves, **options, backend=kind)
    found = torch.autograd.grad(y, leaves, dy)
    ends = [tail(t.detach()).requires_grad_() for t in leaves]
    expected = modulation(*ends, **options, backend="reference")
    close(tail(y.detach()), expected.detach())
    for got, exact in zip(found, torch.autograd.grad(expected, ends, tail(dy)), strict=True):
        close(tail(got), exact)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_elementwise_ops(last: bool, device: str, scale: int) -> None:
    need(device, 40)
    kind = backend("triton", device)
    shape = (2, 64, 4160 // scale, 4096 // scale * (16 if scale > 1 else 1))
    x, other = (drawn(device, *shape, seed=i, last=last) for i in range(2))
    close(tail(norm_act(x, other, norm="none", activation="relu", backend=kind)),
          norm_act(tail(x), tail(other), norm="none", activation="relu", backend="reference"))
    close(tail(conditional_attention(x, other, backend=kind)),
          conditional_attention(tail(x), tail(other), backend="reference"))
    c = x.shape[1]
    index = torch.randint(1, 9, (2, *shape[2:]), device=device, dtype=torch.int32)
    table = drawn(device, 9, 2 * c).float()
    got = indexed_modulation(x, index, table, norm="none", backend=kind)
    rows = table.double()[index[-1:, -3:].long()].permute(0, 3, 1, 2)
    close(tail(got), tail(x) * (1 + rows[:, c - 4 : c]) + rows[:, -4:])


def test_statistics(device: str, scale: int) -> None:
    need(device, 40)
    kind = backend("triton", device)
    shape = (2, 64, 4160 // scale, 4096 // scale * (16 if scale > 1 else 1))
    x = drawn(device, *shape, last=True)
    got = norm_act(x, norm="instance", backend=kind)
    plane = x[-1, -1].double()
    expected = (plane - plane.mean()) / (plane.var(unbiased=False) + 1e-5).sqrt()
    close(got[-1, -1].double(), expected)


def test_spatially_varying_conv(device: str, scale: int) -> None:
    need(device, 20)
    kind = backend("cuda", device)
    c, h, w = 64, 2048 // scale, 2048 // scale * (32 if scale > 1 else 1)
    for last in (False, True):
        x, weight = drawn(device, 1, c, h, w, last=last), drawn(device, 1, 9 * c, h, w, last=last)
        assert scale > 1 or weight.numel() > 2**31
        got = spatially_varying_conv2d(x, weight, backend=kind)
        expected = spatially_varying_conv2d(x[:, -4:, -4:].double(), weight[:, -36:, -4:].double(),
                                            backend="reference")
        close(got[:, -4:, -3:].double(), expected[:, :, -3:])
        del x, weight, got


def test_conditional_conv(device: str, scale: int) -> None:
    need(device, 30)
    kind = backend("triton", device)
    n, c, depth, size = (2, 16, 16, 8208) if scale == 1 else (1, 2, 2, 6)
    x, h = (drawn(device, n, k, size, size, seed=i, last=True) for i, k in enumerate((c, depth)))
    assert scale > 1 or x.numel() > 2**31
    weight = drawn(device, 9 * c, depth, 3, 3, seed=2) / 12
    got = conditional_conv2d(x, h, weight, backend=kind)
    ends = (t[-1:, :, -6:].double() for t in (x, h))
    expected = conditional_conv2d(*ends, weight.double(), backend="reference")
    close(got[-1:, :, -3:].double(), expected[:, :, -3:])


def test_instance_pooling(device: str, scale: int) -> None:
    need(device, 40)
    kind = backend("cuda", device)
    for last in (False, True):
        x = drawn(device, 1, 520, 2048 // scale, 2048 // scale * (32 if scale > 1 else 1),
                  last=last)
        assert scale > 1 or x.numel() > 2**31
        ids = torch.zeros((1, *x.shape[2:]), dtype=torch.int32, device=device)
        ids[:, -2:] = 26001
        got = instance_avg_pool2d(x, ids, backend=kind)
        mean = x[:, -4:, -2:].double().mean((2, 3), keepdim=True)
        assert (got[:, -4:, -2:].double() - mean).abs().max() < 1e-3
        del x, got


def test_class_crops(device: str, scale: int) -> None:
    need(device, 20)
    kind = backend("cuda", device)
    n, classes, size = (5, 151, 1024) if scale == 1 else (1, 5, 16)
    image = drawn(device, n, 3, size, size)
    labels = torch.zeros((n, size, size), dtype=torch.uint8, device=device)
    labels[:, -8:, -8:] = classes - 1
    crops = class_crops(image, labels, classes, backend=kind)
    assert scale > 1 or crops.numel() > 2**31
    expected = torch.nn.functional.interpolate(image[-1:, :, -8:, -8:], (size, size))
    assert torch.equal(crops[-1:, -3:], expected)


def test_integer_maps(device: str, scale: int) -> None:
    need(device, 40)
    kind = backend("cuda", device)
    n, height, width = (1028, 1024, 2048) if scale == 1 else (2, 8, 16)
    ids = torch.zeros((n, height, width), dtype=torch.uint8, device=device)
    assert scale > 1 or ids.numel() > 2**31
    ids[-1, -1, -1] = 7
    edges = instance_edges(ids, dtype=torch.uint8, backend=kind)
    assert int(edges[-1].sum()) == 3
    assert int(edges[0].sum()) == 0
    del ids, edges
    planes = torch.zeros((1, 520, 2048 // scale, 2048), dtype=LOW if scale == 1 else torch.float32,
                         device=device)
    planes[:, 0] = 1
    planes[:, :, -1, -1] = 0
    planes[:, -1, -1, -1] = 1
    symbols, vectors = number_vectors(planes, 99, backend=kind)
    assert len(vectors) == 3
    assert symbols[0, -1, -1] == 2
    assert int((symbols == 1).sum()) == symbols.numel() - 1


def test_tables(device: str, scale: int) -> None:
    need(device, 40)
    kind = backend("triton", device)
    rows, channels, depth = (120_000, 1024, 16) if scale == 1 else (70, 8, 4)
    hidden = drawn(device, rows, depth).float()
    hidden[0] = 0
    weights = [drawn(device, channels, depth, 3, 3, seed=s).float() / 12 for s in (1, 2)]
    bias = torch.zeros(channels, device=device)
    windows = torch.randint(rows, (rows, 9), device=device).int()
    windows[0] = 0
    made: list[Callable[[], Tensor]] = [
        lambda level=level: window_table(hidden, weights[0], bias, weights[1], bias, windows,
                                         one_level=level, backend=kind)
        for level in (False, True)
    ]
    assert scale > 1 or rows * 9 * 2 * channels > 2**31  # of the products in between
    ends = windows[-5:]
    expected = window_table(hidden.double(), weights[0].double(), bias.double(),
                            weights[1].double(), bias.double(), torch.cat([windows[:1], ends]),
                            backend="reference")[1:]
    for call in made:
        assert max_error(call()[-5:], expected) < 1e-5
