"""Interleaved timing and peak memory, on the CPU and on CUDA."""

from __future__ import annotations

import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from smis_kernels.interface import capture

Call = Callable[[], Any]

# Kineto prints a line to stderr at the start and the end of every profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_LEAST_SAMPLE = 2e-3
_GRAPH_SECONDS = 5e-3  # of the calls in a graph that replay_seconds times


def cpu_seconds(call: Call, repeats: int) -> float:
    """Mean wall time of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_seconds(call: Call, repeats: int) -> float:
    """Mean device time of one call, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def interleave(calls: Mapping[str, Call], seconds: float, *, device: torch.device | None = None,
               least: int = 3, most: int = 101) -> dict[str, list[float]]:
    """Time all calls in one run, round by round in rotating order.

    Args:
        calls: what to time; fast ones are repeated within a sample.
        seconds: measuring time to aim at, over all calls.
        device: CUDA times by events.
        least, most: bounds on the number of rounds.

    Returns:
        Seconds per call, one entry per round.

    Example:
        >>> times = interleave({"a": lambda: sum(range(99)), "b": lambda: None}, 0.1)
        >>> sorted(times)
        ['a', 'b']
    """
    clock = cuda_seconds if device is not None and device.type == "cuda" else cpu_seconds
    repeats, total = {}, 0.0
    for name, call in calls.items():
        cost = clock(call, 1)
        if cost < 1:  # the first call of a slow one is warm enough
            cost = clock(call, 1)
        repeats[name] = max(1, math.ceil(_LEAST_SAMPLE / max(cost, 1e-7)))
        total += repeats[name] * cost
    rounds = min(most, max(least, round(seconds / total)))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(clock(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def rotating(calls: Sequence[Call]) -> Call:
    """A call that takes the next of ``calls`` each time, so that caches see new inputs."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def graphed(calls: Sequence[Call]) -> Call:
    """All ``calls`` in one CUDA graph; one replay runs each of them once."""

    def run() -> None:  # returns nothing: results kept by the graph would double its memory
        for call in calls:
            call()

    return capture(run, torch.device("cuda", torch.cuda.current_device()))


def replay_seconds(call: Call, device: torch.device, rounds: int = 7) -> float:
    """Median device time of one call among others in a CUDA graph; wall time on a CPU.

    An eager call of small inputs is all launch; what runs inside a graph is not.
    """
    call()
    if device.type != "cuda":
        return median(cpu_seconds(call, 1) for _ in range(rounds))
    repeats = max(1, min(50, round(_GRAPH_SECONDS / max(cuda_seconds(call, 1), 1e-7))))
    replay = graphed([call] * repeats)
    replay()
    return median(cuda_seconds(replay, 1) for _ in range(rounds)) / repeats


def rotations(bytes_per_call: int, device: torch.device) -> int:
    """How many copies of the inputs outgrow twice the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(1, math.ceil(2 * cache / max(1, bytes_per_call))))


def copy_call(like: Tensor) -> Call:
    """``out.copy_(x)`` into touched memory of the size of ``like``: the bandwidth to compare to.

    Of random numbers: a GPU moves zeros faster.
    """
    source = torch.empty_like(like)
    if source.is_floating_point():
        source.normal_()
    elif source.dtype != torch.bool:
        source.random_(0, 100)
    out = torch.zeros_like(source)
    return lambda: out.copy_(source)


def matrix_call(device: torch.device, dtype: torch.dtype, size: int = 8192) -> Call:
    """A square matrix product of random numbers (zeros run faster)."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn((size, size), generator=generator, device=device).to(dtype)
            for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def conv_call(device: torch.device, dtype: torch.dtype, channels: int = 256, size: int = 64,
              batch: int = 1) -> Call:
    """A 3x3 conv of as many outputs, channels-last."""
    x, weight = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for shape in ((batch, channels, size, size), (channels, channels, 3, 3)))

    def call() -> Tensor:
        with torch.no_grad():
            return torch.nn.functional.conv2d(x, weight, padding=1)

    return call


def rate_call(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> tuple[Call, int]:
    """What multiplies at the best rate, and its multiply-adds: a conv; on CUDA a product."""
    if device.type == "cuda":
        return matrix_call(device, dtype), 8192**3
    channels, size = (16, 8) if tiny else (256, 64)
    return conv_call(device, dtype, channels, size), 9 * channels**2 * size**2


def peak_allocated(call: Call, device: torch.device) -> int:
    """Largest sum of live allocations made by one call, its outputs included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        live += change
        peak = max(peak, live)
    return peak
