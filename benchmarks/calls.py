"""What a call costs before any pixel is computed: ``python -m benchmarks.calls``.

Modules in eval mode without autograd on 8 x 8 features of 8 channels, beside what torch takes for
its own. CPU time of one thread, the least of many rounds: other processes slow it, none is counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import SPADE, ConditionalNorm2d, InstanceNormAct2d, LabelLayout, MultiSPADE
from smis_kernels.layout.table_cache import TableCache
from smis_kernels.modules.spade import modulate_pair
from smis_models.benchmark.records import markdown_table

CHANNELS, CLASSES, SIZE = 8, 5, 8
Call = Callable[[], object]


@contextmanager
def _empty_operator() -> Iterator[Callable[[Tensor], Tensor]]:
    """An operator of a library of its own that returns what it is given, implemented in Python."""
    library = torch.library.Library("smis_benchmark", "DEF")
    try:
        library.define("nothing(Tensor(a) x) -> Tensor(a)")
        library.impl("nothing", lambda x: x, "CPU")
        yield torch.ops.smis_benchmark.nothing.default
    finally:
        library._destroy()


def calls(nothing: Callable[[Tensor], Tensor]) -> dict[str, Call]:
    """Every call that is measured, torch's own first."""
    x = torch.randn(1, CHANNELS, SIZE, SIZE)
    nhwc = x.to(memory_format=torch.channels_last)
    layout = LabelLayout.from_labels(torch.arange(4).repeat(1, SIZE, SIZE // 4), CLASSES)
    layout.tables = TableCache()
    found: dict[str, Call] = {
        "an operator that does nothing": lambda: nothing(x),
        "x + x": lambda: x + x,
        "F.instance_norm": lambda: F.instance_norm(x),
    }

    def add(name: str, module: nn.Module, *args: object) -> None:
        frozen = module.eval()
        found[name] = lambda: frozen(*args)

    add("nn.Identity", nn.Identity(), x)
    add("nn.InstanceNorm2d", nn.InstanceNorm2d(CHANNELS), x)
    add("nn.BatchNorm2d", nn.BatchNorm2d(CHANNELS), x)
    for norm in ("batch", "instance"):
        for name, features in ((norm, x), (f"{norm}, channels-last", nhwc)):
            add(f"SPADE, {name}, tables kept", SPADE(CHANNELS, CLASSES, 8, norm=norm), features,
                layout)
    first, second = (SPADE(CHANNELS, CLASSES, 8).eval() for _ in range(2))
    found["modulate_pair, tables kept"] = lambda: modulate_pair(first, second, x, layout)
    add("MultiSPADE of two, tables kept", MultiSPADE(CHANNELS, [(CLASSES, 8), (CLASSES, 0)]), x,
        layout, layout)
    add("ConditionalNorm2d", ConditionalNorm2d(CHANNELS, CLASSES), x, torch.tensor([2]))
    add("InstanceNormAct2d", InstanceNormAct2d(CHANNELS, activation="relu"), x)
    return found


def measure(rounds: int = 1000, each: int = 10) -> dict[str, float]:
    """Microseconds of each call; rounds take turns, so that a slow spell falls on all."""
    least: dict[str, float] = {}
    with torch.no_grad(), _empty_operator() as nothing:
        cases = calls(nothing)
        for _ in range(rounds):
            for name, call in cases.items():
                call()
                start = time.thread_time_ns()
                for _ in range(each):
                    call()
                spent = (time.thread_time_ns() - start) / each / 1000
                least[name] = min(spent, least.get(name, spent))
    return least


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    print(markdown_table(("call", "us"), [(name, f"{spent:.1f}")
                                          for name, spent in measure(rounds).items()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
