"""Batches and threads on a CPU: ``python -m benchmarks.scaling --maps FOLDER --out FILE.json``.

Milliseconds a picture at batches of 1, 4 and 16 (the planes of one map each; the layout is made in
the call, as for published code), and of 3x3 convs at one thread and at all. All sides of a row are
timed in turn in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smis_kernels import winograd_conv2d
from smis_models.benchmark.case import Maps, Setting
from smis_models.benchmark.networks import generator_inputs
from smis_models.benchmark.records import markdown_table
from smis_models.benchmark.timing import interleave
from smis_models.io.allocator import reuse_freed_memory
from smis_models.io.images import write_atomically
from smis_models.io.provenance import commit, versions

MODELS = ("spade_coco", "groupdnet_ade20k")
BATCHES = (1, 4, 16)
CONVS = ((1024, 1024, 8), (1024, 1024, 16), (1024, 512, 32), (512, 256, 64), (256, 128, 128),
         (128, 64, 256))  # channels, outputs, side


@torch.no_grad()
def batches(name: str, maps: Maps, seconds: float) -> dict[str, float]:
    """Median milliseconds a picture, by batch."""
    calls = {}
    for batch in BATCHES:
        generator, *inputs = generator_inputs(name, Setting(torch.device("cpu"), maps=maps), batch)
        calls[str(batch)] = partial(generator, *inputs)
    times = interleave(calls, seconds)
    return {batch: 1e3 * statistics.median(t) / int(batch) for batch, t in times.items()}


@torch.no_grad()
def threads(channels: int, outputs: int, side: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of a conv in tiles of 4x4, by threads."""
    x = torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)
    weight, most = torch.randn(outputs, channels, 3, 3), torch.get_num_threads()

    def call(count: int) -> None:
        torch.set_num_threads(count)
        winograd_conv2d(x, weight, tile=4, backend="cpu")

    times = interleave({str(n): partial(call, n) for n in (1, most)}, seconds)
    torch.set_num_threads(most)
    return {count: 1e3 * statistics.median(t) for count, t in times.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print both tables; write them where ``--out`` says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--maps", type=Path, help="as of smis benchmark; default: sample scenes")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each model")
    given = parser.parse_args(arguments)
    reuse_freed_memory()
    maps = Maps(given.maps).named("coco")
    found: dict[str, Any] = {
        "commit": commit(), "versions": versions(),
        "milliseconds_a_picture": {}, "milliseconds_a_conv": {}}
    for name in MODELS:
        found["milliseconds_a_picture"][name] = batches(name, maps, given.seconds)
    for conv in CONVS:
        found["milliseconds_a_conv"]["{}->{} at {}".format(*conv)] = threads(
            *conv, given.seconds / 20)
    for title, rows in ((key, found[key]) for key in
                        ("milliseconds_a_picture", "milliseconds_a_conv")):
        columns = list(next(iter(rows.values())))
        print(markdown_table((title, *columns), [
            (name, *(f"{row[column]:.1f}" for column in columns)) for name, row in rows.items()]))
        print()
    if given.out is not None:
        write_atomically(given.out, (json.dumps(found, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
