"""The definition: a 3x3 conv, and a tensor added to it. Beside it what the kernels compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Where the polynomials of the two factors are multiplied; infinity is one more point.
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))}


def winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                    groups: int, padding: int) -> Tensor:
    """``residual + conv2d(input, weight, bias)``, any dtype."""
    y = F.conv2d(input, weight, bias, padding=padding, groups=groups)
    return y if residual is None else residual + y


def _polynomial(roots: list[float]) -> Tensor:
    """Coefficients of the product of (x - root), lowest power first."""
    made = torch.ones(1, dtype=torch.float64)
    for root in roots:
        shifted = torch.cat([made.new_zeros(1), made])
        made = shifted - root * torch.cat([made, made.new_zeros(1)])
    return made


def transforms(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""A (tile, n), G (n, 3) and B (n, n), n = tile + 2, of y = A [(G w G^T) * (B x B^T)] A^T.

    .. math:: A_{ij} = p_j^i, \quad G_{jk} = p_j^k / \prod_{l \ne j} (p_j - p_l), \quad
        \sum_i B_{ji} x^i = \prod_{l \ne j} (x - p_l)

    at the points p of ``POINTS``; the last ones belong to infinity. float64.

    Paper: Lavin and Gray, CVPR 2016; points: Barabasz et al., "Error Analysis and Improving the
    Accuracy of Winograd Convolution for Deep Neural Networks", ACM TOMS 2020.
    """
    points = list(POINTS[tile])
    n = tile + 2
    p = torch.tensor(points, dtype=torch.float64)
    a, g, b = (torch.zeros(shape, dtype=torch.float64) for shape in ((tile, n), (n, 3), (n, n)))
    a[:, :-1] = p ** torch.arange(tile)[:, None]
    a[-1, -1] = g[-1, -1] = 1
    for j, point in enumerate(points):
        others = points[:j] + points[j + 1:]
        scale = torch.tensor([point - other for other in others], dtype=torch.float64).prod()
        g[j] = p[j] ** torch.arange(3) / scale
        b[j, :-1] = _polynomial(others)
    b[-1] = _polynomial(points)
    return a, g, b


def by_tiles(input: Tensor, weight: Tensor, tile: int, padding: int = 1, *,
             magnitudes: bool = False) -> Tensor:
    """The conv of one group by F(tile x tile, 3x3), in the input's dtype.

    Args:
        magnitudes: of every factor and term its absolute value: what rounding errors scale with.
    """
    a, g, b = (m.to(input.dtype) for m in transforms(tile))
    if magnitudes:
        a, g, b, input, weight = (t.abs() for t in (a, g, b, input, weight))
    height, width = (s + 2 * padding - 2 for s in input.shape[2:])
    down, across = -(-height // tile), -(-width // tile)
    missing = down * tile - height, across * tile - width
    x = F.pad(input, (padding, padding + missing[1], padding, padding + missing[0]))
    patches = x.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)
    v = torch.einsum("fi,nkyxij,gj->nkyxfg", b, patches, b)
    u = torch.einsum("fi,mkij,gj->mkfg", g, weight, g)
    products = torch.einsum("mkfg,nkyxfg->nmyxfg", u, v)
    y = torch.einsum("if,nmyxfg,jg->nmyixj", a, products, a)
    return y.reshape(*y.shape[:2], down * tile, across * tile)[:, :, :height, :width]
