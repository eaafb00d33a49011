"""Direct and Winograd forms of the zoo's 3x3 convs on one CPU core.

``python -m benchmarks.winograd_forms`` calls every form once a round, the rounds interleaved. The
figures are medians, over rounds, of the ratio to the direct conv in the same round, in the
process's own processor seconds, so that other load shifts all forms alike. ``--fit`` derives the
constants of ``smis_kernels/ops/winograd_conv/choice.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import winograd_conv2d
from smis_kernels.ops.kept_weight import KeptWeight
from smis_kernels.ops.winograd_conv.choice import form
from smis_kernels.ops.winograd_conv.op import TILES, transform_weight
from smis_models.io.allocator import reuse_freed_memory

# (channels, outputs, groups, height, width)
SHAPES = (
    (1024, 1024, 1, 8, 8), (1024, 1024, 1, 16, 16), (1024, 512, 1, 32, 32), (512, 512, 1, 32, 32),
    (512, 256, 1, 64, 64), (256, 256, 1, 64, 64), (256, 128, 1, 128, 128), (128, 128, 1, 128, 128),
    (128, 64, 1, 256, 256), (64, 64, 1, 256, 256), (1024, 1024, 1, 32, 64), (560, 280, 1, 128, 256),
    (1120, 560, 4, 64, 128), (2560, 1280, 4, 32, 32), (640, 320, 2, 64, 64), (32, 32, 1, 64, 64),
    (64, 64, 1, 16, 16), (256, 256, 1, 16, 16), (512, 512, 1, 8, 8),
)
Forms = dict[str, Callable[[], Tensor]]


def forms(channels: int, outputs: int, groups: int, height: int, width: int) -> Forms:
    """The calls that compute one conv of random features."""
    x = torch.randn(1, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels // groups, 3, 3)
    last = weight.contiguous(memory_format=torch.channels_last)
    calls: Forms = {"direct": partial(F.conv2d, x, last, padding=1, groups=groups)}
    for tile in TILES:
        call = partial(winograd_conv2d, x, weight, groups=groups, tile=tile, backend="cpu")
        calls[f"F{tile}"] = call
        calls[f"F{tile} kept"] = partial(call, kept=KeptWeight())
        calls[f"transform {tile}"] = partial(transform_weight, weight, groups, tile)
    return calls


def measured(calls: Forms, rounds: int) -> dict[str, tuple[float, float]]:
    """Of every call its median seconds, and the median of its ratio to the first one's."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if r >= 2:  # the first calls fault memory in, the second ones keep a transform
                times[name].append(time.process_time() - start)
    first = times[next(iter(times))]
    return {name: (median(t), median(a / b for a, b in zip(t, first, strict=True)))
            for name, t in times.items()}


def fitted(name: str, rows: Sequence[tuple[float, Sequence[float]]]) -> str:
    """Least squares, relative: nanoseconds = kernel + products / rate (+ values * tile_value)."""
    left = [[t / nanoseconds for t in (1.0, *terms)] for nanoseconds, terms in rows]
    (kernel, product, *rest), *_ = np.linalg.lstsq(np.array(left), np.ones(len(left)), rcond=None)
    return f"{name}: kernel {kernel:.1f}, rate {1 / product:.1f}" + "".join(
        f", tile value {value:.2f}" for value in rest)


def terms_of(rows: Sequence[tuple[tuple[int, ...], dict[str, tuple[float, float]]]], name: str,
             tile: int) -> list[tuple[float, Sequence[float]]]:
    """Of every shape the form's nanoseconds a kernel, and what they are expected to follow from."""
    made: list[tuple[float, Sequence[float]]] = []
    for (channels, outputs, groups, height, width), found in rows:
        k, m = channels // groups, outputs // groups
        if tile:
            values = -(-height // tile) * -(-width // tile) * (tile + 2) ** 2
            terms = [float(values), values * (1 / k + 1 / m)]
        else:
            terms = [height * width * 9.0]
        made.append((found[name][0] * 1e9 / (k * m * groups), terms))
    return made


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--default-allocator", action="store_true",
                        help="let freed memory go back to the system")
    arguments = parser.parse_args()
    if not arguments.default_allocator:
        reuse_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        calls = forms(*shape)
        found = measured(calls, arguments.rounds)
        rows.append((shape, found))
        channels, outputs, groups, height, width = shape
        kernels = channels * outputs // groups
        x = torch.empty(1, channels, height, width)
        chosen = [form(x, outputs, groups, largest=4, kept=kept) for kept in (False, True)]
        gains = "  ".join(f"{name} {1 / ratio:.2f}x" for name, (_, ratio) in found.items()
                          if name[0] == "F")
        spent = " ".join(f"{found[f'transform {t}'][0] * 1e9 / kernels:.0f}" for t in TILES)
        print(f"{channels} -> {outputs}, {groups} groups, {height}x{width}: direct "
              f"{found['direct'][0] * 1e3:.1f} ms  {gains}  transform {spent} ns a kernel  "
              f"chosen {chosen[0]}, kept {chosen[1]}", flush=True)
    if arguments.fit:
        for name, tile in (("direct", 0), *((f"F{t}{k}", t) for t in TILES for k in ("", " kept"))):
            print(fitted(name, terms_of(rows, name, tile)))


if __name__ == "__main__":
    main()
