"""GroupDNet's encoder: every class to its own latent code, in one grouped network."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from smis_kernels import class_boxes, class_crops, norm_act
from smis_kernels._backend import requested

from .blocks import conv
from .presets import GroupDNetPreset


class _Pairs(NamedTuple):
    """The present (image, class) pairs of a batch, P of them, by image."""

    images: Tensor
    classes: Tensor


def _of_classes(parameter: Tensor, classes: Tensor | None, count: int) -> Tensor:
    """The rows of ``classes`` (None: all) of a parameter whose rows belong to ``count`` classes."""
    if classes is None:
        return parameter
    return parameter.unflatten(0, (count, -1)).index_select(0, classes).flatten(0, 1)


def _conv_weight(layer: nn.Conv2d, classes: Tensor | None, count: int) -> Tensor:
    """The weight of ``classes``, spectral norm applied as the layer's hook does: over all of it."""
    hooks = layer._forward_pre_hooks.values()
    spectral = next((hook for hook in hooks if isinstance(hook, SpectralNorm)), None)
    if spectral is None or layer.training:
        if spectral is not None:
            spectral(layer, ())  # a step of power iteration
        return _of_classes(layer.weight, classes, count)
    original, u, v = (
        layer.get_parameter("weight_orig"), layer.get_buffer("weight_u"),
        layer.get_buffer("weight_v"),
    )
    sigma = torch.dot(u, torch.mv(spectral.reshape_weight_to_matrix(original), v))
    return _of_classes(original, classes, count) / sigma


class GroupDNetEncoder(nn.Module):
    """Class-wise encoder: the crop of a class gives mean and log variance of its latent code.

    Five or six (from 256 pixels of the longer side up) convs 3x3, stride 2, grouped by class,
    spectral and instance normalised, LeakyReLU(0.2); then two heads, grouped by class.

    An absent class, whose three planes are zero, stays zero through all convs (no bias) and
    instance norms, so its code is the heads' bias, exactly. Only the present (image, class)
    pairs are computed, as the groups of one conv over a batch of one; which they are is read on
    the host. All classes are computed on the reference backend, under torch.compile, and where
    ``x`` requires a gradient, for an absent class's planes have one.

    Args:
        preset: options; ``nef`` is the width of the first conv over all classes.

    Shapes: x (N, 3·classes, H, W), class-major -> mu, logvar (N, 8·classes, h, w) each;
        channels 8c..8c+7 belong to class c.

    Raises:
        ValueError: another number of channels.

    Paper: Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020, section 3.2.

    Example:
        >>> encoder = create_model("groupdnet_deepfashion", part="encoder")
        >>> mu, logvar = encoder.encode(image, labels)
        >>> z = reparameterize(mu, logvar)
    """

    def __init__(self, preset: GroupDNetPreset) -> None:
        super().__init__()
        self.classes = preset.classes
        self.image_size = preset.image_size
        self.depth = 6 if max(preset.image_size) >= 256 else 5
        width, groups = 3 * preset.classes, preset.classes
        for i in range(self.depth):
            out = preset.nef * min(2**i, 8)
            layer = conv(width, out, groups=groups, stride=2, bias=False, spectral=True,
                         what=f"layer{i + 1}")
            self.add_module(f"layer{i + 1}", nn.Sequential(layer, nn.InstanceNorm2d(out)))
            width = out
        latent = preset.latent_channels * preset.classes
        self.fc_mu = conv(width, latent, groups=groups, what="fc_mu")
        self.fc_var = conv(width, latent, groups=groups, what="fc_var")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[1] != 3 * self.classes:
            raise ValueError(
                f"x: expected (N, {3 * self.classes}, H, W), three channels per class; got "
                f"{tuple(x.shape)}; encode(image, labels) makes the class crops"
            )
        if requested() == "reference":
            for i in range(self.depth):
                x = F.leaky_relu(self.get_submodule(f"layer{i + 1}")(x), 0.2)
            return self.fc_mu(x), self.fc_var(x)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return self._codes(x, None)
        # Unlike a sum, the extremes cannot cancel, and NaN passes.
        filled = (x.amax((2, 3)) != 0) | (x.amin((2, 3)) != 0)
        pairs = self._present(filled.view(len(x), self.classes, 3).any(2))
        if pairs is None:
            return self._codes(x, None)
        planes = x.unflatten(1, (self.classes, 3))[pairs.images, pairs.classes]
        return self._spread(self._codes(planes.flatten(0, 1)[None], pairs.classes), pairs, len(x))

    def encode(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of ``image`` (N, 3, H, W) in [-1, 1] with ``labels`` (N, H, W), integers.

        Only the classes that are present are cropped.
        """
        masks = labels.is_floating_point() or labels.dtype == torch.bool
        if requested() == "reference" or torch.compiler.is_compiling() or masks:
            return self(class_crops(image, labels, self.classes, size=self.image_size))
        pairs = self._present(class_boxes(image, labels, self.classes)[..., 1] > 0)
        if pairs is None:
            return self._codes(class_crops(image, labels, self.classes, size=self.image_size), None)
        crops = self._present_crops(image, labels.view(-1, *image.shape[2:]), pairs)
        return self._spread(self._codes(crops, pairs.classes), pairs, len(image))

    def _present(self, present: Tensor) -> _Pairs | None:
        """The pairs of a mask (N, classes); None where there is nothing to leave out, or all."""
        pairs = _Pairs(*present.nonzero(as_tuple=True))
        return pairs if 0 < len(pairs.images) < present.numel() else None

    def _present_crops(self, image: Tensor, labels: Tensor, pairs: _Pairs) -> Tensor:
        """(1, 3P, *image_size): the crops of the pairs alone, by the rank of their class."""
        labels = labels.long()
        known = (labels >= 0) & (labels < self.classes)
        indices = torch.where(known, labels, self.classes)
        crops = []
        for n in range(len(image)):
            classes = pairs.classes[pairs.images == n]
            count = len(classes)
            if count == 0:
                continue
            ranks = indices.new_full((self.classes + 1,), count, dtype=torch.int32)
            ranks[classes] = torch.arange(count, dtype=torch.int32, device=ranks.device)
            ranked = ranks[indices[n : n + 1]]
            # Pixels of a class that is absent, for they are zero, keep a rank of their own.
            spare = int((ranked == count).any())
            picture = image[n : n + 1].contiguous(memory_format=torch.channels_last)
            crop = class_crops(picture, ranked, count + spare, size=self.image_size)
            crops.append(crop[:, : 3 * count])
        return torch.cat(crops, 1) if len(crops) > 1 else crops[0]

    def _layer(self, i: int) -> tuple[nn.Conv2d, nn.InstanceNorm2d]:
        layer, norm = self.get_submodule(f"layer{i + 1}").children()
        assert isinstance(layer, nn.Conv2d) and isinstance(norm, nn.InstanceNorm2d)
        return layer, norm

    def _heads(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Weight and bias of the two heads."""
        return tuple(
            (head.get_parameter("weight"), head.get_parameter("bias"))
            for head in (self.fc_mu, self.fc_var)
        )

    def _codes(self, x: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of planes (N, 3G, H, W); group g is of class ``classes[g]`` (None: of g)."""
        groups, count = x.shape[1] // 3, self.classes
        x = x.contiguous(memory_format=torch.channels_last)
        for i in range(self.depth):
            layer, norm = self._layer(i)
            weight = _conv_weight(layer, classes, count)
            x = F.conv2d(x, weight, None, layer.stride, layer.padding, 1, groups)
            x = norm_act(x, eps=norm.eps, activation="leaky_relu", negative_slope=0.2)
        mu, logvar = (
            F.conv2d(x, _of_classes(weight, classes, count), _of_classes(bias, classes, count),
                     padding=1, groups=groups)
            for weight, bias in self._heads()
        )
        return mu, logvar

    def _spread(self, codes: tuple[Tensor, Tensor], pairs: _Pairs,
                batch: int) -> tuple[Tensor, Tensor]:
        """Codes (1, 8P, h, w) of the pairs -> (N, 8·classes, h, w), the heads' bias elsewhere."""
        mu, logvar = (
            bias.view(1, self.classes, -1, 1, 1)
            .expand(batch, -1, -1, *code.shape[2:])
            .index_put(tuple(pairs), code.view(len(pairs.images), -1, *code.shape[2:]))
            .flatten(1, 2)
            for (_, bias), code in zip(self._heads(), codes, strict=True)
        )
        return mu, logvar


def reparameterize(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of the latent code: ``z = mu + exp(logvar / 2) * noise``, noise from N(0, 1)."""
    noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    return mu + noise * torch.exp(0.5 * logvar)
