"""The public names of both packages: what is added or taken away shows here."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import pytest

import smis_kernels
import smis_models
import smis_models.data
import smis_models.metrics
import smis_models.training
from smis_models.io import old_names
from smis_models.networks.preset import Preset
from smis_models.synthesis.scene import Scene

KERNELS = """
BackendError CGNorm ClassCrops ConditionalConv2d ConditionalNorm2d Explanation InstanceAvgPool2d
InstanceEdges InstanceMeans InstanceNormAct2d LabelLayout MultiSPADE Report SPADE
SpatiallyVaryingConv2d WinogradConv2d WinogradConvTranspose2d accelerate adain class_boxes
class_crops conditional_attention conditional_conv2d explain indexed_modulation
indexed_modulation_pair
instance_avg_pool2d instance_edges instance_mean_table layout_scope modulate_pair modulation
modulation_pair narrow_conv2d norm_act number_vectors number_windows polyphase_conv2d
polyphase_conv_transpose2d restore share_layouts
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


@pytest.mark.parametrize("old", old_names.MOVED)
def test_modules_of_0_1_import_by_their_old_names(old: str) -> None:
    module = importlib.import_module(f"smis_models.{old}")
    with pytest.raises(AttributeError, match=r"'nothing_of_it': .* in smis_models\..* since 0\.2"):
        _ = module.nothing_of_it
    with pytest.raises(ImportError):
        importlib.import_module(f"smis_models.{old}.nothing_of_it")


def test_an_old_name_says_where_it_stands_now() -> None:
    module = importlib.import_module("smis_models.presets")
    now = r"smis_models\.presets\.Preset is smis_models\.networks\.preset\.Preset since 0\.2"
    with pytest.warns(DeprecationWarning, match=now) as caught:
        assert module.Preset is Preset
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"smis_models\.synthesis\.scene\.Scene") as caught:
        from smis_models.synthesis import Layout
    assert Layout is Scene
    assert caught[0].filename == __file__


# Written down from 0.1, not derived: what its users imported.
OF_0_1 = """
animation.write_animation applications.Frame applications.mix applications.edit applications.morph
applications.resample applications.exchange applications.encode bicyclegan.UNetGenerator
blocks.SPADEResBlock ccfpse.CCFPSEGenerator ccfpse.FPSEDiscriminator checkpoint.CheckpointError
checkpoint.read_checkpoint checkpoint.read_metadata checkpoint.save_checkpoint
configuration.Configuration demo.Demo discriminator.MultiscaleDiscriminator
discriminator.PatchDiscriminator edits.painted edits.relabelled encoder.GroupDNetEncoder
encoder.StridedEncoder encoder.reparameterize features.FeatureClusters features.encode_features
generator.UpwardGenerator graphs.GraphedGenerator groupdnet.GroupDNetGenerator images.ImageError
images.grid images.read_instances images.read_labels images.read_picture images.resize_nearest
images.scene_name images.write_indices images.write_png labels.one_hot labels.prepare_labels
labels.semantics losses.feature_matching_loss losses.gan_loss losses.kl_loss
memory.reuse_freed_memory perceptual.PerceptualLoss perceptual.load_perceptual_loss
pictures.read_pictures pix2pixhd.GlobalGenerator pix2pixhd.LocalEnhancer presets.ADE20K
presets.BICYCLEGAN presets.CCFPSE_COCO presets.CITYSCAPES presets.DEEPFASHION presets.DSCGAN
presets.GROUPDEC presets.GroupDNetPreset presets.LatentPreset presets.PIX2PIXHD_CITYSCAPES_1024
presets.Preset presets.SCENES presets.SPADE_COCO presets.SPADE_COCO_VAE presets.VSPADE
presets.with_options registry.SynthesisModel registry.create_model scenes.KINDS scenes.MODES
scenes.paint scenes.palette scenes.sample_scene shapes.ShapeLibrary shapes.exchange_shape
shipped.shipped_weights spade.SPADEEncoder spade.SPADEGenerator synthesis.Layout
synthesis.calibrate synthesis.draw_code synthesis.draw_input synthesis.map_files
synthesis.read_clusters synthesis.read_layouts synthesis.read_photographs
synthesis.resample_class synthesis.sample_layouts synthesis.semantics synthesizer.Synthesizer
synthesizer.frozen_copy zoo.MODELS zoo.ModelInfo
"""


@pytest.mark.parametrize("old", OF_0_1.split())
@pytest.mark.filterwarnings("ignore:smis_models:DeprecationWarning")
def test_names_of_0_1(old: str) -> None:
    module, name = old.split(".")
    assert getattr(importlib.import_module(f"smis_models.{module}"), name) is not None


def test_a_star_takes_what_a_moved_module_held() -> None:
    module = importlib.import_module("smis_models.losses")
    assert {"gan_loss", "kl_loss"} <= {*module.__all__}


@pytest.mark.parametrize(("old", "now"), [
    ("images.Picture", "io.images.Picture"), ("legacy.State", "io.state_dict_keys.State"),
    ("demo.Step", "app.demo.Step"),
])
def test_an_alias_is_of_the_module_that_gives_it(old: str, now: str) -> None:
    module, name = old.split(".")
    with pytest.warns(DeprecationWarning, match=rf"is smis_models\.{re.escape(now)} since 0\.2"):
        getattr(importlib.import_module(f"smis_models.{module}"), name)
