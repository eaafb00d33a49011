"""Measure one case: correctness first, then time and memory of all providers in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean, median
from typing import Any

import torch

from smis_kernels.testing import max_error

from ..io.allocator import ENVIRONMENT
from . import timing
from .case import Case, Inputs, Maps, Provider, Setting, convert, nbytes, tensors
from .records import Record

Call = Callable[[], Any]


def bind(case: Case, run: Callable[..., Any], inputs: Inputs) -> Call:
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
    cotangent = _cotangent(kept)
    if case.direction == "backward":
        return partial(torch.autograd.grad, kept, leaves, cotangent, retain_graph=True)

    def step() -> Any:
        out = run(*arguments)
        return (out, *torch.autograd.grad(out, leaves, cotangent))

    return step


def _cotangent(out: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(out.shape, generator=generator)
    return torch.empty_like(out).copy_(drawn)


def worst(error: Callable[[torch.Tensor, torch.Tensor], float], outputs: Any,
          truth: Any) -> float:
    """The largest ``error(output, exact)`` of all tensors; NaN where one is."""
    errors = [error(output, exact)
              for output, exact in zip(tensors(outputs), tensors(truth), strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)  # max() drops NaN


def _error(outputs: Any, truth: Any) -> float:
    return worst(max_error, outputs, truth)


def _allowed(case: Case, reference_error: float, outputs: Any) -> float:
    floating = [t.dtype for t in tensors(outputs) if t.is_floating_point()]
    units = 4 * max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    return case.factor * reference_error + (units if case.floor is None else case.floor)


@dataclass
class _Bound:
    provider: Provider
    call: Call
    inputs: Inputs
    run: Callable[..., Any]
    error: float = 0.0
    allowed: float = 0.0
    compile_seconds: float | None = None


def _compile(provider: Provider, setting: Setting) -> Callable[..., Any]:
    torch._dynamo.reset()
    mode = "max-autotune" if setting.device.type == "cuda" else "default"
    return torch.compile(provider.run, mode=mode)


def _prepare(case: Case, setting: Setting, inputs: Inputs) -> tuple[list[_Bound], Any]:
    """Bind every provider and judge it against fp64."""
    reference = case.providers[0]
    exact = inputs if case.single_precision_truth else convert(
        reference.prepare(inputs), dtype=torch.float64)
    truth = bind(case, reference.run, exact)()
    ready: list[_Bound] = []
    reference_error, outputs = 0.0, None
    for provider in case.providers:
        if provider.compile and not setting.compiled:
            continue
        run = _compile(provider, setting) if provider.compile else provider.run
        arguments = provider.prepare(inputs)
        start = time.perf_counter()
        call = bind(case, run, arguments)
        try:
            outputs = call()
        except Exception as error:
            if not provider.compile:
                raise
            # torch.compile's own failures (a kernel that its C++ compiler refuses, say).
            first = str(error).strip().splitlines()[0]
            warnings.warn(f"{case.group}: torch.compile failed: {first}", stacklevel=2)
            continue
        bound = _Bound(provider, call, arguments, run, _error(outputs, truth))
        if provider.compile:
            bound.compile_seconds = time.perf_counter() - start
        if provider is reference:
            reference_error = bound.error
        bound.allowed = _allowed(case, reference_error, outputs)
        ready.append(bound)
    return ready, outputs


def _copies(case: Case, bound: _Bound, count: int) -> list[Call]:
    """The same call on ``count`` copies of its inputs."""
    calls = [bound.call]
    for _ in range(count - 1):
        clone = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in bound.inputs)
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
        error = _error(call(), expected)
        # both differ from the truth: the fused error may be the sum of the two
        fused.error = max(fused.error, error)
        calls[f"map {index}"] = call
    fused.allowed += reference.error
    return calls


def _times(case: Case, setting: Setting, ready: list[_Bound], moved: int,
           others: dict[str, Call]) -> dict[str, list[float]]:
    """Seconds per call of every provider and of the copy, from one interleaved run.

    On CUDA inputs rotate, and where every provider is bound by its launches all are captured.
    """
    cuda = setting.device.type == "cuda"
    count = timing.rotations(moved, setting.device) if cuda else 1
    copies = {bound.provider.name: _copies(case, bound, count) for bound in ready}
    calls = {name: timing.rotating(c) if cuda else c[0] for name, c in copies.items()}
    captured = (
        cuda and case.graphs and case.direction == "forward"
        and all(timing.launch_bound(call) for call in calls.values())
    )
    if captured:
        calls = {name: timing.graphed(c) for name, c in copies.items()}
    times = timing.interleave({**calls, **others}, case.seconds, device=setting.device)
    if captured:  # one replay is one call on every copy
        times.update({name: [t / count for t in times[name]] for name in calls})
    return times


def measure(case: Case, setting: Setting,
            progress: Callable[[str], None] = lambda what: None) -> list[Record]:
    """One record per provider of ``case``, all from one interleaved run.

    Args:
        case: what to measure.
        setting: device, dtype, maps.
        progress: called with the name of each step.

    Returns:
        Records in the order of ``case.providers``; their ``correct`` says whether a speedup may
        be reported.
    """
    setting = replace(setting, maps=setting.maps.named(case.scenes))
    progress("correctness")
    inputs = case.make_inputs(setting)
    ready, outputs = _prepare(case, setting, inputs)
    moved = case.moved(inputs, outputs)
    produced = nbytes(outputs)
    largest = max(tensors(outputs), key=nbytes)
    progress("timing")
    windows = {} if case.windows is None else {"map 0": case.windows(inputs)}
    others = _other_maps(case, setting, ready, windows, progress) if case.every_map else {}
    yardsticks = {"copy": timing.copy_call(largest),
                  "conv": timing.conv_call(setting.device, setting.dtype)}
    remaining = None if case.bound is None else case.bound(inputs)
    if remaining is not None:
        features = torch.empty(remaining.largest, dtype=torch.uint8, device=setting.device)
        yardsticks["features"] = timing.copy_call(features)
    times = _times(case, setting, ready, moved, {**others, **yardsticks})
    copied = 2 * nbytes(largest) / median(times["copy"])
    maps = {"map 0": median(times["fused"]),
            **{name: median(times[name]) for name in others}} if others else {}
    if others:
        rounds = zip(*(times[name] for name in ("fused", *others)), strict=True)
        times["fused"] = [geometric_mean(each) for each in rounds]
    bound = None
    if remaining is not None:
        rate = timing.CONV_MACS / median(times["conv"])
        streamed = 2 * remaining.largest / median(times["features"])
        bound = remaining.macs / rate + remaining.bytes / streamed
    progress("memory")
    counts = {} if case.counts is None else case.counts(inputs)
    shape = tuple(next(t for t in tensors(inputs)).shape)
    return [
        Record(
            group=case.group, provider=each.provider.name, times=times[each.provider.name],
            device=setting.device.type, dtype=str(setting.dtype).removeprefix("torch."),
            shape=shape, bytes=moved, macs=case.macs(inputs),
            peak_memory=timing.peak_allocated(each.call, setting.device),
            output_bytes=produced, max_rel_error=each.error,
            correct=each.error <= each.allowed, copy_bandwidth=copied,
            memory_bound=case.memory_bound, targets=case.targets,
            compile_seconds=each.compile_seconds,
            maps=maps if each.provider.name == "fused" else {},
            windows=windows if each.provider.name == "fused" else {}, bound=bound,
            counts=counts,
        )
        for each in ready
    ]


def _child(*arguments: str) -> Any:
    """Run this package's worker in a fresh process under the default allocator."""
    environment = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    command = [sys.executable, "-m", "smis_models.benchmark.worker", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"benchmark worker failed ({' '.join(arguments)}): {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _folder(maps: Maps) -> tuple[str, ...]:
    return () if maps.folder is None else ("--maps", str(maps.folder))


def resident_peak(case: Case, provider: str, maps: Maps) -> int:
    """Growth of the largest resident size during one call, in a fresh process (CPU, Linux)."""
    return int(_child("resident", case.group, provider, *_folder(maps)))


def under_default_allocator(case: Case, maps: Maps) -> list[Record]:
    """The case once more in a fresh process that does not keep freed memory (CPU)."""
    entries = _child("time", case.group, "all", *_folder(maps))
    return [replace(Record.from_entry(e), allocator="default") for e in entries]


