"""A model of the zoo, made by name or from a checkpoint that holds its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smis_kernels import LabelLayout

from ..io.checkpoint import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    holds_text,
    load_state,
    mismatch,
    read_checkpoint,
    read_metadata,
)
from ..io.state_dict_keys import State, networks_keys
from ..networks.blocks import init_weights
from ..networks.preset import Preset, with_options
from ..networks.semantics import semantics
from .hub import HubModel
from .registry import MODELS, PARTS, entry, network_parts, published

_OFFICIAL_FILES = dict(zip(PARTS, ("latest_net_G.pth", "latest_net_E.pth", "latest_net_D.pth"),
                           strict=True))

KEY = "smis_models"  # of the safetensors file's metadata
_SHIPPED = Path(__file__).parent / "weights"


def checkpoint_file(checkpoint: str | Path) -> Path:
    """The file or folder that a checkpoint's path stands for: of a training run's folder its
    latest weights.

    Example:
        >>> checkpoint_file("latest_net_G.pth").name
        'latest_net_G.pth'
    """
    path = Path(checkpoint)
    weights = path / WEIGHTS
    return weights if weights.is_file() else path


def shipped_weights(name: str) -> Path | None:
    """The file with the shipped weights of a model of the zoo; None where none ship.

    Example:
        >>> model = create_model(checkpoint=shipped_weights("groupdnet_scenes")).eval()
    """
    path = _SHIPPED / f"{name}.safetensors"
    return path if path.is_file() else None


@dataclass(frozen=True)
class Configuration:
    """A model's name and the options that it was made with."""

    model: str
    preset: Preset

    def content(self) -> dict[str, Any]:
        """Plain values."""
        return {"model": self.model, "preset": asdict(self.preset)}

    def difference(self, other: Configuration) -> str:
        """Where the two differ first, in words: of this one what the other does not say."""
        if self.model != other.model:
            return f"another model ({self.model}, not {other.model})"
        mine, theirs = asdict(self.preset), asdict(other.preset)
        name = next(key for key in mine if mine[key] != theirs[key])
        return f"another {name} ({mine[name]!r}, not {theirs[name]!r})"

    @classmethod
    def from_file(cls, path: Path) -> Configuration | None:
        """The content of a config.json; None for one of a training run, whose weights tell it.

        Raises:
            CheckpointError: it is of no model of this package.
        """
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint: {path} is no JSON: {error}; save the model again"
                                  ) from error
        if isinstance(content, dict) and "network" in content and "preset" not in content:
            return None
        if not isinstance(content, dict) or not {"model", "preset"} <= set(content):
            raise CheckpointError(f"checkpoint: {path} is of no model of this package: expected "
                                  "'model' and 'preset' in it; save_pretrained writes such")
        return cls.from_metadata({KEY: text}, path)

    def to_metadata(self) -> dict[str, str]:
        """What a safetensors file keeps: text."""
        return {"format": "pt", KEY: json.dumps(self.content())}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: object) -> Configuration | None:
        """The inverse of :meth:`to_metadata`; None for a file without one.

        Raises:
            CheckpointError: a model or an option that this version does not know.
        """
        if KEY not in metadata:
            return None
        try:
            content = json.loads(metadata[KEY])
            model, options = str(content["model"]), dict(content["preset"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint: the configuration in {source} is damaged ({error!r}); convert the "
                "original file again"
            ) from error
        if model not in MODELS:
            raise CheckpointError(
                f"checkpoint: {source} is of the model {model!r}, which this version does not "
                f"have; it has {', '.join(MODELS)}"
            )
        return cls(model, _preset(type(MODELS[model].preset), options, source))


def _preset(kind: type[Preset], options: dict[str, Any], source: object) -> Preset:
    known = {field.name for field in fields(kind)}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise CheckpointError(
            f"checkpoint: {source} has the option {unknown[0]!r}, which this version does not "
            f"know; it knows {', '.join(sorted(known))}"
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: the options in {source} do not fit: {error}") from error


class SynthesisModel(HubModel):
    """A model of the zoo: ``generator``, ``encoder``, ``discriminator`` and their ``preset``.

    A part that a checkpoint does not hold, or that the model has not, is not built: using it
    raises one line.

    Example:
        >>> model = create_model("groupdnet_scenes", ngf=8, nef=8).eval()
        >>> model(model.semantics(torch.zeros(1, 128, 128).long())).shape
        torch.Size([1, 3, 128, 128])
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

    @property
    def configuration(self) -> Configuration:
        """The name and the options, which :func:`save_checkpoint` writes with the weights."""
        return Configuration(self.name, self.preset)

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


def _fitting_model(state: Mapping[str, Tensor]) -> str | None:
    """``"<name>, part <part>"`` of the listed model that ``state`` belongs to."""
    for name, model in MODELS.items():
        for part in network_parts(model.preset):
            if not mismatch(published(name, part), state):
                return f"{name}, part {part}"
    return None


def _states_by_part(path: Path, modules: Mapping[str, nn.Module]) -> dict[str, State]:
    """Which part's state each file, or each prefix of one file, holds."""
    if path.is_dir():
        files = {part: path / _OFFICIAL_FILES[part] for part in modules}
        found = {part: read_checkpoint(file) for part, file in files.items() if file.exists()}
        if not found:
            names = ", ".join([WEIGHTS, *(file.name for file in files.values())])
            raise CheckpointError(f"checkpoint: expected one of {names} in {path}, found none")
        return found
    state = read_checkpoint(path)
    held = {key.partition(".")[0] for key in state}
    other = [key for key in state if key.partition(".")[0] not in PARTS]
    if held & set(PARTS) and len(other) < len(state) / 2:
        if other:
            raise CheckpointError(f"checkpoint: expected keys of {', '.join(PARTS)} in {path}, got "
                                  f"{', '.join(map(repr, other[:2]))} among {len(state)}; "
                                  "leave what is no weight out")
        if not held & set(modules):
            raise CheckpointError(
                f"checkpoint: expected the {', '.join(modules)} in {path}, got the "
                f"{', '.join(sorted(held))}"
            )
        return {
            part: networks_keys({k.removeprefix(part + "."): v for k, v in state.items()
                                 if k.startswith(part + ".")})
            for part in modules if part in held
        }
    # One bare part: the one whose keys it shares most, so that an error speaks of that one.
    part = max(modules, key=lambda part: len(modules[part].state_dict().keys() & state.keys()))
    return {part: state}


def stored_configuration(checkpoint: str | Path) -> Configuration | None:
    """The configuration inside a checkpoint; None for a file without one, or a folder.

    Example:
        >>> stored_configuration(shipped_weights("groupdnet_scenes")).preset.image_size
        (128, 128)
    """
    path, config = checkpoint_file(checkpoint), Path(checkpoint) / CONFIG
    written = Configuration.from_file(config) if config.is_file() else None
    if not holds_text(path):
        return written
    stored = Configuration.from_metadata(read_metadata(path), path)
    if stored is not None and written is not None and stored != written:
        raise CheckpointError(f"checkpoint: {config} says {written.difference(stored)} than "
                              f"{path}; save both together, by save_pretrained")
    return written or stored


def configured_preset(name: str | None, checkpoint: str | Path | None,
                      options: Mapping[str, Any]) -> tuple[str, Preset]:
    """The model's name and preset: published or, where a checkpoint holds its own, that."""
    stored = None if checkpoint is None else stored_configuration(checkpoint)
    if name is None:
        if stored is None:
            raise ValueError(
                "name: expected one of " + ", ".join(MODELS) + ", or a checkpoint that holds its "
                f"configuration (smis convert writes such); got None with {checkpoint}"
            )
        name = stored.model
    preset = entry(name).preset
    if stored is not None:
        if stored.model != name:
            raise CheckpointError(f"checkpoint: {checkpoint} is {stored.model}, not {name}")
        preset = stored.preset
    return name, with_options(preset, options, name)


def create_model(name: str | None = None, checkpoint: str | Path | None = None, *,
                 part: str | None = None, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, seed: int = 0, init_gain: float = 0.02,
                 **options: Any) -> Any:
    """A model of the zoo by name, with published options, random or loaded.

    Args:
        name: one of :func:`list_models`; None for what the checkpoint says that it is.
        checkpoint: None for random weights; an official ``.pth`` file of one part, a
            ``.safetensors`` file of one or all parts, the folder of a ``smis train`` run or of
            ``save_pretrained``, or one with ``latest_net_G.pth`` (and ``_E``, ``_D``). Loaded
            strictly; parts it lacks are not built. Options stored with the weights take the place
            of the published ones.
        part: "generator", "encoder" or "discriminator" for that network alone.
        device, dtype: of the parameters; "meta" for shapes alone.
        seed, init_gain: of the random weights (xavier normal, published gain 0.02; pix2pixHD's are
            N(0, 0.02²) as published, and take no gain).
        options: fields of the preset to replace, such as ``ngf`` or ``image_size``.

    Returns:
        A :class:`SynthesisModel`, or with ``part`` that network; in training mode, as torch's own.

    Raises:
        ValueError: an unknown name or part, or an option that does not fit.
        TypeError: an unknown option.
        CheckpointError: the file cannot be read or is of another model.

    Example:
        >>> from smis_models import create_model, save_checkpoint, shipped_weights
        >>> model = create_model("groupdnet_deepfashion", ngf=16, nef=32).eval()
        >>> _ = save_checkpoint(model, "mine.safetensors")
        >>> mine = create_model(checkpoint="mine.safetensors")
        >>> trained = create_model("groupdnet_scenes", shipped_weights("groupdnet_scenes"))
    """
    name, preset = configured_preset(name, checkpoint, options)
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
                init_weights(module, seed=seed, gain=init_gain, rule=preset.init_rule)
    else:
        path = checkpoint_file(checkpoint)
        states = _states_by_part(path, modules)
        modules = {p: modules[p] for p in states}
        for p, module in modules.items():
            load_state(module, states[p], source=path, model=f"{name}, part {p}",
                       fits=_fitting_model)
    for module in modules.values():
        module.to(device=device, dtype=dtype)
    return modules[part] if part is not None else SynthesisModel(name, preset, modules)
