"""Parts of CC-FPSE, pix2pixHD and SPADE's encoder to accelerate; written as ``foreign`` is."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from foreign import LayoutNorm
from torch import Tensor, nn
from torch.nn.utils import spectral_norm


class PixelKernels(nn.Module):
    """CC-FPSE's depthwise conv: a kernel of its own at every pixel; the norm is never called."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.unfold = nn.Unfold(3, padding=1, stride=stride)
        self.norm_layer = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        taps = self.unfold(x).view(*x.shape[:2], 9, *weight.shape[2:])
        return (taps * weight.view_as(taps)).sum(2)


class MeanKernels(PixelKernels):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().forward(x, weight) / 9


class KernelUnit(nn.Module):
    """CC-FPSE's residual block, without a shortcut of its own."""

    def __init__(self, width: int, planes: int, hidden: int) -> None:
        super().__init__()

        def predictor(out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(planes, hidden, 3, padding=1), nn.ReLU(True),
                                 nn.Conv2d(hidden, out, 3, padding=1))

        self.gen_weights1, self.gen_se_weights1 = predictor(9 * width), predictor(width)
        self.norm_1, self.conv_0 = nn.BatchNorm2d(width), PixelKernels(width)
        self.conv_1 = nn.Conv2d(width, width, 1)
        self.norm_s = LayoutNorm(width, planes, hidden)

    def forward(self, x: Tensor, segmap: Tensor, features: Tensor) -> Tensor:
        resized = F.interpolate(segmap, size=x.shape[2:], mode="nearest")
        condition = torch.cat([resized, features], 1)
        y = self.conv_1(self.conv_0(self.norm_1(x), self.gen_weights1(condition)))
        gate = torch.sigmoid(self.gen_se_weights1(condition))
        return self.norm_s(x, condition) + F.leaky_relu(y * gate, 0.2)


def label_encoder(planes: int, width: int) -> nn.Sequential:
    """CC-FPSE's: spectral convs with batch norm."""
    def layer(channels: int, stride: int) -> nn.Sequential:
        conv = spectral_norm(nn.Conv2d(channels, width, 3, stride, 1, bias=False))
        return nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(width)), nn.LeakyReLU(0.2, True))

    return nn.Sequential(layer(planes, 1), layer(width, 2))


def image_network(out: int = 3, width: int = 8, planes: int = 3) -> nn.Sequential:
    """pix2pixHD's global generator in small: instance norms, one shared in-place ReLU."""
    relu = nn.ReLU(True)
    return nn.Sequential(
        nn.ReflectionPad2d(3), nn.Conv2d(planes, width, 7), nn.InstanceNorm2d(width), relu,
        nn.Conv2d(width, 2 * width, 3, 2, 1), nn.InstanceNorm2d(2 * width), relu,
        nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1), nn.InstanceNorm2d(width), relu,
        nn.ReflectionPad2d(3), nn.Conv2d(width, out, 7), nn.Tanh())


class InstanceEncoder(nn.Module):
    """pix2pixHD's feature encoder: the published loop over instances, images and channels."""

    def __init__(self, out: int = 3) -> None:
        super().__init__()
        self.output_nc = out
        self.model = image_network(out)

    def forward(self, image: Tensor, inst: Tensor) -> Tensor:
        features = self.model(image)
        pooled = features.clone()
        for index in np.unique(inst.cpu().numpy().astype(int)):
            for b in range(len(image)):
                where = inst[b, 0] == int(index)
                for channel in range(self.output_nc):
                    values = features[b, channel][where]
                    pooled[b, channel][where] = values.mean().expand_as(values)
        return pooled


class MaxEncoder(InstanceEncoder):
    """The same attributes, another pooling."""

    def forward(self, image: Tensor, inst: Tensor) -> Tensor:
        features = self.model(image)
        pooled = features.clone()
        for index in inst.unique():
            where = (inst == index).expand_as(features)
            pooled[where] = features[where].max()
        return pooled


class StyleEncoder(nn.Module):
    """SPADE's image encoder: it flattens its features with ``view``, so their format matters."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        channels = 3
        for i, factor in enumerate((1, 2, 4)):
            conv = spectral_norm(nn.Conv2d(channels, factor * width, 3, 2, 1, bias=False))
            layer = nn.Sequential(conv, nn.InstanceNorm2d(factor * width))
            self.add_module(f"layer{i + 1}", layer)
            channels = factor * width
        self.fc_mu = nn.Linear(16 * channels, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.layer2(F.leaky_relu(self.layer1(x), 0.2)), 0.2)
        x = F.leaky_relu(self.layer3(x), 0.2)
        return self.fc_mu(x.view(len(x), -1))
