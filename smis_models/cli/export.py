"""``smis export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..synthesis import export as exports
from .common import (
    Backend,
    Checkpoint,
    Device,
    Model,
    Seed,
    chosen,
    command,
    console,
    file_to_write,
    selected,
)


@command()
def export(
    out: Annotated[Path, typer.Option(help="file to write: .onnx, or .pt2 of the other two",
                                      callback=file_to_write(""))],
    format: Annotated[str, typer.Option(help=", ".join(exports.FORMATS))] = "onnx",
    model: Model = None, checkpoint: Checkpoint = None, seed: Seed = 0, backend: Backend = None,
    device: Device = "cpu",
) -> None:
    """A generator for servers: labels and code in, picture out; checked against the model."""
    which = chosen(model, checkpoint, device, seed)
    with selected(backend):
        exports.check_format(format, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        made = exports.export(which.load(), out, format)
    console.print(f"wrote {made.path}: {made.size / 1e6:.1f} MB, reads {', '.join(made.names)}; "
                  f"largest difference {made.difference:.1e} of the largest value",
                  soft_wrap=True, highlight=False)
    if made.operators:
        console.print(f"calls {len(made.operators)} operators of smis_kernels: import it before "
                      "loading, or export with --backend reference", soft_wrap=True)
