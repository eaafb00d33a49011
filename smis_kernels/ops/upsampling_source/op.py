"""The features that a nearest x2 upsampling was made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import WIDE, check_tensor
from ...runtime.derivatives import transformed
from ...runtime.library import RawOp
from . import reference

KINDS = ("cpu",)


def upsampling_source(input: Tensor, *, backend: str | None = None) -> Tensor | None:
    r"""The features that ``input`` is a nearest x2 upsampling of; None where it is none.

    .. math:: y_{nchw} = x_{nc,2h,2w} \text{ if } x_{n,c,2h+i,2w+j} = x_{nc,2h,2w} \; \forall i, j

    bit by bit. So a block that is given upsampled features, however they were made, can fold the
    upsampling as :class:`SPADE` does with ``upsample=True``. It reads as far as the first
    difference. Where a gradient is wanted there is none: it belongs to all four pixels.

    Args:
        input: (N, C, H, W), float32 or float64, of any strides.
        backend: "auto", "reference" or "cpu".

    Returns:
        (N, C, H / 2, W / 2), channels-last; None of an odd height or width, too.

    Raises:
        ValueError, TypeError: an input of other dimensions or dtypes.

    Example:
        >>> x = torch.randn(1, 8, 4, 4)
        >>> up = torch.nn.functional.interpolate(x, scale_factor=2)
        >>> torch.equal(upsampling_source(up), x), upsampling_source(x)
        (True, None)
    """
    check_tensor("input", input, 4, "(N, C, H, W)", WIDE)
    kind = resolve("upsampling_source", input, backend, KINDS)
    _, _, height, width = input.shape
    wanted = torch.is_grad_enabled() and input.requires_grad
    if height % 2 or width % 2 or input.numel() == 0 or wanted or transformed() is not None:
        return None
    if kind == "reference":
        return reference.upsampling_source(input)
    _, channel, row, pixel = input.stride()
    if not ((pixel == 1 and row == width) or (channel == 1 and row == width * pixel)):
        input = input.contiguous()
    source, same = _upsampling_source(kind, input)
    return source if same else None


def _fake(input: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = input.shape
    source = torch.empty((n, c, h // 2, w // 2), dtype=input.dtype, device=input.device,
                         memory_format=torch.channels_last)
    return source, torch.empty((), dtype=torch.bool, device=input.device)


_upsampling_source = RawOp("upsampling_source(Tensor input) -> (Tensor, Tensor)", _fake)
