"""Direct and polyphase forms of the zoo's strided and transposed convs on one CPU core.

As ``benchmarks.winograd_forms``: every form once a round, medians of processor seconds. ``--fit``
derives the constants of ``smis_kernels/ops/polyphase_conv/choice.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.winograd_forms import Forms, fitted, measured
from smis_kernels import polyphase_conv2d, polyphase_conv_transpose2d
from smis_kernels.ops.kept_weight import KeptWeight
from smis_kernels.ops.polyphase_conv.choice import takes_polyphase, terms
from smis_kernels.ops.polyphase_conv.op import transform_weight
from smis_models.io.allocator import reuse_freed_memory


class Shape(NamedTuple):
    """One conv."""

    side: int
    stride: int
    channels: int
    outputs: int
    groups: int
    batch: int
    height: int
    width: int
    transposed: bool = False

    @property
    def padding(self) -> int:
        """Of encoders and generators 1, of discriminators 2."""
        return 1 if self.side == 3 or self.transposed else 2


SHAPES = (
    Shape(3, 2, 64, 128, 1, 1, 256, 512), Shape(3, 2, 128, 256, 1, 1, 128, 256),
    Shape(3, 2, 256, 512, 1, 1, 64, 128), Shape(3, 2, 512, 1024, 1, 1, 64, 128),
    Shape(3, 2, 64, 128, 1, 1, 128, 128), Shape(3, 2, 128, 256, 1, 1, 64, 64),
    Shape(3, 2, 256, 512, 1, 1, 32, 32), Shape(3, 2, 512, 512, 1, 1, 16, 16),
    Shape(3, 2, 512, 512, 1, 1, 8, 8), Shape(3, 2, 512, 1024, 8, 1, 64, 64),
    Shape(3, 2, 1024, 1024, 8, 1, 32, 32), Shape(3, 2, 512, 512, 1, 1, 64, 64),
    Shape(3, 2, 1024, 512, 1, 1, 32, 64, True), Shape(3, 2, 512, 256, 1, 1, 64, 128, True),
    Shape(3, 2, 256, 128, 1, 1, 128, 256, True), Shape(3, 2, 128, 64, 1, 1, 128, 512, True),
    Shape(3, 2, 512, 256, 1, 1, 32, 32, True), Shape(3, 2, 256, 128, 1, 1, 16, 16, True),
    Shape(4, 2, 64, 128, 1, 4, 65, 65), Shape(4, 2, 128, 256, 1, 4, 33, 33),
    Shape(4, 1, 256, 512, 1, 4, 17, 17), Shape(4, 2, 64, 128, 1, 4, 33, 33),
    Shape(4, 2, 128, 256, 1, 4, 17, 17), Shape(4, 1, 256, 512, 1, 4, 9, 9),
    Shape(4, 2, 64, 128, 1, 2, 129, 257), Shape(4, 1, 256, 512, 1, 1, 33, 65),
    Shape(4, 2, 512, 256, 1, 1, 32, 32, True), Shape(4, 2, 256, 64, 1, 1, 64, 64, True),
)


def forms(shape: Shape) -> Forms:
    """The calls that compute one conv of random features."""
    side, stride, channels, outputs, groups, batch, height, width, transposed = shape
    x = torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    if not transposed:
        weight = torch.randn(outputs, channels // groups, side, side)
        last = weight.contiguous(memory_format=torch.channels_last)
        call = partial(polyphase_conv2d, x, weight, stride=stride, padding=shape.padding,
                       groups=groups, backend="cpu")
        direct = partial(F.conv2d, x, last, None, stride, shape.padding, 1, groups)
    else:
        weight = torch.randn(channels, outputs // groups, side, side)
        more = side % 2
        call = partial(polyphase_conv_transpose2d, x, weight, padding=1, output_padding=more,
                       groups=groups, backend="cpu")
        direct = partial(F.conv_transpose2d, x, weight, None, 2, 1, more, groups)
    return {"direct": direct, "phases": call, "phases kept": partial(call, kept=KeptWeight()),
            "transform": partial(transform_weight, weight, groups, stride, transposed)}


def terms_of(rows: Sequence[tuple[Shape, dict[str, tuple[float, float]]]], name: str,
             sides: Sequence[int]) -> list[tuple[float, Sequence[float]]]:
    """Of every shape the form's nanoseconds a kernel, and what they are expected to follow from."""
    made: list[tuple[float, Sequence[float]]] = []
    for shape, found in rows:
        if shape.side not in sides:
            continue
        x = torch.empty(shape.batch, shape.channels, shape.height, shape.width, device="meta")
        direct, *rest = terms(x, shape.outputs, shape.groups, shape.side, shape.stride,
                              shape.padding, transposed=shape.transposed)
        pairs = shape.channels * shape.outputs // shape.groups
        made.append((found[name][0] * 1e9 / pairs, [direct] if name == "direct" else rest))
    return made


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    reuse_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        found = measured(forms(shape), arguments.rounds)
        rows.append((shape, found))
        x = torch.empty(shape.batch, shape.channels, shape.height, shape.width)
        chosen = [takes_polyphase(x, shape.outputs, shape.groups, shape.side, shape.stride,
                                  shape.padding, transposed=shape.transposed, kept=kept)
                  for kept in (False, True)]
        what = "transposed" if shape.transposed else f"stride {shape.stride}"
        kernels = shape.channels * shape.outputs // shape.groups
        print(f"{shape.side}x{shape.side} {what}, {shape.channels} -> {shape.outputs}, "
              f"{shape.groups} groups, {shape.batch} of {shape.height}x{shape.width}: direct "
              f"{found['direct'][0] * 1e3:.1f} ms  "
              f"phases {1 / found['phases'][1]:.2f}x  kept {1 / found['phases kept'][1]:.2f}x  "
              f"transform {found['transform'][0] * 1e9 / kernels:.0f} ns a kernel  "
              f"chosen {chosen[0]}, kept {chosen[1]}", flush=True)
    if arguments.fit:
        print(fitted("direct", terms_of(rows, "direct", (3, 4))))
        for name in ("phases", "phases kept"):
            for side in (3, 4):
                print(fitted(f"{side}x{side} {name}", terms_of(rows, name, (side,))))


if __name__ == "__main__":
    main()
