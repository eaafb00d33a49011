"""GroupDNet's encoder input as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.class_crops.op import class_crops


class ClassCrops(nn.Module):
    """:func:`class_crops` with its options fixed; no parameters.

    Args:
        num_classes, size, box, backend: as in :func:`class_crops`.

    Shape: image (N, K, H, W) and semantics (N, H, W) or (N, num_classes, H, W)
    -> (N, num_classes*K, size[0], size[1]).

    Example:
        >>> import torch
        >>> crops = ClassCrops(8, size=(256, 256))
        >>> crops(torch.randn(1, 3, 64, 64), torch.randint(8, (1, 64, 64))).shape
        torch.Size([1, 24, 256, 256])
    """

    def __init__(self, num_classes: int, size: int | tuple[int, int] | None = None,
                 box: str = "nonzero", *, backend: str | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.size = size
        self.box = box
        self.backend = backend

    def forward(self, image: Tensor, semantics: Tensor) -> Tensor:
        return class_crops(image, semantics, self.num_classes, size=self.size, box=self.box,
                           backend=self.backend)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, size={self.size}, box={self.box!r}"
