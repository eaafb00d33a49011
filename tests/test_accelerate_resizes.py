"""Nearest resizes inside accelerated networks on a CPU: torch's bit for bit, without its copies."""

from __future__ import annotations

import copy
from typing import Any

import foreign
import pytest
import torch
import torch.nn.functional as F
from foreign_cases import LABELS, label_map, normal, stirred
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smis_kernels import accelerate, restore, use_backend
from smis_kernels.acceleration import formats, resizes
from smis_kernels.acceleration.formats import network_call
from smis_kernels.acceleration.resizes import nearest
from smis_kernels.runtime.check import FLOATS
from smis_kernels.testing import max_error


@settings(max_examples=150, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)),
       st.one_of(st.integers(1, 64), st.tuples(st.integers(1, 60), st.integers(1, 60))),
       st.sampled_from([None, None, 0.25, 0.3, 0.5, 0.77, 1.0, 1.5, 2.0, 2, 3.0, (2.0, 1.0)]),
       st.sampled_from(FLOATS))
def test_any_resize(shape: tuple[int, int, int, int], size: Any, scale: Any,
                    dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    x[0, 0, 0, 0] = float("nan")
    given_: dict[str, Any] = {"size": size} if scale is None else {"scale_factor": scale}
    try:
        expected = F.interpolate(x, **given_)
    except RuntimeError:  # an output without pixels
        assert nearest(x, **given_) is None
        return
    found = nearest(x, **given_)
    if found is not None:
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


SERVED: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "map": (torch.randn(2, 7, 50, 70), {"size": (8, 9)}),
    "same": (torch.randn(1, 7, 20, 30), {"size": (20, 30)}),
    "twice": (torch.randn(2, 7, 16, 31), {"scale_factor": 2}),
    "nearly twice": (torch.randn(1, 7, 16, 31), {"scale_factor": 2.02}),  # as torch rounds it
    "twice by size": (torch.randn(2, 7, 16, 31), {"size": [32, 62], "mode": "nearest"}),
    "one row": (torch.randn(2, 7, 1, 31), {"scale_factor": 2.0}),
    "one column": (torch.randn(2, 7, 31, 1), {"scale_factor": 2.0}),
    "one pixel": (torch.randn(2, 7, 1, 1), {"size": 2}),
    "half": (torch.randn(2, 7, 16, 31), {"scale_factor": (0.5, 0.5)}),
    "double": (torch.randn(1, 4, 16, 31).double(), {"size": 5}),
    "float16": (torch.randn(1, 7, 50, 70).half(), {"size": 8}),
    "bfloat16, of many pixels": (torch.randn(1, 7, 50, 70).bfloat16(), {"size": (31, 9)}),
    "to 128": (torch.randn(1, 4, 130, 70), {"size": (64, 64)}),
}


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    x, given_ = SERVED[name]
    found = nearest(x, **given_)
    assert found is not None
    expected = F.interpolate(x, **given_)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert torch.equal(nearest(input=x, **given_), found)


LEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "bilinear": (torch.randn(1, 7, 50, 70), {"size": (8, 9), "mode": "bilinear"}),
    "nearest-exact": (torch.randn(1, 7, 50, 70), {"size": (8, 9), "mode": "nearest-exact"}),
    "recomputed": (torch.randn(1, 7, 50, 70),
                   {"scale_factor": 0.3, "recompute_scale_factor": True}),
    "large": (torch.randn(1, 7, 50, 70), {"size": (64, 65)}),
    "thrice": (torch.randn(1, 7, 8, 8), {"scale_factor": 3}),
    "channels-last": (torch.randn(1, 7, 50, 70).contiguous(memory_format=torch.channels_last),
                      {"size": 8}),
    "slice": (torch.randn(1, 7, 50, 70)[..., 3:], {"size": 8}),
    "bytes": (torch.ones(1, 7, 50, 70, dtype=torch.uint8), {"size": 8}),
    "line": (torch.randn(1, 7, 50), {"size": 8}),
    "volume": (torch.randn(1, 7, 5, 5, 5), {"size": 8}),
    "few planes": (torch.randn(1, 3, 50, 70), {"size": 8}),
    "nothing": (torch.randn(0, 7, 50, 70), {"size": 8}),
    "gradient": (torch.randn(1, 7, 50, 70, requires_grad=True), {"size": 8}),
    "parameter": (nn.Parameter(torch.randn(1, 7, 50, 70)), {"size": 8}),
    "no size": (torch.randn(1, 7, 50, 70), {}),
    "both": (torch.randn(1, 7, 50, 70), {"size": 8, "scale_factor": 2}),
    "too many": (torch.randn(1, 7, 50, 70), {"size": (8, 9, 10)}),
    "corners": (torch.randn(1, 7, 50, 70), {"size": 8, "align_corners": False}),
    "no tensor": ([1, 2], {"size": 8}),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    x, given_ = LEFT[name]
    assert nearest(x, **given_) is None
    with network_call(torch.zeros(1)):
        try:
            found = F.interpolate(x, **given_)
        except Exception as error:
            with pytest.raises(type(error)):
                F.interpolate(x, **given_)
            return
    assert torch.equal(found, F.interpolate(x, **given_))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each resize inside a network was ours."""
    found: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor | None:
        y = nearest(*args, **kwargs)
        found.append(y is not None)
        return y

    monkeypatch.setattr(resizes, "nearest", noted)
    return found


def test_networks_take_them_and_nothing_else_does(taken: list[bool]) -> None:
    torch.manual_seed(0)
    network = stirred(foreign.Painter(LABELS, ngf=4, hidden=8, size=64)).eval()
    original, planes = copy.deepcopy(network), label_map(64)
    accelerate(network)
    for mode in (torch.no_grad, torch.inference_mode):
        taken.clear()
        with mode():
            assert max_error(network(planes), original(planes)) < 1e-9
        assert taken[0] and sum(taken) >= 5  # the map to 2 x 2, features upsampled
        taken.clear()
        F.interpolate(planes, size=(8, 8))
        assert not taken
    with use_backend("reference"), torch.no_grad():
        assert torch.equal(network(planes), original(planes))
    assert not taken
    with pytest.raises(RuntimeError):
        network(planes[:, :2])
    taken.clear()
    F.interpolate(planes, size=(8, 8))
    restore(network)
    with torch.no_grad():
        network(planes)
    assert not taken


def test_planes_of_more_pixels_than_float32_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 30, 40)
    monkeypatch.setattr(resizes, "_MOST_PIXELS", 1200)
    assert nearest(x, size=8) is not None
    monkeypatch.setattr(resizes, "_MOST_PIXELS", 1199)
    assert nearest(x, size=8) is None
    assert float(torch.tensor(2**24 - 1, dtype=torch.float32)) == 2**24 - 1


@pytest.mark.parametrize("part", ["up", "up_0"])
def test_a_part_that_is_compiled(part: str) -> None:
    torch.manual_seed(0)
    network = stirred(foreign.Painter(LABELS, ngf=4, hidden=8, size=64)).eval()
    original, planes = copy.deepcopy(network), label_map(64)
    accelerate(network)
    getattr(network, part).compile(backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert max_error(network(planes), original(planes)) < 1e-9


def test_gradients_are_torchs(taken: list[bool]) -> None:
    torch.manual_seed(0)
    network = stirred(foreign.Painter(LABELS, ngf=4, hidden=8, size=64)).train()
    original, planes = copy.deepcopy(network), label_map(64)
    accelerate(network)
    for m in (network, original):
        (m(planes) * normal(2, 3, 64, 64)).sum().backward()
    assert taken[0] and not all(taken)
    for (key, p), q in zip(network.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-8, msg=key)


def test_only_the_outermost_call_watches() -> None:
    with network_call(torch.zeros(1)):
        depth = len(torch.overrides._get_current_function_mode_stack())
        with network_call(torch.zeros(1)):
            assert len(torch.overrides._get_current_function_mode_stack()) == depth
        assert formats._calls.depth == 1
    assert not torch.overrides._get_current_function_mode_stack()
    with network_call(nn.ReLU()):  # where its tensors are nobody knows
        assert not torch.overrides._get_current_function_mode_stack()


def test_torchs_own_transposition_is_still_there() -> None:
    """Where torch has a better kernel one day, this is to go: the profile shows its copies."""
    x = torch.randn(1, 16, 64, 64)
    with torch.profiler.profile() as profile:
        F.interpolate(x, size=(8, 8))
    assert any(event.key == "aten::copy_" for event in profile.key_averages())
