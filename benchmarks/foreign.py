"""accelerate() on networks of other families: ``python -m benchmarks.foreign [--maps FOLDER]``.

Random weights, eval, float32, batch of one, 256 x 256, against the same network before; all sides
of a case are timed in turn in one run. Ours runs on every map, the baselines on the first. What
the accelerated network makes of a map is made in the call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.spade_autoencoderkl import SPADEAutoencoderKL
from monai.networks.nets.spade_diffusion_model_unet import SPADEDiffusionModelUNet
from monai.networks.nets.spade_network import SPADENet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from benchmarks.test_accelerate import SIZE, case_of, paint, planes_of
from smis_models.benchmark.case import COCO_CLASSES, Inputs, Maps, Setting
from smis_models.benchmark.measure import measure
from smis_models.benchmark.records import Record, markdown, save
from smis_models.io.allocator import reuse_freed_memory
from smis_models.networks.blocks import settle
from tests import foreign, foreign_families

NOISE = 64
Draw = Callable[[torch.Generator], tuple[Tensor, ...]]


def painter(cls: Callable[..., nn.Module], **options: object) -> nn.Module:
    return foreign.Painter(COCO_CLASSES, norm=partial(cls, **options))


def monai_spade() -> nn.Module:
    return SPADENet(2, 1, 3, COCO_CLASSES, list(SIZE), [32, 64, 128, 256], is_vae=False)


def monai_autoencoder() -> nn.Module:
    return SPADEAutoencoderKL(
        2, label_nc=COCO_CLASSES, num_res_blocks=(2, 2, 2), channels=(64, 128, 128),
        attention_levels=(False, False, False), latent_channels=8,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False)


def monai_diffusion() -> nn.Module:
    return SPADEDiffusionModelUNet(
        2, 3, 3, COCO_CLASSES, num_res_blocks=(1, 1, 1), channels=(64, 128, 128),
        attention_levels=(False, False, True), num_head_channels=64)


def paint_first(model: nn.Module, planes: Tensor) -> Tensor:
    return model(planes)[0]


def decode(model: Any, planes: Tensor, z: Tensor) -> Tensor:
    return model.decode(z, planes)


def denoise(model: nn.Module, planes: Tensor, x: Tensor) -> Tensor:
    return model(x, torch.tensor([500]), planes)


def nothing(generator: torch.Generator) -> tuple[Tensor, ...]:
    return ()


def normal(*shape: int) -> Draw:
    return lambda generator: (torch.randn(shape, generator=generator),)


# What builds a network, how it is run, what it takes beside the map, and what is to be reached.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Draw, float]] = {
    "oasis_noise": (partial(foreign_families.NoisyPainter, COCO_CLASSES, NOISE), paint,
                    normal(1, NOISE), 2.5),
    "oasis": (partial(foreign_families.NoisyPainter, COCO_CLASSES, 0), paint, nothing, 2.5),
    "monai_spade": (monai_spade, paint_first, nothing, 1.5),
    "monai_autoencoder": (monai_autoencoder, decode, normal(1, 8, 64, 64), 1.0),
    "monai_diffusion": (monai_diffusion, denoise, normal(1, 3, *SIZE), 1.0),
    "imaginaire": (partial(foreign_families.WrappedPainter, COCO_CLASSES), paint, nothing, 1.0),
    "cocosnet": (partial(painter, foreign_families.MirrorNorm), paint, nothing, 1.0),
    "clade": (partial(painter, foreign_families.ClassTableNorm), paint, nothing, 1.0),
    "plain": (partial(painter, foreign_families.PlainNorm), paint, nothing, 1.0),
    "weight_norm": (partial(painter, foreign_families.ParametrizedNorm,
                            wrap=parametrizations.weight_norm), paint, nothing, 1.0),
    "spectral_norm": (partial(painter, foreign_families.ParametrizedNorm, wrap=spectral_norm),
                      paint, nothing, 1.0),
    "pix2pixhd": (partial(foreign_families.global_generator, COCO_CLASSES), paint, nothing, 1.0),
}


@lru_cache(maxsize=1)  # the weights of one network at a time
def network(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """torch's initial weights, of which none is zero: nothing may hide what a norm computes."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not p.any():
                p.normal_(0, p[0].numel() ** -0.5)
        settle(model)  # until then spectral norm divides by too little
    return model.to(device, dtype).eval()


def inputs(name: str, setting: Setting) -> Inputs:
    planes = planes_of(setting, COCO_CLASSES)
    drawn = NETWORKS[name][2](torch.Generator().manual_seed(0))
    model = network(name, setting.dtype, setting.device)
    return model, planes, *(t.to(planes) for t in drawn)


def paints(name: str, setting: Setting) -> bool:
    """Whether a picture says anything: finite, and not of one colour."""
    with torch.no_grad():
        picture = NETWORKS[name][1](*inputs(name, setting))
    return bool(picture.isfinite().all()) and float(picture.std()) > 1e-3


def _say(name: str, what: str) -> None:
    print(f"{name}: {what}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK",
                        help=f"which of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--maps", type=Path, help="folder of label maps; default: sample scenes")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time a network")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile beside them")
    parser.add_argument("--out", type=Path, help="JSON file for the records")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.networks) - NETWORKS.keys())
    if unknown:
        parser.error(f"networks: expected some of {', '.join(NETWORKS)}; got {unknown[0]}")
    try:
        maps = Maps(arguments.maps)
    except FileNotFoundError as error:
        parser.error(str(error))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    reuse_freed_memory()
    setting = Setting(torch.device("cpu"), maps=maps, compiled=arguments.compiled,
                      seconds=arguments.seconds)
    records: list[Record] = []
    for name in arguments.networks or NETWORKS:
        if not paints(name, setting):
            print(f"{name}: expected a picture with contents, got a blank one", file=sys.stderr)
            return 1
        _, run, _, target = NETWORKS[name]
        case = case_of(f"foreign/{name}", partial(inputs, name), run, target)
        records += measure(case, setting, partial(_say, name))
        counts = records[-1].counts
        print(f"{name}: {counts['replaced']} replaced, accelerate() {counts['accelerate_ms']} ms",
              file=sys.stderr)
        if arguments.out is not None:
            save(arguments.out, records)
    print(markdown(records))
    return 0 if all(record.correct for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
