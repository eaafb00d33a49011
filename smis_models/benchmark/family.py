"""The set ``family``: every model of the zoo, its size, its arithmetic, its time both ways.

Published options, random weights, spectral norm folded on both sides, eval, batch of one; the
map's layout and all tables are made in the call. Dense multiply-accumulates are those of the
reference path's convs and matrix products, whatever the map; effective ones are those that the
fused run makes on this map.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..families import MODELS, PARTS, list_models
from .case import Case, Inputs, Provider, Setting, contiguous
from .effective import dense_macs, effective_macs
from .modulation import on_backend
from .networks import generator_inputs
from .records import Record, by_case, duration, speedup, times_text


def _family_case(name: str) -> Case:
    def make_inputs(setting: Setting) -> Inputs:
        return generator_inputs(name, setting)

    def counts(inputs: Inputs) -> dict[str, int]:
        generator, *arguments = inputs
        found = {info.name: info.parameters for info in list_models()}[name]
        return {**found, "effective_macs": effective_macs(lambda: generator(*arguments))}

    return Case(
        name=f"family/{name}", make_inputs=make_inputs,
        providers=(Provider("reference", on_backend("reference"), contiguous),
                   Provider("fused", on_backend("auto"))),
        macs=dense_macs, counts=counts, memory_bound=False, floor=1e-4, seconds=12.0,
        scenes="cityscapes" if "cityscapes" in name else "coco", single_precision_truth=True,
    )


COLUMNS = ("model", "G, M", "E, M", "D, M", "GMAC dense", "GMAC effective", "reference", "fused",
           "x ref.", "peak MB (ref -> fused)")


def family_table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of :data:`COLUMNS`: one for each model among the records."""
    rows = []
    for (group, *_), found in by_case(records).items():
        fused, reference = found.get("fused"), found.get("reference")
        if fused is None or reference is None or "effective_macs" not in fused.counts:
            continue
        sizes = (f"{fused.counts[part] / 1e6:.1f}" if part in fused.counts else "-"
                 for part in PARTS)
        rows.append((
            group.split("/")[1], *sizes, f"{fused.macs / 1e9:.1f}",
            f"{fused.counts['effective_macs'] / 1e9:.1f}", duration(reference.median),
            duration(fused.median), times_text(speedup(found)),
            f"{reference.peak_memory / 1e6:.0f} -> {fused.peak_memory / 1e6:.0f}",
        ))
    return rows


CASES = [_family_case(name) for name in MODELS]
