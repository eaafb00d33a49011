"""A judge of generated landscapes: which class a pixel shows, and which mode a region shows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.images import write_atomically
from .generated import GeneratedScenes
from .scenes import LANDSCAPE, MODE_NAMES

_FILE = Path(__file__).with_name("scene_classifier.npz")
_MODES = len(MODE_NAMES[0])  # every class has as many
_OUTPUTS = len(LANDSCAPE) * _MODES
_HIDDEN = (64, 64)


@dataclass(frozen=True)
class Reading:
    """What pictures show.

    Attributes:
        labels: (N, H, W) int64, the class that each pixel looks like.
        modes: (N, 8) int64, the mode (of ``MODE_NAMES[class]``) that the class's region looks like;
            -1 where the class has no pixel.
        confidence: (N, 8) float32, the mean probability of that class in that mode over the region:
            near 1 where it looks as drawn, near 0 where it looks like something else.
    """

    labels: Tensor
    modes: Tensor
    confidence: Tensor


def pixel_features(images: Tensor) -> Tensor:
    """Colour and texture about each pixel: (N, 3, H, W) in [-1, 1] -> (N, H, W, 20).

    The colour; its means over two windows; in both windows the deviation of each channel and the
    strength of horizontal and vertical steps of the brightness; and the scale of the picture, in
    proportion to which the windows are chosen.
    """
    n, _, h, w = images.shape
    size = max(h, w)
    grey = images.mean(1, keepdim=True)
    steps = torch.cat([
        F.pad(grey, (0, 1, 0, 0), mode="replicate").diff(dim=3).abs(),
        F.pad(grey, (0, 0, 0, 1), mode="replicate").diff(dim=2).abs(),
    ], 1)
    features = [images, images.new_full((n, 1, h, w), math.log2(size / 128))]
    for reach in (1.5, 4):
        r = max(1, round(reach * size / 128))

        def mean(x: Tensor, r: int = r) -> Tensor:
            return F.avg_pool2d(x, 2 * r + 1, stride=1, padding=r, count_include_pad=False)

        average = mean(images)
        spread = (mean(images.square()) - average.square()).clamp_min(0).sqrt()
        features += [average, spread, mean(steps)]
    return torch.cat(features, 1).permute(0, 2, 3, 1)


def _train(features: Tensor, targets: Tensor, epochs: int, seed: int,
           ) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the network; the first layer takes features as they are."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = features.mean(0), features.std(0)
    scale[scale < 1e-4] = 1.0  # the size, where all scenes have one
    features = (features - mean) / scale
    layers = []
    for inputs, outputs in pairwise((features.shape[1], *_HIDDEN, _OUTPUTS)):
        weight = torch.randn(inputs, outputs, generator=generator) * (2 / inputs) ** 0.5
        layers.append((weight.requires_grad_(), torch.zeros(outputs, requires_grad=True)))
    batch, total = 512, epochs * len(features)
    optimizer = torch.optim.Adam([x for layer in layers for x in layer], lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total // batch)
    for _ in range(epochs):
        for chosen in torch.randperm(len(features), generator=generator).split(batch):
            loss = F.cross_entropy(_logits(layers, features[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    (weight, bias), *rest = [(w.detach(), b.detach()) for w, b in layers]
    return [(weight / scale[:, None], bias - (mean / scale) @ weight), *rest]


def _logits(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    for i, (weight, bias) in enumerate(layers):
        x = (x.relu() if i else x) @ weight.to(x.device) + bias.to(x.device)
    return x


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError("images: expected floats (N, 3, H, W) in [-1, 1], got "
                         f"{images.dtype} {tuple(images.shape)}")


class SceneClassifier:
    """Reads classes and appearance modes off pictures of landscapes, by colour and texture.

    A small network of :func:`pixel_features` gives the probability of each (class, mode); position
    and shape play no part, so a picture is judged by what it shows. :meth:`shipped` is fitted on
    the split "train" at sizes from 64 to 256; a mode of a region is the one of its class with the
    largest mean log-probability among the class's modes.

    Example:
        >>> from smis_models.data import GeneratedScenes
        >>> scene = GeneratedScenes(1, 64)[0]
        >>> reading = SceneClassifier.shipped().read(scene["image"][None], scene["labels"][None])
        >>> float((reading.labels == scene["labels"]).double().mean()) > 0.9
        True
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._weights = list(weights)  # of each layer: (inputs, outputs), (outputs,)

    @classmethod
    def load(cls, path: str | Path = _FILE) -> SceneClassifier:
        """Read what :meth:`save` wrote."""
        with np.load(path) as file:
            return cls([(torch.from_numpy(file[f"weight{i}"]), torch.from_numpy(file[f"bias{i}"]))
                        for i in range(len(file.files) // 2)])

    @classmethod
    @cache
    def shipped(cls) -> SceneClassifier:
        """The one that comes with the package."""
        return cls.load()

    @classmethod
    def fit(cls, scenes: int = 800, pixels: int = 300, *, sizes: Sequence[int] = (64, 96, 128, 256),
            epochs: int = 25, seed: int = 0) -> SceneClassifier:
        """Fit anew, as after a change of the drawings.

        A third of the scenes is as drawn, a third blurred a little, a third blurred and noisy, as a
        generator's pictures are.

        Args:
            scenes: how many, of the split "train".
            pixels: how many of each; classes by the root of their area.
            sizes: of the scenes, in turn.
            epochs: over all pixels.
            seed: of the choice of pixels and of the network.
        """
        r = np.random.default_rng(seed)
        sets = [GeneratedScenes(scenes, size) for size in sizes]
        rows, targets = [], []
        for index in range(scenes):
            scene = sets[index % len(sets)][index]
            image = scene["image"][None]
            spoil = index // len(sets) % 3
            if spoil:
                image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
            if spoil == 2:
                image = image + torch.from_numpy(r.normal(0, 0.06, image.shape)).float()
            labels = scene["labels"].flatten().numpy()
            share = np.bincount(labels, minlength=len(LANDSCAPE))[labels] ** -0.5
            chosen = torch.from_numpy(r.choice(len(labels), pixels, p=share / share.sum()))
            rows.append(pixel_features(image).flatten(0, 2)[chosen])
            of_class = scene["labels"].flatten()[chosen].long()
            targets.append(of_class * _MODES + scene["modes"][of_class])
        return cls(_train(torch.cat(rows), torch.cat(targets), epochs, seed))

    def save(self, path: str | Path = _FILE) -> Path:
        """Write the weights as .npz, whole or not at all."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {}
        for i, (weight, bias) in enumerate(self._weights):
            arrays |= {f"weight{i}": weight.numpy(), f"bias{i}": bias.numpy()}
        np.savez_compressed(buffer, **arrays)
        return write_atomically(path, buffer.getvalue())

    def log_probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, H, W, 8, 4) float32, of each class in each mode."""
        _check_images(images)
        x = _logits(self._weights, pixel_features(images.detach().float()))
        return x.log_softmax(-1).unflatten(-1, (len(LANDSCAPE), _MODES))

    @torch.no_grad()
    def read(self, images: Tensor, labels: Tensor | None = None) -> Reading:
        """Read pictures; the regions whose modes are told are those of ``labels``.

        Args:
            images: (N, 3, H, W) floats in [-1, 1].
            labels: (N, H, W) the layout that was asked for; by default the one that is read.

        Raises:
            ValueError: other shapes.
        """
        _check_images(images)
        n, _, h, w = images.shape
        if labels is not None and labels.shape != (n, h, w):
            raise ValueError(f"labels: expected {(n, h, w)} as the images, got "
                             f"{tuple(labels.shape)}")
        read = [self._read(images[i], None if labels is None else labels[i]) for i in range(n)]
        return Reading(*(torch.stack(parts) for parts in zip(*read, strict=True)))

    def _read(self, image: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One picture at a time: the features of a batch would be large."""
        log = self.log_probabilities(image[None])[0]
        seen = log.logsumexp(-1).argmax(-1)
        regions = (seen if labels is None else labels.to(seen)).flatten()
        own = log.flatten(0, 1)[torch.arange(len(regions), device=log.device), regions]
        member = F.one_hot(regions, len(LANDSCAPE)).float()  # [pixels, classes]
        area = member.sum(0)
        modes = (member.T @ own.log_softmax(-1)).argmax(-1)
        chance = (member.T @ own.exp()) / area.clamp_min(1)[:, None]
        confidence = chance.gather(-1, modes[:, None]).squeeze(-1)
        return seen, modes.masked_fill(area == 0, -1), confidence
