"""The command line, one file for each group of commands."""

from __future__ import annotations

import sys
from typing import Any

from ..io.extras import cure

_missing: ImportError | None = None
try:
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
        usage,
    )
    from .common import USER_ERRORS, app
except ImportError as _error:
    if (_error.name or "smis_models").partition(".")[0] == "smis_models":
        raise
    _missing = _error

__all__ = ["app", "apply", "common", "convert", "data", "evaluate", "export",
           "main", "measure", "paint", "synthesis", "train", "usage"]


def _line(error: BaseException) -> str:
    """What is said of an error that the user can mend."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and name and "pip install" not in str(error):
        needed = "pip install torch" if name == "torch" else cure("models")
        return f"{name}: not installed, which this needs; {needed}"
    return str(error)


def main(commands: Any = None) -> None:
    """Run the command line: a user's mistake is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # in a locale without some sign: a ? in its place
    if _missing is not None:
        sys.stderr.write(f"error: {_line(_missing)}\n")
        sys.exit(2)
    reuse_freed_memory()
    try:
        if commands is None:
            sys.exit(app(prog_name="smis", standalone_mode=False))
        sys.exit(commands(standalone_mode=False))
    except typer.Abort as abort:  # what some versions make of Ctrl-C, and all of a file's early end
        if isinstance(abort.__cause__, EOFError):
            raise abort.__cause__ from None
        sys.exit(130)
    except usage.USAGE_ERROR as error:
        common.tell_error(usage.usage_line(error))
        sys.exit(2)
    except USER_ERRORS as error:
        if "--debug" in sys.argv[1:]:
            raise
        common.tell_error(_line(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if "--debug" in sys.argv[1:] or not common.lacks_memory(error):
            raise
        common.tell_error("memory: not enough for this; smaller pictures or batches take less")
        sys.exit(2)
