"""Rows of the ``tune`` part: GroupDNet's grouped 3x3 convs, shape by shape, in every form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import WinogradConv2d, use_backend
from smis_kernels.ops.winograd_conv.grouped import FORMS, conv_in_form, shape_key
from smis_models.benchmark.case import Setting
from smis_models.benchmark.timing import replay_seconds
from smis_models.families import create_model

from .results import Row

MODELS = ("groupdnet_deepfashion", "groupdnet_ade20k", "groupdnet_cityscapes")
MARGIN = 0.97
Shape = tuple[int, int, int, int, int, int]  # N, C, H, W, outputs, groups


def grouped_shapes(name: str, batch: int, **options: Any) -> list[Shape]:
    """The grouped 3x3 convs of a generator, found without computing."""
    generator = create_model(name, part="generator", device="meta", **options).eval()
    preset = generator.preset
    found: dict[Shape, None] = {}

    def note(conv: nn.Conv2d, given: tuple[Tensor, ...]) -> None:
        if conv.groups > 1 and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            n, c, h, w = given[0].shape
            found[n, c, h, w, conv.out_channels, conv.groups] = None

    for module in generator.modules():
        if isinstance(module, WinogradConv2d):
            module.register_forward_pre_hook(note)
    planes = torch.zeros((batch, preset.semantic_channels, *preset.image_size), device="meta")
    z = torch.zeros((batch, preset.latent_channels * preset.classes, *preset.latent_size),
                    device="meta")
    with torch.no_grad(), use_backend("reference"):
        generator(planes, z)
    return list(found)


def _timed_forms(place: Setting, shape: Shape) -> tuple[str, dict[str, float]]:
    n, c, h, w, outputs, groups = shape
    x, weight = (t.to(memory_format=torch.channels_last) for t in (
        place.draw(n, c, h, w), place.draw(outputs, c // groups, 3, 3, seed=1)))
    bias = place.draw(outputs, seed=2)
    with torch.no_grad():
        calls = {form: partial(conv_in_form, form, x, weight, bias, 1, groups) for form in FORMS}
        expected = calls["grouped"]()
        for form, call in calls.items():
            error = (call() - expected).abs().max() / expected.abs().max()
            if not error <= 8 * torch.finfo(place.dtype).eps:
                raise ArithmeticError(f"{form} of {shape} differs by {float(error):.1e}")
        times = {form: replay_seconds(call, place.device, place.pick(5, 1))
                 for form, call in calls.items()}
    return shape_key(x, outputs, groups), times


def _model(place: Setting, name: str, batch: int) -> Row:
    options = place.pick({}, {"ngf": 8, "image_size": (64, 64)})
    forms, shapes = {}, {}
    for shape in grouped_shapes(name, batch, **options):
        key, times = _timed_forms(place, shape)
        best = min(times, key=lambda form: times[form])
        usual = times["grouped"]
        forms[key] = best if times[best] < MARGIN * usual else "grouped"
        shapes[key] = times
    return {"convs": forms, "chosen": forms, "shapes": shapes}


def conv_rows(place: Setting) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, row) for each model and batch size."""
    for name in place.pick(MODELS, MODELS[:1]):
        for batch in place.pick((1, 8), (1,)):
            yield f"grouped convs, {name} batch {batch}", partial(_model, place, name, batch)
