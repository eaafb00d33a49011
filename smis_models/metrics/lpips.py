"""LPIPS from a local trunk file, with features computed once for each picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..io.checkpoint import CheckpointError, read_checkpoint
from ..io.choices import unknown_name
from ..io.files import file_hash, published_hash
from ..io.images import check_pictures
from ..networks.trunks import Layer, build_trunk, tapped, trunk_state, vgg_layers
from .distance import Distance, Features, PixelDistance

_ALEX: tuple[Layer, ...] = (
    (64, 11, 4, 2), (3, 2), (192, 5, 1, 2), (3, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1),
)


@dataclass(frozen=True)
class Trunk:
    """A network whose features are compared.

    ``file`` is torchvision's name of its ImageNet weights, which ends in the file's hash; the
    features are read after the ReLUs at ``taps``; smaller pictures than ``smallest`` vanish.
    ``heads`` is how the hash of the published linear weights (version 0.1) begins.
    """

    title: str
    file: str
    heads: str
    layers: tuple[Layer, ...]
    taps: tuple[int, ...]
    widths: tuple[int, ...]
    smallest: int

    def build(self) -> nn.Sequential:
        """The layers up to the last tap, numbered as in torchvision's ``features``."""
        return build_trunk(self.layers)


TRUNKS = {
    "alex": Trunk("AlexNet", "alexnet-owt-7be5be79.pth", "df73285e", _ALEX, (1, 4, 7, 9, 11),
                  (64, 192, 384, 256, 256), 31),
    "vgg": Trunk("VGG16", "vgg16-397923af.pth", "a78928a0", vgg_layers(2, 2, 3, 3, 3),
                 (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
}
# Of the published code: ImageNet's mean and deviation, for pictures in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_HEAD_FILES = {"lpips": "weights/v0.1", "torchmetrics": "functional/image/lpips_models"}
_RANDOM_SEED = 0


def _read(name: str, path: str | Path) -> dict[str, Tensor]:
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        raise ValueError(str(error).replace("checkpoint:", f"{name}:", 1)) from error


def _find_trunk(trunk: Trunk) -> Path:
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    path = cache / trunk.file
    if not path.is_file():
        raise ValueError(
            f"weights: LPIPS needs torchvision's ImageNet weights of {trunk.title} "
            f"({trunk.file}), and {cache} has none; give the file (--lpips-weights), or ask for "
            "another distance: random-alex, random-vgg or pixel (--distance)"
        )
    return path


def _find_heads(kind: str) -> Path:
    for package, folder in _HEAD_FILES.items():
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            path = Path(place) / folder / f"{kind}.pth"
            if path.is_file():
                return path
    raise ValueError(
        "heads: LPIPS needs its published linear weights, which the package lpips or torchmetrics "
        "holds; pip install torchmetrics, or give the file (--lpips-heads)"
    )


def _head_weights(state: Mapping[str, Tensor], trunk: Trunk, path: Path) -> list[Tensor]:
    weights = []
    for i, width in enumerate(trunk.widths):
        key = f"lin{i}.model.1.weight"
        if key not in state or tuple(state[key].shape) != (1, width, 1, 1):
            got = tuple(state[key].shape) if key in state else "none"
            raise ValueError(f"heads: expected {key} of shape (1, {width}, 1, 1) in {path}, got "
                             f"{got}; give the file of this trunk")
        weights.append(state[key].float())
    return weights


class LPIPS(Distance):
    r"""Learned perceptual image patch similarity, version 0.1.

    .. math:: d(a, b) = \sum_l \frac{1}{H_l W_l} \sum_{h,w} \sum_c w_{l,c}
              (\hat f^a_{l,c} - \hat f^b_{l,c})^2

    with features :math:`\hat f_l` of unit length at each place. Untrained trunks are no LPIPS: with
    ``weights="random"`` the features are those of seed 0, every :math:`w` is 1, and the name says
    so. Their numbers compare with each other alone.

    Args:
        trunk: "alex" (the metric of BicycleGAN, MUNIT and GroupDNet) or "vgg".
        weights: a file with torchvision's ImageNet weights; None takes it from torch.hub's folder;
            "random" asks for a random trunk.
        heads: the published linear weights; None takes them from an installed lpips or
            torchmetrics.

    Shapes: pictures (N, 3, H, W) in [-1, 1], at least 31 pixels a side -> (N,), fp32.

    Raises:
        ValueError: an unknown trunk, a file that is missing or of another network.

    Paper: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    CVPR 2018.

    Example:
        >>> distance = LPIPS("alex", "alexnet-owt-7be5be79.pth")  # doctest: +SKIP
        >>> distance(a, b)  # doctest: +SKIP
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: str = "alex", weights: str | Path | None = None,
                 heads: str | Path | None = None) -> None:
        super().__init__()
        if trunk not in TRUNKS:
            raise ValueError(f"trunk: expected one of {', '.join(TRUNKS)}; got {trunk!r}")
        self.trunk = TRUNKS[trunk]
        self.network = self.trunk.build()
        self._facts: dict[str, Any] = {"trunk": self.trunk.title}
        if weights == "random":
            self._randomise()
        else:
            self._load(trunk, weights, heads)
        self._facts = {"name": self.name, **self._facts}
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def _randomise(self) -> None:
        self.name = f"random {self.trunk.title} (no LPIPS)"
        generator = torch.Generator().manual_seed(_RANDOM_SEED)
        for layer in self.network:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self._set_heads([torch.ones(1, width, 1, 1) for width in self.trunk.widths])
        self._facts |= {"weights": f"random, seed {_RANDOM_SEED}", "heads": "all ones"}

    def _load(self, kind: str, weights: str | Path | None, heads: str | Path | None) -> None:
        path = _find_trunk(self.trunk) if weights is None else Path(weights)
        read = _read("weights", path)
        try:
            state = trunk_state(read, self.network)
        except ValueError as error:
            raise ValueError(f"weights: {error} in {path}; give torchvision's file of this trunk"
                             ) from error
        self.network.load_state_dict(state)
        linear = _find_heads(kind) if heads is None else Path(heads)
        self._set_heads(_head_weights(_read("heads", linear), self.trunk, linear))
        digest, of_heads = file_hash(path), file_hash(linear)
        published = digest.startswith(published_hash(self.trunk.file))
        known = of_heads.startswith(self.trunk.heads)
        self.name = f"LPIPS ({self.trunk.title})"
        if not published:
            self.name += f" with weights of {path.name}, which are not torchvision's"
        if not known:
            self.name += f" with heads of {linear.name}, which are not those of version 0.1"
        self._facts |= {
            "weights": path.name, "weights_sha256": digest, "torchvision_weights": published,
            "heads": linear.name, "heads_sha256": of_heads, "published_heads": known,
        }

    def _set_heads(self, weights: list[Tensor]) -> None:
        for i, weight in enumerate(weights):
            self.register_buffer(f"head{i}", weight)

    def facts(self) -> dict[str, Any]:
        return dict(self._facts)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Features:
        check_pictures(pictures, self.trunk.smallest)
        x = (pictures.to(self.shift) - self.shift) / self.scale
        return [f / (f.square().sum(1, keepdim=True).sqrt() + _EPS)
                for f in tapped(self.network, x, self.trunk.taps)]

    def maps(self, a: Features, b: Features) -> list[Tensor]:
        return [
            ((x - y).square() * self.get_buffer(f"head{i}")).sum(1)
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        ]


DISTANCES = (*(f"lpips-{kind}" for kind in TRUNKS), *(f"random-{kind}" for kind in TRUNKS), "pixel")


def create_distance(kind: str, weights: str | Path | None = None, heads: str | Path | None = None,
                    device: torch.device | str = "cpu") -> Distance:
    """A distance by name; nothing else is taken where its files are missing.

    Args:
        kind: "lpips-alex", "lpips-vgg"; "random-alex", "random-vgg" (an untrained trunk) or
            "pixel" (mean absolute difference).
        weights, heads: files of :class:`LPIPS`; given to another kind they are refused.
        device: where it is computed.

    Raises:
        ValueError: an unknown kind, a missing file, or one that is not used.

    Example:
        >>> create_distance("pixel").name
        'pixel L1'
    """
    if kind not in DISTANCES:
        raise ValueError(unknown_name("distance", DISTANCES, kind))
    family, _, trunk = kind.partition("-")
    if family != "lpips" and (weights is not None or heads is not None):
        raise ValueError(f"weights, heads: {kind} reads none; leave them out, or ask for "
                         "lpips-alex")
    if family == "pixel":
        return PixelDistance().to(device)
    return LPIPS(trunk, "random" if family == "random" else weights, heads).to(device)
