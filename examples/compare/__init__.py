"""The paper's comparison, rerun at small size on generated scenes, on the same time for each."""

from .report import found_order, markdown, table
from .run import Settings, compare, measure, train
from .systems import SYSTEMS, small_config, small_preset

__all__ = ["SYSTEMS", "Settings", "compare", "found_order", "markdown", "measure", "small_config",
           "small_preset", "table", "train"]
