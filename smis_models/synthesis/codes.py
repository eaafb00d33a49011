"""Latent codes: drawn by seed, one class drawn anew, and the way from one to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PARALLEL = 1e-4  # radians: below it the sphere is a line


def draw_code(model: Any, seed: int) -> Tensor:
    """A latent code (1, 8C, h, w) from N(0, 1); the same seed, the same code."""
    return model.generator.sample_latent(1, torch.Generator().manual_seed(seed))


def drawn_code(model: Any, seed: int) -> Tensor:
    """As :func:`draw_code`, of a model that must read one.

    Raises:
        ValueError: a model that reads none.
    """
    z: Tensor | None = draw_code(model, seed)
    if z is None:
        raise ValueError(f"model: expected one with a latent code, got {model.name}, which paints "
                         "one picture for a layout")
    return z


def with_class(generator: Any, z: Tensor, index: int, other: Tensor) -> Tensor:
    """``z`` with the code of class ``index`` from another code."""
    channels = generator.class_channels(index)
    changed = z.clone()
    changed[:, channels] = other[:, channels]
    return changed


def resample_class(model: Any, z: Tensor, index: int, seed: int) -> Tensor:
    """``z`` with the code of class ``index`` drawn anew and all others kept."""
    return with_class(model.generator, z, index, draw_code(model, seed))


def code_parts(generator: Any) -> int:
    """How many codes lie side by side in a generator's: one for each class, or one for all."""
    return generator.preset.classes if hasattr(generator, "class_channels") else 1


def interpolate(start: Tensor, end: Tensor, t: float, parts: int = 1) -> Tensor:
    r"""Spherical interpolation, from ``start`` (t = 0) to ``end`` (t = 1), both bit-equal.

    .. math:: z = \frac{\sin((1 - t)\,\omega)\, z_0 + \sin(t\,\omega)\, z_1}{\sin \omega}

    with the angle :math:`\omega` between :math:`z_0` and :math:`z_1`. The way between two codes
    from N(0, 1) has their deviation all along, where a straight line has 0.71 of it in the middle.

    Args:
        start, end: (N, C, ...) of one shape.
        t: 0..1.
        parts: codes along C, each on a sphere of its own; one that both ends share is kept.

    Raises:
        ValueError: codes of two shapes.

    Example:
        >>> z0, z1 = torch.randn(2, 1, 16, 1, 1)
        >>> middle = interpolate(z0, z1, 0.5, parts=2)
    """
    if start.shape != end.shape:
        raise ValueError(f"end: expected the start's shape {tuple(start.shape)}, got "
                         f"{tuple(end.shape)}")
    if t in (0, 1):
        return (end if t else start).clone()
    a, b = (z.double().unflatten(1, (parts, -1)).flatten(2) for z in (start, end.to(start)))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=2).clamp(-1, 1)
    angle = cosine.acos()
    flat = (angle.sin() < _PARALLEL).unsqueeze(2)
    angle = angle.unsqueeze(2)
    mixed = ((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b
    mixed = torch.where(flat, torch.lerp(a, b, t), mixed)
    return mixed.reshape(start.shape).to(start)
