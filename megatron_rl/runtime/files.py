# SPDX-License-Identifier: Apache-2.0
"""The one way a file is written: under its name it is there complete or not at all, whoever else reads or writes it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def scratch_beside(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """For libraries that write files themselves: the block writes to the path it is given, which takes the name `path`
    when the block ends well. When it does not, `path` is as it was and nothing is left beside it. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(path)
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)  # not there where it has taken its name


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whose folder is made, and whoever else does so meanwhile. Raises OSError."""
    with written_atomically(path) as scratch:
        scratch.write_bytes(content)
