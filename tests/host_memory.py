# SPDX-License-Identifier: Apache-2.0
"""This process's memory without what glibc keeps of freed blocks, which depends on the order of threads."""

from __future__ import annotations

import ctypes

_LIBC = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3  # malloc.h


class _MallInfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


_LIBC.mallinfo2.restype = _MallInfo2


def allocated() -> int:
    """Bytes that native code in the main thread has allocated and not freed, apart from separately mapped blocks."""
    return int(_LIBC.mallinfo2().uordblks)


def give_back_freed() -> None:
    """Return freed blocks to the system, so that a reading of resident memory counts none of them."""
    _LIBC.malloc_trim(0)


def map_large_blocks() -> None:
    """Return a block of 64 KiB or more the moment it is freed, so that a most of resident memory counts live ones.

    Otherwise glibc raises the size up to which it keeps blocks as it learns: 30 MB more or less from run to run.
    """
    assert _LIBC.mallopt(_M_MMAP_THRESHOLD, 64 * 1024) == 1
