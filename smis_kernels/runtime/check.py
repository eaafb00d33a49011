"""Argument checks shared by the ops: one line that names the argument and the cure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .derivatives import transformed
from .tensors import capturing

# Asked for once: labels and row numbers on a GPU are looked at too.
VALUES_CHECKED = os.environ.get("SMIS_CHECK", "0") not in ("", "0")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(name: str, tensor: Tensor, dim: int | tuple[int, ...], layout: str,
                 dtypes: Sequence[torch.dtype] | None) -> None:
    """Rank and dtype (None: any); ``layout`` spells the shape, e.g. ``"(N, C, H, W)"``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(tensor).__name__}")
    dims = (dim,) if isinstance(dim, int) else dim
    if tensor.dim() not in dims:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        got = _names((tensor.dtype,))
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}; got {got}; cast it first")


def autocast_enabled(like: Tensor) -> bool:
    """Whether autocast is on for the device of ``like``."""
    device = like.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast_as_conv(input: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands in autocast's dtype, as conv2d takes them; as they are where it is off."""
    operands = (input, *others)
    if not (isinstance(input, Tensor) and autocast_enabled(input)):
        return operands
    dtype = torch.get_autocast_dtype(input.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS
                 and t.dtype != torch.float64 else t for t in operands)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], because: str) -> None:
    """The exact shape; ``because`` says what fixes it, e.g. ``"to match input"``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} {because}, got {tuple(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, like: Tensor, other: str) -> None:
    """The same device as another argument."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected the device of {other} ({like.device}), got {tensor.device}; "
            f"move it with .to({str(like.device)!r})"
        )


def like_input(name: str, tensor: Tensor, input: Tensor) -> Tensor:
    """An operand of the shape, dtype (autocast casts it to that) and device of ``input``."""
    if autocast_enabled(input) and isinstance(tensor, Tensor):
        tensor = tensor.to(input.dtype)
    check_tensor(name, tensor, 4, "(N, C, H, W)", (input.dtype,))
    check_shape(name, tensor, tuple(input.shape), "to match input")
    check_device(name, tensor, input, "input")
    return tensor


def check_range(name: str, labels: Tensor, count: int) -> None:
    """Label values 0..count-1 (reads the tensor, so it synchronises on a GPU)."""
    if labels.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= count:
        refuse_label(name, low if low < 0 else high, count)


def refuse_label(name: str, label: int, count: int) -> NoReturn:
    """Raise for a label that is not in 0..count-1."""
    raise ValueError(
        f"{name}: expected labels 0..{count - 1}, got {label}; "
        "remap unknown pixels (255 in most data sets) to the don't-care class first"
    )


def valueless(tensor: Tensor) -> bool:
    """Whether there are no values yet: of meta and fake tensors, and while a graph is captured."""
    return (tensor.is_meta or capturing(tensor) or torch._C._len_torch_dispatch_stack() > 0
            or hasattr(tensor, "fake_mode"))


def looked_at(values: Tensor, kind: str) -> bool:
    """Whether labels or row numbers are looked at in Python before the kernels of ``kind`` run.

    A CPU's kernels refuse those out of range themselves, the definitions do not. A GPU's have an
    answer for them that the op's docstring tells, so that nothing waits for the device; with
    ``SMIS_CHECK=1`` in the environment they are looked at there too, which makes the host wait.
    """
    if kind == "cpu" or not (kind == "reference" or VALUES_CHECKED):
        return False
    if torch.compiler.is_dynamo_compiling():
        return kind == "reference"
    return not valueless(values)


def check_rows(name: str, rows: Tensor, count: int, kind: str) -> None:
    """Numbers 0..count-1 of a table's rows, where :func:`looked_at`; never while a call is traced.

    Raises:
        ValueError: a number that is no row's.
    """
    if not looked_at(rows, kind) or torch.compiler.is_compiling() or (
            transformed() is not None or rows.numel() == 0):
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected rows 0..{count - 1}, got {low if low < 0 else high}; "
                         "give each pixel or tap a row that the table has")
