"""The zoo's networks as the sets measure them: on maps of their data set, spectral norm folded."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smis_kernels import instance_edges

from ..families import create_model
from ..networks import semantics as label_maps
from ..synthesis.synthesizer import frozen_copy
from .case import Inputs, Setting

COCO_CLASSES = 183


def class_map(setting: Setting, size: tuple[int, int], classes: int) -> Tensor:
    """(1, H, W) labels: real classes where the network has as many, else ranks modulo its count."""
    real = setting.maps.folder is not None
    raw = setting.maps.labels("indoor", size, 1 << 16 if real else classes, setting.index)
    if classes == COCO_CLASSES:
        raw[raw == label_maps.UNKNOWN] = COCO_CLASSES - 1
    if raw.max() >= classes:
        raw = np.unique(raw, return_inverse=True)[1].reshape(raw.shape) % classes
    return torch.from_numpy(raw)[None].to(setting.device)


@lru_cache(maxsize=1)  # the weights of one model at a time
def model_and_generator(name: str, device: torch.device,
                        dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """A random model with published options, and its generator with spectral norm folded."""
    model = create_model(name, device=device, dtype=dtype, init_gain=1.0).eval()
    return model, frozen_copy(model.generator)


def semantics_of(model: Any, setting: Setting) -> tuple[Tensor, Tensor | None, Tensor]:
    """Labels, instance ids where the model reads edges, and the planes of both."""
    preset = model.preset
    labels = class_map(setting, preset.image_size, preset.classes)
    ids = None
    if preset.instance_edge:
        found = setting.maps.instances("street", preset.image_size, setting.index)
        ids = torch.from_numpy(found)[None].to(setting.device)
    planes = label_maps.one_hot(labels, preset.classes, setting.dtype)
    if ids is not None:
        planes = torch.cat([planes, instance_edges(ids).to(setting.dtype)], 1)
    return labels, ids, planes.contiguous()  # as published code scatters them


def generator_inputs(name: str, setting: Setting) -> Inputs:
    """The generator and its arguments: semantics, and the code or features that it takes."""
    model, generator = model_and_generator(name, setting.device, setting.dtype)
    planes = semantics_of(model, setting)[2]
    random = torch.Generator().manual_seed(0)
    if getattr(model.preset, "features", False):
        shape = (1, model.preset.feature_channels, *planes.shape[2:])
        features = torch.rand(shape, generator=random) * 2 - 1
        return generator, planes, features.to(planes)
    z = model.generator.sample_latent(1, random)
    return (generator, planes) if z is None else (generator, planes, z)
