"""From a recipe's name or a file, and the command line's options, to a :class:`TrainConfig`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from .. import families
from ..families import Preset
from ..io.choices import unknown_name
from ..io.extras import cure
from ..io.files import read_text
from .config import TrainConfig

_FILES = (".yaml", ".yml", ".json")


def _config(name: str) -> TrainConfig:
    model, options = families.RECIPES[name]
    hints = get_type_hints(TrainConfig)
    groups = {key: hints[key](**value) if isinstance(value, Mapping) else value
              for key, value in options.items()}
    return TrainConfig(model=model, network=families.entry(model).preset, **groups)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    name: partial(_config, name) for name in families.RECIPES}
"""Name -> its configuration: what `smis train NAME` starts from."""


def _parser(network: type[Preset]) -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise ValueError("jsonargparse: not installed, which reads training options; "
                         f"{cure('models', 'jsonargparse', 'pyyaml')}") from error
    parser = ArgumentParser(prog="smis train CONFIG", exit_on_error=False)
    parser.add_class_arguments(TrainConfig, skip={"network"})
    parser.add_argument("--network", type=network)
    return parser


def to_dict(config: Any) -> dict[str, Any]:
    """Plain types only: what goes into files."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_json(config: TrainConfig) -> str:
    """The configuration as a file that ``smis train`` takes."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def _line(error: Exception) -> str:
    """The parser's message in one line."""
    return " ".join(str(error).split())


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``change``, level by level."""
    out = dict(base)
    for key, value in change.items():
        inner = out.get(key)
        out[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(
            value, Mapping) else value
    return out


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"config: {path} does not exist; give a file or one of "
                                f"{', '.join(RECIPES)}")
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError) as error:  # a date of a 13th month, another encoding
        raise ValueError(f"config: {path} is no YAML or JSON: {_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: expected options (name: value) in {path}, got "
                         f"{type(content).__name__}")
    return content


def recipe(name: str) -> TrainConfig:
    """A recipe by name.

    Raises:
        ValueError: an unknown one; the message lists them.

    Example:
        >>> config = recipe("groupdnet_deepfashion")
    """
    if name not in RECIPES:
        raise ValueError(unknown_name("config", RECIPES, name, "a .yaml or .json file, or one of"))
    return RECIPES[name]()


def from_dict(content: Mapping[str, Any], arguments: Sequence[str] = ()) -> TrainConfig:
    """A configuration from plain types, as :func:`to_dict` makes them, changed by ``arguments``.

    ``content`` may name a ``recipe`` to start from, or a ``model``; what it leaves out is as there.

    Raises:
        ValueError: an unknown option, a value of another type, or contradictory options: one line.
    """
    given = dict(content)
    if "recipe" in given:
        base = to_dict(recipe(str(given.pop("recipe"))))
    elif "model" in given:
        model = str(given["model"])  # whose recipe is the start, where there is one
        base = to_dict(RECIPES[model]() if model in RECIPES else TrainConfig(
            model=model, network=families.entry(model).preset))
    else:
        raise ValueError("config: expected a recipe or a model; add `recipe: NAME` or "
                         "`model: NAME`")
    for name, held in base.items():
        if isinstance(held, dict) and not isinstance(given.get(name, held), Mapping):
            got = "null" if given[name] is None else type(given[name]).__name__
            raise ValueError(f"config: expected options (name: value) under {name}, got {got}; "
                             f"leave {name} out, or give its options")
    if given.get("model", base["model"]) != base["model"]:
        raise ValueError(f"model: the recipe is of {base['model']}, got {given['model']!r}; "
                         "leave one of recipe and model out")
    parser = _parser(type(families.entry(base["model"]).preset))
    from jsonargparse import ArgumentError

    try:
        # Twice, so that an unknown name in the file is the file's error.
        defaults = parser.parse_object(_merged(base, given))
        parser.set_defaults(defaults)
        chosen = parser.parse_args(list(arguments))
        config: TrainConfig = parser.instantiate(chosen)
        built = TrainConfig(**vars(config)) if not isinstance(config, TrainConfig) else config
    except (ArgumentError, TypeError) as error:
        listed = "; --options lists all" if "unrecognized" in str(error) else ""
        raise ValueError(f"config: {_line(error)}{listed}") from error
    if built.model != base["model"]:
        raise ValueError(f"model: the configuration is of {base['model']}, got {built.model!r}; "
                         "choose another CONFIG instead")
    return built


def load_config(name: str | Path, arguments: Sequence[str] = ()) -> TrainConfig:
    """The configuration ``name``, a recipe or a .yaml or .json file, changed by ``arguments``.

    Args:
        name: one of ``RECIPES``, or a file.
        arguments: as on the command line, such as ``["--data.batch", "4"]``.

    Raises:
        ValueError: unknown or contradictory options, another type: one line that names it.
        FileNotFoundError: no such file.

    Example:
        >>> config = load_config("groupdnet_deepfashion", ["--network.ngf", "16"])
    """
    if Path(name).suffix.lower() in _FILES:
        return from_dict(_read(Path(name)), arguments)
    return from_dict({"recipe": recipe(str(name)) and str(name)}, arguments)
