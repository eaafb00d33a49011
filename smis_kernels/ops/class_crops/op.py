"""Class crops: every class's part of the image, cut to its box and stretched to full frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.backend import BackendError, refuse_trace, requested, resolve
from ...runtime.check import (
    FLOATS,
    INTEGERS,
    check_device,
    check_range,
    check_tensor,
    looked_at,
)
from ...runtime.derivatives import applied
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import empty_nchw, is_channels_last, memory_format
from . import reference

KINDS = ("cpu", "cuda")
BOXES = ("nonzero", "sums")


def class_boxes(image: Tensor, semantics: Tensor, num_classes: int, *, box: str = "nonzero",
                backend: str | None = None) -> Tensor:
    r"""The box of each class's part of the image.

    .. math:: \mathrm{box}_c = \{(y, x) : \mathrm{image}(y, x)\,[s(y, x) = c] \ne 0\}

    Args:
        image, semantics, num_classes, box, backend: as in :func:`class_crops`.

    Returns:
        (N, num_classes, 4) int32: y0, y1, x0, x1, ends exclusive; zeros for an absent class.

    Raises:
        As :func:`class_crops`.

    Source: Zhu et al., "Semantically Multi-modal Image Synthesis", 2020.

    Example:
        >>> boxes = class_boxes(torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8).long(), 2)
        >>> boxes[0].tolist()
        [[0, 8, 0, 8], [0, 0, 0, 0]]
    """
    semantics = _checked(image, semantics, num_classes, box)
    kind = resolve("class_boxes", image, backend, KINDS)
    record("class_boxes", kind, image, path=box)
    if kind == "reference":
        refuse_trace("class_boxes")
    if semantics.dim() == 3 and looked_at(semantics, kind):
        check_range("semantics", semantics, num_classes)
    if kind == "reference":
        return reference.class_boxes(image.detach(), semantics.detach(), num_classes, box)
    return _found_boxes(image, semantics, num_classes, box, kind)


def class_crops(image: Tensor, semantics: Tensor, num_classes: int, *,
                size: int | tuple[int, int] | None = None, box: str = "nonzero",
                backend: str | None = None) -> Tensor:
    r"""GroupDNet's encoder input: each class's part of the image, stretched to full frame.

    .. math:: y_{cK+k}(p) = m_c(q)\, x_k(q), \quad q = \mathrm{box}_c^0 + \lfloor p\,
              |\mathrm{box}_c| / \mathrm{size} \rfloor, \quad m_c = [s = c]

    The aspect ratio is ignored, an absent class is all zero, and the scale is rounded to float32
    as :func:`torch.nn.functional.interpolate` (nearest) rounds it. A NaN or infinite pixel
    survives the mask of every class, as it does in the product.

    Args:
        image: (N, K, H, W), K = 3 for GroupDNet; float32, float64, float16 or bfloat16.
        semantics: integer labels (N, H, W) or (N, 1, H, W) in 0..num_classes-1; or masks
            (N, num_classes, H, W), float or bool: a one-hot, or any other (cast to the image's
            dtype). Pixels in no mask belong to no class.
        size: (height, width) or one number for both; the image's size by default. Published:
            256 x 256, Cityscapes 256 x 512.
        box: "nonzero", the box of the pixels where any channel of the product is nonzero; or
            "sums", the published rule: the first and last row and column whose sum (over
            channels, then along it) is nonzero. That rule crashes where all sums of one axis
            cancel; here the class then takes its "nonzero" box. It waits for the GPU.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (N, num_classes*K, size[0], size[1]), class-major, in the image's dtype and memory format.
        Gradients flow to the image, deterministically (and to float masks, on the reference path).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        ValueError: a label outside 0..num_classes-1; a RuntimeError from torch.compile's graphs.
            The GPU is not made to wait for that check: there such a pixel belongs to no class.
        BackendError: the backend asked for cannot run here.

    Source: Zhu et al., "Semantically Multi-modal Image Synthesis", 2020.

    Example:
        >>> labels = torch.randint(8, (1, 64, 64))
        >>> class_crops(torch.randn(1, 3, 64, 64), labels, 8, size=32).shape
        torch.Size([1, 24, 32, 32])
    """
    semantics = _checked(image, semantics, num_classes, box)
    height, width = _checked_size(size, image)
    reason = ""
    if torch.is_grad_enabled() and semantics.requires_grad:
        if requested(backend) not in ("auto", "reference"):
            raise BackendError(
                f"backend: {requested(backend)!r} of class_crops has no gradient for semantics; "
                "detach them or use 'reference'"
            )
        backend, reason = "reference", "semantics require a gradient"
    kind = resolve("class_crops", image, backend, KINDS)
    record("class_crops", kind, image, path=box, reason=reason)
    if kind == "reference":
        refuse_trace("class_crops")
    if semantics.dim() == 3 and looked_at(semantics, kind):
        check_range("semantics", semantics, num_classes)
    if kind == "reference":
        crops = reference.class_crops(image, semantics, num_classes, (height, width), box)
        return crops.contiguous(memory_format=memory_format(image))
    boxes = _found_boxes(image, semantics, num_classes, box, kind)
    out: Tensor = applied(_ClassCrops, image, semantics, boxes, height, width, kind)
    return out


@torch.library.impl("smis_kernels::class_boxes_sums", "default")
@torch.no_grad()
def _boxes_by_sums(image: Tensor, semantics: Tensor, boxes: Tensor) -> Tensor:
    """torch's own sums, whose order decides which rows cancel; present classes only."""
    out = boxes.clone(memory_format=torch.contiguous_format)
    for n, c in (boxes[..., 1] > 0).nonzero().tolist():
        mask = semantics[n, c] if semantics.dim() == 4 else (semantics[n] == c).to(image.dtype)
        found = reference.bounds(image[n] * mask, "sums")
        out[n, c] = torch.tensor(found, dtype=torch.int32, device=out.device)
    return out


def _checked(image: Tensor, semantics: Tensor, num_classes: int, box: str) -> Tensor:
    """The semantics as the raw ops take them."""
    check_tensor("image", image, 4, "(N, K, H, W)", FLOATS)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")
    if box not in BOXES:
        raise ValueError(f"box: expected one of {', '.join(BOXES)}; got {box!r}")
    n, k, h, w = image.shape
    if k == 0:
        raise ValueError(f"image: expected at least one channel, got shape {tuple(image.shape)}")
    layout = f"labels (N, H, W) or (N, 1, H, W), or planes (N, {num_classes}, H, W)"
    check_tensor("semantics", semantics, (3, 4), layout, (*INTEGERS, torch.bool, *FLOATS))
    check_device("semantics", semantics, image, "image")
    if semantics.dtype in INTEGERS:
        labels = semantics.squeeze(1) if semantics.dim() == 4 else semantics
        if tuple(labels.shape) != (n, h, w):
            raise ValueError(
                f"semantics: expected integer labels {(n, h, w)} or {(n, 1, h, w)} to match image, "
                f"got {tuple(semantics.shape)}; a one-hot must be of a float dtype or bool"
            )
        return labels
    if tuple(semantics.shape) != (n, num_classes, h, w):
        raise ValueError(
            f"semantics: expected one plane per class {(n, num_classes, h, w)} to match image, "
            f"got {tuple(semantics.shape)}; labels must be of an integer dtype"
        )
    return semantics.to(image.dtype)


def _found_boxes(image: Tensor, semantics: Tensor, num_classes: int, box: str,
                 kind: str) -> Tensor:
    image, semantics = image.detach(), semantics.detach()
    boxes = class_boxes_op(kind, image, semantics, num_classes)
    return class_boxes_sums(kind, image, semantics, boxes) if box == "sums" else boxes


def _checked_size(size: int | tuple[int, int] | None, image: Tensor) -> tuple[int, int]:
    if size is None:
        return image.shape[2], image.shape[3]
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(hasattr(n, "__index__") for n in pair):
        raise TypeError(f"size: expected an integer or (height, width), two of them, got {size!r}; "
                        "round it first")
    height, width = pair
    if height < 1 or width < 1:
        raise ValueError(f"size: expected positive (height, width), got {(height, width)}")
    return height, width


class _ClassCrops(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, semantics: Tensor, boxes: Tensor, height: int,
                width: int, kind: str) -> Tensor:
        ctx.save_for_backward(semantics, boxes)
        ctx.settings = (image.shape[2], image.shape[3], is_channels_last(image), kind)
        return class_crops_op(kind, image, semantics, boxes, height, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        semantics, boxes = ctx.saved_tensors
        height, width, channels_last, kind = ctx.settings
        found = _ClassCropsGradient.apply(grad, semantics, boxes, height, width, channels_last,
                                          kind)
        return found, None, None, None, None, None


class _ClassCropsGradient(torch.autograd.Function):
    """The crops are linear in the image: the gradient of their gradient is crops again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, semantics: Tensor, boxes: Tensor, height: int,
                width: int, channels_last: bool, kind: str) -> Tensor:
        ctx.save_for_backward(semantics, boxes)
        ctx.settings = (grad.shape[2], grad.shape[3], kind)
        return class_crops_backward(kind, grad, semantics, boxes, height, width, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        semantics, boxes = ctx.saved_tensors
        height, width, kind = ctx.settings
        return (_ClassCrops.apply(grad, semantics, boxes, height, width, kind), *(None,) * 6)


def _boxes_fake(image: Tensor, semantics: Tensor, num_classes: int) -> Tensor:
    return image.new_empty((image.shape[0], num_classes, 4), dtype=torch.int32)


def _sums_fake(image: Tensor, semantics: Tensor, boxes: Tensor) -> Tensor:
    return torch.empty_like(boxes, memory_format=torch.contiguous_format)


def _crops_fake(image: Tensor, semantics: Tensor, boxes: Tensor, height: int,
                width: int) -> Tensor:
    n, k = image.shape[:2]
    return empty_nchw((n, boxes.shape[1] * k, height, width), image)


def _backward_fake(grad: Tensor, semantics: Tensor, boxes: Tensor, height: int, width: int,
                   channels_last: bool) -> Tensor:
    n, k = grad.shape[0], grad.shape[1] // boxes.shape[1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((n, k, height, width), dtype=grad.dtype, device=grad.device,
                       memory_format=layout)


# Semantics are labels (N, H, W) or, in the image's dtype, planes (N, C, H, W).
# Boxes of the nonzero pixels, (N, C, 4) int32: y0, y1, x0, x1, ends exclusive, zeros if absent.
class_boxes_op = RawOp(
    "class_boxes(Tensor image, Tensor semantics, SymInt num_classes) -> Tensor", _boxes_fake
)


# The same by the published rule, from the boxes above.
class_boxes_sums = RawOp(
    "class_boxes_sums(Tensor image, Tensor semantics, Tensor boxes) -> Tensor", _sums_fake
)


class_crops_op = RawOp(
    "class_crops(Tensor image, Tensor semantics, Tensor boxes, SymInt height, SymInt width) "
    "-> Tensor",
    _crops_fake,
)


class_crops_backward = RawOp(
    "class_crops_backward(Tensor grad, Tensor semantics, Tensor boxes, SymInt height, "
    "SymInt width, bool channels_last) -> Tensor",
    _backward_fake,
)
