"""CC-FPSE: conditional convolutions predicted from the layout, and its pyramid discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import (
    SPADE,
    ConditionalConv2d,
    InstanceNormAct2d,
    LabelLayout,
    SpatiallyVaryingConv2d,
    conditional_attention,
    indexed_modulation,
    modulation,
    norm_act,
    spatially_varying_conv2d,
)
from smis_kernels.interface import (
    conditioned_convs,
    constant,
    conv3x3,
    hooked,
    keeps,
    label_rows,
    requested,
    with_norm,
)

from ..networks.blocks import check_maps, conv, fast_format
from ..networks.generator import WIDTHS, CodeGenerator
from ..networks.losses import feature_matching_loss
from ..networks.preset import CodePreset
from .registry import hinge_recipe, network, register_model
from .spade import SPADEEncoder

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CCFPSEPreset(CodePreset):
    """Options of one CC-FPSE (Liu et al., "Learning to Predict Layout-to-image Conditional
    Convolutions for Semantic Image Synthesis", NeurIPS 2019), as :class:`CodePreset` says.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6}

    vae: bool = True
    upsampling: Literal["normal", "more"] = "normal"


CCFPSE_COCO = register_model(
    "ccfpse_coco", "CC-FPSE for COCO-Stuff: 183 classes and instance edges, 256x256",
    CCFPSEPreset(
        classes=183, image_size=(256, 256), ngf=64, instance_edge=True, dont_care=182,
    ),
    hinge_recipe("coco_stuff", batch=16, epochs=100, decay=100, kl_devices=16, matching=20.0),
)
CCFPSE_ADE20K = register_model(
    "ccfpse_ade20k", "CC-FPSE for ADE20K: 151 classes, 256x256",
    CCFPSEPreset(
        classes=151, image_size=(256, 256), ngf=64, dont_care=150, unlabelled=0,
    ),
    hinge_recipe("ade20k", batch=16, epochs=100, decay=100, kl_devices=16, matching=20.0),
)
CCFPSE_CITYSCAPES = register_model(
    "ccfpse_cityscapes", "CC-FPSE for Cityscapes: 35 classes and instance edges, 256x512",
    CCFPSEPreset(
        classes=35, image_size=(256, 512), ngf=64, instance_edge=True, upsampling="more",
    ),
    hinge_recipe("cityscapes", batch=16, epochs=100, decay=100, kl_devices=16, matching=20.0),
)

network("encoder", CCFPSEPreset)(SPADEEncoder)  # as published: SPADE's


def _weight(layer: nn.Conv2d) -> Tensor:
    """The weight that a call of the layer would use: spectral norm sets it in a hook."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())
    return layer.weight


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """Batch norm, in training over the batches of all processes, as published; on a CPU too."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        if not (self.training and dist.is_available() and dist.is_initialized()
                and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        y = norm_act(input, norm="batch", running_mean=self.running_mean,
                     running_var=self.running_var, training=True, momentum=self.momentum,
                     eps=self.eps, process_group=dist.group.WORLD)
        weight, bias = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias))
        return torch.addcmul(bias, y, weight).to(y.dtype)


class NormalizedConv(nn.Sequential):
    """Conv without bias, batch norm and LeakyReLU under the keys that they have as published."""

    def __init__(self, channels: int, out_channels: int, **options: Any) -> None:
        layer = conv(channels, out_channels, bias=False, spectral=True, **options)
        norm = SynchronizedBatchNorm(out_channels)
        super().__init__(nn.Sequential(layer, norm), nn.LeakyReLU(0.2))

    @property
    def parts(self) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]:
        """Conv, norm and activation."""
        normalized, activation = self
        assert isinstance(normalized, nn.Sequential)
        layer, norm = normalized
        return layer, norm, activation  # type: ignore[return-value]

    def folded(self) -> tuple[Tensor, Tensor] | None:
        """The conv's weight with the norm's scale in it, and the norm's shift (C,), where both are
        kept as constants and no hook waits for a call; else None.
        """
        layer, norm, _ = self.parts
        sources = (layer.weight, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if requested() == "reference" or norm.training or any(s is None for s in sources):
            return None
        if not keeps(*sources) or hooked(*self.modules()):  # type: ignore[arg-type]
            return None

        def fold() -> tuple[Tensor, Tensor]:
            weight, shift = with_norm(layer, norm)
            return weight.to(layer.weight.dtype), shift

        return constant(("folded", norm.eps), fold, *sources)  # type: ignore[arg-type]

    def plus(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """All three, plus a residual of the output's shape; of constants in two steps."""
        folded = self.folded()
        if folded is None:
            y: Tensor = self(x)
            return y if residual is None else y + residual
        layer, _, activation = self.parts
        weight, shift = folded
        if (layer.kernel_size, layer.stride) == ((3, 3), (1, 1)):
            x = conv3x3(x, weight, largest=4)
        else:
            x = layer._conv_forward(x, weight, None)
        mean, var = constant("shift", lambda: (-shift, torch.ones_like(shift)), shift)
        return norm_act(x, residual, norm="batch", running_mean=mean, running_var=var, eps=0.0,
                        activation="leaky_relu", negative_slope=activation.negative_slope)


class Condition:
    """What a block is conditioned on: the label map and, at the block's size, pyramid features.

    Called with 3x3 convs that read both, concatenated, it gives each one's ReLU. Where the map is
    compiled, its part comes from a table over label windows: one embedding bag for all the convs
    of a block. The features' part is a dense conv, on a GPU with constants one for all of them.
    """

    def __init__(self, segmap: Tensor | LabelLayout, features: Tensor, convs: list[nn.Conv2d],
                 ) -> None:
        self.features, self.convs = features, convs
        size = (features.shape[2], features.shape[3])
        self.layout = None
        if isinstance(segmap, LabelLayout):
            level = segmap.level(size)
            if level.repeats:
                self.layout, self.index = segmap, level.index3
                self.hidden = conditioned_convs(segmap, features, convs)
                if self.hidden is None:
                    self.tables = self._tables(segmap, size)
                return
            segmap = segmap.dense(size, features.dtype)
        resized = F.interpolate(segmap, size=size, mode="nearest")
        self.both = torch.cat([fast_format(resized), features], 1)

    def _tables(self, layout: LabelLayout, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """The label part of every conv for each distinct window, rows [0 | part]: (V + 1, 2D)."""
        labels = layout.shape[1]
        weights = tuple(c.weight for c in self.convs)
        biases = tuple(c.bias for c in self.convs if c.bias is not None)
        weight = constant(("label parts", labels), lambda: torch.cat(
            [w[:, :labels] for w in weights]), *weights)
        bias = constant("biases", partial(torch.cat, biases), *biases)
        table = label_rows(layout, size, weight, bias)
        parts = table.reshape(len(table), len(self.convs), -1).transpose(0, 1)
        return torch.cat([torch.zeros_like(parts), parts], 2).unbind()

    def __call__(self, layer: nn.Conv2d) -> Tensor:
        if self.layout is None:
            return F.relu(layer(self.both))
        at = self.convs.index(layer)
        if self.hidden is not None:
            return self.hidden[at]
        labels = self.layout.shape[1]
        weight = constant(("features' part", labels), lambda: layer.weight[:, labels:].clone(),
                          layer.weight)
        x = conv3x3(self.features, weight, largest=2 if layer.training else 4)
        # x + table[index], ReLU: a modulation whose gamma is zero.
        return indexed_modulation(x, self.index, self.tables[at], norm="none", activation="relu",
                                  order=self.layout.pixel_order(self.index))


def _first(norm: SPADE) -> nn.Conv2d:
    layer = norm.shared_conv
    assert layer is not None
    return layer


class Predictor(nn.ModuleDict):
    """Two convs with a ReLU between, under the keys that they have in the published Sequential."""

    def __init__(self, first: nn.Conv2d, last: nn.Conv2d) -> None:
        super().__init__({"0": first, "2": last})

    @property
    def first(self) -> nn.Conv2d:
        """The conv that reads the condition."""
        layer = self["0"]
        assert isinstance(layer, nn.Conv2d)
        return layer

    @property
    def last(self) -> nn.Module:
        """The conv that reads the hidden features."""
        return self["2"]


def _kept(segmap: Tensor | LabelLayout, owner: nn.Module, size: int, make: Callable[[], T],
          ) -> T | None:
    """What the map alone decides, where its layout keeps that of frozen networks; else None."""
    if not isinstance(segmap, LabelLayout) or segmap.tables is None or owner.training:
        return None
    if torch.is_grad_enabled() or requested() == "reference":
        return None
    return segmap.tables.prediction(owner, size, make)


class Predictions:
    """What a block applies to its features, predicted where it is applied."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition

    def convolved(self, part: Predictor, x: Tensor) -> Tensor:
        """``x`` under the kernels of a predictor."""
        return part.last(x, self.condition(part.first))

    def gate(self, part: Predictor) -> Tensor:
        """The logits of an attention, (N, C, H, W)."""
        return part.last(self.condition(part.first))

    def affine(self, norm: SPADE) -> tuple[Tensor, Tensor]:
        """Gamma and beta of the shortcut's norm."""
        return norm.convolved(self.condition(_first(norm)), fused=requested() != "reference")


class KeptPredictions(Predictions):
    """The same, predicted once: kernels take nine times the memory of the features."""

    def __init__(self, block: ConditionalBlock, fresh: Predictions) -> None:
        self._kernels = {}
        for part in (block.gen_weights1, block.gen_weights2):
            last = part.last
            assert isinstance(last, nn.Conv2d)
            self._kernels[part] = fast_format(conv3x3(
                fresh.condition(part.first), last.weight, last.bias, largest=4))
        self._gates = {part: fast_format(fresh.gate(part))
                       for part in (block.gen_se_weights1, block.gen_se_weights2)}
        if block.learned_shortcut:
            gamma, beta = fresh.affine(block.norm_s)
            self._affine = fast_format(gamma), fast_format(beta)

    def convolved(self, part: Predictor, x: Tensor) -> Tensor:
        return spatially_varying_conv2d(x, self._kernels[part])

    def gate(self, part: Predictor) -> Tensor:
        return self._gates[part]

    def affine(self, norm: SPADE) -> tuple[Tensor, Tensor]:
        return self._affine


class ConditionalBlock(nn.Module):
    """CC-FPSE's residual block: norm, conditional conv, 1x1 conv, conditional attention; twice.

    ``h = attend(conv_1(condconv(norm_1(x))))``, then
    ``y = shortcut + attend(conv_3(condconv(norm_2(h))))`` with the shortcut ``conv_s(norm_s(x))``
    where the width changes, else x itself. Kernels and gates are predicted
    from the label map and the pyramid's features. ``norm_0`` and the norms inside ``conv_0`` and
    ``conv_2`` are never called: they keep the published entries of the state dict.

    Shapes: x (N, C, H, W), segmap (N, L, any, any), features (N, F, H, W) -> (N, C', H, W).

    Paper: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions for Semantic
    Image Synthesis", NeurIPS 2019.
    """

    def __init__(self, channels: int, out_channels: int, label_channels: int,
                 feature_channels: int, hidden: int) -> None:
        super().__init__()
        middle = min(channels, out_channels)
        source = label_channels + feature_channels

        def predictor(last: nn.Conv2d) -> Predictor:
            return Predictor(conv(source, hidden), last)

        self.gen_weights1 = predictor(ConditionalConv2d(channels, hidden))
        self.gen_weights2 = predictor(ConditionalConv2d(middle, hidden))
        self.gen_se_weights1 = predictor(conv(hidden, middle))
        self.gen_se_weights2 = predictor(conv(hidden, out_channels))
        self.conv_0 = SpatiallyVaryingConv2d(channels)
        self.norm_0 = SynchronizedBatchNorm(middle)
        self.conv_1 = conv(channels, middle, kernel_size=1)
        self.norm_1 = SynchronizedBatchNorm(channels)
        self.conv_2 = SpatiallyVaryingConv2d(middle)
        self.norm_2 = SynchronizedBatchNorm(middle)
        self.conv_3 = conv(middle, out_channels, kernel_size=1)
        self.learned_shortcut = channels != out_channels
        if self.learned_shortcut:
            self.conv_s = conv(channels, out_channels, kernel_size=1, bias=False, spectral=True)
            self.norm_s = SPADE(channels, source, hidden, norm="syncbatch")

    def _shortcut(self, x: Tensor, predicted: Predictions) -> Tensor:
        if not self.learned_shortcut:
            return x
        norm = self.norm_s
        gamma, beta = predicted.affine(norm)
        x, options = norm.normalised(x, upsample=False)
        return self.conv_s(modulation(x, gamma, beta, **options))

    def _predictions(self, segmap: Tensor | LabelLayout, features: Tensor) -> Predictions:
        convs = [part.first for part in (self.gen_weights1, self.gen_weights2,
                                         self.gen_se_weights1, self.gen_se_weights2)]
        if self.learned_shortcut:
            convs.append(_first(self.norm_s))
        return Predictions(Condition(segmap, features, convs))

    def forward(self, x: Tensor, segmap: Tensor | LabelLayout, features: Tensor) -> Tensor:
        middle, out = self.conv_1.out_channels, self.conv_3.out_channels
        channels = 9 * (x.shape[1] + middle) + middle + out
        channels += 2 * x.shape[1] * self.learned_shortcut
        predicted: Predictions | None = _kept(
            segmap, self, channels * x[:, 0].numel() * x.element_size(),
            lambda: KeptPredictions(self, self._predictions(segmap, features)))
        predicted = predicted or self._predictions(segmap, features)
        shortcut = self._shortcut(x, predicted)
        h = predicted.convolved(self.gen_weights1, self.norm_1(x))
        h = conditional_attention(self.conv_1(h), predicted.gate(self.gen_se_weights1))
        h = predicted.convolved(self.gen_weights2, self.norm_2(h))
        h = conditional_attention(self.conv_3(h), predicted.gate(self.gen_se_weights2))
        return shortcut + h


@network("generator", CCFPSEPreset)
class CCFPSEGenerator(CodeGenerator):
    """CC-FPSE's generator: a label map, and with ``vae`` a latent code, to an image.

    A label encoder makes a feature pyramid of the map; residual blocks with nearest x2 upsampling
    between them predict their kernels from map and pyramid -> LeakyReLU -> ``conv_img`` -> tanh.

    Args:
        preset: classes, widths, image size, upsampling ("normal" five times, "more" six), ``vae``.

    Shapes: semantics (N, classes [+ edge], H, W), of the image's size, or its layout; z (N,
        latent_channels) with ``vae``, else None -> image (N, 3, H, W) in [-1, 1].

    Raises:
        ValueError: semantics or z of another shape; a missing z, or one there is no use for.

    Paper: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions for Semantic
    Image Synthesis", NeurIPS 2019.

    Example:
        >>> from smis_models import create_model
        >>> generator = create_model("ccfpse_coco", part="generator", ngf=8, image_size=(64, 64))
        >>> image = generator(torch.rand(1, 184, 64, 64), generator.sample_latent(1))
    """

    preset: CCFPSEPreset

    def __init__(self, preset: CCFPSEPreset) -> None:
        super().__init__(preset)
        labels, ngf = preset.semantic_channels, preset.ngf
        channels = WIDTHS["head_0"] * ngf
        self.levels = preset.upsamplings[preset.upsampling]
        for i in range(1, self.levels + 2):
            layer = NormalizedConv(labels if i == 1 else ngf, ngf, stride=1 if i == 1 else 2)
            self.add_module(f"labelenc{i}", layer)
        for i in range(1, self.levels + 1):
            self.add_module(f"labellat{i}", NormalizedConv(ngf, ngf, kernel_size=1))
            self.add_module(f"labeldec{i}", NormalizedConv(ngf, ngf))
        for name, factor in WIDTHS.items():
            block = ConditionalBlock(channels, factor * ngf, labels, ngf, preset.hidden)
            self.add_module(name, block)
            channels = factor * ngf
        self.conv_img = conv(channels, 3)

    def forward(self, semantics: Tensor | LabelLayout, z: Tensor | None = None) -> Tensor:
        segmap, size = self._segmap(semantics), tuple(self.preset.image_size)
        if tuple(semantics.shape[2:]) != size:
            raise ValueError(
                f"semantics: expected the image's size {size}, got {tuple(semantics.shape[2:])}"
            )
        area = semantics.shape[0] * size[0] * size[1]
        pyramid = _kept(segmap, self, 2 * area * self.preset.ngf * self.conv_img.weight.itemsize,
                        lambda: self._pyramid(segmap))
        pyramid = pyramid or self._pyramid(segmap)
        x = fast_format(self._start(semantics, z))
        level = 0
        for name in WIDTHS:
            if self._upsamples(name):
                x = F.interpolate(x, scale_factor=2, mode="nearest")
                level += 1
            x = self.get_submodule(name)(x, segmap, pyramid[level])
        return self._picture(x)

    def _pyramid(self, segmap: Tensor | LabelLayout) -> list[Tensor]:
        """Features of the map at every size, (N, ngf, h, w), smallest first."""
        x = self._first_features(segmap)
        encoded = [x]
        for i in range(2, self.levels + 2):
            x = self._layer(f"labelenc{i}").plus(x)
            encoded.append(x)
        pyramid = [encoded.pop()]
        for i in range(1, self.levels + 1):
            above = F.interpolate(pyramid[-1], scale_factor=2, mode="nearest")
            lateral = self._layer(f"labellat{i}").plus(encoded.pop(), above)
            pyramid.append(self._layer(f"labeldec{i}").plus(lateral))
        return pyramid

    def _layer(self, name: str) -> NormalizedConv:
        layer = self.get_submodule(name)
        assert isinstance(layer, NormalizedConv)
        return layer

    def _first_features(self, segmap: Tensor | LabelLayout) -> Tensor:
        first = self._layer("labelenc1")
        if not isinstance(segmap, LabelLayout):
            return first.plus(fast_format(segmap))
        dtype, size = self.conv_img.weight.dtype, (segmap.shape[2], segmap.shape[3])
        level = segmap.level(size)
        if not level.repeats:
            return self._first_features(segmap.dense(size, dtype))
        layer, norm, activation = first.parts
        folded = first.folded()
        if folded is not None:  # norm and activation on the windows' rows, not on every pixel
            table = F.leaky_relu(label_rows(segmap, size, *folded), activation.negative_slope)
        else:
            table = label_rows(segmap, size, _weight(layer), None)
        rows = F.embedding(level.index3, table.to(dtype)).permute(0, 3, 1, 2)
        return rows if folded is not None else activation(norm(rows))


def _pool(x: Tensor, size: int) -> Tensor:
    """Average pooling as sums of slices, which vectorise: on a CPU ``avg_pool2d`` does not."""
    rows = reduce(torch.add, [x[:, :, i::size] for i in range(size)])
    return reduce(torch.add, [rows[..., i::size] for i in range(size)]) / size**2


@network("discriminator", CCFPSEPreset)
class FPSEDiscriminator(nn.Module):
    """Feature-pyramid, semantics-embedding discriminator.

    Five stride-2 convs, a top-down pyramid of three levels, and at each level the score
    ``tf(f) + <seg(f), embedding(semantics)>``, f the level's features. The embedding is a 1x1
    conv, so it commutes with average pooling: the semantics are pooled first, which is exact and
    cheaper.

    Args:
        preset: ``ndf``, and the channels of the semantics.

    Shapes: image (N, 3, H, W), semantics (N, classes [+ edge], H, W), H and W multiples of 16 ->
        four features (1/4 .. 1/32) and three predictions (1/4, 1/8, 1/16), two lists.

    Paper: Liu et al., "Learning to Predict Layout-to-image Conditional Convolutions for Semantic
    Image Synthesis", NeurIPS 2019.

    Example:
        >>> from smis_models import create_model
        >>> discriminator = create_model("ccfpse_coco", part="discriminator", ndf=8)
        >>> image, semantics = torch.rand(1, 3, 64, 64), torch.rand(1, 184, 64, 64)
        >>> features, predictions = discriminator(image, semantics)
        >>> len(features), len(predictions)
        (4, 3)
    """

    def __init__(self, preset: CCFPSEPreset) -> None:
        super().__init__()
        ndf, top = preset.ndf, 4 * preset.ndf
        self.label_channels = preset.semantic_channels
        widths = [3, ndf, 2 * ndf, 4 * ndf, 8 * ndf, 8 * ndf]
        for i in range(1, 6):
            self.add_module(f"enc{i}", self._layer(widths[i - 1], widths[i], stride=2))
        for i in range(2, 6):
            self.add_module(f"lat{i}", self._layer(widths[i], top, kernel_size=1))
        for i in range(2, 5):
            self.add_module(f"final{i}", self._layer(top, 2 * ndf))
        self.tf = conv(2 * ndf, 1, kernel_size=1)
        self.seg = conv(2 * ndf, 2 * ndf, kernel_size=1)
        self.embedding = conv(preset.semantic_channels, 2 * ndf, kernel_size=1)

    def _layer(self, channels: int, out_channels: int, **options: Any) -> nn.Sequential:
        layer = conv(channels, out_channels, bias=False, spectral=True, **options)
        norm = InstanceNormAct2d(out_channels, activation="leaky_relu")
        return nn.Sequential(nn.Sequential(layer, norm))

    def _at(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)

    def forward(self, image: Tensor, semantics: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        check_maps("image", image, 3, "an image")
        check_maps("semantics", semantics, self.label_channels, "the generator's semantics")
        if semantics.shape[2:] != image.shape[2:] or any(s % 32 for s in image.shape[2:]):
            raise ValueError(
                f"semantics: expected the image's size, multiples of 32; got "
                f"{tuple(semantics.shape)} with {tuple(image.shape)}"
            )
        x, features = image, []
        for i in range(1, 6):
            x = self._at(f"enc{i}", x)
            features.append(x)
        top = self._at("lat5", features[4])
        pyramid = {}
        for i in (4, 3, 2):
            top = F.interpolate(top, scale_factor=2, mode="bilinear", align_corners=False)
            pyramid[i] = top = top + self._at(f"lat{i}", features[i - 1])
        predictions = []
        for i, embedded in zip((2, 3, 4), self._embedded(semantics), strict=True):
            level = self._at(f"final{i}", pyramid[i])
            agreement = (embedded * self.seg(level)).sum(1, keepdim=True)
            predictions.append(self.tf(level) + agreement)
        return features[1:], predictions

    def _embedded(self, semantics: Tensor) -> Iterator[Tensor]:
        """The embedding at 1/4, 1/8 and 1/16 of the size."""
        if requested() == "reference":
            x = F.avg_pool2d(self.embedding(semantics), 2)
            for _ in range(3):
                x = F.avg_pool2d(x, 2)
                yield x
            return
        x = _pool(semantics, 4)
        for _ in range(3):
            yield self.embedding(x)
            x = _pool(x, 2)


def discriminate_pairs(
    discriminator: Callable[[Tensor, Tensor], tuple[list[Tensor], list[Tensor]]],
    semantics: Tensor, fake: Tensor, real: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Fake features and predictions, then real ones, from one pass over both images.

    Shapes: semantics (N, L, H, W), fake and real (N, 3, H, W) -> four lists.
    """
    n = semantics.shape[0]
    features, predictions = discriminator(torch.cat([fake, real]),
                                          torch.cat([semantics, semantics]))
    return ([x[:n] for x in features], [x[:n] for x in predictions],
            [x[n:] for x in features], [x[n:] for x in predictions])


def pyramid_matching_loss(fake: Sequence[Tensor], real: Sequence[Tensor],
                          weight: float = 20.0) -> Tensor:
    r"""Mean over the discriminator's features of their L1 distance, real ones detached.

    .. math:: \frac{\lambda}{4} \sum_i \mathrm{mean} |f_i - r_i|

    Args:
        fake, real: the features that :class:`FPSEDiscriminator` returns.
        weight: λ; 20 as published.

    Example:
        >>> fake, real = [torch.zeros(1, 2, 4, 4)] * 4, [torch.ones(1, 2, 4, 4)] * 4
        >>> float(pyramid_matching_loss(fake, real))
        20.0
    """
    # A scale's last entry is its prediction, which the loss leaves out; here all are features.
    return feature_matching_loss([(f, f) for f in fake], [(r, r) for r in real], weight)
