"""torch.nn.utils.spectral_norm with fewer passes over the weights in training."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as torch_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..ops.spectral_weight.op import KINDS, spectral_weight
from ..runtime.backend import requested, resolve
from ..runtime.check import WIDE
from ..runtime.derivatives import transformed
from .winograd_conv import WinogradConv2d

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# Values of a weight below which torch's own hook is the faster one in eval mode: measured on one
# thread, 26 us against 110 us at 64 channels of 3x3, 204 against 383 at 256, no difference at 512.
SMALL = 1_000_000


class FusedSpectralNorm(SpectralNorm):
    """The hook of :func:`torch.nn.utils.spectral_norm`: same numbers, fewer passes.

    Where the formula would run anyway (a GPU, 16-bit weights, autocast, the reference backend,
    another ``dim`` than 0), and in eval mode of a small weight, it is torch's hook itself.
    """

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        weight: Tensor = getattr(module, f"{self.name}_orig")
        small = not module.training and weight.numel() < SMALL
        if small or not self._fused(weight):
            super().__call__(module, inputs)
            return
        u, v = getattr(module, f"{self.name}_u"), getattr(module, f"{self.name}_v")
        matrix = weight.detach().flatten(1)
        rounds = self.n_power_iterations if module.training else 0
        with torch.no_grad():
            for _ in range(rounds):
                v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=self.eps, out=v)
                product = torch.mv(matrix, v)
                u = F.normalize(product, dim=0, eps=self.eps, out=u)
            if rounds:  # the next forward overwrites them, perhaps before this one's backward
                u, v = u.clone(), v.clone()
            else:
                product = torch.mv(matrix, v)
            sigma = torch.dot(u, product)
        setattr(module, self.name, spectral_weight(
            weight, u, v, sigma=sigma, memory_format=_weight_format(module, inputs)))

    def _fused(self, weight: Tensor) -> bool:
        return (
            self.dim == 0 and weight.is_cpu and weight.dtype in WIDE
            and requested() in ("auto", "cpu") and not torch.is_autocast_enabled("cpu")
            and transformed() is None
            and resolve("spectral_weight", weight, None, KINDS) == "cpu"
        )


def _weight_format(module: nn.Module, inputs: Any) -> torch.memory_format:
    """How the module wants its weight stored: see :meth:`WinogradConv2d.weight_format`."""
    if isinstance(module, WinogradConv2d) and inputs:
        return module.weight_format(inputs[0])
    return torch.contiguous_format


def spectral_norm(module: ModuleT, name: str = "weight", n_power_iterations: int = 1,
                  eps: float = 1e-12, dim: int | None = None) -> ModuleT:
    r"""Drop-in for :func:`torch.nn.utils.spectral_norm`, fewer passes in training on a CPU.

    .. math:: v \leftarrow W^T u / \lVert W^T u \rVert, \quad u \leftarrow W v / \lVert W v \rVert,
        \quad \hat W = W / (u^T W v)

    Same arguments, parameters, buffers and state dict; :func:`torch.nn.utils.remove_spectral_norm`
    takes it off. The division is :func:`spectral_weight`.

    Raises:
        ValueError: ``eps`` is below 0; as torch's.

    Paper: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.

    Example:
        >>> layer = spectral_norm(nn.Conv2d(8, 16, 3, padding=1))
        >>> layer(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 16, 4, 4])
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    wrapped: ModuleT = torch_spectral_norm(module, name, n_power_iterations, eps, dim)
    for hook in wrapped._forward_pre_hooks.values():
        if type(hook) is SpectralNorm:
            hook.__class__ = FusedSpectralNorm
    return wrapped


def release_weights(network: nn.Module) -> None:
    """Let go of the normalised weights of the last forward; a backward keeps those that it needs.

    Each module's ``weight`` is then what it is before a first forward, the parameter's values, and
    the next forward makes it anew. Between a forward and its backward a step of training holds
    less: weights are freed one by one while their gradients come.

    Args:
        network: its modules under torch's spectral norm, or :func:`spectral_norm`'s.

    Example:
        >>> layer = spectral_norm(nn.Conv2d(8, 16, 3, padding=1))
        >>> loss = layer(torch.randn(1, 8, 4, 4)).sum()
        >>> release_weights(layer)
        >>> loss.backward()
    """
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(module, hook.name, getattr(module, f"{hook.name}_orig").data)
