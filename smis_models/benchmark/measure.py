"""Measure one case: correctness first, then time and memory of all providers in one run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import Tensor

from smis_kernels.interface import no_fallback

from ..io.allocator import ENVIRONMENT
from . import timing
from .case import Case, Inputs, Maps, Provider, Run, Setting, convert, nbytes, tensors, unchanged
from .records import Record
from .timing import Call


def bind(case: Case, run: Run, inputs: Inputs) -> Call:
    """A call without arguments that runs ``case.direction`` and returns what it computes."""
    if case.direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return run(*inputs)

        return forward
    leaves = [inputs[i].detach().requires_grad_() for i in case.leaves]
    arguments = list(inputs)
    for i, leaf in zip(case.leaves, leaves, strict=True):
        arguments[i] = leaf
    kept = run(*arguments)
    drawn = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    cotangent = torch.empty_like(kept).copy_(drawn)
    if case.direction == "backward":
        return partial(torch.autograd.grad, kept, leaves, cotangent, retain_graph=True)

    def step() -> Any:
        out = run(*arguments)
        return (out, *torch.autograd.grad(out, leaves, cotangent))

    return step


def judge(case: Case, outputs: Any, truth: Any) -> float:
    """The largest error of all tensors, of as many images as the truth has; NaN where one is."""
    whole = case.sample is unchanged
    return _largest(*(case.error(output if whole else output[: len(exact)], exact)
                      for output, exact in zip(tensors(outputs), tensors(truth), strict=True)))


def _largest(*errors: float) -> float:
    return float("nan") if any(e != e for e in errors) else max(errors)  # max() drops NaN


def release() -> None:
    """Give the device's free memory back, so that one case's does not limit the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Bound:
    """A provider on its inputs, judged."""

    provider: Provider
    call: Call
    inputs: Inputs
    run: Run
    error: float
    allowed: float
    peak: int
    moved: int
    produced: int
    largest: Tensor
    compile_seconds: float | None = None
    captured: bool = False


def _compile(provider: Provider, setting: Setting) -> Run:
    """torch.compile at its best: on CUDA max-autotune, graphs captured as for every provider."""
    torch._dynamo.reset()
    if setting.tiny:  # the tracing is proven, nothing is generated
        return torch.compile(provider.run, backend="aot_eager", dynamic=False)
    if setting.device.type != "cuda":
        return torch.compile(provider.run)
    from torch._inductor import config

    if hasattr(config, "max_autotune_conv_backends"):
        config.max_autotune_conv_backends = "ATEN"  # cuDNN, whose own search is on
    return torch.compile(provider.run, mode="max-autotune-no-cudagraphs", dynamic=False)


@contextmanager
def _search_of_convs(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _truth(case: Case, inputs: Inputs) -> list[Tensor]:
    reference = case.providers[0]
    picked = reference.prepare(case.sample(inputs))
    with _search_of_convs(False):
        if case.truth is not None:
            return list(tensors(bind(case, case.truth, picked)()))
        return list(tensors(bind(case, reference.run, convert(picked, dtype=torch.float64))()))


def _bound(case: Case, setting: Setting, provider: Provider, inputs: Inputs, truth: list[Tensor],
           yardsticks: dict[torch.dtype, float]) -> _Bound:
    """Bind a provider and judge it; its dtype's first error is the yardstick of the others."""
    dtype = provider.dtype or setting.dtype
    given = inputs if dtype == setting.dtype else convert(inputs, dtype=dtype)
    run = _compile(provider, setting) if provider.compile else provider.run
    arguments = provider.prepare(given)
    start = time.perf_counter()
    call = bind(case, run, arguments)
    outputs = call()
    seconds = time.perf_counter() - start if provider.compile else None
    error = judge(case, outputs, truth)
    floating = [t.dtype for t in tensors(outputs) if t.is_floating_point()]
    units = case.units * max((torch.finfo(d).eps for d in floating), default=0.0)
    if not provider.ours:
        yardsticks.setdefault(dtype, error)
    # Without a yardstick nothing of ours is right: no error is below NaN.
    allowed = case.factor * yardsticks.get(dtype, float("nan")) + (
        units if case.floor is None else case.floor)
    moved = (provider.moved or case.moved)(given, outputs)
    produced = nbytes(outputs)
    largest = torch.empty_like(max(tensors(outputs), key=nbytes))
    del outputs
    # Not the first call, which compiles layouts: what is timed must run our kernels.
    with no_fallback() if provider.ours else nullcontext():
        peak = timing.peak_allocated(call, setting.device)
    return _Bound(provider, call, arguments, run, error, allowed, peak, moved, produced, largest,
                  seconds)


def refuse(case: Case, provider: Provider, error: Exception) -> None:
    """What becomes of a provider that fails: a warning where torch.compile does, else the error.

    torch.compile has failures of its own (a kernel that its C++ compiler refuses, say).
    """
    if not provider.compile:
        raise error
    first = str(error).strip().splitlines()[0]
    warnings.warn(f"{case.group}: torch.compile failed: {first}", stacklevel=3)


def _copies(case: Case, bound: _Bound, count: int) -> list[Call]:
    """The same call on ``count`` copies of its inputs."""
    calls = [bound.call]
    for _ in range(count - 1):
        clone = tuple(x.clone() if isinstance(x, Tensor) else x for x in bound.inputs)
        calls.append(bind(case, bound.run, clone))
    return calls


def _other_maps(case: Case, setting: Setting, ready: list[_Bound],
                windows: dict[str, tuple[int, int, int]],
                progress: Callable[[str], None]) -> dict[str, Call]:
    """Ours on the maps after the first, each judged against the reference there.

    Their counts are added to ``windows``.
    """
    by_name = {bound.provider.name: bound for bound in ready}
    reference, fused = by_name["reference"], by_name["fused"]
    calls: dict[str, Call] = {}
    for index in range(1, setting.maps.count):
        progress(f"correctness, map {index}")
        inputs = case.make_inputs(setting.at(index))
        if case.windows is not None:
            windows[f"map {index}"] = case.windows(inputs)
        expected = bind(case, reference.run, reference.provider.prepare(inputs))()
        call = bind(case, fused.run, fused.provider.prepare(inputs))
        error = judge(case, call(), expected)
        # both differ from the truth: the fused error may be the sum of the two
        fused.error = _largest(fused.error, error)
        calls[f"map {index}"] = call
    fused.allowed += reference.error
    return calls


def _times(case: Case, setting: Setting, ready: list[_Bound],
           others: dict[str, Call]) -> dict[str, list[float]]:
    """Seconds per call of every provider and yardstick, from one interleaved run.

    On CUDA the inputs of streaming ops rotate, and what can be captured is replayed from a graph.
    """
    cuda = setting.device.type == "cuda"
    calls, shares = dict(others), dict.fromkeys(others, 1)
    for bound in ready:
        name = bound.provider.name
        streams = cuda and case.memory_bound and case.direction == "forward"
        count = timing.rotations(bound.moved, setting.device) if streams else 1
        copies = _copies(case, bound, count)
        calls[name], shares[name] = timing.rotating(copies), 1
        if cuda and case.graphs and bound.provider.graph and case.direction == "forward":
            try:
                calls[name], shares[name] = timing.graphed(copies), count
                bound.captured = True
            except RuntimeError as error:  # the table says that launches are in its time
                warnings.warn(f"{case.group}, {name}: no CUDA graph: {error}", stacklevel=2)
    seconds = case.seconds if setting.seconds is None else setting.seconds
    times = timing.interleave(calls, seconds, device=setting.device, least=5 if cuda else 3)
    return {name: [t / shares[name] for t in times[name]] for name in calls}


def measure(case: Case, setting: Setting, progress: Callable[[str], None] = lambda what: None,
            failed: Callable[[Case, Provider, Exception], None] = refuse) -> list[Record]:
    """One record per provider of ``case``, all from one interleaved run.

    Args:
        case: what to measure.
        setting: device, dtype, maps.
        progress: called with the name of each step.
        failed: called with each provider that fails but the first; those that work go on.

    Returns:
        Records in the order of ``case.providers``; their ``correct`` says whether a speedup may
        be reported.
    """
    with _search_of_convs(setting.device.type == "cuda"):
        return _measure(case, replace(setting, maps=setting.maps.named(case.scenes)), progress,
                        failed)


def _measure(case: Case, setting: Setting, progress: Callable[[str], None],
             failed: Callable[[Case, Provider, Exception], None]) -> list[Record]:
    progress("correctness")
    inputs = case.make_inputs(setting)
    truth = _truth(case, inputs)
    release()
    ready: list[_Bound] = []
    yardsticks: dict[torch.dtype, float] = {}
    for provider in case.providers:
        if provider.compile and not setting.compiled:
            continue
        try:
            ready.append(_bound(case, setting, provider, inputs, truth, yardsticks))
        except Exception as error:
            if not ready:  # without the yardstick nothing can be judged
                raise
            failed(case, provider, error)
            release()
    progress("timing")
    windows = {} if case.windows is None else {"map 0": case.windows(inputs)}
    others = _other_maps(case, setting, ready, windows, progress) if case.every_map else {}
    largest = max((bound.largest for bound in ready), key=nbytes)
    yardstick_calls = {"copy": timing.copy_call(largest)}
    remaining = None if case.bound is None else case.bound(inputs)
    rate_macs = 0
    if remaining is not None:
        yardstick_calls["rate"], rate_macs = timing.rate_call(setting.device, setting.dtype,
                                                              tiny=setting.tiny)
        features = torch.empty(remaining.largest, dtype=torch.uint8, device=setting.device)
        yardstick_calls["features"] = timing.copy_call(features)
    times = _times(case, setting, ready, {**others, **yardstick_calls})
    copied = 2 * nbytes(largest) / median(times["copy"])
    maps = {"map 0": median(times["fused"]),
            **{name: median(times[name]) for name in others}} if others else {}
    if others:
        rounds = zip(*(times[name] for name in ("fused", *others)), strict=True)
        times["fused"] = [geometric_mean(each) for each in rounds]
    bound = None
    if remaining is not None:
        bound = remaining.macs * median(times["rate"]) / rate_macs
        if remaining.bytes:
            bound += remaining.bytes * median(times["features"]) / (2 * remaining.largest)
    counts = {} if case.counts is None else case.counts(inputs)
    return [
        Record(
            group=case.group, provider=each.provider.name, times=times[each.provider.name],
            device=setting.device.type, dtype=str(setting.dtype).removeprefix("torch."),
            shape=tuple(next(tensors(inputs)).shape), bytes=each.moved, macs=case.macs(inputs),
            peak_memory=each.peak, output_bytes=each.produced, max_rel_error=each.error,
            correct=not each.provider.judged or each.error <= each.allowed,
            copy_bandwidth=copied, memory_bound=case.memory_bound, targets=case.targets,
            compile_seconds=each.compile_seconds,
            maps=maps if each.provider.name == "fused" else {},
            windows=windows if each.provider.name == "fused" else {}, bound=bound,
            counts=counts, graph=each.captured,
        )
        for each in ready
    ]


def _status(field: str) -> int:
    """Bytes of a field of this process's status (Linux)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected {field}, which is absent")
    return int(found[1]) * 1024


def _again(group: str, provider: str | None, setting: Setting) -> Any:
    """One case by its name: records, or of one provider the growth of the resident size."""
    from . import cases

    (case,) = (c for c in cases("all") if c.group == group)
    if provider is None:
        return measure(case, setting)
    chosen = next(p for p in case.providers if p.name == provider)
    call = bind(case, chosen.run, chosen.prepare(case.make_inputs(setting)))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
    before, kept, after = _status("VmRSS"), call(), _status("VmHWM")
    del kept
    return after - before


def _in_a_fresh_process(case: Case, provider: str | None, maps: Maps) -> Any:
    """:func:`_again` under the default allocator, which :mod:`..io.allocator` says how to leave."""
    setting = Setting(torch.device("cpu"), maps=maps, compiled=False)
    kept = {name: os.environ.pop(name) for name in ENVIRONMENT if name in os.environ}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_again, case.group, provider, setting).result()
    finally:
        os.environ.update(kept)


def resident_peak(case: Case, provider: str, maps: Maps) -> int:
    """Growth of the largest resident size during one call, in a fresh process (CPU, Linux)."""
    return int(_in_a_fresh_process(case, provider, maps))


def under_default_allocator(case: Case, maps: Maps) -> list[Record]:
    """The case once more in a fresh process that does not keep freed memory (CPU)."""
    records: list[Record] = _in_a_fresh_process(case, None, maps)
    return [replace(record, allocator="default") for record in records]
