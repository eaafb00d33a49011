"""Helpers for tests of ops, ours and users': layouts, three-way accuracy, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MEMORY_FORMATS = ("contiguous", "channels_last", "sliced", "transposed")


def with_memory_format(x: Tensor, memory_format: str) -> Tensor:
    """A copy of ``x`` (N, C, H, W) with the same values in another memory format.

    ``sliced`` cuts it out of a larger tensor on every axis; ``transposed`` swaps H and W in memory.
    """
    if memory_format == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if memory_format == "channels_last":
        return x.clone(memory_format=torch.channels_last)
    if memory_format == "sliced":
        n, c, h, w = x.shape
        big = x.new_full((n + 1, c + 2, h + 3, w + 2), float("nan") if x.is_floating_point() else 1)
        view = big[1:, 1:-1, 2:-1, 1:-1]
        view.copy_(x)
        return view
    if memory_format == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    raise ValueError(f"memory_format: expected one of {', '.join(MEMORY_FORMATS)}; "
                     f"got {memory_format!r}")


def max_error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``truth``."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.double().abs().max().clamp_min(1e-30)
    return float(((x.double() - truth.double()).abs().max() / scale).item())


def rms_error(x: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of ``truth``."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.double().square().mean().clamp_min(1e-60)
    return float(((x.double() - truth.double()).square().mean() / scale).sqrt().item())


def assert_as_accurate(result: Tensor, reference: Tensor, truth: Tensor, *, factor: float = 1.5,
                       floor: float | None = None, what: str = "result") -> None:
    """Judged against fp64: error(result) <= factor * error(reference) + floor, in two measures.

    Both the largest error, which one wrong element shows in, and the root mean square, which many
    elements make the same from draw to draw, must hold. ``truth`` is fp64; for fp64 results its own
    sums must be exact, as those of inputs drawn in fp32 are.

    Args:
        factor: of the reference's own error.
        floor: of the largest error; default: two units in the last place of the result's dtype.
            That of the root mean square, judged from 1000 elements on, is a quarter of it.
    """
    if result.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}")
    if truth.dtype != torch.float64:
        raise ValueError(f"truth: expected float64, got {truth.dtype}")
    floor = 2 * torch.finfo(result.dtype).eps if floor is None else floor
    measures = [("largest", max_error, floor), ("mean", rms_error, floor / 4)]
    for name, measure, least in measures[: 1 if truth.numel() < 1000 else 2]:
        allowed = factor * measure(reference, truth) + least
        error = measure(result, truth)
        if not error <= allowed:  # NaN fails too
            raise AssertionError(
                f"{what}: {name} error {error:.3e} against fp64, allowed {allowed:.3e}"
            )


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill memory from torch.empty with NaN, so that an element no kernel wrote is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    flags: Any = torch.utils.deterministic
    fill = flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        flags.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic)


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int = 0
) -> list[Tensor]:
    """Gradients of ``(function(*inputs) * cotangent).sum()`` for a fixed random cotangent.

    The cotangent is drawn in fp32, so that its sums are exact in fp64.
    """
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=generator)
    wanted = [x for x in leaves if x.requires_grad]
    return list(torch.autograd.grad((out * cotangent.to(out)).sum(), wanted))
