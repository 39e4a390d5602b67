# SPDX-License-Identifier: Apache-2.0
"""Media are ordinary files: opening a named pipe waits for ever, and reading a device may never end."""

from __future__ import annotations

import os
import stat

from megatron_rl.errors import VideoDecodeError


def regular_file(path: str) -> os.stat_result:
    """Its size and times. Raises VideoDecodeError for everything that is not an ordinary file with content."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise VideoDecodeError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise VideoDecodeError(path, "cannot be read: Is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise VideoDecodeError(path, "not a file, but a pipe, a device or a socket")
    if found.st_size == 0:
        raise VideoDecodeError(path, "the file is empty (0 bytes)")
    return found
