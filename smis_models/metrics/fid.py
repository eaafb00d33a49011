"""FID: torch-fidelity's Inception network with a local weights file, and the distance itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..io.checkpoint import CheckpointError, read_checkpoint
from ..io.extras import cure
from ..io.files import file_hash, published_hash
from ..io.images import PictureSpan, as_bytes

Extractor = Callable[[Tensor], Tensor]
"""Pictures (N, 3, H, W) uint8 -> features (N, F)."""
_FEATURES = 2048
_FILE = "weights-inception-2015-12-05-6726825d.pth"  # whose name ends in its hash
INCEPTION = "Inception V3 of 2015-12-05, pool3, bilinear to 299x299 as TensorFlow 1"


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (F,) and covariance (F, F) of features, fp64, of ``count`` pictures."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: NDArray[np.floating[Any]]) -> FeatureStatistics:
        """Of features (N, F).

        Raises:
            ValueError: fewer than two pictures, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError("pictures: expected at least 2 for a covariance, got features of "
                             f"shape {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features: expected finite values, got NaN or infinity")
        wide = features.astype(np.float64)
        return cls(wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False)), len(wide))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    r"""Fréchet distance of two normal distributions.

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a\Sigma_b)^{1/2})

    The trace of the root is the sum of the roots of the product's eigenvalues, as torch-fidelity
    computes it.

    Raises:
        ValueError: features of different lengths.

    Paper: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium", NeurIPS 2017.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b: expected features of length {len(a.mean)}, got {len(b.mean)}")
    eigenvalues = np.linalg.eigvals(a.covariance @ b.covariance).astype(np.complex128)
    root = np.sqrt(eigenvalues).real.sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance)
                 - 2 * root)


class Inception:
    """torch-fidelity's Inception V3 of FID, with weights from a local file; nothing is downloaded.

    Args:
        weights: ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's release; what is
            measured with another file is no FID, and ``facts`` say so.
        device: where it runs.

    Raises:
        ModuleNotFoundError: torch-fidelity cannot be imported.
        ValueError: the file is missing or holds other weights.

    Example:
        >>> features = Inception("weights-inception-2015-12-05-6726825d.pth")  # doctest: +SKIP
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        path = Path(weights)
        if not path.is_file():
            raise ValueError(f"inception-weights: {path} is no file; FID needs torch-fidelity's "
                             f"{_FILE}")
        self._digest = file_hash(path)  # of what is loaded, whatever lies there later
        try:
            read_checkpoint(path)  # torch-fidelity would run code in the file; this refuses it
        except CheckpointError as error:
            raise ValueError(str(error).replace("checkpoint:", "inception-weights:", 1)) from error
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception as error:  # a torchvision of another torch fails in many ways
            raise ModuleNotFoundError(
                f"FID needs torch-fidelity, whose import failed ({str(error).splitlines()[0]}); "
                f"{cure('metrics', 'torch-fidelity')}, with the torchvision of this torch",
                name="torch_fidelity",
            ) from error
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(_FEATURES)], feature_extractor_weights_path=str(path))
        except Exception as error:  # damaged files raise many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise ValueError(f"inception-weights: {path} does not hold torch-fidelity's Inception "
                             f"({reason})") from error
        self._network = network.to(device).eval()
        self._device = torch.device(device)
        self._path = path

    def facts(self) -> dict[str, Any]:
        """What a reader needs to compute the same number."""
        from importlib.metadata import version

        published = self._digest.startswith(published_hash(_FILE))
        network = INCEPTION if published else (
            f"weights of {self._path.name}, which are not Inception's of 2015-12-05")
        return {"network": network, "published_weights": published,
                "extractor": "torch-fidelity inception-v3-compat, 2048",
                "torch_fidelity": version("torch-fidelity"), "weights": self._path.name,
                "weights_sha256": self._digest}

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        if pictures.dtype != torch.uint8:
            raise ValueError(f"pictures: expected uint8, got {pictures.dtype}; fid() and "
                             "io.images.as_bytes take floats in [-1, 1]")
        return self._network(pictures.to(self._device))[0]


def fid_of_features(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """What :func:`fid` measures, of features (N, F) that were extracted before."""
    reference, made = (FeatureStatistics.of(x.float().cpu().numpy()) for x in (real, fake))
    result: dict[str, Any] = {"fid": frechet_distance(reference, made), "real": reference.count,
                              "fake": made.count}
    if min(reference.count, made.count) <= len(reference.mean):
        result["note"] = (f"no more pictures than features ({len(reference.mean)}): the "
                          "covariance is singular and the number is biased upwards")
    return result


def fid(real: Iterable[Tensor], fake: Iterable[Tensor], extractor: Extractor) -> dict[str, Any]:
    """FID of two sets of pictures, with their counts; ``note`` says where it is biased.

    Args:
        real, fake: batches (N, 3, H, W) in [-1, 1].
        extractor: :class:`Inception`; with another the number is no FID, only a Fréchet distance.

    Raises:
        ValueError: fewer than two pictures in a set, pictures that are no floats in [-1, 1], or an
            extractor that gives no features (N, F).

    Warns:
        UserWarning: no value of a set is below 0, as in pictures in 0..1.

    Example:
        >>> result = fid(real, fake, Inception(weights))  # doctest: +SKIP
    """
    sets = []
    for batches in (real, fake):
        span, features = PictureSpan(), []
        for batch in batches:
            features.append(_features(extractor, as_bytes(batch)))
            span.add(batch)
        span.tell()
        if not features:
            raise ValueError("pictures: expected at least 2 in each set, got none")
        sets.append(torch.cat(features))
    return fid_of_features(*sets)


def _features(extractor: Extractor, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        found = extractor(pictures)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(pictures):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"extractor: expected features ({len(pictures)}, F) of a batch, got {got}")
    return found
