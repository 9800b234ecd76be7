"""Keep freed memory in the process, so that a training step does not ask the system for the same pages again.

glibc gives large freed blocks back at once: every step of a training run then takes page faults on the
activations that the step before had. On a CPU that is several per cent of a step (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

# The numbers of glibc's malloc.h. A block at or above the mmap threshold is given back whenever it is freed;
# the top of the heap is, once it is larger than the trim threshold.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_GIB = 2**30


def keep_freed_memory() -> bool:
    """For the process's lifetime, keep freed blocks of less than 1 GiB for the next allocation.

    Peak memory stays about the same; what the process holds after its peak does not shrink. Nothing happens
    where the C library is not glibc, or where the environment sets its allocator already (``MALLOC_*``,
    ``GLIBC_TUNABLES``, ``LD_PRELOAD``). Memory of an accelerator is not concerned.

    Returns:
        Whether it is in force.
    """
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    return bool(library.mallopt(_TRIM_THRESHOLD, 2 * _GIB - 1) and library.mallopt(_MMAP_THRESHOLD, _GIB))
