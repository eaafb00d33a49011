"""The models by name: ``create_model`` and ``list_models``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import LabelLayout

from .blocks import init_weights
from .ccfpse import CCFPSEGenerator, FPSEDiscriminator
from .checkpoint import CheckpointError, State, load_state, mismatch, read_checkpoint
from .discriminator import MultiscaleDiscriminator
from .encoder import GroupDNetEncoder
from .groupdnet import GroupDNetGenerator
from .labels import semantics
from .pix2pixhd import FeatureEncoder, Pix2pixHDDiscriminator, pix2pixhd_generator
from .presets import (
    ADE20K,
    CCFPSE_ADE20K,
    CCFPSE_CITYSCAPES,
    CCFPSE_COCO,
    CITYSCAPES,
    DEEPFASHION,
    PIX2PIXHD_CITYSCAPES,
    PIX2PIXHD_CITYSCAPES_1024,
    PIX2PIXHD_CITYSCAPES_FEATURES,
    SPADE_ADE20K,
    SPADE_CITYSCAPES,
    SPADE_COCO,
    SPADE_COCO_VAE,
    CCFPSEPreset,
    GroupDNetPreset,
    Pix2pixHDPreset,
    Preset,
    SPADEPreset,
    with_options,
)
from .spade import SPADEEncoder, SPADEGenerator

PARTS = ("generator", "encoder", "discriminator")
_OFFICIAL_FILES = dict(zip(PARTS, ("latest_net_G.pth", "latest_net_E.pth", "latest_net_D.pth"),
                           strict=True))


def _discriminator(preset: Preset) -> MultiscaleDiscriminator:
    return MultiscaleDiscriminator(
        preset.semantic_channels + 3, preset.ndf, layers=preset.discriminator_layers,
        scales=preset.discriminator_scales,
    )


_FAMILIES: dict[type[Preset], dict[str, Callable[[Any], nn.Module]]] = {
    GroupDNetPreset: {
        "generator": GroupDNetGenerator, "encoder": GroupDNetEncoder,
        "discriminator": _discriminator,
    },
    SPADEPreset: {
        "generator": SPADEGenerator, "encoder": SPADEEncoder, "discriminator": _discriminator,
    },
    CCFPSEPreset: {
        "generator": CCFPSEGenerator, "encoder": SPADEEncoder, "discriminator": FPSEDiscriminator,
    },
    Pix2pixHDPreset: {
        "generator": pix2pixhd_generator, "encoder": FeatureEncoder,
        "discriminator": Pix2pixHDDiscriminator,
    },
}


def network_parts(preset: Preset) -> dict[str, Callable[[Any], nn.Module]]:
    """What makes each network of a model of ``preset`` from the preset."""
    return {
        part: make for part, make in _FAMILIES[type(preset)].items()
        if part != "encoder" or preset.has_encoder
    }


@dataclass(frozen=True)
class _Entry:
    description: str
    preset: Preset


_MODELS = {
    "groupdnet_deepfashion": _Entry(
        "GroupDNet for DeepFashion: 8 classes, 256x256", DEEPFASHION
    ),
    "groupdnet_cityscapes": _Entry(
        "GroupDNet for Cityscapes: 35 classes and instance edges, 256x512", CITYSCAPES
    ),
    "groupdnet_ade20k": _Entry("GroupDNet for ADE20K: 151 classes, 256x256", ADE20K),
    "spade_coco": _Entry("SPADE for COCO-Stuff: 183 classes and instance edges, 256x256",
                         SPADE_COCO),
    "spade_ade20k": _Entry("SPADE for ADE20K: 151 classes, 256x256", SPADE_ADE20K),
    "spade_cityscapes": _Entry(
        "SPADE for Cityscapes: 35 classes and instance edges, 256x512", SPADE_CITYSCAPES
    ),
    "spade_coco_vae": _Entry(
        "SPADE for COCO-Stuff with a latent code and its image encoder, 256x256", SPADE_COCO_VAE
    ),
    "ccfpse_coco": _Entry(
        "CC-FPSE for COCO-Stuff: 183 classes and instance edges, 256x256", CCFPSE_COCO
    ),
    "ccfpse_ade20k": _Entry("CC-FPSE for ADE20K: 151 classes, 256x256", CCFPSE_ADE20K),
    "ccfpse_cityscapes": _Entry(
        "CC-FPSE for Cityscapes: 35 classes and instance edges, 256x512", CCFPSE_CITYSCAPES
    ),
    "pix2pixhd_cityscapes": _Entry(
        "pix2pixHD for Cityscapes, global generator: 35 classes and instance edges, 512x1024",
        PIX2PIXHD_CITYSCAPES,
    ),
    "pix2pixhd_cityscapes_features": _Entry(
        "pix2pixHD for Cityscapes, global generator with instance features, 512x1024",
        PIX2PIXHD_CITYSCAPES_FEATURES,
    ),
    "pix2pixhd_cityscapes_1024": _Entry(
        "pix2pixHD for Cityscapes, local enhancer around the global generator, 1024x2048",
        PIX2PIXHD_CITYSCAPES_1024,
    ),
}


class SynthesisModel(nn.Module):
    """A model of the zoo: ``generator``, ``encoder``, ``discriminator`` and their ``preset``.

    A part that a checkpoint does not hold, or that the model has not, is not built: using it
    raises one line.

    Example:
        >>> model = create_model("groupdnet_deepfashion").eval()
        >>> image = model(model.semantics(labels))
    """

    def __init__(self, name: str, preset: Preset, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.name, self.preset = name, preset
        for part, module in parts.items():
            self.add_module(part, module)

    def __getattr__(self, name: str) -> Any:
        if name in PARTS and name not in self._modules:
            if name not in network_parts(self.preset):
                raise AttributeError(f"{name}: a {self.name} has none with these options")
            raise AttributeError(
                f"{name}: this {self.name} was made from a checkpoint without it; pass one that "
                f"holds it, or create_model({self.name!r}, part={name!r})"
            )
        return super().__getattr__(name)

    def semantics(self, labels: Tensor, instances: Tensor | None = None,
                  source: str | Path | None = None) -> Tensor:
        """One-hot (and edge) planes of a label map, on the generator's device in its dtype."""
        weight = next(self.generator.parameters())
        planes = semantics(labels, self.preset, instances, dtype=weight.dtype, source=source)
        return planes.to(weight.device)

    def forward(self, semantics: Tensor | LabelLayout, z: Tensor | None = None) -> Tensor:
        """The generator's image; ``z``, if it takes one, is drawn from N(0, 1) where not given."""
        if z is None:
            z = self.generator.sample_latent(semantics.shape[0])
        return self.generator(semantics, z)


@dataclass(frozen=True)
class ModelInfo:
    """One row of :func:`list_models`: name, description, parameters of each part."""

    name: str
    description: str
    parameters: dict[str, int]


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(_MODELS)}; got {name!r}")
    return _MODELS[name]


@cache
def _published(name: str, part: str) -> nn.Module:
    """A part with published options and no memory behind it."""
    entry = _entry(name)
    with torch.device("meta"):
        return network_parts(entry.preset)[part](entry.preset)


def list_models() -> list[ModelInfo]:
    """The models that :func:`create_model` knows, with their published sizes.

    Example:
        >>> [info.name for info in list_models()]
        ['groupdnet_deepfashion', 'groupdnet_cityscapes', 'groupdnet_ade20k', 'spade_coco', ...]
    """
    return [
        ModelInfo(name, entry.description, {
            part: sum(p.numel() for p in _published(name, part).parameters())
            for part in network_parts(entry.preset)
        })
        for name, entry in _MODELS.items()
    ]


def _fitting_model(state: Mapping[str, Tensor]) -> str | None:
    """``"<name>, part <part>"`` of the listed model that ``state`` belongs to."""
    for name, entry in _MODELS.items():
        for part in network_parts(entry.preset):
            if not mismatch(_published(name, part), state):
                return f"{name}, part {part}"
    return None


def _states_by_part(path: Path, modules: Mapping[str, nn.Module]) -> dict[str, State]:
    """Which part's state each file, or each prefix of one file, holds."""
    if path.is_dir():
        files = {part: path / _OFFICIAL_FILES[part] for part in modules}
        found = {part: read_checkpoint(file) for part, file in files.items() if file.exists()}
        if not found:
            names = ", ".join(file.name for file in files.values())
            raise CheckpointError(f"checkpoint: expected one of {names} in {path}, found none")
        return found
    state = read_checkpoint(path)
    if all(key.partition(".")[0] in PARTS for key in state):
        held = {key.partition(".")[0] for key in state}
        if not held & set(modules):
            raise CheckpointError(
                f"checkpoint: expected the {', '.join(modules)} in {path}, got the "
                f"{', '.join(sorted(held))}"
            )
        return {
            part: {k.removeprefix(part + "."): v for k, v in state.items()
                   if k.startswith(part + ".")}
            for part in modules if part in held
        }
    # One bare part: the one whose keys it shares most, so that an error speaks of that one.
    part = max(modules, key=lambda part: len(modules[part].state_dict().keys() & state.keys()))
    return {part: state}


def create_model(name: str, checkpoint: str | Path | None = None, *, part: str | None = None,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 seed: int = 0, init_gain: float = 0.02, **options: Any) -> Any:
    """A model of the zoo by name, with published options, random or loaded.

    Args:
        name: one of :func:`list_models`.
        checkpoint: None for random weights; an official ``.pth`` file of one part, a
            ``.safetensors`` file of one or all parts, or a folder with ``latest_net_G.pth`` (and
            ``_E``, ``_D``). Loaded strictly; parts it lacks are not built.
        part: "generator", "encoder" or "discriminator" for that network alone.
        device, dtype: of the parameters; "meta" for shapes alone.
        seed, init_gain: of the random weights (xavier normal, published gain 0.02).
        options: fields of the preset to replace, such as ``ngf`` or ``image_size``.

    Returns:
        A :class:`SynthesisModel`, or with ``part`` that network; in training mode, as torch's own.

    Raises:
        ValueError: an unknown name or part, or an option that does not fit.
        TypeError: an unknown option.
        CheckpointError: the file cannot be read or is of another model.

    Example:
        >>> model = create_model("groupdnet_deepfashion", ngf=16, nef=32).eval()
        >>> generator = create_model("groupdnet_ade20k", "latest_net_G.pth", part="generator")
    """
    entry = _entry(name)
    preset = with_options(entry.preset, options, name)
    makers = network_parts(preset)
    if part is not None and part not in makers:
        raise ValueError(f"part: expected one of {', '.join(makers)}; got {part!r}")
    wanted = tuple(makers) if part is None else (part,)
    with torch.device("meta"):  # no memory is filled before it is known with what
        modules = {p: makers[p](preset) for p in wanted}
    if checkpoint is None:
        for module in modules.values():
            module.to_empty(device=device)
            if torch.device(device).type != "meta":
                init_weights(module, seed=seed, gain=init_gain)
    else:
        path = Path(checkpoint)
        states = _states_by_part(path, modules)
        modules = {p: modules[p] for p in states}
        for p, module in modules.items():
            load_state(module, states[p], source=path, model=f"{name}, part {p}",
                       fits=_fitting_model)
    for module in modules.values():
        module.to(device=device, dtype=dtype)
    return modules[part] if part is not None else SynthesisModel(name, preset, modules)
