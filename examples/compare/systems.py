"""The systems of GroupDNet's comparison, at a size that a CPU trains."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from smis_models.data.scenes import LANDSCAPE
from smis_models.families import GroupDNetPreset, LatentPreset, Preset, entry, network_parts
from smis_models.training import LogConfig, TrainConfig, recipe


@dataclass(frozen=True)
class Published:
    """A row of the paper's table on DeepFashion: 256x256, its authors' code and GPU."""

    fid: float
    mcsd: float
    mocd: float
    lpips: float
    she: float
    fps: float
    parameters: float
    """Millions."""


@dataclass(frozen=True)
class System:
    """A model of the zoo and its published figures."""

    model: str
    published: Published


SYSTEMS = {
    "MulNet": System("mulnet_deepfashion",
                     Published(12.07, 0.0244, 0.0019, 0.202, 79.2, 6.3, 105.1)),
    "GroupNet": System("groupnet_deepfashion",
                       Published(12.58, 0.0276, 0.0017, 0.203, 83.7, 8.2, 97.7)),
    "GroupEnc": System("groupenc_deepfashion",
                       Published(10.83, 0.0232, 0.0065, 0.217, 69.3, 19.6, 105.5)),
    "GroupDec": System("groupdec_deepfashion",
                       Published(9.84, 0.0003, 0.0257, 0.206, 26.4, 12.1, 111.3)),
    "VSPADE": System("vspade_deepfashion",
                     Published(10.02, 0.0304, 0.1843, 0.207, 23.6, 20.4, 106.8)),
    "BicycleGAN": System("bicyclegan_deepfashion",
                         Published(40.07, 0.0316, 0.2147, 0.228, 24.8, 66.9, 58.4)),
    "DSCGAN": System("dscgan_deepfashion",
                     Published(38.40, 0.0245, 0.1560, 0.163, 27.6, 67.2, 58.4)),
    "GroupDNet": System("groupdnet_deepfashion",
                        Published(9.50, 0.0264, 0.0033, 0.228, 81.2, 12.2, 109.1)),
}
"""In the order of the paper's table (Zhu et al., CVPR 2020)."""

_REFERENCE = "GroupDNet"
_WIDEST = 4  # times the width that the published one scales to


def parameters(preset: Preset) -> int:
    """Parameters of generator and encoder, as the paper counts them."""
    with torch.device("meta"):
        made = [make(preset) for part, make in network_parts(preset).items()
                if part != "discriminator"]
    return sum(p.numel() for part in made for p in part.parameters())


def _steps(preset: Preset) -> tuple[int, int]:
    """What ngf and nef must be multiples of: every layer's groups divide its width."""
    if not isinstance(preset, GroupDNetPreset):
        return 1, 1
    layers = zip(preset.groups, preset.widths, strict=True)
    own = math.lcm(*(groups // math.gcd(groups, width) for groups, width in layers))
    return own, preset.classes if preset.encoder_groups is None else preset.encoder_groups


def _scaled(preset: Preset, ngf: int, share: float, size: int, ndf: int) -> Preset:
    options: dict[str, Any] = {"ngf": ngf, "image_size": (size, size), "ndf": ndf,
                               "classes": len(LANDSCAPE)}
    step = _steps(preset)[1]
    if hasattr(preset, "nef"):
        options["nef"] = max(step, round(preset.nef * share / step) * step)
    if isinstance(preset, LatentPreset):
        options["upsampling"] = "normal"  # a start of 2x2 at 64x64
    return replace(preset, **options)


@cache
def small_preset(name: str, size: int, width: int, ndf: int) -> Preset:
    """A system's options at a small size.

    GroupDNet has the width that is asked for; every other system has the one that brings its number
    of parameters nearest to GroupDNet's times their published ratio, which is how the paper chose
    its widths. ``nef`` shrinks by the share of GroupDNet's width.

    Args:
        name: of :data:`SYSTEMS`.
        size: height and width of the pictures, a multiple of 32.
        width: GroupDNet's ngf (published: 160).
        ndf: of every discriminator.

    Raises:
        ValueError: an unknown system, or a size or width that does not fit.
    """
    if name not in SYSTEMS:
        raise ValueError(f"only: expected of {', '.join(SYSTEMS)}; got {name!r}")
    system, reference = SYSTEMS[name], SYSTEMS[_REFERENCE]
    preset, full = entry(system.model).preset, entry(reference.model).preset
    share = width / full.ngf
    if name == _REFERENCE:
        return _scaled(preset, width, share, size, ndf)
    ours = parameters(small_preset(_REFERENCE, size, width, ndf))
    target = round(ours * system.published.parameters / reference.published.parameters)
    step = _steps(preset)[0]

    def excess(multiple: int) -> int:
        return parameters(_scaled(preset, multiple * step, share, size, ndf)) - target

    widest = max(2, round(_WIDEST * preset.ngf * share / step))
    above = bisect.bisect_left(range(1, widest), 0, key=excess) + 1
    nearest = min((m for m in (above - 1, above) if m), key=lambda m: abs(excess(m)))
    return _scaled(preset, nearest * step, share, size, ndf)


def small_config(name: str, *, size: int, width: int, ndf: int, batch: int, workers: int, seed: int,
                 vgg: str | None = None) -> TrainConfig:
    """A system's published training on the generated scenes; it ends when its time is spent.

    Learning rates are constant: a decay would need to know how many steps the time holds.
    """
    published = recipe(SYSTEMS[name].model)
    # Without a file of its own a run would take what lies in torch.hub's folder, if anything does.
    perceptual = published.losses.perceptual if vgg is not None else 0.0
    losses = replace(published.losses, vgg=vgg, perceptual=perceptual)
    return replace(
        published, network=small_preset(name, size, width, ndf), losses=losses, seed=seed,
        data=replace(published.data, name="scenes", batch=batch, workers=workers),
        schedule=replace(published.schedule, epochs=1_000_000, decay_epochs=0),
        log=LogConfig(every=10, checkpoint_every=50, grid_every=500, tensorboard=False),
    )

