"""The definition: one image and one class at a time, as GroupDNet's encoder input is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(semantics: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) masks of integer labels (N, H, W); per-class planes pass through."""
    if semantics.dim() == 4:
        return semantics
    classes = torch.arange(num_classes, device=semantics.device).view(1, -1, 1, 1)
    return (semantics.unsqueeze(1) == classes).to(dtype)


def bounds(part: Tensor, box: str) -> tuple[int, int, int, int] | None:
    """(y0, y1, x0, x1), ends exclusive, of one masked image (K, H, W); None where it is zero."""
    if box == "sums":
        total = part.sum(0)
        rows, columns = total.sum(1).nonzero(), total.sum(0).nonzero()
    if box == "nonzero" or rows.numel() == 0 or columns.numel() == 0:
        filled = (part != 0).any(0)
        rows, columns = filled.any(1).nonzero(), filled.any(0).nonzero()
    if rows.numel() == 0:
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def class_boxes(image: Tensor, semantics: Tensor, num_classes: int, box: str) -> Tensor:
    """(N, C, 4) int32 boxes, zeros for absent classes."""
    masks = one_hot(semantics, num_classes, image.dtype)
    boxes = torch.zeros((image.shape[0], num_classes, 4), dtype=torch.int32, device=image.device)
    for n in range(image.shape[0]):
        for c in range(num_classes):
            found = bounds(image[n] * masks[n, c], box)
            if found is not None:
                boxes[n, c] = torch.tensor(found, dtype=torch.int32, device=boxes.device)
    return boxes


def class_crops(image: Tensor, semantics: Tensor, num_classes: int, size: tuple[int, int],
                box: str) -> Tensor:
    """(N, C*K, *size): each class's masked image, cropped to its box and stretched."""
    masks = one_hot(semantics, num_classes, image.dtype)
    crops = []
    for n in range(image.shape[0]):
        row = image.new_zeros((1, 0, *size))
        for c in range(num_classes):
            part = image[n] * masks[n, c]
            found = bounds(part, box)
            if found is None:
                crop = part.new_zeros((1, part.shape[0], *size))
            else:
                y0, y1, x0, x1 = found
                crop = F.interpolate(part[None, :, y0:y1, x0:x1], size, mode="nearest")
            row = torch.cat((row, crop), 1)
        crops.append(row)
    return torch.cat(crops) if crops else image.new_zeros((0, num_classes * image.shape[1], *size))
