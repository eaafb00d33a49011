"""Semantic image synthesis models on the kernels of ``smis_kernels``."""

from .checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from .encoder import reparameterize
from .registry import ModelInfo, SynthesisModel, create_model, list_models

__all__ = [
    "CheckpointError",
    "ModelInfo",
    "SynthesisModel",
    "create_model",
    "list_models",
    "read_checkpoint",
    "reparameterize",
    "save_checkpoint",
]
