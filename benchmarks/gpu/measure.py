"""One row: several providers of one computation, judged against fp64 and timed in one run."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from smis_kernels.runtime.backend import BackendError, no_fallback
from smis_kernels.testing import max_error
from smis_models.benchmark import timing
from smis_models.benchmark.case import nbytes, tensors
from smis_models.benchmark.measure import worst

from .journal import Lacking, Row, explain

Call = Callable[[], Any]
MATRIX = 8192
ACCURACY = 1.5  # of the reference's own error at the same dtype


@dataclass(frozen=True)
class Provider:
    """One way to compute a row.

    Attributes:
        name: "reference...", "compiled..." or "ours...".
        make: builds the inputs and returns the call.
        dtype: of the result, for the rounding that is allowed.
        like: the provider of the same dtype whose error against fp64 is the yardstick; None: this
            is one.
        graph: replay it from a CUDA graph.
        optional: a failure is noted (torch.compile's), not raised.
    """

    name: str
    make: Callable[[], Call]
    dtype: torch.dtype = torch.float32
    like: str | None = None
    graph: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Floor:
    """What any implementation has to do: bytes read and written, floating-point operations."""

    bytes: int = 0
    operations: int = 0


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best: max-autotune, static shapes.

    CUDA graphs are captured here as for every provider, so Inductor need not copy the inputs into
    graphs of its own; convs come from cuDNN, whose own search (``cudnn.benchmark``) is on.
    """
    torch._dynamo.reset()
    from torch._inductor import config

    if hasattr(config, "max_autotune_conv_backends"):
        config.max_autotune_conv_backends = "ATEN"
    if not torch.cuda.is_available():  # a dry run: the tracing is proven, nothing is generated
        return torch.compile(function, backend="aot_eager", dynamic=False)
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def without_gradients(function: Callable[..., Any], *inputs: Any) -> Call:
    """A call of ``function(*inputs)`` that records nothing for a backward pass."""

    def call() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return call


def _rms_error(output: Tensor, exact: Tensor) -> float:
    scale = exact.norm().clamp_min(1e-30)
    return float((output.double() - exact).norm() / scale)


def _errors(outputs: Any, truth: Sequence[Tensor]) -> dict[str, float]:
    """Largest and root-mean-square error, relative to the truth's largest value and size."""
    given = [output.detach() for output in tensors(outputs)]
    return {"max": worst(max_error, given, truth), "rms": worst(_rms_error, given, truth)}


def _summary(times: list[float]) -> Row:
    low, high = times[0], times[0]
    if len(times) > 1:
        low, _, high = quantiles(times, n=4, method="inclusive")
    return {"median": median(times), "q1": low, "q3": high, "rounds": len(times)}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give the allocator's free memory back, so that one row's does not limit the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def matrix_call(device: torch.device, dtype: torch.dtype, size: int = MATRIX) -> Call:
    """A square matrix product of random numbers (zeros run faster)."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn((size, size), generator=generator, device=device).to(dtype)
            for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _judged(provider: Provider, exact: list[Tensor], yardstick: float | None,
            device: torch.device, judge: str, select: Callable[[Any], Any]
            ) -> tuple[Row, Call, Tensor]:
    """A provider's errors and peak memory, the call to time, memory as large as its result."""
    start = time.perf_counter()
    call = provider.make()
    outputs = call()
    synchronize()
    entry: Row = {"first_call_seconds": round(time.perf_counter() - start, 3)}
    errors = _errors(select(outputs), exact)
    entry["error"], entry["errors"] = errors[judge], errors
    if yardstick is not None:
        half_unit = torch.finfo(provider.dtype).eps / 2  # the rounding of the result itself
        entry["allowed"] = ACCURACY * yardstick + half_unit
        entry["correct"] = bool(entry["error"] <= entry["allowed"])
    else:
        entry["correct"] = math.isfinite(entry["error"])
    largest = torch.empty_like(max(tensors(outputs), key=nbytes))
    del outputs
    # Not the first call, which compiles layouts: what is timed must run our kernels.
    with no_fallback() if provider.name.startswith("ours") else contextlib.nullcontext():
        entry["peak_bytes"] = timing.peak_allocated(call, device)
    if provider.graph:
        entry["graph"] = device.type == "cuda"
        if entry["graph"]:
            try:
                call = timing.graphed([call])
            except RuntimeError as error:  # then its time includes launches, and the table says so
                entry |= {"graph": False, "note": f"no CUDA graph: {explain(error)}"}
    return entry, call, largest


def measure(providers: Sequence[Provider], truth: Callable[[], Any], device: torch.device, *,
            floor: Floor | None = None, seconds: float = 1.5, least: int = 5,
            matrix: bool = False, small: bool = False, judge: str = "max",
            select: Callable[[Any], Any] = lambda outputs: outputs) -> Row:
    """Judge and time the providers.

    Args:
        providers: in the order of the report.
        truth: computes the result in fp64.
        device: where all run.
        floor: puts the least time that the machine's rates of this very run allow beside the times.
        seconds: of timing, over all providers.
        least: rounds at the least.
        matrix: measure the matrix rate too.
        small: a dry run on a CPU: each call once, small sizes for the rates.
        judge: the error that decides, "max", or "rms" where chaos makes the largest one a lottery.
        select: what of the outputs the truth is about.

    Returns:
        {"providers": {name: times, error, peak memory}, "rates", "floor"}.
    """
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    exact = [t.detach().double() for t in tensors(truth())]
    torch.backends.cudnn.benchmark = searching
    release()
    found: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    largest: Tensor | None = None
    for provider in providers:
        yardstick = found.get(provider.like or "", {}).get("error")
        try:
            entry, call, biggest = _judged(provider, exact, yardstick, device, judge, select)
        except Exception as error:
            lacking = isinstance(error, BackendError)
            found[provider.name] = {
                "skipped" if provider.optional or lacking else "failed": explain(error),
                **({"again": True} if lacking else {})}
            release()
            continue
        if largest is None or nbytes(biggest) > nbytes(largest):
            largest = biggest
        found[provider.name], calls[provider.name] = entry, call
    if not calls or largest is None:
        raise RuntimeError(f"no provider runs: {found}")
    if not any(name.startswith("ours") for name in calls):
        for entry in found.values():
            if "again" in entry:
                raise Lacking(entry["skipped"])
    rates = {"copy": timing.copy_call(largest)}
    size = 64 if small else MATRIX
    if matrix:
        rates["matrix"] = matrix_call(device, torch.bfloat16, size)
    timed = {**calls, **{f"rate {k}": v for k, v in rates.items()}}
    times = ({name: [timing.cpu_seconds(call, 1)] for name, call in timed.items()} if small
             else timing.interleave(timed, seconds, device=device, least=least))
    for name in calls:
        found[name].update(_summary(times[name]))
    measured = {"copy": 2 * nbytes(largest) / median(times["rate copy"])}
    if matrix:
        measured["matrix"] = 2 * size**3 / median(times["rate matrix"])
    row: Row = {"providers": found, "rates": measured}
    if any("again" in entry for entry in found.values()):
        row["again"] = True
    failures = [f"{name}: {entry['failed']}" for name, entry in found.items() if "failed" in entry]
    if failures:
        row |= {"state": "failed", "reason": "; ".join(failures)}
    if floor is not None:
        row["floor"] = _floor(floor, measured)
    return row


def _floor(floor: Floor, rates: dict[str, float]) -> Row:
    parts = {"bytes": floor.bytes / rates["copy"]}
    if "matrix" in rates:
        parts["operations"] = floor.operations / rates["matrix"]
    kind = max(parts, key=lambda name: parts[name])
    return {"bytes": floor.bytes, "operations": floor.operations, "seconds": parts[kind],
            "bound": "memory" if kind == "bytes" else "matrix"}
