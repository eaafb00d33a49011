"""class_crops and class_boxes against the published loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smis_kernels import BackendError, explain, use_backend
from smis_kernels.modules.crops import ClassCrops
from smis_kernels.ops.class_crops import reference
from smis_kernels.ops.class_crops.op import (
    class_boxes,
    class_crops,
)
from smis_kernels.runtime.backend import missing
from smis_kernels.runtime.check import FLOATS, INTEGERS
from smis_kernels.runtime.native import cuda_emulated
from smis_kernels.testing import (
    MEMORY_FORMATS,
    assert_as_accurate,
    gradients,
    poisoned_empty,
    with_memory_format,
)

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
BACKENDS = ("reference", pytest.param("cpu", marks=needs_cpu))
SHAPES = ((1, 1, 1), (2, 1, 7), (1, 5, 1), (2, 13, 17), (1, 32, 48), (1, 131, 257))


def _image(n: int, h: int, w: int, k: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(h * w)
    return torch.randn((n, k, h, w), generator=generator).to(dtype)


def _labels(n: int, h: int, w: int, classes: int) -> Tensor:
    """Blocks of one class each; some classes stay absent."""
    generator = torch.Generator().manual_seed(h + w)
    coarse = torch.randint(0, classes, (n, 1, (h + 4) // 5, (w + 6) // 7), generator=generator)
    return F.interpolate(coarse.float(), (h, w))[:, 0].long()


def _planes(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return reference.one_hot(labels, classes, dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(), b.nan_to_num()
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["labels", "planes"])
def test_by_hand(backend: str, form: str) -> None:
    image = torch.arange(1.0, 13.0).view(1, 1, 3, 4)
    image[0, 0, 0, 0] = 0  # shrinks the box of class 0 no further than row 0: pixel (0, 1) is in it
    labels = torch.tensor([[[0, 0, 2, 2], [0, 0, 2, 2], [2, 2, 2, 2]]])
    semantics = labels if form == "labels" else _planes(labels, 3)
    boxes = class_boxes(image, semantics, 3, backend=backend)
    assert boxes.tolist() == [[[0, 2, 0, 2], [0, 0, 0, 0], [0, 3, 0, 4]]]
    crops = class_crops(image, semantics, 3, size=(2, 4), backend=backend)
    assert crops.tolist() == [[
        [[0, 0, 2, 2], [5, 5, 6, 6]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 3, 4], [0, 0, 7, 8]],
    ]]


@needs_cpu
@pytest.mark.parametrize("box", ["nonzero", "sums"])
@pytest.mark.parametrize("form", ["labels", "planes"])
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_loop(shape: tuple[int, int, int], layout: str, form: str, box: str) -> None:
    image = with_memory_format(_image(*shape), layout)
    labels = _labels(*shape, 6)
    semantics = labels.unsqueeze(1) if form == "labels" else _planes(labels, 6)
    semantics = with_memory_format(semantics, layout)
    for size in (None, (9, 23), 64):
        expected = class_crops(image, semantics, 6, size=size, box=box, backend="reference")
        with poisoned_empty():
            found = class_crops(image, semantics, 6, size=size, box=box, backend="cpu")
        assert _same(found, expected)
        assert found.stride() == expected.stride()
    expected_boxes = class_boxes(image, semantics, 6, box=box, backend="reference")
    with poisoned_empty():
        assert torch.equal(class_boxes(image, semantics, 6, box=box, backend="cpu"), expected_boxes)


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float_dtypes(dtype: torch.dtype, layout: str) -> None:
    image = with_memory_format(_image(2, 19, 23, dtype=dtype), layout)
    labels = _labels(2, 19, 23, 5)
    soft = torch.rand((2, 5, 19, 23), generator=torch.Generator().manual_seed(0)).to(dtype)
    for semantics in (labels, _planes(labels, 5, dtype), soft):
        expected = class_crops(image, semantics, 5, size=(30, 11), backend="reference")
        with poisoned_empty():
            found = class_crops(image, semantics, 5, size=(30, 11), backend="cpu")
        assert _same(found, expected)


@needs_cpu
@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_dtypes(dtype: torch.dtype) -> None:
    image, labels = _image(1, 12, 31), _labels(1, 12, 31, 9)
    expected = class_crops(image, labels, 9, backend="reference")
    assert _same(class_crops(image, labels.to(dtype), 9, backend="cpu"), expected)
    assert _same(class_crops(image, labels.to(dtype), 300, backend="cpu")[:, :27], expected)


@needs_cpu
def test_bool_and_overlapping_masks() -> None:
    image = _image(2, 14, 9)
    masks = torch.rand((2, 4, 14, 9), generator=torch.Generator().manual_seed(1)) > 0.6
    masks[0, 1] = False
    expected = class_crops(image, masks.float(), 4, backend="reference")
    assert _same(class_crops(image, masks, 4, backend="cpu"), expected)


@needs_cpu
def test_underflowing_products_are_zero() -> None:
    image = torch.full((1, 1, 4, 4), 1e-30)
    masks = torch.full((1, 1, 4, 4), 1e-30)
    masks[0, 0, 1:3, 2] = 1
    assert class_boxes(image, masks, 1, backend="cpu").tolist() == [[[1, 3, 2, 3]]]


@needs_cpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["labels", "planes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_non_finite_pixels_survive_every_mask(value: float, form: str, layout: str) -> None:
    image, labels = _image(2, 10, 12), _labels(2, 10, 12, 4)
    image[0, 1, 3, 5] = value
    image = with_memory_format(image, layout)
    semantics = labels if form == "labels" else _planes(labels, 7)
    expected = class_crops(image, semantics, 7, size=25, backend="reference")
    found = class_crops(image, semantics, 7, size=25, backend="cpu")
    assert _same(found, expected)
    assert bool(found[0, 3 * 6 + 1].isnan().all())  # class 6 is absent: its box is that pixel
    assert bool(found[1].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_pixels_shrink_the_box(backend: str) -> None:
    image = torch.zeros((1, 3, 8, 8))
    image[0, 2, 2:5, 3:7] = -1
    labels = torch.zeros((1, 8, 8), dtype=torch.uint8)
    assert class_boxes(image, labels, 1, backend=backend).tolist() == [[[2, 5, 3, 7]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_rule(backend: str) -> None:
    labels = torch.zeros((1, 4, 4), dtype=torch.uint8)
    image = torch.zeros((1, 1, 4, 4))
    image[0, 0] = torch.tensor(
        [[1.0, -1, 0, 0], [0, 2, 3, 0], [0, 0, 4, 0], [0, 0, 0, 0]]
    )
    boxes = class_boxes(image, labels, 1, box="sums", backend=backend)
    assert boxes.tolist() == [[[1, 3, 0, 3]]]  # row 0 cancels, column 0 does not
    image[0, 0] = torch.tensor([[0.0, 1, -1, 0], [0, 2, -2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    boxes = class_boxes(image, labels, 1, box="sums", backend=backend)
    assert boxes.tolist() == [[[0, 2, 1, 3]]]  # all rows cancel: the nonzero box


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_rounds_as_interpolate(layout: str) -> None:
    labels = torch.zeros((1, 2, 1), dtype=torch.uint8)
    for source in (*range(1, 40), 97, 126, 255):
        image = with_memory_format(1 + torch.rand((1, 3, 2, source)), layout)
        wide = labels.expand(1, 2, source)
        for size in (1, 2, 3, 7, 41, 64, 100, 300):
            expected = F.interpolate(image, (3, size), mode="nearest")
            assert torch.equal(class_crops(image, wide, 1, size=(3, size), backend="cpu"), expected)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [256, (255, 251)])
def test_large_output_is_streamed(layout: str, size: int | tuple[int, int]) -> None:
    image, labels = with_memory_format(_image(1, 90, 120), layout), _labels(1, 90, 120, 9)
    expected = class_crops(image, labels, 12, size=size, backend="reference")
    assert expected.numel() * 4 > 8 << 20
    with poisoned_empty():
        found = class_crops(image, labels, 12, size=size, backend="cpu")
    assert _same(found, expected)


@needs_cpu
@settings(max_examples=20 if cuda_emulated() else 60, deadline=None)
@given(st.data())
def test_any_map(data: st.DataObject) -> None:
    n, h, w, classes, k = (data.draw(st.integers(1, m)) for m in (2, 9, 9, 5, 4))
    labels = torch.tensor(
        data.draw(st.lists(st.integers(0, classes - 1), min_size=n * h * w, max_size=n * h * w))
    ).view(n, h, w)
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf")])
    image = torch.tensor(
        data.draw(st.lists(values, min_size=n * k * h * w, max_size=n * k * h * w))
    ).view(n, k, h, w)
    size = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    form = data.draw(st.sampled_from(["labels", "planes"]))
    box = data.draw(st.sampled_from(["nonzero", "sums"]))
    semantics = labels if form == "labels" else _planes(labels, classes)
    expected = class_crops(image, semantics, classes, size=size, box=box, backend="reference")
    found = class_crops(image, semantics, classes, size=size, box=box, backend="cpu")
    assert _same(found, expected)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["labels", "planes"])
def test_threads_do_not_change_the_result(layout: str, form: str) -> None:
    image, labels = with_memory_format(_image(1, 120, 180), layout), _labels(1, 120, 180, 11)
    semantics = labels if form == "labels" else _planes(labels, 11)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        crops = class_crops(image, semantics, 11, size=100, backend="cpu")
        (grad,) = gradients(lambda x: class_crops(x, semantics, 11, backend="cpu"), (image,))
        results.append((crops, grad))
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@needs_cpu
def test_threads_leave_out_no_row_of_the_boxes() -> None:
    image, rows = torch.ones(1, 3, 121, 300), torch.arange(121)
    labels = rows[None, :, None].expand(1, 121, 300)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        boxes = class_boxes(image, labels, 121, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    expected = torch.stack([rows, rows + 1, 0 * rows, 0 * rows + 300], 1)
    assert torch.equal(boxes[0].long(), expected)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_that_rounds_to_zero_is_outside_the_box(dtype: torch.dtype) -> None:
    image, mask = torch.ones(1, 1, 2, 3).to(dtype), torch.ones(1, 1, 2, 3).to(dtype)
    image[..., 0], mask[..., 0] = torch.finfo(dtype).smallest_normal, 2.0**-12
    mask[..., 2] = 0
    found, expected = (class_boxes(image, mask, 1, backend=kind) for kind in ("cpu", "reference"))
    assert torch.equal(found, expected)
    assert found.tolist() == [[[0, 2, 1, 2]]]


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_class_beyond_the_labels_dtype_has_no_pixel(dtype: torch.dtype) -> None:
    image = torch.ones(1, 1, 2, 3)
    image[..., 1] = torch.inf  # which gives every class a box
    labels = torch.zeros(1, 2, 3, dtype=dtype)
    assert _same(*(class_crops(image, labels, 257, size=3, backend=kind)
                   for kind in ("cpu", "reference")))


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("form", ["labels", "planes", "soft"])
@pytest.mark.parametrize("size", [None, (40, 7)])
def test_gradient(dtype: torch.dtype, layout: str, form: str, size: tuple[int, int] | None) -> None:
    image = with_memory_format(_image(2, 17, 21, dtype=dtype), layout)
    labels = _labels(2, 17, 21, 6)
    generator = torch.Generator().manual_seed(2)
    soft = torch.rand((2, 6, 17, 21), generator=generator).double()
    semantics = {"labels": labels, "planes": _planes(labels, 6), "soft": soft}[form]

    def run(backend: str, x: Tensor) -> Tensor:
        (grad,) = gradients(
            lambda y: class_crops(y, semantics, 6, size=size, backend=backend), (x,)
        )
        return grad

    with poisoned_empty():
        found = run("cpu", image)
    assert found.dtype == dtype
    # Both round the masks and the incoming gradient to the dtype; the truth does neither.
    assert_as_accurate(found, run("reference", image), run("reference", image.double()), factor=2)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_layout_and_broadcast_cotangent(layout: str) -> None:
    image = with_memory_format(_image(1, 9, 8), layout).requires_grad_()
    labels = _labels(1, 9, 8, 3)
    class_crops(image, labels, 3, size=16, backend="cpu").sum().backward()
    assert image.grad is not None
    assert image.grad.stride() == image.stride()
    x = image.detach().clone().requires_grad_()
    class_crops(x, labels, 3, size=16, backend="reference").sum().backward()
    torch.testing.assert_close(image.grad, x.grad)


def test_masks_that_require_a_gradient_take_the_reference_path() -> None:
    image, masks = _image(1, 6, 6), torch.rand((1, 2, 6, 6)).requires_grad_()
    class_crops(image, masks, 2).sum().backward()
    assert masks.grad is not None
    assert bool((masks.grad != 0).any())
    with pytest.raises(BackendError, match="no gradient for semantics"):
        class_crops(image, masks, 2, backend="cpu")
    with use_backend("cpu"), pytest.raises(BackendError, match="no gradient for semantics"):
        class_crops(image, masks, 2)
    with torch.no_grad():  # none is wanted
        crops = class_crops(image, masks, 2, backend="auto" if missing("cpu") else "cpu")
    assert _same(crops, class_crops(image, masks.detach(), 2, backend="reference"))


@needs_cpu
def test_explain() -> None:
    image, labels = _image(1, 6, 6), _labels(1, 6, 6, 2)
    (choice,) = explain(ClassCrops(2, box="sums"), image, labels).choices
    assert (choice.op, choice.backend, choice.path) == ("class_crops", "cpu", "sums")
    (choice,) = explain(class_boxes, image, labels, 2, backend="reference").choices
    assert (choice.op, choice.backend, choice.path) == ("class_boxes", "reference", "nonzero")


@needs_cpu
@pytest.mark.parametrize("box", ["nonzero", "sums"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(layout: str, box: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, s: class_crops(x, s, 4, size=(10, 12), box=box) * 2,
        fullgraph=True, backend="aot_eager",
    )
    for h, w in ((7, 9), (8, 11), (6, 5)):
        image = with_memory_format(_image(1, h, w), layout)
        for semantics in (_labels(1, h, w, 4), _planes(_labels(1, h, w, 4), 4)):
            x, y = (image.clone().requires_grad_() for _ in range(2))
            found = compiled(x, semantics)
            expected = class_crops(y, semantics, 4, size=(10, 12), box=box) * 2
            assert _same(found, expected)
            assert found.stride() == expected.stride()
            (found.square().sum() + expected.square().sum()).backward()
            torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_empty(backend: str, shape: tuple[int, int, int]) -> None:
    image, labels = _image(*shape).requires_grad_(), torch.zeros(shape, dtype=torch.int64)
    boxes = class_boxes(image, labels, 4, backend=backend)
    assert boxes.shape == (shape[0], 4, 4)
    assert not boxes.any()
    for semantics in (labels, _planes(labels, 4)):
        crops = class_crops(image, semantics, 4, size=(3, 7), backend=backend)
        assert torch.equal(crops, torch.zeros((shape[0], 12, 3, 7)))
        assert class_crops(image, semantics, 4, backend=backend).shape == (shape[0], 12, *shape[1:])
        if backend == "cpu":  # the loop leaves an image without any class out of the graph
            (grad,) = torch.autograd.grad(crops.sum(), image)
            assert grad.shape == image.shape


IMAGE, LABELS = torch.zeros((1, 3, 4, 5)), torch.zeros((1, 4, 5), dtype=torch.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("image", "semantics", "classes", "options", "message"),
    [
        (IMAGE[0], LABELS, 2, {}, r"image: expected \(N, K, H, W\), got shape \(3, 4, 5\)"),
        (IMAGE.int(), LABELS, 2, {}, "image: expected dtype float32"),
        (IMAGE[:, :0], LABELS, 2, {}, "image: expected at least one channel"),
        ([[0.0]], LABELS, 2, {}, "image: expected a tensor"),
        (IMAGE, LABELS[0], 2, {}, "semantics: expected labels"),
        (IMAGE, LABELS[:, :3], 2, {}, "semantics: expected integer labels"),
        (IMAGE, LABELS.float(), 2, {}, "semantics: expected one plane per class"),
        (IMAGE, torch.zeros((1, 3, 4, 5)), 2, {}, "semantics: expected one plane per class"),
        (IMAGE, torch.zeros((1, 2, 4, 5)).long(), 2, {}, "one-hot must be of a float dtype"),
        (IMAGE, LABELS.to(torch.complex64), 2, {}, "semantics: expected dtype"),
        (IMAGE, LABELS.to("meta"), 2, {}, r"semantics: expected the device of image \(cpu\)"),
        (IMAGE, LABELS, 0, {}, "num_classes: expected a positive integer, got 0"),
        (IMAGE, LABELS, 2.5, {}, "num_classes: expected a positive integer, got 2.5"),
        (IMAGE, LABELS, 2, {"box": "mask"}, "box: expected one of nonzero, sums; got 'mask'"),
        (IMAGE, LABELS, 2, {"size": (0, 4)}, r"size: expected positive \(height, width\)"),
        *[(IMAGE, LABELS, 2, {"size": size}, r"size: expected an integer or \(height, width\)")
          for size in (5.5, (5,), "5", (5.0, 5.0), (5, 5, 5), [None, 5])],
        (IMAGE, LABELS + 255, 8, {}, r"semantics: expected labels 0\.\.7, got 255; remap"),
        (IMAGE, LABELS - 1, 8, {}, r"semantics: expected labels 0\.\.7, got -1"),
        (IMAGE, LABELS + 8, 8, {}, r"semantics: expected labels 0\.\.7, got 8;"),
        (IMAGE, LABELS + 2**32, 8, {}, r"semantics: expected labels 0\.\.7, got 4294967296"),
        (IMAGE, LABELS, 2, {"backend": "triton"}, "backend: class_crops has reference, cpu, cuda"),
        (IMAGE, LABELS, 2, {"backend": "cuda"}, "needs a cuda tensor, got one on cpu"),
    ],
)
def test_bad_input(backend: str, image: Tensor, semantics: Tensor, classes: int,
                   options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        class_crops(image, semantics, classes, **{"backend": backend, **options})
    assert len(str(caught.value).splitlines()) == 1


@needs_cpu
def test_compiled_graphs_refuse_bad_labels() -> None:
    compiled = torch.compile(lambda x, s: class_crops(x, s, 2), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"expected labels 0\.\.1, got 255"):
        compiled(IMAGE, LABELS + 255)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("box", ["nonzero", "sums"])
def test_another_default_device_changes_nothing(backend: str, box: str) -> None:
    image, labels = _image(1, 8, 9), _labels(1, 8, 9, 3)
    options = {"box": box, "backend": backend}
    expected = class_crops(image, labels, 3, **options), class_boxes(image, labels, 3, **options)
    with torch.device("meta"):
        assert torch.equal(class_crops(image, labels, 3, **options), expected[0])
        assert torch.equal(class_boxes(image, labels, 3, **options), expected[1])


def test_module() -> None:
    image, labels = _image(1, 8, 9), _labels(1, 8, 9, 3)
    labels[:, 0], image[:, :, 0], image[:, :, 0, :2] = 0, 0, torch.tensor([1.0, -1.0])
    labels[:, 1] = 1  # of class 0 a row above all others, whose sum is nothing
    module = ClassCrops(3, size=(5, 6), box="sums")
    expected = class_crops(image, labels, 3, size=(5, 6), box="sums")
    assert torch.equal(module(image, labels), expected)
    assert not torch.equal(class_crops(image, labels, 3, size=(5, 6)), expected)
    assert not module.state_dict()
    assert repr(module) == "ClassCrops(num_classes=3, size=(5, 6), box='sums')"
