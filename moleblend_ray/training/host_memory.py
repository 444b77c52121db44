"""What a process does with the memory that its tensors leave."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Parameters of ``mallopt(3)`` in glibc's ``malloc.h``."""
_LARGEST: Final = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let the allocator of this process keep what is freed, for the next step, instead of giving it back to the system.

    A training step on a CPU frees and takes the same hundreds of MiB again and again; getting the pages anew costs 5 to 7 %
    of it. Only glibc has the switch; elsewhere nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # Older versions refuse more than 32 MiB. Without the first, the second would leave every larger tensor to be mapped anew.
    if any(libc.mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in (1 << 30, 1 << 25)):
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
