"""GroupDNet's generator: groups that shrink from one per class to one, by a schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from smis_kernels import CGNorm, LabelLayout

from ..networks.blocks import NormFactory, SPADEResBlock, check_maps, conv, fast_format
from ..networks.generator import WIDTHS, UpwardGenerator, resized
from .presets import GroupDNetPreset

BLOCKS = (*WIDTHS, "up_4")


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
        >>> generator = create_model("groupdnet_deepfashion", part="generator")
        >>> image = generator(semantics, generator.sample_latent(len(semantics)))
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
        if not 0 <= index < self.preset.classes:
            raise ValueError(f"index: expected a class 0..{self.preset.classes - 1}, got {index}")
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
            segmap = _interleave_edge(segmap)
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


def _interleave_edge(semantics: Tensor | LabelLayout) -> Tensor | LabelLayout:
    """[class 0, ..., class C-1, edge] -> [class 0, edge, class 1, edge, ...]."""
    if isinstance(semantics, LabelLayout):
        return semantics.map_vectors(_interleave_planes)
    return _interleave_planes(semantics)


def _interleave_planes(planes: Tensor) -> Tensor:
    classes, edge = planes[:, :-1], planes[:, -1:]
    return torch.stack([classes, edge.expand_as(classes)], 2).flatten(1, 2)
