"""``smis benchmark``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from .. import benchmark as harness
from ..benchmark.measure import resident_peak, under_default_allocator
from ..benchmark.networks import FAMILY_COLUMNS as FAMILY
from ..benchmark.networks import family_table
from ..benchmark.records import SUMMARY, markdown_table, plots, summary, target_lines
from ..io.files import locked
from ..io.images import write_atomically
from .common import Device, Out, command, console, progress, resolve_device, show

_FAMILY_WIDTH = 144
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@command()
def benchmark(
    set: Annotated[str, typer.Option(help=f"{', '.join(harness.SETS)} or all")],
    out: Out = Path("benchmark"),
    maps: Annotated[
        Path | None, typer.Option(help="folder of label maps, or with label/ and inst/ inside")
    ] = None,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(
        help="float32 or bfloat16; by default float32 on the CPU, both elsewhere")] = "",
    default_allocator: Annotated[bool, typer.Option(
        help="on the CPU, in float32, measure once more under the default allocator")] = True,
) -> None:
    """Measure a set of cases; print its table, write records.json, report.md and plots to OUT."""
    place = resolve_device(device)
    if dtype and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(_DTYPES)}, got {dtype!r}")
    cases = harness.cases(set, only)
    source = harness.Maps(maps)
    for scenes in sorted({case.scenes for case in cases}):
        if left_out := source.named(scenes).left_out:
            console.print(f"maps: the first {source.named(scenes).count} are measured, {left_out} "
                          f"of {source.named(scenes).folder} are left out", soft_wrap=True,
                          highlight=False)
    on_cpu = place.type == "cpu"
    dtypes = [_DTYPES[dtype]] if dtype else list(_DTYPES.values())[: 1 if on_cpu else 2]
    records = []
    with locked(out), progress(len(cases)) as step:
        for case in cases:
            for each in dtypes:
                setting = harness.Setting(place, each, source)
                wide = each == torch.float32
                # What must be reached on a CPU is stated for float32.
                judged = case if wide or not on_cpu else replace(case, targets={})
                found = harness.measure(judged, setting, partial(_named, step.tell, case.group))
                if case.confirm and on_cpu and wide and sys.platform.startswith("linux"):
                    step.tell(f"{case.group}: resident memory")
                    found = [
                        r if r.provider == "compiled" else
                        replace(r, resident_memory=resident_peak(case, r.provider, source))
                        for r in found
                    ]
                records += found
            if on_cpu and default_allocator and torch.float32 in dtypes:
                step.tell(f"{case.group}: default allocator")
                records += under_default_allocator(case, source)
            harness.save(out / "records.json", records)  # kept, whatever the next case does
            step(case.group)
    reused = [r for r in records if r.allocator == "reuse"]
    show((Column(SUMMARY[0], overflow="fold"), *SUMMARY[1:]), summary(reused))
    for text in target_lines(reused):
        console.print(text, soft_wrap=True, highlight=False)
    text = harness.markdown(records)
    family = family_table(reused)
    if family:
        own = Table(*FAMILY)
        for row in family:
            own.add_row(*row)
        # Whole names and numbers: a line longer than the terminal's is better than "spad…".
        Console(width=max(console.width, _FAMILY_WIDTH)).print(own)
        text += f"\n## The models\n\n{markdown_table(FAMILY, family)}\n"
    files = [
        harness.save(out / "records.json", records),
        write_atomically(out / "report.md", text.encode()), *plots(records, out),
    ]
    console.print("wrote " + ", ".join(map(str, files)), soft_wrap=True)


def _named(tell: Callable[[str], None], group: str, what: str) -> None:
    tell(f"{group}: {what}")
