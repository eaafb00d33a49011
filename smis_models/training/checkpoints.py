"""Training state on disk: written whole or not at all, read without running code in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..io.checkpoint import CheckpointError
from ..io.files import replacing
from .config import TrainConfig
from .options import from_dict, to_dict

STATE, WEIGHTS, CONFIG = "checkpoint.pt", "model.safetensors", "config.json"
RECORD, LOSSES, BEST = "record.json", "losses.csv", "best.safetensors"
KEPT = "kept"
RUN_FILES = (STATE, WEIGHTS, CONFIG, RECORD, LOSSES, BEST)
TRAINING = "smis_training"  # of the weights' metadata
_FORMAT = 2
# What may differ between a run and its continuation: anything that no saved tensor depends on.
_FREE = ("data", "schedule", "log", "losses", "optimizer", "init", "precision")
_FIXED = ("schedule.freeze_global_epochs",)  # of those all the same: the optimizer follows it


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


def read_state(folder: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The state in ``folder``; ``mapped``: its tensors stay in the file until they are read.

    Raises:
        CheckpointError: none there, damaged, or of another version.
    """
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"resume: no {STATE} in {folder}; train without --resume first, or "
                              "with --resume auto")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True,
                                           mmap=mapped)
    except Exception as error:  # the parser raises many kinds on damaged bytes
        kept = f"; {folder / KEPT} has earlier ones, copy one over it" if any(
            (folder / KEPT).glob("*.pt")) else ""
        raise CheckpointError(f"resume: {path} cannot be read "
                              f"({str(error).partition(chr(10))[0][:100]}){kept}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"resume: {path} is no training state of this version")
    return state


def differences(then: Mapping[str, Any], now: Mapping[str, Any],
                prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Option -> (then, now), where two configurations of plain types differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in now:
        was, value = then.get(key), now[key]
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            found |= differences(was, value, f"{prefix}{key}.")
        elif was != value:
            found[prefix + key] = was, value
    return found


def load_state(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The state in ``folder``, of a run with the same model, network and seed.

    Raises:
        CheckpointError: none there, damaged, or of another model or seed: the options that differ.
    """
    state = read_state(folder)
    then, now = state["config"], to_dict(config)
    fixed = [name for name in differences(then, now)
             if name.partition(".")[0] not in _FREE or name in _FIXED]
    if fixed:
        raise CheckpointError(
            f"resume: {', '.join(fixed)} differ from those of the run in {folder}; give the "
            "options that it was started with, or another --out"
        )
    if (now["optimizer"]["ema"] > 0) != (state["average"] is not None):
        raise CheckpointError(f"resume: optimizer.ema was {then['optimizer']['ema']} in {folder}; "
                              "a moving average cannot begin or end midway")
    return state


def continued(folder: Path, arguments: Sequence[str] = ()) -> TrainConfig:
    """The configuration that the run in ``folder`` goes on with: its own, changed by ``arguments``.

    Raises:
        CheckpointError: no state there, or it cannot be read.
        ValueError: as :func:`smis_models.training.from_dict`.

    Example:
        >>> config = continued(Path("run"), ["--data.batch", "4"])  # doctest: +SKIP
        >>> outcome = train(config, "run", resume=True)  # doctest: +SKIP
    """
    return from_dict(read_state(folder, mapped=True)["config"], arguments)


def keep(folder: Path, step: int, epoch: int | None, last: int) -> None:
    """Let the state and the weights of now stay in ``folder/kept``.

    Args:
        folder: of the run.
        step: of the state.
        epoch: that the state ends, of one that stays for good; None of others.
        last: how many of the others stay; 1: checkpoint.pt alone.
    """
    kept = folder / KEPT
    names = [f"step_{step:07d}"] if last > 1 else []
    names += [] if epoch is None else [f"epoch_{epoch:04d}"]
    if names:
        kept.mkdir(exist_ok=True)
    for name in names:
        for source in (folder / STATE, folder / WEIGHTS):
            with replacing(kept / (name + source.suffix)) as partial:
                shutil.copyfile(source, partial)  # no link: people copy one over the state
    states = {int(number): path for path in kept.glob("step_*.pt")
              if (number := path.stem.removeprefix("step_")).isdecimal()}  # others are a user's
    ahead = [at for at in states if at > step]  # of a course that was left for an earlier state
    course = sorted(states.keys() - ahead)
    for at in [*ahead, *course[: None if last == 1 else -last]]:
        states[at].unlink()
        states[at].with_suffix(Path(WEIGHTS).suffix).unlink(missing_ok=True)
