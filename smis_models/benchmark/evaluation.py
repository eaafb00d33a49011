"""The set ``evaluation``: mCSD and mOCD of one scene of 8 classes, sampling and measuring.

The reference paints each picture through the dense definition; ours compiles the layout once and
keeps its tables. Both paint the same codes, as many at once, with spectral norm folded, and both
compare by the same features, so the ratio is of the whole evaluation, not of the sampling alone.
There is no compiled provider: the loop over classes and pairs is Python.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from smis_kernels import use_backend

from ..families import create_model
from ..metrics import Distance, DiversityProtocol, LayoutSampler, create_distance
from ..metrics.diversity import scene_diversity
from ..metrics.sampling import Draw
from ..synthesis.scene import Scene, semantics
from ..synthesis.synthesizer import frozen_copy
from .case import Case, Inputs, Provider, Setting, channels_last

SAMPLES, BATCH = 20, 4
NGF = 40  # a quarter of the published width, of which one evaluation takes the reference minutes


@cache
def _model(size: int, device: torch.device, dtype: torch.dtype) -> Any:
    model = create_model("groupdnet_deepfashion", device=device, dtype=dtype, init_gain=1.0,
                         ngf=NGF, nef=2 * NGF, image_size=(size, size))
    return model.eval()


@cache
def _distance(device: torch.device) -> Distance:
    """The cost of LPIPS with AlexNet; its weights do not matter to speed."""
    return create_distance("random-alex", device=device)


def _table(model: Any, scene: Scene, draw: Draw) -> Tensor:
    """(classes + 1, 2): L_c and L_other of each class; last, the LPIPS of whole pictures."""
    place = next(model.generator.parameters()).device
    protocol = DiversityProtocol(layouts=1, samples=SAMPLES, pairs=SAMPLES - 1)
    ((by_class, lpips),) = scene_diversity(model, scene, draw, [_distance(place)], protocol)
    return torch.tensor([*by_class.values(), (lpips, lpips)])


def _reference(generator: Any, planes: Tensor, owner: Any, scene: Scene) -> Tensor:
    def draw(codes: Tensor) -> Tensor:
        # The generator's memory format is the provider's choice.
        with use_backend("reference"):
            pictures = [generator(planes[: len(z)], z.to(planes)) for z in codes.split(BATCH)]
        return torch.cat(pictures)

    painted = SimpleNamespace(generator=generator, name=owner.model.name)
    return _table(painted, scene, draw)


def _fused(_: Any, planes: Tensor, owner: Any, scene: Scene) -> Tensor:
    return _table(owner.model, scene, LayoutSampler(owner.model, BATCH).load(scene))


def _diversity_case(name: str, size: int, seconds: float) -> Case:
    """All 8 classes of one map, 20 pictures each and 20 of all codes; layout and tables in the
    call.
    """

    def make_inputs(setting: Setting) -> Inputs:
        model = _model(64 if setting.tiny else size, setting.device, setting.dtype)
        labels = setting.labels("person", model.preset.image_size, model.preset.classes)
        scene = Scene("map", labels[0].cpu().numpy(), None)
        planes = semantics(model, scene).repeat(BATCH, 1, 1, 1)
        return frozen_copy(model.generator), planes, SimpleNamespace(model=model), scene

    def last(inputs: Inputs) -> Inputs:
        return (*channels_last(inputs[:2]), *inputs[2:])

    return Case(
        name=f"groupdnet_deepfashion/{name}", make_inputs=make_inputs,
        providers=(Provider("reference", _reference),
                   Provider("channels_last", _reference, last),
                   Provider("fused", _fused)),
        memory_bound=False, floor=1e-3, seconds=seconds, graphs=False,
        targets={"reference": 3.0}, truth=_reference,
    )


CASES = [
    _diversity_case("mcsd_8_classes_20_samples_128", 128, 40.0),
    _diversity_case("mcsd_8_classes_20_samples_256", 256, 120.0),
]
