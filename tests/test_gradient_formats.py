"""Gradients of norms whatever format they come in: torch's own backward (2.13) misreads some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smis_kernels import InstanceNormAct2d, modulation, modulation_pair, norm_act
from smis_kernels.ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from smis_kernels.testing import max_error

DIMS = {"batch": (0, 2, 3), "instance": (2, 3), "group": (2,)}
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    # an HWC picture as a batch of one, and pixels outermost
    "pixels first": lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
}
C, H, W = 8, 6, 5


def normalised(x: Tensor, norm: str) -> Tensor:
    rows = x.reshape(len(x), 2, -1) if norm == "group" else x
    centred = rows - rows.mean(DIMS[norm], keepdim=True)
    var = centred.square().mean(DIMS[norm], keepdim=True)
    return (centred / (var + 1e-5).sqrt()).reshape(x.shape)


def modulated(x: Tensor, affine: Tensor, norm: str) -> Tensor:
    return normalised(x, norm) * (1 + affine[:, :C]) + affine[:, C:]


# Called with features, gamma and beta at every pixel, those of each row, and rows.
OPS: dict[str, Callable[..., Any]] = {
    "modulation": lambda x, a, t, i, **o: modulation(x, a[:, :C], a[:, C:], **o),
    "modulation_pair": lambda x, a, t, i, **o: sum(modulation_pair(
        x, a[:, :C], a[:, C:], a[:, :C], a[:, C:], activation=None, **o)) / 2,
    "indexed_modulation": lambda x, a, t, i, **o: indexed_modulation(x, i, t, **o),
    "indexed_modulation_pair": lambda x, a, t, i, **o: sum(
        indexed_modulation_pair(x, i, t, t, activation=None, **o)) / 2,
}


def derivatives(call: Callable[[Tensor], Tensor], x: Tensor, form: Callable[[Tensor], Tensor],
                twice: bool) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    draw = torch.Generator().manual_seed(7)
    up, again = (torch.randn(x.shape, generator=draw, dtype=x.dtype) for _ in range(2))
    out = call(leaf)
    (first,) = torch.autograd.grad(out, leaf, form(up), create_graph=twice)
    if not twice:
        return [first]
    return [first, *torch.autograd.grad(first, leaf, form(again))]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("norm", DIMS)
def test_gradients_are_right_in_every_format(norm: str, batch: int, twice: bool,
                                             backend: str) -> None:
    table = torch.randn(4, 2 * C).double()
    index = torch.randint(4, (batch, H, W)).int()
    affine = table[index.long()].permute(0, 3, 1, 2)
    options: dict[str, Any] = {"norm": norm, "training": True, "backend": backend,
                               **({"num_groups": 2} if norm == "group" else {})}
    values = torch.randn(batch, C, H, W).double()
    truth = derivatives(lambda x: modulated(x, affine, norm), values, FORMATS["contiguous"], twice)
    plain = derivatives(lambda x: normalised(x, norm), values, FORMATS["contiguous"], twice)
    for memory in FORMATS.values():
        x = memory(values)
        for form in FORMATS.values():
            for name, op in OPS.items():
                found = derivatives(lambda t: op(t, affine, table, index, **options),  # noqa: B023
                                    x, form, twice)
                for a, b in zip(found, truth, strict=True):
                    assert max_error(a, b) < 1e-12, name
            found = derivatives(lambda t: norm_act(t, **options), x, form, twice)
            for a, b in zip(found, plain, strict=True):
                assert max_error(a, b) < 1e-12


@pytest.mark.parametrize("form", FORMATS)
def test_a_module_of_one_image_learns_in_every_format(form: str) -> None:
    x = torch.randn(1, C, H, W).double()
    module = InstanceNormAct2d(C).double()
    found = derivatives(module, FORMATS[form](x), FORMATS[form], True)
    truth = derivatives(lambda t: normalised(t, "instance"), x, FORMATS["contiguous"], True)
    for a, b in zip(found, truth, strict=True):
        assert max_error(a, b) < 1e-12
