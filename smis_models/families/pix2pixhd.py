"""pix2pixHD: global generator, local enhancers, feature encoder and discriminator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from smis_kernels import (
    InstanceNormAct2d,
    LabelLayout,
    WinogradConv2d,
    WinogradConvTranspose2d,
    instance_avg_pool2d,
)
from smis_kernels.interface import hooked, prepare_map

from ..networks import tiled_inference
from ..networks.blocks import check_maps, check_semantics, fast_format
from ..networks.discriminator import halved
from ..networks.preset import Preset
from .registry import ADAM_OF_PIX2PIX, Recipe, network, register_model


@dataclass(frozen=True, kw_only=True)
class Pix2pixHDPreset(Preset):
    """Options of one pix2pixHD (Wang et al., "High-Resolution Image Synthesis and Semantic
    Manipulation with Conditional GANs", CVPR 2018).

    ``enhancers`` local enhancers, with ``local_blocks`` residual blocks each, lie around a global
    generator of ``blocks`` blocks and width ngf·2^enhancers; 0: the global generator alone. With
    ``features`` the generator reads ``feature_channels`` planes of instance features too.
    """

    init_rule: ClassVar[Literal["xavier", "normal"]] = "normal"

    enhancers: int = 0
    downsamplings: int = 4
    blocks: int = 9
    local_blocks: int = 3
    features: bool = False
    feature_channels: int = 3
    nef: int = 16
    encoder_downsamplings: int = 4
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        for name in ("downsamplings", "nef", "encoder_downsamplings", "feature_channels"):
            self._check_positive(name)
        for name in ("enhancers", "blocks", "local_blocks"):
            self._check_positive(name, 0)
        super().__post_init__()  # whose step for sizes follows from them

    @property
    def size_step(self) -> int:
        return int(2 ** (self.downsamplings + self.enhancers))

    @property
    def has_encoder(self) -> bool:
        return self.features

    @property
    def input_channels(self) -> int:
        """Channels that the generator reads: semantics, and features where it takes them."""
        return self.semantic_channels + (self.feature_channels if self.features else 0)


def _recipe(epochs: int = 100, decay: int = 100, freeze: int = 0) -> Recipe:
    """Least squares summed over the scales; ``freeze``: epochs of the enhancers alone."""
    return {
        "data": {"name": "cityscapes", "batch": 1},
        "losses": {"gan": "ls", "scales": "sum", "discriminator": 0.5, "kl": 0.0},
        "optimizer": ADAM_OF_PIX2PIX,
        "schedule": {"epochs": epochs, "decay_epochs": decay, "freeze_global_epochs": freeze},
    }


PIX2PIXHD_CITYSCAPES = register_model(
    "pix2pixhd_cityscapes",
    "pix2pixHD for Cityscapes, global generator: 35 classes and instance edges, 512x1024",
    Pix2pixHDPreset(
        classes=35, image_size=(512, 1024), ngf=64, instance_edge=True,
    ),
    _recipe(),
)
PIX2PIXHD_CITYSCAPES_FEATURES = register_model(
    "pix2pixhd_cityscapes_features",
    "pix2pixHD for Cityscapes, global generator with instance features, 512x1024",
    replace(PIX2PIXHD_CITYSCAPES, features=True), _recipe(),
)
PIX2PIXHD_CITYSCAPES_1024 = register_model(
    "pix2pixhd_cityscapes_1024",
    "pix2pixHD for Cityscapes, local enhancer around the global generator, 1024x2048",
    replace(
        PIX2PIXHD_CITYSCAPES, image_size=(1024, 2048), ngf=32, enhancers=1, discriminator_scales=3,
    ),
    _recipe(epochs=50, decay=50, freeze=10),
)


_STEM = 5  # layers that a tiled stem stands for: padding, conv, norm, ReLU, halving conv
_HEAD = 6  # and a tiled head: doubling, norm, ReLU, padding, conv, tanh


def _conv(channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1,
          padding: int = 0) -> nn.Conv2d:
    return WinogradConv2d(channels, out_channels, kernel_size, stride, padding)


def _norm(channels: int) -> list[nn.Module]:
    """Norm and ReLU. The published indices count the ReLU, which the norm's pass takes in."""
    return [InstanceNormAct2d(channels, activation="relu"), nn.Identity()]


def _padded_conv(channels: int, out_channels: int) -> list[nn.Module]:
    """Reflection padding and a conv 7x7."""
    return [nn.ReflectionPad2d(3), _conv(channels, out_channels, kernel_size=7)]


def _down(channels: int) -> list[nn.Module]:
    """Half the size, twice the channels."""
    return [_conv(channels, 2 * channels, stride=2, padding=1), *_norm(2 * channels)]


def _up(channels: int) -> list[nn.Module]:
    """Twice the size, half the channels."""
    layer = WinogradConvTranspose2d(
        channels, channels // 2, 3, stride=2, padding=1, output_padding=1)
    return [layer, *_norm(channels // 2)]


class ResnetBlock(nn.Module):
    """``x + norm(conv(relu(norm(conv(x)))))``, reflection padded; the sum is part of the norm.

    Wide convs take the Winograd form where that is expected to be faster.

    Shapes: (N, C, H, W) -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), _conv(channels, channels), *_norm(channels),
            nn.ReflectionPad2d(1), _conv(channels, channels), InstanceNormAct2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        *layers, norm = self.conv_block
        h = x
        for layer in layers:
            h = layer(h)
        return norm(h, x)


def _global_layers(channels: int, width: int, downsamplings: int, blocks: int) -> list[nn.Module]:
    """Features (N, width, H, W): the global generator but for its image layers."""
    layers = [*_padded_conv(channels, width), *_norm(width)]
    for i in range(downsamplings):
        layers += _down(width * 2**i)
    layers += [ResnetBlock(width * 2**downsamplings) for _ in range(blocks)]
    for i in reversed(range(downsamplings)):
        layers += _up(width * 2 ** (i + 1))
    return layers


def _image_layers(width: int, channels: int = 3) -> list[nn.Module]:
    return [*_padded_conv(width, channels), nn.Tanh()]


def _check_size(name: str, x: Tensor | LabelLayout, step: int) -> None:
    # One pixel at the smallest size has nothing to reflect.
    if any(size % step or size < 2 * step for size in x.shape[2:]):
        raise ValueError(
            f"{name}: expected height and width to be multiples of {step}, at least {2 * step}; "
            f"got {tuple(x.shape)}"
        )


class _Generator(nn.Module):
    """What both generators share: their input."""

    def __init__(self, preset: Pix2pixHDPreset) -> None:
        super().__init__()
        self.preset = preset

    def sample_latent(self, batch: int, generator: torch.Generator | None = None) -> None:
        """None: pix2pixHD takes no latent code."""

    def input(self, semantics: Tensor | LabelLayout,
              features: Tensor | None) -> Tensor | LabelLayout:
        """Semantics and, where the preset has them, features: (N, input_channels, H, W)."""
        preset = self.preset
        check_semantics(semantics, preset)
        _check_size("semantics", semantics, preset.size_step)
        if not preset.features:
            if features is not None:
                raise ValueError("features: this model reads none; use one made with features=True")
            return semantics
        if features is None:
            raise ValueError("features: this model reads instance features; encode an image with "
                             "its encoder, or sample them from clusters")
        expected = (semantics.shape[0], preset.feature_channels, *semantics.shape[2:])
        if tuple(features.shape) != expected:
            raise ValueError(f"features: expected {expected}, got {tuple(features.shape)}")
        planes = self.dense(semantics)
        return torch.cat([planes, features.to(planes)], 1)

    def dense(self, semantics: Tensor | LabelLayout) -> Tensor:
        """The planes themselves, of a layout too."""
        if not isinstance(semantics, LabelLayout):
            return semantics
        return semantics.dense(dtype=next(self.parameters()).dtype)

    def run(self, layers: nn.Module, source: Tensor | LabelLayout, image: bool) -> Tensor:
        """``layers`` on the input; in inference, stem and (``image``) last layers in tiles."""
        assert isinstance(layers, nn.Sequential)
        if hooked(layers) or not tiled_inference.serves(self, source, list(layers)[:_STEM]):
            return layers(fast_format(self.dense(source)))
        source = prepare_map(source, next(self.parameters()))
        rows = tiled_inference.label_rows(source, layers[1])
        if rows is None:
            start, x = 0, fast_format(self.dense(source))
        else:
            start, x = _STEM, tiled_inference.stem(rows, layers[2], layers[4], source.shape[2])
        return self.finish(layers, x, image, start)

    def finish(self, layers: nn.Module, x: Tensor, image: bool, start: int = 0) -> Tensor:
        """``layers`` from ``start`` on; in inference, those that make the image in tiles."""
        assert isinstance(layers, nn.Sequential)
        rest = list(layers)[start:]
        tiled = image and tiled_inference.serves(self, x, rest[-_HEAD :])
        for layer in rest[: -_HEAD] if tiled else rest:
            x = layer(x)
        if not tiled:
            return x
        up, norm, _, _, conv, _ = rest[-_HEAD :]
        return tiled_inference.head(x, up, norm, conv)


class GlobalGenerator(_Generator):
    """G1: conv 7x7, four halvings, residual blocks, four doublings, conv 7x7, tanh.

    Args:
        preset: options; ``ngf`` is the width at full resolution.

    Shapes: semantics (N, classes [+ edge], H, W), H and W multiples of 16; features
        (N, feature_channels, H, W) where the preset has them -> image (N, 3, H, W) in [-1, 1].

    Raises:
        ValueError: another rank, channel count or size.

    Paper: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with Conditional
    GANs", CVPR 2018, section 3.1.

    Example:
        >>> from smis_models import create_model
        >>> generator = create_model("pix2pixhd_cityscapes", part="generator", ngf=8)
        >>> image = generator(torch.rand(1, 36, 64, 128))
    """

    def __init__(self, preset: Pix2pixHDPreset) -> None:
        super().__init__(preset)
        self.model = nn.Sequential(
            *_global_layers(preset.input_channels, preset.ngf, preset.downsamplings, preset.blocks),
            *_image_layers(preset.ngf),
        )

    def forward(self, semantics: Tensor | LabelLayout, features: Tensor | None = None) -> Tensor:
        return self.run(self.model, self.input(semantics, features), image=True)


class LocalEnhancer(_Generator):
    """G2: enhancers around a global generator, each of which doubles the resolution.

    The global generator works on the semantics halved once per enhancer; enhancer n halves its own
    input (``model{n}_1``), adds the features from below and doubles them again (``model{n}_2``).

    Args:
        preset: options; ``ngf`` is the width at full resolution, ``enhancers`` their number.

    Shapes, errors and paper: as :class:`GlobalGenerator`; H and W multiples of 16·2^enhancers.

    Example:
        >>> from smis_models import create_model
        >>> trained = create_model("pix2pixhd_cityscapes", part="generator", ngf=8)
        >>> enhanced = create_model("pix2pixhd_cityscapes_1024", part="generator", ngf=4)
        >>> enhanced = enhanced.load_global(trained.state_dict())
        >>> enhanced = enhanced.freeze_global()  # for the first epochs; then freeze_global(False)
    """

    def __init__(self, preset: Pix2pixHDPreset) -> None:
        super().__init__(preset)
        width = preset.ngf * 2**preset.enhancers
        self.model = nn.Sequential(
            *_global_layers(preset.input_channels, width, preset.downsamplings, preset.blocks)
        )
        for n in range(1, preset.enhancers + 1):
            width = preset.ngf * 2 ** (preset.enhancers - n)
            down = [*_padded_conv(preset.input_channels, width), *_norm(width), *_down(width)]
            up = [*(ResnetBlock(2 * width) for _ in range(preset.local_blocks)), *_up(2 * width)]
            self.add_module(f"model{n}_1", nn.Sequential(*down))
            if n == preset.enhancers:
                up += _image_layers(width)
            self.add_module(f"model{n}_2", nn.Sequential(*up))

    def forward(self, semantics: Tensor | LabelLayout, features: Tensor | None = None) -> Tensor:
        inputs = [self.input(semantics, features)]
        for _ in range(self.preset.enhancers):
            inputs.append(halved(self.dense(inputs[-1])))
        x = self.run(self.model, inputs.pop(), image=False)
        for n in range(1, self.preset.enhancers + 1):
            own = self.run(self.get_submodule(f"model{n}_1"), inputs.pop(), image=False)
            image = n == self.preset.enhancers
            x = self.finish(self.get_submodule(f"model{n}_2"), own + x, image)
        return x

    def load_global(self, state: dict[str, Tensor]) -> LocalEnhancer:
        """Take over a trained generator: G1, or a G2 with fewer enhancers. Returns self.

        Its last layers, which make the image, are left out; the new enhancers stay as they are.

        Raises:
            ValueError: the state is of a generator that does not lie inside this one.
        """
        own = self.state_dict()
        shared = {key: value for key, value in state.items() if key in own}
        wanted = [key for key in own if key.startswith("model.")]
        bad = next((k for k in wanted if k not in shared or shared[k].shape != own[k].shape), None)
        if bad is not None:
            got = tuple(shared[bad].shape) if bad in shared else "none"
            raise ValueError(
                f"state: expected a generator of width {self.preset.ngf * 2**self.preset.enhancers}"
                f" ({bad}: {tuple(own[bad].shape)}), got {got}; its ngf is 2^enhancers times this"
            )
        fits = {key: value for key, value in shared.items() if value.shape == own[key].shape}
        self.load_state_dict({**own, **fits})
        return self

    def freeze_global(self, frozen: bool = True) -> LocalEnhancer:
        """Train the last enhancer alone, or (``frozen=False``) everything. Returns self.

        What lies below was trained before: the global generator and, of several, the other
        enhancers.
        """
        last = f"model{self.preset.enhancers}_"
        for name, part in self.named_children():
            part.requires_grad_(not frozen or name.startswith(last))
        return self


@network("generator", Pix2pixHDPreset)
def pix2pixhd_generator(preset: Pix2pixHDPreset) -> GlobalGenerator | LocalEnhancer:
    """The generator of a preset: with local enhancers where it has some."""
    return LocalEnhancer(preset) if preset.enhancers else GlobalGenerator(preset)


@network("encoder", Pix2pixHDPreset)
class FeatureEncoder(nn.Module):
    """E: an image to features that are constant on every instance.

    Args:
        preset: options; ``nef`` is the width at full resolution, ``feature_channels`` the output's.

    Shapes: image (N, 3, H, W), instances (N, H, W) or (N, 1, H, W), integer ids
        -> (N, feature_channels, H, W) in [-1, 1].

    Raises:
        ValueError: another rank, channel count or size.

    Paper: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with Conditional
    GANs", CVPR 2018, section 3.4.

    Example:
        >>> from smis_models import create_model
        >>> encoder = create_model("pix2pixhd_cityscapes_features", part="encoder", nef=8)
        >>> features = encoder(torch.rand(1, 3, 64, 128), torch.zeros(1, 64, 128).long())
    """

    def __init__(self, preset: Pix2pixHDPreset) -> None:
        super().__init__()
        self.preset = preset
        self.model = nn.Sequential(
            *_global_layers(3, preset.nef, preset.encoder_downsamplings, 0),
            *_image_layers(preset.nef, preset.feature_channels),
        )

    def features(self, image: Tensor) -> Tensor:
        """The features before they are pooled."""
        check_maps("image", image, 3, "RGB in [-1, 1]")
        _check_size("image", image, 2**self.preset.encoder_downsamplings)
        return self.model(fast_format(image))

    def forward(self, image: Tensor, instances: Tensor) -> Tensor:
        return instance_avg_pool2d(self.features(image), instances)


@network("discriminator", Pix2pixHDPreset)
class Pix2pixHDDiscriminator(nn.Module):
    """PatchGAN discriminators on halved copies of the input; the last scale's sees it whole.

    Args:
        preset: options: ``discriminator_scales`` networks of ``discriminator_layers`` convs 4x4
            with stride 2 (and two with stride 1), ``ndf`` channels after the first.

    Shapes: x (N, classes [+ edge] + 3, H, W), semantics and image concatenated (of a model with
        instance features too) -> per scale, full resolution first, the features of every layer
        and, last, the prediction.

    Raises:
        ValueError: another rank or channel count.

    Paper: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with Conditional
    GANs", CVPR 2018, section 3.2.

    Example:
        >>> from smis_models import create_model
        >>> discriminator = create_model("pix2pixhd_cityscapes", part="discriminator", ndf=8)
        >>> predictions = discriminator(torch.rand(1, 36 + 3, 64, 128))
    """

    def __init__(self, preset: Pix2pixHDPreset) -> None:
        super().__init__()
        self.scales, self.layers = preset.discriminator_scales, preset.discriminator_layers + 2
        self.channels = preset.semantic_channels + 3  # features are the generator's alone
        for scale in range(self.scales):
            width, out = self.channels, preset.ndf
            for j in range(self.layers):
                last = j == self.layers - 1
                stride = 2 if j < self.layers - 2 else 1
                conv = _conv(width, 1 if last else out, kernel_size=4, stride=stride, padding=2)
                layer: list[nn.Module] = [conv]
                if j == 0:
                    layer.append(nn.LeakyReLU(0.2))
                elif not last:
                    layer.append(InstanceNormAct2d(out, activation="leaky_relu"))
                self.add_module(f"scale{scale}_layer{j}", nn.Sequential(*layer))
                width, out = out, min(2 * out, 512)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        check_maps("x", x, self.channels, "semantics and image concatenated")
        results = []
        x = fast_format(x)
        for scale in reversed(range(self.scales)):
            features = []
            h = x
            for j in range(self.layers):
                h = self.get_submodule(f"scale{scale}_layer{j}")(h)
                features.append(h)
            results.append(features)
            if scale:
                x = halved(x)
        return results
