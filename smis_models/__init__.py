"""Semantic image synthesis models on the kernels of ``smis_kernels``."""

from .families import ModelInfo, SynthesisModel, create_model, list_models, shipped_weights
from .io.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from .networks.encoder import reparameterize
from .synthesis.synthesizer import Synthesizer, frozen_copy

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
