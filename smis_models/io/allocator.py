"""Keep freed memory in the process, so that the next large tensor does not fault its pages in."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_THRESHOLD = 1 << 30
_NEVER = -1  # a network's features together outgrow any threshold that an int holds
_TOP_PAD = 64 << 20

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": str(_NEVER),
    "MALLOC_TOP_PAD_": str(_TOP_PAD),
}
"""The same settings for a program that cannot call :func:`reuse_freed_memory` first."""


def reuse_freed_memory() -> bool:
    """Tell glibc to keep freed memory; True if it took the settings, False elsewhere.

    By default every tensor of 32 MiB or more is mapped anew, and page faults, not arithmetic,
    set the speed of memory-bound ops on the CPU. The ``smis`` command line and the benchmarks
    call this at their start; the libraries never do, for the setting is the whole process's.

    Example:
        >>> from smis_models.io.allocator import reuse_freed_memory
        >>> reuse_freed_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _THRESHOLD),
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, _TOP_PAD),
    )
    taken = [mallopt(name, value) for name, value in settings]
    return all(status == 1 for status in taken)
