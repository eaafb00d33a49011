"""Any data set by name, prepared for a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..families import LatentPreset, Preset, UNetPreset
from ..io.choices import unknown_name
from ..io.images import ImageError, image_size
from ..io.scene import SceneFiles
from .files import FileScenes
from .generated import GeneratedScenes
from .listing import FOLDER_FORMATS, list_scenes
from .preprocess import Mode, Preprocess
from .sample import SceneDataset
from .scenes import LANDSCAPE

DATASETS = ("scenes", *FOLDER_FORMATS)
_ENLARGED = 286 / 256  # load size over crop size, where the published scripts crop


def reads_instances(preset: Preset) -> bool:
    """Whether a model of ``preset`` reads instance maps."""
    return preset.instance_edge or bool(getattr(preset, "features", False))


def published_preprocess(name: str, size: tuple[int, int], *, augment: bool = True) -> Preprocess:
    """The published preprocessing of a data set, scaled to ``size`` (height, width).

    Cityscapes: ``fixed``. DeepFashion: ``resize``. ADE20K, COCO-Stuff, and any folder:
    ``resize_and_crop`` from 286/256 of the size for training, from the size itself otherwise.
    """
    if name == "cityscapes":
        return Preprocess("fixed", size, augment=augment)
    if name == "deepfashion":
        return Preprocess("resize", size, augment=augment)
    load = (round(size[0] * _ENLARGED), round(size[1] * _ENLARGED)) if augment else size
    return Preprocess("resize_and_crop", size, load, augment=augment)


def _overridden(standard: Preprocess, mode: Mode | None, load: tuple[int, int] | None,
                flip: bool) -> Preprocess:
    chosen = mode or standard.mode
    if load is None and chosen.startswith("resize") and chosen.endswith("crop"):
        load = standard.load
    return Preprocess(chosen, standard.size, load, augment=standard.augment, flip=flip)


def build_dataset(name: str, root: str | Path | None, preset: Preset, split: str = "train", *,
                  count: int = 1000, augment: bool | None = None, mode: Mode | None = None,
                  load: tuple[int, int] | None = None, flip: bool = True,
                  unknown: int | None = None, instances: bool | None = None, seed: int = 0,
                  option: str = "--unknown") -> SceneDataset:
    """A data set by name, at the size and with the classes of a model.

    Args:
        name: "scenes" (generated as they are read), "cityscapes", "ade20k", "coco_stuff",
            "deepfashion", or "folder".
        root: its folder, as :func:`list_scenes` tells; None for "scenes".
        preset: of the model: classes, don't-care class, size, whether it reads instances.
        split: "train", or "val" or "test".
        count: number of generated scenes.
        augment: whether crop and mirroring are drawn; by default for "train" only. Generated scenes
            are never augmented: ask for more of them.
        mode, load: a preprocess mode, and the (height, width) it resizes to, other than published.
        flip: whether augmentation mirrors.
        unknown: the class of pixels labelled 255, if not the preset's don't-care class.
        instances: whether instance maps are read; by default where the model reads them.
        seed: of the augmentation, or of the generated scenes.
        option: what the user can give ``unknown`` by, for errors.

    Raises:
        ValueError: an unknown name or split, a preset with too few classes, unpaired files.
        FileNotFoundError: a missing folder.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from smis_models import create_model
        >>> from smis_models.data import Collate
        >>> preset = create_model("groupdnet_scenes", device="meta").preset
        >>> dataset = build_dataset("scenes", None, preset, count=8)
        >>> loader = DataLoader(dataset, batch_size=2, collate_fn=Collate(preset))
        >>> len(loader)
        4
    """
    if name not in DATASETS:
        raise ValueError(unknown_name("data set", DATASETS, name, "one of"))
    if name == "scenes":
        if root is not None:
            raise ValueError("root: the scenes are generated and lie in no folder; leave it out, "
                             "or take the data set 'folder' for written ones")
        if preset.classes != len(LANDSCAPE):
            raise ValueError(f"preset: the generated scenes have {len(LANDSCAPE)} classes, the "
                             f"model {preset.classes}; choose a model of {len(LANDSCAPE)}")
        return GeneratedScenes(count, preset.image_size, split, seed)
    if root is None:
        raise ValueError(f"root: expected the folder of {name}; got None")
    augment = split == "train" if augment is None else augment
    standard = published_preprocess(name, preset.image_size, augment=augment)
    wanted = reads_instances(preset) if instances is None else instances
    listing = list_scenes(name, root, split, instances=wanted)
    if listing.problems:
        more = f" (and {len(listing.problems) - 1} more)" if len(listing.problems) > 1 else ""
        raise ValueError(f"{listing.problems[0]}{more}; `smis doctor {root} --dataset {name}` "
                         "lists all")
    preprocess = _overridden(standard, mode, load, flip)
    _check_sizes(listing.records, preprocess, preset)
    return FileScenes(
        listing.records, preset.classes, preprocess,
        unknown=preset.dont_care if unknown is None else unknown, seed=seed, option=option,
    )


def _check_sizes(records: Sequence[SceneFiles], preprocess: Preprocess, preset: Preset) -> None:
    """Refuse a mode by which a scene comes at a size that the network does not paint.

    Where the scenes decide their sizes, or may be too small, the heads of all label maps are read.
    """
    sizes: dict[tuple[int, int], str | Path | None] = {}
    if preprocess.mode in ("fixed", "resize", "resize_and_crop"):
        assert preprocess.output_size is not None
        sizes[preprocess.output_size] = None
    else:
        r = np.random.default_rng(0)
        for record in records:
            assert record.labels is not None
            source = image_size(record.labels)
            try:
                planned = preprocess.plan(source, r).resized
            except ValueError as error:
                raise ImageError(f"{record.labels}: {error}") from error
            sizes.setdefault(preprocess.output_size or planned, record.labels)
    step, painted = preset.size_step, "x".join(map(str, preset.image_size))
    one_size = isinstance(preset, (LatentPreset, UNetPreset))
    if not one_size:
        painted = f"multiples of {step} from {2 * step} on"
    for size, file in sizes.items():
        if size != preset.image_size if one_size else any(s % step or s < 2 * step for s in size):
            of = "all scenes" if file is None else str(file)
            raise ValueError(f"data.mode: {preprocess.mode} brings {of} to {size[0]}x{size[1]} "
                             f"(height x width), the network paints {painted}; choose a mode that "
                             "resizes or crops")
