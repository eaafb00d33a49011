"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of the models of the zoo."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..io import hub
from ..io.checkpoint import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    read_checkpoint,
    read_metadata,
    save_checkpoint,
)
from ..io.files import replacing
from .registry import entry

if TYPE_CHECKING:
    from .models import Configuration


class HubModel(nn.Module):
    """The methods that the hub's users know; the base of :class:`SynthesisModel`."""

    @property
    def configuration(self) -> Configuration:
        """The name and the options of the model."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, *, run: str | Path | None = None) -> None:
        """Write config.json, model.safetensors and a model card (README.md) into ``folder``.

        Args:
            folder: is made where it is missing. A card that somebody wrote or edited is kept.
            run: the folder of the ``smis train`` run that the weights come from: its recipe, and
                the JSON files of ``smis evaluate`` in it that are of these weights, go on the card.

        Raises:
            CheckpointError: the run has other weights, or the folder cannot be written.

        Example:
            >>> from smis_models import SynthesisModel, create_model
            >>> create_model("spade_ade20k", ngf=4, image_size=(64, 64)).save_pretrained("spade")
            >>> SynthesisModel.from_pretrained("spade").name
            'spade_ade20k'
        """
        folder = Path(folder)
        configuration = self.configuration
        content = {**configuration.content(), "dtype": _dtype(self)}
        card = self._card(None if run is None else Path(run))
        # What the run's weights say of their training goes along.
        notes = {} if run is None else {k: v for k, v in read_metadata(Path(run) / WEIGHTS).items()
                                        if k == "smis_training"}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self, folder / WEIGHTS, notes)
            _write(folder / CONFIG, json.dumps(content, indent=2) + "\n")
            if (folder / hub.CARD).exists() and hub.written_by_hand(folder / hub.CARD):
                warnings.warn(f"{folder / hub.CARD} was written by hand and is kept; it may speak "
                              "of other weights", stacklevel=2)
            else:
                _write(folder / hub.CARD, card)
        except OSError as error:
            raise CheckpointError(f"folder: {folder} cannot be written: {error.strerror}"
                                  ) from error

    @classmethod
    def from_pretrained(cls, folder_or_repository: str | Path, *, revision: str | None = None,
                        token: str | bool | None = None, cache_dir: str | Path | None = None,
                        force_download: bool = False, local_files_only: bool = False,
                        **options: Any) -> Any:
        """A model from a folder, or a repository of the Hugging Face hub, in eval mode.

        Args:
            folder_or_repository: what :meth:`save_pretrained` wrote, the folder of a ``smis
                train`` run, or OWNER/NAME, which needs huggingface_hub.
            revision, token, cache_dir, force_download, local_files_only: of the download, as
                huggingface_hub takes them.
            options: of :func:`create_model`; weights have the dtype that they were saved in.

        Raises:
            CheckpointError: no such folder or repository, a bad config.json, other weights than it
                says; one line.
            ModuleNotFoundError: a repository, and huggingface_hub is missing.
        """
        from .models import create_model

        asked = {"revision": revision, "token": token, "cache_dir": cache_dir,
                 "force_download": force_download, "local_files_only": local_files_only}
        # To the hub a token of False says that none is to be sent.
        given = {k: v for k, v in asked.items() if v or (k == "token" and v is False)}
        folder = hub.folder_of(folder_or_repository, **given)
        if "dtype" not in options:
            options["dtype"] = _stored_dtype(folder)
        return create_model(checkpoint=folder, **options).eval()

    def push_to_hub(self, repository: str, *, run: str | Path | None = None,
                    **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes; returns the commit's address.

        Args:
            repository: OWNER/NAME on the Hugging Face hub; made where it is missing.
            run: as in :meth:`save_pretrained`.
            options: ``private``, ``token``, ``branch``, ``create_pr``, ``commit_message`` of
                huggingface_hub's mixin.

        Raises:
            CheckpointError: the hub refuses; one line.
            ModuleNotFoundError: huggingface_hub is missing.
        """
        return hub.push(lambda folder: self.save_pretrained(folder, run=run), repository,
                        **options)

    def _card(self, run: Path | None) -> str:
        configuration = self.configuration
        recipe, measured = {}, []
        if run is not None:
            _check_weights(self, run)
            recipe, measured = hub.recipe_of(run), hub.evaluations(run)
        return hub.model_card(configuration.model, entry(configuration.model).description,
                              asdict(configuration.preset), recipe, measured)


def _write(path: Path, text: str) -> None:
    with replacing(path, sync=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _dtype(model: nn.Module) -> str:
    found = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    if len(found) != 1:
        raise CheckpointError(f"model: expected weights of one dtype, got "
                              f"{', '.join(sorted(map(str, found)))}; cast them with .to()")
    return str(found.pop()).removeprefix("torch.")


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that config.json names; float32 of a run's folder, which names none."""
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("dtype", "float32")
    except (OSError, ValueError, AttributeError):  # create_model says what is wrong with it
        return torch.float32
    found = getattr(torch, str(name), None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise CheckpointError(f"checkpoint: {folder / CONFIG} names the dtype {name!r}; expected "
                              "float32, float64, float16 or bfloat16")
    return found


def _check_weights(model: nn.Module, run: Path) -> None:
    """Refuse a run whose weights are not the model's: its card would tell of another."""
    state: dict[str, Tensor] = read_checkpoint(run / WEIGHTS)
    own = model.state_dict()
    other = [k for k in own if k not in state or not torch.equal(own[k].cpu(), state[k])]
    if other:
        raise CheckpointError(f"run: {run / WEIGHTS} has other weights than this model "
                              f"({len(other)} tensors, {other[0]}); load that file, or leave run "
                              "out")
