"""From label maps on disk to pictures: scenes, codes, and the loop that the command line runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smis_kernels import use_backend

from ..data.build import reads_instances
from ..data.classes import class_colours, class_names
from ..data.sample import image_tensor
from ..data.scenes import sample_scene
from ..families import Pix2pixHDPreset, Preset
from ..io.images import Picture, resize_nearest, resize_picture
from ..io.names import INSTANCES, LABELS, PICTURE, PICTURE_SUFFIXES, map_files, match
from ..io.scene import SceneFiles, read_scene
from ..io.sheet import legend
from .codes import draw_code
from .features import FeatureClusters

# What a model's data set shows: by the model's name, else by its number of classes.
_SCENES: dict[str | int, tuple[str, ...]] = {
    "groupdnet_scenes": ("landscape",), 8: ("person",), 35: ("street",)}


@dataclass(frozen=True)
class Scene:
    """A scene to synthesise: (H, W) labels and, where the model reads them, instance ids.

    ``class_names`` are of all classes where they are known; ``source_size`` is the (height, width)
    that the map had in its file.
    """

    name: str
    labels: NDArray[np.int64]
    instances: NDArray[np.int64] | None
    class_names: tuple[str, ...] = ()
    source_size: tuple[int, int] | None = None

    @property
    def present(self) -> list[int]:
        """The classes in the map, largest first."""
        classes, counts = np.unique(self.labels, return_counts=True)
        return [int(c) for c in classes[np.argsort(-counts)]]

    def class_name(self, index: int) -> str:
        """What a class is called."""
        return self.class_names[index] if self.class_names else f"class {index}"

    @property
    def shown(self) -> str:
        """The classes in the map, in words."""
        names = ((c, self.class_name(c)) for c in sorted(self.present))
        return ", ".join(str(c) if name == f"class {c}" else f"{c} ({name})" for c, name in names)

    def tensors(self, batch: int = 1) -> tuple[Tensor, Tensor | None]:
        """Labels and instance ids, (batch, H, W) each."""
        ids = self.instances
        return (torch.from_numpy(self.labels)[None].repeat(batch, 1, 1),
                None if ids is None else torch.from_numpy(ids)[None].repeat(batch, 1, 1))

    def picture(self, num_classes: int) -> Picture:
        """The label map in display colours."""
        return self.colours(num_classes)[self.labels]

    def legend(self, num_classes: int) -> Picture:
        """What the colours of :meth:`picture` mean, as large as it: classes, largest first."""
        colours = self.colours(num_classes)
        height, width = self.labels.shape
        return legend([(self.class_name(c), colours[c]) for c in self.present], (height, width))

    def colours(self, num_classes: int) -> NDArray[np.uint8]:
        """(num_classes, 3): what :meth:`picture` shows each class in."""
        return class_colours(self.class_names or tuple(map(self.class_name, range(num_classes))))


class LazyScenes(Sequence[Scene]):
    """Scenes on disk, at the model's size: each is read where it is asked for, and not kept.

    Args:
        files: labels, and instances where the model reads them.
        preset: of the model.
        unknown: the class for pixels labelled 255; by default the preset's don't-care class.
        class_names: of all classes, where they are known.
    """

    def __init__(self, files: Sequence[SceneFiles], preset: Preset, unknown: int | None = None,
                 class_names: tuple[str, ...] = ()) -> None:
        self.files, self._preset, self._class_names = list(files), preset, class_names
        self._unknown = preset.dont_care if unknown is None else unknown

    def __len__(self) -> int:
        return len(self.files)

    @property
    def read(self) -> list[Path]:
        """The files of all scenes."""
        return [Path(path) for of in self.files for path in (of.labels, of.instances) if path]

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> LazyScenes: ...
    def __getitem__(self, index: int | slice) -> Scene | LazyScenes:
        if isinstance(index, slice):
            return LazyScenes(self.files[index], self._preset, self._unknown, self._class_names)
        preset = self._preset
        scene = read_scene(self.files[index], preset.classes, unknown=self._unknown,
                           option="--unknown")
        assert scene.labels is not None
        ids = scene.instances
        return Scene(
            scene.name, resize_nearest(scene.labels, preset.image_size),
            None if ids is None else resize_nearest(ids, preset.image_size),
            self._class_names, scene.size,
        )


def read_scenes(labels: str | Path, instances: str | Path | None, preset: Preset,
                unknown: int | None = None, class_names: tuple[str, ...] = ()) -> LazyScenes:
    """The scenes in a label map or a folder of them, resized to the model's size.

    Args:
        labels: a PNG, or a folder of PNGs, searched with its subfolders.
        instances: the same for instance ids; files of a folder are matched by scene, that is by
            their names without endings such as ``_labelIds`` and ``_instanceIds``.
        preset: of the model.
        unknown: the class for pixels labelled 255; by default the preset's don't-care class.
        class_names: of all classes, where they are known.

    Raises:
        FileNotFoundError: a path, or the instance map of a scene, is missing.
        ValueError: the model reads instances and none are given, or it reads none and they are;
            files of another role, or two of one scene.
        ImageError: (when a scene is read) a file is not an index map in range.
    """
    maps = map_files("labels", labels, LABELS)
    ids: list[Path | None] = [None] * len(maps)
    if instances is not None and not reads_instances(preset):
        raise ValueError("instances: this model reads no instance maps; leave --instances out")
    if reads_instances(preset):
        if instances is None:
            raise ValueError("instances: this model reads instance maps; give --instances")
        ids = [*match("instances", list(maps), map_files("instances", instances, INSTANCES))]
    if unknown is not None and not 0 <= unknown < preset.classes:
        raise ValueError(f"unknown: expected a class 0..{preset.classes - 1}, got {unknown}")
    return LazyScenes([SceneFiles(name, labels=path, instances=own)
                       for (name, path), own in zip(maps.items(), ids, strict=True)],
                      preset, unknown, class_names)


def sample_scenes(preset: Preset, count: int, seed: int = 0, model: str = "") -> list[Scene]:
    """``count`` of the package's own scenes, of the kinds that the model's data set shows."""
    kinds = _SCENES.get(model) or _SCENES.get(preset.classes, ("indoor", "street"))
    scenes = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        scene = sample_scene(kind, *preset.image_size, preset.classes, seed + i)
        ids = scene.instances.astype(np.int64) if reads_instances(preset) else None
        names = class_names(model, preset.classes) if model else ()
        scenes.append(Scene(f"{kind}_{seed + i}", scene.labels.astype(np.int64), ids, names))
    return scenes


def semantics(model: Any, scene: Scene) -> Tensor:
    """The model's input planes of one scene."""
    return model.semantics(*scene.tensors())


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


def draw_input(model: Any, scene: Scene, seed: int,
               clusters: FeatureClusters | None = None) -> Tensor | None:
    """What the model reads besides the semantics: instance features, a code, or None."""
    if clusters is None:
        return draw_code(model, seed)
    assert scene.instances is not None
    planes = clusters.sample(torch.from_numpy(scene.instances)[None], seed=seed)
    return planes.to(next(model.parameters()))


def read_photographs(images: str | Path, instances: str | Path, size: tuple[int, int],
                     ) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of image (1, 3, H, W) in [-1, 1] and instance ids (1, H, W), matched by scene.

    Raises:
        FileNotFoundError: a path, or the instance map of a scene, is missing.
        ImageError: a file is not what it was given as.
    """
    found = map_files("images", images, PICTURE, PICTURE_SUFFIXES)
    ids = match("instances", list(found), map_files("instances", instances, INSTANCES))
    for (name, path), own in zip(found.items(), ids, strict=True):
        scene = read_scene(SceneFiles(name, path, instances=own), 0)
        assert scene.picture is not None and scene.instances is not None
        yield (image_tensor(resize_picture(scene.picture, size))[None],
               torch.from_numpy(resize_nearest(scene.instances, size))[None])


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
    """Give untrained weights pictures in which the scene shows: they would be grey otherwise.

    One pass in training mode sets the running statistics of every norm to those of its input and
    scales the convs of gamma, beta and the image. For random weights only: a trained network's
    statistics and scales are part of its checkpoint.
    """
    generator = model.generator
    norms = [m for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    deviations = {"mlp_gamma": 0.4, "mlp_beta": 0.8, "conv_img": 0.6}
    for norm in norms:
        norm.momentum = 1.0
    try:
        generator.train()
        with use_backend("reference"), ExitStack() as hooks:  # by which each conv is called
            for name, module in generator.named_modules():
                if deviation := deviations.get(name.rpartition(".")[2]):
                    hooks.enter_context(module.register_forward_hook(_scale_to(deviation)))
            generator(planes, z)
    finally:
        generator.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
