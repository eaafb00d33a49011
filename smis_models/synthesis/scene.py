"""From label maps on disk to pictures: layouts, codes, and the loop that the command line runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smis_kernels import use_backend

from ..data.scenes import palette, sample_scene
from ..families import Pix2pixHDPreset, Preset
from ..io.images import (
    PICTURE_SUFFIXES,
    SUFFIXES,
    Picture,
    read_instances,
    read_labels,
    read_picture,
    scene_name,
    to_pictures,
)
from .features import FeatureClusters

# What a model's data set shows: by the model's name, else by its number of classes.
_SCENES: dict[str | int, tuple[str, ...]] = {
    "groupdnet_scenes": ("landscape",), 8: ("person",), 35: ("street",)}


@dataclass(frozen=True)
class Layout:
    """A scene to synthesise: (H, W) labels and, where the model reads them, instance ids.

    ``class_names`` are of all classes where they are known.
    """

    name: str
    labels: NDArray[np.int64]
    instances: NDArray[np.int64] | None
    class_names: tuple[str, ...] = ()

    @property
    def present(self) -> list[int]:
        """The classes in the map, largest first."""
        classes, counts = np.unique(self.labels, return_counts=True)
        return [int(c) for c in classes[np.argsort(-counts)]]

    def class_name(self, index: int) -> str:
        """What a class is called."""
        return self.class_names[index] if self.class_names else f"class {index}"

    def tensors(self, batch: int = 1) -> tuple[Tensor, Tensor | None]:
        """Labels and instance ids, (batch, H, W) each."""
        ids = self.instances
        return (torch.from_numpy(self.labels)[None].repeat(batch, 1, 1),
                None if ids is None else torch.from_numpy(ids)[None].repeat(batch, 1, 1))

    def picture(self, num_classes: int) -> Picture:
        """The label map in display colours."""
        return palette(num_classes)[self.labels]


def map_files(name: str, path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """A file, or the files of a folder by name; errors speak of the option ``name``."""
    if not path.exists():
        raise FileNotFoundError(f"{name}: {path} does not exist; give a PNG or a folder of PNGs")
    if path.is_file():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
    if not found:
        raise FileNotFoundError(f"{name}: no {', '.join(suffixes)} file in {path}")
    return found


def _instances_of(paths: Sequence[Path], instances: str | Path) -> dict[str, Path]:
    """The instance map of every scene in ``paths``."""
    given = map_files("instances", Path(instances))
    single = len(paths) == len(given) == 1
    ids = {scene_name(paths[0] if single else p): p for p in given}
    for path in paths:
        if scene_name(path) not in ids:
            scene = scene_name(path)
            raise FileNotFoundError(f"instances: no map of scene {scene!r} in {instances}")
    return ids


def read_layouts(labels: str | Path, instances: str | Path | None, preset: Preset,
                 unknown: int | None = None) -> list[Layout]:
    """The layouts in a label map or a folder of them, resized to the model's size.

    Args:
        labels: a PNG, or a folder of PNGs.
        instances: the same for instance ids; files of a folder are matched by scene, that is by
            their names without endings such as ``_labelIds`` and ``_instanceIds``.
        preset: of the model.
        unknown: the class for pixels labelled 255; by default the preset's don't-care class.

    Raises:
        FileNotFoundError: a path, or the instance map of a scene, is missing.
        ImageError: a file is not an index map in range.
        ValueError: the model reads instances and none are given.
    """
    paths = map_files("labels", Path(labels))
    ids: dict[str, Path] = {}
    if preset.instance_edge:
        if instances is None:
            raise ValueError("instances: this model reads instance maps; give --instances")
        ids = _instances_of(paths, instances)
    unknown = preset.dont_care if unknown is None else unknown
    return [
        Layout(
            scene_name(path), read_labels(path, preset.classes, preset.image_size, unknown),
            read_instances(ids[scene_name(path)], preset.image_size) if ids else None,
        )
        for path in paths
    ]


def sample_layouts(preset: Preset, count: int, seed: int = 0, model: str = "") -> list[Layout]:
    """``count`` of the package's own scenes, of the kinds that the model's data set shows."""
    kinds = _SCENES.get(model) or _SCENES.get(preset.classes, ("indoor", "street"))
    layouts = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        scene = sample_scene(kind, *preset.image_size, preset.classes, seed + i)
        ids = scene.instances.astype(np.int64) if preset.instance_edge else None
        names = scene.names if kind == "landscape" else ()
        layouts.append(Layout(f"{kind}_{seed + i}", scene.labels.astype(np.int64), ids, names))
    return layouts


def semantics(model: Any, layout: Layout) -> Tensor:
    """The model's input planes of one layout."""
    planes: Tensor = model.semantics(*layout.tensors())
    return planes


def draw_code(model: Any, seed: int) -> Tensor:
    """A latent code (1, 8C, h, w) from N(0, 1); the same seed, the same code."""
    code: Tensor = model.generator.sample_latent(1, torch.Generator().manual_seed(seed))
    return code


def drawn_code(model: Any, seed: int) -> Tensor:
    """As :func:`draw_code`, of a model that must read one.

    Raises:
        ValueError: a model that reads none.
    """
    z: Tensor | None = draw_code(model, seed)
    if z is None:
        raise ValueError(f"model: expected one with a latent code, got {model.name}, which paints "
                         "one picture for a layout")
    return z


def read_clusters(preset: Preset, path: str | Path | None) -> FeatureClusters | None:
    """The clusters of instance features that a model reads, or None for a model that reads none.

    Raises:
        ValueError: a file is missing, or given where none is read, or has other channels.
    """
    reads = isinstance(preset, Pix2pixHDPreset) and preset.features
    if not reads:
        if path is not None:
            raise ValueError("features: this model reads no instance features; leave them out")
        return None
    if path is None:
        raise ValueError("features: this model reads instance features; give --features "
                         "(smis features makes the file)")
    clusters = FeatureClusters.load(path)
    assert isinstance(preset, Pix2pixHDPreset)
    if clusters.channels != preset.feature_channels:
        raise ValueError(f"features: expected {preset.feature_channels} channels, got "
                         f"{clusters.channels} in {path}")
    return clusters


def draw_input(model: Any, layout: Layout, seed: int,
               clusters: FeatureClusters | None = None) -> Tensor | None:
    """What the model reads besides the semantics: instance features, a code, or None."""
    if clusters is None:
        return draw_code(model, seed)
    assert layout.instances is not None
    planes = clusters.sample(torch.from_numpy(layout.instances)[None], seed=seed)
    return planes.to(next(model.parameters()))


def read_photographs(images: str | Path, instances: str | Path, size: tuple[int, int],
                     ) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of image (1, 3, H, W) in [-1, 1] and instance ids (1, H, W), matched by scene.

    Raises:
        FileNotFoundError: a path, or the instance map of a scene, is missing.
        ImageError: a file is not what it was given as.
    """
    paths = map_files("images", Path(images), PICTURE_SUFFIXES)
    ids = _instances_of(paths, instances)
    for path in paths:
        picture = torch.from_numpy(read_picture(path, size).copy()).permute(2, 0, 1)[None]
        map_of_ids = read_instances(ids[scene_name(path)], size)
        yield picture / 127.5 - 1, torch.from_numpy(map_of_ids)[None]


def resample_class(model: Any, z: Tensor, index: int, seed: int) -> Tensor:
    """``z`` with the code of class ``index`` drawn anew and all others held."""
    channels = model.generator.class_channels(index)
    changed = z.clone()
    changed[:, channels] = draw_code(model, seed)[:, channels]
    return changed


def morph(start: Tensor, end: Tensor, t: float) -> Tensor:
    """From ``start`` (t = 0) to ``end`` (t = 1), with the variance of a code all the way.

    .. math:: z = ((1 - t) z_0 + t z_1) / \\sqrt{(1 - t)^2 + t^2}
    """
    mixed: Tensor = torch.lerp(start, end, t) / ((1 - t) ** 2 + t**2) ** 0.5
    return mixed


@torch.no_grad()
def pictures(model: Any, planes: Tensor, codes: Sequence[Tensor | None]) -> list[Picture]:
    """One picture per code."""
    return [picture for z in codes for picture in to_pictures(model(planes, z))]


def _scale_to(deviation: float) -> Any:
    """A forward hook that scales a conv, for good: each output channel gets that deviation."""

    def hook(conv: torch.nn.Conv2d, _: Any, output: Tensor) -> Tensor:
        mean = output.mean(dim=(0, 2, 3))
        # Bounded: on a map of a single class the channels barely vary.
        scale = (deviation / output.std(dim=(0, 2, 3)).clamp_min(1e-12)).clamp_max(1e3)
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        assert conv.bias is not None
        conv.bias.copy_((conv.bias - mean) * scale)
        return (output - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)

    return hook


@torch.no_grad()
def calibrate(model: Any, planes: Tensor, z: Tensor | None) -> None:
    """Give untrained weights pictures in which the layout shows: they would be grey otherwise.

    One pass in training mode sets the running statistics of every norm to those of its input and
    scales the convs of gamma, beta and the image. For random weights only: a trained network's
    statistics and scales are part of its checkpoint.
    """
    generator = model.generator
    norms = [m for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    deviations = {"mlp_gamma": 0.4, "mlp_beta": 0.8, "conv_img": 0.6}
    hooks = [
        module.register_forward_hook(_scale_to(deviations[name.rpartition(".")[2]]))
        for name, module in generator.named_modules() if name.rpartition(".")[2] in deviations
    ]
    for norm in norms:
        norm.momentum = 1.0
    try:
        generator.train()
        with use_backend("reference"):  # which calls each conv, so that its hook runs
            generator(planes, z)
    finally:
        generator.eval()
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
