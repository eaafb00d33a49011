"""Data sets: samples are plain dicts (:class:`Sample`), batches carry their compiled labels.

``build_dataset(name, root, preset, split)`` makes any of them; ``Collate(preset)`` is the
``collate_fn``; keys are an index or ``Draw(index, epoch)``.
"""

from .collate import Batch, Collate, modulation_sizes
from .generated import GeneratedScenes
from .sample import Draw, Sample, SceneDataset

__all__ = [
    "Batch",
    "Collate",
    "Draw",
    "GeneratedScenes",
    "Sample",
    "SceneDataset",
    "modulation_sizes",
]
