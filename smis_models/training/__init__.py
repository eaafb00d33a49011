"""Training: one loop for all models, with configurations, checkpoints and logs."""

from .checkpoints import continued
from .config import DataConfig, LogConfig, LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from .options import RECIPES, from_dict, load_config, recipe, to_json
from .run import Outcome, Progress, Run, train
from .trainer import NonFiniteLoss, Trainer

__all__ = [
    "RECIPES",
    "DataConfig",
    "LogConfig",
    "LossConfig",
    "NonFiniteLoss",
    "OptimizerConfig",
    "Outcome",
    "Progress",
    "Run",
    "ScheduleConfig",
    "TrainConfig",
    "Trainer",
    "continued",
    "from_dict",
    "load_config",
    "recipe",
    "to_json",
    "train",
]
