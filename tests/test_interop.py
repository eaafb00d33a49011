"""The zoo inside the rest of PyTorch: compile, export, autocast, memory formats, copies, DDP."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import LabelLayout
from smis_kernels.runtime.backend import missing
from smis_kernels.testing import max_error
from smis_models import create_model, frozen_copy, list_models
from smis_models.families import models as models_module
from smis_models.networks import semantics as labels

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
NAMES = [info.name for info in list_models()]
_SIZE: dict[str, Any] = {"ndf": 8, "image_size": (64, 64)}
_CODED = {**_SIZE, "ngf": 2, "hidden": 8}
_PIX2PIXHD = {**_SIZE, "ngf": 4, "nef": 4, "blocks": 1, "local_blocks": 1}
# One of each kind of generator: the others are these with other numbers.
KINDS: dict[str, dict[str, Any]] = {
    "groupdnet_deepfashion": {**_SIZE, "ngf": 8, "nef": 8},
    "groupdnet_cityscapes": {**_SIZE, "ngf": 70, "nef": 35},
    "mulnet_deepfashion": {**_SIZE, "ngf": 8, "nef": 8},
    "spade_cityscapes": _CODED,
    "spade_coco_vae": {**_CODED, "classes": 13, "dont_care": 12},
    "ccfpse_ade20k": {**_CODED, "classes": 13, "dont_care": 12},
    "pix2pixhd_cityscapes": _PIX2PIXHD, "pix2pixhd_cityscapes_features": _PIX2PIXHD,
    "pix2pixhd_cityscapes_1024": _PIX2PIXHD,
    "bicyclegan_deepfashion": {**_SIZE, "ngf": 4, "nef": 4},
}
# Of each family one, for what takes seconds.
WHOLE = ("groupdnet_deepfashion", "spade_coco_vae", "ccfpse_ade20k", "pix2pixhd_cityscapes",
         "bicyclegan_deepfashion")
EXPORTED = ("groupdnet_deepfashion", "ccfpse_ade20k", "pix2pixhd_cityscapes")


def tiny(name: str) -> Any:
    return create_model(name, init_gain=1.0, **KINDS[name]).eval()


def inputs(model: Any, *, layout: bool = False, batch: int = 1) -> tuple[Any, ...]:
    """Maps of 16x16 blocks, or their layout, and what else the generator reads."""
    preset, generator = model.preset, torch.Generator().manual_seed(0)
    coarse = torch.randint(preset.classes, (batch, 1, 4, 4), generator=generator).float()
    maps = F.interpolate(coarse, preset.image_size)[:, 0].long()
    ids = maps if preset.instance_edge else None
    if layout:
        first: Tensor | LabelLayout = labels.compile_layout(maps, preset, ids)
    else:
        first = model.semantics(maps, ids)
    if getattr(preset, "features", False):
        return first, torch.rand((batch, 3, *preset.image_size), generator=generator)
    z = model.generator.sample_latent(batch, generator)
    return (first,) if z is None else (first, z)


@needs_cpu
@pytest.mark.parametrize("name", WHOLE)
def test_compiles_into_one_graph_on_a_prepared_layout(name: str) -> None:
    model = tiny(name)
    generator, arguments = frozen_copy(model.generator), inputs(model, layout=True)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = generator(*arguments)  # which prepares the layout
        compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
        assert max_error(compiled(*arguments), expected) < 1e-5


@needs_cpu
def test_compiles_with_spectral_norm_and_without_a_layout() -> None:
    model = tiny("spade_cityscapes")
    arguments = inputs(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model.generator(*arguments)
        compiled = torch.compile(model.generator, fullgraph=True, backend="aot_eager")
        assert max_error(compiled(*arguments), expected) < 1e-5


_RELOAD = """
import sys, torch, smis_kernels
for name in sys.argv[2:]:
    arguments, expected = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    with torch.no_grad():
        found = torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()(*arguments)
    print(name, float((found - expected).abs().max()))
"""


def test_exported_files_paint_the_same_in_another_process(tmp_path: Path) -> None:
    for name in EXPORTED:
        model = tiny(name)
        generator, arguments = frozen_copy(model.generator), inputs(model)
        with torch.no_grad():
            program = torch.export.export(generator, arguments)
            torch.export.save(program, tmp_path / f"{name}.pt2")
            torch.save((arguments, generator(*arguments)), tmp_path / f"{name}.pt")
    done = subprocess.run([sys.executable, "-c", _RELOAD, str(tmp_path), *EXPORTED],
                          capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(errors) == sorted(EXPORTED)
    assert all(float(error) < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_autocast(name: str, layout: bool) -> None:
    model = tiny(name)
    arguments = inputs(model, layout=layout)
    with torch.no_grad():
        expected = model.generator(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.generator(*arguments)
    assert image.isfinite().all()
    assert float((image.float() - expected).abs().mean()) < 0.1 * float(expected.std()) + 0.01


@pytest.mark.parametrize("name", KINDS)
def test_channels_last(name: str) -> None:
    model = tiny(name)
    arguments = inputs(model)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model.generator(*arguments)
        last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
                for x in arguments]
        assert max_error(other.generator(*last), expected) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_pickles(name: str) -> None:
    model = tiny(name)
    arguments = inputs(model)
    with torch.no_grad():
        expected = model.generator(*arguments)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.generator(*arguments), expected)
            assert other.preset == model.preset
            next(other.generator.parameters()).zero_()  # its own memory
        assert torch.equal(model.generator(*arguments), expected)


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("name", ["groupdnet_deepfashion", "ccfpse_ade20k",
                                  "bicyclegan_deepfashion"])
def test_distributed_data_parallel(name: str, process_group: None) -> None:
    found = []
    for wrapped in (False, True):
        model = tiny(name).train()
        generator = model.generator
        if wrapped:  # published networks hold parameters that no forward uses
            generator = nn.parallel.DistributedDataParallel(generator, find_unused_parameters=True)
        # Two maps: torch's batch norm too refuses the one value that a map of 1x1 has.
        generator(*inputs(model, batch=2)).square().sum().backward()
        found.append({k: p.grad for k, p in model.generator.named_parameters()
                      if p.grad is not None})
    plain, distributed = found
    assert plain
    assert list(plain) == list(distributed)
    for key, gradient in plain.items():
        torch.testing.assert_close(distributed[key], gradient)


@pytest.mark.parametrize("name", NAMES)
def test_built_on_meta_in_no_time(name: str) -> None:
    start = time.process_time()
    model = create_model(name, device="meta")
    assert time.process_time() - start < 3
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_built_from_a_checkpoint_without_random_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = create_model(name, part="generator", device="meta").state_dict()
    # Expanded from one number each: a small file of a full-size network.
    state = {key: torch.full((1,) * max(t.dim(), 1), 0.5).expand(t.shape or (1,)).view(t.shape)
             .to(t.dtype) for key, t in shapes.items()}
    torch.save(state, tmp_path / "latest_net_G.pth")
    assert (tmp_path / "latest_net_G.pth").stat().st_size < 1 << 20

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("random weights were drawn")

    monkeypatch.setattr(models_module, "init_weights", refuse)
    drawn = torch.random.get_rng_state()
    start = time.process_time()
    model = create_model(name, tmp_path / "latest_net_G.pth")
    assert time.process_time() - start < 3
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert [part for part, _ in model.named_children()] == ["generator"]
    assert all(bool((p == 0.5).all()) for p in list(model.parameters())[:3])
