"""The command that installs what an optional part of the package needs."""

from __future__ import annotations

import re
from importlib import metadata


def cure(extra: str, *only: str) -> str:
    """``pip install ...`` with the requirements of an extra, by their own names.

    Args:
        extra: of this package, which no index has.
        only: the names of those that are missing; without any, all of the extra.

    Example:
        >>> cure("train", "tensorboard").startswith("pip install")
        True
    """
    try:
        requirements = metadata.requires("smis-kernels") or []
    except metadata.PackageNotFoundError:
        requirements = []
    mark = re.compile(rf"""extra\s*==\s*['"]{extra}['"]""")
    found = [text.partition(";")[0].strip() for text in requirements if mark.search(text)]
    if only:
        found = [text for text in found if re.split(r"[<>=!~ \[(]", text)[0] in only] or list(only)
    return "pip install " + (" ".join(f"'{text}'" for text in found) or f"'.[{extra}]'")
