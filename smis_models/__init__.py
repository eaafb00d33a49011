"""Semantic image synthesis models on the kernels of ``smis_kernels``."""

from .checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from .encoder import reparameterize
from .registry import ModelInfo, SynthesisModel, create_model, list_models
from .shipped import shipped_weights
from .synthesizer import Synthesizer, frozen_copy

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
