"""The definition of window tables: gather the window, convolve it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..label_windows.op import GroupWindows


def windows_as_images(rows: Tensor, windows: Tensor) -> Tensor:
    """(R, C) rows and (V, 9) row numbers -> (V, C, 3, 3)."""
    return rows[windows.long()].transpose(1, 2).unflatten(2, (3, 3))


def convolve_windows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, groups: int
) -> Tensor:
    """The 3x3 conv at the centre of each window: (R, K) rows -> (V, C); row 0 is zero."""
    out = F.conv2d(windows_as_images(rows, windows), weight, bias, groups=groups).flatten(1)
    return torch.cat([torch.zeros_like(out[:1]), out[1:]])


def picked(found: list[Tensor], kinds: Tensor, groups: int) -> Tensor:
    """(V, C) of each numbering -> (V, C) whose g-th group of columns is of ``found[kinds[g]]``."""
    parts = [t.unflatten(1, (groups, -1)) for t in found]
    return torch.stack([parts[k][:, g] for g, k in enumerate(kinds.tolist())], 1).flatten(1)


def used(counts: Tensor, kinds: Tensor, rows: int) -> Tensor:
    """(rows, G, 1): whether a row is one of the windows of a group, or the outside."""
    return (torch.arange(rows, device=counts.device)[:, None] <= counts[kinds.long()])[..., None]


def window_sum(rows: Tensor, windows: Tensor, own: GroupWindows | None = None) -> Tensor:
    """(R, 9, C) rows -> (V, C): the sum of row ``windows[v, t]`` at tap t; row 0 is zero.

    With ``own`` each group of channels takes ``windows[kind]``, zero beyond its count.
    """
    if own is not None:
        parts = rows.split(rows.shape[2] // len(own.kinds), 2)
        out = torch.cat([window_sum(part, windows[k])
                         for k, part in zip(own.kinds.tolist(), parts, strict=True)], 1)
        parts = out.unflatten(1, (len(own.kinds), -1))
        return torch.where(used(own.counts, own.kinds, len(out)), parts, 0).flatten(1)
    taps = torch.arange(9, device=windows.device)
    out = rows[windows.long(), taps].sum(1)
    return torch.cat([torch.zeros_like(out[:1]), out[1:]])


def window_embedding(vectors: Tensor, weight: Tensor, bias: Tensor | None,
                     windows: Tensor | GroupWindows, *, groups: int = 1,
                     relu: bool = True) -> Tensor:
    """``act(b + sum_t W_t E[s_t])`` of every window."""
    if isinstance(windows, GroupWindows):
        found = [convolve_windows(vectors, weight, bias, w, groups) for w in windows.windows]
        out = picked(found, windows.kinds, len(windows.kinds))
        parts = out.unflatten(1, (len(windows.kinds), -1))
        out = torch.where(used(windows.counts, windows.kinds, len(out)), parts, 0).flatten(1)
    else:
        out = convolve_windows(vectors, weight, bias, windows, groups)
    return F.relu(out) if relu else out


def window_table(
    hidden: Tensor, weight_gamma: Tensor, bias_gamma: Tensor, weight_beta: Tensor,
    bias_beta: Tensor, windows: Tensor, own: GroupWindows | None = None, *, groups: int = 1,
) -> Tensor:
    """Rows [gamma | beta] of every window of hidden rows."""
    def convolved(weight: Tensor, bias: Tensor) -> Tensor:
        if own is None:
            return convolve_windows(hidden, weight, bias, windows, groups)
        taken = own.ids[:, windows.long()]
        parts = zip(own.kinds.tolist(), hidden.chunk(groups, 1), weight.chunk(groups),
                    bias.chunk(groups), strict=True)
        return torch.cat([convolve_windows(h, w, b, taken[k], 1) for k, h, w, b in parts], 1)

    return torch.cat([convolved(weight_gamma, bias_gamma), convolved(weight_beta, bias_beta)], 1)
