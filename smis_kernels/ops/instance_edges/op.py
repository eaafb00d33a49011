"""Instance edges: the boundary channel of SPADE and pix2pixHD."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.backend import resolve
from ...runtime.check import FLOATS, INTEGERS, check_tensor
from ...runtime.explain import record
from ...runtime.library import RawOp
from . import reference

KINDS = ("cpu", "cuda")
# Equality is all that counts, so unsigned ids are read as the signed type of their width.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_OUTPUTS = (*FLOATS, torch.bool, torch.uint8)


def instance_edges(instance_map: Tensor, *, dtype: torch.dtype = torch.float32,
                   backend: str | None = None) -> Tensor:
    r"""1 where the instance id differs from any of the four neighbours inside the image, else 0.

    .. math:: e(p) = \max_{q \in \mathcal{N}_4(p)} [\mathrm{id}(p) \ne \mathrm{id}(q)]

    Args:
        instance_map: integer ids (N, H, W) or (N, 1, H, W), any integer dtype, any values.
        dtype: of the output: float32, float64, float16, bfloat16, bool or uint8.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (N, 1, H, W), contiguous. Not differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend asked for cannot run here.

    Source: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with
    Conditional GANs", 2018.

    Example:
        >>> instance_edges(torch.tensor([[[7, 7, 9]]])).tolist()
        [[[[0.0, 1.0, 1.0]]]]
    """
    layout = "(N, H, W) or (N, 1, H, W)"
    check_tensor("instance_map", instance_map, (3, 4), layout, (*INTEGERS, *_SIGNED))
    if instance_map.dim() == 4:
        if instance_map.shape[1] != 1:
            raise ValueError(
                f"instance_map: expected {layout}, got shape {tuple(instance_map.shape)}"
            )
        instance_map = instance_map.squeeze(1)
    if dtype not in _OUTPUTS:
        names = ", ".join(str(d).removeprefix("torch.") for d in _OUTPUTS)
        raise TypeError(f"dtype: expected one of {names}; got {dtype}")
    if instance_map.dtype in _SIGNED:
        instance_map = instance_map.view(_SIGNED[instance_map.dtype])
    kind = resolve("instance_edges", instance_map, backend, KINDS)
    record("instance_edges", kind, instance_map)
    if kind == "reference":
        return reference.instance_edges(instance_map, dtype)
    edges: Tensor = instance_edges_op(kind, instance_map, dtype)
    return edges


def _edges_fake(instance_map: Tensor, dtype: torch.dtype) -> Tensor:
    n, h, w = instance_map.shape
    return instance_map.new_empty((n, 1, h, w), dtype=dtype)


instance_edges_op = RawOp(
    "instance_edges(Tensor instance_map, ScalarType dtype) -> Tensor", _edges_fake
)
