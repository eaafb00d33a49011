"""Launch settings and rates measured on a GPU model: one JSON file each, read once.

``python -m benchmarks.gpu --only tune`` measures them and writes ``smis_kernels/tuned/<gpu>.json``;
``SMIS_TUNED`` names another file, or "none". Where nothing was measured the launchers' own
settings hold.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent / "tuned"
ENVIRONMENT = "SMIS_TUNED"
Setting = dict[str, int]

_trials: dict[str, Any] = {}


def file_name(gpu: str) -> str:
    """The file of a GPU model: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def read_table(path: Path) -> dict[str, Any]:
    """The content of a settings file.

    Raises:
        ValueError: it is no such file.
    """
    try:
        table = json.loads(path.read_text())
        if not isinstance(table["settings"], dict):
            raise TypeError("settings is no object")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected settings written by python -m benchmarks.gpu --only tune "
            f"({error!r}); remove it, or set {ENVIRONMENT}=none"
        ) from None
    return dict(table)


@cache
def _table(device: torch.device) -> dict[str, Any]:
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted == "none" or (device.type != "cuda" and not wanted):
        return {}
    if wanted:
        return read_table(Path(wanted))
    path = FOLDER / file_name(torch.cuda.get_device_name(device))
    return read_table(path) if path.exists() else {}


def forget() -> None:
    """Read the files again: a new one was written."""
    _table.cache_clear()


def setting(kernel: str, key: str, default: Setting, device: torch.device) -> Setting:
    """How to launch ``kernel`` for inputs of the kind ``key``: as measured, else ``default``."""
    if kernel in _trials:
        return {**default, **_trials[kernel]}
    found = _table(device).get("settings", {}).get(kernel, {}).get(key)
    return default if found is None else {**default, **found}


def measured(name: str, device: torch.device) -> Any:
    """Another measurement of this GPU ("rates", "convs"), None where there is none."""
    return _trials[name] if name in _trials else _table(device).get(name)


@contextmanager
def trial(name: str, value: Any) -> Iterator[None]:
    """Launch a kernel with these settings inside the block, whatever was measured."""
    before = dict(_trials)
    _trials[name] = value
    try:
        yield
    finally:
        _trials.clear()
        _trials.update(before)
