"""The set ``training``: whole training steps, and what the data loader adds to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smis_kernels import spectral_weight, use_backend
from smis_kernels.ops.spectral_weight import reference

from ..data import Batch, Collate, Sample, SceneDataset
from ..families import with_options
from ..networks.semantics import semantics
from ..training import TrainConfig, Trainer, recipe
from ..training.batches import MicroBatch
from .case import Case, Inputs, Provider, Setting, nbytes

SIZE = (128, 128)
BATCH = 2


class _MapScenes(SceneDataset):
    """The setting's maps under random pictures."""

    def __init__(self, setting: Setting, kind: str, classes: int, edges: bool) -> None:
        self.maps, self.kind, self.edges = setting.maps, kind, edges
        self.classes, self.size, self.seed = classes, SIZE, 0

    def __len__(self) -> int:
        return self.maps.count

    def sample(self, index: int, r: Any) -> Sample:
        labels = torch.from_numpy(self.maps.labels(self.kind, SIZE, self.classes, index))
        noise = torch.rand((3, *SIZE), generator=torch.Generator().manual_seed(index))
        sample: Sample = {"labels": labels, "image": noise * 2 - 1, "name": str(index)}
        if self.edges:
            ids = self.maps.instances(self.kind, SIZE, index)
            sample["instances"] = torch.from_numpy(ids).int()
        return sample


def _config(name: str) -> TrainConfig:
    """The published recipe at 128x128, without the perceptual term and with rates of zero.

    So the weights stay as they are and every call computes the same, Adam's pass included.
    """
    config = recipe(name)
    rates = replace(config.optimizer, generator=0.0, discriminator=0.0)
    network = with_options(config.network, {"image_size": SIZE, "upsampling": "normal"}, name)
    return replace(
        config, network=network,
        optimizer=rates, losses=replace(config.losses, perceptual=0.0), init_gain=1.0,
    )


@torch.no_grad()
def settle(module: nn.Module, rounds: int = 30) -> None:
    """Power iterations until the spectral norms no longer move from call to call."""
    for layer in module.modules():
        if "weight_u" in layer._buffers:
            u, v = layer.get_buffer("weight_u"), layer.get_buffer("weight_v")
            weight = layer.get_parameter("weight_orig").flatten(1)
            for _ in range(rounds):
                v.copy_(nn.functional.normalize(weight.mT @ u, dim=0))
                u.copy_(nn.functional.normalize(weight @ v, dim=0))


def _outcome(trainer: Trainer, batch: MicroBatch) -> Tensor:
    """The losses of a step and the norms of its gradients."""
    trainer.step_count, batch.noise_seed = 0, 1
    with torch.enable_grad():  # the harness times inference as a rule
        losses = trainer.step([batch], 0)
    norms = []
    for part in trainer.model.children():
        norms.append(nn.utils.get_total_norm(
            [p.grad for p in part.parameters() if p.grad is not None]))
        # A step starts without gradients: freeing them there would hide as much of its peak.
        part.zero_grad()
    return torch.stack([*map(torch.tensor, losses.values()), *norms])


def _reference(trainer: Trainer, samples: list[Sample], *_: Any) -> Tensor:
    """One-hot planes and the papers' operations."""
    labels = torch.stack([sample["labels"] for sample in samples])
    ids = [sample["instances"] for sample in samples if "instances" in sample]
    with use_backend("reference"):
        batch = MicroBatch(torch.stack([sample["image"] for sample in samples]), labels)
        batch.planes = semantics(labels, trainer.model.preset, torch.stack(ids) if ids else None)
        return _outcome(trainer, batch)


def _fused(trainer: Trainer, samples: list[Sample], *_: Any) -> Tensor:
    """The layout is compiled in the call."""
    return _outcome(trainer, _micro(Collate(trainer.model.preset)(samples)))


def _micro(batch: Batch) -> MicroBatch:
    return MicroBatch.of(batch, torch.device("cpu"))


def _channels_last(inputs: Inputs) -> Inputs:
    """A trainer of its own whose weights and pictures are in channels-last memory."""
    trainer, samples, *rest = inputs
    twin = Trainer(trainer.config)
    twin.model.load_state_dict(trainer.model.state_dict())
    twin.model.to(memory_format=torch.channels_last)
    return twin, samples, *rest


def _make_inputs(setting: Setting, name: str, kind: str) -> Inputs:
    """A trainer with published widths, samples, an endless loader with a worker, and a picture."""
    config = _config(name)
    trainer = Trainer(config)
    settle(trainer.model)
    preset = config.network
    scenes = _MapScenes(setting, kind, preset.classes, preset.instance_edge)
    samples = [scenes[i % len(scenes)] for i in range(BATCH)]
    order = itertools.cycle([[i % len(scenes) for i in range(BATCH)]])
    loader = DataLoader(scenes, batch_sampler=_Endless(order), num_workers=1,
                        collate_fn=Collate(preset))
    return trainer, samples, _Stream(loader), samples[0]["image"]


class _Endless:
    """A batch sampler over an iterator."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches


class _Stream:
    """The loader's batches, its worker started with the first."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._iterator: Iterator[Batch] | None = None

    def next(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)


def _step_case(name: str, kind: str) -> Case:
    """Both updates of one step from labels and pictures; the layout is compiled in the call."""
    return Case(
        name=f"{name}/training_step_128_batch2", make_inputs=partial(_make_inputs, name=name,
                                                                     kind=kind),
        providers=(Provider("reference", _reference),
                   Provider("channels_last", _reference, _channels_last),
                   Provider("fused", _fused)),
        memory_bound=False, floor=1e-2, seconds=60.0, targets={"reference": 1.8},
        single_precision_truth=True, graphs=False,
    )


def _loop_case(name: str, kind: str) -> Case:
    """What loading costs: our step on a batch at hand (``reference``) and on the loader's next.

    The loader's one worker reads the maps and compiles the layout meanwhile, on the same cores.
    """
    kept: dict[int, MicroBatch] = {}

    def at_hand(trainer: Trainer, samples: list[Sample], *_: Any) -> Tensor:
        if id(samples) not in kept:
            kept.clear()
            kept[id(samples)] = _micro(Collate(trainer.model.preset)(samples))
        return _outcome(trainer, kept[id(samples)])

    def loaded(trainer: Trainer, samples: list[Sample], stream: _Stream, *_: Any) -> Tensor:
        return _outcome(trainer, _micro(stream.next()))

    return Case(
        name=f"{name}/training_with_loader_128_batch2",
        make_inputs=partial(_make_inputs, name=name, kind=kind),
        providers=(Provider("reference", at_hand), Provider("fused", loaded)),
        memory_bound=False, floor=1e-2, seconds=30.0, targets={"reference": 0.95},
        single_precision_truth=True, graphs=False,
    )


def _spectral_case() -> Case:
    """The weight of one of SPADE's widest convs: forward and backward.

    Floor: the weight for its singular value, for the division and for the product with its
    gradient, the gradient twice, both results once.
    """

    def make_inputs(setting: Setting) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn((1024, 1024, 3, 3), generator=generator)
        u, v = (torch.rand(n, generator=generator) / n for n in (1024, 9216))
        return weight, u, v

    return Case(
        name="spectral_weight/1024x1024x3x3", direction="step", make_inputs=make_inputs,
        leaves=(0,), moved=lambda inputs, outputs: 7 * nbytes(inputs[0]),
        providers=(Provider("reference", reference.spectral_weight),
                   Provider("compiled", reference.spectral_weight, compile=True),
                   Provider("fused", spectral_weight)),
    )


_MODELS = {"groupdnet_deepfashion": "person", "spade_coco": "street"}
CASES: list[Case] = [make(name, kind) for name, kind in _MODELS.items()
                     for make in (_step_case, _loop_case)] + [_spectral_case()]
"""CPU only: the step's modules and batches live there."""
