"""accelerate() on networks written as the published code is: tests/foreign.py, from a checkout.

Random weights, eval and one training pass, batch of one; the float map goes in as in the published
code, and what the accelerated network makes of it (symbols, windows, tables) is made in the call.
Nothing is folded on any side. Ours runs on every map, the baselines on the first; in training all
run on the first.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import accelerate, instance_edges
from smis_models.benchmark.case import (
    COCO_CLASSES,
    Case,
    Inputs,
    Provider,
    Run,
    Setting,
    channels_last,
)
from smis_models.benchmark.records import Record
from smis_models.networks import semantics as label_maps
from smis_models.networks.blocks import init_weights, settle
from tests import foreign

SIZE = (256, 256)
ADE20K_CLASSES = 151


@lru_cache(maxsize=1)  # the weights of one network at a time
def network(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    found = build()
    init_weights(found, seed=0, gain=1.0)
    return found.to(device, dtype).eval()


def planes_of(setting: Setting, classes: int) -> Tensor:
    """One-hot planes of a map, as published code scatters them."""
    labels = setting.labels("indoor", SIZE, classes)
    return label_maps.one_hot(labels, classes, setting.dtype).contiguous()


def spade_coco(setting: Setting) -> Inputs:
    planes = planes_of(setting, COCO_CLASSES)
    edges = instance_edges(setting.instances("street", SIZE)).to(setting.dtype)
    model = network(foreign.Painter, setting.dtype, setting.device)
    return model, torch.cat([planes, edges], 1).contiguous()


def groupdnet_ade20k(setting: Setting) -> Inputs:
    planes = planes_of(setting, ADE20K_CLASSES)
    z = torch.randn(1, 8 * ADE20K_CLASSES, 4, 4, generator=torch.Generator().manual_seed(0))
    return network(foreign.GroupPainter, setting.dtype, setting.device), planes, z.to(planes)


@lru_cache(maxsize=1)
def accelerated(model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """A copy, accelerated, and what that took."""
    fast = copy.deepcopy(model)
    places = [t.data_ptr() for t in fast.state_dict().values()]
    start = time.perf_counter()
    report = accelerate(fast)
    seconds = time.perf_counter() - start
    before, after = model.state_dict(), fast.state_dict()
    same = list(before) == list(after) and all(torch.equal(after[k], before[k]) for k in before)
    return fast, {
        "parameters": sum(p.numel() for p in fast.parameters()),
        "replaced": len(report.replaced),
        "accelerate_ms": round(1e3 * seconds),
        "same_state": int(same),
        "same_memory": int(places == [t.data_ptr() for t in after.values()]),
    }


def paint(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(*inputs)


def accelerated_inputs(inputs: Inputs) -> Inputs:
    return accelerated(inputs[0])[0], *inputs[1:]


def case_of(name: str, make_inputs: Callable[[Setting], Inputs], run: Run, target: float) -> Case:
    return Case(
        name=name, make_inputs=make_inputs,
        providers=(Provider("reference", run), Provider("channels_last", run, channels_last),
                   Provider("compiled", run, compile=True),
                   Provider("fused", run, accelerated_inputs)),
        counts=lambda inputs: accelerated(inputs[0])[1], targets={"reference": target},
        memory_bound=False, floor=1e-4, seconds=30.0, every_map=True, graphs=False,
    )


def train(model: nn.Module, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward in training mode: the picture, and the norm of all gradients."""
    model.train().zero_grad()
    with torch.enable_grad():
        picture = model(planes)
        picture.square().mean().backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.eval().zero_grad()
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if "weight_orig" in layer._parameters:
            layer.weight = layer.weight.detach()  # part of the graph, it could not be copied
    return picture.detach(), norm


def settled_spade_coco(setting: Setting) -> Inputs:
    model, planes = spade_coco(setting)
    settle(model)
    return model, planes


TRAINING = replace(
    case_of("accelerate/spade_coco_training", settled_spade_coco, train, 0.0),
    providers=(Provider("reference", train), Provider("channels_last", train, channels_last),
               Provider("fused", train, accelerated_inputs)),
    targets={}, floor=1e-2, seconds=60.0, every_map=False, truth=train)
CASES = [case_of("accelerate/spade_coco", spade_coco, paint, 2.8),
         case_of("accelerate/groupdnet_ade20k", groupdnet_ade20k, paint, 4.0), TRAINING]


def test_accelerate(measured: Record) -> None:
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"
    assert measured.counts["same_state"]
    assert measured.counts["same_memory"]
    assert measured.counts["replaced"]
    print(measured.provider, measured.counts)
