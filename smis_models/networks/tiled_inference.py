"""pix2pixHD's widest layers a tile of rows at a time: their features are never in memory whole.

For inference. Instance norm needs the whole plane's statistics, so each tile is computed twice:
once for them, once to be used. What is computed twice is cheap: a label conv, the last doubling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import (
    InstanceNormAct2d,
    LabelLayout,
    WinogradConv2d,
    WinogradConvTranspose2d,
    norm_act,
)
from smis_kernels.interface import (
    LabelConv2d,
    channel_moments,
    doubling_conv2d,
    hooked,
    resolve,
    strided_conv2d,
    transformed,
)

ROWS = 64
_MOST_SYMBOLS = 2048  # larger tables leave the cache and win nothing

_FORWARDS = {layer.forward for layer in (
    nn.Identity, nn.ReflectionPad2d, nn.Tanh, InstanceNormAct2d, WinogradConv2d,
    WinogradConvTranspose2d)}

Rows = Callable[[int, int], Tensor]


def serves(module: nn.Module, input: Tensor | LabelLayout, layers: Sequence[nn.Module]) -> bool:
    """Whether tiles may stand for ``layers``: on a CPU's kernels, with nothing to differentiate.

    Not where a layer has hooks, or code of somebody's own, which tiles would not call.
    """
    weight = next(module.parameters())
    if torch.compiler.is_compiling() or transformed() is not None:
        return False
    if hooked(*layers) or not all(type(layer).forward in _FORWARDS for layer in layers):
        return False
    if resolve("norm_act", weight, None, ("cpu",)) != "cpu":
        return False
    if not torch.is_grad_enabled():
        return True
    wanted = any(parameter.requires_grad for parameter in module.parameters())
    return not (wanted or (isinstance(input, Tensor) and input.requires_grad))


def label_rows(layout: Tensor | LabelLayout, conv: nn.Module) -> Rows | None:
    """The stem's conv by table sums, or None where its input is no label map."""
    assert isinstance(conv, nn.Conv2d)
    if not isinstance(layout, LabelLayout) or len(layout.vectors) > _MOST_SYMBOLS:
        return None
    return LabelConv2d(layout, conv.weight, conv.bias).rows


def _tiles(height: int) -> Iterator[tuple[int, int]]:
    for first in range(0, height, ROWS):
        yield first, min(first + ROWS, height)


def _normalised(rows: Rows, height: int, eps: float) -> Rows:
    """Norm and ReLU of features that come in rows; a pass over them for the statistics."""
    means, spreads, counts = [], [], []
    for first, last in _tiles(height):
        mean, var = channel_moments("cpu", rows(first, last))
        means.append(mean)
        spreads.append(var)
        counts.append(float(last - first))
    weight = torch.tensor(counts, dtype=means[0].dtype).view(-1, 1, 1) / height
    each = torch.stack(means)
    mean = (weight * each).sum(0)
    var = (weight * (torch.stack(spreads) + (each - mean).square())).sum(0)

    def normalised(first: int, last: int) -> Tensor:
        parts = [
            norm_act(part, norm="batch", running_mean=m, running_var=v, eps=eps, activation="relu")
            for part, m, v in zip(rows(first, last).split(1), mean, var, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return normalised


def stem(rows: Rows, norm: nn.Module, down: nn.Module, height: int) -> Tensor:
    """Norm and ReLU of the stem's rows, and the first halving conv (3x3, stride 2)."""
    assert isinstance(norm, nn.InstanceNorm2d) and isinstance(down, nn.Conv2d)
    features = _normalised(rows, height, norm.eps)
    parts = []
    for first, last in _tiles(height):
        # Output row i reads input rows 2i - 1 to 2i + 1; row -1 is padding.
        x = features(max(first - 1, 0), last)
        if first == 0:
            x = F.pad(x, (0, 0, 1, 0))
        parts.append(strided_conv2d(x, down.weight, down.bias, stride=2, padding=(0, 1)))
    return torch.cat(parts, 2)


def _doubled_rows(x: Tensor, up: nn.ConvTranspose2d) -> Rows:
    """The last doubling (3x3, stride 2, output padding 1), in rows."""
    height = x.shape[2]

    def rows(first: int, last: int) -> Tensor:
        # Output rows 2i and 2i + 1 read input rows i and i + 1.
        begin, end = first // 2, min((last + 1) // 2 + 1, height)
        at_end = int(end == height)
        y = doubling_conv2d(x[:, :, begin:end], up.weight, up.bias, padding=1,
                            output_padding=(at_end, 1))
        return y[:, :, first - 2 * begin : last - 2 * begin]

    return rows


def head(x: Tensor, up: nn.Module, norm: nn.Module, conv: nn.Module) -> Tensor:
    """The last doubling, norm and ReLU, reflection padding, the image's conv and tanh."""
    assert isinstance(up, nn.ConvTranspose2d) and isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.InstanceNorm2d)
    height, pad = 2 * x.shape[2], conv.kernel_size[0] // 2
    features = _normalised(_doubled_rows(x, up), height, norm.eps)
    parts = []
    for first, last in _tiles(height):
        # Heights are multiples of 16: the tile that touches a border has the rows to reflect.
        top, bottom = max(pad - first, 0), max(last + pad - height, 0)
        y = features(max(first - pad, 0), min(last + pad, height))
        y = F.pad(y, (pad, pad, top, bottom), mode="reflect")
        parts.append(torch.tanh(conv.forward(y)))
    return torch.cat(parts, 2)
