"""What distances between pictures share, and the plain one: pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.images import PictureSpan, check_pictures

Features = Sequence[Tensor]


class Distance(nn.Module):
    """A distance between pictures of one size, made of maps: one for each layer of features.

    Features are computed once for each picture, however many pairs it is part of. Subclasses give
    :meth:`features`, :meth:`maps` and :meth:`facts`.

    Shapes: pictures (N, 3, H, W) in [-1, 1] -> distances (N,) or (N, H, W).

    Warns:
        UserWarning: no value is below 0, as in pictures in 0..1.

    Example:
        >>> from smis_models.metrics import create_distance
        >>> distance = create_distance("pixel")
        >>> a, b = torch.rand(2, 4, 3, 64, 64).mul(2).sub(1)
        >>> distance(a, b).shape
        torch.Size([4])
    """

    name: str
    """What the number is called in a table."""

    def facts(self) -> dict[str, Any]:
        """What a reader needs to compute the same number."""
        raise NotImplementedError

    def features(self, pictures: Tensor) -> Features:
        """What :meth:`maps` compares."""
        raise NotImplementedError

    def maps(self, a: Features, b: Features) -> list[Tensor]:
        """(N, h, w) for each layer; the distance is the sum of their means."""
        raise NotImplementedError

    def between(self, a: Features, b: Features) -> Tensor:
        """(N,): the distance over whole pictures."""
        return torch.stack([layer.mean((1, 2)) for layer in self.maps(a, b)]).sum(0)

    def spatial(self, a: Features, b: Features, size: tuple[int, int]) -> Tensor:
        """(N, H, W): the distance at each pixel; layers are enlarged bilinearly and summed."""
        layers = [
            F.interpolate(layer[:, None], size, mode="bilinear", align_corners=False)[:, 0]
            for layer in self.maps(a, b)
        ]
        return torch.stack(layers).sum(0)

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise ValueError(f"b: expected the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
        found = self.between(self.features(a), self.features(b))
        PictureSpan(a, b).tell()
        return found


class PixelDistance(Distance):
    r"""Mean absolute difference of pixels, on a scale of 0 to 1. It is no perceptual distance.

    .. math:: d(a, b) = \frac{1}{2 \cdot 3HW} \sum |a - b|

    Shapes and errors: as :class:`Distance`.

    Example:
        >>> float(PixelDistance()(torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8)))
        1.0
    """

    name = "pixel L1"

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "trunk": None,
                "definition": "mean absolute difference of RGB in [0, 1]"}

    def features(self, pictures: Tensor) -> Features:
        check_pictures(pictures)
        return (pictures.float(),)

    def maps(self, a: Features, b: Features) -> list[Tensor]:
        return [(a[0] - b[0]).abs().mean(1) / 2]
