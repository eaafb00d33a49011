"""Building blocks that the networks of the zoo share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smis_kernels import CGNorm, LabelLayout, WinogradConv2d, modulate_pair, spectral_norm
from smis_kernels.interface import requested

from .preset import Preset

NormFactory = Callable[[int], CGNorm]


def conv(channels: int, out_channels: int, *, groups: int = 1, kernel_size: int = 3,
         stride: int = 1, padding: int | None = None, bias: bool = True,
         spectral: bool = False, what: str = "conv") -> nn.Conv2d:
    """A conv of the published networks; ``spectral`` adds :func:`smis_kernels.spectral_norm`.

    Raises:
        ValueError: ``groups`` does not divide the channels; ``what`` names the layer.
    """
    if channels % groups or out_channels % groups:
        raise ValueError(
            f"{what}: expected channels divisible by {groups} groups, got {channels} -> "
            f"{out_channels}; change ngf (or nef) or groups"
        )
    layer = WinogradConv2d(
        channels, out_channels, kernel_size, stride=stride, groups=groups, bias=bias,
        padding=kernel_size // 2 if padding is None else padding,
    )
    return spectral_norm(layer) if spectral else layer


def fast_format(x: Tensor) -> Tensor:
    """Features in the memory format that is fastest; the reference keeps the one it has."""
    if requested() == "reference":
        return x
    return x.contiguous(memory_format=torch.channels_last)


def check_maps(name: str, x: Tensor | LabelLayout, channels: int, meaning: str) -> None:
    """Refuse maps of another rank or number of channels; ``meaning`` says what they hold."""
    if len(x.shape) != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{name}: expected (N, {channels}, H, W), {meaning}; got {tuple(x.shape)}"
        )


def check_semantics(semantics: Tensor | LabelLayout, preset: Preset) -> None:
    """Refuse semantics of another rank or number of channels than a generator reads."""
    check_maps("semantics", semantics, preset.semantic_channels, "one channel per class"
               + (" and the edge plane" if preset.instance_edge else ""))


class SPADEResBlock(nn.Module):
    """Residual block of SPADE and GroupDNet, optional nearest x2 upsampling of its input.

    ``y = shortcut(x) + conv_1(lrelu(norm_1(conv_0(lrelu(norm_0(x))))))`` with
    ``shortcut = conv_s(norm_s(x))`` where the width changes, else the identity; all convs carry
    spectral normalisation. With :class:`smis_kernels.CGNorm` norms and ``groups`` > 1 this is
    GroupDNet's CG-Block; with :class:`smis_kernels.SPADE` norms SPADE's ResBlk.

    Args:
        channels, out_channels: widths C and C'; the middle width is the smaller of the two.
        norm: ``norm(width)`` makes a conditional norm, called as ``norm(x, segmap, ...)``.
        groups: groups of the three convs.
        what: the block's name, for errors.

    Shapes: x (N, C, H, W), segmap (N, L, any, any) -> (N, C', H, W), twice that with ``upsample``.

    Papers: Park et al., SPADE, CVPR 2019; Zhu et al., GroupDNet, CVPR 2020.
    """

    def __init__(self, channels: int, out_channels: int, norm: NormFactory, *, groups: int = 1,
                 what: str = "block") -> None:
        super().__init__()
        middle = min(channels, out_channels)
        self.conv_0 = conv(channels, middle, groups=groups, spectral=True, what=f"{what}.conv_0")
        self.conv_1 = conv(middle, out_channels, groups=groups, spectral=True,
                           what=f"{what}.conv_1")
        learned = channels != out_channels
        if learned:
            self.conv_s = conv(channels, out_channels, groups=groups, kernel_size=1, bias=False,
                               spectral=True, what=f"{what}.conv_s")
        self.norm_0 = norm(channels)
        self.norm_1 = norm(middle)
        if learned:
            self.norm_s = norm(channels)
        self.learned_shortcut = learned

    def forward(self, x: Tensor, segmap: Tensor | LabelLayout, upsample: bool = False) -> Tensor:
        if self.learned_shortcut:
            h, shortcut = modulate_pair(self.norm_0, self.norm_s, x, segmap, upsample=upsample,
                                        conv_s=self.conv_s)
        else:
            h = self.norm_0(x, segmap, activation="leaky_relu", upsample=upsample)
            shortcut = x  # which conv_1 upsamples as it adds it
        h = self.norm_1(self.conv_0(h), segmap, activation="leaky_relu")
        return self.conv_1(h, shortcut)


_NORMAL_STD = 0.02


def _drawn(name: str, state: Mapping[str, Tensor], gain: float, rule: str,
           generator: torch.Generator) -> Tensor | None:
    """Start values of a weight or bias that are drawn; None for those that are not."""
    # Drawn on the CPU: the same weights on every device.
    drawn, leaf = torch.empty(state[name].shape), name.rpartition(".")[2]
    if leaf in ("weight", "weight_orig") and drawn.dim() >= 2:
        if rule == "xavier":
            return nn.init.xavier_normal_(drawn, gain, generator=generator)
        return nn.init.normal_(drawn, 0, _NORMAL_STD, generator=generator)
    if rule == "xavier" or leaf not in ("weight", "bias"):
        return None
    if leaf == "weight":
        return nn.init.normal_(drawn, 1, _NORMAL_STD, generator=generator)
    weight = state.get(name.removesuffix("bias") + "weight")
    if weight is None or weight.dim() < 2:
        return None
    bound = weight[0].numel() ** -0.5
    return nn.init.uniform_(drawn, -bound, bound, generator=generator)


@torch.no_grad()
def init_weights(module: nn.Module, *, seed: int = 0, gain: float = 0.02,
                 rule: str = "xavier") -> nn.Module:
    """Fill every parameter and buffer as the published networks start.

    ========  ============================  ===============================  =================
    rule      weights of convs and linears  their biases                     affine norms
    ========  ============================  ===============================  =================
    xavier    xavier normal with ``gain``   0                                1, 0
    normal    N(0, 0.02²)                   U(-b, b), b = 1/sqrt(fan in)     N(1, 0.02²), 0
    ========  ============================  ===============================  =================

    Running statistics start at (0, 1). The vectors of spectral normalisation start from one power
    iteration, so that the weights have a norm of about one in eval mode too.

    Args:
        module: built anywhere, ``torch.device("meta")`` followed by ``to_empty`` included.
        seed: of a generator of its own; the global random state is neither read nor changed.
        gain: of the xavier rule; 0.02 as published, 1 gives livelier pictures without training.
        rule: "xavier" (SPADE, GroupDNet, CC-FPSE) or "normal" (pix2pixHD).

    Raises:
        ValueError: an unknown rule.

    Example:
        >>> net = init_weights(nn.Conv2d(3, 8, 3), seed=1)
    """
    if rule not in ("xavier", "normal"):
        raise ValueError(f"rule: expected 'xavier' or 'normal', got {rule!r}")
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        leaf = name.rpartition(".")[2]
        drawn = _drawn(name, state, gain, rule, generator)
        if drawn is not None:
            tensor.copy_(drawn)
        elif leaf in ("weight", "running_var"):
            tensor.fill_(1)
        elif leaf == "weight_u":
            tensor.copy_(F.normalize(torch.randn(tensor.shape, generator=generator), dim=0))
        else:
            tensor.zero_()
    settle(module, 1)
    return module


@torch.no_grad()
def settle(module: nn.Module, rounds: int = 30) -> None:
    """Power iterations of the spectral norms; after many they no longer move from call to call."""
    for layer in module.modules():
        buffers = dict(layer.named_buffers(recurse=False))
        if "weight_u" in buffers:
            u, v = buffers["weight_u"], buffers["weight_v"]
            weight = layer.get_parameter("weight_orig").flatten(1)
            for _ in range(rounds):
                v.copy_(F.normalize(weight.mT @ u, dim=0))
                u.copy_(F.normalize(weight @ v, dim=0))
