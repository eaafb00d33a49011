"""Part ``rates``: what the machine reaches at best, for every floor in the tables."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch

from smis_models.benchmark import timing
from smis_models.benchmark.measure import release

from .results import Journal, Row, Settings

LAUNCHES = 200


def _seconds(call: timing.Call, device: torch.device, rounds: int = 15) -> float:
    clock = timing.cuda_seconds if device.type == "cuda" else timing.cpu_seconds
    for _ in range(3):
        call()
    return median(clock(call, 1) for _ in range(rounds))


def copies(device: torch.device, dry: bool) -> Row:
    """Bytes a second, reads plus writes, of ``out.copy_(x)`` at several sizes."""
    found = {}
    for size in (1 << 16,) if dry else (1 << 24, 1 << 27, 1 << 30):
        source = torch.randn(size // 4, device=device).view(torch.uint8)
        out = torch.empty_like(source)
        found[str(size)] = 2 * size / _seconds(partial(out.copy_, source), device)
        del source, out
        release()
    return {"bytes_per_second": found}


def products(device: torch.device, dry: bool) -> Row:
    """Operations a second of square matrix products of random numbers."""
    found = {}
    for name, dtype, size, tf32 in (
        ("bfloat16", torch.bfloat16, 8192, False), ("float16", torch.float16, 8192, False),
        ("tf32", torch.float32, 8192, True), ("float32", torch.float32, 4096, False),
        ("float64", torch.float64, 4096, False),
    ):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        size = 64 if dry else size
        found[name] = 2 * size**3 / _seconds(timing.matrix_call(device, dtype, size), device, 7)
        torch.set_float32_matmul_precision(before)
        release()
    return {"operations_per_second": found}


def convs(device: torch.device, dry: bool) -> Row:
    """Operations a second of 3x3 convs of 256 channels, channels-last, by batch."""
    torch.backends.cudnn.benchmark = True
    channels, size = (16, 8) if dry else (256, 64)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for batch in (1, 8):
            call = timing.conv_call(device, dtype, channels, size, batch)
            name = f"{str(dtype).removeprefix('torch.')} batch {batch}"
            operations = 18 * batch * channels**2 * size**2
            found[name] = operations / _seconds(call, device)
    return {"operations_per_second": found}


def launches(device: torch.device) -> Row:
    """Seconds of one launch: torch's, one of our ops, and one inside a CUDA graph."""
    from smis_kernels import norm_act

    x = torch.randn((1, 8, 4, 4), device=device)
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)

    def torch_op() -> None:
        for _ in range(LAUNCHES):
            x.add_(0.0)

    def our_op() -> None:
        for _ in range(LAUNCHES):
            norm_act(x, norm="batch", running_mean=mean, running_var=var)

    found = {name: _seconds(call, device, 5) / LAUNCHES
             for name, call in (("torch", torch_op), ("norm_act, checks included", our_op))}
    if device.type == "cuda":
        replay = timing.graphed([torch_op])
        found["in a CUDA graph"] = _seconds(replay, device) / LAUNCHES
    return {"launch_seconds": found}


def run(journal: Journal, settings: Settings) -> None:
    device, dry = torch.device(settings.device), settings.dry_run
    journal.row("copy bandwidth", lambda: copies(device, dry))
    journal.row("matrix products", lambda: products(device, dry))
    journal.row("convolutions", lambda: convs(device, dry))
    journal.row("launches", lambda: launches(device))
