"""``smis convert``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..families import (
    PARTS,
    Preset,
    checkpoint_file,
    configured_preset,
    create_model,
    stored_configuration,
)
from ..io.checkpoint import save_checkpoint
from .common import (
    called,
    command,
    console,
    existing,
    file_to_write,
    keep_inputs,
    show,
    weight_files,
)


@command()
def convert(
    source: Annotated[Path, typer.Argument(
        help=".pth or .safetensors file, or a folder with latest_net_G.pth (and _E, _D)")],
    out: Annotated[Path, typer.Argument(
        help="file to write, .safetensors", callback=file_to_write(".safetensors"))],
    model: Annotated[
        str | None, typer.Option(help="a name that `smis list` shows; not needed where SOURCE "
                                      "holds its configuration")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, where the network was trained with other "
                                            "options than published; repeat for more")
    ] = None,
) -> None:
    """An official checkpoint to one safetensors file that says what it is; loaded strictly."""
    existing("source", source, "a .pth or .safetensors file, or a folder with latest_net_G.pth")
    keep_inputs([out], weight_files(checkpoint_file(source)), "name")
    if model is None and stored_configuration(source) is None:
        raise ValueError(
            f"model: expected a name that smis list shows, for {source} holds no configuration"
        )
    with called(name="model"):
        name, published = configured_preset(model, source, {})
    made = create_model(name, source, **_options(option or (), published))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(made, out)
    parts = dict(made.named_children())
    show(("part", "parameters", "tensors"), (
        (part, f"{sum(p.numel() for p in parts[part].parameters()):,}",
         str(len(parts[part].state_dict()))) for part in PARTS if part in parts))
    console.print(f"{made.name}: {_labels(made.preset)}", soft_wrap=True)
    console.print(f"wrote {out}; create_model(checkpoint={str(out)!r}) loads it", soft_wrap=True)


def _options(pairs: Sequence[str], preset: Preset) -> dict[str, Any]:
    """Fields of ``preset`` from NAME=VALUE; values as Python writes them, else text."""
    found = {}
    current = vars(preset)
    optional = {field.name for field in fields(preset) if field.default is None}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"option: expected NAME=VALUE, got {pair!r}")
        if name not in current:
            raise ValueError(f"option: expected one of {', '.join(current)}; got {name!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        kind = type(current[name])
        if not (value is None and name in optional) and (
                current[name] is not None and type(value) is not kind):
            raise ValueError(f"option: expected {name}={current[name]!r} or another "
                             f"{kind.__name__}{' or None' if name in optional else ''}, got "
                             f"{text!r}")
        found[name] = value
    return found


def _labels(preset: Preset) -> str:
    """What the numbers in label maps mean, in words."""
    text = f"labels 0..{preset.classes - 1}"
    if preset.unlabelled is not None:
        text += f", raw as in the data set's files: {preset.unlabelled} is unlabelled"
    if preset.dont_care is not None:
        text += f"; 255 becomes {preset.dont_care}"
    return text + (", with instance maps" if preset.instance_edge else "")
