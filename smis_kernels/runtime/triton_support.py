"""What the Triton launchers share: layouts, tiles and grids, settings, compile cases.

Plane layout (NCHW) has pixels dense, row layout (channels-last) has channels dense.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuned import Setting, setting

CompileCase = tuple[str, triton.JITFunction, dict[str, str], dict[str, object], int]
LARGEST_PLANE = 2**31  # pixels of one image are counted in 32 bits, all else in 64


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def acc_type(x: Tensor) -> tl.dtype:
    """The type of sums: fp32, fp64 for fp64."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dense(t: Tensor, rows: bool) -> Tensor:
    """``t`` where its layout is the kernel's, else a copy that is."""
    _, c, h, w = t.shape
    _, sc, sh, sw = t.stride()
    if rows:
        fits = (c == 1 or sc == 1) and (h == 1 or w == 1 or sh == w * sw)
        return t if fits else t.contiguous(memory_format=torch.channels_last)
    fits = (w == 1 or sw == 1) and (h == 1 or sh == w)
    return t if fits else t.contiguous()


def strides(t: Tensor, rows: bool) -> tuple[int, int]:
    """(batch stride, stride of the axis that is not dense)."""
    return t.stride(0), t.stride(3 if t.shape[3] > 1 else 2) if rows else t.stride(1)


def tile_sizes(channels: int, pixels: int, rows: bool, tile: int) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P): the dense axis first, then the other one up to the tile's size."""
    if rows:
        block_c = min(triton.next_power_of_2(channels), 256)
        return block_c, max(1, min(triton.next_power_of_2(pixels), tile // block_c))
    block_p = min(triton.next_power_of_2(pixels), tile)
    return max(1, min(triton.next_power_of_2(channels), tile // block_p)), block_p


def check_plane(pixels: int) -> None:
    """Refuse images whose pixels do not fit 32 bits."""
    if pixels >= LARGEST_PLANE:
        raise ValueError(f"input: expected fewer than 2^31 pixels in an image, got {pixels}")


def tile_grid(n: int, c: int, pixels: int, blocks: tuple[int, int]) -> tuple[int, int, int]:
    """(pixels, channels, images) of tiles."""
    check_plane(pixels)
    return triton.cdiv(pixels, blocks[1]), triton.cdiv(c, blocks[0]), n


def case_blocks(rows: bool, tile: int) -> dict[str, object]:
    """The blocks of a large input, for a kernel's compile cases."""
    block_c, block_p = tile_sizes(256, 1 << 16, rows, tile)
    return {"ROWS": rows, "BLOCK_C": block_c, "BLOCK_P": block_p}


def product_precision(x: Tensor) -> str:
    """How tl.dot multiplies: float32 in three TF32 products on the tensor cores.

    Their error is that of float32 sums; a single TF32 product, which torch's convs allow
    themselves by default, has ten bits.
    """
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def kind_of(x: Tensor, rows: bool) -> str:
    """How settings are kept apart: dtype and layout."""
    return f"{str(x.dtype).removeprefix('torch.')} {'rows' if rows else 'planes'}"


def launch_setting(kernel: str, x: Tensor, rows: bool, default: Setting) -> Setting:
    """Tile and warps of a kernel: as measured on this GPU, else ``default``."""
    return setting(kernel, kind_of(x, rows), default, x.device)


def signature(
    kernel: triton.JITFunction, element: str, others: dict[str, str]
) -> dict[str, str]:
    """Run-time arguments: ``others``, else sizes and strides, else pointers to ``element``.

    Sizes and strides are multiples of 16, as in most calls: else nothing would be vectorised.
    """
    types = {}
    for name in kernel.arg_names:
        if name.isupper() and len(name) > 1 and name not in others:
            continue
        usual = f"*{element}"
        if name in ("C", "W", "P"):
            usual = "i32:16"
        elif name == "stat_n" or name.endswith(("_n", "_s")):
            usual = "i64:16"
        types[name] = others.get(name, usual)
    return types
