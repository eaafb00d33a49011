"""The command line, one file for each group of commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..io.allocator import reuse_freed_memory
from . import (
    apply,
    common,
    convert,
    data,
    evaluate,
    export,
    measure,
    paint,
    synthesis,
    train,
)
from .common import USER_ERRORS, app

__all__ = ["app", "apply", "common", "convert", "data", "evaluate", "export",
           "main", "measure", "paint", "synthesis", "train"]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of errors")] = False,
) -> None:
    """Read by :func:`main`, which sees every error."""


def main(commands: typer.Typer = app) -> None:
    """Run the command line: a user's mistake is one line and exit code 2."""
    reuse_freed_memory()
    try:
        commands()
    except USER_ERRORS as error:
        if "--debug" in sys.argv[1:]:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
