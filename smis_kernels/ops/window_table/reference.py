"""The definition of window tables: gather the window, convolve it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def windows_as_images(rows: Tensor, windows: Tensor) -> Tensor:
    """(R, C) rows and (V, 9) row numbers -> (V, C, 3, 3)."""
    return rows[windows.long()].transpose(1, 2).unflatten(2, (3, 3))


def convolve_windows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, groups: int
) -> Tensor:
    """The 3x3 conv at the centre of each window: (R, K) rows -> (V, C); row 0 is zero."""
    out = F.conv2d(windows_as_images(rows, windows), weight, bias, groups=groups).flatten(1)
    return torch.cat([torch.zeros_like(out[:1]), out[1:]])


def window_sum(rows: Tensor, windows: Tensor) -> Tensor:
    """(R, 9, C) rows -> (V, C): the sum of row ``windows[v, t]`` at tap t; row 0 is zero."""
    taps = torch.arange(9, device=windows.device)
    out = rows[windows.long(), taps].sum(1)
    return torch.cat([torch.zeros_like(out[:1]), out[1:]])


def window_embedding(vectors: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, *,
                     groups: int = 1, relu: bool = True) -> Tensor:
    """``act(b + sum_t W_t E[s_t])`` of every window."""
    out = convolve_windows(vectors, weight, bias, windows, groups)
    return F.relu(out) if relu else out


def window_table(
    hidden: Tensor, weight_gamma: Tensor, bias_gamma: Tensor, weight_beta: Tensor,
    bias_beta: Tensor, windows: Tensor, *, groups: int = 1,
) -> Tensor:
    """Rows [gamma | beta] of every window of hidden rows."""
    return torch.cat([
        convolve_windows(hidden, weight_gamma, bias_gamma, windows, groups),
        convolve_windows(hidden, weight_beta, bias_beta, windows, groups),
    ], 1)
