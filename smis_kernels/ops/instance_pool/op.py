"""Instance-wise average pooling: every pixel takes the mean of its instance, in one reduction."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.backend import refuse_trace, resolve
from ...runtime.check import FLOATS, INTEGERS, check_device, check_tensor, looked_at
from ...runtime.derivatives import applied
from ...runtime.explain import record
from ...runtime.library import RawOp
from ...runtime.tensors import acc_dtype, empty_nchw
from . import reference

KINDS = ("cpu", "cuda")
MAX_ID = 2**31 - 1


class InstanceMeans(NamedTuple):
    """One row per instance, by image and then by id."""

    image: Tensor
    id: Tensor
    mean: Tensor
    area: Tensor


def instance_avg_pool2d(input: Tensor, instance_map: Tensor, *,
                        backend: str | None = None) -> Tensor:
    r"""The mean over each instance's pixels, per image and channel, at each of its pixels.

    .. math:: y_{n,c}(p) = \frac{1}{|S|} \sum_{q \in S} x_{n,c}(q), \quad
              S = \{q : \mathrm{id}_n(q) = \mathrm{id}_n(p)\}

    Id 0 is an instance like any other. The cost does not depend on the number of instances.

    Args:
        input: (N, C, H, W), float32, float64, float16 or bfloat16, contiguous or channels-last.
        instance_map: integer ids 0..2³¹-1, (N, H, W) or (N, 1, H, W), in any order and number.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (N, C, H, W) in the input's dtype and memory format; sums in fp64. Gradients flow
        to the input. On the CPU the result is the same for any number of threads; on a GPU it is
        deterministic where torch.use_deterministic_algorithms asks for it.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        ValueError: an id below 0 or above 2³¹-1; a RuntimeError from torch.compile's graphs. The
            GPU is not made to wait for that check: there such a pixel becomes NaN.
        BackendError: the backend asked for cannot run here.

    Source: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with
    Conditional GANs", 2018, section 3.4.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0, 8.0]]]])
        >>> instance_avg_pool2d(x, torch.tensor([[[26001, 26001, 7]]])).tolist()
        [[[[2.0, 2.0, 8.0]]]]
    """
    ids = _checked(input, instance_map)
    kind = resolve("instance_avg_pool2d", input, backend, KINDS)
    _record("instance_avg_pool2d", kind, input)
    if kind == "reference":
        refuse_trace("instance_avg_pool2d")
    if looked_at(ids, kind):
        ids = _checked_ids(ids)
    if kind == "reference":
        return reference.instance_avg_pool2d(input, ids)
    out: Tensor = applied(_InstancePool, input, ids, kind)
    return out


def instance_mean_table(input: Tensor, instance_map: Tensor, *,
                        backend: str | None = None) -> InstanceMeans:
    r"""One row per instance: its image, id, mean feature and number of pixels.

    .. math:: \mathrm{mean}_{(n,i)} = \frac{1}{|S|} \sum_{q \in S} x_n(q), \quad
              S = \{q : \mathrm{id}_n(q) = i\}

    Args:
        input, instance_map, backend: as in :func:`instance_avg_pool2d`.

    Returns:
        ``InstanceMeans(image, id, mean, area)``: int64 (K,), int64 (K,), (K, C) in fp32 (fp64 for
        fp64), int64 (K,); by image and then by id. Not differentiable. As the number of rows
        depends on the ids, a GPU is waited for. Deterministic as the pooling is.

    Raises:
        As :func:`instance_avg_pool2d`; an id out of range on a GPU raises too.

    Source: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with
    Conditional GANs", 2018, section 3.4.

    Example:
        >>> table = instance_mean_table(torch.tensor([[[[1.0, 3.0, 8.0]]]]),
        ...                             torch.tensor([[[26001, 26001, 7]]]))
        >>> table.id.tolist(), table.mean.tolist(), table.area.tolist()
        ([7, 26001], [[8.0], [2.0]], [1, 2])
    """
    ids = _checked(input, instance_map)
    kind = resolve("instance_mean_table", input, backend, KINDS)
    _record("instance_mean_table", kind, input)
    x = input.detach()
    if kind == "reference":
        refuse_trace("instance_mean_table")
        return InstanceMeans(*reference.instance_mean_table(x, _checked_ids(ids)))
    if _by_sorting(kind):
        return InstanceMeans(*_table_by_sorting(x, ids))
    table = InstanceMeans(*instance_means_op(kind, x, ids))
    order = (table.image << 32 | table.id).argsort()
    return InstanceMeans(*(column[order] for column in table))


def _means_in_order(input: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted keys (image, id) of the pixels, the segment of each pixel, and the segments' means.

    By torch's own calls in a fixed order and in fp64, without waiting for a GPU. The means have a
    row for each pixel, of which those of no segment are NaN.
    """
    n, c, _, _ = input.shape
    images = torch.arange(n, device=input.device).view(n, 1, 1)
    keys, order = (images << 32 | ids).flatten().sort(stable=True)
    segment = torch.cat([keys.new_zeros(1), (keys[1:] != keys[:-1]).long()]).cumsum(0)
    index = torch.empty_like(order).scatter_(0, order, segment)
    rows = input.permute(0, 2, 3, 1).reshape(-1, c).double()
    ones = torch.ones_like(rows[:, :1])
    sums = torch.zeros_like(rows).index_put_((index,), rows, accumulate=True)
    count = torch.zeros_like(ones).index_put_((index,), ones, accumulate=True)
    return keys, index, sums / count


def _table_by_sorting(input: Tensor, instance_map: Tensor) -> tuple[Tensor, ...]:
    """The table in a fixed order of sums; it waits for a GPU, as the table does."""
    keys, _, means = _means_in_order(input, _checked_ids(instance_map))
    found, area = keys.unique_consecutive(return_counts=True)
    return found >> 32, found & MAX_ID, means[: len(found)].to(acc_dtype(input)), area


def _pooled_by_sorting(input: Tensor, instance_map: Tensor) -> Tensor:
    """The pooling in a fixed order of sums."""
    n, c, h, w = input.shape
    ids = instance_map.long()
    valid = (ids >= 0) & (ids <= MAX_ID)
    # One number for all others: theirs would be taken for ids of other images.
    _, index, means = _means_in_order(input, ids.where(valid, MAX_ID + 1))
    out = empty_nchw((n, c, h, w), input)
    pooled = means[index].view(n, h, w, c).permute(0, 3, 1, 2)
    return out.copy_(torch.where(valid.unsqueeze(1), pooled, torch.nan))


def _by_sorting(kind: str) -> bool:
    """Whether a fixed order of sums is asked for; the CPU's kernel has one."""
    return kind == "cuda" and torch.are_deterministic_algorithms_enabled()


def _pool(kind: str, input: Tensor, instance_map: Tensor) -> Tensor:
    if _by_sorting(kind):
        return _pooled_by_sorting(input, instance_map)
    out: Tensor = instance_pool_op(kind, input, instance_map)
    return out


def _record(op: str, kind: str, input: Tensor) -> None:
    ordered = _by_sorting(kind)
    record(op, kind, input, path="sorted" if ordered else "",
           reason="deterministic algorithms are asked for" if ordered else "")


def _checked(input: Tensor, instance_map: Tensor) -> Tensor:
    """The map as (N, H, W)."""
    check_tensor("input", input, 4, "(N, C, H, W)", FLOATS)
    layout = "(N, H, W) or (N, 1, H, W)"
    check_tensor("instance_map", instance_map, (3, 4), layout, (*INTEGERS, torch.uint16))
    check_device("instance_map", instance_map, input, "input")
    n, _, h, w = input.shape
    if tuple(instance_map.shape) not in ((n, h, w), (n, 1, h, w)):
        raise ValueError(
            f"instance_map: expected {(n, h, w)} or {(n, 1, h, w)} to match input, got "
            f"{tuple(instance_map.shape)}; resize it by nearest neighbour"
        )
    if instance_map.numel() == 0 or input.shape[1] == 0:
        name = "instance_map" if instance_map.numel() == 0 else "input"
        shape = tuple(instance_map.shape if name == "instance_map" else input.shape)
        raise ValueError(f"{name}: expected at least one pixel and channel, got shape {shape}")
    return instance_map.squeeze(1) if instance_map.dim() == 4 else instance_map


def _checked_ids(instance_map: Tensor) -> Tensor:
    """int64 ids, their range checked (the kernels check it themselves)."""
    ids = instance_map.long()
    if ids.numel() == 0:
        return ids
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high > MAX_ID:
        raise ValueError(
            f"instance_map: expected ids 0..{MAX_ID}, got {low if low < 0 else high}; "
            "renumber the instances first"
        )
    return ids


class _InstancePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, instance_map: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(instance_map)
        ctx.kind = kind
        return _pool(kind, input, instance_map)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # The pooling matrix is symmetric: the gradient is pooled as the input was.
        (instance_map,) = ctx.saved_tensors
        return _InstancePool.apply(grad, instance_map, ctx.kind), None, None


def _pool_fake(input: Tensor, instance_map: Tensor) -> Tensor:
    n, c, h, w = input.shape
    return empty_nchw((n, c, h, w), input)


def _means_fake(input: Tensor, instance_map: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    integers = (input.new_empty((rows,), dtype=torch.int64) for _ in range(3))
    image, ids, counts = integers
    return image, ids, input.new_empty((rows, input.shape[1]), dtype=acc_dtype(input)), counts


instance_pool_op = RawOp(
    "instance_pool(Tensor input, Tensor instance_map) -> Tensor", _pool_fake
)
# (image, id, mean, count), in any order.
instance_means_op = RawOp(
    "instance_means(Tensor input, Tensor instance_map) -> (Tensor, Tensor, Tensor, Tensor)",
    _means_fake,
)
