"""Textures: periodic grey tiles, drawn once for each image size, from which regions are cut."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Tile = NDArray[np.float32]


def _noise(r: np.random.Generator, n: int, sy: float, sx: float) -> Tile:
    """Periodic Gaussian noise of deviation 1/2, smoothed over sy x sx pixels, within -1..1."""
    fy, fx = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None, :]
    kernel = np.exp(-2 * np.pi**2 * ((fy * sy) ** 2 + (fx * sx) ** 2))
    noise = np.fft.irfft2(np.fft.rfft2(r.standard_normal((n, n))) * kernel, (n, n))
    return np.clip(noise / (2 * noise.std()), -1, 1).astype(np.float32)


def _wave(phase: NDArray[np.floating]) -> Tile:
    return np.sin(2 * np.pi * phase).astype(np.float32)


def _square(phase: NDArray[np.floating], share: float) -> NDArray[np.bool_]:
    return phase % 1 < share


@lru_cache(maxsize=4)
def texture_bank(size: int) -> dict[str, Tile]:
    """Tiles (2·size, 2·size) float32 within -1..1 by name, their grain in proportion to ``size``.

    Example:
        >>> texture_bank(128)["bricks"].shape
        (256, 256)
    """
    n, k = 2 * size, size / 128
    r = np.random.default_rng(0)
    y, x = np.indices((n, n), np.float32) / k
    warp = _noise(r, n, 9 * k, 9 * k)
    row = np.floor(y / 5)
    mortar = _square(y / 5, 0.25) | _square(x / 10 + 0.5 * (row % 2), 0.12)
    panes = _square(y / 9 + 0.2, 0.55) & _square(x / 7 + 0.2, 0.55)
    bank = {
        "flat": _noise(r, n, 0, 0) * 0.2,
        "speckle": _noise(r, n, 0.5 * k, 0.5 * k),
        "leaves": _noise(r, n, 1.3 * k, 1.3 * k),
        "blotches": _noise(r, n, 3 * k, 3 * k),
        "clouds": _noise(r, n, 6 * k, 11 * k),
        "ripples": _noise(r, n, 0.8 * k, 5 * k),
        "grain": _noise(r, n, 5 * k, 0.8 * k),
        "strata": _wave(y / 7 + 0.7 * warp),
        "ridges": _wave((x + y) / 9 + 0.6 * warp),
        "bricks": np.where(mortar, 1.0, -0.35),
        "windows": np.where(panes, 1.0, -0.4),
        "stripes": np.where(_square(y / 5, 0.5), 1.0, -1.0),
        "checks": np.where(_square(y / 6, 0.5) ^ _square(x / 6, 0.5), 1.0, -1.0),
        "stars": (_noise(r, n, 0.45 * k, 0.45 * k) > 0.95) * 2.0 - 0.1,
    }
    return {name: tile.astype(np.float32) for name, tile in bank.items()}
