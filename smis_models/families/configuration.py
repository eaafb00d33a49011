"""A model's configuration inside its checkpoint: which model of the zoo, with which options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..io.checkpoint import CheckpointError
from ..networks.preset import Preset
from .registry import MODELS

KEY = "smis_models"  # of the safetensors file's metadata


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
            text = path.read_text()
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
