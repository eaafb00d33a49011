"""What the Triton launchers share: layouts, tiles and grids, settings, products, compile cases.

Plane layout (NCHW) has pixels dense, row layout (channels-last) has channels dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import triton_interpreted
from .tensors import acc_dtype
from .tuned import Setting, setting

LARGEST_PLANE = 2**31 - 2**14  # pixels of an image and a tile are counted in 32 bits
GRID_LIMIT = 65535  # programs along the second and third axis of a grid
VECTOR = 8  # elements: 16 bytes in 16 bits
INTERPRETED = tl.constexpr(triton_interpreted())

# A kernel compiled for sizes divisible by 16 and one for others would be two; which of them the
# number of windows needs changes with every map. What alignment tells is told by UNIT.
SIZES = (
    "C", "N", "P", "U", "W", "chunk", "chunks", "first", "per_image", "partial_s", "pixels", "rows",
    "sources", "steps",
    *(f"{name}{branch}_{axis}" for name in ("x", "grad", "out", "gamma", "beta", "residual")
      for branch in ("", "2") for axis in "ns"),
)


class CompileCase(NamedTuple):
    """A call of a launcher on meta tensors, which ``tools.kernel_report`` compiles.

    Attributes:
        name: of the call.
        call: launches the kernels.
        product: type of the operands that its tensor-core instructions must have, if it has any.
    """

    name: str
    call: Callable[[], object]
    product: str = ""


@triton.jit
def _rounded(x, BITS: tl.constexpr, EVEN: tl.constexpr):
    # float32 without its last BITS bits: to the nearest, ties to even or away from zero
    bits = x.to(tl.uint32, bitcast=True)
    half = (1 << (BITS - 1)) - 1 + ((bits >> BITS) & 1) if EVEN else 1 << (BITS - 1)
    near = ((bits + half) >> BITS << BITS).to(tl.float32, bitcast=True)
    return tl.where(x - x == 0, near, x)  # infinity and NaN pass


@triton.jit
def narrowed(value, base):
    """``value`` in the type that ``base`` points to."""
    if INTERPRETED and base.dtype.element_ty == tl.bfloat16:
        value = _rounded(value.to(tl.float32), 16, True)  # the interpreter cuts digits off
    return value.to(base.dtype.element_ty)


@triton.jit
def known_row(row, rows):
    """Numbers of rows, in 64 bits. One that there is not becomes 0, the outside, which is zero."""
    return tl.where((row >= 0) & (row < rows), row, 0).to(tl.int64)


@triton.jit
def tf32(x):
    """float32 rounded to the digits that the tensor cores read: they cut off the others."""
    if INTERPRETED:
        x = _rounded(x, 13, False)
    else:
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """``total + a b``. "tf32" rounds ``a``; ``b`` must be exact in it, or rounded too."""
    if PRECISION == "tf32":
        a = tf32(a)
    if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def acc_type(x: Tensor) -> tl.dtype:
    """The type of sums: fp32, fp64 for fp64."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dense(t: Tensor, nhwc: bool) -> Tensor:
    """``t`` where its layout is the kernel's, else a copy that is."""
    _, c, h, w = t.shape
    _, sc, sh, sw = t.stride()
    if nhwc:
        fits = (c == 1 or sc == 1) and (h == 1 or w == 1 or sh == w * sw)
        return t if fits else t.contiguous(memory_format=torch.channels_last)
    fits = (w == 1 or sw == 1) and (h == 1 or sh == w)
    return t if fits else t.contiguous()


def _strides(t: Tensor, nhwc: bool) -> tuple[int, int]:
    """(batch stride, stride of the axis that is not dense)."""
    batch = t.stride(0) if t.shape[0] > 1 else 0
    return batch, t.stride(3 if t.shape[3] > 1 else 2) if nhwc else t.stride(1)


def _near(channels: int) -> int:
    """The largest power of two up to 128 whose blocks exceed ``channels`` by at most a sixth."""
    whole = triton.next_power_of_2(channels)
    sizes = [size for size in (128, 64, 32) if size <= whole] or [whole]
    return min(sizes, key=lambda size: max(triton.cdiv(channels, size) * size, 7 * channels / 6))


def tile_sizes(
    channels: int, pixels: int, nhwc: bool, tile: int, widest: int = 128
) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P): the dense axis first, then the other one up to the tile's size."""
    if nhwc:
        block_c = min(_near(channels), widest)
        return block_c, max(1, min(triton.next_power_of_2(pixels), tile // block_c))
    block_p = min(triton.next_power_of_2(pixels), tile)
    return max(1, min(triton.next_power_of_2(channels), tile // block_p)), block_p


def check_plane(pixels: int) -> None:
    """Refuse images whose pixels do not fit 32 bits."""
    if pixels >= LARGEST_PLANE:
        raise ValueError(
            f"input: expected fewer than {LARGEST_PLANE} pixels in an image, got {pixels}"
        )


def batch_grids(
    x: int, y: int, images: int
) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """(first image, grid of x by y programs an image): a launch for every 65535 images."""
    if y > GRID_LIMIT:
        raise ValueError(f"input: expected fewer channels (at most {GRID_LIMIT} blocks), got {y}")
    for first in range(0, images, GRID_LIMIT):
        yield first, (x, y, min(images - first, GRID_LIMIT))


class Tiling(NamedTuple):
    """How a kernel walks over (N, C, P): tiles of [BLOCK_C, BLOCK_P].

    Attributes:
        images, channels, pixels: the shape.
        nhwc: channels are dense, else pixels are.
        unit: elements that divide the dense size and all strides, which are passed divided by it.
        block_c, block_p: the tile.
        constants: of the kernel and its launch.
    """

    images: int
    channels: int
    pixels: int
    nhwc: bool
    unit: int
    block_c: int
    block_p: int
    constants: dict[str, Any]

    @property
    def sizes(self) -> tuple[int, int]:
        """C and P as kernels receive them."""
        if self.nhwc:
            return self.channels // self.unit, self.pixels
        return self.channels, self.pixels // self.unit

    @property
    def tiles(self) -> int:
        """Tiles along the pixels of an image."""
        return triton.cdiv(self.pixels, self.block_p)

    @property
    def groups(self) -> int:
        """Tiles along the channels."""
        return triton.cdiv(self.channels, self.block_c)

    def strides(self, t: Tensor) -> tuple[int, int]:
        """(batch stride, stride of the axis that is not dense) as kernels receive them."""
        batch, other = _strides(t, self.nhwc)
        return batch // self.unit, other // self.unit

    def grids(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """(first image, grid) of each launch: (pixels, channels, images)."""
        return batch_grids(self.tiles, self.groups, self.images)

    def partial_sums(self, x: Tensor, wanted: bool) -> Tensor:
        """Two empty sums of each channel and tile, tiles before the dense axis of the stores."""
        shape = (self.tiles, self.channels) if self.nhwc else (self.channels, self.tiles)
        return x.new_empty((2, self.images, *shape) if wanted else 0, dtype=acc_dtype(x))

    def total(self, partial: Tensor) -> Tensor:
        """Those sums over the tiles, (2, N, C); nothing of nothing."""
        return partial.sum(2 if self.nhwc else 3) if partial.numel() else partial


def tiling(kernel: str, usual: Setting, pixels: int, nhwc: bool, *operands: Tensor,
           widest: int = 128) -> Tiling:
    """Tiles of ``operands`` (N, C, H, W), the first of which gives the shape and dtype."""
    check_plane(pixels)
    x = operands[0]
    n, c = x.shape[:2]
    chosen = setting(kernel, f"{str(x.dtype).removeprefix('torch.')} "
                             f"{'rows' if nhwc else 'planes'}", usual, x.device)
    block_c, block_p = tile_sizes(c, pixels, nhwc, chosen["tile"], widest)
    unit = math.gcd(VECTOR, c if nhwc else pixels,
                    *(stride for t in operands for stride in _strides(t, nhwc)))
    return Tiling(n, c, pixels, nhwc, unit, block_c, block_p, {
        "NHWC": nhwc, "UNIT": unit, "ACC": acc_type(x), "BLOCK_C": block_c, "BLOCK_P": block_p,
        "num_warps": chosen["warps"]})


def product_precision(x: Tensor) -> str:
    """How tl.dot multiplies: float32 in three TF32 products on the tensor cores.

    Their error is that of float32 sums; a single TF32 product, which torch's convs allow
    themselves by default, has ten bits.
    """
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def meta(*shape: int, dtype: torch.dtype = torch.float32, nhwc: bool = False) -> Tensor:
    """An operand of a compile case: it has a shape and strides, but no memory."""
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if nhwc else t
