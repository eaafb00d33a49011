"""Multi-SPADE: several conditions in turn, composed into one affine and applied in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout.label_layout import LabelLayout
from ..layout.planner import PathChoice, choose
from ..ops.indexed_modulation.op import indexed_modulation
from ..ops.label_windows.op import number_vectors
from ..ops.modulation.op import modulation
from .normalizing import Normalizing, weights_made_once
from .spade import SPADE, CGNorm

Condition = Tensor | LabelLayout | None
Affine = tuple[Tensor, Tensor]


def compose(affines: Sequence[Affine]) -> Affine:
    """Gamma and beta of several applied one after the other: ``x·(1 + gamma) + beta`` each."""
    gamma, beta = affines[0]
    for g, b in affines[1:]:
        gamma, beta = torch.addcmul(gamma + g, gamma, g), torch.addcmul(beta + b, beta, g)
    return gamma, beta


class MultiSPADE(Normalizing):
    r"""SPADEs of several conditions in turn on one normalisation, in one pass over the features.

    .. math:: y = \hat x \prod_i (1 + \gamma_i) + \sum_i \beta_i \prod_{j > i} (1 + \gamma_j)
              = \hat x (1 + \gamma) + \beta

    Conditions that are label maps have one row of gamma and beta for each distinct window; where
    all are, their rows are composed for each combination that occurs, and the features are
    modulated by index. Where one is not (a picture, a soft map), gamma and beta are composed per
    pixel.

    Args:
        channels: C of the features.
        conditions: (channels, hidden) of each condition; hidden 0 for single convs from it.
        norm: "batch", "syncbatch" (all-reduced in training under torch.distributed) or "instance".
        kernel_size: of all convs, odd.
        backend: "auto", "reference", "cpu" or "triton"; default: what ``use_backend`` says.

    State dict: ``param_free_norm.*``, and for each condition ``spades.<i>.`` with
    ``mlp_shared.0.*`` (where hidden), ``mlp_gamma.*``, ``mlp_beta.*``.

    Raises:
        ValueError: no condition, or sizes that do not fit; the message names the argument.

    Source: Mallya et al., "World-Consistent Video-to-Video Synthesis", ECCV 2020.

    Example:
        >>> norm = MultiSPADE(64, [(35, 0), (3, 0), (4, 128)])
        >>> labels, frame = torch.rand(1, 35, 32, 32), torch.rand(1, 3, 32, 32)
        >>> x = torch.randn(1, 64, 16, 16)
        >>> y = norm(x, labels, frame, None)  # None: this condition is absent
    """

    def __init__(self, channels: int, conditions: Sequence[tuple[int, int]], *,
                 norm: str = "batch", kernel_size: int = 3, backend: str | None = None) -> None:
        super().__init__(channels, norm)
        if not conditions:
            raise ValueError("conditions: expected at least one (channels, hidden), got none")
        self.backend = backend
        self.spades = nn.ModuleList(
            SPADE(channels, labels, hidden, norm="none", kernel_size=kernel_size, backend=backend)
            for labels, hidden in conditions
        )

    def forward(
        self, input: Tensor, *conditions: Condition, activation: str | None = None,
        negative_slope: float = 0.2, upsample: bool = False,
    ) -> Tensor:
        """Modulate (N, C, H, W) features by every condition, (N, K_i, any, any) or its layout.

        Conditions are resized by nearest; one that is None is left out. ``activation`` and
        ``upsample`` are as in :class:`SPADE`.
        """
        if len(conditions) != len(self.spades):
            raise ValueError(
                f"conditions: expected {len(self.spades)} (None where one is absent), got "
                f"{len(conditions)}"
            )
        with weights_made_once(*self.spades):
            return self._modulated(input, conditions, upsample, activation=activation,
                                   negative_slope=negative_slope, backend=self.backend)

    def _modulated(self, input: Tensor, conditions: Sequence[Condition], upsample: bool,
                   **options: Any) -> Tensor:
        plans: list[tuple[SPADE, PathChoice]] = []
        for spade, condition in zip(self.spades, conditions, strict=True):
            assert isinstance(spade, SPADE)
            size = spade.output_size(input, upsample)
            if condition is not None:
                plans.append((spade, choose((spade,), input, condition, size)))
        if not plans:
            raise ValueError("conditions: expected at least one that is present, got None alone")
        input, settings = self.normalised(input, upsample)
        options.update(settings)
        indexed = _indexed(plans, size)
        if indexed is not None:
            layout = plans[0][1].layout
            assert layout is not None
            return indexed_modulation(input, *indexed, order=layout.pixel_order(indexed[0]),
                                      **options)
        gamma, beta = compose([_dense(*plan, size) for plan in plans])
        return modulation(input, gamma, beta, **options)


def _table(spade: CGNorm, plan: PathChoice, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The row of each pixel, (N, h, w), and the table, rows [gamma | beta]."""
    assert plan.layout is not None
    return spade.index(plan.layout, size), spade.table(plan.layout, size, plan.path)


def _dense(spade: CGNorm, plan: PathChoice, size: tuple[int, int]) -> Affine:
    """Gamma and beta at every pixel."""
    if plan.layout is None:
        return spade.gamma_beta(plan.dense(size), size, plan.fused)
    index, table = _table(spade, plan, size)
    both = F.embedding(index, table.to(plan.dtype)).permute(0, 3, 1, 2)
    return both[:, : spade.channels], both[:, spade.channels :]


def _indexed(plans: Sequence[tuple[CGNorm, PathChoice]],
             size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Index and table of all conditions together, where all have one and combinations repeat."""
    if any(plan.layout is None for _, plan in plans):
        return None
    if len(plans) == 1:
        return _table(*plans[0], size)
    if torch.compiler.is_compiling():  # how many combinations there are depends on the data
        return None
    indices, tables = zip(*(_table(*plan, size) for plan in plans), strict=True)
    stacked = torch.stack(indices, 1)
    # Rows are counted in fp64, which no table is too long for.
    joint, rows = number_vectors(stacked.double(), stacked[:, 0].numel() // 2, backend="auto")
    if len(rows) == 0:
        return None
    channels = plans[0][0].channels
    picked = [table[rows[:, i].long()] for i, table in enumerate(tables)]
    affine = compose([(rows[:, :channels], rows[:, channels:]) for rows in picked])
    return joint, torch.cat(affine, 1)
