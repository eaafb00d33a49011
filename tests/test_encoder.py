"""GroupDNet's encoder: leaving out absent classes changes nothing, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import class_crops, use_backend
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import assert_as_accurate, max_error
from smis_models.families import ADE20K
from smis_models.families.groupdnet import GroupDNetEncoder
from smis_models.networks.encoder import StridedEncoder

CLASSES, SIZE = 9, (64, 64)
Codes = tuple[Tensor, Tensor]


def encoder(dtype: torch.dtype = torch.float64, size: tuple[int, int] = SIZE,
            upsampling: str = "normal") -> GroupDNetEncoder:
    torch.manual_seed(0)
    preset = replace(ADE20K, classes=CLASSES, dont_care=None, nef=18, image_size=size,
                     upsampling=upsampling)
    module = GroupDNetEncoder(preset).to(dtype)
    for head in (module.fc_mu, module.fc_var):
        torch.nn.init.normal_(head.bias)
    return module


def images(batch: int, size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((batch, 3, *size), generator=generator, dtype=torch.float64).to(dtype)


def maps(classes: list[list[int]], size: tuple[int, int] = SIZE) -> Tensor:
    """One image for each list of classes: vertical stripes, so that crops differ in shape."""
    width = torch.arange(size[1])
    rows = [torch.tensor(c)[width * len(c) // size[1]].expand(size) for c in classes]
    return torch.stack(rows)


def results(module: GroupDNetEncoder, call: Callable[[], Codes],
            inputs: tuple[Tensor, ...] = ()) -> list[Tensor]:
    """Codes, gradients of all parameters and inputs, and buffers; these are then restored."""
    state = [b.clone() for b in module.buffers()]
    codes = call()
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (c * torch.randn(c.shape, generator=generator, dtype=torch.float64).to(c)).sum()
        for c in codes
    )
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, [*module.parameters(), *inputs])
    buffers = [b.clone() for b in module.buffers()]
    for buffer, kept in zip(module.buffers(), state, strict=True):
        buffer.copy_(kept)
    return [*codes, *grads, *buffers]


def compare(module: GroupDNetEncoder, call: Callable[[], Codes],
            inputs: tuple[Tensor, ...] = ()) -> None:
    with use_backend("reference"):
        expected = results(module, call, inputs)
    for i, (a, b) in enumerate(zip(results(module, call, inputs), expected, strict=True)):
        assert a.shape == b.shape
        assert max_error(a, b) < 1e-10, f"result {i}: {max_error(a, b)}"


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of groups of every conv that is run."""
    seen: list[int] = []
    real = torch.nn.functional.conv2d

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["groups"] if kwargs else args[6])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    return seen


BATCHES = {
    "one image": [[1, 4, 8]],
    "one class": [[7]],
    "first and last": [[0], [8]],
    "different classes": [[1, 4, 8], [0], [4, 5, 6, 7, 8], [8, 1]],
    "all classes in one of two": [list(range(CLASSES)), [2]],
    "all classes": [list(range(CLASSES))] * 2,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_encode_equals_the_dense_network(batch: list[list[int]], training: bool) -> None:
    module = encoder().train(training)
    image, labels = images(len(batch)).requires_grad_(), maps(batch)
    compare(module, lambda: module.encode(image, labels), (image,))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_forward_equals_the_dense_network(batch: list[list[int]], training: bool) -> None:
    module = encoder().train(training)
    x = class_crops(images(len(batch)), maps(batch), CLASSES, size=SIZE)
    for planes in (x, x.to(memory_format=torch.channels_last))[: 1 if training else 2]:
        compare(module, lambda planes=planes: module(planes))


@pytest.mark.parametrize(("size", "upsampling", "code"), [
    ((64, 256), "more", (1, 4)), ((64, 128), "normal", (2, 4)), ((64, 64), "more", (1, 1)),
])
@pytest.mark.parametrize("training", [False, True])
def test_codes_have_the_size_at_which_the_generator_starts(
    size: tuple[int, int], upsampling: str, code: tuple[int, int], training: bool,
) -> None:
    module = encoder(size=size, upsampling=upsampling).train(training)
    image, labels = images(2, size), maps([[3, 8], [7]], size)
    assert module.encode(image, labels)[0].shape[2:] == code
    compare(module, lambda: module.encode(image, labels))


@pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
def test_a_strided_encoder_is_the_published_one() -> None:
    """SPADE's: widths up to eight times the first, spectral and instance norm, slope 0.2."""
    net = StridedEncoder(3, 4, 5).eval()
    state, x = net.state_dict(), torch.rand(2, 3, 64, 64)
    found = net.strided(x)
    for i, width in enumerate((4, 8, 16, 32, 32), 1):
        weight, u, v = (state[f"layer{i}.0.weight_{name}"] for name in ("orig", "u", "v"))
        x = F.conv2d(x, weight / (u @ weight.flatten(1) @ v), None, 2, 1)
        x = F.leaky_relu(F.instance_norm(x), 0.2)
        assert x.shape[1] == width
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_fp32_is_as_accurate_as_the_dense_network() -> None:
    module, wide = encoder(torch.float32), encoder()
    batch = [[1, 4, 8], [0, 2]]
    image, labels = images(2, dtype=torch.float32), maps(batch)
    with torch.no_grad(), use_backend("reference"):
        truth = wide.encode(image.double(), labels)
        reference = module.encode(image, labels)
    for call in (lambda: module.encode(image, labels),
                 lambda: module(class_crops(image, labels, CLASSES, size=SIZE))):
        with torch.no_grad():
            codes = call()
        for a, b, t in zip(codes, reference, truth, strict=True):
            assert a.dtype == torch.float32
            assert_as_accurate(a, b, t)


def test_only_the_present_classes_are_computed(groups: list[int]) -> None:
    module = encoder().eval()
    image, labels = images(2), maps([[1, 4, 8], [4, 5]])
    module.encode(image, labels)
    module(class_crops(image, labels, CLASSES, size=SIZE))
    assert groups == [5] * 2 * (module.depth + 2)


@pytest.mark.parametrize(
    "name", ["", "layer1", "layer1.0", "layer1.1", "layer2", "layer2.0", "layer2.1", "fc_mu"])
def test_hooks_see_every_class_and_change_what_they_return(name: str) -> None:
    module, seen = encoder().eval(), []

    def hook(_: Any, inputs: Any, output: Any) -> Any:
        seen.append(inputs[0].shape[1])
        return tuple(map(torch.square, output)) if isinstance(output, tuple) else output.square()

    def result() -> Tensor:
        with torch.no_grad():
            return module.encode(images(1), maps([[0, 2]]))[0]

    before, part = result(), module.get_submodule(name)
    handle = part.register_forward_hook(hook)
    after = result()
    widths = [3 * CLASSES, *(module.get_submodule(f"layer{i}.0").out_channels for i in (1, 2))]
    normed = 1 if name.endswith(".1") else 0
    expected = widths[int(name[5]) - 1 + normed] if name.startswith("layer") else getattr(
        part, "in_channels", 3 * CLASSES)
    assert seen == [expected]
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
    with use_backend("reference"):
        torch.testing.assert_close(result(), after)
    handle.remove()
    assert torch.equal(result(), before)


def test_a_plain_encoder_has_hooks_called() -> None:
    module, seen = StridedEncoder(3, 8, 3).eval(), []
    x = images(1, dtype=torch.float32)
    with torch.no_grad():
        before = module.strided(x)
        for name in ("layer1", "layer3.1"):
            module.get_submodule(name).register_forward_hook(
                lambda m, inputs, output: seen.append(tuple(output.shape[1:])))
        after = module.strided(x)
    assert seen == [(8, 32, 32), (32, 8, 8)]
    torch.testing.assert_close(after, before)


def test_spectral_norm_of_the_heads() -> None:
    module = encoder().eval()
    torch.nn.utils.spectral_norm(module.fc_mu)
    arguments = images(1), maps([[0, 2]])
    with torch.no_grad():
        found = module.encode(*arguments)
        with use_backend("reference"):
            expected = module.encode(*arguments)
    torch.testing.assert_close(found, expected)


def test_an_absent_class_has_the_bias_as_its_code() -> None:
    module = encoder().eval()
    mu, logvar = module.encode(images(1), maps([[2]]))
    for code, head in ((mu, module.fc_mu), (logvar, module.fc_var)):
        expected = head.bias.view(1, CLASSES, 8, 1, 1).expand(-1, -1, -1, *code.shape[2:])
        classes = code.unflatten(1, (CLASSES, 8))
        absent = [c for c in range(CLASSES) if c != 2]
        assert torch.equal(classes[:, absent], expected[:, absent])
        assert not torch.isclose(classes[:, 2], expected[:, 2]).all()


@pytest.mark.parametrize("training", [False, True])
def test_nothing_present(training: bool) -> None:
    module = encoder().train(training)
    labels = maps([[1, 2], [3]])
    black = torch.zeros(2, 3, *SIZE, dtype=torch.float64)
    compare(module, lambda: module.encode(black, labels))
    compare(module, lambda: module(torch.zeros(2, 3 * CLASSES, *SIZE, dtype=torch.float64)))


@pytest.mark.parametrize("training", [False, True])
def test_a_class_whose_pixels_are_zero_is_absent(training: bool, groups: list[int]) -> None:
    module = encoder().train(training)
    labels = maps([[1, 4, 8, 5], [4, 5]])
    image = images(2)
    image *= (labels != 4)[:, None]
    image[0, :, 10:20] = 0  # and zeros inside of a class
    image.requires_grad_()
    compare(module, lambda: module.encode(image, labels), (image,))
    assert groups[-7:] == [4] * 7


def test_nan_reaches_every_class_of_its_image_alone() -> None:
    module = encoder().eval()
    image, labels = images(2), maps([[1, 4], [5]])
    image[0, 1, 20, 3] = float("nan")
    for call in (lambda: module.encode(image, labels),
                 lambda: module(class_crops(image, labels, CLASSES, size=SIZE))):
        with torch.no_grad():
            codes = call()
            with use_backend("reference"):
                expected = call()
        assert torch.isnan(codes[0][0]).all()
        for a, b in zip(codes, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_planes_that_cancel_are_present(groups: list[int]) -> None:
    module = encoder().eval()
    x = torch.zeros(1, 3 * CLASSES, *SIZE, dtype=torch.float64)
    x[0, 6, 0, 0], x[0, 6, 5, 5] = 1, -1
    x[0, 11, 7] = -2.0
    compare(module, lambda: module(x))
    assert groups[-7:] == [2] * 7


def test_input_gradient_of_an_absent_class_is_not_lost() -> None:
    # the norm of a zero plane divides by sqrt(eps): its gradient is large, not zero
    module = encoder().train()
    x = class_crops(images(1), maps([[1, 4]]), CLASSES, size=SIZE).requires_grad_()
    compare(module, lambda: module(x), (x,))
    mu, _ = module(x)
    (grad,) = torch.autograd.grad(mu.square().sum(), x)
    assert grad[:, 6:9].abs().max() > 0


def test_forward_mode_goes_through_an_absent_class() -> None:
    module = encoder().eval()
    x = class_crops(images(1), maps([[1, 4]]), CLASSES, size=SIZE)
    direction = torch.zeros_like(x)
    direction[:, 6:9] = 1e-3 * images(1)  # of class 2

    def tangent() -> Tensor:
        found: Tensor = torch.func.jvp(module, (x,), (direction,))[1][0]
        return found

    with use_backend("reference"):
        expected = tangent()
    assert expected[:, 16:24].abs().max() > 0
    assert max_error(tangent(), expected) < 1e-10


def test_without_spectral_norm() -> None:
    module = encoder().eval()
    for name, layer in module.named_modules():
        if name.endswith(".0"):
            torch.nn.utils.remove_spectral_norm(layer)
    compare(module, lambda: module.encode(images(1), maps([[1, 4]])))


@pytest.mark.parametrize("labels", ["uint8", "int32", "(N, 1, H, W)", "one-hot"])
def test_labels_of_any_kind(labels: str) -> None:
    module = encoder().eval()
    image, kept = images(2), maps([[1, 4], [8, 0]])
    given = {
        "uint8": kept.to(torch.uint8), "int32": kept.int(), "(N, 1, H, W)": kept[:, None],
        "one-hot": torch.nn.functional.one_hot(kept, CLASSES).permute(0, 3, 1, 2).double(),
    }[labels]
    with torch.no_grad():
        for a, b in zip(module.encode(image, given), module.encode(image, kept), strict=True):
            assert max_error(a, b) < 1e-10


def test_images_of_another_size_and_format() -> None:
    module = encoder().eval()
    image = images(2, (37, 51)).to(memory_format=torch.channels_last)
    compare(module, lambda: module.encode(image, maps([[1, 4], [7, 3, 2]], (37, 51))))


def test_no_image() -> None:
    module = encoder().eval()
    mu, logvar = module(torch.zeros(0, 3 * CLASSES, *SIZE, dtype=torch.float64))
    assert mu.shape == logvar.shape == (0, 8 * CLASSES, 2, 2)


def test_bad_labels_are_named() -> None:
    module = encoder().eval()
    for labels in (maps([[CLASSES]]), maps([[-1]]), maps([[1]], (8, 8))):
        with pytest.raises((ValueError, RuntimeError), match="semantics: expected") as error:
            module.encode(images(1), labels)
        assert "\n" not in str(error.value)


def test_compiles_without_a_graph_break_in_eval_mode() -> None:
    module = encoder().eval()
    x = class_crops(images(2), maps([[1, 4], [5]]), CLASSES, size=SIZE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(x), module(x), strict=True):
            assert max_error(a, b) < 1e-10
