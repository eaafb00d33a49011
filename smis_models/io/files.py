"""Files are written whole or not at all, and told by their hash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".smis.lock"
_MARK = "smis-"  # of temporary files: others may be hidden files of a user
_LONGEST = 200  # bytes of a name: file systems take 255, and more is put around it
UNFINISHED = "smis-unfinished.json"
_WRITTEN = [f"*{suffix}" for suffix in (".png", ".gif", ".webp", ".jpg", ".json", ".csv", ".md",
                                        ".html", ".npz", ".safetensors")]


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
    kept = os.fsdecode(os.fsencode(path.name)[-_LONGEST:])  # the end, by which it is found again
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{kept}.{_MARK}")
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
        for left in Path(folder).glob(f".{name}.{_MARK}{'[a-z0-9_]' * 8}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[Path]:
    """Make ``folder``, and be the one process that writes to it inside the block.

    What killed processes left half-written in it goes; a folder that stays empty does, too.

    Raises:
        ValueError: another process writes to it; the message tells its number.

    Example:
        >>> with locked("out") as folder:
        ...     _ = (folder / "notes.txt").write_text("mine")
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        try:
            who = f"process {path.read_text().split()[0]}"
        except (OSError, IndexError):
            who = "another process"
        raise ValueError(f"out: {who} is writing to {folder}; wait until it ends, or give another "
                         "place") from error
    try:
        with suppress(OSError):  # Windows keeps a locked file from being written or removed
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        remove_partial(folder, *_WRITTEN)
        yield folder
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held, so that it is nobody else's
        lock.release()
        with suppress(OSError):  # where nothing was written, nothing stays
            for place in made:
                place.rmdir()


@contextmanager
def unfinished(folder: str | Path, task: Mapping[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Mark ``folder`` as unfinished until the block has come to its end.

    Yields the ``task`` of an earlier block that did not; None where there was none.

    Example:
        >>> with unfinished("set", {"count": 3}) as before:
        ...     assert before is None
    """
    path = Path(folder) / UNFINISHED
    before = unfinished_task(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if before is not None:
        for inner, _, _ in os.walk(folder):
            remove_partial(inner, *_WRITTEN)
    with replacing(path) as partial:
        partial.write_text(json.dumps(dict(task)) + "\n")
    yield before
    path.unlink()


def unfinished_task(folder: str | Path) -> dict[str, Any] | None:
    """What :func:`unfinished` left in ``folder``; None where nothing."""
    try:
        found = json.loads((Path(folder) / UNFINISHED).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_text(path: str | Path) -> str:
    """A text that somebody wrote: UTF-8 whatever the locale, or UTF-16 as Windows' tools write it.

    Raises:
        UnicodeDecodeError: another encoding.
    """
    content = Path(path).read_bytes()
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return content.decode("utf-16" if marked else "utf-8-sig")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hashes(path: Path) -> dict[str, str]:
    """Name -> SHA-256 of a file, or of all in a folder."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return {file.name: file_hash(file) for file in files}


def published_hash(name: str) -> str:
    """The first digits of a file's SHA-256, where its name tells them: ``vgg19-dcbb9e9d.pth``."""
    return Path(name).stem.rpartition("-")[2]
