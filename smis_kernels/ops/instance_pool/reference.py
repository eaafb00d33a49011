"""The definition: one image, one instance and one channel at a time, as pix2pixHD computes it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def instance_avg_pool2d(input: Tensor, instance_map: Tensor) -> Tensor:
    """(N, C, H, W): every pixel the mean of its instance, found with a host copy of the ids."""
    pooled = input.clone()
    for n in range(input.shape[0]):
        for i in np.unique(instance_map[n].cpu().numpy()):
            inside = instance_map[n] == int(i)
            for c in range(input.shape[1]):
                mean = input[n, c][inside].mean()
                pooled[n, c] = torch.where(inside, mean, pooled[n, c])
    return pooled


def instance_mean_table(input: Tensor, instance_map: Tensor) -> tuple[Tensor, ...]:
    """(image, id, mean, count) of each instance, by image and then by id."""
    rows = []
    wide = input.double() if input.dtype == torch.float64 else input.float()
    for n in range(input.shape[0]):
        for i in np.unique(instance_map[n].cpu().numpy()):
            inside = instance_map[n] == int(i)
            mean = wide[n][:, inside].mean(1)
            rows.append((n, int(i), mean, int(inside.sum())))
    images, ids, means, counts = zip(*rows, strict=True)
    return (*(torch.tensor(x, device=input.device) for x in (images, ids)), torch.stack(means),
            torch.tensor(counts, device=input.device))
