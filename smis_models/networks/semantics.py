"""From label maps to the semantics that the networks read: one-hot planes, and an edge plane."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from smis_kernels import LabelLayout, instance_edges

from .preset import Preset

UNKNOWN = 255  # what data sets write for pixels without a class
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)


def as_maps(name: str, labels: Tensor) -> Tensor:
    """(N, H, W) int64 from (N, H, W) or (N, 1, H, W) of any integer type."""
    if not isinstance(labels, Tensor):
        got = f"{type(labels).__module__}.{type(labels).__name__}"
        raise TypeError(f"{name}: expected a torch.Tensor, got {got}; torch.from_numpy makes one")
    if labels.dtype not in _INTEGERS:
        got = str(labels.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected integers, got {got}; round and cast them first")
    if labels.dim() == 4 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 3 or labels.numel() == 0:
        raise ValueError(
            f"{name}: expected (N, H, W) or (N, 1, H, W), not empty; got {tuple(labels.shape)}"
        )
    return labels.long()


def _without_unknown(labels: Tensor, dont_care: int | None) -> Tensor:
    maps = as_maps("labels", labels)
    return maps if dont_care is None else maps.masked_fill(maps == UNKNOWN, dont_care)


def prepare_labels(labels: Tensor, classes: int, *, dont_care: int | None = None,
                   source: str | Path | None = None) -> Tensor:
    """Check a label map and give unknown pixels (255) the don't-care class.

    Args:
        labels: (N, H, W) or (N, 1, H, W), any integer type.
        classes: number of classes; values must lie in 0..classes-1.
        dont_care: class of the pixels labelled 255; None where the data set has none.
        source: the file that the labels come from, for the error.

    Returns:
        (N, H, W), int64.

    Raises:
        ValueError: a value out of range; the message names it, its place and the file.
        TypeError: labels that are no integers.

    Example:
        >>> prepare_labels(torch.tensor([[[3, 255]]]), 151, dont_care=150).tolist()
        [[[3, 150]]]
    """
    maps = _without_unknown(labels, dont_care)
    low, high = (int(value) for value in torch.aminmax(maps))
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        n, y, x = (int(i) for i in (maps == bad).nonzero()[0])
        where = f" in {source}" if source is not None else ""
        cure = (
            "this data set has no don't-care class: relabel unknown pixels" if bad == UNKNOWN
            else "remap the classes, or check the classes option"
        )
        raise ValueError(
            f"labels: expected 0..{classes - 1}, got {bad} (image {n}, row {y}, column {x})"
            f"{where}; {cure}"
        )
    return maps


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W) labels in 0..classes-1 -> (N, classes, H, W) planes of zeros and ones."""
    n, h, w = labels.shape
    planes = torch.zeros((n, classes, h, w), dtype=dtype, device=labels.device)
    return planes.scatter_(1, labels[:, None], 1)


def compile_layout(labels: Tensor, preset: Preset, instances: Tensor | None = None) -> LabelLayout:
    """The compiled form of :func:`semantics`: no plane is built. Arguments and errors as there.

    Labels on a GPU are looked at there: the layout's first use raises what is wrong with them.

    Example:
        >>> from smis_models import create_model
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> labels = torch.zeros(1, 128, 128).long()
        >>> image = model(compile_layout(labels, model.preset))
    """
    if isinstance(labels, Tensor) and labels.device.type == "cuda":  # else the host would wait
        maps = _without_unknown(labels, preset.dont_care)
    else:
        maps = prepare_labels(labels, preset.classes, dont_care=preset.dont_care)
    ids = _instance_ids(instances, maps) if preset.instance_edge else None
    return LabelLayout.from_labels(maps, preset.classes, instances=ids)


def _instance_ids(instances: Tensor | None, labels: Tensor) -> Tensor:
    if instances is None:
        raise ValueError("instances: expected a map of ids, which this model needs; got None")
    ids = as_maps("instances", instances)
    if ids.shape != labels.shape:
        raise ValueError(
            f"instances: expected the labels' shape {tuple(labels.shape)}, got {tuple(ids.shape)}"
        )
    return ids


def semantics(labels: Tensor, preset: Preset, instances: Tensor | None = None, *,
              dtype: torch.dtype = torch.float32, source: str | Path | None = None) -> Tensor:
    """What a model of ``preset`` reads: one-hot labels and, where it has one, the edge plane.

    The edge plane is 1 where a pixel's instance id differs from one of its four neighbours'.

    Args:
        labels: (N, H, W) or (N, 1, H, W), integers; 255 becomes the don't-care class.
        preset: of the model.
        instances: ids, shaped as labels; wanted exactly where ``preset.instance_edge``.
        dtype: of the result.
        source: the file that the labels come from, for errors.

    Returns:
        (N, classes [+ 1], H, W).

    Raises:
        ValueError: labels out of range, instances missing or of another shape.

    Example:
        >>> from smis_models import create_model
        >>> preset = create_model("spade_cityscapes", device="meta").preset
        >>> labels = torch.randint(35, (1, 8, 16))
        >>> semantics(labels, preset, instances=labels).shape
        torch.Size([1, 36, 8, 16])
    """
    maps = prepare_labels(labels, preset.classes, dont_care=preset.dont_care, source=source)
    planes = one_hot(maps, preset.classes, dtype)
    if not preset.instance_edge:
        return planes
    ids = _instance_ids(instances, maps)
    return torch.cat([planes, instance_edges(ids).to(dtype)], 1)
