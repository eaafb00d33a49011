"""Interleaved timing and peak memory, on the CPU and on CUDA."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..synthesis.graphs import capture

Call = Callable[[], Any]

# Kineto prints a line to stderr at the start and the end of every profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_LEAST_SAMPLE = 2e-3
_GRAPH_BELOW = 2e-4
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
               least: int = 3, most: int = 101,
               progress: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Time all calls in one run, round by round in rotating order.

    Args:
        calls: what to time; fast ones are repeated within a sample.
        seconds: measuring time to aim at, over all calls.
        device: CUDA times by events.
        least, most: bounds on the number of rounds.
        progress: called after each sample.

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
                progress()
    finally:
        if collecting:
            gc.enable()
    return times


def rotating(calls: Sequence[Call]) -> Call:
    """A call that takes the next of ``calls`` each time, so that caches see new inputs."""
    state = {"next": 0}

    def call() -> Any:
        index = state["next"]
        state["next"] = (index + 1) % len(calls)
        return calls[index]()

    return call


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


def launch_bound(call: Call) -> bool:
    """Whether a CUDA call is so short that launching it is what takes the time."""
    call()
    return cuda_seconds(call, 10) < _GRAPH_BELOW


def rotations(bytes_per_call: int, device: torch.device) -> int:
    """How many copies of the inputs outgrow twice the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, math.ceil(2 * cache / max(1, bytes_per_call))))


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


CONV_MACS = 256 * 256 * 9 * 64 * 64


def conv_call(device: torch.device, dtype: torch.dtype) -> Call:
    """A 3x3 conv of 256 channels at 64², channels-last: the rate that convs can reach."""
    layout = torch.channels_last
    x, weight = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout)
                 for shape in ((1, 256, 64, 64), (256, 256, 3, 3)))

    def call() -> Tensor:
        with torch.no_grad():
            return torch.nn.functional.conv2d(x, weight, padding=1)

    return call


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
