"""accelerate() on a model in use: hooks, copies, files, other modes, mistakes, inference."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign
import foreign_layers
import pytest
import torch
import torch.distributed as dist
from foreign_cases import (
    LABELS,
    NETWORKS,
    accelerated_painter,
    block_of,
    label_map,
    lively,
    normal,
    small_painter,
)
from foreign_norms import width_list
from torch import Tensor, nn

import smis_kernels.layout.label_layout as layout_module
from smis_kernels import accelerate, explain, restore, use_backend
from smis_kernels.acceleration import swap
from smis_kernels.acceleration.formats import channels_last, planes
from smis_kernels.acceleration.swap import Accelerated
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error

NORMS = width_list(6, LABELS)
needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason="no native CPU library")


@needs_cpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_map_is_numbered_once_per_forward(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_painter().eval()
    accelerate(network)
    calls: list[int] = []
    original = layout_module.number_vectors

    def counting(conditioning: Tensor, limit: int, **options: str) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return original(conditioning, limit, **options)

    monkeypatch.setattr(layout_module, "number_vectors", counting)
    with mode():
        network(label_map(64, seed=5))
    assert len(calls) == 1
    explanation = explain(network, label_map(64, seed=6))
    paths = [c.path for c in explanation.choices if c.op.startswith("ForeignNorm")]
    assert len(paths) == 14  # of 18 norms, four share a read with another
    assert any("level" in path for path in paths)


def test_the_reference_is_the_original_forward() -> None:
    network = small_painter().eval()
    planes = label_map(64)
    with torch.no_grad():
        expected = network(planes)
        accelerate(network)
        with use_backend("reference"):
            assert torch.equal(network(planes), expected)


def test_a_block_alone_returns_the_format_it_was_given() -> None:
    block = block_of(foreign.Unit).eval()
    accelerate(block)
    x = normal(2, 6, 8, 8)
    assert block(x, label_map(16)).is_contiguous()
    wide = x.contiguous(memory_format=torch.channels_last)
    assert block(wide, label_map(16)).is_contiguous(memory_format=torch.channels_last)


def test_hooks_are_kept_and_called() -> None:
    network = small_painter().eval()
    seen: list[str] = []
    inner = network.up_0.norm_0.mlp_gamma
    for name, module in (("painter", network), ("block", network.up_1), ("gamma", inner),
                         ("norm", network.head_0.norm_1), ("conv", network.up_2.conv_1)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        expected = network(label_map(64))
        order, seen[:] = list(seen), []
        accelerate(network)
        assert not seen  # the probe is none of the user's calls
        assert max_error(network(label_map(64)), expected) < 1e-10
    assert sorted(seen) == sorted(order) == ["block", "conv", "gamma", "norm", "painter"]


def test_the_probe_leaves_no_trace() -> None:
    network = small_painter()
    called: list[int] = []
    for p in network.parameters():
        p.grad = torch.full_like(p, 3.0)
        p.register_hook(lambda g: called.append(1))
    before = {"state": {k: v.clone() for k, v in network.state_dict().items()},
              "versions": [t._version for t in network.state_dict(keep_vars=True).values()]}
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in network.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        accelerate(network)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert not called
    assert all(bool((p.grad == 3).all()) for p in network.parameters())
    state = network.state_dict(keep_vars=True)
    assert all(torch.equal(state[k], v) for k, v in before["state"].items())
    assert [t._version for t in state.values()] == before["versions"]
    restore(network)
    assert [{k: id(v) for k, v in vars(m).items()} for m in network.modules()] == attributes


def fused_modules(module: nn.Module) -> int:
    return sum(isinstance(m, Accelerated) for m in module.modules())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "used, then deepcopy"])
def test_a_copy_is_accelerated_and_its_own(way: str) -> None:
    network, planes, expected = accelerated_painter()
    with torch.no_grad():
        if way.startswith("used"):
            network(planes)
        if way == "pickle":
            twin = pickle.loads(pickle.dumps(network))
        elif way == "torch.save":
            file = io.BytesIO()
            torch.save(network, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(network)
        assert fused_modules(twin) == fused_modules(network) > 20
        network.conv_img.weight.zero_()
        assert max_error(twin(planes), expected) < 1e-10
        restore(twin)
        assert max_error(twin(planes), expected) < 1e-10
    assert fused_modules(network) > 20


def test_a_pickle_loads_in_a_fresh_process(tmp_path: Path) -> None:
    network, planes, expected = accelerated_painter()
    torch.save({"network": network, "planes": planes, "expected": expected}, tmp_path / "net.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "network = saved['network']\n"
        "with torch.no_grad():\n"
        "    error = (network(saved['planes']) - saved['expected']).abs().max().item()\n"
        "print(type(network.head_0.norm_0).__name__, error < 1e-10)\n"
    )
    folders = [str(Path(foreign.__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net.pt")], capture_output=True, text=True,
        timeout=600, env={"PYTHONPATH": ":".join(folders)}, check=False)
    assert done.stdout.split() == ["AcceleratedLayoutNorm", "True"], done.stderr


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_it_trains_inside_distributed_data_parallel(tmp_path: Path) -> None:
    network = small_painter().train()
    original = copy.deepcopy(network)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        assert len(accelerate(wrapped).replaced) > 20
        for module in (wrapped, original):
            module(label_map(64)).square().sum().backward()
        for p, q in zip(network.parameters(), original.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    finally:
        dist.destroy_process_group()


def test_a_failure_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_painter()
    classes = [type(m) for m in network.modules()]
    apply, done = swap.Change.apply, []

    def failing(change: swap.Change) -> None:
        if any(change.module is m for m in network.modules()):  # not in a probe
            done.append(change)
            if len(done) > 12:
                raise KeyboardInterrupt
        apply(change)

    monkeypatch.setattr(swap.Change, "apply", failing)
    with pytest.raises(KeyboardInterrupt):
        accelerate(network)
    assert len(done) == 13
    assert [type(m) for m in network.modules()] == classes
    monkeypatch.undo()
    accelerate(network, modules=["norm"])
    classes = [type(m) for m in network.modules()]
    for bad in (normal(1, 2, 3), {"unknown": 1}):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            accelerate(network, verify=bad)
        assert [type(m) for m in network.modules()] == classes


def test_a_dry_run_changes_nothing() -> None:
    network = small_painter()
    classes = [type(m) for m in network.modules()]
    dry = accelerate(network, dry_run=True, verify=label_map(64))
    assert [type(m) for m in network.modules()] == classes
    assert "would be replaced: 18 norm, 7 block" in str(dry)
    assert dry.difference is not None
    assert dry.difference.largest < 1e-9
    assert accelerate(network).rows == dry.rows


def test_modules_are_chosen_by_kind_and_by_name() -> None:
    network = small_painter()
    by_kind = accelerate(network, modules=["norm"])
    assert {row.kind for row in by_kind.replaced} == {"norm"}
    assert {row.note for row in by_kind.left} == {"not asked for"}
    by_name = accelerate(network, modules="up_*")  # it starts over
    assert {row.name.split(".")[0] for row in by_name.replaced} == {f"up_{i}" for i in range(4)}
    block = accelerate(network, modules=["block"])  # with the norms inside
    assert sum(row.kind == "norm" for row in block.replaced) == 18
    with pytest.raises(ValueError, match=r"modules: expected a kind \(norm, .*got 'down_1'"):
        accelerate(network, modules=["norm", "down_1"])


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        accelerate({})  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = foreign.LayoutNorm(6, 7, 8)
    with pytest.raises(ValueError, match="model: expected weights in memory"):
        accelerate(empty)
    with pytest.raises(TypeError, match="accelerate it first, then compile"):
        accelerate(torch.compile(block_of(foreign.Unit)))


@pytest.mark.parametrize("training", [False, True])
def test_verify_measures_and_leaves_buffers(training: bool) -> None:
    build, inputs, _ = NETWORKS["groupdnet"]
    network = build().train(training)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    report = accelerate(network, verify=inputs)
    assert report.difference is not None
    assert report.difference.largest < 1e-9
    assert report.difference.scale > 0.01
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert "largest difference" in str(report)
    planes, z = inputs
    assert accelerate(network, verify={"z": z, "segmap": planes}).difference is not None


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_verify_shows_what_the_probe_cannot_know(factor: float) -> None:
    class Moody(foreign.LayoutNorm):
        """It computes something else on larger features."""

        def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
            return super().forward(x, segmap) * (1 if x.shape[2] < 16 else factor)

    report = accelerate(lively(Moody(4, 7, 8)), verify=(normal(2, 4, 16, 16), label_map(16)))
    assert len(report.replaced) == 1
    assert report.difference is not None
    assert report.difference.largest > 0.1


@pytest.mark.parametrize("ids", ["float", "negative", "fraction", "two planes"])
def test_ids_of_other_kinds_are_pooled_as_before(ids: str) -> None:
    encoder = lively(foreign_layers.InstanceEncoder()).eval()
    image = normal(1, 3, 16, 16)
    inst = label_map(16, batch=1).argmax(1, keepdim=True)
    inst = {"float": inst.double(), "negative": inst - 3, "fraction": inst + 0.5,
            "two planes": torch.cat([inst, inst + 1], 1)}[ids]
    with torch.no_grad():
        expected = encoder(image, inst)
        accelerate(encoder)
        assert max_error(encoder(image, inst), expected) < 1e-10
        ran = {choice.backend for choice in explain(encoder, image, inst).choices
               if choice.op == "AcceleratedInstanceEncoder"}
    assert ran == (set() if ids == "float" else {"original"})


def test_features_of_another_dtype_are_computed_as_before() -> None:
    norm = lively(foreign.LayoutNorm(6, 7, 8, norm=nn.InstanceNorm2d)).float().eval()
    original, x, planes = copy.deepcopy(norm), normal(2, 6, 8, 8), label_map(16).float()
    assert len(accelerate(norm).replaced) == 1
    with torch.no_grad():
        found, expected = norm(x, planes), original(x, planes)
    assert found.dtype == expected.dtype == torch.float64
    assert max_error(found, expected) < 1e-12


class Residual(nn.Sequential):
    """Called with its children in turn, and more."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_sequence_with_a_forward_of_its_own_is_called(inside: bool, inference: bool) -> None:
    network: nn.Module = Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
                                  nn.InstanceNorm2d(4), nn.ReLU())
    network = lively(nn.Sequential(network, nn.InstanceNorm2d(4), nn.ReLU()) if inside else network)
    original, x = copy.deepcopy(network.eval()), normal(1, 4, 16, 16)
    accelerate(network, inference=inference)
    with torch.no_grad():
        assert max_error(network(x), original(x)) < 1e-10


def test_a_hook_on_a_sequence_inside_another_is_called() -> None:
    network = nn.Sequential(nn.Sequential(nn.InstanceNorm2d(4), nn.ReLU()), nn.InstanceNorm2d(4),
                            nn.LeakyReLU(0.2))
    original, x = copy.deepcopy(network), normal(1, 4, 16, 16)
    assert accelerate(network).replaced
    for m in (network, original):
        m[0].register_forward_hook(lambda _, __, out: out.cumsum(2))
    assert max_error(network(x), original(x)) < 1e-10


@pytest.mark.parametrize("kind", ["one channel", "one pixel", "one map"])
def test_inputs_that_broadcast_are_computed_as_before(kind: str) -> None:
    norm = lively(NORMS["unnormalised"]()).eval()
    original, x, planes = copy.deepcopy(norm), normal(2, 6, 8, 8), label_map(8)
    assert len(accelerate(norm).replaced) == 1
    given = {"one channel": (x[:, :1], planes), "one pixel": (x, planes[:, :, :1, :1]),
             "one map": (x, planes[:1])}[kind]
    with torch.no_grad():
        assert max_error(norm(*given), original(*given)) < 1e-10


def test_a_hook_on_an_activation_is_called() -> None:
    network = lively(foreign_layers.image_network()).eval()
    accelerate(network)
    seen: list[Tensor] = []
    network[3].register_forward_hook(lambda _, __, out: seen.append(out))
    network(normal(1, 3, 16, 16))
    assert len(seen) == 3
    assert bool((seen[0] >= 0).all())


class Rising(nn.LeakyReLU):
    """No LeakyReLU but by its base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("change", [
    lambda m: setattr(m[1], "negative_slope", 1.5), lambda m: setattr(m[1], "negative_slope", -0.5),
    lambda m: setattr(m[1], "__class__", Rising), lambda m: setattr(m[0], "eps", 1.0),
    lambda m: setattr(m[0], "weight", nn.Parameter(torch.full((4,), 2.0).double())),
], ids=["steep", "negative", "class", "eps", "weight"])
def test_layers_of_a_sequence_may_change_afterwards(change: Any) -> None:
    network = nn.Sequential(nn.InstanceNorm2d(4), nn.LeakyReLU(0.2))
    original, x = copy.deepcopy(network), normal(1, 4, 16, 16)
    assert accelerate(network).replaced
    for m in (network, original):
        change(m)
    assert max_error(network(x), original(x)) < 1e-10


def test_a_hook_on_an_instance_norm_is_called() -> None:
    network = nn.Sequential(nn.InstanceNorm2d(4), nn.LeakyReLU(0.2))
    original, x = copy.deepcopy(network), normal(1, 4, 16, 16)
    accelerate(network)
    for m in (network, original):
        m[0].register_forward_hook(lambda _, __, out: out + 1)
    assert max_error(network(x), original(x)) < 1e-10


def test_autocast_computes_as_before() -> None:
    network = small_painter().float().eval()
    original = copy.deepcopy(network)
    accelerate(network)
    planes = label_map(64).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, expected = network(planes), original(planes)
    assert out.dtype == expected.dtype
    assert max_error(out, expected) < 0.1


def test_parts_may_be_exchanged_afterwards() -> None:
    norm = lively(foreign.LayoutNorm(6, 7, 8)).eval()
    accelerate(norm)
    x, planes = normal(2, 6, 8, 8), label_map(16)
    norm.mlp_gamma = nn.Sequential(norm.mlp_gamma, nn.Tanh())
    out = norm(x, planes)
    restore(norm)
    assert torch.equal(out, norm(x, planes))


class _Tuple(nn.Module):
    """A network that returns what it painted in other dtypes, channels-last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, planes: Tensor) -> dict[str, Tensor]:
        y = self.inner(x, planes).to(memory_format=torch.channels_last)
        return {"bytes": (y * 20 + 100).clamp(0, 255).to(torch.uint8), "mask": y > 0,
                "half": y.half(), "long": (y * 100).long(), "complex": torch.complex(y, y)}


def test_a_network_may_return_any_dtype() -> None:
    network = _Tuple(foreign.Unit(8, 6, lambda c: foreign.LayoutNorm(c, 4, 8))).eval()
    inputs = torch.randn(1, 8, 8, 8), label_map(8, batch=1, labels=4).float()
    with torch.no_grad():
        expected = network(*inputs)
        accelerate(network)
        for name, value in network(*inputs).items():
            assert value.is_contiguous(), name
            assert value.dtype == expected[name].dtype
            assert (value.cdouble() - expected[name].cdouble()).abs().max() <= 1


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton", "cuda"])
def test_formats_change_whatever_backend_computes(backend: str) -> None:
    x = torch.randn(2, 5, 6, 7)
    with use_backend(backend):
        assert torch.equal(channels_last(x), x)
        assert torch.equal(planes(channels_last(x)), x)
