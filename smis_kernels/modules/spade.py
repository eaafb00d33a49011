"""SPADE and CG-Norm as drop-in modules with the published state-dict keys."""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout.label_layout import LabelLayout
from ..layout.planner import choose, own_windows
from ..layout.shared_tables import shared_table
from ..ops.indexed_modulation.op import indexed_modulation, indexed_modulation_pair
from ..ops.indexed_shortcut.choice import takes_shortcut
from ..ops.indexed_shortcut.op import indexed_shortcut
from ..ops.level_tables.op import NormConvs
from ..ops.modulation.op import modulation, modulation_pair
from ..ops.window_table.op import window_embedding, window_table
from ..ops.winograd_conv.choice import conv3x3
from ..runtime.check import check_tensor
from ..runtime.constants import constant
from ..runtime.tensors import acc_dtype
from .normalizing import (
    Normalizing,
    child,
    hooked_everywhere,
    is_as_defined,
    is_told_by_weights,
    weights_made_once,
)
from .winograd_conv import WinogradConv2d

_CONFIG = re.compile(r"spade(batch|syncbatch|instance)(\d+)x(\d+)")


def _is_plain(conv: Any) -> bool:
    """Whether a conv of weight and bias is what the tables and the fused conv compute."""
    if not is_told_by_weights(conv, nn.Conv2d):
        return False
    height, width = conv.kernel_size
    return (conv.padding_mode == "zeros" and conv.stride == conv.dilation == (1, 1)
            and conv.padding in ((height // 2, width // 2), "same"))


class CGNorm(Normalizing):
    r"""GroupDNet's conditional group normalisation: SPADE whose gamma and beta convs are grouped.

    Groups are of the **convolutions** that predict gamma and beta from the segmentation; the
    statistics are those of ``norm``, not of channel groups as in ``torch.nn.GroupNorm``.

    .. math:: y = \hat x (1 + \gamma(m)) + \beta(m), \quad h = \mathrm{ReLU}(W_s * m + b_s)

    Args:
        channels: C of the features.
        label_channels: channels of the segmentation map.
        hidden: channels of ``mlp_shared``; 0 for single convs from the map (Multi-SPADE).
        groups: groups of ``mlp_gamma`` and ``mlp_beta``.
        shared_groups: groups of ``mlp_shared``; ``groups`` by default.
        norm: "batch", "syncbatch" (all-reduced in training under torch.distributed), "instance" or
            "none".
        kernel_size: of the three convs, odd.
        backend: "auto", "reference", "cpu" or "triton"; default: what ``use_backend`` says.

    State dict: ``param_free_norm.*``, ``mlp_shared.0.*``, ``mlp_gamma.*``, ``mlp_beta.*``.

    Source: Zhu et al., "Semantically Multi-modal Image Synthesis", 2020.

    Example:
        >>> norm = CGNorm(64, 8, 128, groups=4)
        >>> y = norm(torch.randn(1, 64, 32, 32), torch.randn(1, 8, 256, 256))
    """

    def __init__(
        self, channels: int, label_channels: int, hidden: int, *, groups: int,
        shared_groups: int | None = None, norm: str = "batch", kernel_size: int = 3,
        backend: str | None = None,
    ) -> None:
        super().__init__(channels, norm)
        shared = groups if shared_groups is None else shared_groups
        source = hidden or label_channels
        for name, divisor, total in (
            ("groups", groups, channels), ("groups", groups, source),
            ("shared_groups", shared, source), ("shared_groups", shared, label_channels),
        ):
            if divisor < 1 or total % divisor:
                raise ValueError(f"{name}: expected a divisor of {total}, got {divisor}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        self.label_channels, self.hidden, self.backend = label_channels, hidden, backend
        pad = kernel_size // 2
        if hidden:
            self.mlp_shared = nn.Sequential(
                nn.Conv2d(label_channels, hidden, kernel_size, padding=pad, groups=shared),
                nn.ReLU(),
            )
        self.mlp_gamma = nn.Conv2d(source, channels, kernel_size, padding=pad, groups=groups)
        self.mlp_beta = nn.Conv2d(source, channels, kernel_size, padding=pad, groups=groups)

    def extra_repr(self) -> str:
        return f"{self.channels}, label_channels={self.label_channels}"

    def gamma_beta(
        self, segmap: Tensor, size: tuple[int, int], fused: bool
    ) -> tuple[Tensor, Tensor]:
        """Gamma and beta (N, C, H, W) by dense convs; ``fused``: one conv with 2C outputs."""
        if fused and tuple(segmap.shape[2:]) == tuple(size):
            resized = segmap
        else:
            resized = F.interpolate(segmap, size=size, mode="nearest")
        return self.convolved(self.mlp_shared(resized) if self.hidden else resized, fused)

    def convolved(self, hidden: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        """Gamma and beta from what their convs read; ``fused``: one conv with 2C outputs."""
        gamma, beta = self.mlp_gamma, self.mlp_beta
        if not fused or self._called or gamma.groups > 1:  # grouped outputs would interleave
            return gamma(hidden), beta(hidden)
        assert gamma.bias is not None and beta.bias is not None
        weight, bias = (
            constant("gamma and beta", partial(torch.cat, parts), *parts)
            for parts in ((gamma.weight, beta.weight), (gamma.bias, beta.bias))
        )
        if gamma.kernel_size == (3, 3):
            both = conv3x3(hidden, weight, bias, largest=2 if self.training else 4)
        else:
            both = F.conv2d(hidden, weight, bias, padding=gamma.padding)
        return both[:, : self.channels], both[:, self.channels :]

    def table(self, layout: LabelLayout, size: tuple[int, int], path: str) -> Tensor:
        """Gamma and beta of every distinct window at ``size``: (U + 1, 2C), rows [gamma | beta]."""
        level = layout.level(size)
        windows = level.windows5 if self.hidden else level.windows3
        build = partial(self._rows, layout, size, path)
        tables = layout.tables
        if tables is None:
            return build(level.windows3, windows)
        return tables.table(self, size, layout, self.reach, build)

    def _rows(self, layout: LabelLayout, size: tuple[int, int], path: str, windows3: Tensor,
              windows: Tensor) -> Tensor:
        """Rows for ``windows``, made with those of other norms that are known to read them."""
        if path == "one_level" and self.hidden:
            found = shared_table(self, layout, size, windows3, windows)
            if found is not None:
                return found
        return self._build_table(layout, windows3, windows, path)

    def _build_table(self, layout: LabelLayout, windows3: Tensor, windows: Tensor,
                     path: str) -> Tensor:
        """Rows for ``windows``: of 3x3-window ids, or of symbols with hidden=0."""
        gamma, beta = self.mlp_gamma, self.mlp_beta
        dtype = acc_dtype(gamma.weight)

        def wide(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
            assert conv.bias is not None
            weight, bias = (constant(("wide", dtype), partial(t.to, dtype), t)
                            for t in (conv.weight, conv.bias))
            return weight, bias

        vectors = layout.vectors.to(dtype)
        shared = self.shared_conv
        if shared is None:
            return torch.cat([
                window_embedding(vectors, *wide(conv), windows, groups=conv.groups, relu=False,
                                 order=layout.window_order(windows, self.reach))
                for conv in (gamma, beta)
            ], 1)
        one_level = path == "one_level"
        own = None if one_level else own_windows(self, layout, windows3, len(windows) - 1)
        hidden = window_embedding(vectors, *wide(shared), windows3 if own is None else own,
                                  groups=shared.groups,
                                  order=layout.window_order(windows3, self.reach))
        assert gamma.bias is not None and beta.bias is not None
        return window_table(
            hidden, gamma.weight, gamma.bias, beta.weight, beta.bias, windows, own=own,
            groups=gamma.groups, one_level=one_level,
            order=layout.window_order(windows, self.reach),
        )

    @property
    def shared_conv(self) -> nn.Conv2d | None:
        """The conv of ``mlp_shared``; None with hidden=0."""
        if not self.hidden:
            return None
        conv = self.mlp_shared[0]
        assert isinstance(conv, nn.Conv2d)
        return conv

    @property
    def convs(self) -> NormConvs | None:
        """The convs of a table over 5x5 windows; None where there is none."""
        if not self.hidden or self.no_tables:
            return None
        shared, gamma, beta = self.shared_conv, self.mlp_gamma, self.mlp_beta
        assert shared is not None
        assert shared.bias is not None and gamma.bias is not None and beta.bias is not None
        return NormConvs(shared.weight, shared.bias, gamma.weight, gamma.bias, beta.weight,
                         beta.bias, shared.groups, gamma.groups)

    @property
    def reach(self) -> int:
        """How far the convs see together: 1 a 3x3 window, 2 a 5x5 window."""
        return 2 if self.hidden else 1

    @property
    def rows(self) -> tuple[int, bool]:
        """What a row of :meth:`table` is of: windows of this reach, and whether of each image."""
        return self.reach, False

    @property
    def no_tables(self) -> str:
        """Why window tables do not serve; "" where they do."""
        if self._called:
            return "its convs have hooks, or settings of their own, and run where they are called"
        size = self.mlp_gamma.kernel_size[0]
        return "" if size == 3 else f"kernel_size is {size}, tables are for 3"

    @property
    def _called(self) -> bool:
        """Whether calling the convs does more, or other, than their weights tell."""
        gamma = child(self, "mlp_gamma")
        convs = [gamma, child(self, "mlp_beta")]
        if self.hidden:
            shared = child(self, "mlp_shared")
            parts = [*shared._modules.values()]
            if len(parts) != 2 or not (is_as_defined(shared, nn.Sequential)
                                       and is_as_defined(parts[1], nn.ReLU)):
                return True
            convs.append(parts[0])
        return hooked_everywhere() or not all(
            _is_plain(conv) and conv.kernel_size == gamma.kernel_size for conv in convs)

    @property
    def products(self) -> tuple[int, int]:
        """Multiply-adds at one pixel: of gamma and beta's convs, and of the shared one."""
        shared = self.shared_conv
        return 2 * self.mlp_gamma.weight.numel(), 0 if shared is None else shared.weight.numel()

    @property
    def outline(self) -> Hashable:
        """What :attr:`no_tables` and :attr:`products` follow from, sooner found than they are."""
        if self._called:
            return self.label_channels
        gamma = child(self, "mlp_gamma")
        groups = child(child(self, "mlp_shared"), "0").groups if self.hidden else 1
        return (gamma.out_channels, gamma.in_channels, gamma.groups, gamma.kernel_size, groups,
                self.label_channels, self.hidden)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Channels (begin, end) of the map that each group of gamma and beta sees; () of one."""
        shared, groups = self.shared_conv, self.mlp_gamma.groups
        if shared is None or groups == 1:
            return ()
        wide, deep = self.hidden // groups, self.hidden // shared.groups  # hidden channels of each
        planes = self.label_channels // shared.groups
        return tuple(((g * wide) // deep * planes, -((-(g + 1) * wide) // deep) * planes)
                     for g in range(groups))

    def index(self, layout: LabelLayout, size: tuple[int, int]) -> Tensor:
        """The row of :meth:`table` at each pixel of ``size``."""
        level = layout.level(size)
        return level.index5 if self.hidden else level.index3

    def output_size(self, input: Tensor, upsample: bool) -> tuple[int, int]:
        """(H, W) of the output."""
        check_tensor("input", input, 4, "(N, C, H, W)", None)
        scale = 2 if upsample else 1
        return input.shape[2] * scale, input.shape[3] * scale

    def forward(
        self, input: Tensor, segmap: Tensor | LabelLayout, *, activation: str | None = None,
        negative_slope: float = 0.2, upsample: bool = False,
    ) -> Tensor:
        """Modulate (N, C, H, W) features by a (N, label_channels, any, any) map or its layout.

        The map is resized by nearest to the output; ``upsample`` folds a nearest x2 upsampling
        of the features into the read, ``activation`` a ReLU or LeakyReLU into the write.
        """
        size = self.output_size(input, upsample)
        with weights_made_once(self):
            plan = choose((self,), input, segmap, size)
            input, options = self.normalised(input, upsample)
            options.update(activation=activation, negative_slope=negative_slope,
                           backend=self.backend)
            if plan.layout is None:
                gamma, beta = self.gamma_beta(plan.dense(size), size, plan.fused)
                return modulation(input, gamma, beta, **options)
            index, table = self.index(plan.layout, size), self.table(plan.layout, size, plan.path)
            return indexed_modulation(input, index, table, order=plan.layout.pixel_order(index),
                                      **options)


class SPADE(CGNorm):
    """Spatially-adaptive normalisation: x-hat * (1 + gamma(m)) + beta(m).

    :class:`CGNorm` with one group; arguments and state-dict keys as there.

    Source: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", 2019.

    Example:
        >>> norm = SPADE(64, 183)
        >>> y = norm(torch.randn(1, 64, 32, 32), torch.randn(1, 183, 256, 256))
    """

    def __init__(
        self, channels: int, label_channels: int, hidden: int = 128, *, norm: str = "batch",
        kernel_size: int = 3, backend: str | None = None,
    ) -> None:
        super().__init__(
            channels, label_channels, hidden, groups=1, norm=norm, kernel_size=kernel_size,
            backend=backend,
        )

    @classmethod
    def from_config(cls, config_text: str, norm_nc: int, label_nc: int) -> SPADE:
        """Build from the published arguments, e.g. ``("spadesyncbatch3x3", 64, 183)``.

        Raises:
            ValueError: the text is not spade{batch,syncbatch,instance}{k}x{k}.
        """
        match = _CONFIG.search(config_text)
        if match is None or match[2] != match[3]:
            raise ValueError(
                "config_text: expected spade{batch,syncbatch,instance}{k}x{k}, got "
                f"{config_text!r}"
            )
        return cls(norm_nc, label_nc, norm=match[1], kernel_size=int(match[2]))


def modulate_pair(
    norm_0: CGNorm, norm_s: CGNorm, input: Tensor, segmap: Tensor | LabelLayout, *,
    activation: str | None = "leaky_relu", negative_slope: float = 0.2, upsample: bool = False,
    conv_s: nn.Conv2d | None = None,
) -> tuple[Tensor, Tensor]:
    """``norm_0`` (activated) and the shortcut's ``norm_s`` (not) from one read of ``input``.

    Equals ``norm_0(input, segmap, activation=...), norm_s(input, segmap)``; both have the same
    kind of norm. Where only one of them is frozen, or other statistics are kept, these are made.
    The second output is ``conv_s`` of that, where one is given: outside of training a CPU computes
    a plain 1x1 conv, C to C' channels, by :func:`indexed_shortcut`, and ``norm_s(input)`` is never
    written.

    Example:
        >>> x, seg = torch.randn(1, 64, 32, 32), torch.randn(1, 8, 64, 64)
        >>> y, y_s = modulate_pair(SPADE(64, 8), SPADE(64, 8), x, seg, upsample=True)
    """
    called = norm_0.calls_norm or norm_s.calls_norm
    shared, shared_s = ({} if called else norm.shared_arguments() for norm in (norm_0, norm_s))
    if any(shared.get(name) != shared_s.get(name) for name in ("norm", "eps")):
        raise ValueError(f"norm_s: expected the settings of norm_0 {shared}, got {shared_s}")
    running, running_s = norm_0.norm_arguments(), norm_s.norm_arguments("_s")
    alike = (running["running_mean"] is None) == (running_s["running_mean_s"] is None)
    # One index would pick from tables of other rows.
    if called or norm_0.rows != norm_s.rows or shared != shared_s or not alike:
        first = norm_0(input, segmap, activation=activation, negative_slope=negative_slope,
                       upsample=upsample)
        return _shortened(first, norm_s(input, segmap, upsample=upsample), conv_s)
    with weights_made_once(norm_0, norm_s):
        size = norm_0.output_size(input, upsample)
        plan = choose((norm_0, norm_s), input, segmap, size)
        options = {"activation": activation, "negative_slope": negative_slope, "upsample": upsample,
                   "backend": norm_0.backend, **running, **running_s, **shared}
        norm_0.count_batch()
        norm_s.count_batch()
        if plan.layout is None:
            affine = (*norm_0.gamma_beta(plan.dense(size), size, plan.fused),
                      *norm_s.gamma_beta(plan.dense(size), size, plan.fused))
            return _shortened(*modulation_pair(input, *affine, **options), conv_s)
        table, table_s = (norm.table(plan.layout, size, plan.path) for norm in (norm_0, norm_s))
        index = norm_0.index(plan.layout, size)
        if conv_s is not None and not norm_s.training and (
                is_as_defined(conv_s, nn.Conv2d, WinogradConv2d)
                and takes_shortcut(conv_s, input, table_s, norm_s.backend)):
            first = indexed_modulation(
                input, index, table, activation=activation, negative_slope=negative_slope,
                upsample=upsample, backend=norm_0.backend, **running, **shared)
            return first, indexed_shortcut(
                input, index, table_s, conv_s.weight, groups=conv_s.groups, upsample=upsample,
                backend=norm_s.backend, **norm_s.norm_arguments(), **shared)
        pair = indexed_modulation_pair(input, index, table, table_s,
                                       order=plan.layout.pixel_order(index), **options)
        return _shortened(*pair, conv_s)


def _shortened(first: Tensor, second: Tensor, conv: nn.Conv2d | None) -> tuple[Tensor, Tensor]:
    return first, second if conv is None else conv(second)
