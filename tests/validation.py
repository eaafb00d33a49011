"""Agreement with independent sources: asserted in every run, tabulated by tools.tasks validate."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch

FILE = os.environ.get("SMIS_VALIDATION")


def _numbers(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def agree(what: str, source: str, found: Any, expected: Any, *, rtol: float = 0.0,
          atol: float = 0.0) -> None:
    """Assert that ``found`` is what ``source`` gives; note the largest difference.

    Args:
        what: the quantity, as docs/validation.md names it.
        source: the independent program or formula, with its version.
        rtol, atol: as in :func:`numpy.testing.assert_allclose`; both 0 for equality.
    """
    ours, theirs = _numbers(found), _numbers(expected)
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
    if FILE is None:
        return
    scale = float(np.abs(theirs).max(initial=0)) or 1.0
    difference = float(np.abs(ours - theirs).max(initial=0)) / scale
    with open(FILE, "a") as lines:
        lines.write(json.dumps([what, source, difference, ours.size]) + "\n")
