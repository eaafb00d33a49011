"""accelerate() on networks written as the published code is: tests/foreign.py, from a checkout.

Random weights, eval and one training pass, batch of one; the float map goes in as in the published
code, and what the accelerated network makes of it (symbols, windows, tables) is made in the call.
Nothing is folded on any side. Ours runs on every map, the baselines on the first; in training all
run on the first.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from smis_kernels import accelerate, instance_edges
from smis_models.benchmark.case import Case, Inputs, Provider, Setting, channels_last
from smis_models.benchmark.networks import COCO_CLASSES, class_map
from smis_models.benchmark.training import settle
from smis_models.networks import semantics as label_maps
from smis_models.networks.blocks import init_weights
from tests import foreign

SIZE = (256, 256)
ADE20K_CLASSES = 151


@lru_cache(maxsize=1)  # the weights of one network at a time
def network(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    found = build()
    init_weights(found, seed=0, gain=1.0)
    return found.to(device, dtype).eval()


def spade_coco(setting: Setting) -> Inputs:
    planes = label_maps.one_hot(class_map(setting, SIZE, COCO_CLASSES), COCO_CLASSES, setting.dtype)
    ids = torch.from_numpy(setting.maps.instances("street", SIZE, setting.index))[None]
    edges = instance_edges(ids.to(setting.device)).to(setting.dtype)
    model = network(foreign.Painter, setting.dtype, setting.device)
    return model, torch.cat([planes, edges], 1).contiguous()


def groupdnet_ade20k(setting: Setting) -> Inputs:
    labels = class_map(setting, SIZE, ADE20K_CLASSES)
    planes = label_maps.one_hot(labels, ADE20K_CLASSES, setting.dtype).contiguous()
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


def case_of(make_inputs: Callable[[Setting], Inputs], target: float) -> Case:
    return Case(
        name=f"accelerate/{make_inputs.__name__}", make_inputs=make_inputs,
        providers=(Provider("reference", paint), Provider("channels_last", paint, channels_last),
                   Provider("compiled", paint, compile=True),
                   Provider("fused", paint, accelerated_inputs)),
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
    for layer in model.modules():
        if "weight_orig" in layer._parameters:
            layer.weight = layer.weight.detach()  # part of the graph, it could not be copied
    return picture.detach(), norm


def settled_spade_coco(setting: Setting) -> Inputs:
    model, planes = spade_coco(setting)
    settle(model)
    return model, planes


TRAINING = Case(
    name="accelerate/spade_coco_training", make_inputs=settled_spade_coco,
    providers=(Provider("reference", train), Provider("channels_last", train, channels_last),
               Provider("fused", train, accelerated_inputs)),
    counts=lambda inputs: accelerated(inputs[0])[1], memory_bound=False, floor=1e-2, seconds=60.0,
    single_precision_truth=True, graphs=False,
)
CASES = [case_of(spade_coco, 2.8), case_of(groupdnet_ade20k, 4.0), TRAINING]


def test_accelerate(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"
    assert measured.counts["same_state"]
    assert measured.counts["same_memory"]
    assert measured.counts["replaced"]
    print(measured.provider, measured.counts)
