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

from smis_kernels import use_backend

from ..data import Collate, Sample, SceneDataset
from ..families import with_options
from ..networks.blocks import settle
from ..networks.semantics import semantics
from ..training import TrainConfig, Trainer, recipe
from ..training.batches import MicroBatch
from .case import Case, Inputs, Provider, Run, Setting
from .networks import kind_of, tiny_options

SIZE = (128, 128)
BATCH = 2


class _MapScenes(SceneDataset):
    """The setting's maps under random pictures."""

    def __init__(self, setting: Setting, kind: str, preset: Any) -> None:
        self.setting, self.kind, self.edges = setting, kind, preset.instance_edge
        self.classes, self.size, self.seed = preset.classes, SIZE, 0

    def __len__(self) -> int:
        return self.setting.maps.count

    def sample(self, index: int, r: Any) -> Sample:
        place = self.setting.at(index)
        noise = torch.rand((3, *SIZE), generator=torch.Generator().manual_seed(index))
        sample: Sample = {"labels": place.labels(self.kind, SIZE, self.classes)[0],
                          "image": noise * 2 - 1, "name": str(index)}
        if self.edges:
            sample["instances"] = place.instances(self.kind, SIZE)[0].int()
        return sample


def _config(name: str, setting: Setting) -> TrainConfig:
    """The published recipe at 128x128, without the perceptual term and with rates of zero.

    So the weights stay as they are and every call computes the same, Adam's pass included.
    """
    config = recipe(name)
    options = {**(tiny_options(name) if setting.tiny else {}), "image_size": SIZE,
               "upsampling": "normal"}
    return replace(
        config, network=with_options(config.network, options, name), init_gain=1.0,
        optimizer=replace(config.optimizer, generator=0.0, discriminator=0.0),
        losses=replace(config.losses, perceptual=0.0),
    )


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


_micro = partial(MicroBatch.of, device=torch.device("cpu"))


def _channels_last(inputs: Inputs) -> Inputs:
    """A trainer of its own whose weights are in channels-last memory: convs pass it on."""
    trainer, samples, *rest = inputs
    twin = Trainer(trainer.config)
    twin.model.load_state_dict(trainer.model.state_dict())
    twin.model.to(memory_format=torch.channels_last)
    return twin, samples, *rest


def _make_inputs(name: str, setting: Setting) -> Inputs:
    """A trainer with published widths, samples, a loader's endless batches, and a picture."""
    config = _config(name, setting)
    trainer = Trainer(config)
    settle(trainer.model)
    scenes = _MapScenes(setting, kind_of(name), config.network)
    order = [i % len(scenes) for i in range(BATCH)]
    samples = [scenes[i] for i in order]
    loader = DataLoader(scenes, batch_sampler=itertools.repeat(order), num_workers=1,
                        collate_fn=Collate(config.network))
    return trainer, samples, _batches(loader), samples[0]["image"]


def _batches(loader: DataLoader[Any]) -> Iterator[MicroBatch]:
    """A generator, so that the worker starts with the first batch."""
    yield from map(_micro, loader)


def _case(name: str, case: str, providers: tuple[Provider, ...], truth: Run, seconds: float,
          **targets: float) -> Case:
    return Case(
        name=f"{name}/{case}_128_batch2", make_inputs=partial(_make_inputs, name),
        providers=providers, memory_bound=False, floor=1e-2, seconds=seconds,
        targets=targets, truth=truth, graphs=False,
    )


def _step_case(name: str) -> Case:
    """Both updates of one step from labels and pictures; the layout is compiled in the call."""
    return _case(name, "training_step", (
        Provider("reference", _reference), Provider("channels_last", _reference, _channels_last),
        Provider("fused", _fused)), _reference, 60.0,
        **({"reference": 2.3, "best": 2.2} if name == "spade_coco" else {"reference": 1.8}))


def _loop_case(name: str) -> Case:
    """What loading costs: our step on a batch at hand (``reference``) and on the loader's next.

    The loader's one worker reads the maps and compiles the layout meanwhile, on the same cores.
    """
    kept: dict[int, MicroBatch] = {}

    def at_hand(trainer: Trainer, samples: list[Sample], *_: Any) -> Tensor:
        if id(samples) not in kept:
            kept.clear()
            kept[id(samples)] = _micro(Collate(trainer.model.preset)(samples))
        return _outcome(trainer, kept[id(samples)])

    def loaded(trainer: Trainer, _: Any, batches: Iterator[MicroBatch], *__: Any) -> Tensor:
        return _outcome(trainer, next(batches))

    return _case(name, "training_with_loader", (
        Provider("reference", at_hand), Provider("fused", loaded)), at_hand, 30.0,
        reference=0.95)


CASES: list[Case] = [make(name) for name in ("groupdnet_deepfashion", "spade_coco")
                     for make in (_step_case, _loop_case)]
"""CPU only: the step's modules and batches live there."""
