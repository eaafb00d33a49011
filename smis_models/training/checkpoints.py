"""Training state on disk: written whole or not at all, read without running code in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..io.checkpoint import CheckpointError
from ..io.files import replacing
from .config import TrainConfig
from .options import to_dict

STATE, WEIGHTS, CONFIG = "checkpoint.pt", "model.safetensors", "config.json"
_FORMAT = 1
# What may differ between a run and its continuation: anything that no saved tensor depends on.
_FREE = ("data", "schedule", "log", "losses", "optimizer", "init", "precision")


def save_state(folder: Path, state: dict[str, Any], config: TrainConfig) -> Path:
    """Write ``folder/checkpoint.pt``; on any error the earlier one stays.

    Raises:
        CheckpointError: a full disk, a folder that cannot be written.
    """
    path = folder / STATE
    try:
        with replacing(path, sync=True) as partial, partial.open("wb") as file:
            torch.save({"format": _FORMAT, "config": to_dict(config), **state}, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps what the file raises
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        kept = "the earlier one is kept" if path.exists() else "there is none yet"
        raise CheckpointError(f"checkpoint: {path} cannot be written: {reason}; {kept}") from error
    return path


def load_state(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The state in ``folder``, of a run with the same model, network and seed.

    Raises:
        CheckpointError: none there, damaged, or of another model or seed: the options that differ.
    """
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"resume: no {STATE} in {folder}; train without --resume first")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parser raises many kinds on damaged bytes
        raise CheckpointError(f"resume: {path} cannot be read "
                              f"({str(error).partition(chr(10))[0][:100]})") from error
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"resume: {path} is no training state of this version")
    then, now = state["config"], to_dict(config)
    for key in now:
        if key not in _FREE and then.get(key) != now[key]:
            inner = [f"{key}.{k}" for k in now[key] if then[key].get(k) != now[key][k]] if (
                isinstance(now[key], dict) and isinstance(then.get(key), dict)) else [key]
            raise CheckpointError(
                f"resume: {', '.join(inner)} differ from those of the run in {folder}; give the "
                "options that it was started with, or another --out"
            )
    if (now["optimizer"]["ema"] > 0) != (state["average"] is not None):
        raise CheckpointError(f"resume: optimizer.ema was {then['optimizer']['ema']} in {folder}; "
                              "a moving average cannot begin or end midway")
    return state
