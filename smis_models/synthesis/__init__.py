"""From label maps to pictures: many of one layout, edits, applications."""

import sys
from typing import Any

from ..io.old_names import SYNTHESIS, old_name


def __getattr__(name: str) -> Any:
    return old_name(sys.modules[__name__], SYNTHESIS, name)
