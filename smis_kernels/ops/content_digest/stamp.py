"""Tensors as they were: whether what was made of them still holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .op import content_digest


def identity(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return ()
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride())


def content(tensor: Tensor) -> Tensor:
    """The digest of values in the order of memory, which ``identity`` tells: none is copied."""
    if not tensor.is_contiguous():  # a digest would copy it, at every check
        strides = tensor.stride()
        tensor = tensor.permute(sorted(range(tensor.dim()), key=lambda i: -strides[i]))
    return content_digest(tensor, backend="auto")


class Stamp:
    """Tensors as they were: the same ones, at the same version, of the same content.

    Versions show most writes, at no cost. The content is compared too, since fused optimizers,
    batch norms in training, writes through ``.data`` and numpy move no version: each check reads
    the tensors once. Values on other devices than the CPU are waited for, once for all of them.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        # They stay referenced: no other can take the place of one in memory.
        self._tensors = list(tensors)
        self._identities = [identity(t) for t in self._tensors]
        self._digests = self._content()

    def _content(self) -> list[int]:
        found = [content(t) for t in self._tensors
                 if t is not None and t.numel() and not t.is_meta]
        if not found:
            return []
        digests: list[int] = torch.stack([d.to(found[0].device) for d in found]).tolist()
        return digests

    def holds(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are the tensors, unchanged."""
        now = list(tensors)
        return (
            len(now) == len(self._tensors)
            and all(a is b for a, b in zip(now, self._tensors, strict=True))
            and [identity(t) for t in now] == self._identities
            and self._content() == self._digests
        )
