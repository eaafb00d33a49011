"""How good and how varied pictures are: LPIPS, mCSD and mOCD, FID, mIoU; protocols by name."""

from ..io.hub import protocol_title
from .distance import Distance, PixelDistance
from .diversity import Diversity, diversities, diversity
from .evaluate import Metrics, Scenes, evaluate, scene_labels
from .fid import FeatureStatistics, Inception, fid, frechet_distance
from .lpips import DISTANCES, LPIPS, create_distance
from .protocols import PROTOCOLS, DiversityProtocol, Protocol, protocol
from .sampling import LayoutSampler
from .segmentation import FileSegmenter, LabelRule, SegmentationScore, label_rule

Judges = Metrics  # its name in 0.2

__all__ = [
    "DISTANCES",
    "LPIPS",
    "PROTOCOLS",
    "Distance",
    "Diversity",
    "DiversityProtocol",
    "FeatureStatistics",
    "FileSegmenter",
    "Inception",
    "Judges",
    "LabelRule",
    "LayoutSampler",
    "Metrics",
    "PixelDistance",
    "Protocol",
    "Scenes",
    "SegmentationScore",
    "create_distance",
    "diversities",
    "diversity",
    "evaluate",
    "fid",
    "frechet_distance",
    "label_rule",
    "protocol",
    "protocol_title",
    "scene_labels",
]
