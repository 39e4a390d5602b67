# SPDX-License-Identifier: Apache-2.0
"""Files in folders that several processes write to: each is there complete or not at all."""

from __future__ import annotations

import uuid
from pathlib import Path


def scratch_beside(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whose folder is made, and whoever else does so meanwhile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(path)
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
