"""The Hugging Face hub's conventions: a folder of weights, config.json and a model card."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .checkpoint import CONFIG, WEIGHTS, CheckpointError, read_metadata
from .files import file_hash

CARD = "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SEAL = "<!-- smis_models card, sha256 {} -->"


def metric_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, value, measured with) of what ``smis evaluate`` wrote."""
    rows, results = [], result["results"]
    titles = {"mcsd": "mCSD", "mocd": "mOCD", "diversity": "diversity"}
    for name, values in results.get("diversity", {}).items():
        rows += [(title, f"{values[metric]:.4g}", name) for metric, title in titles.items()]
    if "fid" in results:
        found = results["fid"]
        rows.append(("FID" if found["published_weights"] else "Fréchet distance",
                     f"{found['fid']:.2f}",
                     "; ".join(found[key] for key in ("network", "note") if key in found)))
    if "segmentation" in results:
        found = results["segmentation"]
        judge = f"label rule {found['label_rule']}"
        if "predictions" in found:  # by other pictures, perhaps of another model
            judge += f"; {found['maps']} label maps in {found['predictions']}"
        rows += [("mIoU", f"{found['miou']:.1%}", judge),
                 ("accuracy", f"{found['accuracy']:.1%}", judge)]
    return rows


def protocol_title(facts: Mapping[str, Any]) -> str:
    """The title of a table: the protocol's name, and all that differs from it.

    Example:
        >>> protocol_title({"name": "n100-m19", "changed": {"diversity.layouts": 10}})
        'n100-m19, changed: diversity.layouts 10'
    """
    changed = ", ".join(f"{key} {value}" for key, value in facts.get("changed", {}).items())
    return facts.get("name", "unnamed") + (f", changed: {changed}" if changed else "")


def evaluations(run: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file, content) of the JSON files of ``smis evaluate`` in a folder, of its weights alone."""
    digest, found = file_hash(run / WEIGHTS), []
    for path in sorted(run.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            weights = content["model"]["weights_sha256"].values()
            metric_rows(content), protocol_title(content["protocol"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # some other JSON file
        if digest in weights:
            found.append((path.name, content))
    return found


def recipe_of(run: Path) -> dict[str, Any]:
    """What a training run says of itself: how far it came, and the options it was given."""
    facts = json.loads(read_metadata(run / WEIGHTS).get("smis_training", "{}"))
    try:
        options = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        options = {}
    told = {key: facts[key] for key in ("step", "epoch", "losses", "ema", "precision", "init",
                                        "whiten", "seed")
            if facts.get(key) not in (None, False) or (key == "seed" and key in facts)}
    if "losses" in told:
        told["losses computed"] = told.pop("losses")
    if facts.get("changes"):  # of the options, where the run went on with others
        told["changed on the way"] = facts["changes"]
    sections = ("data", "losses", "optimizer", "schedule")
    return {**told, **{key: options[key] for key in sections if key in options}}


def model_card(model: str, description: str, options: Mapping[str, Any],
               recipe: Mapping[str, Any], measured: list[tuple[str, dict[str, Any]]]) -> str:
    """The text of a model card; it says nothing that the files do not."""
    maps = "labels, instances" if options.get("instance_edge") else "labels"
    lines = ["---", "library_name: smis-kernels", "pipeline_tag: image-to-image", "tags:",
             "- semantic-image-synthesis", f"- {model.partition('_')[0]}", "---", "", f"# {model}",
             "", f"{description}.", "", "```python", "from smis_models import SynthesisModel", "",
             'model = SynthesisModel.from_pretrained("FOLDER_OR_REPOSITORY")',
             f"picture = model(model.semantics({maps}))  # (N, H, W) integers; RGB in [-1, 1]",
             "```", "", "## Options", "", "| option | value |", "|---|---|"]
    lines += [f"| {key} | `{value}` |" for key, value in options.items()]
    if recipe:
        lines += ["", "## Recipe", "", "| | |", "|---|---|"]
        lines += [f"| {key} | `{json.dumps(value)}` |" for key, value in recipe.items()]
    for name, result in measured:
        data = {k: v for k, v in result.get("data", {}).items() if isinstance(v, (str, int))}
        lines += ["", f"## Metrics ({name})", "",
                  "; ".join([f"protocol {protocol_title(result['protocol'])}",
                             *(f"{k} {v}" for k, v in data.items()), f"seed {result.get('seed')}"]),
                  "", "| metric | value | measured with |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in metric_rows(result)]
    text = "\n".join(lines) + "\n"
    return text + "\n" + _SEAL.format(hashlib.sha256(text.encode()).hexdigest()) + "\n"


def written_by_hand(card: Path) -> bool:
    """Whether a model card is not, or no longer, as :func:`model_card` made it."""
    content = card.read_text(encoding="utf-8", errors="replace")
    text, _, seal = content.rstrip("\n").rpartition("\n\n")
    return seal != _SEAL.format(hashlib.sha256(f"{text}\n".encode()).hexdigest())


@cache
def _mixin() -> Any:
    try:
        from huggingface_hub import ModelHubMixin, snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "hub: repositories need huggingface_hub, folders do not; pip install huggingface_hub",
            name=error.name) from None

    class HubFolder(ModelHubMixin, library_name="smis-kernels"):
        """What the mixin saves and loads: a folder, by functions."""

        def __init__(self, save: Callable[[Path], None] | None = None) -> None:
            self.save, self.folder = save, Path()

        def _save_pretrained(self, save_directory: Path) -> None:
            assert self.save is not None
            self.save(save_directory)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
            made = cls()
            made.folder = Path(snapshot_download(
                model_id, allow_patterns=[CONFIG, WEIGHTS], **options))
            return made

    return HubFolder


def _problem(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def folder_of(name: str | Path, **options: Any) -> Path:
    """A local folder as it is, or that of a repository of the hub, downloaded where it is not yet.

    Raises:
        CheckpointError: neither, or what the hub answers, in one line.
        ModuleNotFoundError: a repository, and huggingface_hub is missing.
    """
    if Path(name).is_dir():
        if told := [option for option, value in options.items() if value]:
            raise ValueError(f"{told[0]}: {name} is a folder, which has none")
        return Path(name)
    if not _REPOSITORY.fullmatch(str(name)):
        raise CheckpointError(f"checkpoint: expected a folder or a repository OWNER/NAME, got "
                              f"{str(name)!r}; no such folder is here")
    mixin = _mixin()
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder: Path = mixin.from_pretrained(str(name), **options).folder
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise CheckpointError(f"checkpoint: {name} is no folder here, and the hub does not give "
                              f"it: {_problem(error)}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"checkpoint: {CONFIG} of {name} is no JSON: {_problem(error)}"
                              ) from error
    return folder


def push(save: Callable[[Path], None], repository: str, **options: Any) -> str:
    """Upload what ``save`` writes into a folder; the commit's address.

    Raises:
        CheckpointError: what the hub answers, in one line.
        ModuleNotFoundError: huggingface_hub is missing.
    """
    mixin = _mixin()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return str(mixin(save).push_to_hub(repository, **options))
    except (HfHubHTTPError, HFValidationError, ConnectionError) as error:
        raise CheckpointError(f"hub: {repository} was not written: {_problem(error)}") from error
