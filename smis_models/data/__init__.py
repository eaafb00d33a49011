"""Data sets: samples are plain dicts (:class:`Sample`), batches carry their compiled labels.

``build_dataset(name, root, preset, split)`` makes any of them; ``Collate(preset)`` is the
``collate_fn``; keys are an index or ``Draw(index, epoch)``. ``SceneClassifier.shipped()`` reads
classes and appearance modes off pictures of the generated scenes.
"""

from .build import DATASETS, build_dataset, published_preprocess
from .collate import Batch, Collate, modulation_sizes
from .files import FileScenes
from .generated import GeneratedScenes
from .listing import detect_layout, list_scenes
from .preprocess import Preprocess
from .sample import Draw, Sample, SceneDataset
from .scene_classifier import Reading, SceneClassifier
from .write import write_scenes

__all__ = [
    "DATASETS",
    "Batch",
    "Collate",
    "Draw",
    "FileScenes",
    "GeneratedScenes",
    "Preprocess",
    "Reading",
    "Sample",
    "SceneClassifier",
    "SceneDataset",
    "build_dataset",
    "detect_layout",
    "list_scenes",
    "modulation_sizes",
    "published_preprocess",
    "write_scenes",
]
