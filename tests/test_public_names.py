"""The public names of both packages: what is added or taken away shows here."""

from __future__ import annotations

from types import ModuleType

import pytest

import smis_kernels
import smis_models
import smis_models.data
import smis_models.metrics
import smis_models.training

KERNELS = """
BackendError CGNorm ClassCrops ConditionalConv2d ConditionalNorm2d Explanation InstanceAvgPool2d
InstanceEdges InstanceMeans InstanceNormAct2d LabelLayout MultiSPADE Report SPADE
SpatiallyVaryingConv2d WinogradConv2d accelerate adain class_boxes class_crops
conditional_attention conditional_conv2d explain indexed_modulation indexed_modulation_pair
instance_avg_pool2d instance_edges instance_mean_table layout_scope modulate_pair modulation
modulation_pair norm_act number_vectors number_windows restore share_layouts
spatially_varying_conv2d spectral_norm spectral_weight use_backend use_path window_embedding
window_table winograd_conv2d
"""
MODELS = """
CheckpointError ModelInfo SynthesisModel Synthesizer create_model frozen_copy list_models
read_checkpoint reparameterize save_checkpoint shipped_weights
"""
DATA = """
Batch Collate DATASETS Draw FileScenes GeneratedScenes Preprocess Reading Sample SceneClassifier
SceneDataset build_dataset detect_layout list_scenes modulation_sizes published_preprocess
write_scenes
"""
METRICS = """
DISTANCES Distance Diversity DiversityProtocol FeatureStatistics FileSegmenter Inception Judges
LPIPS LabelRule LayoutSampler Metrics PROTOCOLS PixelDistance Protocol Scenes SegmentationScore
create_distance diversities diversity evaluate fid frechet_distance label_rule protocol
protocol_title scene_labels
"""
TRAINING = """
DataConfig LogConfig LossConfig NonFiniteLoss OptimizerConfig Outcome Progress RECIPES Run
ScheduleConfig TrainConfig Trainer continued from_dict load_config recipe to_json train
"""


@pytest.mark.parametrize(("package", "names"), [
    (smis_kernels, KERNELS), (smis_models, MODELS), (smis_models.data, DATA),
    (smis_models.metrics, METRICS), (smis_models.training, TRAINING),
], ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "")
def test_public_names(package: ModuleType, names: str) -> None:
    assert sorted(package.__all__) == sorted(names.split())
    for name in names.split():
        assert getattr(package, name) is not None
