"""Convs of a map and features made together, batch norms in convs: never of other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_ccfpse import semantics, small
from test_prepared import with_statistics
from torch import Tensor, nn

from smis_kernels import LabelLayout, explain, use_backend
from smis_kernels.acceleration.prepared import Prepared
from smis_kernels.layout import conditioned, shared_tables
from smis_kernels.layout.conditioned import conditioned_convs, label_rows
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import assert_as_accurate, max_error
from smis_models.synthesis.synthesizer import frozen_copy

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
LABELS, FEATURES, WIDTH = 6, 3, 5  # no multiple of what rows are padded to


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the kernels' steps spelled in torch."""
    monkeypatch.setattr(shared_tables, "SHARING", ("cpu",))


class Convs(nn.Module):
    """Three convs of a map and features."""

    def __init__(self, *widths: int, bias: bool = True) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(LABELS + FEATURES, width, 3, padding=1, bias=bias)
            for width in widths or (WIDTH,) * 3)

    def forward(self, layout: LabelLayout, features: Tensor) -> list[Tensor] | None:
        return conditioned_convs(layout, features, [*self.convs])  # type: ignore[list-item]

    def plain(self, layout: LabelLayout, features: Tensor) -> list[Tensor]:
        planes = layout.dense((features.shape[2], features.shape[3]), features.dtype)
        return [F.relu(conv(torch.cat([planes, features], 1))) for conv in self.convs]


def inputs(size: tuple[int, int] = (12, 12), soft: bool = False) -> tuple[LabelLayout, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(LABELS, (2, 3, 3), generator=generator).repeat_interleave(4, 1)
    layout = LabelLayout.from_labels(labels.repeat_interleave(4, 2), LABELS)
    vectors = layout.vectors.double()
    if soft:
        vectors = vectors @ torch.randn((LABELS, LABELS), generator=generator).double()
    features = torch.randn((2, FEATURES, *size), generator=generator, dtype=torch.float64)
    return (LabelLayout(layout.symbols, vectors),
            features.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [(12, 12), (6, 6), (1, 1)])
def test_all_at_once_are_the_convs(size: tuple[int, int], soft: bool, sharing: None) -> None:
    network, given = Convs().double().eval(), inputs(size, soft)
    prepared = Prepared(network)
    with torch.no_grad():
        expected = network.plain(*given)
        for _ in range(2):
            with prepared.vouched():
                found = network(*given)
            assert found is not None and len(found) == 3
            for got, same in zip(found, expected, strict=True):
                assert got.is_contiguous(memory_format=torch.channels_last)
                assert max_error(got, same) < 1e-13


def test_they_are_made_one_by_one_elsewhere(sharing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(network: nn.Module, kept: bool = True, grad: bool = False,
                 around: AbstractContextManager[Any] | None = None, **given: Any) -> bool:
        layout, features = inputs()
        features.requires_grad_(given.get("features", False))
        with torch.set_grad_enabled(grad), around or nullcontext():
            if not kept:
                return network(layout, features) is not None
            with Prepared(network).vouched():
                return network(layout, features) is not None

    fixed = Convs().double().eval().requires_grad_(False)
    assert together(fixed) and together(fixed, grad=True)
    assert not together(fixed, kept=False)
    assert not together(Convs().double().eval(), grad=True)
    assert not together(fixed, grad=True, features=True)
    assert not together(fixed, around=torch.autocast("cpu", torch.bfloat16))
    assert not together(fixed, around=use_backend("reference"))
    assert not together(Convs(4, 5).double())
    assert not together(Convs(bias=False).double())
    assert not together(Convs())  # float32 beside features of float64
    monkeypatch.setattr(conditioned, "MOST_TOGETHER", 2 * 12 * 12 * 3 * WIDTH * 8)
    assert together(fixed)
    monkeypatch.setattr(conditioned, "MOST_TOGETHER", 2 * 12 * 12 * 3 * WIDTH * 8 - 1)
    assert not together(fixed)
    monkeypatch.setattr(conditioned, "MOST_TOGETHER", 2**28)
    monkeypatch.setattr(shared_tables, "SHARING", ("triton",))
    assert not together(fixed)  # on a CPU


@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_those_of_the_conv(bias: bool, sharing: None) -> None:
    layout, _ = inputs()
    conv = nn.Conv2d(LABELS, WIDTH, 3, padding=1, bias=bias).double()
    level = layout.level((12, 12))
    with torch.no_grad():
        expected = conv(layout.dense((12, 12), torch.float64))
        for around in (nullcontext(), Prepared(conv).vouched()):
            with around:
                rows = label_rows(layout, (12, 12), conv.weight, conv.bias)
            assert not rows[0].any()
            assert max_error(rows[level.index3.long()].permute(0, 3, 1, 2), expected) < 1e-13


def test_entries_are_those_of_the_map_at_hand(sharing: None) -> None:
    network = Convs().double().eval()
    with torch.no_grad(), Prepared(network).vouched():
        for given in (inputs(), inputs(soft=True), inputs()):
            found = network(*given)
            assert found is not None
            for got, same in zip(found, network.plain(*given), strict=True):
                assert max_error(got, same) < 1e-13


def generator() -> tuple[Any, Tensor, LabelLayout, Tensor]:
    """A frozen CC-FPSE whose norms are lively, planes, their layout and a code."""
    torch.manual_seed(0)
    model = with_statistics(small())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    planes = semantics(model)
    z = model.generator.sample_latent(1, torch.Generator().manual_seed(0))
    return frozen_copy(model.generator), planes, LabelLayout.from_tensor(planes), z


def reference(network: nn.Module, planes: Tensor, z: Tensor) -> Tensor:
    with use_backend("reference"), torch.no_grad():
        image: Tensor = copy.deepcopy(network)(planes, z)
    return image


@pytest.mark.parametrize("together", [True, False])
def test_the_generator_is_the_reference(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tables, "SHARING", ("cpu",) if together else ("triton",))
    network, planes, layout, z = generator()
    expected, prepared = reference(network, planes, z), Prepared(network)
    with torch.no_grad():
        for given in (layout, planes):
            for _ in range(2):
                with prepared.vouched():
                    assert max_error(network(given, z), expected) < 1e-11
        with prepared.vouched():
            ops = [choice.op for choice in explain(network, layout, z).choices]
        soft = planes + 0.01 * torch.rand(planes.shape, dtype=planes.dtype)
        with prepared.vouched():
            assert max_error(network(soft, z), reference(network, soft, z)) < 1e-11
        with prepared.vouched(), use_backend("reference"):
            assert torch.equal(network(planes, z), expected)
    assert ops.count("norm_act") == 15  # all of the pyramid but the first, in its table
    assert ops.count("indexed_relu") == (7 if together else 0)
    assert ops.count("indexed_modulation") == (0 if together else 7 * 4 + 4)
    assert ops.count("conditional_conv2d") == ops.count("conditional_attention") == 14


def _conv(network: Any) -> None:
    network.labelenc2[0][0].weight.data.mul_(1.5)


def _first(network: Any) -> None:
    network.labelenc1[0][0].weight.data.mul_(1.5)


def _copied(network: Any) -> None:
    with torch.no_grad():
        weight = network.up_0.gen_weights1.first.weight
        weight.copy_(weight.flip(0))


def _hidden_bias(network: Any) -> None:
    network.head_0.gen_se_weights1.first.bias.data.add_(1)


def _shared(network: Any) -> None:
    network.up_1.norm_s.mlp_shared[0].weight.data.neg_()


def _norm(name: str, attribute: str) -> Callable[[Any], None]:
    def change(network: Any) -> None:
        getattr(network.get_submodule(name)[0][1], attribute).data.mul_(3).add_(0.5)

    change.__name__ = f"_{name}_{attribute}"
    return change


def _eps(network: Any) -> None:
    for name in ("labelenc1", "labeldec2"):
        network.get_submodule(name)[0][1].eps = 0.5


def _numpy(network: Any) -> None:
    network.labellat1[0][1].running_mean.numpy()[...] += 0.5
    network.G_middle_0.gen_weights2.first.weight.detach().numpy()[...] *= 2


def _loaded(network: Any, **options: Any) -> None:
    for part in (network.head_0.gen_weights1, network.labeldec2[0][1], network.labelenc1[0][1]):
        part.load_state_dict({k: 1.5 * v + 0.1 if v.is_floating_point() else v
                              for k, v in part.state_dict().items()}, **options)


def _assigned(network: Any) -> None:
    _loaded(network, assign=True)


def _replaced(network: Any) -> None:
    layer = network.labelenc3[0][0]
    layer.weight = nn.Parameter(2 * layer.weight.detach(), requires_grad=False)


TRACED = (_copied, _eps, _loaded, _assigned, _replaced)
CHANGES = (*TRACED, _conv, _first, _hidden_bias, _shared, _numpy, *(
    _norm(name, attribute) for name in ("labelenc1", "labeldec3")
    for attribute in ("running_mean", "running_var", "weight", "bias")))


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_a_change_of_the_weights_is_seen(change: Callable[[Any], None], sharing: None) -> None:
    network, planes, layout, z = generator()
    checked, vouched = Prepared(network), Prepared(network)
    with torch.no_grad():
        for prepared in (checked.checked, vouched.vouched):
            with prepared():
                before = network(layout, z)
        change(network)
        expected = reference(network, planes, z)
        assert max_error(before, expected) > 1e-6
        for prepared in (checked.checked, *([vouched.vouched] if change in TRACED else [])):
            for _ in range(2):  # made anew, then kept
                with prepared():
                    assert max_error(network(layout, z), expected) < 1e-11


@pytest.mark.parametrize("trains", ["labelenc1", "labelenc2", "labeldec1"])
def test_a_norm_in_training_is_not_folded(trains: str, sharing: None) -> None:
    found = []
    for kept in (True, False):
        network, _, layout, z = generator()
        prepared = Prepared(network)
        with torch.no_grad():
            with prepared.vouched():
                network(layout, z)
            norm = network.get_submodule(trains)[0][1].train()
            with prepared.vouched() if kept else nullcontext():
                found.append((network(layout, z), norm.running_mean.clone(),
                              norm.num_batches_tracked.clone()))
    for got, expected in zip(*found, strict=True):
        assert max_error(got, expected) < 1e-11
    assert found[0][2] == 1


def test_hooks_are_called(sharing: None) -> None:
    network, planes, layout, z = generator()
    prepared = Prepared(network)
    with torch.no_grad():
        with prepared.vouched():
            before = network(layout, z)
        network.labeldec1.register_forward_hook(lambda module, given, out: 2 * out)
        network.labelenc1[0][1].register_forward_hook(lambda module, given, out: -out)
        expected = reference(network, planes, z)
        with prepared.vouched():
            assert max_error(network(layout, z), expected) < 1e-11
    assert max_error(before, expected) > 1e-6


def test_gradients_are_those_without(sharing: None) -> None:
    network, _, layout, z = generator()
    prepared = Prepared(network)

    def gradients(kept: bool) -> list[Tensor]:
        code = z.clone().requires_grad_()
        with prepared.checked() if kept else nullcontext():
            network(layout, code).square().sum().backward()
        found = [code.grad, *(p.grad for p in network.parameters() if p.grad is not None)]
        network.zero_grad()
        assert code.grad is not None
        return [g for g in found if g is not None]

    with torch.no_grad(), prepared.checked():
        network(layout, z)
    for wanted in (False, True):  # of the code alone, then of the weights too
        network.requires_grad_(wanted)
        kept, plain = gradients(True), gradients(False)
        assert len(kept) == len(plain) > 100 * wanted
        top = max(float(g.abs().max()) for g in plain)
        for a, b in zip(kept, plain, strict=True):
            assert float((a - b).abs().max()) < 1e-11 * top


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_accurate_as_the_reference(autocast: bool, sharing: None) -> None:
    network, planes, layout, z = generator()
    truth = reference(network, planes, z)
    dtype = torch.float32 if autocast else torch.bfloat16
    low, code = copy.deepcopy(network).to(dtype), z.to(dtype)
    layout = LabelLayout(layout.symbols, layout.vectors.float())
    around = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), around:
        simple = reference(low, planes.to(dtype), code)
        with Prepared(low).vouched():
            found = low(layout, code)
    assert found.dtype == torch.bfloat16
    assert_as_accurate(found, simple, truth)
