# SPDX-License-Identifier: Apache-2.0
"""Full integrity of media files: a list of sha256 sums, as `sha256sum` writes it.

Decoders find most damage, but not all: a flipped bit may decode to a wrong picture. A sum finds every flipped bit.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

from megatron_rl.errors import VideoDecodeError

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class Manifest:
    """The sums of a file `hex  path` per line; relative paths are resolved against the folder of the file."""

    def __init__(self, path: str):
        self._path = path
        self._sums: dict[str, str] = {}
        for number, line in enumerate(Path(path).expanduser().read_text(encoding="utf-8").splitlines(), start=1):
            found = _LINE.fullmatch(line)
            if not found:
                raise ValueError(
                    f"data.manifest={path}: line {number} is not `sha256  path`; write it with "
                    "`sha256sum FILES > manifest`"
                )
            self._sums[os.path.abspath(Path(path).expanduser().parent / found[2])] = found[1]

    def check(self, path: str) -> None:
        """Raise VideoDecodeError unless the file is listed and unchanged. Each state of a file is read once."""
        stated = self._sums.get(os.path.abspath(path))
        if stated is None:
            raise VideoDecodeError(path, f"not listed in data.manifest={self._path}")
        try:
            stat = os.stat(path)
            actual = _sha256(path, stat.st_mtime_ns, stat.st_size)
        except OSError as error:
            raise VideoDecodeError(path, f"cannot be read: {error.strerror}") from error
        if actual != stated:
            raise VideoDecodeError(
                path, f"damaged or changed: its sha256 is {actual[:12]}..., data.manifest says {stated[:12]}..."
            )


@functools.lru_cache(maxsize=65_536)
def _sha256(path: str, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
