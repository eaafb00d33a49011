"""Files are written whole or not at all, and told by their hash."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place where the block ends without error.

    On an error, a full disk included, the temporary file goes and the old one stays. With ``sync``
    the content is on the disk before, so that a power cut leaves one of the two whole.

    Example:
        >>> with replacing("notes.txt") as partial:
        ...     _ = partial.write_text("all of it, or nothing")
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        if sync:  # a rename may reach the disk before the content does
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(folder: str | Path, *names: str) -> None:
    """Remove what :func:`replacing` left in ``folder`` where a process was killed.

    For a folder that one process at a time writes to.

    Args:
        folder: may be missing.
        names: patterns of the files that were to be written, such as ``*.png``.
    """
    for name in names:
        for left in Path(folder).glob(f".{name}.{'[a-z0-9_]' * 8}"):
            left.unlink(missing_ok=True)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def published_hash(name: str) -> str:
    """The first digits of a file's SHA-256, where its name tells them: ``vgg19-dcbb9e9d.pth``."""
    return Path(name).stem.rpartition("-")[2]
