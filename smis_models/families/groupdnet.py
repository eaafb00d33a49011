"""GroupDNet's generator: groups that shrink from one per class to one, by a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smis_kernels import CGNorm, LabelLayout, class_boxes, class_crops
from smis_kernels.interface import hooked, requested, transformed

from ..networks.blocks import NormFactory, SPADEResBlock, check_maps, conv, fast_format
from ..networks.encoder import StridedEncoder, of_classes
from ..networks.generator import WIDTHS, UpwardGenerator, resized
from ..networks.preset import LatentPreset, is_whole
from .registry import RECIPES, hinge_recipe, network, register_model


@dataclass(frozen=True)
class NormWidths:
    """Sizes of the convs that predict gamma and beta in one CG-Norm."""

    hidden: int
    groups: int
    shared_groups: int


@dataclass(frozen=True, kw_only=True)
class GroupDNetPreset(LatentPreset):
    """Options of one GroupDNet (Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020).

    ``widths`` and ``groups`` are those of the blocks after ``head_0`` (``G_middle_0``,
    ``G_middle_1``, ``up_0``, ...), widths in units of ``ngf``; a seventh, ``up_4``, is called with
    upsampling "most" alone; ``head_0`` has 16 channels per class where ``head_per_class``, else
    16·ngf. ``start_groups`` (of ``fc`` and ``head_0``) and ``encoder_groups`` (of every layer of
    the encoder) are one per class where None, as published;
    ``encoder_depth``, the encoder's number of strided convs, leads to the size at which the
    generator starts (the published code has six from 256 pixels on, else five, which fits there).
    ``fusion`` says how the last features become a picture: "conv" as published, or "masks", for
    which they are as many groups as classes, and each class's group is kept where the class is.
    """

    upsamplings: ClassVar[Mapping[str, int]] = {"normal": 5, "more": 6, "most": 7}

    nef: int
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    modulation: Literal["fixed", "per_class", "shared_per_class"]
    head_per_class: bool = False
    start_groups: int | None = None
    encoder_groups: int | None = None
    encoder_depth: int | None = None
    fusion: Literal["conv", "masks"] = "conv"
    latent_channels: int = 8
    upsampling: Literal["normal", "more", "most"] = "more"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("nef")
        for name in ("start_groups", "encoder_groups", "encoder_depth"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        if len(self.widths) != len(self.groups) or len(self.widths) not in (6, 7):
            raise ValueError(
                "widths, groups: expected one entry each for G_middle_0, G_middle_1, up_0, ..., "
                f"up_3 (and up_4); got {len(self.widths)} and {len(self.groups)}"
            )
        for name in ("widths", "groups"):
            if not all(is_whole(n) and n > 0 for n in getattr(self, name)):
                raise ValueError(f"{name}: expected whole numbers of at least 1, got "
                                 f"{getattr(self, name)}")
        if self.modulation == "fixed" and self.start_groups is None and 128 % self.classes:
            raise ValueError(
                f"classes: modulation 'fixed' expected a divisor of 128, got {self.classes}; "
                f"choose modulation 'per_class', with ngf and nef multiples of {self.classes}"
            )
        if self.upsampling == "most" and len(self.widths) != 7:
            raise ValueError(
                "upsampling: 'most' expected widths and groups with a seventh entry, of up_4; "
                f"got {len(self.widths)}"
            )
        if self.fusion not in ("conv", "masks"):
            raise ValueError(f"fusion: expected conv or masks; got {self.fusion!r}")
        if self.fusion == "masks" and self.last_width % self.classes:
            raise ValueError(
                f"fusion: 'masks' expected a last width divisible by the {self.classes} classes, "
                f"got {self.last_width}; change ngf"
            )

    @property
    def head_channels(self) -> int:
        """Width of ``fc`` and ``head_0``."""
        return 16 * (self.classes if self.head_per_class else self.ngf)

    @property
    def called(self) -> int:
        """How many blocks after ``head_0`` are called: up_4 is with upsampling "most" alone."""
        return 7 if self.upsampling == "most" else 6

    @property
    def last_width(self) -> int:
        """Width of the last block that is called."""
        return self.widths[self.called - 1] * self.ngf

    def norm_widths(self, groups: int) -> NormWidths:
        """CG-Norm sizes inside a block of ``groups`` groups: one published rule per data set."""
        c = self.classes
        if self.modulation == "fixed":
            return NormWidths(hidden=128, groups=groups, shared_groups=groups)
        if self.modulation == "per_class":
            return NormWidths(hidden=c * groups, groups=c, shared_groups=c)
        hidden = 2 * c if c % groups == 0 else c * groups
        return NormWidths(hidden=hidden, groups=groups, shared_groups=c)


# Its paper gives this training to every system of the table but the U-Nets.
_DEEPFASHION = hinge_recipe("deepfashion", batch=8, epochs=60, decay=40, kl_devices=4)

DEEPFASHION = register_model(
    "groupdnet_deepfashion", "GroupDNet for DeepFashion: 8 classes, 256x256",
    GroupDNetPreset(
        classes=8, image_size=(256, 256), ngf=160, nef=256,
        widths=(16, 16, 8, 4, 2, 1), groups=(8, 4, 4, 2, 2, 1), modulation="fixed",
    ),
    _DEEPFASHION,
)
CITYSCAPES = register_model(
    "groupdnet_cityscapes", "GroupDNet for Cityscapes: 35 classes and instance edges, 256x512",
    GroupDNetPreset(
        classes=35, image_size=(256, 512), ngf=280, nef=350, instance_edge=True,
        widths=(16, 16, 8, 4, 2, 1), groups=(35, 20, 14, 10, 4, 1), modulation="per_class",
    ),
    hinge_recipe("cityscapes", batch=4, epochs=100, decay=100, kl_devices=4),
)
# The seventh block, up_4, lies in the published checkpoint but is never called.
ADE20K = register_model(
    "groupdnet_ade20k", "GroupDNet for ADE20K: 151 classes, 256x256",
    GroupDNetPreset(
        classes=151, image_size=(256, 256), ngf=64, nef=604, dont_care=150, unlabelled=0,
        head_per_class=True, widths=(32, 16, 16, 8, 4, 2, 1), groups=(16, 16, 8, 4, 2, 1, 1),
        modulation="shared_per_class",
    ),
    hinge_recipe("ade20k", batch=4, epochs=100, decay=100, kl_devices=4),
)
_OF_SCENES = {
    "schedule": {"epochs": 3}, "init_gain": 1.0,
    "log": {"every": 20, "checkpoint_every": 100, "grid_every": 100, "samples": 5,
            "tensorboard": False},
}
# Small enough to be trained on a CPU and to ship: DeepFashion's schedule of groups on the scenes
# that the package draws. One code for the whole of a class, not one for each part of the picture.
SCENES = register_model(
    "groupdnet_scenes",
    "GroupDNet for the package's landscapes, small: 8 classes, 128x128; its weights ship",
    GroupDNetPreset(
        classes=8, image_size=(128, 128), ngf=16, nef=64, ndf=16,
        widths=(16, 16, 8, 4, 2, 1, 1), groups=(8, 4, 4, 2, 2, 1, 1), modulation="fixed",
        upsampling="most",
    ),
    # The second half of its training: codes with their noise, and a discriminator of pictures of
    # encoded and of drawn codes. The shipped weights went on from the first half's, whitened:
    # ``--init FILE --whiten true``.
    {
        **_OF_SCENES,
        "data": {"batch": 16, "workers": 0, "count": 3200},
        "losses": {"adversarial": 0.5, "feature_matching": 2.0, "perceptual": 0.0, "kl": 1e-3,
                   "pixel": 10.0, "pixel_mean": "classes", "prior": 0.5},
        "optimizer": {"generator": 5e-4, "discriminator": 5e-4, "ema": 0.99, "reuse_fake": True},
    },
)
# The first half: an autoencoder, for codes that noise would keep unused. With noise from the start
# three classes of eight still had no code after 1400 steps; without it, without a KL term and with
# an L1 that counts classes alike, all eight have after 700.
RECIPES["groupdnet_scenes_codes"] = "groupdnet_scenes", {
    **_OF_SCENES,
    "data": {"batch": 16, "workers": 0, "count": 6400},
    "losses": {"adversarial": 0.0, "feature_matching": 0.0, "perceptual": 0.0, "kl": 0.0,
               "code_noise": 0.0, "pixel": 10.0, "pixel_mean": "classes"},
    "optimizer": {"generator": 2e-3, "betas": (0.5, 0.99), "ema": 0.99, "reuse_fake": True},
}

# The systems of the paper's table whose networks are GroupDNet's under another schedule of groups.
# Where the paper leaves a width open, it is the one that gives the table's parameter count.
#
# GroupNet: as many groups as classes everywhere; only the last conv sees all classes (97.69 M of
# the table's 97.7).
GROUPNET = register_model(
    "groupnet_deepfashion", "GroupNet for DeepFashion: one group per class in every layer, 256x256",
    replace(DEEPFASHION, ngf=192, groups=(8,) * 6), _DEEPFASHION,
)
# MulNet: a network of its own for each class. Side by side they are the groups of one network; each
# paints from its own code and its own class's mask, its features are kept where its class is, and
# the last conv reads their sum (104.48 M of 105.1).
MULNET = register_model(
    "mulnet_deepfashion",
    "MulNet: a network for each of DeepFashion's classes, side by side, 256x256",
    replace(GROUPNET, ngf=200, fusion="masks"), _DEEPFASHION,
)
# GroupEnc: GroupDNet's encoder, and a decoder without groups (105.56 M of 105.5).
GROUPENC = register_model(
    "groupenc_deepfashion",
    "GroupEnc for DeepFashion: GroupDNet's encoder, a decoder without groups, 256x256",
    replace(DEEPFASHION, ngf=64, start_groups=1, groups=(1,) * 6), _DEEPFASHION,
)
# GroupDec: GroupDNet's decoder, and an encoder without groups that reads the same class crops
# (111.33 M of 111.3).
GROUPDEC = register_model(
    "groupdec_deepfashion",
    "GroupDec for DeepFashion: an encoder without groups, GroupDNet's decoder, 256x256",
    replace(DEEPFASHION, nef=96, encoder_groups=1), _DEEPFASHION,
)


BLOCKS = (*WIDTHS, "up_4")


@network("generator", GroupDNetPreset)
class GroupDNetGenerator(UpwardGenerator):
    """Group-decreasing generator: a latent code per class and a label map to an image.

    ``fc`` (one group per class) -> ``head_0`` -> six CG-Blocks (seven with upsampling "most") with
    nearest x2 upsampling between them, in the preset's ever fewer groups -> LeakyReLU ->
    ``conv_img`` -> tanh. With other schedules of groups it is the paper's MulNet, GroupNet,
    GroupEnc and GroupDec.

    Args:
        preset: the schedule of widths and groups.

    Shapes: semantics (N, classes [+ edge], H, W), one-hot; z (N, 8·classes, h, w) with channels
        8c..8c+7 for class c -> image (N, 3, 64h, 64w) in [-1, 1] (upsampling "normal": 32h, 32w;
        "most": 128h, 128w).

    Raises:
        ValueError: semantics or z of another rank, channel count or batch size.

    Paper: Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020.

    Example:
        >>> from smis_models import create_model
        >>> generator = create_model("groupdnet_scenes", part="generator", ngf=8).eval()
        >>> image = generator(torch.rand(1, 8, 128, 128), generator.sample_latent(1))
    """

    preset: GroupDNetPreset

    def __init__(self, preset: GroupDNetPreset) -> None:
        super().__init__()
        self.preset = preset
        groups = preset.start_groups or preset.classes
        latent, channels = preset.latent_channels * preset.classes, preset.head_channels
        self.fc = conv(latent, channels, groups=groups, what="fc")
        blocks = zip(BLOCKS, (channels, *(factor * preset.ngf for factor in preset.widths)),
                     (groups, *preset.groups), strict=False)
        for name, out, count in blocks:
            block = SPADEResBlock(channels, out, self._norm(count), groups=count, what=name)
            self.add_module(name, block)
            channels = out
        parts = preset.classes if preset.fusion == "masks" else 1
        self.conv_img = conv(preset.last_width // parts, 3)

    def _norm(self, groups: int) -> NormFactory:
        preset, sizes = self.preset, self.preset.norm_widths(groups)
        # Where an edge plane is fed, it goes with every class: two label planes per class.
        planes = preset.classes * (2 if preset.instance_edge else 1)
        return lambda channels: CGNorm(
            channels, planes, sizes.hidden, groups=sizes.groups,
            shared_groups=sizes.shared_groups, norm=preset.norm,
        )

    def sample_latent(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """``batch`` codes from N(0, 1), drawn on the CPU: one seed, one picture on every device."""
        preset = self.preset
        shape = (batch, preset.latent_channels * preset.classes, *preset.latent_size)
        z = torch.randn(shape, generator=generator)
        return z.to(self.fc.weight)

    def class_channels(self, index: int) -> slice:
        """The channels of z that belong to class ``index``."""
        if not hasattr(index, "__index__") or not 0 <= index < self.preset.classes:
            raise ValueError(f"index: expected a class 0..{self.preset.classes - 1}, got {index!r}")
        size = self.preset.latent_channels
        return slice(index * size, (index + 1) * size)

    def forward(self, semantics: Tensor | LabelLayout, z: Tensor) -> Tensor:
        preset = self.preset
        segmap = self._segmap(semantics)
        check_maps("z", z, preset.latent_channels * preset.classes,
                   f"{preset.latent_channels} channels per class")
        if z.shape[0] != semantics.shape[0]:
            raise ValueError(
                f"z: expected batch size {semantics.shape[0]} as semantics, got {z.shape[0]}"
            )
        if preset.instance_edge:
            segmap = (segmap.map_vectors(_interleaved) if isinstance(segmap, LabelLayout)
                      else _interleaved(segmap))
        x = fast_format(self.fc(z))
        for name in BLOCKS[:1 + preset.called]:
            x = self.get_submodule(name)(x, segmap, upsample=self._upsamples(name))
        if preset.fusion == "masks":
            x = self._fused(x, semantics)
        return self._picture(x)

    def _fused(self, x: Tensor, semantics: Tensor | LabelLayout) -> Tensor:
        """(N, classes·K, H, W) -> (N, K, H, W): every class's features where the class is."""
        classes = self.preset.classes
        masks = resized(semantics, (x.shape[2], x.shape[3]), x)[:, :classes].to(x.dtype)
        return fast_format(torch.einsum("nckhw,nchw->nkhw", x.unflatten(1, (classes, -1)), masks))


def _interleaved(planes: Tensor) -> Tensor:
    """[class 0, ..., class C-1, edge] -> [class 0, edge, class 1, edge, ...]."""
    classes, edge = planes[:, :-1], planes[:, -1:]
    return torch.stack([classes, edge.expand_as(classes)], 2).flatten(1, 2)


class _Pairs(NamedTuple):
    """The present (image, class) pairs of a batch, P of them, by image."""

    images: Tensor
    classes: Tensor


@network("encoder", GroupDNetPreset)
class GroupDNetEncoder(StridedEncoder):
    """Class-wise encoder: the crop of a class gives mean and log variance of its latent code.

    Convs 3x3, stride 2, grouped by class, spectral and instance normalised, LeakyReLU(0.2), as many
    as the generator has upsamplings; then two heads, grouped by class.

    An absent class, whose three planes are zero, stays zero through all convs (no bias) and
    instance norms, so its code is the heads' bias, exactly. Only the present (image, class)
    pairs are computed, as the groups of one conv over a batch of one; which they are is read on
    the host. All classes are computed on the reference backend, under torch.compile and
    torch.jit.trace, and where ``x`` requires a gradient, for an absent class's planes have one.
    With another number of groups than classes (``encoder_groups``) codes are of all classes, and
    all are computed.

    Args:
        preset: options; ``nef`` is the width of the first conv over all classes.

    Shapes: x (N, 3·classes, H, W), class-major -> mu, logvar (N, 8·classes, h, w) each;
        channels 8c..8c+7 belong to class c.

    Raises:
        ValueError: another number of channels.

    Paper: Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020, section 3.2.

    Example:
        >>> from smis_models import create_model, reparameterize
        >>> encoder = create_model("groupdnet_scenes", part="encoder", nef=8)
        >>> image, labels = torch.rand(1, 3, 128, 128), torch.zeros(1, 128, 128).long()
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
            return self(class_crops(image, labels, self.classes, size=self.image_size))
        pairs = self._present(class_boxes(image, labels, self.classes)[..., 1] > 0)
        if pairs is None:
            return self._codes(class_crops(image, labels, self.classes, size=self.image_size), None)
        crops = self._present_crops(image, labels.view(-1, *image.shape[2:]), pairs)
        return self._spread(self._codes(crops, pairs.classes), pairs, len(image))

    def _all_computed(self) -> bool:
        """Whether absent classes are computed like the others; hooks are to see all of them."""
        return (self.groups != self.classes or requested() == "reference"
                or torch.compiler.is_compiling() or transformed() is not None
                or hooked(self, self.fc_mu, self.fc_var)
                or hooked(*self.modules(), weights=False))

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
            F.conv2d(x, of_classes(weight, classes, self.classes),
                     of_classes(bias, classes, self.classes), padding=1, groups=count)
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
