"""One resolution of a label map: its distinct windows, and how a GPU's counts reach the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.label_windows.op import NumberedLevel, number_windows
from ..runtime.backend import resolve
from ..runtime.tensors import capturing

MOST_SPARE = 2**24  # bytes of room for windows beyond which those found are copied out of it


@dataclass
class WindowLevel:
    """The distinct windows of one resolution.

    Attributes:
        symbols: (N, h, w) int32 symbol of each pixel, from 1.
        windows3, index3: (V + 1, 9) symbols of each distinct 3x3 window, and the window (N, h, w)
            at each pixel. Row 0 is the outside.
        windows5, index5: (U + 1, 9) 3x3-window ids of each distinct 5x5 window, and the window at
            each pixel.
    """

    symbols: Tensor
    windows3: Tensor
    index3: Tensor
    windows5: Tensor
    index5: Tensor

    @property
    def repeats(self) -> bool:
        """Whether windows repeat enough for the tables to exist."""
        return len(self.windows3) > 0 and len(self.windows5) > 0

    @property
    def counts(self) -> tuple[int, int]:
        """(V, U), the numbers of distinct 3x3 and 5x5 windows."""
        return len(self.windows3) - 1, len(self.windows5) - 1


def limit_of(pixels: int, unlimited: bool) -> int:
    """The windows beyond which numbering stops, of a map of so many pixels."""
    # With more rows than half the pixels dense convs win anyway; small maps are always cheap.
    return pixels if unlimited else max(pixels // 2, 4096)


def compile_level(symbols: Tensor, unlimited: bool = False) -> WindowLevel:
    """The windows of one resolution's symbols (N, h, w)."""
    limit = limit_of(symbols.numel(), unlimited)
    # Numbering is exact on every implementation: it follows the device, whatever norms run on.
    index3, windows3 = number_windows(symbols, limit, backend="auto")
    if len(windows3) == 0:
        return WindowLevel(symbols, windows3, index3, windows3, index3)
    index5, windows5 = number_windows(index3, limit, backend="auto")
    return WindowLevel(symbols, windows3, index3, windows5, index5)


def nearest_source(size: int, source: int, device: torch.device) -> Tensor:
    """Source index of each target index, exactly as F.interpolate: floor(fp32 dst * fp32 scale)."""
    scale = float(np.float32(source) / np.float32(size))
    # made on the device: a copy from the host could not be captured in a CUDA graph
    index = torch.arange(size, dtype=torch.float32, device=device) * scale
    return index.floor().long().clamp_(max=source - 1)


def device_kernels(map: Tensor) -> bool:
    """Whether a GPU compiles layouts of this map without the host."""
    return resolve("number_levels", map, "auto", ("cuda",)) == "cuda"


class Reading:
    """Numbers of the device on their way to the host; it waits for them when they are asked for.

    Raises:
        RuntimeError: when asked for, where the device's work is captured in a CUDA graph.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._held: Tensor | None = numbers
        self._sent: torch.cuda.Event | None = None
        self._read: Any = None
        if capturing(numbers):
            self._held = None
        elif numbers.device.type == "cuda":
            self._held = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu",
                                     pin_memory=True)
            self._held.copy_(numbers, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(numbers.device))

    @property
    def done(self) -> bool:
        """Whether they have been asked for before."""
        return self._read is not None

    def numbers(self) -> Any:
        """The numbers as (nested) lists."""
        held = self._held  # before the other, which a second thread may set first
        if self._read is None:
            if held is None:
                raise RuntimeError("layout: its counts stay in the CUDA graph that was captured "
                                   "when it was made; make it before the capture")
            if self._sent is not None:
                self._sent.synchronize()
            self._read = held.tolist()
            self._held = None
        return self._read


@dataclass(frozen=True)
class PreparedLevel:
    """A resolution that the device numbers; ``counts`` holds those of all that it made with it."""

    level: NumberedLevel
    counts: Reading
    column: int

    def finished(self) -> WindowLevel:
        """The level as far as it is filled; the host waits for the counts here."""
        v, u = (row[self.column] for row in self.counts.numbers())
        numbered = self.level
        windows3, windows5 = numbered.windows3[:v + 1], numbered.windows5[:u + 1]
        if windows3.untyped_storage().nbytes() > MOST_SPARE:
            windows3, windows5 = windows3.clone(), windows5.clone()
        return WindowLevel(numbered.symbols, windows3, numbered.index3, windows5, numbered.index5)


@lru_cache(maxsize=64)
def sizes_asked(device: torch.device, shape: torch.Size) -> dict[tuple[int, int], None]:
    """The sizes that layouts of maps of this shape were asked for, to be compiled together."""
    return {}
