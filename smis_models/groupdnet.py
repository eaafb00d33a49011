"""GroupDNet's generator: groups that shrink from one per class to one, by a schedule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import CGNorm, LabelLayout
from smis_kernels.modulation.choice import prepare_map

from .blocks import NormFactory, SPADEResBlock, check_maps, conv, fast_format
from .presets import GroupDNetPreset

BLOCKS = ("G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4")
_CALLED = BLOCKS[:6]


class GroupDNetGenerator(nn.Module):
    """Group-decreasing generator: a latent code per class and a label map to an image.

    ``fc`` (one group per class) -> ``head_0`` -> six CG-Blocks with nearest x2 upsampling between
    them, in the preset's ever fewer groups -> LeakyReLU -> ``conv_img`` -> tanh.

    Args:
        preset: the data set's schedule of widths and groups.

    Shapes: semantics (N, classes [+ edge], H, W), one-hot; z (N, 8·classes, h, w) with channels
        8c..8c+7 for class c -> image (N, 3, 64h, 64w) in [-1, 1] (32h, 32w: upsampling "normal").

    Raises:
        ValueError: semantics or z of another rank, channel count or batch size.

    Paper: Zhu et al., "Semantically Multi-modal Image Synthesis", CVPR 2020.

    Example:
        >>> generator = create_model("groupdnet_deepfashion", part="generator")
        >>> image = generator(semantics, generator.sample_latent(len(semantics)))
    """

    def __init__(self, preset: GroupDNetPreset) -> None:
        super().__init__()
        self.preset = preset
        classes, width = preset.classes, preset.head_channels
        latent = preset.latent_channels * classes
        self.fc = conv(latent, width, groups=classes, what="fc")
        self.head_0 = self._block("head_0", width, width, classes)
        names = BLOCKS[: len(preset.widths)]
        for name, factor, groups in zip(names, preset.widths, preset.groups, strict=True):
            out = factor * preset.ngf
            self.add_module(name, self._block(name, width, out, groups))
            width = out
        self.conv_img = conv(preset.widths[len(_CALLED) - 1] * preset.ngf, 3)

    def _block(self, name: str, channels: int, out_channels: int, groups: int) -> SPADEResBlock:
        return SPADEResBlock(channels, out_channels, self._norm(groups), groups=groups, what=name)

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
        if not 0 <= index < self.preset.classes:
            raise ValueError(f"index: expected a class 0..{self.preset.classes - 1}, got {index}")
        size = self.preset.latent_channels
        return slice(index * size, (index + 1) * size)

    def forward(self, semantics: Tensor | LabelLayout, z: Tensor) -> Tensor:
        preset = self.preset
        check_maps("semantics", semantics, preset.semantic_channels, "one channel per class"
                   + (" and the edge plane" if preset.instance_edge else ""))
        check_maps("z", z, preset.latent_channels * preset.classes,
                   f"{preset.latent_channels} channels per class")
        if z.shape[0] != semantics.shape[0]:
            raise ValueError(
                f"z: expected batch size {semantics.shape[0]} as semantics, got {z.shape[0]}"
            )
        segmap = prepare_map(semantics, self.fc.weight)
        if preset.instance_edge:
            segmap = _interleave_edge(segmap)
        x = self.head_0(fast_format(self.fc(z)), segmap)
        for name in _CALLED:
            upsample = name != "G_middle_1" or preset.upsampling == "more"
            x = self.get_submodule(name)(x, segmap, upsample=upsample)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


def _interleave_edge(semantics: Tensor | LabelLayout) -> Tensor | LabelLayout:
    """[class 0, ..., class C-1, edge] -> [class 0, edge, class 1, edge, ...]."""
    if isinstance(semantics, LabelLayout):
        return semantics.map_vectors(_interleave_planes)
    return _interleave_planes(semantics)


def _interleave_planes(planes: Tensor) -> Tensor:
    classes, edge = planes[:, :-1], planes[:, -1:]
    return torch.stack([classes, edge.expand_as(classes)], 2).flatten(1, 2)
