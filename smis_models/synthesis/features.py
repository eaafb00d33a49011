"""Instance features of pix2pixHD: encode a data set, cluster each class, sample at synthesis."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smis_kernels import instance_mean_table

from ..io.extras import cure
from ..io.files import file_hash
from ..io.images import check_pictures, write_atomically
from ..io.seeds import derived_seed
from ..networks.semantics import as_maps

CLUSTERS = 10
_AREA_UNIT = 32  # an instance counts from half of the image's 1/32 on
THINGS = 1000  # ids from here on are class * 1000 + number
_PREFIX = "class_"

Centers = NDArray[np.float32]


class FeatureError(ValueError):
    """A file of clusters that cannot be used; the message names file and cure."""


def class_of(ids: Tensor) -> Tensor:
    """The class of an instance id: the id itself below 1000, else its thousands."""
    return torch.where(ids < THINGS, ids, ids // THINGS)


@torch.no_grad()
def encode_features(
    encoder: Any, scenes: Iterable[tuple[Tensor, Tensor]],
    step: Callable[[str], None] = lambda what: None,
) -> dict[int, Centers]:
    """The mean feature of every instance of a data set that is large enough, by class.

    Small instances are left out as published: those of at most 1/64 of the image.

    Args:
        encoder: a :class:`smis_models.families.pix2pixhd.FeatureEncoder`, in eval mode.
        scenes: pairs of image (N, 3, H, W) in [-1, 1] and instance ids (N, H, W).
        step: called after each pair with a few words, for a progress bar.

    Returns:
        Class -> (instances, channels), in the order of the scenes.

    Example:
        >>> from smis_models import create_model
        >>> encoder = create_model("pix2pixhd_cityscapes_features", part="encoder", nef=8).eval()
        >>> image, ids = torch.rand(1, 3, 64, 128), torch.full((1, 64, 128), 26001)
        >>> {label: mean.shape for label, mean in encode_features(encoder, [(image, ids)]).items()}
        {26: (1, 3)}
    """
    found: dict[int, list[Centers]] = defaultdict(list)
    for image, ids in scenes:
        check_pictures(image, name="image")
        table = instance_mean_table(encoder.features(image), ids)
        unit = image.shape[2] * image.shape[3] // _AREA_UNIT
        large = table.area > 0.5 * unit
        classes = class_of(table.id[large]).tolist()
        for label, mean in zip(classes, table.mean[large].float().cpu().numpy(), strict=True):
            found[label].append(mean)
        step(f"{len(classes)} instances")
    return {label: np.stack(found[label]) for label in sorted(found)}


def clustering() -> Any:
    """scikit-learn's K-means.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"clustering needs scikit-learn: {cure('models', 'scikit-learn')}", name="sklearn"
        ) from error
    return KMeans


@dataclass(frozen=True)
class FeatureClusters:
    """Cluster centers of every class: class -> (clusters, channels).

    Source: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with
    Conditional GANs", 2018, section 3.4.

    Example:
        >>> features = {26: np.array([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]], np.float32)}
        >>> clusters = FeatureClusters.fit(features)  # of encode_features
        >>> path = clusters.save("features.npz")
        >>> clusters.sample(torch.full((1, 64, 128), 26001), seed=1).shape
        torch.Size([1, 3, 64, 128])
    """

    centers: Mapping[int, Centers]
    source: Mapping[str, str] | None = field(default=None, compare=False)
    """The file that they were read from, and its hash: for records."""

    def __post_init__(self) -> None:
        if not self.centers:
            raise FeatureError("centers: expected at least one class, got none")
        for label, array in self.centers.items():
            if label < 0 or array.ndim != 2 or 0 in array.shape or not np.isfinite(array).all():
                raise FeatureError(
                    f"centers: expected finite (clusters, channels) for each class, got shape "
                    f"{array.shape} for class {label}"
                )
        widths = {array.shape[1:] for array in self.centers.values()}
        if len(widths) > 1:
            raise FeatureError("centers: expected the same channels for every class, got "
                               + ", ".join(str(w[0]) for w in sorted(widths)))

    @property
    def channels(self) -> int:
        """Channels of a feature."""
        return int(next(iter(self.centers.values())).shape[1])

    def count(self, instance: int) -> int:
        """How many clusters the class of an instance has."""
        label = instance if instance < THINGS else instance // THINGS
        return len(self.centers.get(label, ()))

    @classmethod
    def fit(cls, features: Mapping[int, Centers], clusters: int = CLUSTERS) -> FeatureClusters:
        """K-means for each class, K = min(clusters, instances), with the published seed.

        Raises:
            FeatureError: no features.
            ModuleNotFoundError: scikit-learn is missing.
        """
        if clusters < 1:
            raise ValueError(f"clusters: expected at least 1, got {clusters}")
        if not features:
            raise FeatureError("features: no instance is larger than 1/64 of its image; "
                               "give larger scenes")
        k_means = clustering()
        return cls({
            label: k_means(min(clusters, len(rows)), n_init=10, random_state=0)
            .fit(rows).cluster_centers_.astype(np.float32)
            for label, rows in features.items()
        })

    def save(self, path: str | Path) -> Path:
        """Write an ``.npz`` file of plain arrays, ``class_<label>`` each: all of it or nothing."""
        path = Path(path)
        if path.suffix != ".npz":
            raise FeatureError(f"path: expected a name ending in .npz, got {path.name!r}")
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"{_PREFIX}{k}": array for k, array in self.centers.items()}
        np.savez(buffer, **arrays)
        return write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> FeatureClusters:
        """Read :meth:`save`'s file, or an official ``.npy``; no code in either is run.

        Raises:
            FeatureError: no such file, another kind of file, or code in it.
        """
        path = Path(path)
        if not path.is_file():
            raise FeatureError(f"features: {path} is no file; make one with smis features")
        source = {"features": str(path), "features_sha256": file_hash(path)}
        if path.suffix == ".npy":
            return cls(_read_official(path), source)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = list(arrays)
                if not all(n.startswith(_PREFIX) and n[len(_PREFIX):].isdecimal() for n in names):
                    raise FeatureError(f"features: expected arrays class_<label> in {path}, got "
                                       f"{', '.join(names[:3])}")
                return cls({int(n[len(_PREFIX):]): np.asarray(arrays[n], np.float32)
                            for n in names}, source)
        except Exception as error:  # damaged bytes raise many kinds
            if isinstance(error, FeatureError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
            raise FeatureError(
                f"features: {path} is no file of clusters ({reason}); "
                "make one with smis features"
            ) from error

    def sample(self, instances: Tensor, *, seed: int = 0, index: int | None = None,
               chosen: Mapping[int, int] | None = None) -> Tensor:
        """Feature planes: one cluster for each instance of each image.

        An instance's draw depends on the seed, the image's place in the batch and its id alone, so
        that an edit elsewhere in the map changes nothing of it. Instances of a class without
        clusters get zeros, as published.

        Args:
            instances: ids (N, H, W) or (N, 1, H, W), integers.
            seed: of the draws, which are the same on every device.
            index: the cluster of every instance (counted from 0, modulo their number), not drawn.
            chosen: instance id -> cluster, for single instances.

        Returns:
            (N, channels, H, W), fp32, on the device of ``instances``.

        Raises:
            TypeError, ValueError: ids that are no integers, negative or of another shape; a chosen
                instance that is not in the map, or has no such cluster.

        Example:
            >>> clusters = FeatureClusters({26: np.array([[0.25], [0.75]], np.float32)})
            >>> ids = torch.tensor([[[26001, 26002]]])
            >>> clusters.sample(ids, seed=3, chosen={26001: 0, 26002: 1}).tolist()
            [[[[0.25, 0.75]]]]
        """
        maps = as_maps("instances", instances)
        if int(maps.min()) < 0:
            raise ValueError(f"instances: expected ids from 0 on, got {int(maps.min())}; renumber "
                             "the instances first")
        chosen = dict(chosen or {})
        planes, seen = [], set()
        for image, ids in enumerate(maps):
            present, where = ids.unique(return_inverse=True)
            rows = np.zeros((len(present), self.channels), np.float32)
            for row, instance in enumerate(present.tolist()):
                seen.add(instance)
                label = instance if instance < THINGS else instance // THINGS
                centers = self.centers.get(label)
                if centers is None:
                    self._check_chosen(instance, chosen, 0)
                    continue
                pick = (derived_seed(seed, image, instance) if index is None else index
                        ) % len(centers)
                self._check_chosen(instance, chosen, len(centers))
                rows[row] = centers[chosen.get(instance, pick)]
            planes.append(torch.from_numpy(rows).to(where.device)[where].permute(2, 0, 1))
        missing = [instance for instance in chosen if instance not in seen]
        if missing:
            raise ValueError(f"chosen: expected instances of the map, got {missing[0]}")
        return torch.stack(planes)

    @staticmethod
    def _check_chosen(instance: int, chosen: Mapping[int, int], count: int) -> None:
        if instance in chosen and not 0 <= chosen[instance] < count:
            have = f"a cluster 0..{count - 1}" if count else "no choice: its class has no clusters"
            raise ValueError(f"chosen: expected {have} for instance {instance}, got "
                             f"{chosen[instance]}")


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled dicts and lists of numpy arrays and numbers; any other name is refused."""

    _KNOWN = {
        (f"numpy{core}.multiarray", name) for core in (".core", "._core")
        for name in ("_reconstruct", "scalar")
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        # numpy 1 and 2 keep the two functions in different places.
        return super().find_class(module.replace("numpy.core", "numpy._core")
                                  if hasattr(np, "_core") else module, name)


def _read_official(path: Path) -> dict[int, Centers]:
    """The clusters of pix2pixHD's own ``.npy``: a pickled dict of label -> array."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                      else np.lib.format.read_array_header_2_0)
            shape, _, dtype = header(file)
            if shape != () or not dtype.hasobject:
                raise FeatureError(f"features: expected one pickled dict in {path}, got an array "
                                   f"of shape {shape}")
            loaded = _ArraysOnly(file, encoding="latin1").load()
        content = loaded.item() if isinstance(loaded, np.ndarray) and loaded.shape == () else loaded
        if not isinstance(content, dict):
            raise FeatureError(f"features: expected a dict of label -> array in {path}, got "
                               f"{type(content).__name__}")
        return {int(label): np.asarray(rows, np.float32) for label, rows in content.items()
                if np.size(rows)}
    except FeatureError:
        raise
    except pickle.UnpicklingError as error:
        raise FeatureError(f"features: {path} holds more than numpy arrays, which is never run: "
                           f"{error}") from error
    except Exception as error:  # damaged bytes raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise FeatureError(f"features: {path} is no official file of clusters ({reason})"
                           ) from error
