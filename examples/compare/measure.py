"""What is measured of each trained system: pictures, speed, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smis_kernels import use_backend
from smis_models.benchmark.timing import interleave, peak_allocated
from smis_models.families import LatentPreset
from smis_models.networks.semantics import compile_layout
from smis_models.synthesis.codes import draw_code
from smis_models.synthesis.scene import Scene, semantics
from smis_models.training import Run, TrainConfig

Call = Callable[[], Any]


def _calls(model: Any, layout: Scene) -> tuple[Call, Call]:
    """One picture of a new layout, batch 1: (ours, by the reference definition)."""
    labels = torch.from_numpy(layout.labels)[None]
    z = draw_code(model, 0)
    device = next(model.generator.parameters()).device

    @torch.no_grad()
    def compiled() -> Any:
        return model.generator(compile_layout(labels, model.preset).to(device), z)

    @torch.no_grad()
    def dense() -> Any:
        return model.generator(semantics(model, layout), z)

    @torch.no_grad()
    def reference() -> Any:
        with use_backend("reference"):
            return dense()

    # The U-Nets have no norm that reads the labels: a compiled layout serves them nothing.
    return compiled if isinstance(model.preset, LatentPreset) else dense, reference


def speeds(models: Mapping[str, Any], layout: Scene, seconds: float) -> dict[str, dict[str, Any]]:
    """Pictures per second and peak memory of inference, all systems in one interleaved run.

    The label map is new to every call. ``fps`` is of this library, ``fps_reference`` of the same
    weights op by op as the papers' code; ``memory`` is the largest sum of live allocations in one
    call, weights excluded, in MB.
    """
    calls: dict[str, Call] = {}
    for name, model in models.items():
        calls[name], calls[f"{name}, reference"] = _calls(model, layout)
    device = next(next(iter(models.values())).parameters()).device
    times = interleave(calls, seconds, device=device)
    return {
        name: {
            "fps": 1 / median(times[name]),
            "fps_reference": 1 / median(times[f"{name}, reference"]),
            "memory": peak_allocated(calls[name], device) / 1e6,
            "memory_reference": peak_allocated(calls[f"{name}, reference"], device) / 1e6,
        }
        for name, model in models.items()
    }


def training_memory(config: TrainConfig, device: torch.device) -> float:
    """Largest sum of live allocations in one training step, weights and Adam's excluded, in MB."""
    data = replace(config.data, workers=0)
    log = replace(config.log, grid_every=0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(replace(config, data=data, log=log), Path(folder), device=device)
        step = partial(run.trainer.step, run.batches.step(), 0)
        step()  # Adam's moments are made by the first
        return peak_allocated(step, device) / 1e6
