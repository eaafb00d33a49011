"""What is said of a name that is not among those that are known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SHOWN = 40


def unknown_name(argument: str, known: Iterable[str], got: str, kind: str = "one of") -> str:
    """One line: what was expected, what came, and which name was perhaps meant.

    Example:
        >>> unknown_name("name", ["tree", "sky"], "skye")
        "name: expected one of tree, sky; got 'skye'; did you mean 'sky'?"
    """
    names = list(known)
    shown = names if len(names) <= _SHOWN else [*names[:8], "..."]
    text = f"{argument}: expected {kind} {', '.join(shown)}; got {got!r}"
    folded = {name.lower().replace("-", "_").replace(" ", "_"): name for name in reversed(names)}
    close = get_close_matches(got.lower().replace("-", "_").replace(" ", "_"), folded, n=1)
    return text + (f"; did you mean {folded[close[0]]!r}?" if close else "")
