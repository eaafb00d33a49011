"""The definition of the spectrally normalised weight."""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_weight(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``weight / (u @ weight @ v)``, the weight taken as a matrix with a row for each output."""
    return weight / torch.dot(u, torch.mv(weight.flatten(1), v))


def spectral_weight_backward(grad: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Its gradient by the weight, in terms that autograd differentiates once more."""
    sigma = torch.dot(u, torch.mv(weight.flatten(1), v))
    inner = (grad * weight).sum() / sigma
    return (grad - inner * torch.outer(u, v).view_as(weight)) / sigma
