"""accelerate() on blocks whose features a nearest x2 upsampling made: it is folded, and exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import foreign
import pytest
import torch
import torch.nn.functional as F
from foreign_cases import LABELS, label_map, normal, stirred
from test_accelerate_blocks import BLOCKS
from torch import Tensor, nn

from smis_kernels import SPADE, accelerate, explain
from smis_kernels.acceleration import blocks
from smis_kernels.acceleration.blocks import FusedBlock
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason="no native CPU library")
PLANES = label_map(16)


class Parametrized(foreign.Unit):
    """The newer spectral norm."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("conv_0", "conv_1", "conv_s"):
            if hasattr(self, name):
                old = getattr(self, name)
                conv = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size,
                                 padding=old.padding, bias=old.bias is not None, groups=old.groups)
                setattr(self, name, nn.utils.parametrizations.spectral_norm(conv))


class Biased(foreign.Unit):
    """Its shortcut's conv has a bias: not the kernel's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.learned:
            self.conv_s = nn.Conv2d(self.conv_0.in_channels, self.conv_1.out_channels, 1)


class Raw(foreign.Unit):
    """Its shortcut reads the features without a norm: nothing to fold."""

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        side = torch.tanh(x)
        h = self.conv_0(self.active(self.norm_0(x, segmap)))
        return side + self.conv_1(self.active(self.norm_1(h, segmap)))


def unit(cls: type[foreign.Unit] = foreign.Unit, width: int = 32, out: int = 16, groups: int = 1,
         norm: Callable[..., nn.Module] = foreign.LayoutNorm) -> nn.Module:
    torch.manual_seed(1)
    return stirred(cls(width, out, lambda c: norm(c, LABELS, 8), groups=groups))


def images(width: int, planes: int, hidden: int) -> nn.Module:
    return foreign.LayoutNorm(width, planes, hidden, norm=nn.InstanceNorm2d)


UNITS: dict[str, Callable[[], nn.Module]] = {
    "learned": unit,
    "identity": lambda: unit(out=32),
    "growing": lambda: unit(width=16, out=40),
    "groups": lambda: unit(groups=2),
    "instance": lambda: unit(norm=images),
    "parametrized": lambda: unit(Parametrized),
    "biased": lambda: unit(Biased),
    "relu": lambda: unit(foreign.ReluUnit),
    "damped": lambda: unit(foreign.DampedUnit),
    "own_norms": lambda: unit(norm=SPADE),
}
FOLDED = [*UNITS]


def accelerated(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    network, original = build(), build()
    assert accelerate(network).replaced
    assert isinstance(network, FusedBlock)
    return network, original


def upsampled(width: int, batch: int = 2) -> Tensor:
    return F.interpolate(normal(batch, width, 8, 8), scale_factor=2, mode="nearest")


def width_of(network: nn.Module) -> int:
    return int(network.get_submodule("conv_0").in_channels)  # type: ignore[arg-type]


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a block folded an upsampling; no entry where it could not."""
    found: list[bool] = []
    look = blocks.upsampled_from

    def noted(x: Tensor) -> Tensor | None:
        half = look(x)
        found.append(half is not None)
        return half

    monkeypatch.setattr(blocks, "upsampled_from", noted)
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", FOLDED)
def test_a_block_of_upsampled_features(name: str, last: bool, training: bool,
                                       folds: list[bool]) -> None:
    network, original = (m.train(training) for m in accelerated(UNITS[name]))
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = upsampled(width_of(network)).contiguous(memory_format=memory_format)
    folds.clear()
    with torch.no_grad():
        for planes in (PLANES, label_map(32)):
            expected, y = original(x, planes), network(x, planes)
            assert max_error(y, expected) < 1e-9
            assert y.is_contiguous(memory_format=memory_format)
    assert folds == [True, True]
    for key, value in original.state_dict().items():
        assert max_error(network.state_dict()[key].double(), value.double()) < 1e-9, key


@pytest.mark.parametrize("name", FOLDED)
def test_features_of_another_kind_are_not_folded(name: str, folds: list[bool]) -> None:
    network, original = (m.eval() for m in accelerated(UNITS[name]))
    x = upsampled(width_of(network))
    x[1, -1, 15, 15] += 0.5
    folds.clear()
    with torch.no_grad():
        assert max_error(network(x, PLANES), original(x, PLANES)) < 1e-9
    assert folds == [False]


@pytest.mark.parametrize("name", FOLDED)
def test_gradients_are_every_pixels_own(name: str, folds: list[bool]) -> None:
    for training in (False, True):
        network, original = (m.train(training) for m in accelerated(UNITS[name]))
        x = [upsampled(width_of(network)).requires_grad_() for _ in range(2)]
        folds.clear()
        outputs = [m(x, PLANES) for m, x in zip((network, original), x, strict=True)]
        weight = normal(*outputs[0].shape)
        for y in outputs:
            (y * weight).sum().backward()
        assert not any(folds)
        assert max_error(x[0].grad, x[1].grad) < 1e-8
        for (key, p), q in zip(network.named_parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9, msg=key)


def test_what_else_reads_the_features_reads_all_of_them(folds: list[bool]) -> None:
    network, original = (m.eval() for m in accelerated(lambda: unit(Raw, out=32)))
    x = upsampled(32)
    folds.clear()
    with torch.no_grad():
        assert max_error(network(x, PLANES), original(x, PLANES)) < 1e-9
    assert not folds


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("damped", "from_config")])
def test_blocks_of_other_kinds(name: str) -> None:
    """Whether they fold or not."""
    network, original = BLOCKS[name](), BLOCKS[name]()
    accelerate(network)
    for m in (network, original):
        m.eval()
    image = F.interpolate(normal(2, 3, 8, 8), scale_factor=2, mode="nearest")
    x = upsampled(6)
    with torch.no_grad():
        assert max_error(network(image, PLANES), original(image, PLANES)) < 1e-9
        for (key, block), other in zip(network.named_modules(), original.modules(), strict=True):
            if isinstance(block, FusedBlock):
                plan = vars(block)["_smis_plan"]
                given = (PLANES, x) if plan.swapped else (x, PLANES)
                assert max_error(block(*given), other(*given)) < 1e-9, key


@pytest.mark.parametrize("kind", ["forward", "pre"])
@pytest.mark.parametrize("where", ["conv_s", "conv_1", "conv_0", "norm_s", "norm_0"])
@pytest.mark.parametrize("name", ["learned", "identity"])
@pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
def test_hooks_see_what_they_were_written_for(name: str, where: str, kind: str) -> None:
    if name == "identity" and where.endswith("_s"):
        pytest.skip("it has none")
    network, original = (m.eval() for m in accelerated(UNITS[name]))
    x, shapes = upsampled(32), []
    with torch.no_grad():
        before = original(x, PLANES)
        for m in (network, original):
            part, seen = m.get_submodule(where), []
            if kind == "forward":
                part.register_forward_hook(lambda _, args, out, seen=seen: (
                    seen.append((args[0].shape, out.shape)), 1.5 * out)[1])
            else:
                part.register_forward_pre_hook(lambda _, args, seen=seen: (
                    seen.append(args[0].shape), (0.5 * args[0] + 1, *args[1:]))[1])
            shapes.append(seen)
        y, expected = network(x, PLANES), original(x, PLANES)
    if not (kind == "pre" and where.startswith("norm")):  # affine changes are normalised away
        assert max_error(expected, before) > 1e-4
    assert max_error(y, expected) < 1e-9
    assert shapes[0] == shapes[1] and len(shapes[0]) == 1


def test_a_spectral_norm_takes_one_step_in_a_call() -> None:
    """With and without gradients, in both modes."""
    for name in ("learned", "parametrized"):
        for training in (False, True):
            network, original = (m.train(training) for m in accelerated(UNITS[name]))
            for grad in (False, True, False):
                with torch.set_grad_enabled(grad):
                    x = upsampled(32)
                    assert max_error(network(x, PLANES), original(x, PLANES)) < 1e-9
            for key, value in original.state_dict().items():
                assert max_error(network.state_dict()[key].double(), value.double()) < 1e-9, key


@pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
def test_changed_weights_of_the_shortcut_are_seen() -> None:
    network, original = (m.eval() for m in accelerated(UNITS["learned"]))
    x = upsampled(32)
    with torch.no_grad():
        network(x, PLANES)
        for m in (network, original):
            m.get_parameter("conv_s.weight_orig").mul_(2.0).add_(0.1)
        assert max_error(network(x, PLANES), original(x, PLANES)) < 1e-9
        for m in (network, original):
            conv = nn.Conv2d(32, 16, 1, bias=False, dtype=torch.float64)
            conv.load_state_dict({"weight": normal(16, 32, 1, 1)})
            m.conv_s = conv
        assert max_error(network(x, PLANES), original(x, PLANES)) < 1e-9


def test_the_shortcut_runs_as_one_kernel() -> None:
    network = accelerated(UNITS["learned"])[0].eval()
    for x in (upsampled(32), normal(2, 32, 16, 16)):
        with torch.no_grad():
            assert "indexed_shortcut" in str(explain(network, x, PLANES))


def test_a_whole_generator() -> None:
    torch.manual_seed(0)
    network = stirred(foreign.Painter(LABELS, ngf=4, hidden=8, size=64)).eval()
    original = copy.deepcopy(network)
    accelerate(network)
    planes = label_map(64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert max_error(network(planes), original(planes)) < 1e-9
