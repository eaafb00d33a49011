"""Semantic image synthesis models on the kernels of ``smis_kernels``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .io import old_names

if TYPE_CHECKING:
    from .families import (
        ModelInfo,
        SynthesisModel,
        create_model,
        list_models,
        shipped_weights,
    )
    from .io.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
    from .networks.encoder import reparameterize
    from .synthesis.synthesizer import Synthesizer, frozen_copy

# Each is imported when it is asked for, so that `smis` can say what is not installed.
_HOMES = {
    "CheckpointError": ".io.checkpoint",
    "ModelInfo": ".families",
    "SynthesisModel": ".families",
    "Synthesizer": ".synthesis.synthesizer",
    "create_model": ".families",
    "frozen_copy": ".synthesis.synthesizer",
    "list_models": ".families",
    "read_checkpoint": ".io.checkpoint",
    "reparameterize": ".networks.encoder",
    "save_checkpoint": ".io.checkpoint",
    "shipped_weights": ".families",
}

__all__ = [
    "CheckpointError",
    "ModelInfo",
    "SynthesisModel",
    "Synthesizer",
    "create_model",
    "frozen_copy",
    "list_models",
    "read_checkpoint",
    "reparameterize",
    "save_checkpoint",
    "shipped_weights",
]
old_names.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
