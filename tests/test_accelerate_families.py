"""accelerate(): every norm of the families in its table, whatever their parts are called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import foreign
import foreign_families as families
import pytest
import torch
from foreign_cases import LABELS, label_map, normal, stirred
from monai.networks.blocks.spade_norm import SPADE as MonaiNorm
from monai.networks.nets import SPADEAutoencoderKL, SPADEDiffusionModelUNet, SPADENet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils._pytree import tree_leaves

from smis_kernels import accelerate, restore

NORMS = (*families.NORMS, foreign.LayoutNorm, MonaiNorm)
Build = Callable[[], nn.Module]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


def painter(cls: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """SPADE's generator with another norm: 18 of them."""
    return foreign.Painter(LABELS, 2, 4, 64, norm=partial(cls, **options))


def monai_spade(dims: int, vae: bool) -> nn.Module:
    return SPADENet(dims, 2, 3, LABELS, [32] * dims, [4, 6, 8, 10], z_dim=4, is_vae=vae,
                    spade_intermediate_channels=4)


def monai_autoencoder(dims: int) -> nn.Module:
    return SPADEAutoencoderKL(
        dims, label_nc=LABELS, in_channels=2, out_channels=2, num_res_blocks=(1, 1),
        channels=(8, 8), attention_levels=(False, False), latent_channels=4, norm_num_groups=4,
        spade_intermediate_channels=4, with_decoder_nonlocal_attn=dims == 2)


def monai_diffusion(dims: int) -> nn.Module:
    return SPADEDiffusionModelUNet(
        dims, 2, 2, LABELS, num_res_blocks=(1, 1), channels=(8, 12), norm_num_groups=4,
        attention_levels=(False, True), num_head_channels=4, spade_intermediate_channels=4)


def volume(size: int) -> Tensor:
    """A one-hot map (2, L, D, H, W) of blocks."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(LABELS, (2, 1, 4, 4, 4), generator=generator)
    cells = nn.functional.interpolate(cells.double(), size=(size,) * 3)[:, 0].long()
    return nn.functional.one_hot(cells, LABELS).movedim(4, 1).double()


# What builds a network, its inputs (the map among them) and how many norms it has.
NETWORKS: dict[str, tuple[Build, tuple[Tensor, ...], int]] = {
    "oasis_noise": (lambda: families.NoisyPainter(LABELS, 4, 2, 4, 64),
                    (label_map(64), normal(2, 4)), 16),
    "oasis": (lambda: families.NoisyPainter(LABELS, 0, 2, 4, 64), (label_map(64),), 16),
    "monai_spade": (lambda: monai_spade(2, True), (label_map(32), normal(2, 2, 32, 32)), 12),
    "monai_spade_gan": (lambda: monai_spade(2, False), (label_map(32),), 12),
    "monai_autoencoder": (lambda: monai_autoencoder(2), (normal(2, 2, 16, 16), label_map(16)), 8),
    "monai_diffusion": (lambda: monai_diffusion(2),
                        (normal(2, 2, 16, 16), torch.tensor([3, 70]), label_map(16)), 8),
    "imaginaire": (lambda: families.WrappedPainter(LABELS, 2, 4, 64), (label_map(64),), 15),
    "imaginaire_joint": (lambda: families.WrappedPainter(
        LABELS, 2, 4, 64, partial(families.WrappedNorm, separate=False)), (label_map(64),), 15),
    "imaginaire_weight_norm": (lambda: families.WrappedPainter(
        LABELS, 2, 4, 64, partial(families.WrappedNorm, size=3, wrap=weight_norm)),
        (label_map(64),), 15),
    "cocosnet": (lambda: painter(families.MirrorNorm), (label_map(64),), 18),
    "cocosnet_instance": (lambda: painter(families.MirrorNorm, norm=nn.InstanceNorm2d),
                          (label_map(64),), 18),
    "clade": (lambda: painter(families.ClassTableNorm), (label_map(64),), 18),
    "inade_baseline": (lambda: painter(families.InstanceTableNorm), (label_map(64),), 18),
    "plain": (lambda: painter(families.PlainNorm), (label_map(64),), 18),
    "group_norm": (lambda: painter(foreign.LayoutNorm, norm=families.groups_of),
                   (label_map(64),), 18),
    "channel_norm": (lambda: painter(families.PlainNorm, norm=families.Channels),
                     (label_map(64),), 18),
    "weight_norm": (lambda: painter(families.ParametrizedNorm), (label_map(64),), 18),
    "new_weight_norm": (lambda: painter(
        families.ParametrizedNorm, wrap=parametrizations.weight_norm), (label_map(64),), 18),
    "spectral_norm": (lambda: painter(
        families.ParametrizedNorm, wrap=spectral_norm), (label_map(64),), 18),
    "new_spectral_norm": (lambda: painter(
        families.ParametrizedNorm, wrap=parametrizations.spectral_norm), (label_map(64),), 18),
}
# Not asked to be replaced; they may be, or be left with a reason.
OTHERS: dict[str, tuple[Build, tuple[Any, ...], int]] = {
    "inade": (lambda: families.InstanceTableNorm(6, LABELS),
              (normal(2, 6, 8, 8), label_map(16), label_map(16, seed=3).argmax(1, True),
               normal(2, LABELS, 8)), 1),
    "sean": (lambda: families.RegionStyleNorm(6, LABELS, 8),
             (normal(2, 6, 8, 8), label_map(16), normal(2, LABELS, 16)), 1),
    "monai_spade_3d": (lambda: monai_spade(3, False), (volume(32),), 12),
    "monai_autoencoder_3d": (lambda: monai_autoencoder(3), (normal(2, 2, 8, 8, 8), volume(8)), 4),
    "monai_diffusion_3d": (lambda: monai_diffusion(3),
                           (normal(2, 2, 8, 8, 8), torch.tensor([3, 70]), volume(8)), 8),
}


def made(build: Build) -> nn.Module:
    """The same at each call: torch copies no module with its older weight norm."""
    torch.manual_seed(0)
    return stirred(build())


def norms_of(network: nn.Module) -> set[str]:
    return {name for name, m in network.named_modules() if isinstance(m, NORMS)}


def outputs(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(3)  # some draw a code
    return [t for t in tree_leaves(network(*inputs)) if isinstance(t, Tensor)]


def step(network: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Outputs, gradients of the first input and of all parameters, and the buffers afterwards."""
    leaf = inputs[0].clone().requires_grad_()
    found = outputs(network, (leaf, *inputs[1:]))
    loss = sum((t * normal(*t.shape, seed=9)).sum() for t in found)
    wanted = {"input": leaf, **{f"gradient {k}": p for k, p in network.named_parameters()}}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {**{f"output {i}": t.detach() for i, t in enumerate(found)},
            **dict(zip(wanted, gradients, strict=True)),
            **{f"buffer {k}": b.clone() for k, b in network.named_buffers()}}


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    kinds = {key.split()[0] for key in expected}
    size = {kind: max([float(t.abs().max()) for key, t in expected.items()
                       if t is not None and key.startswith(kind)], default=0.0)
            for kind in kinds}
    for key, value in expected.items():
        other, floor = found[key], 1e-9 * max(1e-3, size[key.split()[0]])
        if value is None or other is None:
            some = other if value is None else value
            assert some is None or not bool(some.any()), f"{key} is missing"
        else:  # the bias before a norm has no gradient but rounding
            assert torch.allclose(other, value, rtol=1e-7, atol=floor), key


def assert_equal_in_use(network: nn.Module, original: nn.Module, inputs: tuple[Any, ...]) -> None:
    for training in (True, True, False):  # buffers have moved on by the second step
        network.train(training), original.train(training)
        assert_equal(step(network, inputs), step(original, inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_of_the_table_is_replaced_and_exact(name: str) -> None:
    build, inputs, count = NETWORKS[name]
    network, original = made(build), made(build)
    names = norms_of(network)
    assert len(names) == count
    state = {k: v.clone() for k, v in network.state_dict().items()}
    report = accelerate(network)
    assert names <= {row.name for row in report.replaced}, str(report)
    now = network.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[k], v) for k, v in state.items())
    assert_equal_in_use(network, original, inputs)
    assert not report.calls_left  # no call ran the original's forward
    assert list(network.state_dict()) == list(state)
    assert restore(network) > 0
    assert_equal(step(network, inputs), step(original, inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_map_decides_what_these_networks_paint(name: str) -> None:
    """Otherwise the test above could not see a fault in a norm."""
    build, inputs, _ = NETWORKS[name]
    network = made(build).eval()
    at = next(i for i, t in enumerate(inputs) if t.dim() == 4 and t.shape[1] == LABELS)
    other = (*inputs[:at], inputs[at].flip(1), *inputs[at + 1 :])
    with torch.no_grad():
        a, b = outputs(network, inputs)[0], outputs(network, other)[0]
    assert float((a - b).abs().max()) > 1e-2 * float(a.abs().max())


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_replaced_or_listed_with_a_reason(name: str) -> None:
    build, inputs, count = OTHERS[name]
    network, original = made(build), made(build)
    names = norms_of(network)
    assert len(names) == count
    report = accelerate(network)
    rows = {row.name: row for row in report.rows if row.name in names}
    assert rows.keys() == names, str(report)
    assert all(row.replaced or row.note for row in rows.values())
    assert_equal_in_use(network, original, inputs)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["oasis_noise", "monai_spade", "imaginaire", "clade"])
def test_pictures_without_gradients_are_the_same(name: str, inference: bool) -> None:
    build, inputs, _ = NETWORKS[name]
    network = made(build).eval()
    with torch.no_grad():
        before = outputs(network, inputs)
        report = accelerate(network, inference=inference)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for a, b in zip(outputs(network, inputs), before, strict=True):
                    assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert not report.calls_left
