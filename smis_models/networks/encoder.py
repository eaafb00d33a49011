"""Encoders of strided convs; GroupDNet's gives every class a latent code of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from smis_kernels import class_boxes, class_crops, norm_act
from smis_kernels.runtime.backend import requested

from ..families.presets import GroupDNetPreset
from .blocks import conv, fast_format


class _Pairs(NamedTuple):
    """The present (image, class) pairs of a batch, P of them, by image."""

    images: Tensor
    classes: Tensor


def _of_classes(parameter: Tensor, classes: Tensor, count: int) -> Tensor:
    """The rows of ``classes`` of a parameter whose rows belong to ``count`` classes."""
    return parameter.unflatten(0, (count, -1)).index_select(0, classes).flatten(0, 1)


def _conv_weight(layer: nn.Conv2d, classes: Tensor, count: int) -> Tensor:
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


class StridedEncoder(nn.Module):
    """Convs 3x3, stride 2, spectral and instance normalised, each followed by LeakyReLU(0.2).

    A plane of one pixel, in which there is nothing to normalise, is left as it is.

    Args:
        channels: of the input.
        width: of the first conv; it doubles up to eight times that.
        depth: number of convs.
        groups: of every conv.
    """

    def __init__(self, channels: int, width: int, depth: int, groups: int = 1) -> None:
        super().__init__()
        self.depth, self.groups = depth, groups
        for i in range(depth):
            out = width * min(2**i, 8)
            layer = conv(channels, out, groups=groups, stride=2, bias=False, spectral=True,
                         what=f"layer{i + 1}")
            self.add_module(f"layer{i + 1}", nn.Sequential(layer, nn.InstanceNorm2d(out)))
            channels = out
        self.width = channels

    def strided(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """The features of ``x``; where ``classes`` are given, its groups are theirs alone."""
        x = fast_format(x)
        for i in range(self.depth):
            layer, norm = self.get_submodule(f"layer{i + 1}").children()
            assert isinstance(layer, nn.Conv2d) and isinstance(norm, nn.InstanceNorm2d)
            if classes is None:
                x = layer(x)
            else:
                weight = _conv_weight(layer, classes, self.groups)
                x = F.conv2d(x, weight, None, layer.stride, layer.padding, 1, len(classes))
            kind = "none" if x.shape[2:].numel() == 1 else "instance"
            x = norm_act(x, norm=kind, eps=norm.eps, activation="leaky_relu", negative_slope=0.2)
        return x


class GroupDNetEncoder(StridedEncoder):
    """Class-wise encoder: the crop of a class gives mean and log variance of its latent code.

    Convs 3x3, stride 2, grouped by class, spectral and instance normalised, LeakyReLU(0.2), as many
    as the generator has upsamplings; then two heads, grouped by class.

    An absent class, whose three planes are zero, stays zero through all convs (no bias) and
    instance norms, so its code is the heads' bias, exactly. Only the present (image, class)
    pairs are computed, as the groups of one conv over a batch of one; which they are is read on
    the host. All classes are computed on the reference backend, under torch.compile, and where
    ``x`` requires a gradient, for an absent class's planes have one. With another number of groups
    than classes (``encoder_groups``) codes are of all classes, and all are computed.

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
        groups = preset.encoder_groups or preset.classes
        depth = preset.encoder_depth or preset.upsamplings[preset.upsampling]
        super().__init__(3 * preset.classes, preset.nef, depth, groups)
        self.classes = preset.classes
        self.image_size = preset.image_size
        latent = preset.latent_channels * preset.classes
        self.fc_mu = conv(self.width, latent, groups=groups, what="fc_mu")
        self.fc_var = conv(self.width, latent, groups=groups, what="fc_var")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[1] != 3 * self.classes:
            raise ValueError(
                f"x: expected (N, {3 * self.classes}, H, W), three channels per class; got "
                f"{tuple(x.shape)}; encode(image, labels) makes the class crops"
            )
        if self._all_computed() or (torch.is_grad_enabled() and x.requires_grad):
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
        if masks or self._all_computed():
            codes: tuple[Tensor, Tensor] = self(
                class_crops(image, labels, self.classes, size=self.image_size))
            return codes
        pairs = self._present(class_boxes(image, labels, self.classes)[..., 1] > 0)
        if pairs is None:
            return self._codes(class_crops(image, labels, self.classes, size=self.image_size), None)
        crops = self._present_crops(image, labels.view(-1, *image.shape[2:]), pairs)
        return self._spread(self._codes(crops, pairs.classes), pairs, len(image))

    def _all_computed(self) -> bool:
        """Whether absent classes are computed like the others."""
        return (self.groups != self.classes or requested() == "reference"
                or torch.compiler.is_compiling())

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

    def _heads(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Weight and bias of the two heads."""
        return tuple(
            (head.get_parameter("weight"), head.get_parameter("bias"))
            for head in (self.fc_mu, self.fc_var)
        )

    def _codes(self, x: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of planes (N, 3G, H, W); group g is of class ``classes[g]`` (None: of g)."""
        x = self.strided(x, classes)
        if classes is None:
            return self.fc_mu(x), self.fc_var(x)
        count = len(classes)
        mu, logvar = (
            F.conv2d(x, _of_classes(weight, classes, self.classes),
                     _of_classes(bias, classes, self.classes), padding=1, groups=count)
            for weight, bias in self._heads()
        )
        return mu, logvar

    def _spread(self, codes: tuple[Tensor, Tensor], pairs: _Pairs,
                batch: int) -> tuple[Tensor, Tensor]:
        """Codes (1, 8P, h, w) of the pairs -> (N, 8·classes, h, w), the heads' bias elsewhere."""
        mu, logvar = (
            bias.to(code.dtype).view(1, self.classes, -1, 1, 1)
            .expand(batch, -1, -1, *code.shape[2:])
            .index_put(tuple(pairs), code.view(len(pairs.images), -1, *code.shape[2:]))
            .flatten(1, 2)
            for (_, bias), code in zip(self._heads(), codes, strict=True)
        )
        return mu, logvar


def reparameterize(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None,
                   noise: Tensor | None = None) -> Tensor:
    """A sample of the latent code: ``z = mu + exp(logvar / 2) * noise``, noise from N(0, 1)."""
    if noise is None:
        noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    return mu + noise * torch.exp(0.5 * logvar)
