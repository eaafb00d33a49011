"""A model's configuration inside its checkpoint: which model of the zoo, with which options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
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

    def to_metadata(self) -> dict[str, str]:
        """What a safetensors file keeps: text."""
        content = {"model": self.model, "preset": asdict(self.preset)}
        return {"format": "pt", KEY: json.dumps(content)}

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
