"""Sends a layout from a loader's worker as one block of shared memory.

A compiled layout is some 40 small tensors, and each tensor that crosses to another process costs a
file descriptor and a mapping.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from smis_kernels import LabelLayout

_ALIGNMENT = 64  # bytes, as torch allocates
_Place = tuple[int, torch.dtype, torch.Size]  # first byte, dtype, shape


class _Extractor(pickle.Pickler):
    """Pickles all but the tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._index[id(obj)]


class _Restorer(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def _restore(content: bytes, block: Tensor, places: list[_Place]) -> Any:
    tensors = [
        block[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for first, dtype, shape in places
    ]
    return _Restorer(io.BytesIO(content), tensors).load()


def pack(layout: LabelLayout) -> tuple[Callable[..., Any], tuple[bytes, Tensor, list[_Place]]]:
    """The layout as (function, arguments) that restore it, all tensors in one block of bytes."""
    file = io.BytesIO()
    extractor = _Extractor(file)
    extractor.dump(layout)
    places, end = [], 0
    for tensor in extractor.tensors:
        places.append((end, tensor.dtype, tensor.shape))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(end, dtype=torch.uint8)
    for (first, _, _), tensor in zip(places, extractor.tensors, strict=True):
        block[first : first + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    return _restore, (file.getvalue(), block, places)


def _reduce(layout: LabelLayout) -> Any:
    # Memory of a GPU is shared by handles, tensor by tensor.
    return pack(layout) if layout.symbols.device.type == "cpu" else layout.__reduce_ex__(4)


ForkingPickler.register(LabelLayout, _reduce)
