"""Spectral norm: fused in training; in inference its weights, constants then, are made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from ..modules.spectral_norm import FusedSpectralNorm
from ..ops.content_digest.stamp import Stamp
from ..runtime.derivatives import transformed
from .swap import FOLDED, SETTINGS, Accelerated
from .watch import Settings, hooked

_BEFORE = "_smis_before"  # the class that a hook had before it was swapped


class Folded:
    """A constant made from tensors and numbers, as long as these are what they were."""

    def __init__(self, sources: Sequence[Tensor | None], make: Callable[[], Any],
                 *numbers: Any) -> None:
        # No inference tensor: later calls may ask for gradients of their inputs.
        with torch.inference_mode(False), torch.no_grad():
            self._stamp, self._numbers = Stamp(sources), numbers
            self.value = make()

    def holds(self, sources: Sequence[Tensor | None], *numbers: Any) -> bool:
        return numbers == self._numbers and self._stamp.holds(sources)


def constant(module: nn.Module, *parameters: Tensor) -> bool:
    """Whether what follows from the parameters may be kept: in eval mode, without gradients."""
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    # Elsewhere than on the CPU it would have to be waited for whether they are what they were.
    away = any(not p.is_cpu for p in parameters)
    return not (module.training or wanted or away or torch.compiler.is_compiling()
                or transformed() is not None)


class FoldedSpectralNorm(FusedSpectralNorm):
    """The hook of :func:`torch.nn.utils.spectral_norm`, idle while its weight is up to date.

    In training, or where the weight is to get a gradient, it is the fused one.
    """

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        tensors = [getattr(module, self.name + suffix) for suffix in ("_orig", "_u", "_v")]
        kept: Folded | None = vars(self).get(FOLDED)
        if not constant(module, tensors[0]):
            vars(self).pop(FOLDED, None)
            super().__call__(module, inputs)
        elif kept is None or not kept.holds(tensors, self.dim):
            def compute() -> tuple[Tensor, int]:
                super(FoldedSpectralNorm, self).__call__(module, inputs)
                weight: Tensor = getattr(module, self.name)
                return weight, weight._version

            vars(self)[FOLDED] = Folded(tensors, compute, self.dim)
        else:
            weight, version = kept.value
            if weight._version != version:  # somebody wrote to what was made
                super().__call__(module, inputs)
            else:
                setattr(module, self.name, weight)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != FOLDED}


class FoldedParametrization(Accelerated):
    """The same for :func:`torch.nn.utils.parametrizations.spectral_norm`."""

    def forward(self) -> Tensor:
        tensors = [*self.parameters(), *self.buffers()]
        kept: Folded | None = vars(self).get(FOLDED)
        settings: Settings | None = vars(self).get(SETTINGS)
        changed = settings is None or settings.owner is not self or hooked(
            *settings.modules[1:]) or settings.change()
        if changed or not constant(self, *self.parameters()):
            vars(self).pop(FOLDED, None)
            return super().forward()
        if kept is None or not kept.holds(tensors):
            def compute() -> tuple[Tensor, int]:
                made: Tensor = super(FoldedParametrization, self).forward()
                return made, made._version

            kept = vars(self)[FOLDED] = Folded(tensors, compute)
        weight: Tensor
        weight, version = kept.value
        # Somebody may have written to what was made: such a write does not last.
        return weight if weight._version == version else super().forward()


def spectral_hooks(module: nn.Module, inference: bool) -> list[SpectralNorm]:
    """Hooks of spectral norm that can be folded or, for training, fused."""
    kinds = (SpectralNorm, FusedSpectralNorm) if inference else (SpectralNorm,)
    return [h for h in module._forward_pre_hooks.values()
            if isinstance(h, SpectralNorm) and type(h) in kinds]


def is_spectral_parametrization(module: nn.Module) -> bool:
    """Whether a weight's parametrization is spectral norm and nothing else."""
    return type(module) is ParametrizationList and all(
        isinstance(p, _SpectralNorm) for p in module.children())


@dataclass(frozen=True)
class SwapHooks:
    """Hooks of spectral norm whose class is to be swapped."""

    hooks: tuple[SpectralNorm, ...]
    fused: type[FusedSpectralNorm]

    def apply(self) -> None:
        for hook in self.hooks:
            vars(hook)[_BEFORE] = type(hook)
            hook.__class__ = self.fused

    def undo(self) -> None:
        for hook in self.hooks:
            vars(hook).pop(FOLDED, None)
            hook.__class__ = vars(hook).pop(_BEFORE, type(hook))


def swapped_hooks(module: nn.Module) -> list[SwapHooks]:
    """What has been done to the module's hooks."""
    return [SwapHooks((h,), type(h)) for h in module._forward_pre_hooks.values()
            if isinstance(h, FusedSpectralNorm) and _BEFORE in vars(h)]
